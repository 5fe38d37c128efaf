"""Pictures of `pmnet eval gradients`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pmnet.report.plots import save_png

Row = dict[str, Any]


def plot_jacobian(models: Sequence[Row], path: Path) -> None:
    """Gain of the state Jacobian, and gradient of a loss, over distance; before training and after; a PNG."""
    stages = [stage for stage in (False, True) if any(bool(model["folder"]) == stage for model in models)]
    figure = Figure(figsize=(11, 4 * len(stages)), dpi=110, layout="constrained")
    panels = figure.subplots(len(stages), 2, squeeze=False)
    names = list(dict.fromkeys(model["name"] for model in models))
    for line, stage in zip(panels, stages, strict=True):
        when = "trained" if stage else "at initialisation"
        for model in models:
            if bool(model["folder"]) == stage:
                for label, curve in model["curves"].items():
                    axes = line[1] if label.startswith("loss") else line[0]
                    style = "--" if "level 1" in label else ":" if label == "hand-down" else "-"
                    _curve(axes, curve, f"{model['name']}, {label}", f"C{names.index(model['name'])}{style}")
        line[0].set_title(f"d state(t + n) / d state(t), {when}")
        line[0].set_ylabel("log10 of the gain")
        line[1].set_title(f"d loss(t + n) / d state(t), {when}")
        line[1].set_ylabel("log10 of the norm")
        for axes in line:
            axes.set_ylim(-12.5, 3.5)
    for axes in panels.flat:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("n, positions")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6, ncols=2)
    save_png(figure, path)


def _curve(axes: Axes, curve: Sequence[Row], label: str, style: str) -> None:
    points = [p for p in curve if p["n"] > 0 and p["median"] is not None]
    drawn = axes.plot([p["n"] for p in points], [p["median"] for p in points], style, marker=".", label=label)
    ranged = [p for p in points if p["low"] is not None]
    low, high = ([p[end] for p in ranged] for end in ("low", "high"))
    axes.fill_between([p["n"] for p in ranged], low, high, color=drawn[0].get_color(), alpha=0.15)


def plot_training(trials: Sequence[Row], path: Path) -> None:
    """Gradient norms over episode length, with the factor and without, and over the scale of the weights; a PNG."""
    figure = Figure(figsize=(13, 4), dpi=110, layout="constrained")
    lengths, factor, scales = figure.subplots(1, 3)
    rates = sorted({trial["rate"] for trial in trials})
    middle, first = rates[len(rates) // 2], min(trial["total"] for trial in trials)
    grid = [trial for trial in trials if trial["scale"] == 1 and trial["rate"] == middle]
    for name in dict.fromkeys(trial["name"] for trial in trials):
        own = [trial for trial in grid if trial["name"] == name]
        _norms(lengths, [trial for trial in own if trial["factor"]], "total", name)
        if any(not trial["factor"] for trial in own):
            for on in (True, False):
                chosen = [trial for trial in own if trial["factor"] == on]
                _norms(factor, chosen, "total", f"{name}, {'with' if on else 'without'} the factor")
        one = [t for t in trials if t["name"] == name and t["total"] == first and t["rate"] == middle and t["factor"]]
        if len(one) > 1:
            _norms(scales, sorted(one, key=lambda trial: trial["scale"]), "scale", name)
    titles = ("gradient norm by episode length", "1/sqrt(count)", "gradient norm by scale of the initial weights")
    for axes, title, below in zip((lengths, factor, scales), titles, ("positions", "positions", "scale"), strict=True):
        axes.set_title(f"{title}, rate {middle:g}", fontsize="small")
        axes.set_xlabel(below)
        axes.set_ylabel("median, bar up to the 99th percentile")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="x-small")
    save_png(figure, path)


def _norms(axes: Axes, trials: Sequence[Row], key: str, label: str) -> None:
    kept = [trial for trial in trials if trial["median"] is not None]
    up = [trial["p99"] - trial["median"] for trial in kept]
    middle = [trial["median"] for trial in kept]
    axes.errorbar([trial[key] for trial in kept], middle, yerr=[[0] * len(up), up], marker="o", capsize=3, label=label)


def plot_precision(errors: Sequence[Row], curves: Sequence[Row], path: Path) -> None:
    """State error over length, and loss over steps by precision; a PNG."""
    figure = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name in dict.fromkeys(row["form"] for row in errors):
        rows = [row for row in errors if row["form"] == name]
        left.loglog([row["length"] for row in rows], [row["rms"] for row in rows], marker="o", label=name)
    left.set_xlabel("positions")
    left.set_ylabel("rms error of the state, radians")
    for curve in curves:
        for index, losses in enumerate(curve["losses"]):
            colour = f"C{list(curves).index(curve)}"
            right.plot(losses, color=colour, alpha=0.6, label=curve["precision"] if index == 0 else None)
    right.set_xlabel("step")
    right.set_ylabel("loss, nats per byte")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    save_png(figure, path)


def plot_saturation(found: Row, path: Path) -> None:
    """Circular variance over bytes, capacity of a slot over writes, bias of the rounding's gradient; a PNG."""
    figure = Figure(figsize=(14, 4), dpi=110, layout="constrained")
    filling, capacity, bias = figure.subplots(1, 3)
    for row in found["spread"]:
        for level in range(len(row["curve"][0]["levels"])):
            when = "trained" if row["folder"] else "untrained"
            label = f"{when}, {row['phase_bits']} bits, {row['filler']}, level {level}"
            values = [point["levels"][level] for point in row["curve"]]
            filling.plot([point["bytes"] for point in row["curve"]], values, marker=".", label=label)
    filling.set_xlabel("bytes read")
    filling.set_ylabel("circular variance of the states")
    finest = max(row["phase_bits"] for row in found["capacity"])
    for index, scale in enumerate(dict.fromkeys(row["scale"] for row in found["capacity"])):
        for bits, style in ((finest, "-"), (5, "--")):
            rows = [r for r in found["capacity"] if r["scale"] == scale and r["phase_bits"] == bits]
            label = f"codes of {scale:g} rad, {bits} bits"
            capacity.plot([r["writes"] for r in rows], [r["accuracy"] for r in rows], f"C{index}{style}", label=label)
    rows = [r for r in found["capacity"] if r["scale"] == found["capacity"][0]["scale"] and r["phase_bits"] == finest]
    capacity.plot([r["writes"] for r in rows], [r["limit"] for r in rows], "k:", label="plain sum, theory")
    capacity.set_xlabel("writes to the slot")
    capacity.set_ylabel("first write read correctly")
    for writes in dict.fromkeys(row["writes"] for row in found["bias"]):
        chosen = [r for r in found["bias"] if r["writes"] == writes and r["scale"] == 0.2]
        bias.plot(
            [r["phase_bits"] for r in chosen], [r["cosine"] for r in chosen], marker="o", label=f"{writes} writes"
        )
    for index, model in enumerate(found["models"]):
        name = "untrained model, against 32 bits" if index == 0 else None
        bias.plot([r["phase_bits"] for r in model], [r["cosine"] for r in model], color="grey", label=name)
    bias.set_xlabel("phase_bits")
    bias.set_ylabel("cosine with the true gradient")
    filling.set_xscale("log")
    capacity.set_xscale("log", base=2)
    bias.set_xscale("log", base=2)
    for axes in (filling, capacity, bias):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=6)
    save_png(figure, path)
