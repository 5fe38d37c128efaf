"""The page of `results/why` is that of its files, and docs/why-it-trains.md quotes the page."""

import json
import re
from pathlib import Path

from benchmarks import why

ROOT = Path(__file__).parent.parent
STORED = ROOT / "results" / "why"


def test_the_page_is_that_of_its_files():
    assert (STORED / "README.md").read_text() == why.page(STORED)


def test_every_stored_result_says_where_it_comes_from():
    paths = list(STORED.rglob("*.json"))
    assert len(paths) > 5
    for path in paths:
        stored = json.loads(path.read_text())
        assert {"command", "date", "commit", "versions", "machine"} <= set(stored), path
        assert re.fullmatch("[0-9a-f]{40}", stored["commit"]), path


def test_the_tables_of_the_derivation_are_rows_of_the_page():
    page = (STORED / "README.md").read_text().splitlines()
    text = (ROOT / "docs" / "why-it-trains.md").read_text()
    rows = re.findall(r"^\| .* \|$", text, re.M)
    assert len(rows) > 10
    for row in rows:
        assert row in page, row
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) == 4
    assert all((ROOT / "docs" / picture).resolve().is_file() for picture in pictures)


def test_the_readme_quotes_stored_figures():
    text = " ".join((ROOT / "README.md").read_text().split())
    cells = json.loads((STORED / "runs" / "ntm" / "copy-paste.json").read_text())["cells"]
    exact = {cell["distance"]: f"{100 * cell['exact']:.1f} %" for cell in cells}
    assert f"{exact[120]} of strings at up to 120 bytes of filler, and {exact[960]} at 960" in text
    speed = {(row["name"], row["length"]): row["bytes_per_second"]
             for row in json.loads((STORED / "cost" / "cost.json").read_text())["rows"]}  # fmt: skip
    assert f"at 2,048 positions it trains at {speed['ntm', 2048]:,.0f} bytes" in text
    assert f"and the PMNet at {speed['pmnet', 2048]:,.0f}" in text
