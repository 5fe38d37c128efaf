"""Pictures of stored results."""

import os
from pathlib import Path

from pmnet.eval.retrieval import Cell


def plot_retrieval(cells: list[Cell], path: Path) -> None:
    """Exact strings over distance, memory on and off, with the attention's reach; a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    gaps = [cell.gap for cell in cells]
    exact = [cell.exact for cell in cells]
    errors = [[c.exact - c.low for c in cells], [c.high - c.exact for c in cells]]
    axes.errorbar(gaps, exact, yerr=errors, marker="o", capsize=3, label="memory on")
    axes.plot(gaps, [cell.control for cell in cells], marker="s", linestyle="--", label="memory off, same weights")
    axes.axvline(cells[0].reach, color="grey", linestyle=":", label="reach of attention")
    axes.set_xscale("log", base=2)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("filler bytes between string and paste marker")
    axes.set_ylabel("strings reproduced exactly")
    axes.legend(loc="center right")
    axes.grid(alpha=0.3)
    partial = path.with_name(path.name + ".partial")
    figure.savefig(partial, format="png")
    os.replace(partial, path)
