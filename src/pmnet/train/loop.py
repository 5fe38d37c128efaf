"""The training loop: AdamW and Muon under `accelerate`, stopped by a signal, resumed to the bit."""

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, set_seed
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from pmnet.baselines import Carry, carries, load_any, matrix_scan
from pmnet.memory import MemoryRead
from pmnet.model import PMNetForCausalLM
from pmnet.train.checkpoint import (
    latest_checkpoint,
    load_checkpoint,
    load_state,
    save_checkpoint,
    save_model,
    starting_point,
    step_of,
)
from pmnet.train.optimizers import build_optimizers, build_schedule
from pmnet.train.progress import Reporter
from pmnet.train.quiet import Objective, quieted
from pmnet.train.recipes import Recipe
from pmnet.train.tasks import Batch, Task


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and what is kept."""


class TrainingInterrupted(TrainingStopped):
    """A signal asked to stop; a checkpoint has been written."""


def train(
    recipe: Recipe, task: Task, run: Path, resume: bool = False, started: Callable[[], None] = lambda: None
) -> PreTrainedModel:
    """Train to the end of the recipe, or until a signal.

    Args:
        recipe: how.
        task: on what.
        run: run folder; receives `checkpoints/`, `metrics.jsonl` (`bytes` counts positions, padding included),
            `tensorboard/` and finally `model/`.
        resume: continue from the newest checkpoint of `run`.
        started: called on the main process before the first step, when the checkpoint, if any, has been accepted.

    Returns:
        The trained model, also saved to `run/model`.

    Raises:
        TrainingInterrupted: on SIGINT or SIGTERM, after a checkpoint.
        TrainingStopped: if the loss, a gradient or a weight is no longer finite.
        ValueError: if there is nothing to resume, or the checkpoint is damaged, or of another recipe, model, number of
            processes or set of files; if the folder to start from holds no complete model.
        FileExistsError: if `run` holds checkpoints or a model and `resume` is False.
    """
    plan = recipe.plan() | {"number of processes": int(os.environ.get("WORLD_SIZE", "1")), "set of files": task.source}
    found = starting_point(run, resume, plan)
    set_seed(recipe.seed)
    AcceleratorState._reset_state()  # a run before, in this process, may have had another precision
    # gradients are added up in the order in which the model made them, in the first step of a resumed run as in others
    order = DistributedDataParallelKwargs(find_unused_parameters=True)
    accelerator = Accelerator(
        mixed_precision=recipe.precision, cpu=not torch.cuda.is_available(), kwargs_handlers=[order]
    )
    model = _initial_model(recipe)
    optimizers = build_optimizers(model, recipe)
    schedules = [build_schedule(optimizer, recipe) for optimizer in optimizers]
    done, seen = (0, 0) if found is None else _restore(found, task, model, optimizers, schedules)
    model.to(accelerator.device)
    carry = _carry(recipe, model, accelerator, found)
    prepared, *prepared_optimizers = accelerator.prepare(model, *optimizers)
    whole = accelerator.num_processes == 1  # what averages gradients between processes cannot be traced
    objective: Objective = torch.compile(loss_of, fullgraph=whole) if recipe.compile else loss_of
    objective = quieted(objective, recipe.quiet) if recipe.quiet else objective

    def checkpoint(step: int) -> None:
        accelerator.wait_for_everyone()
        if not all(parameter.isfinite().all() for parameter in model.parameters()):
            raise TrainingStopped(f"step {step} left weights that are not finite; {_last_good(run)}")
        state = None if carry is None else {name: accelerator.gather(part) for name, part in carry.state().items()}
        if accelerator.is_main_process:
            facts = plan | {"task": task.state(), "bytes": seen}
            states = [_without(schedule.state_dict(), "lr_lambdas") for schedule in schedules]
            save_checkpoint(run, step, model, optimizers, states, facts, state)

    run.mkdir(parents=True, exist_ok=True)
    reporter, saved = Reporter(run, recipe.steps, done, accelerator.is_main_process), time.monotonic()
    try:
        if accelerator.is_main_process:
            started()
        with _signals() as received, matrix_scan(model), _repeatable(accelerator.device.type == "cpu"):
            for step in range(done + 1, recipe.steps + 1):
                index = (step - 1) * accelerator.num_processes + accelerator.process_index
                batch = {name: tensor.to(accelerator.device) for name, tensor in task.batch(index).items()}
                numbers = _gradients(accelerator, objective, prepared, batch, carry, recipe.clip)
                for name, number in numbers.items():
                    if not math.isfinite(number):
                        raise TrainingStopped(f"the {name} of step {step} is {number}; {_last_good(run)}")
                rate = schedules[0].get_last_lr()[0]
                for optimizer, schedule in zip(prepared_optimizers, schedules, strict=True):
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule.step()
                task.observe(numbers["correct"])
                read = torch.tensor(batch["input_ids"].numel(), device=accelerator.device)  # batches differ
                seen += int(accelerator.reduce(read, "sum"))
                row = {"step": step, **numbers, "rate": rate, "bytes": seen}
                reporter.step(row | task.state())
                stop = _anywhere(accelerator, bool(received))
                if stop or _anywhere(accelerator, time.monotonic() - saved > recipe.checkpoint_seconds):
                    checkpoint(step)
                    saved = time.monotonic()
                if stop:
                    name = received[0] if received else "another process"
                    raise TrainingInterrupted(f"stopped by {name} after step {step}; --resume continues from there")
            checkpoint(recipe.steps)
    finally:
        reporter.close()
    if accelerator.is_main_process:
        save_model(model, run / "model")
    accelerator.wait_for_everyone()
    if accelerator.num_processes > 1:
        # gloo's threads need the interpreter to let go of their last tensors; ending the group waits for them with the
        # interpreter held, which can be for ever
        time.sleep(0.2)
    accelerator.end_training()
    trained: PreTrainedModel = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)  # without autocast
    return trained.eval()


def _initial_model(recipe: Recipe) -> PreTrainedModel:
    """Fresh weights in float32, or those of the folder that the recipe starts from, and fresh slots if it has fewer."""
    model = AutoModelForCausalLM.from_config(recipe.model, dtype=torch.float32).train()
    if recipe.start is not None:
        known = load_any(Path(recipe.start))
        if isinstance(known, PMNetForCausalLM):
            model.model.memory_embeddings.graft(known.model.memory_embeddings)
            known.model.memory_embeddings = model.model.memory_embeddings
        model.load_state_dict(known.state_dict())
    elif recipe.silent_reads:
        silence_reads(model)
    return model


def _carry(recipe: Recipe, model: PreTrainedModel, accelerator: Accelerator, found: Path | None) -> Carry | None:
    """The state of this process's rows, as the checkpoint `found` has it; None where none is carried."""
    if not (recipe.carry and carries(recipe.model)):
        return None
    carry = Carry(model, recipe.batch_size)
    if found is not None:
        rows = slice(accelerator.process_index * carry.rows, (accelerator.process_index + 1) * carry.rows)
        carry.restore({name: tensor[rows].to(accelerator.device) for name, tensor in load_state(found).items()})
    return carry


