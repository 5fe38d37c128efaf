"""Bits per byte by position: every byte counted once, state handled as the row says, one sentence for bad input."""

import json
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig

from pmnet.baselines import control
from pmnet.cli_longcontext import bytes_of
from pmnet.data.files import open_files
from pmnet.eval.bits import bits_per_byte
from pmnet.eval.longcontext import Mode, beyond, bits_by_position, edges, memory_facts, modes_of, slope
from pmnet.eval.traces import spread_of_writes
from pmnet.memory import MemoryWrite
from pmnet.model import ByteTokenizer
from pmnet.model.tokenizer import BOS
from tests.conftest import run_cli, small_config, small_model

LENGTH = 3000


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    for name, size in (("one", LENGTH), ("two", LENGTH + 700), ("short", 900)):
        (folder / f"{name}.txt").write_bytes(bytes(torch.randint(0, 256, (size,), generator=generator).tolist()))
    return open_files([folder])


def llama() -> torch.nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=384, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, bos_token_id=BOS)  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval()


def by_hand(model, text: bytes, period: int) -> torch.Tensor:
    """Bits of every byte, each period read at once by itself."""
    ids, bits = torch.tensor([[BOS, *text]]), []
    for start in range(0, len(text), period):
        stop = min(len(text), start + period)
        with torch.no_grad():
            logits = model(ids[:, start:stop], use_cache=False).logits[0]
        bits.append(F.cross_entropy(logits.double(), ids[0, start + 1 : stop + 1], reduction="none") / math.log(2))
    return torch.cat(bits)


@pytest.mark.parametrize("reset", [None, 700, 1024])
@pytest.mark.parametrize("name", ["pmnet", "llama"])
def test_bits_are_those_of_each_byte(name, reset, books):
    model = small_model("period") if name == "pmnet" else llama()
    row = bits_by_position(model, books, LENGTH, Mode("row", reset))
    assert row["books"] == ["one", "two"]
    assert row["edges"] == [64, 128, 256, 512, 1024, 2048, LENGTH]
    for book, bits in zip(("one", "two"), row["bits"], strict=True):
        path = next(path for path in books.paths if path.stem == book)
        wanted = by_hand(model, path.read_bytes()[:LENGTH], reset or LENGTH)
        for low, high, found in zip([0, *row["edges"]], row["edges"], bits, strict=False):
            assert found == pytest.approx(wanted[low:high].mean().item(), abs=1e-4)
    widths = [64, 64, 128, 256, 512, 1024, LENGTH - 2048]
    mean = sum(bits * width for book in row["bits"] for bits, width in zip(book, widths, strict=True)) / (2 * LENGTH)
    assert row["total"] == pytest.approx(mean)
    assert (row["state_bytes"] is None) == (name == "llama")


def test_the_total_is_that_of_the_other_command(books):
    model = small_model("deep")
    row = bits_by_position(model, books, 900, Mode("carried"))
    wanted, count = bits_per_byte(model, books, 900)
    assert count == 2700
    assert row["total"] == pytest.approx(wanted, abs=1e-6)


def test_modes_follow_the_model():
    assert [mode.name for mode in modes_of(small_model(), [30])] == ["carried", "reset every 30", "recurrence off"]
    assert [mode.name for mode in modes_of(small_model(memory_cumsum=False), [])] == ["carried"]
    assert [mode.name for mode in modes_of(llama(), [64])] == ["reset every 64"]
    with pytest.raises(ValueError, match="llama has no state of constant size to carry: say --reset"):
        modes_of(llama(), [])


def test_recurrence_off_is_a_row_of_its_own_and_leaves_the_model_alone(books):
    model = small_model("deep")
    on, off = (bits_by_position(model, books, LENGTH, Mode("row", None, flag)) for flag in (True, False))
    assert on["bits"] != off["bits"]
    assert model.config.memory_cumsum


def test_anchors_are_taken_away_and_given_back(books):
    model = small_model("deep")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = modes_of(model, [], ablations=True)
    assert [mode.without for mode in modes] == [(), (), (0,), (2,), (0, 1, 2)]
    found = [bits_by_position(model, books, 900, mode)["total"] for mode in modes]
    assert len(set(found)) == len(found)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_memory_facts_tell_empty_one_sided_and_saturated():
    generator = torch.Generator().manual_seed(0)
    empty = torch.zeros(2, 1, 4, 1000, dtype=torch.int32)
    aligned = empty.clone()
    aligned[:, :, 0] = 2**29
    spread = torch.randint(-(2**31), 2**31, empty.shape, generator=generator).int()
    facts = memory_facts([empty, aligned, spread])
    assert [level["slots"] for level in facts] == [0.0, 0.25, 1.0]
    assert [level["groups"] for level in facts] == [0.0, 1.0, 1.0]
    assert facts[0]["resultant"] == 1.0
    assert facts[1]["resultant"] == pytest.approx(1.0)
    assert facts[2]["resultant"] < 0.05


