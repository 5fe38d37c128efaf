"""Checkpoints that appear complete or not at all, hold no pickles, and resume to the bit.

A run folder holds `checkpoints/step-N/`: the model in Hugging Face format (`config.json`, `model.safetensors`),
`optimizer.safetensors` (moments and random state), `state.safetensors` (what the model remembers, if training carries
it) and `trainer.json` (step, schedule, task, and the plan: recipe, model, processes, files).
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from pmnet.atomic import replacing
from pmnet.model import ByteTokenizer


def save_checkpoint(
    run: Path,
    step: int,
    model: PreTrainedModel,
    optimizers: list[torch.optim.Optimizer],
    schedules: list[dict[str, Any]],
    facts: dict[str, Any],
    state: dict[str, Tensor] | None = None,
    keep: int = 2,
) -> Path:
    """Write `checkpoints/step-N` beside the others, then delete all but the newest `keep`.

    Args:
        run: run folder.
        step: optimizer steps done.
        model, optimizers: what to save.
        schedules: JSON-able state of the learning-rate schedule of each optimizer.
        facts: JSON-able rest (task state, plan).
        state: of the model, where it is carried from batch to batch; empty before the first.
        keep: checkpoints to keep.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: if the disk is full or not writable; earlier checkpoints are then untouched.
    """
    target = run / "checkpoints" / f"step-{step}"
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        model.save_pretrained(partial)
        tensors = {"random": torch.get_rng_state()}
        for number, optimizer in enumerate(optimizers):
            for index, moments in optimizer.state_dict()["state"].items():
                tensors |= {f"{number}.{index}.{name}": value for name, value in moments.items()}
        for name, found in (("optimizer", tensors), ("state", state)):
            if found is not None:
                plain = {key: tensor.detach().cpu().clone().contiguous() for key, tensor in found.items()}
                save_file(plain, partial / f"{name}.safetensors")
        text = json.dumps({"step": step, "schedules": schedules} | facts, indent=1)
        (partial / "trainer.json").write_text(text)
    left = (run / "checkpoints").glob(".step-*")  # of a process that was killed
    for old in (*left, *(folder for _, folder in _complete(run)[:-keep])):
        shutil.rmtree(old, ignore_errors=True)
    return target


def save_model(model: PreTrainedModel, target: Path) -> None:
    """Write model and tokenizer to a folder, complete or not at all.

    Raises:
        OSError: if the disk is full or not writable; what was there before is then untouched.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with replacing(target) as partial:
        model.save_pretrained(partial)
        ByteTokenizer().save_pretrained(partial)


@contextmanager
def exclusive(run: Path) -> Iterator[None]:
    """Keep other processes from training in the same folder.

    Raises:
        ValueError: if one does.
    """
    run.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(run / ".lock", blocking=False):
            yield
    except Timeout as error:
        raise ValueError(f"another process is training in {run}") from error


def starting_point(run: Path, resume: bool, plan: dict[str, Any]) -> Path | None:
    """The checkpoint that a run starts from; None for a fresh one.

    Args:
        run: run folder.
        resume: whether to continue.
        plan: JSON-able values, by name, that the checkpoint must have been made with (`Recipe.plan`).

    Raises:
        FileExistsError: if `run` holds checkpoints, a model or settings of something else, and `resume` is False.
        ValueError: if `resume` is True and there are none, or if the newest is damaged or was made by another plan; if
            the name of `run` is not UTF-8, which weights cannot be stored under.
    """
    try:
        str(run.resolve()).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the name of the run folder is not UTF-8: {str(run)!r}") from error
    found = latest_checkpoint(run)
    if found is not None and not resume:
        raise FileExistsError(f"{run} holds a run already ({found.name}); continue it with --resume or choose another")
    if found is None and not resume:
        for there in (run / "model", run / "model.safetensors", run / "config.json"):
            if there.exists() and not (there.name == "config.json" and is_record(there)):
                raise FileExistsError(f"{there} is there, which a run in {run} would overwrite; choose another folder")
    if found is None and resume:
        raise ValueError(f"nothing to resume: {run} holds no complete checkpoint")
    facts = plan if found is None else _facts(found)
    for part, value in plan.items():
        if facts.get(part) != value:
            name = _difference(part, facts.get(part), value)
            raise ValueError(f"{found} was trained with another {name}; resume with the same options")
    return found


def is_record(path: Path) -> bool:
    """Whether a file is the record that a run keeps of itself."""
    try:
        return "recipe" in _object(path)
    except (OSError, ValueError):
        return False


