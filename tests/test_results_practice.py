"""What docs say of longer strings, and of copying beside books, is what is stored."""

import json
import re
from statistics import median

from tests.test_results import ROOT, told
from tests.test_results_books import far, rows_of


def test_the_longer_strings_are_stored():
    share = r"([\d.]+) % \(([\d.]+) %\)"
    rows = re.findall(rf"^\| (\d+) \|{f' {share} [|]' * 4}$", (ROOT / "docs" / "retrieval.md").read_text(), re.M)
    assert [int(size) for size, *_ in rows] == [8, 16, 20, 24, 28, 32]
    folder = ROOT / "results" / "retrieval" / "longer-strings"
    stored = {
        (cell["size"], cell["distance"]): cell
        for name in ("reach-31", "reach-63")
        for cell in json.loads((folder / name / "copy-paste.json").read_text())["cells"]
    }
    for size, *figures in rows:
        cells = [stored[int(size), distance] for distance in (62, 1984, 126, 4032)]
        assert all(cell["strings"] == 1000 for cell in cells)
        assert [f"{100 * cell[name]:.1f}" for cell in cells for name in ("exact", "letters")] == figures


def test_what_copying_beside_books_gives_is_stored():
    text = told("docs/books.md")
    practised = [rows_of("practice", f"practised-{seed}") for seed in range(3)]
    fresh = [rows_of("practice-fresh", f"fresh-{seed}") for seed in range(3)]
    without = [rows_of("practice-fresh", f"fresh-off-{seed}") for seed in range(3)]
    for words, rows, mode in (
        ("practised, state carried", practised, "carried"),
        ("practised, reset every 4 KiB", practised, "reset every 4096"),
        ("practised, recurrence off", practised, "recurrence off"),
        ("fresh, state carried", fresh, "carried"),
        ("fresh, reset every 4 KiB", fresh, "reset every 4096"),
        ("fresh, recurrence off", fresh, "recurrence off"),
        ("trained without recurrence", without, "carried"),
    ):
        bits = [far(row[mode]) for row in rows]
        assert f"| {words} | {median(bits):.3f} | {min(bits):.3f} to {max(bits):.3f} |" in text
    exact: dict[tuple[int, float], list[float]] = {}
    for seed in range(3):
        folder = ROOT / "results" / "books" / "practice" / f"practised-{seed}"
        for cell in json.loads((folder / "copy-paste.json").read_text())["cells"]:
            assert cell["strings"] == 1000
            exact.setdefault((cell["size"], cell["distance"]), []).append(100 * cell["exact"])
    for size, distance in ((8, 62), (8, 1984), (16, 62)):
        shares = exact[size, distance]
        assert f"{median(shares):.1f} % ({min(shares):.1f} to {max(shares):.1f})" in text


def test_quiet_filler_and_sixteen_slots_are_stored():
    text, folder = told("docs/retrieval.md"), ROOT / "results" / "retrieval" / "quiet-filler"

    def cell(run, size, distance):
        parts = (json.loads(path.read_text())["cells"] for path in (folder / run).glob("*/copy-paste.json"))
        (found,) = [c for cells in parts for c in cells if (c["size"], c["distance"]) == (size, distance)]
        return found

    million = cell("eight-slots-leaves", 8, 1e6)
    assert million["exact"] == 1
    assert f"{million['strings']} of those 128 strings (95 % interval from {100 * million['low']:.1f} %)" in text
    sixteen = cell("eight-slots-leaves", 16, 1984)
    assert f"{100 * sixteen['exact']:.1f} % of {sixteen['strings']:,} are exact behind 1,984 bytes" in text
    rows = re.findall(r"^\| (\d+) \|" + r" ([\d.]+) % \|" * 6 + "$", (ROOT / "docs" / "retrieval.md").read_text(), re.M)
    assert [int(size) for size, *_ in rows] == [8, 16, 32]
    for size, *figures in rows:
        runs = ("sixteen-slots-first-half", "sixteen-slots-gentle-finish", "../four-heads/box")
        cells = [cell(run, int(size), distance) for run in runs for distance in (62, 10_000)]
        assert [c["strings"] for c in cells] == [1000, 500] * 3
        assert [f"{100 * c['exact']:.1f}" for c in cells] == figures


def test_what_more_room_gives_is_stored():
    page, folder = (ROOT / "docs" / "retrieval.md").read_text(), ROOT / "results" / "retrieval" / "box"
    section = page[page.index("## Room for letters") : page.index("## Several strings")]
    rows = re.findall(r"^\| (\d+) \|" + r" ([\d.]+) % \|" * 5 + "$", section, re.M)
    assert [size for size, *_ in rows] == ["8", "16", "32"]
    stored = [json.loads((folder / name / "copy-paste.json").read_text()) for name in ("near", "far")]
    cells = [cell for part in stored for cell in part["cells"]]
    for size, *figures in rows:
        at = {c["distance"]: f"{100 * c['exact']:.1f}" for c in cells if c["size"] == int(size)}
        assert [at[distance] for distance in (34, 134, 536, 4288, 10_000)] == figures
    beyond = json.loads((folder / "beyond" / "copy-paste.json").read_text())["cells"]
    assert all(cell["exact"] == 0 and cell["strings"] == 1000 for cell in beyond)
    shares = [f"{100 * cell['letters']:.1f}" for cell in beyond]
    for name in ("README.md", "docs/retrieval.md"):
        assert f"{shares[0]}, {shares[1]} and {shares[2]} % of their bytes are right" in told(name)
    again = json.loads((folder / "../more-slots/seed-1/near/copy-paste.json").read_text())["cells"]
    other = {(c["size"], c["distance"]): f"{100 * c['exact']:.1f}" for c in again}
    near, far = (", ".join(other[size, at] for size in (8, 16)) + f" and {other[32, at]} %" for at in (134, 4288))
    assert f"{near} of strings of 8, 16 and 32 behind 134 bytes, and {far} behind 4,288" in told("docs/retrieval.md")
    assert f"{near} of strings of 8, 16 and 32 behind 134 bytes" in told("README.md")
