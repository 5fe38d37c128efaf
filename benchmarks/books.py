"""The comparison on books: every model reads the same bytes in the same order, at a rate that one rule picks of four.

`python -m benchmarks.books run --data data/books` trains and measures whatever is not in `runs/books` yet, `speed`
times them in turns; `python -m benchmarks.books_page` makes the page of what is stored.
"""

import math
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from statistics import fmean, median
from typing import Annotated

import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks.pages import Json, metrics
from pmnet.baselines import Carry, carries, control
from pmnet.report.provenance import provenance, write_json
from pmnet.train.loop import loss_of
from pmnet.train.optimizers import build_optimizers
from pmnet.train.recipes import RECIPES

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
CLOSE = 0.05  # bits per byte: of rates no further than this from the best, the lowest is taken
GRID_STEPS = 100  # 0.4 MB to choose a learning rate
STEPS = {  # of 4,096 bytes
    "models": 1000, "window-2": 500, "seed-1": 1000, "longer": 3000, "pieces": 1000, "pieces-longer": 3000,
    "copy-first": 1000, "practice": 2000, "practice-fresh": 1000, "spans": 1000,
}  # fmt: skip
app = typer.Typer(add_completion=False)


@dataclass(frozen=True)
class Entry:
    """One model of the comparison.

    Attributes:
        name: of its folder.
        options: of `pmnet train lm`, beside the preset `tiny`.
        rate_of: whose learning rate it takes; its own grid if None.
        group: which comparison it belongs to, a folder.
        measured: options of `pmnet eval longcontext`: how its state is also handled, what is taken away.
        rate: a learning rate that is given instead.
    """

    name: str
    options: tuple[str, ...] = ()
    rate_of: str | None = None
    group: str = "models"
    measured: tuple[str, ...] = ()
    rate: float | None = None


