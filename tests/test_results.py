"""What is stored is what is shown: pages made of results, the model in the box and its card."""

import json
import math
import re
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import AutoModelForCausalLM

import pmnet
from benchmarks import books_page, retrieval, table
from benchmarks.books import MODELS
from pmnet.eval.longcontext import beyond
from pmnet.model import remote
from pmnet.model.load import load_model
from tests.conftest import run_cli

ROOT = Path(__file__).parent.parent
BOX = ROOT / "models" / "copy-paste"
BOXES = sorted((ROOT / "models").iterdir())


def test_the_retrieval_page_is_that_of_its_files():
    assert (ROOT / "results" / "retrieval" / "README.md").read_text() == retrieval.page(ROOT / "results" / "retrieval")


def test_the_page_of_the_books_is_that_of_its_files():
    assert (books_page.ROOT / "README.md").read_text() == books_page.text(books_page.ROOT)


def test_every_stored_result_says_where_it_comes_from():
    paths = [path for name in ("retrieval", "books") for path in (ROOT / "results" / name).rglob("*.json")]
    assert len(paths) > 20
    for path in paths:
        stored = json.loads(path.read_text())
        assert {"command", "date", "commit", "versions", "machine"} <= set(stored), path
        assert re.fullmatch("[0-9a-f]{40}", stored["commit"]), path


def test_the_speeds_are_those_that_are_stored():
    told = (ROOT / "README.md").read_text()
    rows = table.summary(ROOT / "results" / "bench")
    assert len(rows) == 2 + len(table.SUMMARY)
    assert "\n".join(rows) in told
    assert "\n".join(rows) in (ROOT / "results" / "bench" / "README.md").read_text()


@pytest.mark.parametrize("box", BOXES, ids=lambda path: path.name)
def test_a_box_is_small_complete_and_carries_the_present_code(box):
    files = {path.name: path for path in box.iterdir()}
    assert sum(path.stat().st_size for path in files.values()) < 16 * 2**20
    assert {"README.md", "config.json", "model.safetensors", "tokenizer_config.json"} <= set(files)
    code = {f"{module.replace('.', '_')}.py": remote._code(module) for module in remote._needed()}
    assert code == {name: path.read_text() for name, path in files.items() if name.endswith(".py")}, (
        f"run `pmnet export models/{box.name}`"
    )


def recalled(model, text: bytes, filler: torch.Tensor) -> bytes:
    ids = torch.cat([torch.tensor([260, *text, 258]), filler, torch.tensor([259])]).unsqueeze(0)
    with torch.no_grad():
        written = model.generate(ids, max_new_tokens=len(text) + 1, do_sample=False, eos_token_id=258)
    return bytes(i for i in written[0, ids.shape[1] :].tolist() if i < 256)


@pytest.mark.parametrize("text", [b"phasor", b"\x00\xff\x80", b"to be or"], ids=repr)
def test_the_box_remembers(text):
    filler = torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(BOX).eval()
    assert recalled(model, text, filler) == text
    with pmnet.use_backend("torch"):
        assert recalled(model, text, filler) == text
    model.config.memory_cumsum = False
    assert recalled(model, text, filler) != text


def test_the_demo_command_shows_it():
    code, printed = run_cli(["demo", str(BOX), "--seconds", "0", "--least", "4000", "--string", "phasors"])
    assert code == 0
    assert re.search(r"memory on: 'phasors'\s+exact", printed)
    assert re.search(r"memory off: .*wrong", printed, re.S)


