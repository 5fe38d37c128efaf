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
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pmnet.baselines import control, load_any
from pmnet.cli_bench import checkout_module
from pmnet.data.tasks.episodes import LONGEST
from pmnet.eval.gradients.jacobian import check_through_time, jacobian
from pmnet.eval.gradients.precision import cumulative, exact, half, loss_curve, state_errors, text_batch
from pmnet.eval.gradients.saturation import biases, capacity, check_fills, model_bias, spread
from pmnet.eval.gradients.training import SHORTEST, Trial, run, summary
from pmnet.model import PMNetForCausalLM
from pmnet.report.console import out
from pmnet.report.plots_gradients import plot_jacobian, plot_precision, plot_saturation, plot_training
from pmnet.report.provenance import prepare_folder, provenance, write_json
from pmnet.train.recipes import demo, demo_model

NORMS = (("median", "median"), ("99 %", "p99"), ("max", "max"))

Save = Annotated[Path, typer.Option(file_okay=False, writable=True, help="Folder for the JSON file and the PNG.")]
Models = Annotated[str, typer.Option(help="pmnet and controls of its size, separated by commas.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1)]
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
    networks = _networks(models, trained or [], seed, check_through_time)
    prepare_folder(save, "jacobian.json", "jacobian.png")
    for name, folder, network in networks:
        started = time.monotonic()
        row = {"name": name, "folder": folder, "parameters": network.num_parameters()}
        row["model"] = network.config.to_dict()
        found.append(row | jacobian(network, positions, rows, seed) | {"seconds": time.monotonic() - started})
        curves = found[-1]["curves"]
        ends = ", ".join(
            f"{label} {_logarithm(curve[-1]['median'])} at {curve[-1]['n']:,}" for label, curve in curves.items()
        )
        out.print(f"{name}{' (trained)' if folder else ''}: log10 of {ends}")
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
    configs = _configs(models)
    if not configs:
        raise ValueError(f"--models names no model, got {models!r}")
    numbers = _lengths(lengths, SHORTEST, LONGEST), _numbers("--rates", rates), _numbers("--scales", scales)
    prepare_folder(save, "training.json", "training.png")
    facts = provenance() | {"seeds": seeds, "steps": steps}
    facts |= {"models": {name: config.to_dict() for name, config in configs.items()}}
    found: list[dict[str, Any]] = []
    for name, trial in _trials(list(configs), *numbers, steps):
        started = time.monotonic()
        told = summary([run(configs[name], replace(trial, seed=seed)) for seed in range(seeds)])
        settings = {key: value for key, value in asdict(trial).items() if key != "seed"}
        found.append({"name": name, **settings, **told, "seconds": time.monotonic() - started})
        parts = [f"{title} {told[key]:.3g}" for title, key in NORMS if told[key] is not None]
        parts.append(f"{told['diverged']} of {told['runs']} diverged")
        setting = f"{name} T={trial.total} rate={trial.rate:g} scale={trial.scale:g} factor={trial.factor}"
        out.print(f"{setting}: {', '.join(parts)}")
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
    numbers = _lengths(lengths, 1, max(longest for _, longest in forms.values()))
    prepare_folder(save, "precision.json", "precision.png")
    errors = state_errors(forms, numbers, 4, 8, seeds)
    for row in errors:
        out.print(f"{row['form']}, {row['length']:,}: rms {row['rms']:.2e} rad, max {row['max']:.2e}")
    recipe = replace(demo(8), steps=steps, batch_size=4, length=128)
    curves = []
    for kind in ("float32", "bf16 autocast", "bf16 weights"):
        losses = [loss_curve(demo_model(), kind, replace(recipe, seed=seed)) for seed in range(seeds)]
        curves.append({"precision": kind, "losses": losses})
        out.print(f"{kind}: last losses {', '.join(f'{loss[-1]:.3f}' for loss in losses)}")
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
    networks = _networks("pmnet", trained or [], 0, check_fills)
    prepare_folder(save, "saturation.json", "saturation.png")
    for name, folder, network in networks:
        for kind in ("random", "text"):
            curve = spread(network, longest, rows, 0, kind)
            found.append({"name": name, "folder": folder, "filler": kind, "phase_bits": network.config.phase_bits,
                          "model": network.config.to_dict(), "curve": curve})  # fmt: skip
            shown = ", ".join(f"{value:.3f}" for value in curve[-1]["levels"])
            out.print(f"{folder or 'untrained'}, {kind}: circular variance {shown} after {curve[-1]['bytes']:,}")
    size = demo_model().memory_size
    models = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        models.append(model_bias(PMNetForCausalLM(demo_model()).train(), text_batch(4, 128, 0)))
    facts = provenance() | {"rows": rows, "trials": trials, "seeds": seeds, "memory_size": size}
    facts |= {"model": demo_model().to_dict()}
    results = {"spread": found, "capacity": capacity(size, trials, 0), "bias": biases(size, seeds), "models": models}
    write_json(save / "saturation.json", facts | results)
    plot_saturation(results, save / "saturation.png")


def _logarithm(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


COMMANDS: dict[str, Callable[..., None]] = {
    "jacobian": jacobian_command,
    "training": training_command,
    "precision": precision_command,
    "saturation": saturation_command,
}


def _configs(names: str) -> dict[str, PreTrainedConfig]:
    """Configurations of the size of the demo preset, by the names that --models gives."""
    return {name: control(name, demo_model()) for name in filter(None, map(str.strip, names.split(",")))}


def _networks(
    names: str, folders: list[Path], seed: int, check: Callable[[PreTrainedModel], None]
) -> list[tuple[str, str | None, PreTrainedModel]]:
    """Name, folder and model, all of them checked: first fresh ones, then those of the folders."""
    found: list[tuple[str, str | None, PreTrainedModel]] = []
    for name, config in _configs(names).items():
        torch.manual_seed(seed)
        found.append((name, None, AutoModelForCausalLM.from_config(config).eval()))
    for folder in folders:
        network = load_any(folder)
        kind = getattr(network.config, "memory_kind", None)
        name = network.config.model_type.removeprefix("pmnet-").lower()
        found.append((name if kind is None else f"{kind}-memory", str(folder), network))
    if not found:
        raise ValueError("no models to measure: name some with --models, or give folders of trained ones")
    for name, place, network in found:
        try:
            check(network)
        except ValueError as error:
            raise ValueError(f"{place or f'--models {name}'}: {error}") from error
    return found


def _trials(
    names: list[str], lengths: list[int], rates: list[float], scales: list[float], steps: int
) -> Iterator[tuple[str, Trial]]:
    """The grid: every length and rate; then PMNet without the factor; then other scales of the initial weights."""
    totals = {n: max(1, round(steps * (lengths[0] / n) ** 0.5)) for n in lengths}  # fewer steps at longer ones
    first, middle = lengths[0], rates[len(rates) // 2]
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


def _lengths(text: str, least: int, most: int) -> list[int]:
    found = [int(part) if part.strip().isdecimal() else 0 for part in text.split(",")]
    if not all(least <= number <= most for number in found):
        raise ValueError(f"--lengths are whole numbers from {least:,} to {most:,}, separated by commas, not {text!r}")
    return sorted(found)


def _numbers(option: str, text: str) -> list[float]:
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < number < math.inf for number in found):
        raise ValueError(f"{option} are numbers above 0, separated by commas, not {text!r}")
    return sorted(found)
