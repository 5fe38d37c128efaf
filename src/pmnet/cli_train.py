"""`pmnet train`."""

import ctypes
import json
import os
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from pmnet.baselines import CONTROLS, UNTRACED, VariantConfig, control, load_any
from pmnet.config import PMNetConfig
from pmnet.data.files import RandomWindows, open_files
from pmnet.data.streams import ContiguousWindows
from pmnet.model.tokenizer import COPY, first_id
from pmnet.report.console import out
from pmnet.report.cost import cost_line
from pmnet.report.provenance import provenance, write_json
from pmnet.train.checkpoint import exclusive, is_record, starting_point, step_of
from pmnet.train.ladder import Ladder
from pmnet.train.ladders import build_ladder
from pmnet.train.loop import train
from pmnet.train.practice import Practice
from pmnet.train.recipes import RECIPES, Recipe
from pmnet.train.tasks import ByteTask, Task

_PRESETS = "; ".join(f"{task}: {', '.join(recipes)}" for task, recipes in RECIPES.items())


def train_command(
    task: Annotated[str, typer.Argument(help=f"What to learn: {', '.join(RECIPES)}.")] = "lm",
    data: Annotated[list[Path] | None, typer.Option(help="File or folder to learn from (lm); may be repeated.")] = None,
    preset: Annotated[str | None, typer.Option(help="Recipe; the first is the default: " + _PRESETS)] = None,
    architecture: Annotated[
        str, typer.Option("--model", help="pmnet, or a control of equal size: " + ", ".join(CONTROLS))
    ] = "pmnet",
    start: Annotated[
        Path | None, typer.Option("--from", help="Model folder to train further, instead of fresh weights.")
    ] = None,
    run: Annotated[Path, typer.Option("--out", help="Run folder.")] = Path("runs/latest"),
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps, instead of the recipe's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Batch rows per process.")] = None,
    length: Annotated[int | None, typer.Option(min=2, help="Bytes of a training window (lm).")] = None,
    carry: Annotated[bool | None, typer.Option(help="Read files in order, carrying the state (lm).")] = None,
    piece: Annotated[int | None, typer.Option(min=2, help="Pieces that documents are cut into, in bytes (lm).")] = None,
    practice: Annotated[int | None, typer.Option(min=2, help="Every N-th batch is copy-paste (lm).")] = None,
    window: Annotated[int | None, typer.Option(min=1, help="Window of attention, in keys.")] = None,
    slots: Annotated[int | None, typer.Option(min=2, help="Slots to a group; a model can get more of them.")] = None,
    size: Annotated[
        int | None, typer.Option(min=1, help="Final size of the task (or practice): letters, pairs.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Most strings one after another (box-finish).")] = None,
    phase_bits: Annotated[int | None, typer.Option(min=1, max=32, help="Rotations are rounded to 2**-b turn.")] = None,
    quiet: Annotated[
        float | None, typer.Option(min=0.0, help="Weight of a loss on turns by filler (copy-paste).")
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(min=0.0, help="Peak, of AdamW and Muon.")] = None,
    clip: Annotated[float | None, typer.Option(min=0.0, help="Maximum gradient norm; 0 disables clipping.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, max=2**32 - 1, help="Seed of initial weights and data.")] = None,
    precision: Annotated[str | None, typer.Option(help="no (float32) or bf16 (autocast).")] = None,
    compile: Annotated[bool | None, typer.Option(help="Trace the training step with torch.compile.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Processes that read files ahead (lm).")] = 0,
    checkpoint_seconds: Annotated[float | None, typer.Option(min=0.0, help="Time between checkpoints.")] = None,
    resume: Annotated[bool, typer.Option(help="Continue the newest checkpoint of the run folder.")] = False,
) -> None:
    """Train a model; Ctrl-C stops after a checkpoint, --resume continues to the same bits."""
    name, recipe = _preset(task, preset)
    changes: dict[str, Any] = {
        "steps": steps, "batch_size": batch_size, "length": length, "carry": carry, "piece": piece, "size": size,
        "rounds": rounds, "practice": practice, "quiet": quiet, "learning_rate": learning_rate, "clip": clip,
        "seed": seed, "precision": precision, "compile": compile, "checkpoint_seconds": checkpoint_seconds,
    }  # fmt: skip
    recipe = replace(recipe, **{key: value for key, value in changes.items() if value is not None})
    if recipe.practice is not None:  # copy-paste beyond the reach of the preset's PMNet, for its controls too
        recipe = replace(recipe, gap=recipe.model.receptive_field)
    if recipe.finish and start is None:
        raise ValueError(f"preset {name} is the second half of a training: give the model of the first with --from")
    if start is None:
        recipe = _fresh(recipe, task, architecture, window, slots, phase_bits)
    elif architecture != "pmnet":
        raise ValueError("--model cannot be combined with --from: the folder fixes the architecture")
    else:
        recipe = _further(recipe, start, window, slots, phase_bits)
        architecture = recipe.model.model_type.lower()
    if phase_bits is not None and isinstance(recipe.model, VariantConfig):
        raise ValueError(f"--phase-bits has no meaning for {recipe.model.memory_kind}-memory: nothing is rounded")
    if recipe.compile and recipe.model.model_type in UNTRACED:
        if compile:
            raise ValueError(f"--compile cannot trace {architecture}: leave it out")
        recipe = replace(recipe, compile=False)
    if recipe.quiet and (task != "copy-paste" or getattr(recipe.model, "num_levels", 1) < 2):
        raise ValueError(f"--quiet is for copy-paste and a PMNet of several levels, not for {architecture} on {task}")
    if task == "lm" and size is not None and practice is None:
        raise ValueError("--size is for tasks, and for lm with --practice")
    if task != "lm" and (carry, length, piece, practice, workers) != (None, None, None, None, 0):
        raise ValueError(f"--carry, --length, --piece, --practice and --workers are for lm, not for {task}")
    if task != "lm" and data:
        raise ValueError(f"--data is for lm, {task} makes its own")
    if task != "lm" or recipe.practice is not None:
        learned = "copy-paste" if task == "lm" else task
        recipe.model.task_specific_params = {learned: {"size": recipe.size, "gap": recipe.gap}}
    found = starting_point(run, resume, recipe.plan())  # before the cost is measured
    main, processes = os.environ.get("RANK", "0") == "0", int(os.environ.get("WORLD_SIZE", "1"))
    source = _source(task, data or [], recipe, run, workers, processes)
    if main and task == "lm":
        out.print(cost_line(recipe, processes, 0 if found is None else step_of(found)), soft_wrap=True)
    if main and recipe.steps <= recipe.warmup:
        out.print(f"{recipe.steps} steps end within the warm-up of {recipe.warmup}: "
                  f"the learning rate never reaches {recipe.learning_rate:g}", soft_wrap=True)  # fmt: skip
    _keep_freed_memory()
    facts = {**provenance(), "task": task, "preset": name, "architecture": architecture}
    facts |= {"recipe": recipe.facts(), "model": recipe.model.to_dict()}
    with exclusive(run) if main else nullcontext():
        train(recipe, source, run, resume, started=lambda: _record(run / "config.json", facts, resume))
    if main:
        out.print(f"model saved to {run / 'model'}", soft_wrap=True)


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed: each step asks for as much again, and the kernel hands out new pages slowly.

    Without it more than a quarter of a training step on a small CPU is the first touch of pages.
    """
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # of malloc.h
        for option, value in ((mmap_max, 0), (trim_threshold, -1), (top_pad, 2**26)):
            ctypes.CDLL(None).mallopt(option, value)


def _record(path: Path, facts: dict[str, Any], resume: bool) -> None:
    """Write the record of a run; where it goes on, that of its first part is kept, and those of later ones appended.

    Of a first part whose record is lost, nothing but the recipe is known: it is null.
    """
    if resume:
        part = {key: facts[key] for key in ("command", "date", "commit", "versions", "machine")}
        first = json.loads(path.read_text()) if is_record(path) else facts | dict.fromkeys(part)
        before = first.get("resumed")
        facts = first | {"resumed": [*(before if isinstance(before, list) else []), part]}
    write_json(path, facts)


def _preset(task: str, preset: str | None) -> tuple[str, Recipe]:
    """Name and recipe of a preset; the first of the task where none is named."""
    recipes = RECIPES.get(task)
    if recipes is None:
        raise ValueError(f"unknown task {task!r}; there are {', '.join(RECIPES)}")
    name = preset or next(iter(recipes))
    if name not in recipes:
        raise ValueError(f"unknown preset {name!r} for {task}; there are {', '.join(recipes)}")
    return name, recipes[name]()


def _fresh(
    recipe: Recipe, task: str, architecture: str, window: int | None, slots: int | None, phase_bits: int | None
) -> Recipe:
    """The recipe with its PMNet changed, or with a control of the changed one in its place."""
    recipe = _changed(recipe, window, slots, phase_bits)
    if architecture != "pmnet":
        recipe = replace(recipe, model=control(architecture, recipe.model))
        if phase_bits is not None and not isinstance(recipe.model, PMNetConfig):
            raise ValueError(f"--phase-bits applies to a PMNet only, a {architecture} has no phases")
        if task == "lm" and window is not None and not hasattr(recipe.model, "sliding_window"):
            raise ValueError(f"--window applies to a PMNet or a sliding-window Transformer, not to a {architecture}")
    return recipe


def _further(recipe: Recipe, start: Path, window: int | None, slots: int | None, phase_bits: int | None) -> Recipe:
    """The recipe with the model of a folder, in float32, and its reach; no weight depends on window or phase bits.

    Where the recipe is a second half, window and slots become as many as the recipe has, if they were fewer.
    """
    model = load_any(start).config
    if model.vocab_size <= COPY:
        raise ValueError(f"{start} knows {model.vocab_size} ids; bytes and their control ids need {COPY + 1}")
    model.dtype = "float32"
    if recipe.finish and isinstance(model, PMNetConfig):
        window = window or max(model.sliding_window, recipe.model.sliding_window)
        slots = slots or max(model.num_memory, recipe.model.num_memory)
    if slots is not None and isinstance(model, PMNetConfig) and slots < model.num_memory:
        raise ValueError(f"the groups of {start} have {model.num_memory} slots: they can be more, not {slots}")
    recipe = _changed(replace(recipe, model=model, start=str(start), silent_reads=False), window, slots, phase_bits)
    return replace(recipe, gap=model.receptive_field) if isinstance(model, PMNetConfig) else recipe


def _changed(recipe: Recipe, window: int | None, slots: int | None, phase_bits: int | None) -> Recipe:
    """The recipe with another grid, with more slots, or with another window and gaps beyond its reach."""
    model = recipe.model
    if (window, slots, phase_bits) == (None, None, None):
        return recipe
    if not isinstance(model, PMNetConfig):
        raise ValueError(f"--window, --slots and --phase-bits apply to a PMNet only, not to a {model.model_type}")
    if slots is not None:
        model.num_memory = slots
    if phase_bits is not None:
        model.phase_bits = phase_bits
    if window is not None:
        model.sliding_window = window
        recipe = replace(recipe, gap=model.receptive_field)
    return recipe


def _source(task: str, data: list[Path], recipe: Recipe, run: Path, workers: int, processes: int) -> Task:
    """What is trained on: files, with practice in between, or the ladder of a task."""
    if task != "lm":
        return build_ladder(task, recipe, processes)
    if not data:
        raise ValueError("training a language model needs --data FILE_OR_FOLDER")
    files = _byte_task(data, recipe, workers, processes)
    if any(run.resolve().is_relative_to(path.resolve()) for path in data):
        raise ValueError(f"the run folder {run} lies in the data: its files would be read; choose another --out")
    if recipe.practice is None:
        return files
    return Practice(files, _practised(recipe, processes), recipe.practice, processes)


def _byte_task(data: list[Path], recipe: Recipe, workers: int, processes: int) -> ByteTask:
    given = (open_files(data), recipe.length, recipe.batch_size, recipe.seed)
    first = first_id(recipe.model)
    if recipe.carry:
        return ByteTask(ContiguousWindows(*given, processes, recipe.piece, first), workers, processes)
    windows = RandomWindows(*given, first)
    return ByteTask(windows, workers, processes)


def _practised(recipe: Recipe, processes: int) -> Ladder:
    """Copy-paste beside text: as a whole if the model has been trained before, or else from the first stage up."""
    assert recipe.practice is not None
    part = replace(recipe, steps=recipe.steps // recipe.practice, finish=recipe.start is not None)
    return build_ladder("copy-paste", part, processes)