def test_the_card_and_the_readme_quote_the_stored_figures():
    cells = [
        cell
        for path in (ROOT / "results" / "retrieval" / "box").glob("*/copy-paste.json")
        for cell in json.loads(path.read_text())["cells"]
    ]
    size = load_model(BOX).num_parameters()
    for text in ((BOX / "README.md").read_text(), (ROOT / "README.md").read_text()):
        assert f"{size:,}" in text
        rows = re.findall(r"^\| (random|constant|text) \| (\d+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) % \|", text, re.M)
        assert len(rows) >= 4
        for variant, letters, distance, strings, exact in rows:
            wanted = (variant, int(letters), int(distance.replace(",", "")), int(strings.replace(",", "")))
            found = [c for c in cells if (c["variant"], c["size"], c["distance"], c["strings"]) == wanted]
            assert len(found) == 1, wanted
            assert f"{100 * found[0]['exact']:.2f}" == exact, wanted


def test_the_controls_of_the_readme_are_stored():
    text = (ROOT / "README.md").read_text()
    rows = re.findall(
        r"^\| `([\w-]+)` \| ([\d,]+) \| ([\d.]+) MB \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|", text, re.M
    )
    folders = {path.name: path for path in (ROOT / "results" / "retrieval" / "controls").iterdir()}
    assert {row[0] for row in rows} == set(folders)
    for name, size, seen, *exact in rows:
        stored = json.loads((folders[name] / "copy-paste.json").read_text())
        last = json.loads((folders[name] / "metrics.jsonl").read_text().splitlines()[-1])
        assert (f"{stored['parameters']:,}", f"{last['bytes'] / 1e6:.1f}") == (size, seen)
        cells = {cell["distance"]: f"{100 * cell['exact']:.1f}" for cell in stored["cells"]}
        assert [cells[30], cells[120], cells[960]] == exact


def test_the_other_tasks_of_the_readme_are_stored():
    row = r"^\| `([\w-]+)` \|[^|]*\| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|$"
    rows = re.findall(row, (ROOT / "README.md").read_text(), re.M)
    folders = {path.name: path for path in (ROOT / "results" / "retrieval" / "tasks").iterdir()}
    assert {name for name, *_ in rows} == set(folders)
    for name, steps, size, depth, *figures in rows:
        assert json.loads((folders[name] / "config.json").read_text())["recipe"]["steps"] == int(steps.replace(",", ""))
        cells = json.loads((folders[name] / f"{name}.json").read_text())["cells"]
        at = [c for c in cells if (c["size"], c["distance"]) == (int(size.replace(",", "")), float(depth))]
        stored = at[0]["exact"], at[0]["letters"], at[0]["control"]["letters"]
        assert [f"{100 * share:.1f}" for share in stored] == figures, (name, size)


def test_the_needles_in_a_novel_are_stored():
    cells = json.loads((ROOT / "results" / "retrieval" / "tasks" / "needle" / "novel.json").read_text())["cells"]
    assert {(c["size"], c["distance"]) for c in cells} == {(n, d) for n in (1024, 8192, 32768) for d in (0.1, 0.5)}
    assert all(c["exact"] == 1 and c["strings"] == 256 for c in cells)
    text = " ".join((ROOT / "README.md").read_text().split())
    assert "256 of 256 at 1,024, at 8,192 and at 32,768 bytes, at depths 0.1 and 0.5 alike" in text
    assert f"(95 % interval from {100 * cells[0]['low']:.1f} %)" in text
    stored = json.loads((ROOT / "results" / "retrieval" / "tasks" / "needle" / "novel-512k.json").read_text())
    (cell,) = stored["cells"]
    quoted = f"{cell['exact'] * cell['strings']:.0f} of {cell['strings']} at {cell['size']:,} bytes, "
    assert cell["distance"] == 0.1
    quoted += f"nine tenths of which lie between number and question (from {100 * cell['low']:.1f} %)"
    assert quoted in text


