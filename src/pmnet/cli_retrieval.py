"""`pmnet eval retrieval` and `pmnet eval memory`."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from pmnet.baselines import load_any
from pmnet.eval.mechanism import mechanism, problem_of
from pmnet.eval.suite import TASKS, check_cells, controlled, grid, measure_cell
from pmnet.model.load import load_model
from pmnet.report.console import Meter, out
from pmnet.report.plots import plot_memory, plot_retrieval
from pmnet.report.provenance import prepare_folder, provenance, write_json


def retrieval_command(
    model: Annotated[Path, typer.Argument(help="Folder of a model (a run's `model/`).")],
    task: Annotated[str, typer.Option(help=f"What is asked: {', '.join(TASKS)}.")] = "copy-paste",
    sizes: Annotated[str, typer.Option(help="Letters, pairs or bytes, as in 8,16; by default the task's.")] = "",
    variants: Annotated[str, typer.Option(help="Fillers, symbol widths, keys or needles; default: the task's.")] = "",
    distances: Annotated[str, typer.Option(help="Bytes of filler, as in 8x (times the reach) or 1000000.")] = "",
    reach: Annotated[int | None, typer.Option(min=1, help="What 1x is; by default the attention's reach.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Strings one after another; the last counts (copy-paste).")] = 1,
    text: Annotated[Path | None, typer.Option(help="File of real text to fill with.")] = None,
    strings: Annotated[int, typer.Option(min=1, help="Answers per cell.")] = 1000,
    rows: Annotated[int, typer.Option(min=1, help="Answers read at once.")] = 128,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the draw.")] = 12345,
    control: Annotated[bool, typer.Option(help="Also with the recurrence off, up to 64 times the reach.")] = True,
    save: Annotated[
        Path | None,
        typer.Option(file_okay=False, writable=True, help="Folder for TASK.json and TASK.png, written cell by cell."),
    ] = None,
) -> None:
    """Share of answers that come back exactly: by distance, by size, memory on and off."""
    network = load_any(model)
    one = reach or getattr(network.config, "receptive_field", None)
    cells = grid(
        task, one, _sizes(sizes), _parts("--variants", variants), _parts("--distances", distances), text, rounds
    )
    check_cells(network, cells)
    if save is not None:
        prepare_folder(save, f"{task}.json", f"{task}.png")
    title = f"{task}, {strings} answers per cell, reach {one}" + (f", string {rounds}" if rounds > 1 else "")
    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False)  # all eight columns in a terminal of 80
    for head in ("size", "variant", "distance", "exact", "95 %\ninterval", "per\nbyte", "memory\noff", "per\nbyte"):
        table.add_column(head, justify="right", overflow="fold")
    facts = provenance() | {
        "task": task,
        "seed": seed,
        "rows": rows,
        "reach": one,
        "rounds": rounds,
        "text": None if text is None else str(text),
        "parameters": network.num_parameters(),
        "model": network.config.to_dict(),
    }
    done: list[dict[str, Any]] = []
    try:
        with Meter() as meter:
            for cell in cells:
                passes = 2 if control and controlled(network, cell) else 1
                label = f"{cell.size} {cell.variant} {cell.distance:,.12g}"
                advance = meter.task(label, cell.length * strings * passes)
                row = measure_cell(network, cell, strings, seed, rows, control, advance)
                done.append(row)
                table.add_row(*_shown(row))
                meter.line("  ".join(_shown(row)))
                if save is not None:
                    write_json(save / f"{task}.json", facts | {"cells": done})
    finally:  # of a measurement that was interrupted too
        if done:
            out.print(table)
    if save is not None:
        plot_retrieval(task, done, one, save / f"{task}.png")
        out.print(f"saved {save / f'{task}.json'} and {save / f'{task}.png'}", soft_wrap=True)


def memory_command(
    model: Annotated[Path, typer.Argument(help="Folder of a PMNet trained on copy-paste.")],
    size: Annotated[int, typer.Option(min=1, help="Letters of a string.")] = 8,
    gap: Annotated[int | None, typer.Option(min=1, help="Filler; by default 8 times the reach.")] = None,
    strings: Annotated[int, typer.Option(min=1)] = 500,
    drift: Annotated[int, typer.Option(min=1, help="Bytes of filler to stream for the drift of the state.")] = 100_000,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 12345,
    save: Annotated[
        Path | None, typer.Option(file_okay=False, writable=True, help="Folder for memory.json and memory.png.")
    ] = None,
) -> None:
    """How copy-paste is solved: which level holds what, what letters and filler write, where they are read."""
    network = load_model(model)
    gap = gap or 8 * network.config.receptive_field
    problem_of(network, size, gap)  # before there is a folder
    if save is not None:
        prepare_folder(save, "memory.json", "memory.png")
    with Meter() as meter:
        found = mechanism(network, size, gap, strings, drift, seed, meter.task("reading"))
    if save is not None:  # before anything is printed: who reads may have gone
        facts = provenance() | {"seed": seed, "size": size, "gap": gap, "strings": strings}
        write_json(save / "memory.json", facts | {"model": network.config.to_dict()} | found)
        plot_memory(found, save / "memory.png")
    table = Table(title=f"the memory of {model}, strings of {size}")
    for title in ("level", "groups visited", "|theta| letters", "filler", "turned by letters", "filler", "same group"):
        table.add_column(title, justify="right")
    for index, level in enumerate(found["levels"]):
        letters, filler = level["letters"], level["filler"]
        table.add_row(
            str(index), f"{letters['groups_visited']} of {level['groups']}", f"{letters['mean_theta_radians']:.3f}",
            f"{filler['mean_theta_radians']:.3f}", f"{letters['turned']:.1%}", f"{filler['turned']:.4%}",
            f"{level['same_group']:.1%}",
        )  # fmt: skip
    out.print(table)
    for index, level in enumerate(found["levels"]):
        out.print(f"level {index}: {drift:,} bytes of filler turn {level['drift_phases']:.1%} of its phases, "
                  f"{level['drift_rms_turns']:.2e} turns rms")  # fmt: skip
    for name, right in found["without"].items():
        what = "the whole model" if name == "nothing" else f"without {name}"
        out.print(f"{what}: {right['exact']:.1%} exact, {right['letters']:.1%} of bytes")
    if save is not None:
        out.print(f"saved {save / 'memory.json'} and {save / 'memory.png'}", soft_wrap=True)


def _parts(option: str, text: str) -> list[str]:
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if text and not found:
        raise ValueError(f"{option} names none, got {text!r}")
    return found


def _sizes(text: str) -> list[int]:
    parts = _parts("--sizes", text)
    if not all(part.isdecimal() for part in parts):
        raise ValueError(f"--sizes are whole numbers, as in 8,16, not {text!r}")
    return [int(part) for part in parts]


def _shown(row: dict[str, Any]) -> list[str]:
    off = row["control"]
    return [
        f"{row['size']:,}", row["variant"], f"{row['distance']:,.12g}", f"{row['exact']:.1%}",
        f"{100 * row['low']:.1f}-{100 * row['high']:.1f}", f"{row['letters']:.2%}",
        *(("", "") if off is None else (f"{off['exact']:.1%}", f"{off['letters']:.2%}")),
    ]  # fmt: skip
