"""`pmnet eval gradients jacobian | training | precision | saturation`: why it trains, as JSON and PNG."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel

from pmnet.baselines import control, load_any
from pmnet.cli_bench import checkout_module
from pmnet.eval.gradients.jacobian import jacobian
from pmnet.eval.gradients.precision import cumulative, exact, half, loss_curve, state_errors, text_batch
from pmnet.eval.gradients.saturation import biases, capacity, model_bias, spread
from pmnet.eval.gradients.training import Trial, run, summary
from pmnet.model import PMNetForCausalLM
from pmnet.report.plots_gradients import plot_jacobian, plot_precision, plot_saturation, plot_training
from pmnet.report.provenance import provenance, write_json
from pmnet.train.recipes import demo, demo_model

out = Console(markup=False)
NORMS = (("median", "median"), ("99 %", "p99"), ("max", "max"))

Save = Annotated[Path, typer.Option(file_okay=False, writable=True, help="Folder for the JSON file and the PNG.")]
Models = Annotated[str, typer.Option(help="pmnet and controls of its size, separated by commas.")]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1)]
Seeds = Annotated[int, typer.Option(min=1, help="Number of seeds.")]


def jacobian_command(
    trained: Annotated[list[Path] | None, typer.Argument(help="Folders of trained models.")] = None,
    models: Models = "pmnet,real-memory,gated-memory,ntm,lstm,mamba",
    positions: Annotated[int, typer.Option(min=1, help="Greatest distance, as far as a model goes.")] = 65_536,
    rows: Annotated[int, typer.Option(min=1, help="Sequences, each with its own directions.")] = 3,
    seed: Seed = 0,
    save: Save = Path("runs/why"),
) -> None:
    """State Jacobian and gradient of a loss over distance, of models at initialisation and of trained ones."""
    facts, found = provenance() | {"positions": positions, "rows": rows, "seed": seed}, list[dict[str, Any]]()
    for name, folder, network in _networks(models, trained or [], seed):
        started = time.monotonic()
        row = {"name": name, "folder": folder, "parameters": network.num_parameters()}
        found.append(row | jacobian(network, positions, rows, seed) | {"seconds": time.monotonic() - started})
        curves = found[-1]["curves"]
        ends = ", ".join(f"{label} {curve[-1]['median']} at {curve[-1]['n']:,}" for label, curve in curves.items())
        out.print(f"{name}{' (trained)' if folder else ''}: log10 of {ends}", highlight=False)
        write_json(save / "jacobian.json", facts | {"models": found})
    plot_jacobian(found, save / "jacobian.png")


def training_command(
    models: Models = "pmnet,real-memory,gated-memory,lstm,ntm",
    lengths: Annotated[str, typer.Option(help="Positions of an episode.")] = "128,512,2048",
    rates: Annotated[str, typer.Option(help="Learning rates.")] = "5e-4,2e-3,8e-3",
    scales: Annotated[str, typer.Option(help="Of the initial weights, at the first length and middle rate.")] = (
        "0.1,0.3,3,10"
    ),
    seeds: Seeds = 3,
    steps: Annotated[int, typer.Option(min=1, help="At the first length; fewer at longer ones.")] = 50,
    save: Save = Path("runs/why"),
) -> None:
    """Gradient norms of the first steps of copy-paste without clipping, over length, rate, scale and the factor."""
    facts = provenance() | {"seeds": seeds, "steps": steps}
    found: list[dict[str, Any]] = []
    numbers = _numbers("--lengths", lengths, 1), _numbers("--rates", rates), _numbers("--scales", scales)
    for name, trial in _trials(models.split(","), *numbers, steps):
        started = time.monotonic()
        told = summary([run(control(name, demo_model()), replace(trial, seed=seed)) for seed in range(seeds)])
        settings = {key: value for key, value in asdict(trial).items() if key != "seed"}
        found.append({"name": name, **settings, **told, "seconds": time.monotonic() - started})
        parts = [f"{title} {told[key]:.3g}" for title, key in NORMS if told[key] is not None]
        parts.append(f"{told['diverged']} of {told['runs']} diverged")
        setting = f"{name} T={trial.total} rate={trial.rate:g} scale={trial.scale:g} factor={trial.factor}"
        out.print(f"{setting}: {', '.join(parts)}", highlight=False)
        write_json(save / "training.json", facts | {"trials": found})
    plot_training(found, save / "training.png")


def precision_command(
    lengths: Annotated[str, typer.Option(help="Positions.")] = "1000,10000,100000,1000000",
    steps: Annotated[int, typer.Option(min=1, help="Of the short trainings.")] = 150,
    seeds: Seeds = 3,
    save: Save = Path("runs/why"),
) -> None:
    """Error of float32 states by length, and training in float32, bfloat16 autocast and bfloat16 weights."""
    forms = {
        "int32 turns": (exact, 10**9),
        "float32 sum of each row": (cumulative, 10**9),
        "published form, float32": (_published(), 10**9),
        "bfloat16 state": (half, 10**5),
    }
    errors = state_errors(forms, [int(n) for n in _numbers("--lengths", lengths, 1)], 4, 8, seeds)
    for row in errors:
        out.print(f"{row['form']}, {row['length']:,}: rms {row['rms']:.2e} rad, max {row['max']:.2e}", highlight=False)
    recipe = replace(demo(8), steps=steps, batch_size=4, length=128)
    curves = []
    for kind in ("float32", "bf16 autocast", "bf16 weights"):
        losses = [loss_curve(demo_model(), kind, replace(recipe, seed=seed)) for seed in range(seeds)]
        curves.append({"precision": kind, "losses": losses})
        out.print(f"{kind}: last losses {', '.join(f'{loss[-1]:.3f}' for loss in losses)}", highlight=False)
    facts = provenance() | {"seeds": seeds, "recipe": recipe.facts(), "model": demo_model().to_dict()}
    write_json(save / "precision.json", facts | {"errors": errors, "curves": curves})
    plot_precision(errors, curves, save / "precision.png")


def saturation_command(
    trained: Annotated[list[Path] | None, typer.Argument(help="Folders of trained PMNets.")] = None,
    longest: Annotated[int, typer.Option(min=1, help="Bytes to fill a memory with.")] = 16_384,
    rows: Annotated[int, typer.Option(min=2, help="Sequences.")] = 32,
    trials: Annotated[int, typer.Option(min=1, help="Slots filled with random codes.")] = 2000,
    seeds: Seeds = 3,
    save: Save = Path("runs/why"),
) -> None:
    """Spread of the states by bytes read, capacity of a slot for random codes, bias of the rounding's gradient."""
    found: list[dict[str, Any]] = []
    for name, folder, network in _networks("pmnet", trained or [], 0):
        if type(network) is not PMNetForCausalLM:
            raise ValueError(f"{folder} is not a PMNet")
        for kind in ("random", "text"):
            curve = spread(network, longest, rows, 0, kind)
            found.append({"name": name, "folder": folder, "filler": kind, "phase_bits": network.config.phase_bits,
                          "curve": curve})  # fmt: skip
            shown = ", ".join(f"{value:.3f}" for value in curve[-1]["levels"])
            out.print(
                f"{folder or 'untrained'}, {kind}: circular variance {shown} after {curve[-1]['bytes']:,}",
                highlight=False,
            )
    size = demo_model().memory_size
    models = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        models.append(model_bias(PMNetForCausalLM(demo_model()).train(), text_batch(4, 128, 0)))
    facts = provenance() | {"rows": rows, "trials": trials, "seeds": seeds, "memory_size": size}
    results = {"spread": found, "capacity": capacity(size, trials, 0), "bias": biases(size, seeds), "models": models}
    write_json(save / "saturation.json", facts | results)
    plot_saturation(results, save / "saturation.png")