def _difference(name: str, there: Any, here: Any) -> str:
    """The first of the values inside `there` and `here` that differ, by name."""
    if not (isinstance(there, dict) and isinstance(here, dict)):
        return f"{name} ({there} there, {here} here)"
    first = next(key for key in {**here, **there} if there.get(key) != here.get(key))
    return _difference(f"{name}: {first}", there.get(first), here.get(first))


def latest_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint of a run folder, or None."""
    found = _complete(run)
    return found[-1][1] if found else None


def step_of(checkpoint: Path) -> int:
    """Optimizer steps done in `step-N`."""
    return int(checkpoint.name.removeprefix("step-"))


def _facts(checkpoint: Path) -> dict[str, Any]:
    try:
        return _object(checkpoint / "trainer.json")
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {checkpoint} is damaged: {error}") from error


def _object(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text())
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no object")
    return found


def load_checkpoint(
    folder: Path, model: PreTrainedModel, optimizers: list[torch.optim.Optimizer]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Put the saved weights, moments and random state back.

    Returns:
        The states of the schedules, and the remaining facts (`step` among them).

    Raises:
        ValueError: if a file is missing, damaged or another model's; nothing has been changed then.
    """
    facts = _facts(folder)
    try:
        tensors = load_file(folder / "optimizer.safetensors")
        weights = load_file(folder / "model.safetensors")
        schedules, random = facts.pop("schedules"), tensors.pop("random")
    except (OSError, SafetensorError, KeyError) as error:
        raise ValueError(f"checkpoint {folder} is damaged: {error}") from error
    own = model.state_dict()
    for name, tensor in weights.items():
        if name not in own or own[name].shape != tensor.shape:
            raise ValueError(f"checkpoint {folder} is another model's: {name} {list(tensor.shape)} does not fit")
    moments: list[dict[int, dict[str, Tensor]]] = [{} for _ in optimizers]
    try:
        for name, tensor in tensors.items():
            number, index, field = name.split(".")
            moments[int(number)].setdefault(int(index), {})[field] = tensor
    except (ValueError, IndexError) as error:
        raise ValueError(f"checkpoint {folder} is of another optimizer: {name} does not fit") from error
    expected = [sum(len(group["params"]) for group in optimizer.param_groups) for optimizer in optimizers]
    there = {own[name].data_ptr() for name in weights}  # a tied weight is stored once
    missing = [name for name, tensor in own.items() if tensor.data_ptr() not in there]
    if missing or any(len(found) not in (0, count) for found, count in zip(moments, expected, strict=True)):
        found = sum(map(len, moments))
        raise ValueError(f"checkpoint {folder} is incomplete: {len(missing)} weights missing, {found} moments")
    for number, (optimizer, state) in enumerate(zip(optimizers, moments, strict=True)):
        _check_moments(folder, number, optimizer, state)
    if random.dtype != torch.uint8 or random.shape != torch.get_rng_state().shape:
        raise ValueError(f"checkpoint {folder} is damaged: its random state has {list(random.shape)} {random.dtype}")
    try:
        torch.set_rng_state(random)
    except RuntimeError as error:
        raise ValueError(f"checkpoint {folder} is damaged: {error}") from error
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    for optimizer, state in zip(optimizers, moments, strict=True):
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return schedules, facts


def _check_moments(folder: Path, number: int, optimizer: torch.optim.Optimizer, state: dict[int, Any]) -> None:
    """ValueError unless every parameter has the same moments, of its own shape: a kernel would read beyond others."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if set(state) - set(range(len(parameters))):
        raise ValueError(f"checkpoint {folder} is of another optimizer: {number}.{max(state)} does not fit")
    for index, found in state.items():
        lacking = set().union(*state.values()) - set(found)
        if lacking:
            raise ValueError(f"checkpoint {folder} is incomplete: {number}.{index} lacks {', '.join(sorted(lacking))}")
        for name, tensor in found.items():
            if tensor.shape != (() if name == "step" else parameters[index].shape):
                raise ValueError(f"checkpoint {folder} is damaged: {number}.{index}.{name} is {list(tensor.shape)}")


def load_state(folder: Path) -> dict[str, Tensor]:
    """What the model remembered at a checkpoint.

    Raises:
        ValueError: if the file is missing or damaged.
    """
    try:
        return load_file(folder / "state.safetensors")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"checkpoint {folder} is damaged: {error}") from error


def _complete(run: Path) -> list[tuple[int, Path]]:
    folders = (run / "checkpoints").glob("step-*")
    return sorted((step_of(p), p) for p in folders if p.name[5:].isdigit() and (p / "trainer.json").is_file())
