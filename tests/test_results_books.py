"""What README and docs/books.md say of the books is what is stored."""

import json
import math
import re
from statistics import fmean, median

from benchmarks import books_page
from benchmarks.books import MODELS
from pmnet.eval.longcontext import beyond
from pmnet.model.load import load_model
from tests.test_results import ROOT, told

PAGES = ("README.md", "docs/books.md")


def test_the_page_of_the_books_is_that_of_its_files():
    assert (books_page.ROOT / "README.md").read_text() == books_page.text(books_page.ROOT)


def test_the_books_of_the_readme_are_stored():
    row = r"^\| `([\w-]+)` \| ([\w ]+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \| ([+-][\d.]+) \|$"
    rows, first = re.findall(row, (ROOT / "README.md").read_text(), re.M), []
    assert {row[0] for row in rows} == {
        entry.name for entry in MODELS if (books_page.ROOT / "models" / entry.name).exists()
    }
    for name, state, size, everything, far, apart in rows:
        stored = json.loads((books_page.ROOT / "models" / name / "longcontext.json").read_text())
        (found,) = [row for row in stored["rows"] if row["mode"] == state]
        bits = beyond(found, 8192)
        first = first or bits
        difference = fmean(mine - other for mine, other in zip(bits, first, strict=True))
        expected = (f"{stored['parameters']:,}", f"{found['total']:.3f}", f"{fmean(bits):.3f}", f"{difference:+.3f}")
        assert expected == (size, everything, far, apart)


def test_the_card_of_the_books_quotes_the_stored_figures():
    box = ROOT / "models" / "books-tiny"
    stored = json.loads((books_page.ROOT / "pieces-longer" / "pmnet" / "longcontext.json").read_text())
    text = (box / "README.md").read_text()
    assert f"{load_model(box).num_parameters():,}" in text
    for row in stored["rows"]:
        figures = [row["total"], *(fmean(beyond(row, point)) for point in (1024, 8192, 65536))]
        assert "| ".join([f"| {row['mode']} ", *(f"{figure:.3f} " for figure in figures)]) in text


def rows_of(group: str, name: str) -> dict[str, dict]:
    return {
        row["mode"]: row
        for row in json.loads((books_page.ROOT / group / name / "longcontext.json").read_text())["rows"]
    }


def far(row) -> float:
    return fmean(beyond(row, 8192))


def test_what_the_readme_finds_in_the_books_is_stored():
    text = told(*PAGES)
    names = ("pmnet", "no-recurrence", "mamba2", "mamba2-3x", "sliding-window")
    stored = {name: rows_of("models", name) for name in names}
    base = stored["pmnet"]["carried"]
    off, without, mamba, larger, window = (
        far(row) - far(base)
        for row in (stored["pmnet"]["recurrence off"], *(stored[name]["carried"] for name in names[1:]))
    )
    assert f"the recurrence is worth {off:.3f} bits per byte" in text
    assert f"the same model trained without it is {-without:.3f} better" in text
    other, alone = rows_of("seed-1", "pmnet"), rows_of("seed-1", "no-recurrence")
    worth, better = far(other["recurrence off"]) - far(other["carried"]), far(other["carried"]) - far(alone["carried"])
    assert f"(a second seed: worth {worth:.3f}, and {better:.3f} better without)" in text
    sizes = [stored[name]["carried"]["state_bytes"] / 1024 for name in ("mamba2", "pmnet")]
    assert f"{sizes[0]:,.0f} KiB instead of {sizes[1]:.0f}, is {-mamba:.3f} better, one of" in text
    assert f"one of three times the size {-larger:.3f}." in text
    assert f"A sliding-window Transformer is {-window:.3f} better" in text
    assert abs(far(stored["pmnet"]["reset every 30720"]) - far(base)) < 0.001
    root, leaf = base["memory"]
    for sentence in (
        f"are {root['theta']:.1f} and {leaf['theta']:.1f} radians in the mean",
        f"{100 * root['constant']:.0f} and {100 * leaf['constant']:.0f} % of that is the same",
        f"spread over {root['slots_written']:.1f} and {leaf['slots_written']:.1f} of 8 slots",
        f"(resultant {root['resultant']:.2f} and {leaf['resultant']:.2f}, where",
    ):
        assert sentence in text
    speed = json.loads((books_page.ROOT / "speed.json").read_text())["models"]["mamba2"]["train"]["times_first"]
    assert f"the PMNet trains {1 / speed:.1f} times as fast as the Mamba-2 of equal size" in text


