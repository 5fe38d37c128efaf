"""`pmnet eval longcontext`."""

import re
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from rich.table import Table

from pmnet.baselines import load_any
from pmnet.data.files import open_files
from pmnet.eval.longcontext import POINTS, beyond, bits_by_position, modes_of, whole_books
from pmnet.report.console import Meter, out
from pmnet.report.plots import plot_longcontext
from pmnet.report.provenance import prepare_folder, provenance, write_json


def longcontext_command(
    model: Annotated[Path, typer.Argument(help="Folder of any model that this package trains.")],
    data: Annotated[list[Path], typer.Option(help="Held-out books, a file or folder; may be repeated.")],
    length: Annotated[str, typer.Option(help="Bytes of each book, as in 65536 or 512KiB.")] = "512KiB",
    reset: Annotated[list[str] | None, typer.Option(help="Also forget everything every so many bytes.")] = None,
    ablations: Annotated[bool, typer.Option("--ablations", help="Also with anchors set to zero (PMNet).")] = False,
    save: Annotated[
        Path | None,
        typer.Option(file_okay=False, writable=True, help="Folder for longcontext.json and longcontext.png."),
    ] = None,
) -> None:
    """Bits per byte by position in whole books: state carried, reset, and with the recurrence off."""
    network, files, size = load_any(model), open_files(data), bytes_of("--length", length)
    resets = [*dict.fromkeys(bytes_of("--reset", part) for part in reset or [])]
    modes, books = modes_of(network, resets, ablations), whole_books(files, size)
    if save is not None:
        prepare_folder(save, "longcontext.json", "longcontext.png")
    rows: list[dict[str, Any]] = []
    facts = provenance() | {
        "length": size,
        "parameters": network.num_parameters(),
        "model": network.config.to_dict(),
    }
    points = [point for point in POINTS if point < size]
    table = Table(title=f"{model}: bits per byte, mean of {len(books)} books of {size:,} bytes")
    for title in ("state", "all", *(f"beyond {point:,}" for point in points), "word perplexity", "bytes/s"):
        table.add_column(title, justify="right")
    try:
        with Meter() as meter:
            for mode in modes:
                advance = meter.task(mode.name, size * len(books))
                row = bits_by_position(network, files, size, mode, advance)
                rows.append(row)
                far = [f"{mean(beyond(row, point)):.4f}" for point in points]
                perplexity, speed = f"{row['word_perplexity']:.1f}", f"{row['bytes_per_second']:,.0f}"
                table.add_row(mode.name, f"{row['total']:.4f}", *far, perplexity, speed)
                meter.line(f"{mode.name}: {row['total']:.4f} bits per byte")
                if save is not None:
                    write_json(save / "longcontext.json", facts | {"rows": rows})
    finally:  # of a measurement that was interrupted too
        if rows:
            out.print(table)
    if save is not None:
        plot_longcontext({row["mode"]: row for row in rows}, save / "longcontext.png")
        out.print(f"saved {save / 'longcontext.json'} and {save / 'longcontext.png'}", soft_wrap=True)


def bytes_of(option: str, text: str) -> int:
    """A number of bytes, as in 65536, 64KiB or 1MiB, given for `option`.

    Raises:
        ValueError: if it is none.
    """
    found = re.fullmatch(r"(\d+)\s*(KiB|MiB)?", text.strip())
    if not found or int(found[1]) == 0:
        raise ValueError(f"{option} is a number of bytes, such as 65536 or 512KiB, not {text!r}")
    return int(found[1]) * {None: 1, "KiB": 1024, "MiB": 1024**2}[found[2]]