def _anywhere(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process raised the flag; all processes must stop after the same step."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)) > 0)


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


def _last_good(run: Path) -> str:
    return f"last good checkpoint: {latest_checkpoint(run) or 'none'}"


@torch.no_grad()
def silence_reads(model: PreTrainedModel) -> None:
    """Set the output maps of all memory reads to zero."""
    for module in model.modules():
        if isinstance(module, MemoryRead):
            module.proj_out.weight.zero_()


def _restore(
    found: Path,
    task: Task,
    model: PreTrainedModel,
    optimizers: list[torch.optim.Optimizer],
    schedules: list[torch.optim.lr_scheduler.LambdaLR],
) -> tuple[int, int]:
    """Put everything back as it was in the checkpoint `found`; the numbers of steps done and of bytes seen."""
    states, facts = load_checkpoint(found, model, optimizers)
    try:
        for optimizer, schedule, state in zip(optimizers, schedules, states, strict=True):
            schedule.load_state_dict(state | {"lr_lambdas": [None] * len(optimizer.param_groups)})
            for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
                group["lr"] = rate
        task.restore(facts["task"])
        done = int(facts["step"]), int(facts["bytes"])
    except KeyError as error:
        raise ValueError(f"checkpoint {found} is damaged: trainer.json lacks {error}") from error
    except (TypeError, ValueError, IndexError) as error:
        raise ValueError(f"checkpoint {found} is damaged: trainer.json ({error})") from error
    if done[0] != step_of(found):
        raise ValueError(f"checkpoint {found} is damaged: trainer.json is of step {done[0]}")
    return done


def _gradients(
    accelerator: Accelerator,
    objective: Objective,
    model: PreTrainedModel,
    batch: Batch,
    carry: Carry | None,
    clip: float,
) -> dict[str, float]:
    """Forward and backward; gradients are left clipped on the model.

    Returns loss, share of right predictions (both as means over all processes) and norm.
    """
    with accelerator.autocast():
        loss, correct = objective(model, batch, carry)
    accelerator.backward(loss)
    norm = accelerator.clip_grad_norm_(model.parameters(), clip or math.inf)
    loss, correct = accelerator.reduce(torch.stack([loss.detach(), correct]), "mean").tolist()
    return {"loss": loss, "correct": correct, "norm": float(norm)}


def loss_of(model: PreTrainedModel, batch: Batch, carry: Carry | None = None) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy in nats and share of right predictions over the labels of `batch` (see `Task.batch`).

    With a `carry` the model continues the state of the batch before, in batches that say where rows restart.
    """
    labels = batch["labels"]
    if carry is not None and "restart" in batch:
        logits = carry.read(batch["input_ids"], batch["restart"], model)
    else:
        mask = batch.get("attention_mask")
        keep = labels.shape[1]
        logits = model(batch["input_ids"], attention_mask=mask, use_cache=False, logits_to_keep=keep).logits
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
    counted = labels != -100
    right = (logits.argmax(-1) == labels) & counted
    return loss, (right.sum() / counted.sum()).detach()


@contextmanager
def _repeatable(on: bool) -> Iterator[None]:
    """Every sum in one order, so that a resumed run repeats it; fresh memory is not filled: it only shows faults.

    Off, everything stays as the caller has it.
    """
    settings: Any = torch.utils.deterministic
    filled, before = settings.fill_uninitialized_memory, torch.get_deterministic_debug_mode()
    if on:
        settings.fill_uninitialized_memory = False
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = filled
        torch.set_deterministic_debug_mode(before)


@contextmanager
def _signals() -> Iterator[list[str]]:
    """Collect SIGINT, SIGTERM and SIGHUP instead of dying of them; a second one of them acts at once.

    A signal that was ignored (as by `nohup`) stays so. Threads other than the main one hear none.
    """
    received: list[str] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number).name)
        signal.signal(number, previous[number])

    wanted = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    heard = [number for number in wanted if signal.getsignal(number) is not signal.SIG_IGN]
    previous: dict[int, Any] = {int(number): signal.signal(number, note) for number in heard}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
