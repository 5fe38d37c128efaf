"""The measuring instruments: contenders have equal size, turns are fair, results are stored.

Nothing here asserts how long anything takes.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import pmnet
from benchmarks import gpu, gpu_decode
from benchmarks.cases import CASES
from benchmarks.contenders import CONTENDERS, build
from benchmarks.harness import Entry, Plan, alternate, compare, spread
from benchmarks.limits import measure_limits
from benchmarks.memory import measure_memory, resident_bytes
from benchmarks.parts import read_entries
from benchmarks.stream import measure_stream
from benchmarks.table import summary
from benchmarks.turns import run_all
from pmnet.ops import use_backend
from pmnet.train.recipes import MODELS
from tests.conftest import random_ids, run_cli, small_config, small_model

CPU = torch.device("cpu")
PLAN = Plan(repeats=1, seconds=60.0)


@pytest.mark.parametrize("preset", MODELS)
def test_contenders_have_equal_size(preset):
    with torch.device("meta"):
        models = {name: make(MODELS[preset]()) for name, make in CONTENDERS.items()}
    for model in models.values():
        assert abs(model.parameters / models["ours"].parameters - 1) < 0.01


def test_contenders_decode_what_they_compute_in_parallel():
    ids = random_ids(2, 20)
    for model in build(small_config("deep", phase_bits=32), list(CONTENDERS)):
        model.module.eval()
        with torch.no_grad():
            whole, state = model.logits(ids), model.prefill(ids[:, :18])
            for _ in range(2 if model.name == "llama" else 1):  # a state that grows goes back to where it was
                steps = [model.step(ids[:, t : t + 1], state) for t in (18, 19)]
                assert (torch.cat(steps, 1) - whole[:, 18:]).abs().max() < 1e-4
                model.rewind(state, 2)


# Turns and figures


class Clock:
    """Time that passes only in runs."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def entry(self, name, seconds_of):
        def prepare(length):
            def run():
                self.calls.append((name, length))
                self.now += seconds_of(length)

            return run

        return Entry(name, prepare, lambda length: 10.0 * length)


def test_contenders_take_turns():
    clock = Clock()
    plan = Plan(repeats=4, seconds=1e9, clock=clock)
    entries = [clock.entry("ours", lambda length: length / 10), clock.entry("other", lambda length: length / 5)]
    rows, left_out = compare(entries, 2, 40, 40, plan, 1000.0)
    assert clock.calls == [("ours", 40)] * 2 + [("other", 40)] * 2 + [("ours", 40), ("other", 40)] * 4
    assert left_out == []
    ours, other = rows
    assert ours["seconds"] == pytest.approx([4.0] * 4)
    assert ours["positions_per_second"]["median"] == pytest.approx(20)
    assert other["times_ours"] == pytest.approx({"median": 2.0, "min": 2.0, "max": 2.0})
    assert ours["fraction_of_limit"] == pytest.approx(400 / 4 / 1000)


def test_ratios_are_taken_round_by_round():
    clock = Clock()
    speeds = iter([1, 1, 1, 1, 1, 1, 4, 16, 3, 9])  # two runs of each to warm up, then three rounds
    entries = [clock.entry(name, lambda length: next(speeds)) for name in ("ours", "other")]
    rows, _ = compare(entries, 1, 8, 8, Plan(3, 1e9, clock=clock), 1.0)
    assert rows[0]["seconds"] == [1, 4, 3]
    assert rows[1]["times_ours"] == {"median": 3.0, "min": 1.0, "max": 4.0}


def test_the_summary_compares_round_by_round(tmp_path):
    ours = {"contender": "ours", "length": 8, "seconds": [1.0, 4.0, 3.0]}
    quick = {"contender": "ours-int8", "length": 8, "seconds": [0.5, 1.0, 1.5]}
    published = {"contender": "published", "length": 4, "seconds": [0.5, 8.0, 4.5]}
    for case, rows in (("decode", [ours, published]), ("decode-int8", [ours, quick, published]), ("scan", [ours])):
        (tmp_path / f"{case}-30m.json").write_text(json.dumps({"rows": rows}))
    again = {"contender": "ours-checkpointed"}
    memory = [{**row, "difference_bytes": size} for row, size in ((ours, 100), (published, 250), (again, 50))]
    (tmp_path / "memory-30m.json").write_text(json.dumps({"rows": memory}))
    assert [line.split("|")[1::2] for line in summary(tmp_path)[2:]] == [
        [" `decode` ", " 3.0x "], [" `decode-int8` ", " 6.0x "], [" `memory` ", " 2.5x "],
        [" `memory` ", " 5.0x "],
    ]  # fmt: skip


