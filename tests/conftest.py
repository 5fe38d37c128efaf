"""Small models that exercise every shape: several levels, grouped heads, reads without writes, a width that is no
multiple of a vector register."""

import os

import pytest
import torch

import pmnet

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):  # they share the cores, with the programs that they start
    share = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // int(workers))))
    torch.set_num_threads(int(share))

SHAPES = {
    "deep": {"num_hidden_layers": 3, "memory_write_period": 1, "sliding_window": 6},
    "period": {
        "num_hidden_layers": 4,
        "memory_write_period": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 9,
        "phase_bits": 7,
    },
    "odd": {
        "num_hidden_layers": 2,
        "memory_write_period": 1,
        "hidden_size": 22,
        "intermediate_size": 37,
        "head_dim": 6,
        "memory_size": 11,
        "num_memory": 3,
        "num_memory_read_heads": 3,
        "sliding_window": 1,
    },
    "wide": {
        "num_hidden_layers": 2,
        "memory_write_period": 1,
        "hidden_size": 320,
        "intermediate_size": 1100,
        "memory_size": 160,
        "sliding_window": 20,
    },
}


def small_config(shape: str = "deep", **changes) -> pmnet.PMNetConfig:
    values = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "memory_size": 16,
        "num_memory_read_heads": 2,
        "initializer_gain": 0.45,
        "anchor_initializer_range": 0.5,
        "rope_theta": 1e4,
    }
    return pmnet.PMNetConfig(**(values | SHAPES[shape] | changes))


def small_model(shape: str = "deep", seed: int = 0, **changes) -> pmnet.PMNetForCausalLM:
    torch.manual_seed(seed)
    model = pmnet.PMNetForCausalLM(small_config(shape, **changes)).eval()
    for parameter in model.parameters():  # biases and norms too, so that nothing is tested at a special value
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (batch, length), generator=torch.Generator().manual_seed(seed))


def read(model, ids, chunks, **arguments):
    """Stream `ids` in chunks; logits of all positions and the final cache."""
    cache = pmnet.PMNetCache(model.config, ids.shape[0])
    with torch.no_grad():
        logits = [model(part, past_key_values=cache, **arguments).logits for part in ids.split(chunks, dim=1)]
    return torch.cat(logits, dim=1), cache


def assert_same_state(a: pmnet.PMNetCache, b: pmnet.PMNetCache) -> None:
    for level, (x, y) in enumerate(zip(a.memory, b.memory, strict=True)):
        assert torch.equal(x, y), f"level {level}"
    for x, y in zip(a.window, b.window, strict=True):
        assert torch.equal(x.keys, y.keys)
        assert torch.equal(x.values, y.values)
    for name in ("seen", "in_document", "next_position"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def run_cli(arguments: list[str]) -> tuple[int, str]:
    """Run `pmnet ARGUMENTS` in this process: exit code and everything printed."""
    from typer.testing import CliRunner

    from pmnet.cli import app

    result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.fixture(params=list(SHAPES))
def shape(request) -> str:
    return request.param


@pytest.fixture
def steps(monkeypatch):
    """Counts native steps."""
    from pmnet.model import step
    from tests.stepping import Counted

    counted = Counted(step.library())
    monkeypatch.setattr(step, "library", lambda: counted)
    return counted


@pytest.fixture
def books(tmp_path):
    """A folder of six files of random bytes, from one byte to 700."""
    folder = tmp_path / "books"
    folder.mkdir()
    generator = torch.Generator().manual_seed(3)
    for name, size in (("a", 700), ("b", 64), ("c", 65), ("d", 333), ("e", 1), ("f", 500)):
        data = torch.randint(1, 256, (size,), generator=generator).tolist()
        (folder / f"{name}.txt").write_bytes(bytes(data))
    return folder
