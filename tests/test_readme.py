"""The README keeps its word: its Python runs, its commands exist, its figures are in stored results."""

import json
import re
import shutil
from pathlib import Path

import torch

import pmnet
from pmnet.train.recipes import RECIPES, lm_30m, lm_tiny
from tests.conftest import run_cli

ROOT = Path(__file__).parent.parent
DEMO = 190_464
README = (ROOT / "README.md").read_text()


def test_the_python_examples_run(tmp_path, monkeypatch, capsys):
    code = "\n".join(re.findall(r"```python\n(.*?)```", README, re.S))
    shutil.copytree(ROOT / "models", tmp_path / "models")
    shutil.copy(ROOT / "README.md", tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "state.safetensors").exists()
    printed = capsys.readouterr().out
    assert "PMNetCache(batch_size=1" in printed
    assert "<pad>" not in printed
    assert "train_runtime" in printed


def test_every_command_exists():
    commands = re.findall(r"^\.venv/bin/pmnet ((?:train|eval \w+|generate))", README, re.M)
    assert {"train", "eval bits", "eval retrieval", "generate"} <= set(commands)
    for command in commands:
        assert run_cli([*command.split(), "--help"])[0] == 0
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make (\w+)", README, re.M):
        assert f"\n{target}:" in makefile


def test_sizes_are_those_of_the_recipes():
    tasks = RECIPES["copy-paste"]
    sizes = ((tasks["demo"], DEMO), (tasks["paper"], 14_791_168), (lm_tiny, 1_127_040), (lm_30m, 29_983_744))
    for recipe, size in sizes:
        with torch.device("meta"):
            model = pmnet.PMNetForCausalLM(recipe().model)
        assert sum(p.numel() for p in model.parameters()) == size
    assert tasks["paper"]().model.receptive_field == tasks["paper"]().gap == 1525
    for figure in (f"{DEMO:,}", "14.8 M", "1.13 million", "29,983,744"):
        assert figure in README


def test_the_table_of_the_demo_is_stored():
    paths = sorted(ROOT.glob("results/retrieval/demo/seed-*/copy-paste.json"))
    stored = [json.loads(path.read_text())["cells"] for path in paths]
    assert len(stored) >= 3
    row = r"^\| ([\d,]+) \| [\d.]+ \| ([\d.]+) % \(([\d.]+)-([\d.]+)\) \| (?:([\d.]+) %)? ?\|"
    rows = re.findall(row, README, re.M)
    assert len(rows) == len(stored[0])
    for column, (gap, *figures) in enumerate(rows):
        cells = [cells[column] for cells in stored]
        exact = sorted(cell["exact"] for cell in cells)
        control = sorted(cell["control"]["letters"] for cell in cells if cell["control"])
        assert {cell["distance"] for cell in cells} == {int(gap.replace(",", ""))}
        expected = [exact[len(exact) // 2], exact[0], exact[-1], *control[len(control) // 2 :][:1]]
        assert [f"{100 * x:.1f}" for x in expected] == [figure for figure in figures if figure]


def test_the_demo_with_the_optimizer_of_today_is_stored():
    paths = sorted(ROOT.glob("results/retrieval/demo-float32/seed-*/copy-paste.json"))
    stored = [json.loads(path.read_text())["cells"] for path in paths]
    assert len(stored) == 3
    for column, distance in ((-2, "960"), (-1, "10,000")):
        low, middle, high = (f"{100 * x:.1f}" for x in sorted(cells[column]["exact"] for cells in stored))
        assert {f"{cells[column]['distance']:,.0f}" for cells in stored} == {distance}
        assert f"{middle} % ({low}-{high}) at {distance}" in " ".join(README.split())


def test_the_cost_of_int8_is_stored():
    for name in ("float32", "int8"):
        stored = json.loads((ROOT / "results" / "int8" / f"{name}.json").read_text())
        assert f"{stored['bits_per_byte']:.4f}" in README
        assert stored["int8"] == (name == "int8")