def test_slow_contenders_are_shortened_or_left_out():
    clock = Clock()
    entries = [
        clock.entry("ours", lambda length: length / 1000),
        clock.entry("slow", lambda length: length**2 / 1000),
        clock.entry("hopeless", lambda length: 1000.0),
    ]
    rows, left_out = compare(entries, 1, 64, 8, Plan(3, 12.0, clock=clock), 1.0)
    assert [(row["contender"], row["length"], row["shortened"]) for row in rows] == [
        ("ours", 64, False), ("slow", 16, True),
    ]  # fmt: skip
    assert rows[1]["times_ours"]["median"] == pytest.approx(16)
    assert left_out[0]["contender"] == "hopeless"
    assert "more than its share of 1 s" in left_out[0]["reason"]


def test_the_reference_is_measured_however_slow():
    clock = Clock()
    entries = [clock.entry("ours", lambda length: 100.0 * length), clock.entry("other", lambda length: 0.01)]
    rows, left_out = compare(entries, 1, 64, 8, Plan(3, 12.0, clock=clock), 1.0)
    assert [(row["contender"], row["length"]) for row in rows] == [("ours", 8), ("other", 64)]
    assert left_out == []


def test_rounds_end_with_the_budget_but_not_before_the_third():
    clock = Clock()
    runs = {"a": clock.entry("a", lambda length: 1.0).prepare(1)}
    assert len(alternate(runs, Plan(9, 5.5, clock=clock), 0.0)["a"]) == 6
    assert len(alternate(runs, Plan(9, 0.0, clock=clock), 0.0)["a"]) == 3
    assert spread([3.0, 1.0, 7.0]) == {"median": 3.0, "min": 1.0, "max": 7.0}


def test_limits_are_positive():
    limits = measure_limits(CPU, size=32, count=4096, repeats=2)
    assert set(limits) == {"matmul_gflops", "read_gbs", "copy_gbs"}
    assert all(limit["best"] == max(limit["samples"]) > 0 for limit in limits.values())


# Cases


def test_stream_stays_and_is_exact():
    result = measure_stream(small_model("deep"), 4096)
    assert [row["bytes"] for row in result["rows"]] == [1024, 2048, 3072, 4096]
    assert result["finer_chunk"] == 512
    assert result["verdict"]["memory_equal"]
    assert result["verdict"]["state_equal"]
    assert result["rows"][-1]["resident_bytes"] > 0


def test_memory_is_measured_in_a_fresh_process():
    result = measure_memory(["ours"], "demo", 1, 16, 60.0)
    (row,) = result["rows"]
    assert row["difference_bytes"] == row["peak_bytes"] - row["resident_bytes"] > 0
    assert row["length"] == 16
    assert result["left_out"] == []
    late = measure_memory(["ours"], "demo", 1, 16, 0.01)
    assert late["left_out"] == [{"contender": "ours", "reason": "not done after 0.01 s"}]
    assert resident_bytes(peak=True) >= resident_bytes() > 0


def test_cases_are_listed():
    code, printed = run_cli(["bench", "--list"])
    assert code == 0
    assert [line.split()[0] for line in printed.splitlines()] == list(CASES)


def test_a_case_is_stored_and_tabulated(tmp_path):
    save = ["--save", str(tmp_path)]
    code, printed = run_cli(["bench", "decode", "--repeats", "1", "--seconds", "2", "--table", *save])
    assert code == 0, printed
    stored = json.loads((tmp_path / "decode-demo.json").read_text())
    assert stored["versions"]["torch"] == torch.__version__
    assert stored["rows"] or stored["left_out"]
    for row in stored["rows"]:
        assert len(row["seconds"]) == 1
        assert row["needs"] > 0
    table = (tmp_path / "README.md").read_text()
    assert "## decode, demo" in table
    for row in stored["rows"]:
        assert f"| {row['contender']} | {row['parameters']:,} |" in table


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["scan", "--preset", "huge"], "unknown preset 'huge'"),
        (["speed"], "unknown case 'speed'"),
        (["--table"], "no results"),
    ],
)
def test_bad_requests_are_named(arguments, words, tmp_path):
    code, printed = run_cli(["bench", *arguments, "--save", str(tmp_path)])
    assert code == 1
    assert printed.startswith("pmnet: ")
    assert words in printed


