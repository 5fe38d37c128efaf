"""What is stored is what is shown: pages made of results, the model in the box and its card."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import pmnet
from benchmarks import retrieval, table
from pmnet.model import export
from pmnet.model.load import load_model
from pmnet.report import provenance
from tests.conftest import run_cli

ROOT = Path(__file__).parent.parent
BOX = ROOT / "models" / "copy-paste"
BOXES = sorted((ROOT / "models").iterdir())


def told(*pages: str) -> str:
    """The words of some pages of documentation, single spaces between them."""
    return " ".join(" ".join((ROOT / page).read_text() for page in pages).split())


def test_the_retrieval_page_is_that_of_its_files():
    assert (ROOT / "results" / "retrieval" / "README.md").read_text() == retrieval.page(ROOT / "results" / "retrieval")


def test_every_stored_result_says_where_it_comes_from():
    changed = []
    for path in (ROOT / "results").rglob("*.json"):
        stored = json.loads(path.read_text())
        assert {"command", "date", "commit", "versions", "machine"} <= set(stored), path
        assert re.fullmatch(r"[0-9a-f]{40}(\+changes)?", stored["commit"]), path
        changed += [path] if "+" in stored["commit"] else []
    # trained before the last change was committed, as docs/LOG.md says, and measured on a machine that held an earlier
    # commit and a copy of the tree (results/bench-gpu/README.md); no others
    assert {path.parent.name for path in changed} == {"int8", "bench-gpu"}
    assert [path.name for path in changed if path.parent.name == "int8"] == ["training.json"]


def test_only_sources_make_a_commit_a_changed_one(tmp_path, monkeypatch):
    source, result = tmp_path / "src" / "provenance.py", tmp_path / "results" / "bench.json"
    for path in (source, result):
        path.parent.mkdir()
        path.write_text("1")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "--quiet"], ["add", "."], [*who, "commit", "--quiet", "--message", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "__file__", str(source))
    for path, changed in ((result, False), (source, True)):
        path.write_text("2")
        assert re.fullmatch("[0-9a-f]{40}" + changed * r"\+changes", provenance._commit())


def test_the_speeds_are_those_that_are_stored():
    page = (ROOT / "README.md").read_text()
    rows = table.summary(ROOT / "results" / "bench")
    assert {row.split("`")[1] for row in rows[2:]} == {case for case, *_ in table.SUMMARY}
    assert "\n".join(rows) in page
    assert "\n".join(rows) in (ROOT / "results" / "bench" / "README.md").read_text()


def test_the_speeds_on_a_gpu_are_those_that_are_stored():
    found = {path.stem: json.loads(path.read_text()) for path in (ROOT / "results" / "bench-gpu").glob("*.json")}

    def row(section, name):
        return next(row for row in found[section]["rows"] if row["contender"] == name)

    def rate(section, name):
        entry = row(section, name)
        return f"{entry.get('bytes_per_second') or entry['positions_per_second']['median']:,.0f}"

    page = told("README.md")
    trained = f"| {rate('train-compiled', 'ours')} compiled, {rate('train', 'ours')} not |"
    assert f"{trained} {rate('train', 'published')} | {rate('train', 'llama')} |" in page
    others = [rate("prefill", name) for name in ("published", "llama")]
    assert f"in chunks of 4 KiB | {rate('prefill', 'ours')} | {' | '.join(others)} |" in page
    for name in ("published", "llama"):
        entry = row("prefill", name)
        assert (entry["chunk"], round(entry["bytes"] / entry["bytes_per_second"])) == (4096, 6)
    for section, words, rest in (
        ("decode-1-float32", "decode, one stream, float32", ("published", "llama")),
        ("decode-64-bfloat16", "decode, 64 streams, bfloat16 weights", ("llama",)),
    ):
        ours = f"{rate(section, 'ours, CUDA graph')} as a CUDA graph, {rate(section, 'ours')} not"
        rates = " | ".join(rate(section, name) for name in rest)
        assert f"| {words} | {ours} | {'' if len(rest) > 1 else '| '}{rates} |" in page
    assert f"at {100 * row('train-compiled', 'ours')['fraction_of_limit']:.0f} % of the measured bfloat16" in page
    read = row("prefill", "ours")
    assert f"read in {read['seconds']:.1f} s with {read['peak_bytes'] / 1e9:.1f} GB" in page
    alone, whole = (
        100 * row("scan", name)["fraction_of_limit"]
        for name in ("ours, sorted already, CUDA graph", "ours, CUDA graph")
    )
    assert (
        f"run at {alone:.0f} % of a device copy, the whole write of a level, with its sorting, at {whole:.0f} %" in page
    )
    compiled = [
        rate(section, "ours, compiled CUDA graph")
        for section in ("decode-1-float32", "decode-1-bfloat16", "decode-64-bfloat16")
    ]
    made = "made {} bytes a second with float32 weights, {} with bfloat16 ones and {} for 64 streams"
    assert made.format(*compiled) in page
    noise = found["train-compiled"]["check"]["differences"]["autocast"]
    assert f"differs from the float32 one by {noise:.2f} times its norm" in page


def test_the_cost_of_computing_activations_again_is_that_stored():
    folder = ROOT / "results" / "bench" / "checkpointed"
    rows = table.summary(folder)
    assert "\n".join(rows) in (folder / "README.md").read_text()
    again = {row.split("`")[1]: row.split("|")[3:6] for row in rows[2:] if "computed again" in row}
    memory, train = (
        f"{a}, {b} and {c}" for a, b, c in ([x.strip(" x") for x in again[k]] for k in ("memory", "train"))
    )
    assert f"takes {memory} times less memory beyond the model than the published form's" in told("README.md")
    assert f"is {train} times as fast" in told("README.md")


@pytest.mark.parametrize("box", BOXES, ids=lambda path: path.name)
def test_a_box_is_small_complete_and_carries_the_present_code(box):
    files = {path.name: path for path in box.iterdir()}
    assert sum(path.stat().st_size for path in files.values()) < 16 * 2**20
    assert {"README.md", "config.json", "model.safetensors", "tokenizer_config.json"} <= set(files)
    code = {f"{module.replace('.', '_')}.py": export._code(module) for module in export._needed()}
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


def test_the_other_tasks_are_stored():
    row = r"^\| `([\w-]+)` \|[^|]*\| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|$"
    rows = re.findall(row, (ROOT / "docs" / "retrieval.md").read_text(), re.M)
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
    text = told("docs/retrieval.md")
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
        told("docs/retrieval.md"),
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
    assert quoted in told("README.md")


def test_the_strings_in_one_state_are_stored():
    root, text = ROOT / "results" / "retrieval" / "rounds", (ROOT / "docs" / "retrieval.md").read_text()
    places = {"first": 1, "second": 2, "third": 3, "fourth": 4, "sixth": 6, "eighth": 8}
    rows = re.findall(r"^\| (\w+) \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|$", text, re.M)
    found = {name: figures for name, *figures in rows if name in places}
    assert found.keys() == places.keys()
    exact = {}
    for name, place in places.items():
        stored = json.loads((root / "trained" / str(place) / "copy-paste.json").read_text())
        assert stored["rounds"] == place
        assert [cell["size"] for cell in stored["cells"]] == [1, 4, 8]
        exact[place] = [f"{100 * cell['exact']:.1f}" for cell in stored["cells"]]
        assert found[name] == exact[place]
    far = [json.loads((root / "trained" / f"{n}-far" / "copy-paste.json").read_text())["cells"] for n in (1, 2, 4)]
    first, second, fourth = (f"{100 * cell['exact']:.1f} %" for (cell,) in far)
    assert f"{first} of first, {second} of second and {fourth} of fourth ones are" in told("docs/retrieval.md")
    box = json.loads((root / "box" / "2" / "copy-paste.json").read_text())
    assert all(cell["exact"] == 0 and cell["strings"] == 512 for cell in box["cells"] if cell["size"] >= 8)
    quoted = "gives back {} % of second strings of 8, {} % of third ones and {} % of fourth ones"
    assert quoted.format(*(exact[n][2] for n in (2, 3, 4))) in told("README.md")


def test_the_phase_bits_are_stored():
    root = ROOT / "results" / "retrieval"
    folders = [root / "demo" / "seed-0", *(root / "phase-bits").iterdir()]
    rows = re.findall(
        r"^\| (\d+) \| ([\d.]+) % \| ([\d.]+) % \| ([\d.]+) % \|$", (ROOT / "docs" / "retrieval.md").read_text(), re.M
    )
    assert len(rows) == len(folders)
    for folder in folders:
        stored = json.loads((folder / "copy-paste.json").read_text())
        cells = {cell["distance"]: f"{100 * cell['exact']:.1f}" for cell in stored["cells"]}
        assert (str(stored["model"]["phase_bits"]), cells[120], cells[960], cells[10_000]) in rows
