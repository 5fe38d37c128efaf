"""Modelling code beside the weights, so that a model folder works with `trust_remote_code=True` where this package is
not installed: the same modules in plain PyTorch, flattened into one folder.
"""

import ast
import json
import re
from pathlib import Path

import pmnet
from pmnet.atomic import replacing

ENTRIES = {
    "AutoConfig": "pmnet.config.PMNetConfig",
    "AutoModel": "pmnet.model.modeling.PMNetModel",
    "AutoModelForCausalLM": "pmnet.model.modeling.PMNetForCausalLM",
    "AutoTokenizer": "pmnet.model.tokenizer.ByteTokenizer",
}
LEFT_OUT = {"pmnet.ops.triton": "the Triton kernels are part of the pmnet package only"}
_SOURCE = Path(pmnet.__file__).parent


def export_code(folder: Path) -> list[Path]:
    """Write the modelling files into a model folder and name them in `config.json` and `tokenizer_config.json`.

    Args:
        folder: holds both files, as `save_pretrained` of a model and a tokenizer write them.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: if one of the two is missing; nothing is written then.
        ValueError: if one of the two is not a JSON object.
    """
    classes = {name: _flat(*target.rsplit(".", 1)) for name, target in ENTRIES.items()}
    tokenizer = classes.pop("AutoTokenizer")
    maps = {"config.json": classes, "tokenizer_config.json": {"AutoTokenizer": [tokenizer, None]}}
    settings = {}
    for name, auto_map in maps.items():
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is not a model with a tokenizer: it has no {name}")
        try:
            settings[name] = {**json.loads((folder / name).read_text()), "auto_map": auto_map}
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / name} is damaged: {error}") from error
    files = {f"{_flat(module)}.py": _code(module) for module in _needed()}
    files |= {name: json.dumps(content, indent=2) + "\n" for name, content in settings.items()}
    for name, text in files.items():
        with replacing(folder / name) as partial:
            partial.write_text(text)
    return [folder / name for name in files]


def _needed() -> list[str]:
    """The entry modules and everything of this package that they import."""
    found: list[str] = []
    waiting = [target.rsplit(".", 1)[0] for target in ENTRIES.values()]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found.append(module)
            waiting += [] if module in LEFT_OUT else [target for _, target, _ in _imports(module)]
    return sorted(found)


def _imports(module: str) -> list[tuple[ast.ImportFrom, str, str | None]]:
    """Imports of this package in a module: the node, the module meant, and its own name if it is imported whole."""
    found: list[tuple[ast.ImportFrom, str, str | None]] = []
    for node in ast.walk(ast.parse(_path(module).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pmnet":
            assert node.module is not None
            inside = f"{node.module}.{node.names[0].name}"
            whole = node.module not in LEFT_OUT and _path(inside).exists()
            found.append((node, inside if whole else node.module, node.names[0].name if whole else None))
    return found


def _code(module: str) -> str:
    """Source of a module with flat, relative imports and operators of a name space of their own."""
    if module in LEFT_OUT:
        return f'raise ImportError("{LEFT_OUT[module]}")\n'
    text = _path(module).read_text()
    for node, target, whole in _imports(module):
        line = ast.get_source_segment(text, node)
        assert line is not None
        flat = f"from . import {_flat(target)} as {whole}" if whole else line.replace(target, f".{_flat(target)}", 1)
        text = text.replace(line, flat)
    # the folder's own name space: several such models may live in one process, and a folder may have any name
    space = r're.sub(r"\\W", lambda m: f"_{ord(m[0]):x}", __name__, flags=re.ASCII) + "::\1"'
    text, count = re.subn(r'"pmnet::(\w+)"', space, text)
    return text.replace("import torch\n", "import re\n\nimport torch\n", 1) if count else text


def _path(module: str) -> Path:
    path = _SOURCE.joinpath(*module.split(".")[1:])
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _flat(module: str, name: str | None = None) -> str:
    return module.replace(".", "_") + (f".{name}" if name else "")