def test_bench_needs_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(pmnet, "__file__", str(tmp_path / "site-packages" / "pmnet" / "__init__.py"))
    code, printed = run_cli(["bench", "--list"])
    assert code == 1
    assert printed.startswith("pmnet: this runs from a source checkout")


def test_both_forms_of_the_read_agree():
    config = small_config("period")
    entries = read_entries(config, 2, CPU)
    results = [torch.manual_seed(1) and entry.prepare(16)() for entry in entries]
    assert (results[0] - results[1]).abs().max() < 1e-5
    with FlopCounterMode(display=False) as counter, use_backend("torch"):
        entries[0].prepare(16)()
    scores = 2 * config.num_memory * config.num_memory_read_heads * config.memory_size  # no matrix product
    assert counter.get_total_flops() == entries[0].needs(16) - 2 * 16 * scores


# The GPU script, on the CPU


def test_gpu_sections_run_anywhere(tmp_path):
    config = small_config("period", phase_bits=32)
    rows = gpu.training(config, CPU, 2, 16, False, PLAN, 1e9)["rows"]
    rows += gpu_decode.decoding(config, CPU, 2, torch.float32, PLAN, 1e9)["rows"]
    rows += gpu.scan(config, CPU, 2, 32, PLAN, 1e9)["rows"]
    assert [row["contender"] for row in rows] == [*gpu.NAMES, *gpu.NAMES, "ours", "published"]
    read = gpu.prefill(config, CPU, 96, dict.fromkeys(gpu.NAMES, 32), 60.0)["rows"]
    assert all(row["complete"] and row["bytes"] == 96 for row in read)
    stopped = gpu.prefill(config, CPU, 96, {"ours": 32}, 0.0)["rows"]
    assert stopped[0]["bytes"] == 32


def test_a_step_that_keeps_its_tensors_in_place_is_a_step():
    model, ids = small_model("period"), random_ids(2, 24)
    with torch.no_grad():
        whole = model(ids).logits
        cache = model(ids[:, :20], use_cache=True).past_key_values
        places = [tensor.data_ptr() for tensor in cache.memory]
        steps = [gpu_decode.advance(model, cache, ids[:, t : t + 1]) for t in range(20, 24)]
    assert (torch.cat(steps, 1) - whole[:, 20:]).abs().max() < 1e-5
    assert places == [tensor.data_ptr() for tensor in cache.memory]


def test_gradients_of_a_compiled_model_are_compared(monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # takes a minute
    config = small_config("period", phase_bits=32)
    found = gpu.compare_gradients(build(config, ["ours"])[0], random_ids(2, 16))
    assert found["differences"]["float32"] == 0
    assert 0 < found["differences"]["autocast"] < 0.5
    assert abs(found["losses"]["compiled"] - found["losses"]["float32"]) < 0.1


def test_sections_measure_in_turns(tmp_path):
    """Two measurements and one that fails before it is ready: they do not overlap, and nobody waits for the third."""
    script = (
        "import sys, time; from pathlib import Path; from benchmarks.turns import turn\n"
        "folder, name = Path(sys.argv[1]), sys.argv[2]\n"
        "with turn(folder, name, ['a', 'b', 'c']): start = time.time(); time.sleep(0.3); end = time.time()\n"
        "(folder / f'{name}.span').write_text(f'{start} {end}')"
    )
    commands = {name: ["-c", script, str(tmp_path), name] for name in "ab"} | {"c": ["-c", "raise SystemExit(3)"]}
    assert run_all(commands, tmp_path) == {"a": 0, "b": 0, "c": 3}
    first, second = sorted([float(x) for x in (tmp_path / f"{name}.span").read_text().split()] for name in "ab")
    assert first[1] <= second[0]


def test_gpu_script_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU"):
        gpu.main([])
    assert importlib.util.find_spec("benchmarks.gpu").origin == str(Path(gpu.__file__))