def write(weights, theta, groups):
    return {"weights": torch.tensor([weights]), "theta": torch.tensor([theta]), "group": torch.tensor([groups])}


def test_writes_that_choose_differ_from_writes_that_do_not():
    clock = spread_of_writes(write([[0.25] * 4] * 2, [[3.0, -3.0]] * 2, [0, 0]))
    assert clock == pytest.approx({"theta": 3.0, "constant": 1.0, "slots_written": 4.0, "groups_visited": 1.0})
    letters = spread_of_writes(write([[1.0, 0.0], [0.0, 1.0]], [[0.5, -1.0], [-0.5, 1.0]], [0, 3]))
    assert letters == pytest.approx({"theta": 0.75, "constant": 0.0, "slots_written": 1.0, "groups_visited": 2.0})
    assert spread_of_writes(write([[1.0]], [[0.0]], [0]))["constant"] == 0.0


def test_a_row_tells_how_the_last_chunk_was_written(books):
    model = small_model("deep")
    row = bits_by_position(model, books, LENGTH, Mode("carried"))
    assert len(row["memory"]) == model.config.num_levels
    assert row["memory"][0]["groups_visited"] == pytest.approx(1.0)
    for level in row["memory"]:
        assert 0 < level["theta"] < math.pi
        assert 0 <= level["constant"] <= 1
        assert 1 <= level["slots_written"] <= model.config.num_memory
    assert not any(module._forward_hooks for module in model.modules())
    root = next(module for module in model.modules() if isinstance(module, MemoryWrite))
    for parameter in root.proj_out.parameters():
        torch.nn.init.zeros_(parameter)
    assert bits_by_position(model, books, LENGTH, Mode("carried"))["memory"][0]["theta"] == 0.0


def test_beyond_weighs_bins_by_their_bytes():
    row = {"edges": [64, 128, 300], "bits": [[1.0, 2.0, 4.0], [0.0, 0.0, 8.0]]}
    assert beyond(row, 64) == pytest.approx([(64 * 2 + 172 * 4) / 236, 172 * 8 / 236])
    assert beyond(row, 128) == [4.0, 8.0]
    assert beyond(row, 129) == []
    assert slope({"edges": [64, 128, 256, 512], "bits": [[9.0, 3.0, 2.5, 2.0]]}, 64) == pytest.approx(-0.5)
    assert slope(row, 128) is None
    assert edges(64) == [64]
    assert edges(5) == [5]
    assert edges(129) == [64, 128, 129]


@pytest.mark.parametrize(("text", "size"), [("100", 100), ("4KiB", 4096), ("2 MiB", 2**21)])
def test_sizes_are_read(text, size):
    assert bytes_of("--length", text) == size


@pytest.mark.parametrize("text", ["", "0", "-5", "4kb", "many"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match=f"--reset is a number of bytes, .* not {text!r}"):
        bytes_of("--reset", text)


def test_the_command_stores_rows_and_a_picture(books, tmp_path):
    model = small_model("deep")
    model.save_pretrained(tmp_path / "model")
    ByteTokenizer().save_pretrained(tmp_path / "model")
    folder = str(books.paths[0].parent)
    arguments = ["eval", "longcontext", str(tmp_path / "model"), "--data", folder]
    code, printed = run_cli(
        [*arguments, "--length", "2KiB", "--reset", "512", "--reset", "512", "--save", str(tmp_path / "out")]
    )
    assert code == 0, printed
    stored = json.loads((tmp_path / "out" / "longcontext.json").read_text())
    assert [row["mode"] for row in stored["rows"]] == ["carried", "reset every 512", "recurrence off"]
    assert stored["length"] == 2048
    assert {"command", "commit", "versions", "machine"} <= set(stored)
    assert (tmp_path / "out" / "longcontext.png").stat().st_size > 1000
    code, printed = run_cli([*arguments, "--length", "1MiB"])
    assert code == 1
    assert "no file has 1,048,576 bytes" in printed


def test_any_control_goes_through_the_command(books, tmp_path):
    folder = str(books.paths[0].parent)
    for name, options in (("mamba2", []), ("llama", ["--reset", "256"])):
        like = small_config("period", hidden_size=64, head_dim=16, intermediate_size=96)
        AutoModelForCausalLM.from_config(control(name, like)).save_pretrained(tmp_path / name)
        arguments = ["eval", "longcontext", str(tmp_path / name), "--data", folder, "--length", "1000", *options]
        code, printed = run_cli(arguments)
        assert code == 0, printed
