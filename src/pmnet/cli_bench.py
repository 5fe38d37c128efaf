"""The commands `pmnet flops` and `pmnet bench`: what the model costs, counted and measured."""

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import typer

import pmnet
from pmnet.config import PMNetConfig
from pmnet.model.load import load_model
from pmnet.report.console import out
from pmnet.report.flops import facts, tables
from pmnet.report.provenance import prepare_folder, provenance, write_json
from pmnet.train.recipes import MODELS


def flops_command(
    model: Annotated[Path | None, typer.Argument(help="Folder of a model, instead of a preset.")] = None,
    preset: Annotated[str | None, typer.Option(help=f"One of {', '.join(MODELS)}.")] = None,
    length: Annotated[int | None, typer.Option(min=1, help="Positions T that T x T attention pays for.")] = None,
    save: Annotated[
        Path | None, typer.Option("--json", dir_okay=False, writable=True, help="File for the counts.")
    ] = None,
) -> None:
    """Count FLOP, functions, weights and decode traffic of every part, as published and as computed here."""
    if (model is None) == (preset is None):
        raise ValueError("give either a model folder or --preset")
    config = load_model(model).config if model is not None else _preset(str(preset))
    if save is not None:
        prepare_folder(save.parent, save.name)
    for table in tables(config, length):
        out.print(table)
    if save is not None:
        write_json(save, {**provenance(), "model": config.to_dict(), **facts(config, length)})


def bench_command(
    cases: Annotated[list[str] | None, typer.Argument(help="Cases (see --list); all of them if none is named.")] = None,
    preset: Annotated[str, typer.Option(help="Models, separated by commas: demo, 30m, 119m.")] = "demo",
    repeats: Annotated[int, typer.Option(min=1, help="Rounds, each of which runs every contender once.")] = 7,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time budget of a case.")] = 120.0,
    size: Annotated[int, typer.Option("--bytes", min=256, help="Length of the stream case.")] = 2**20,
    save: Annotated[Path, typer.Option(help="Folder for the JSON files and the table.")] = Path("results/bench"),
    show: Annotated[bool, typer.Option("--list", help="List the cases and stop.")] = False,
    table: Annotated[
        bool, typer.Option("--table", help="Write the table of all stored files; alone, only that.")
    ] = False,
) -> None:
    """Measure speed and memory against the published formulation, a Llama and a Mamba of equal size."""
    bench = checkout_module("benchmarks.cases")
    if show:
        for case in bench.CASES.values():
            out.print(f"{case.name:14} {case.description}", soft_wrap=True)
        return
    if cases or not table:
        chosen = bench.choose(cases or [])
        options = bench.Options(repeats=repeats, seconds=seconds, size=size)
        configs = {name: _preset(name) for name in preset.split(",")}
        for config in configs.values():
            config.phase_bits = 32  # fresh weights turn nothing beyond a dead zone, and what stands still costs less
        prepare_folder(save)
        for name, config in configs.items():
            for case in chosen:
                path = bench.store(case, name, config, options, save)
                out.print(bench.section(path), soft_wrap=True)
                out.print(f"saved {path}", soft_wrap=True)
    if table:
        out.print(f"wrote {bench.write_table(save)}", soft_wrap=True)


def _preset(name: str) -> PMNetConfig:
    if name not in MODELS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name]()


def checkout_module(name: str) -> ModuleType:
    """A module of the `benchmarks` folder beside the sources; an installed package does not have it."""
    root = Path(pmnet.__file__).parents[2]
    if not (root / "benchmarks" / "cases.py").is_file():
        raise ValueError("this runs from a source checkout: there is no folder `benchmarks` beside this package")
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))
    return importlib.import_module(name)
