"""Opening the folder of any model that can be compared."""

import json
from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedModel

from pmnet.model.load import LOADING_ERRORS, check_weights, first_line, load_model

OTHERS = ("mistral", "llama", "mamba", "mamba2", "pmnet-lstm", "pmnet-ntm", "pmnet-variant")


def load_any(folder: Path) -> PreTrainedModel:
    """Load a PMNet, or a control, in eval mode on the CPU.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if a file is damaged, or is of no model that is known here.
    """
    try:
        kind = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError):
        kind = None
    if kind not in OTHERS:
        return load_model(folder)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, output_loading_info=True, use_safetensors=True, local_files_only=True, ignore_mismatched_sizes=True
        )
    except LOADING_ERRORS as error:
        raise ValueError(f"{folder} is not a complete {kind} model: {first_line(error)}") from error
    check_weights(folder, model, report)
    return model.eval()
