"""The measuring instruments: the yardstick computes the model, counts are right, turns are fair, results are stored.

Nothing here asserts how long anything takes.
"""

import copy
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import pmnet
from benchmarks import gpu
from benchmarks.cases import CASES
from benchmarks.contenders import CONTENDERS, build
from benchmarks.harness import Entry, Plan, alternate, compare, spread
from benchmarks.limits import measure_limits
from benchmarks.memory import measure_memory, resident_bytes
from benchmarks.parts import read_entries
from benchmarks.published import Published, State
from benchmarks.stream import measure_stream
from pmnet.ops import use_backend
from pmnet.report import flops
from pmnet.train.recipes import MODELS
from tests.conftest import random_ids, run_cli, small_config, small_model

CPU = torch.device("cpu")
PLAN = Plan(repeats=1, seconds=60.0)


def published_of(model):
    published = Published(model.config)
    published.load_state_dict(model.state_dict())
    return published.train(model.training)


# The yardstick


def test_published_is_no_further_from_float64_than_rounding(shape):
    model, ids = small_model(shape, phase_bits=32), random_ids(2, 60)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(ids).logits
        ours, published = model(ids).logits, published_of(model)(ids)
    for logits in (ours, published):
        assert (logits - truth).abs().max() < 1e-5 * truth.abs().max()  # float32 sums of a few hundred terms


def test_published_gradients_are_ours():
    model, ids = small_model("period", phase_bits=32).train(), random_ids(2, 40)
    published = published_of(model)
    for logits in (model(ids).logits, published(ids)):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = dict(published.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - theirs[name].grad).norm() < 1e-3 * parameter.grad.norm(), name


def test_published_decodes_what_it_computes_in_parallel(shape):
    published, ids, state = published_of(small_model(shape, phase_bits=32)), random_ids(2, 40), State()
    with torch.no_grad():
        whole = published(ids)
        parts = [published(part, state) for part in ids.split([17, 1, 1, 20, 1], dim=1)]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-3
    assert state.position == 40


# Counts


def counted_flops(model, ids):
    """FLOP of every module of one call, by `torch.utils.flop_counter`, which sees only products of torch."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), use_backend("torch"):
        model(ids)
    counts = {name.split(".", 1)[-1]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    return lambda name: counts.get(name, 0)


@pytest.mark.parametrize("form", ["ours", "published"])
def test_products_are_those_that_run(form):
    model, ids = small_model("period"), random_ids(2, 24)
    config = model.config
    count = counted_flops(model if form == "ours" else published_of(model), ids)
    expected = {part.name: ids.numel() * getattr(part, form).flops for part in flops.parts(config)}
    scores = 2 * ids.numel() * config.num_memory * config.memory_size  # differences and sums, no matrix product
    mixing = scores * config.num_memory_read_heads if form == "published" else 0  # elementwise there
    layer = "model.layers.2."
    attention = sum(count(f"{layer}self_attn.{name}_proj") for name in "qkvo")
    assert attention == expected["attention projections"]
    assert count(f"{layer}mlp") == expected["MLP"]
    assert count(f"{layer}memory_write_module") == expected["write"] - scores
    read = sum(expected[f"read: {name}"] for name in ("queries", "keys", "values", "output"))
    assert count(f"{layer}memory_read_module") == read - mixing
    assert count("lm_head") == expected["embedding and head"]


def test_attention_pays_for_its_keys():
    config = small_config("period")

    def of(length):
        part = next(part for part in flops.parts(config, length) if part.name == "window attention")
        return part.ours.flops, part.published.flops

    per_key = 4 * config.num_attention_heads * config.head_dim
    assert of(None) == (9 * per_key, 9 * per_key)
    assert of(100) == (9 * per_key, 100 * per_key)
    assert of(5) == (5 * per_key, 5 * per_key)


@pytest.mark.parametrize("preset", MODELS)
def test_weights_are_all_accounted_for(preset):
    config = MODELS[preset]()
    with torch.device("meta"):
        model = pmnet.PMNetForCausalLM(config)
    found = {}
    for name, parameter in model.named_parameters():
        found[part_of(name, parameter)] = found.get(part_of(name, parameter), 0) + parameter.numel()
    values = found["read: keys"] // 2  # one matrix holds keys and values
    found |= {"read: keys": values, "read: values": values}
    counted = {part.name: part.layers * part.parameters for part in flops.parts(config) if part.parameters}
    assert counted == found
    assert flops.facts(config)["weight_bytes"] == 4 * sum(counted.values()) == 4 * model.num_parameters()


def part_of(name, parameter):
    inside = {
        "self_attn": "attention projections", "input_layernorm": "attention projections", "mlp": "MLP",
        "post_attention_layernorm": "MLP", "memory_write_module": "write", "memory_embeddings": "anchors",
        "embed_tokens": "embedding and head", "model.norm": "embedding and head", "read_module.proj_kv": "read: keys",
        "read_module.proj_out": "read: output", "memory_read_module": "read: queries",
    }  # fmt: skip
    return next(part for key, part in inside.items() if key in name)


def test_decoding_reads_what_a_step_visits():
    config = small_config("deep")
    whole, one, two = 4 * flops.parameters(config), flops.decode_bytes(config), flops.decode_bytes(config, 2)
    group = 4 * config.num_memory * config.memory_size
    assert one["weights"] + group * config.num_groups == whole
    assert one["visited anchors"] == one["visited phases"] == config.num_levels * group
    assert two["visited anchors"] == (2 * config.num_levels - 1) * group  # the root has one group only
    assert two["keys and values"] == 2 * one["keys and values"]
    cache = pmnet.PMNetCache(config)
    state = flops.state_bytes(config)
    assert state["phases"] == sum(level.nbytes for level in cache.memory)
    assert state["total"] <= cache.nbytes


def test_flops_command(tmp_path):
    file = tmp_path / "counts.json"
    code, printed = run_cli(["flops", "--preset", "119m", "--length", "1024", "--json", str(file)])
    assert code == 0
    assert "read: values" in printed
    stored = json.loads(file.read_text())
    assert stored["weight_bytes"] == 4 * 118_970_368
    assert stored["training_flops"]["ours"] == 3 * stored["forward_flops"]["ours"]
    small_model("deep").save_pretrained(tmp_path / "model")
    assert run_cli(["flops", str(tmp_path / "model")])[0] == 0
    for arguments in (["flops"], ["flops", "--preset", "huge"], ["flops", str(tmp_path)]):
        code, printed = run_cli(arguments)
        assert code == 1
        assert printed.startswith("pmnet: ")


# Contenders


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
    rows += gpu.decoding(config, CPU, 2, PLAN, 1e9)["rows"]
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
        steps = [gpu.advance(model, cache, ids[:, t : t + 1]) for t in range(20, 24)]
    assert (torch.cat(steps, 1) - whole[:, 20:]).abs().max() < 1e-5
    assert places == [tensor.data_ptr() for tensor in cache.memory]


def test_gpu_script_needs_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="needs a GPU"):
        gpu.main(tmp_path / "gpu.json")
    assert not list(tmp_path.iterdir())
    assert importlib.util.find_spec("benchmarks.gpu").origin == str(Path(gpu.__file__))