def test_the_controls_of_the_needles_are_stored():
    folder, text = (
        ROOT / "results" / "retrieval" / "needle-controls",
        " ".join((ROOT / "README.md").read_text().split()),
    )
    cells = {
        (name, file, cell["size"], cell["distance"]): cell
        for name, file in (("mamba2", "needle"), ("mamba2", "novel"), ("llama", "needle"))
        for cell in json.loads((folder / name / f"{file}.json").read_text())["cells"]
    }
    near = min(cells["mamba2", "needle", 1024, depth]["exact"] for depth in (0.1, 0.5, 0.9))
    assert f"a Mamba-2 finds {100 * near:.1f} % at 1,024 bytes (lowest of three depths)" in text
    found, lost = (cells["mamba2", "novel", size, 0.5] for size in (1024, 8192))
    assert found["exact"] == 1
    quoted = f"all of {found['strings']} at 1,024 bytes of the novel, and at 8,192 bytes "
    assert quoted + f"{lost['exact'] * lost['strings']:.0f} of {lost['strings']}" in text
    assert all(cells["llama", "needle", 128, depth]["exact"] == 1 for depth in (0.1, 0.5, 0.9))
    assert all(cells["llama", "needle", 1024, depth]["exact"] == 0 for depth in (0.1, 0.5, 0.9))


def test_the_million_bytes_of_the_readme_are_stored():
    (cell,) = json.loads((ROOT / "results" / "retrieval" / "demo" / "million" / "copy-paste.json").read_text())["cells"]
    hits, low = round(cell["exact"] * cell["strings"]), 100 * cell["low"]
    quoted = f"at {cell['distance']:,.0f} bytes of random filler: {hits} of {cell['strings']} strings exact"
    quoted += f" (95 % interval from {low:.1f} %"
    assert quoted in " ".join((ROOT / "README.md").read_text().split())


def test_the_phase_bits_of_the_readme_are_stored():
    root = ROOT / "results" / "retrieval"
    folders = [root / "demo" / "seed-0", *(root / "phase-bits").iterdir()]
    rows = re.findall(
        r"^\| (\d+) \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|$", (ROOT / "README.md").read_text(), re.M
    )
    assert len(rows) == len(folders)
    for folder in folders:
        stored = json.loads((folder / "copy-paste.json").read_text())
        cells = {cell["distance"]: f"{100 * cell['exact']:.1f}" for cell in stored["cells"]}
        assert (str(stored["model"]["phase_bits"]), cells[120], cells[960], cells[10_000]) in rows


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
    text = " ".join((ROOT / "README.md").read_text().split())
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
    text = " ".join((ROOT / "README.md").read_text().split())
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


def test_the_memories_of_the_readme_are_stored():
    row = r"^\| [\w ,]+ \| `([\w-]+)` \| ([\d.]+) \| ([\d.]*) \|$"
    found = re.findall(row, (ROOT / "README.md").read_text(), re.M)
    assert {name for name, *_ in found} == {path.name for path in (books_page.ROOT / "window-2").iterdir()}
    for name, carried, off in found:
        rows = rows_of("window-2", name)
        assert carried == f"{far(rows['carried']):.3f}"
        assert off == (f"{far(rows['recurrence off']):.3f}" if "recurrence off" in rows else "")
    text = " ".join((ROOT / "README.md").read_text().split())
    rows = {name: rows_of("window-2", name) for name, *_ in found}
    forgetting = [rows[name] for name in ("fading-memory", "gated-memory")]
    angles, plain = (far(rows["no-recurrence"]["carried"]) - far(row["carried"]) for row in forgetting)
    assert f"a memory of angles gives {angles:.3f} and one of plain numbers {plain:.3f}" in text
    angles, plain = (far(row["recurrence off"]) - far(row["carried"]) for row in forgetting)
    assert f"without it they are worse by {angles:.3f} and {plain:.3f}" in text
    wide = [far(rows_of("models", name)["carried"]) for name in ("gated-memory", "no-recurrence", "flat")]
    assert f"`gated-memory`: {wide[0]:.3f}, without a memory {wide[1]:.3f}" in text
    assert f"takes {wide[2]:.3f}; its model leans on it more" in text
    assert f"by {far(rows_of('models', 'flat')['recurrence off']) - wide[2]:.3f} on the same weights, and" in text
