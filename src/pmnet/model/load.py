"""Opening a model folder, with one clear sentence for whatever is wrong with it."""

import json
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import PreTrainedModel

from pmnet.config import PMNetConfig
from pmnet.model.modeling import PMNetForCausalLM
from pmnet.ops import quantize_int8

# what `from_pretrained` raises: about files, fields of a configuration, and libraries that one of them asks for
LOADING_ERRORS = (
    SafetensorError, RuntimeError, ValueError, TypeError, OSError, AttributeError, ImportError, StrictDataclassError
)  # fmt: skip


def load_model(folder: Path, int8: bool = False) -> PMNetForCausalLM:
    """Load a PMNet from `config.json` and `model.safetensors`, in eval mode on the CPU.

    With `int8`, weights are rounded to 8-bit integers (`quantize_int8`).

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if a file is damaged, or the two do not belong together.
    """
    for name in ("config.json", "model.safetensors"):
        if not (folder / name).is_file():
            inside = f"; did you mean {folder / 'model'}?" if (folder / "model").is_dir() else ""
            raise FileNotFoundError(f"{folder} is not a model: it has no {name}{inside}")
    try:
        facts = json.loads((folder / "config.json").read_text())
        kind = facts.get("model_type") if isinstance(facts, dict) else None
        if kind != PMNetConfig.model_type:
            raise ValueError(f"model_type is {kind!r}, not {PMNetConfig.model_type!r}")
        config = PMNetConfig.from_pretrained(folder)
        config.return_dict = True  # outputs are asked for by name here
        model, report = PMNetForCausalLM.from_pretrained(
            folder, config=config, output_loading_info=True, use_safetensors=True, local_files_only=True,
            ignore_mismatched_sizes=True,  # so that they are named below
        )  # fmt: skip
    except LOADING_ERRORS as error:
        raise ValueError(f"{folder} is not a complete PMNet model: {first_line(error)}") from error
    check_weights(folder, model, report)
    if int8:
        quantize_int8(model)
    return model.eval()


def check_weights(folder: Path, model: PreTrainedModel, report: dict[str, Any]) -> None:
    """Raise ValueError, naming the first tensor, if what `from_pretrained` loaded (`report`) is not the whole model."""
    found = {
        "missing": report["missing_keys"],
        "of another shape": [name for name, *_ in report["mismatched_keys"]],
        "not in this model": report["unexpected_keys"],
    }
    for what, names in found.items():
        if names:
            raise ValueError(f"{folder} is not a complete model: {min(names)} is {what}")
    for name, tensor in model.named_parameters():
        if not tensor.isfinite().all():
            raise ValueError(f"{folder} is damaged: {name} is not finite")


def first_line(error: Exception) -> str:
    """What an error says first, or its name where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
