"""Pictures of stored results."""

from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from matplotlib.figure import Figure

from pmnet.atomic import replacing


def plot_retrieval(task: str, cells: list[dict[str, Any]], reach: int | None, path: Path) -> None:
    """Exact answers over distance (over size, where there is one distance only), memory on and off; a PNG.

    Args:
        task: for the title.
        cells: rows of `pmnet eval retrieval`.
        reach: of the attention, if it has one.
        path: file to write.
    """
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    far = len({cell["distance"] for cell in cells}) > 1
    x, other = ("distance", "size") if far else ("size", "distance")
    for name in dict.fromkeys((cell["variant"], cell[other]) for cell in cells):
        line = sorted((c for c in cells if (c["variant"], c[other]) == name), key=lambda c: c[x])
        exact = [cell["exact"] for cell in line]
        spread = [[c["exact"] - c["low"] for c in line], [c["high"] - c["exact"] for c in line]]
        label = f"{name[0]}, {name[1]:g}" if far else name[0]
        drawn = axes.errorbar([c[x] for c in line], exact, yerr=spread, marker="o", capsize=3, label=label)
        off = [(c[x], c["control"]["exact"]) for c in line if c["control"] is not None]
        if off:
            colour = drawn.lines[0].get_color()
            axes.plot(*zip(*off, strict=True), marker="s", linestyle="--", color=colour, label=f"{label}: memory off")
    if task == "copy-paste" and reach is not None:
        axes.axvline(reach, color="grey", linestyle=":", label="reach of attention")
    axes.set_xscale("symlog" if any(cell[x] == 0 for cell in cells) else "log")
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("bytes of filler between string and paste marker" if task == "copy-paste" else x)
    axes.set_ylabel("answers exactly right")
    axes.set_title(task)
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    save_png(figure, path)


def plot_memory(found: dict[str, Any], path: Path) -> None:
    """What letters and filler turn on each level, where letters are read, and what breaks without a level; a PNG."""
    figure = Figure(figsize=(10, 3.4), dpi=120, layout="constrained")
    turned, same, without = figure.subplots(1, 3)
    levels, places = found["levels"], list(range(len(found["levels"])))
    for shift, who in ((-0.2, "letters"), (0.2, "filler")):
        heights = [level[who]["turned"] for level in levels]
        turned.bar([place + shift for place in places], heights, width=0.4, label=who)
    turned.set_title("rotations that are not zero")
    turned.legend(fontsize="small")
    same.bar(places, [level["same_group"] for level in levels])
    same.set_title("letters read in the group\nthey were written to")
    for axes in (turned, same):
        axes.set_xticks(places, [f"level {place}" for place in places])
        axes.set_ylim(0, 1.03)
    names = list(found["without"])
    without.barh(names[::-1], [found["without"][name]["letters"] for name in names[::-1]])
    without.set_title("bytes right without")
    without.set_xlim(0, 1.03)
    save_png(figure, path)


def plot_longcontext(rows: dict[str, dict[str, Any]], path: Path) -> None:
    """Bits per byte over position, one line per row of `pmnet eval longcontext`, the mean over books; a PNG.

    The band of a line is the standard error, over books, of its difference to the first line.
    """
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    first = next(iter(rows.values()))["bits"]
    for name, row in rows.items():
        means = [fmean(book[index] for book in row["bits"]) for index in range(len(row["edges"]))]
        drawn = axes.plot(row["edges"], means, marker="o", markersize=3, label=name)
        if len(first) > 1 and row["bits"] is not first:
            apart = [
                [mine[i] - base[i] for mine, base in zip(row["bits"], first, strict=True)] for i in range(len(means))
            ]
            errors = [stdev(differences) / len(first) ** 0.5 for differences in apart]
            low, high = ([m + sign * e for m, e in zip(means, errors, strict=True)] for sign in (-1, 1))
            axes.fill_between(row["edges"], low, high, color=drawn[0].get_color(), alpha=0.2)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the book (upper edge of the bin, bytes)")
    axes.set_ylabel("bits per byte")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    save_png(figure, path)


def save_png(figure: Figure, path: Path) -> None:
    """Write a PNG that appears complete or not at all."""
    with replacing(path) as partial:
        figure.savefig(partial, format="png")
