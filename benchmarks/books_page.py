"""The tables of `results/books/README.md`, made of the JSON files beside it: `python -m benchmarks.books_page`."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

from benchmarks.books import (
    ABLATIONS,
    COPY_FIRST,
    GRID_STEPS,
    LONGER,
    MODELS,
    NARROW,
    PIECES,
    PRACTICE,
    RATES,
    SEEDS,
    Entry,
    final_bits,
)
from benchmarks.pages import load, metrics, table
from pmnet.eval.longcontext import POINTS, beyond, slope
from pmnet.report.plots import plot_longcontext

ROOT = Path(__file__).parent.parent / "results" / "books"


def main() -> None:
    """Write the page and its picture."""
    lines = {folder.name: load(folder / "longcontext.json")["rows"][0] for folder in _stored(ROOT, MODELS)}
    if lines:
        plot_longcontext(lines, ROOT / "longcontext.png")
    (ROOT / "README.md").write_text(text(ROOT))


def text(root: Path) -> str:
    """The page for the results below `root`."""
    parts = [
        "# Books",
        "Made by `python -m benchmarks.books_page` from the files beside this page, which name their command, seed,\n"
        "commit, versions and machine. Bits per byte of held-out novels, read from their beginning; *beyond* n: over\n"
        "all bytes from position n on; *slope*: bits per byte for each doubling of the position after 8 KiB;\n"
        "*process*: memory resident at the end. In a comparison all models have read the same bytes in one order,\n"
        "but `no-carry`, which read windows in random order: differences to it contain those of the data. So do those\n"
        "between a table of whole documents and one of pieces.",
        *_needle(root / "needle" / "needle.json"),
        *_comparison("Models", _stored(root, MODELS)),
        *_comparison("Another seed: other initial weights, another order of the books", _stored(root, SEEDS)),
        *_comparison("Three times the bytes", _stored(root, LONGER)),
        *_comparison("Read in pieces of 4,096 bytes, each from an empty state", _stored(root, PIECES[:2])),
        *_comparison("Such pieces, three times the bytes: the first is `models/books-tiny`", _stored(root, PIECES[2:])),
        *_comparison(
            "Ablations: trained separately, at the learning rate of `pmnet`", _stored(root, (MODELS[0], *ABLATIONS))
        ),
        *_comparison(
            "First comparison: half the bytes, less than half the learning rate",
            [root / "first" / entry.name for entry in (*MODELS, *ABLATIONS) if (root / "first" / entry.name).exists()],
        ),
        *_comparison("Attention that sees two keys and reaches 5 bytes", _stored(root, NARROW)),
        *_comparison("Taught to copy first, and fresh models of the same size", _stored(root, COPY_FIRST)),
        *_comparison("Text and copy-paste in turns, and fresh models at the same rate", _stored(root, PRACTICE)),
        *_writes(_stored(root, (*MODELS, *LONGER, *PIECES, *ABLATIONS, *NARROW, *COPY_FIRST, *PRACTICE))),
        *_grid(root / "grid"),
        *_speed(root / "speed.json"),
    ]
    return "\n\n".join(parts) + "\n"


def _stored(root: Path, entries: Sequence[Entry]) -> list[Path]:
    folders = [root / entry.group / entry.name for entry in entries]
    return [folder for folder in folders if (folder / "longcontext.json").exists()]


def _comparison(title: str, folders: list[Path]) -> list[str]:
    rows = []
    base = load(folders[0] / "longcontext.json")["rows"][0] if folders else {}
    for folder in folders:
        stored, last, config = load(folder / "longcontext.json"), metrics(folder)[-1], load(folder / "config.json")
        for row in stored["rows"]:
            apart = [mine - other for mine, other in zip(beyond(row, 8192), beyond(base, 8192), strict=True)]
            spread = f" ± {stdev(apart) / len(apart) ** 0.5:.3f}" if len(apart) > 1 else ""
            rows.append(
                [f"`{folder.name}`", row["mode"], f"{stored['parameters']:,}", f"{last['bytes'] / 1e6:.2f} MB",
                 f"{config['recipe']['learning_rate']:g}", f"{row['total']:.3f}",
                 *(f"{fmean(beyond(row, point)):.3f}" for point in POINTS), f"{fmean(apart):+.3f}{spread}",
                 "" if (gain := slope(row, 8192)) is None else f"{gain:+.4f}", f"{row['word_perplexity']:,.0f}",
                 "" if row["state_bytes"] is None else f"{row['state_bytes'] / 1024:,.0f} KiB",
                 f"{row['resident'] / 2**20:,.0f} MiB"]
            )  # fmt: skip
    heads = ["model", "state", "parameters", "bytes seen", "learning rate", "all", *(f"beyond {p:,}" for p in POINTS),
             "beyond 8,192, to the first row (± standard error over books)", "slope", "word perplexity", "state",
             "process"]  # fmt: skip
    if not rows:
        return []
    length, books = load(folders[0] / "longcontext.json")["length"], base["books"]
    sizes = f"The first {length:,} bytes of {len(books)} books: {', '.join(books)}."
    return [f"## {title}", sizes, table(heads, rows)]


def _needle(path: Path) -> list[str]:
    if not path.exists():
        return []
    rows = [
        [f"{c['size']:,}", f"{c['distance']:g}", str(c["strings"]), f"{100 * c['exact']:.1f} %",
         f"{100 * c['low']:.1f} to {100 * c['high']:.1f} %", f"{100 * c['letters']:.1f} %"]
        for c in load(path)["cells"]
    ]  # fmt: skip
    heads = ["bytes of a novel", "depth", "numbers", "exact", "95 %", "digits right"]
    return ["## A number in a book, asked of `models/books-tiny`, which was not trained to answer", table(heads, rows)]


def _writes(folders: list[Path]) -> list[str]:
    rows = []
    for folder in folders:
        stored = load(folder / "longcontext.json")
        name = f"`{folder.name}`" + ("" if folder.parent.name == "models" else f", {folder.parent.name}")
        if not stored["model"].get("memory_cumsum"):
            continue
        for number, level in enumerate(stored["rows"][0]["memory"] or []):
            rows.append(
                [name, str(number), f"{100 * level['phases']:.0f} %", f"{level['resultant']:.2f}",
                 f"{level['theta']:.2f}", f"{100 * level['constant']:.0f} %",
                 f"{level['slots_written']:.1f} of {stored['model']['num_memory']}", f"{level['groups_visited']:.1f}"]
            )  # fmt: skip
    heads = ["model", "level", "phases turned", "resultant", "mean abs theta (rad)", "of it constant", "slots written",
             "groups visited"]  # fmt: skip
    text = (
        "State carried; the memory at the end of the books, and the writes of the last 1,024 bytes: *constant* is\n"
        "what every byte writes alike; over how many *slots* the write of one byte is spread, and over how many\n"
        "*groups* those of all bytes, as the exponential of the entropy. *Resultant*: 1, the phases point in one\n"
        "direction; 0, in none."
    )
    return ["## What is written", text, table(heads, rows)] if rows else []


def _grid(folder: Path) -> list[str]:
    rows = []
    for entry in (*MODELS, *COPY_FIRST):
        cells = [folder / f"{entry.name}-{rate:g}" for rate in RATES]
        if all((cell / "metrics.jsonl").exists() for cell in cells):
            rows.append([f"`{entry.name}`", *(f"{final_bits(cell):.3f}" for cell in cells)])
    heads = ["model", *(f"{rate:g}" for rate in RATES)]
    title = f"## Learning rates: bits per byte over the last quarter of {GRID_STEPS} steps"
    return [title, table(heads, rows)] if rows else []


def _speed(path: Path) -> list[str]:
    if not path.exists():
        return []
    heads = ["model", "training, bytes/s", "times `pmnet`", "reading, bytes/s", "times `pmnet`"]
    rows = [
        [f"`{name}`", *(cell for kind in ("train", "read") for cell in
                        (f"{row[kind]['bytes_per_second']:,.0f}", f"{row[kind]['times_first']:.2f}"))]
        for name, row in load(path)["models"].items()
    ]  # fmt: skip
    return ["## Speed: medians of rounds in which all take turns", table(heads, rows)]


if __name__ == "__main__":
    main()
