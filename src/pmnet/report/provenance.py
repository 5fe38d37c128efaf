"""Where a number comes from: every stored result carries the command, configuration, seed, commit and machine."""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from pmnet.atomic import replacing


def provenance() -> dict[str, Any]:
    """Command line, date, commit, versions and machine of this process."""
    return {
        "command": _command(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {name: _version(name) for name in ("pmnet", "transformers", "numpy")}
        | {"torch": str(torch.__version__), "python": platform.python_version()},
        "machine": {
            "processor": _processor(),
            "instructions": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "system": platform.system(),
        },
    }


def prepare_folder(folder: Path, *names: str) -> None:
    """Make a folder for results, before they are measured.

    Raises:
        OSError: if it cannot be made or written to, or one of `names` in it is there and is no file.
    """
    try:
        with suppress(FileExistsError):
            folder.mkdir(parents=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"nothing can be saved in {folder}: {error.strerror}") from error
    for path in (folder / name for name in names):
        if path.exists() and not path.is_file():
            raise OSError(f"{path} is {'a folder' if path.is_dir() else 'no file'}, nothing can be saved there")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that the file appears complete or not at all; numbers that are not finite become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_finite(content), indent=1, allow_nan=False) + "\n"
    with replacing(path) as partial:
        partial.write_text(text)


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {name: _finite(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:  # run from a checkout that was not installed
        return None


def _command() -> str:
    module = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", module.name] if module else [Path(sys.argv[0]).name]
    return shlex.join([*program, *sys.argv[1:]])


def _commit() -> str | None:
    """Commit of the repository that this file belongs to, not of one that it was merely installed in.

    `+changes` is added if files differ from it, but for those below `results/`: a run may store its own. Where the
    files of a commit were copied to a machine that has no repository, or another one, PMNET_COMMIT names it.
    """
    if "PMNET_COMMIT" in os.environ:
        return os.environ["PMNET_COMMIT"]
    here = Path(__file__).parent
    try:
        subprocess.run(["git", "ls-files", "--error-unmatch", __file__], cwd=here, capture_output=True, check=True)
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, check=True)
        status = ["git", "status", "--porcelain", "-uno", "--", ":/", ":(top,exclude)results"]
        changed = subprocess.run(status, cwd=here, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head.stdout.strip() + ("+changes" if changed.stdout.strip() else "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