def test_what_more_bytes_and_pieces_give_is_stored():
    text = told(*PAGES)
    longer, without = rows_of("longer", "pmnet"), rows_of("longer", "no-recurrence")
    carried, reset, alone = (far(longer["carried"]), far(longer["reset every 30720"]), far(without["carried"]))
    assert f"takes {carried:.3f} bits beyond 8 KiB with its state carried, {reset:.3f} with a reset" in text
    assert f"one trained without recurrence {alone:.3f}." in text
    last = [fmean(bits[-1] for bits in longer[mode]["bits"]) for mode in ("carried", "recurrence off")]
    assert f"{last[0] - last[1]:.3f} bits from 256 to 512 KiB" in text
    losses = []
    for name in ("pmnet", "no-recurrence"):
        lines = (books_page.ROOT / "longer" / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        losses.append(fmean(row["loss"] for row in rows if row["step"] > 5 / 8 * rows[-1]["step"]) / math.log(2))
    assert f"the loss is {losses[1] - losses[0]:.3f} bits lower than without" in text
    worth, better = [], []
    for group in ("pieces", "pieces-longer"):
        rows, other = rows_of(group, "pmnet"), rows_of(group, "no-recurrence")
        base = far(rows["carried"])
        assert abs(far(rows["reset every 30720"]) - base) < 0.001
        worth.append(far(rows["recurrence off"]) - base)
        better.append(base - far(other["carried"]))
    assert f"is worth {worth[0]:.3f} bits on the same weights after 4.1 MB and {worth[1]:.3f} after 12.3 MB" in text
    assert f"the model trained without it is {better[0]:.3f} and {better[1]:.3f} better" in text


def test_the_memories_are_stored():
    row = r"^\| [\w ,]+ \| `([\w-]+)` \| ([\d.]+) \| ([\d.]*) \|$"
    found = re.findall(row, (ROOT / "docs" / "books.md").read_text(), re.M)
    assert {name for name, *_ in found} == {path.name for path in (books_page.ROOT / "window-2").iterdir()}
    for name, carried, off in found:
        rows = rows_of("window-2", name)
        assert carried == f"{far(rows['carried']):.3f}"
        assert off == (f"{far(rows['recurrence off']):.3f}" if "recurrence off" in rows else "")
    text = told(*PAGES)
    rows = {name: rows_of("window-2", name) for name, *_ in found}
    forgetting = [rows[name] for name in ("fading-memory", "gated-memory")]
    angles, plain = (far(rows["no-recurrence"]["carried"]) - far(row["carried"]) for row in forgetting)
    assert f"a memory of angles gives {angles:.3f} and one of plain numbers {plain:.3f}" in text
    assert f"the memory gives {angles:.3f} bits" in text
    angles, plain = (far(row["recurrence off"]) - far(row["carried"]) for row in forgetting)
    assert f"without it they are worse by {angles:.3f} and {plain:.3f}" in text
    wide = [far(rows_of("models", name)["carried"]) for name in ("gated-memory", "no-recurrence", "flat")]
    assert f"`gated-memory`: {wide[0]:.3f}, without a memory {wide[1]:.3f}" in text
    assert f"takes {wide[2]:.3f}; its model leans on it more" in text
    assert f"by {far(rows_of('models', 'flat')['recurrence off']) - wide[2]:.3f} on the same weights, and" in text


def test_the_windows_and_bits_are_stored():
    text = (ROOT / "docs" / "books.md").read_text()
    for title, variant, preset in (("keys", "window", "16"), ("bits", "phase-bits", "7")):
        rows = rf"^\| {title} \|(.*)\|\n.*\n\| bits beyond 8,192 \|(.*)\|\n\| recurrence off \|(.*)\|$"
        found = re.search(rows, text, re.M)
        assert found is not None
        values, carried, worth = ([cell.strip() for cell in row.split("|")] for row in found.groups())
        names = ["pmnet" if f"{preset} (the preset)" == value else f"{variant}-{value}" for value in values]
        assert set(names) == {"pmnet"} | {path.name for path in (books_page.ROOT / "models").glob(f"{variant}-*")}
        for name, *cells in zip(names, carried, worth, strict=True):
            stored = rows_of("models", name)
            base = far(stored["carried"])
            assert cells == [f"{base:.3f}", f"{far(stored['recurrence off']) - base:+.3f}"]


def test_what_copying_first_gives_is_stored():
    text = told(*PAGES)
    bits = {
        name: [far(rows_of("copy-first", f"{name}{seed}")["carried"]) for seed in ("", "-1", "-2")]
        for name in ("fresh", "taught", "fresh-off")
    }
    for name, words in (("fresh", "fresh"), ("taught", "that copies"), ("fresh-off", "trained without recurrence")):
        found = bits[name]
        assert f"{words} {median(found):.3f} ({min(found):.3f} to {max(found):.3f})" in text
    assert all(off < min(other) for off, *other in zip(bits["fresh-off"], bits["fresh"], bits["taught"], strict=True))
    for name in ("taught", "taught-0.003", "taught-0.001"):
        stored = json.loads((books_page.ROOT / "copy-first" / name / "copy-paste.json").read_text())
        assert {cell["distance"] for cell in stored["cells"]} == {2, 62, 248}
        assert {(cell["strings"], cell["exact"]) for cell in stored["cells"]} == {(1000, 0.0)}
    assert far(rows_of("copy-first", "fresh-0.003")["carried"]) < far(rows_of("copy-first", "taught-0.003")["carried"])