MODELS = (
    Entry("pmnet", measured=("--reset", "30KiB", "--reset", "512", "--ablations")),
    Entry("no-recurrence", ("--model", "no-recurrence"), measured=("--reset", "512")),
    Entry("sliding-window", ("--model", "sliding-window")),
    Entry("llama", ("--model", "llama"), measured=("--reset", "256")),
    Entry("mamba2", ("--model", "mamba2"), measured=("--reset", "30KiB", "--reset", "512")),
    Entry("mamba2-3x", ("--model", "mamba2-3x"), "mamba2"),  # its own grid takes too long on a CPU
)
ABLATIONS = (
    *(Entry(f"phase-bits-{bits}", ("--phase-bits", str(bits)), "pmnet") for bits in (5, 6, 8, 12, 32)),
    *(Entry(f"window-{keys}", ("--window", str(keys)), "pmnet") for keys in (8, 32, 64, 128, 512)),
    Entry("real-memory", ("--model", "real-memory"), "pmnet"),
    Entry("gated-memory", ("--model", "gated-memory"), "pmnet"),
    Entry("flat", ("--model", "flat"), "pmnet"),
    Entry("no-carry", ("--no-carry", "--batch-size", "8", "--length", "512"), "pmnet", measured=("--reset", "512")),
)
NARROW = tuple(
    Entry(name, ("--window", "2", "--model", name), "pmnet", "window-2")
    for name in ("pmnet", "no-recurrence", "real-memory", "gated-memory", "fading-memory")
)
SEEDS = (
    Entry("pmnet", ("--seed", "1"), "pmnet", "seed-1"),
    Entry("no-recurrence", ("--model", "no-recurrence", "--seed", "1"), "no-recurrence", "seed-1"),
)
LONGER = (
    Entry("pmnet", rate_of="pmnet", group="longer", measured=("--reset", "30KiB")),
    Entry("no-recurrence", ("--model", "no-recurrence"), "no-recurrence", "longer"),
    Entry("mamba2", ("--model", "mamba2"), "mamba2", "longer", ("--reset", "30KiB")),
)
PIECES = tuple(
    Entry(entry.name, (*entry.options, "--piece", "4096"), entry.name, group, entry.measured[:2])
    for group in ("pieces", "pieces-longer")
    for entry in MODELS
    if entry.name in ("pmnet", "no-recurrence", "mamba2")
)
SPANS = tuple(  # how far gradients go back: as many bytes to a step, in windows of other lengths
    Entry(f"{name}-{length}", ("--model", name, "--piece", "4096", "--length", str(length),
                               "--batch-size", str(4096 // length)), name, "spans", ("--reset", "4KiB"))
    for length in (64, 1024, 4096)
    for name in ("pmnet", "no-recurrence")
)  # fmt: skip
_SMALL = ("--preset", "demo", "--window", "16", "--piece", "4096")  # the size of models/copy-paste
_TAUGHT = ("--from", "models/copy-paste", "--piece", "4096")
COPY_FIRST = (  # one that learned copy-paste before, next to fresh ones
    *(
        Entry(f"{name}-{seed}" if seed else name, (*options, "--seed", str(seed)), name if seed else None, "copy-first")
        for seed in range(3)
        for name, options in (
            ("fresh", _SMALL),
            ("fresh-off", (*_SMALL, "--model", "no-recurrence")),
            ("taught", _TAUGHT),
        )
    ),
    *(  # does copying survive there?
        Entry(f"{name}-{rate:g}", (*options, "--seed", "0"), group="copy-first", rate=rate)
        for name, options, rate in (("taught", _TAUGHT, 0.003), ("taught", _TAUGHT, 0.001), ("fresh", _SMALL, 0.003))
    ),
)
PRACTICE = tuple(  # as much text and as many batches of copy-paste in between: the same model then copies and reads
    Entry(f"{name}-{seed}", (*options, "--seed", str(seed)), group=group, measured=measured, rate=0.003)
    for seed in range(3)
    for name, options, group, measured in (
        ("practised", (*_TAUGHT, "--practice", "2", "--size", "16"), "practice", ("--reset", "4KiB")),
        ("fresh", _SMALL, "practice-fresh", ("--reset", "4KiB")),
        ("fresh-off", (*_SMALL, "--model", "no-recurrence"), "practice-fresh", ()),
    )
)


@app.command()
def run(
    data: Annotated[Path, typer.Option(help="Corpus made by `pmnet data books`.")] = Path("data/books"),
    to: Annotated[Path, typer.Option("--out", help="Folder of the runs.")] = Path("runs/books"),
    only: Annotated[str, typer.Option(help="Which, a pattern of `GROUP/NAME`, as `longer/*`.")] = "*",
    length: Annotated[str, typer.Option(help="Bytes of each book in the evaluation.")] = "128KiB",
) -> None:
    """Train and measure, skipping what is there."""
    entries = (*MODELS, *ABLATIONS, *NARROW, *SEEDS, *LONGER, *PIECES, *SPANS, *COPY_FIRST, *PRACTICE)
    for entry in (entry for entry in entries if fnmatch(f"{entry.group}/{entry.name}", only)):
        if entry.rate_of is None and entry.rate is None:
            for rate in RATES:
                _train(entry, data, to / "grid" / f"{entry.name}-{rate:g}", GRID_STEPS, rate)
        best = entry.rate or best_rate(to / "grid", entry.rate_of or entry.name)
        folder = to / entry.group / entry.name
        _train(entry, data, folder, STEPS[entry.group], best)
        if not (folder / "longcontext.json").exists():
            _pmnet("eval", "longcontext", str(folder / "model"), "--data", str(data / "test"), "--length", length,
                   *entry.measured, "--save", str(folder))  # fmt: skip


def _train(entry: Entry, data: Path, folder: Path, steps: int, rate: float) -> None:
    if not (folder / "model").exists():
        resume = ["--resume"] if any(folder.glob("checkpoints/step-*/trainer.json")) else []
        _pmnet("train", "lm", "--data", str(data / "train"), "--steps", str(steps), "--learning-rate", f"{rate:g}",
               "--out", str(folder), *entry.options, *resume)  # fmt: skip


def _pmnet(*arguments: str) -> None:
    print("pmnet", *arguments, flush=True)
    subprocess.run([str(Path(sys.executable).with_name("pmnet")), *arguments], check=True)


def best_rate(grid: Path, name: str) -> float:
    """The lowest learning rate whose run ends within `CLOSE` of the lowest loss.

    Every byte is read once, so it is a loss on new text. A run ten times as long wants lower rates than a short one.
    """
    found = {rate: final_bits(grid / f"{name}-{rate:g}") for rate in RATES if (grid / f"{name}-{rate:g}").exists()}
    if not found:
        raise FileNotFoundError(f"no learning rates of {name} in {grid}: run it first")
    return min(rate for rate, bits in found.items() if bits <= min(found.values()) + CLOSE)


def final_bits(folder: Path) -> float:
    """Bits per byte over the last quarter of a training run."""
    rows = metrics(folder)
    return fmean(row["loss"] for row in rows if row["step"] > 0.75 * rows[-1]["step"]) / math.log(2)


@app.command()
def speed(
    rounds: Annotated[int, typer.Option(min=1)] = 7,
    save: Annotated[Path, typer.Option(help="JSON file.")] = Path("runs/books/speed.json"),
) -> None:
    """Time a training step (16 x 256 bytes) and reading (4 x 1,024 bytes) of all models, in turns."""
    runs = {entry.name: _steps(entry) for entry in MODELS}
    seconds: dict[str, dict[str, list[float]]] = {name: {"train": [], "read": []} for name in runs}
    for number in range(rounds + 1):
        for name, steps in runs.items():
            for kind, step in steps.items():
                started = time.perf_counter()
                step()
                if number:  # the first round warms up
                    seconds[name][kind].append(time.perf_counter() - started)
    first = seconds[MODELS[0].name]
    found: Json = {}
    for name, taken in seconds.items():
        found[name] = {
            kind: {
                "seconds": times,
                "bytes_per_second": 4096 / median(times),
                "times_first": median(base / mine for base, mine in zip(first[kind], times, strict=True)),
            }
            for kind, times in taken.items()
        }
        print(f"{name}: {found[name]['train']['bytes_per_second']:,.0f} bytes/s of training, "
              f"{found[name]['read']['bytes_per_second']:,.0f} of reading")  # fmt: skip
    write_json(save, provenance() | {"rounds": rounds, "models": found})


def _steps(entry: Entry) -> dict[str, Callable[[], object]]:
    """A training step and a read of a fresh model, 4,096 bytes each; a state is carried where there is one."""
    recipe = RECIPES["lm"]["tiny"]()
    config = recipe.model if not entry.options else control(entry.options[-1], recipe.model)
    model = AutoModelForCausalLM.from_config(config)
    optimizers, generator = build_optimizers(model, recipe), torch.Generator().manual_seed(0)
    ids = torch.randint(0, 256, (16, 256), generator=generator)
    batch = {"input_ids": ids, "labels": ids.roll(-1, 1), "restart": torch.zeros(16, dtype=torch.bool)}
    trained, reading = (Carry(model, rows) if carries(config) else None for rows in (16, 4))

    def train() -> None:
        model.train()
        loss_of(model, batch, trained)[0].backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    @torch.no_grad()
    def read() -> None:
        model.eval()
        if reading is not None:
            reading.read(ids.view(4, 1024))
        else:
            model(ids, use_cache=False)  # period by period

    return {"train": train, "read": read}


if __name__ == "__main__":
    app()