COMMANDS: dict[str, Callable[..., None]] = {
    "jacobian": jacobian_command,
    "training": training_command,
    "precision": precision_command,
    "saturation": saturation_command,
}


def _networks(names: str, folders: list[Path], seed: int) -> Iterator[tuple[str, str | None, PreTrainedModel]]:
    """Name, folder and model: first fresh ones, then those of the folders."""
    others = [load_any(folder) for folder in folders]  # first, so that a wrong one is named at once
    fresh = {name: control(name, demo_model()) for name in filter(None, map(str.strip, names.split(",")))}
    if not fresh and not others:
        raise ValueError("no models to measure: name some with --models, or give folders of trained ones")
    for name, config in fresh.items():
        torch.manual_seed(seed)
        yield name, None, AutoModelForCausalLM.from_config(config).eval()
    for folder, network in zip(folders, others, strict=True):
        kind = getattr(network.config, "memory_kind", None)
        name = network.config.model_type.removeprefix("pmnet-").lower()
        yield name if kind is None else f"{kind}-memory", str(folder), network


def _trials(
    names: list[str], lengths: list[float], rates: list[float], scales: list[float], steps: int
) -> Iterator[tuple[str, Trial]]:
    """The grid: every length and rate; then PMNet without the factor; then other scales of the initial weights."""
    totals = {int(n): max(1, round(steps * (lengths[0] / n) ** 0.5)) for n in lengths}  # fewer steps at longer ones
    first, middle = int(lengths[0]), rates[len(rates) // 2]
    for name, (total, count), rate in product(names, totals.items(), rates):
        trial = Trial(total, rate, steps=count, rows=max(1, 4 * first // total))
        yield name, trial
        if name == "pmnet":
            yield name, replace(trial, factor=False)
    for name, scale in product(names, scales):
        yield name, Trial(first, middle, scale, steps=steps)


def _published() -> Callable[[torch.Tensor], torch.Tensor]:
    """The published formulation's cumulative sum over a whole batch, as `benchmarks` keeps it."""
    scan = checkout_module("benchmarks.published").global_scan

    def states(rotation: torch.Tensor) -> torch.Tensor:
        groups = torch.zeros(rotation.shape[:2], dtype=torch.int64)
        found: torch.Tensor = scan(rotation.unsqueeze(2), groups, 1, None, False)[0].squeeze(2)
        return found

    return states


def _numbers(option: str, text: str, least: float = 0.0) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(least <= number < math.inf and number for number in found):
        wanted = f"of {least:g} or more" if least else "above 0"
        raise ValueError(f"{option} needs numbers {wanted}, separated by commas, not {text!r}")
    return found
