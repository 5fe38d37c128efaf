"""The tables of `results/why/README.md`, made of the files beside it: `python -m benchmarks.why`."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

from benchmarks.pages import Json, load, metrics, table

ROOT = Path(__file__).parent.parent / "results" / "why"
JACOBIANS = {
    "jacobian": "Gradients through time",
    "jacobian-ntm": "Gradients through the trained Turing machine",
    "jacobian-controls": "Gradients through other trained controls",
}
DISTANCES = (1, 64, 1024, 65_536)


def main() -> None:
    """Write the page."""
    (ROOT / "README.md").write_text(page(ROOT))


def page(root: Path) -> str:
    """The page for the results below `root`."""
    parts = [
        "# Why it trains",
        "Made by `python -m benchmarks.why` from the files beside this page, which name their command, seed, commit,\n"
        "versions and machine. What they show, and what not: [docs/why-it-trains.md](../../docs/why-it-trains.md).",
        *(part for name in JACOBIANS for part in _of(root / name / "jacobian.json", partial(_jacobian, name))),
        *_of(root / "training" / "training.json", _training),
        *_of(root / "precision" / "precision.json", _precision),
        *_of(root / "saturation" / "saturation.json", _saturation),
        *_of(root / "ntm-copy" / "copy.json", lambda stored: _copy(stored, _norms(root / "ntm-copy"))),
        *_of(root / "cost" / "cost.json", _cost),
        *_whole([*sorted(root.glob("runs/*")), *sorted(root.parent.glob("retrieval/demo/seed-*"))], root.parent),
    ]
    return "\n\n".join(parts) + "\n"


def _of(path: Path, section: Callable[[Json], list[str]]) -> list[str]:
    return section(load(path)) if path.exists() else []


def _jacobian(folder: str, stored: Json) -> list[str]:
    rows = []
    for model in stored["models"]:
        for label, curve in model["curves"].items():
            by = {point["n"]: point for point in curve}
            far = curve[-1]
            rows.append([
                model["name"], "trained" if model["folder"] else "at initialisation", label,
                *(_power(by[n]) if n in by else "" for n in DISTANCES[:-1]), f"{far['n']:,}", _power(far),
            ])  # fmt: skip
    exact = [model for model in stored["models"] if "shift_exact" in model]
    heads = ["model", "weights", "curve", *(f"n = {n:,}" for n in DISTANCES[:-1]), "greatest n", "there"]
    return [
        f"## {JACOBIANS[folder]}",
        f"Medians over {stored['rows']} sequences of random bytes. `state` is the gain of\n"
        "d state(t + n) / d state(t), of trees by level; `hand-down` that of d lowest state(t + n) / d root state(t);\n"
        "`loss` the norm of d loss(t + n) / d state(t), which float32 ends at 1e-45.",
        *([_shifts(exact, stored["positions"])] if exact else []),
        f"![curves]({folder}/jacobian.png)",
        table(heads, rows, 3),
    ]


def _shifts(models: list[Json], positions: int) -> str:
    found = [
        f"{model['name']} {'trained' if model['folder'] else 'at initialisation'}: "
        + ", ".join("yes" if shift else "no" for shift in model["shift_exact"])
        for model in models
    ]
    return (
        f"An integer added to the state of a level is, to the bit, the same integer {positions:,} positions later,\n"
        f"level by level: {'; '.join(found)}."
    )


def _training(stored: Json) -> list[str]:
    rows = [
        [t["name"], f"{t['total']:,}", f"{t['rate']:g}", f"{t['scale']:g}", "yes" if t["factor"] else "no",
         str(t["steps"]), _short(t["median"]), _short(t["p99"]), _short(t["max"]), f"{t['diverged']} of {t['runs']}",
         f"{t['first_loss']:.2f}", _short(t["last_loss"])]
        for t in stored["trials"]
    ]  # fmt: skip
    heads = ["model", "positions", "rate", "scale", "factor", "steps", "median norm", "99 %", "max", "diverged",
             "first loss", "last loss"]  # fmt: skip
    return [
        "## Gradient norms without clipping",
        f"Copy-paste of eight letters from scratch, AdamW, {stored['seeds']} seeds; norms over all steps and seeds.\n"
        "`scale` multiplies every matrix, embedding and anchor at initialisation; `factor` is the division by the\n"
        "root of the number of writes (trees). Losses are medians over seeds.",
        "![norms](training/training.png)",
        table(heads, rows, 1),
    ]


def _precision(stored: Json) -> list[str]:
    rows = [
        [row["form"], f"{row['length']:,}", f"{row['rms']:.1e} ({row['rms_low']:.1e} to {row['rms_high']:.1e})",
         f"{row['max']:.1e}", f"{row['neighbours']:.1e}"]
        for row in stored["errors"]
    ]  # fmt: skip
    curves = [
        [c["precision"], *(f"{median(losses[n - 1] for losses in c['losses']):.3f}" for n in _marks(c)),
         f"{min(losses[-1] for losses in c['losses']):.3f} to {max(losses[-1] for losses in c['losses']):.3f}"]
        for c in stored["curves"]
    ]  # fmt: skip
    heads = ["precision", *(f"step {n}" for n in _marks(stored["curves"][0])), "range at the end"]
    return [
        "## Precision",
        f"Error of states in radians, {stored['seeds']} draws: median (range) of the root mean square, the greatest,\n"
        "and the greatest difference between a sequence computed in a batch and alone.",
        "![precision](precision/precision.png)",
        table(["form", "positions", "rms error", "greatest", "batch neighbours"], rows, 1),
        "Loss of a short byte-level training on text, the same bytes for all seeds, median of the seeds:",
        table(heads, curves, 1),
    ]


def _marks(curve: Json) -> list[int]:
    count = min(map(len, curve["losses"]))
    return sorted({max(1, count // 4), max(1, count // 2), count})


def _saturation(stored: Json) -> list[str]:
    spread = []
    for row in stored["spread"]:
        by = {point["bytes"]: point["levels"] for point in row["curve"]}
        picked = sorted({1, 16, 256, 4096, max(by)} & set(by))
        for level in range(len(by[1])):
            spread.append([row["folder"] or "untrained", str(row["phase_bits"]), row["filler"], str(level),
                           *(f"{by[n][level]:.3f}" for n in picked)])  # fmt: skip
    capacity = []
    finest = max(row["phase_bits"] for row in stored["capacity"])
    for scale in dict.fromkeys(row["scale"] for row in stored["capacity"]):
        for bits in (4, 5, 6, 8, finest):
            found = [r for r in stored["capacity"] if (r["scale"], r["phase_bits"]) == (scale, bits)]
            capacity.append([f"{scale:g}", str(bits), *(_percent(r["accuracy"]) for r in found)])
    limits = [
        r for r in stored["capacity"] if r["scale"] == stored["capacity"][0]["scale"] and r["phase_bits"] == finest
    ]
    capacity.append(["plain sum, theory", "", *(_percent(r["limit"]) for r in limits)])
    bias = []
    for writes in dict.fromkeys(row["writes"] for row in stored["bias"]):
        for scale in dict.fromkeys(row["scale"] for row in stored["bias"]):
            by = {r["phase_bits"]: r for r in stored["bias"] if (r["writes"], r["scale"]) == (writes, scale)}
            pairs = [f"{by[b]['cosine']:.3f}, {by[b]['ratio']:.2f}" for b in (4, 5, 6, 7, 8, 12)]
            bias.append([str(writes), f"{scale:g}", *pairs])
    model = [
        [str(rows[0]["phase_bits"]), f"{median(row['cosine'] for row in rows):.4f}",
         f"{median(row['ratio'] for row in rows):.3f}"]
        for rows in zip(*stored["models"], strict=True)
    ]  # fmt: skip
    return [
        "## Saturation",
        f"Circular variance of the states over {stored['rows']} sequences, by bytes read (0: all agree, 1: uniform):",
        "![saturation](saturation/saturation.png)",
        table(["weights", "bits", "bytes of", "level", *(f"after {n:,}" for n in picked)], spread, 3),
        f"The first of K writes to one slot of {stored['memory_size']} phases, told from 255 other random codes; rows\n"
        "by standard deviation of a code (rad) and `phase_bits`, columns by K:",
        table(["code", "bits", *(str(r["writes"]) for r in limits)], capacity, 1),
        "The straight-through gradient of the rounding: cosine with the gradient of the loss expected under\n"
        "dithering, and ratio of the norms, by `phase_bits`:",
        table(["writes", "rotation (rad)", *(f"{b} bits" for b in (4, 5, 6, 7, 8, 12))], bias, 1),
        "All parameters of an untrained model, one batch of text: gradient at `phase_bits` against the gradient of\n"
        "the same weights without rounding, median over seeds of the weights:",
        table(["bits", "cosine", "ratio"], model, 1),
    ]


def _copy(stored: Json, norms: list[str]) -> list[str]:
    rows = [
        [str(row["vectors"]), str(row["sequences"]), _percent(row["exact"]), f"{100 * row['bits']:.3f} %"]
        for row in stored["lengths"]
    ]
    return [
        "## The Neural Turing Machine on the copy task of its paper",
        f"{stored['parameters']:,} parameters, {stored['steps']:,} steps of {stored['batch_size']} sequences of 1 to\n"
        f"{stored['longest']} vectors, learning rate {stored['learning_rate']:g}, seed {stored['seed']}. Gradient\n"
        f"norm before clipping, every tenth step: median {norms[0]}, 99th percentile {norms[1]}, greatest {norms[2]}.",
        table(["vectors", "sequences", "exact", "bits right"], rows, 0),
    ]


def _cost(stored: Json) -> list[str]:
    rows = []
    for row in stored["rows"]:
        slow, fast = (stored["positions"] / pick(row["seconds"]) for pick in (max, min))
        rows.append([row["name"], f"{row['parameters']:,}", f"{row['length']:,}", str(row["rows"]),
                     f"{row['bytes_per_second']:,.0f}", f"{slow:,.0f} to {fast:,.0f}",
                     f"{row['peak_bytes'] / 2**20:,.0f}"])  # fmt: skip
    heads = ["model", "parameters", "positions", "rows", "bytes/s", "range", "peak memory, MiB"]
    return [
        "## Cost of a training step",
        f"Forward, backward and AdamW, one thread, processor time, median of {stored['steps']} steps; memory beyond\n"
        "that of the model.",
        table(heads, rows, 1),
    ]


def _norms(folder: Path) -> list[str]:
    """Median, 99th percentile and greatest gradient norm of the steps in `metrics.jsonl`."""
    norms = sorted(row["norm"] for row in metrics(folder))
    return [_short(norms[round(share * (len(norms) - 1))]) for share in (0.5, 0.99, 1)]


def _whole(folders: list[Path], root: Path) -> list[str]:
    """Whole training runs: norms before clipping, speed, and exact strings where they were measured."""
    rows, distances = [], set[int]()
    for folder in folders:
        facts, last = load(folder / "config.json"), metrics(folder)[-1]
        scores = folder / "copy-paste.json"
        cells = load(scores)["cells"] if scores.exists() else []
        distances |= {round(cell["distance"]) for cell in cells}
        exact = {round(cell["distance"]): f"{_percent(cell['exact'])}, {_percent(cell['letters'])}" for cell in cells}
        rows.append([
            str(folder.relative_to(root)), f"{last['step']:,}",
            _short(facts["recipe"]["learning_rate"]), _short(facts["recipe"]["clip"]),
            f"{last['bytes'] / 1e6:.2f} MB", *_norms(folder),
            f"{last['loss']:.3g}", exact,
        ])  # fmt: skip
    if not rows:
        return []
    heads = ["run", "steps", "rate", "clip", "bytes", "median norm", "99 %", "max", "last loss"]
    lines = [[*row[:-1], *(row[-1].get(n, "") for n in sorted(distances))] for row in rows]
    return [
        "## Whole runs on copy-paste",
        "Norms are those before clipping, of the steps in `metrics.jsonl` (every tenth); then, by bytes of filler,\n"
        "strings exactly right and bytes right.",
        table([*heads, *(f"at {n}" for n in sorted(distances))], lines, 1),
    ]


def _power(point: Json) -> str:
    """A base-10 logarithm as a number; 0 where there is none."""
    exponent = point["median"]
    if exponent is None:
        return "0"
    return f"{10**exponent:.3g}" if exponent > -300 else f"1e{exponent:.0f}"


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


if __name__ == "__main__":
    main()
