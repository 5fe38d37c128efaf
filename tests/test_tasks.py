"""Tasks: episodes say what they claim, in any chunks, for any seed; what cannot be drawn is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from pmnet.data.tasks import (
    CopyPaste,
    Episodes,
    Filler,
    Lookup,
    Needle,
    Recall,
    SelectiveCopy,
    Span,
    text_of,
    training_batch,
)
from pmnet.data.tasks.filler import BLOCK, manual
from pmnet.model.tokenizer import COPY, EOS, PASTE

PROBLEMS = [
    CopyPaste((1, 4), (0, 9)),
    CopyPaste((3, 3), (40, 40), (Filler("constant"), Filler("text"))),
    SelectiveCopy(4, 64),
    Recall(64, 4),
    Recall(128, 8, width=2),
    Lookup((6, 20)),
    Lookup((6, 20), key="prefix"),
    Needle(400, 0.5),
    Needle(900, kind="variables"),
    Needle(900, kind="keys"),
    Needle(900, 0.1, "pair"),
]


def drawn(problem, rows=5, seed=0) -> Episodes:
    return problem.draw(rows, torch.Generator().manual_seed(seed))


def strings(ids, scored):
    return [row[mask].tolist() for row, mask in zip(ids, scored, strict=True)]


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_episodes_are_the_same_in_any_chunks_and_differ_by_seed(problem):
    ids, scored = drawn(problem).dense()
    assert ids.dtype == torch.int64
    assert ids.shape == scored.shape == (5, drawn(problem).length)
    assert ids.min() >= 0
    assert ids.max() < 384
    counts = scored.sum(1)
    assert (counts == counts[0]).all()
    assert counts[0] > 0
    assert not scored[:, 0].any()
    for size in (1, 7, 64):
        parts = list(drawn(problem).chunks(size))
        assert max(part.shape[1] for part, _ in parts) <= size
        assert torch.equal(torch.cat([part for part, _ in parts], 1), ids)
        assert torch.equal(torch.cat([part for _, part in parts], 1), scored)
    others = [drawn(problem, seed=seed).dense()[0] for seed in (1, 2, 3)]
    assert not all(other.shape == ids.shape and torch.equal(other, ids) for other in others)


@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_training_labels_are_the_answers_one_step_early(problem):
    ids, scored = drawn(problem).dense()
    batch = training_batch(drawn(problem))
    labels = torch.full_like(ids[:, :-1], -100)
    labels[:, labels.shape[1] - batch["labels"].shape[1] :] = batch["labels"]
    assert torch.equal(batch["input_ids"], ids[:, :-1])
    assert torch.equal(labels, torch.where(scored, ids, -100)[:, 1:])


@pytest.mark.parametrize("kind", ["random", "constant", "text"])
def test_copy_paste_is_what_it_says(kind):
    least = 0 if kind == "text" else 200
    ids, scored = drawn(CopyPaste((3, 3), (5, 9), (Filler(kind, least),)), rows=200).dense()
    gaps = set()
    for row, answer in zip(ids.tolist(), strings(ids, scored), strict=True):
        start, paste = row.index(COPY), row.index(PASTE)
        assert row[start + 1 : start + 5] == answer == row[paste + 1 :]
        assert answer[-1] == EOS
        filler = row[:start] + row[start + 5 : paste]
        assert len(filler) == 9
        assert all(least <= x < 256 for x in filler)
        assert kind != "constant" or (len(set(row[:start])) <= 1 and len(set(row[start + 5 : paste])) == 1)
        gaps.add(paste - start - 5)
    assert gaps == {5, 6, 7, 8, 9}
    letters = torch.tensor([answer[:-1] for answer in strings(ids, scored)])
    assert letters.max() > 200
    assert letters.min() < 50
    few = drawn(CopyPaste((2, 2), (0, 0), letters=64), rows=200)
    assert max(max(answer[:-1]) for answer in strings(*few.dense())) == 63


def test_lengths_of_strings_are_drawn_from_their_range():
    lengths = {drawn(CopyPaste((1, 3), (2, 2)), seed=seed).length for seed in range(30)}
    assert lengths == {2 * k + 6 for k in (1, 2, 3)}


def test_a_million_bytes_of_filler_are_made_block_by_block():
    filling = Filler().draw(3, 1_000_000, torch.Generator().manual_seed(0))
    edge = 5 * BLOCK
    whole, _ = filling.columns(edge - 10, edge + 10)
    parts = [filling.columns(edge - 10, edge)[0], filling.columns(edge, edge + 10)[0]]
    assert torch.equal(whole, torch.cat(parts, 1))
    assert filling.columns(999_990, 1_000_000)[0].shape == (3, 10)
    episodes = drawn(CopyPaste((2, 2), (1_000_000, 1_000_000)), rows=2)
    assert episodes.length == 1_000_008
    assert sum(ids.shape[1] for ids, _ in episodes.chunks(65_536)) == 1_000_008
    spread = torch.bincount(filling.columns(0, 20_000)[0].flatten(), minlength=256)
    assert spread.min() > 0.6 * spread.float().mean()


def test_text_filler_is_the_text_and_begins_again(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"abcdefgh")
    ids = Filler("text", text=text_of(path)).draw(4, 20, torch.Generator().manual_seed(0)).columns(0, 20)[0]
    for row in ids.tolist():
        assert bytes(row) in b"abcdefgh" * 5
    assert len(manual()) > 100_000
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="is empty"):
        text_of(path)
    with pytest.raises(FileNotFoundError, match="no file at"):
        text_of(tmp_path / "none")


def test_selective_copy_is_what_it_says():
    ids, scored = drawn(SelectiveCopy(16, 256), rows=50).dense()
    assert ids.shape[1] == 256
    for row, answer in zip(ids.tolist(), strings(ids, scored), strict=True):
        paste = row.index(PASTE)
        assert [x for x in row[:paste] if x] == answer == row[paste + 1 :]
        assert len(answer) == 16
        assert max(answer) <= 14


@pytest.mark.parametrize(("length", "pairs", "width"), [(64, 4, 1), (256, 64, 1), (1024, 256, 2)])
def test_recall_is_what_it_says(length, pairs, width):
    ids, scored = drawn(Recall(length, pairs, width), rows=8).dense()
    assert ids.shape[1] == length * width
    first = []
    for row, mask in zip(ids.numpy(), scored.numpy(), strict=True):
        symbols, asked = row.reshape(-1, width), mask.reshape(-1, width).all(1)
        keys, values = (list(map(bytes, symbols[start : 2 * pairs : 2])) for start in (0, 1))
        assert len({*keys, *values}) == 2 * pairs
        assert max(keys) < min(values)  # a symbol tells what it is
        known = dict(zip(keys, values, strict=True))
        where = np.flatnonzero(asked)
        assert len(where) == pairs
        assert {bytes(symbols[i - 1]): bytes(symbols[i]) for i in where} == known
        rest = np.setdiff1d(np.arange(2 * pairs, length), [*where, *(where - 1)])
        assert (symbols[rest] == 0).all()
        first.append(where[0])
    slots = length // 2 - pairs
    if slots > 4 * pairs:
        assert np.mean(first) < 2 * pairs + slots  # most questions come early


def test_recall_of_mixed_symbols_does_not_tell_keys_from_values():
    ids, _ = drawn(Recall(64, 2, symbols=4, mixed=True), rows=400).dense()
    keys, values = ids[:, :4:2], ids[:, 1:4:2]
    assert set(keys.flatten().tolist()) == set(values.flatten().tolist()) == {1, 2, 3, 4}
    assert (keys[:, 0] != keys[:, 1]).all()
    assert 50 < (values[:, 0] == values[:, 1]).sum() < 150
    assert set(drawn(Recall(64, 2, mixed=True), rows=2000).dense()[0][:, :4].flatten().tolist()) == {*range(1, 256)}


def test_recall_among_few_symbols_is_asked_anywhere():
    ids, scored = drawn(Recall(64, 2, power=1.0, symbols=4), rows=400).dense()
    assert set(ids[:, :4:2].flatten().tolist()) == {1, 2, 3, 4}
    assert set(ids[:, 1:4:2].flatten().tolist()) == {128, 129, 130, 131}
    where = scored.nonzero()[:, 1].float()
    assert 30 < where.mean() < 38  # of columns 5 to 63


def test_lookup_is_what_it_says():
    for key in ("suffix", "prefix"):
        ids, scored = drawn(Lookup((30, 30), key=key), rows=50).dense()
        for row, answer in zip(ids.tolist(), strings(ids, scored), strict=True):
            paste, start = row.index(PASTE), row.index(COPY)
            assert (paste < start) == (key == "prefix")
            asked, text = row[paste + 1 : paste + 4], row[start + 1 : row.index(EOS)]
            places = [i for i in range(len(text) - 2) if text[i : i + 3] == asked]
            assert len(places) == 1
            assert [text[places[0] + 3]] == answer
    with pytest.raises(ValueError, match="too few for a key"):
        drawn(Lookup((30, 30), letters=1))


@pytest.mark.parametrize("kind", ["number", "pair", "keys", "variables"])
def test_needles_are_what_they_say(kind):
    for depth in (0.0, 0.5, 1.0):
        ids, scored = drawn(Needle(2000, depth, kind)).dense()
        assert ids.shape[1] == 2000
        for row, answer in zip(ids, strings(ids, scored), strict=True):
            text, said = bytes(row.tolist()), bytes(answer)
            assert text.endswith(said)
            before, question = text[: -len(said)].rsplit(b"\n", 1)
            if kind == "number":
                assert before.count(b" The magic number is " + said + b". ") == 1
                assert abs(before.index(b" The magic") / (2000 - 80) - depth) < 0.05
            elif kind == "variables":
                first, *names = said.split()
                assert len(names) == 4
                value = question.split(b"?")[0].split()[-1]
                assert b" VAR " + first + b" = " + value + b". " in before
                for one, other in zip(said.split(), names, strict=False):
                    assert b" VAR " + other + b" = VAR " + one + b". " in before
            else:
                name = question.split(b"?")[0].split()[-1]
                assert before.count(b" The magic number of " + name + b" is " + said + b". ") == 1
                assert before.count(b"The magic number") >= 2


def test_what_cannot_be_drawn_is_refused():
    for build, word in (
        (lambda: CopyPaste((0, 2), (1, 1)), "lengths from 1"),
        (lambda: CopyPaste((1, 2), (3, 2)), "gaps from 0"),
        (lambda: Filler("snow"), "unknown filler 'snow'"),
        (lambda: SelectiveCopy(16, 20), "no room"),
        (lambda: Recall(64, 20), "no room"),
        (lambda: Recall(2048, 256, 1), "no room"),
        (lambda: Recall(64, 5, symbols=4), "no room"),
        (lambda: Recall(64, 2, symbols=128), "no room"),
        (lambda: Recall(64, 2, symbols=256, mixed=True), "no room"),
        (lambda: Lookup((3, 9)), "no room"),
        (lambda: Lookup((9, 9), key="middle"), "'middle'"),
        (lambda: drawn(Needle(60)), "60 bytes are too few"),
        (lambda: drawn(Needle(60, kind="keys")), "too few"),
        (lambda: Needle(kind="hay"), "unknown needle"),
        (lambda: Needle(depth=1.5), "from 0 to 1"),
    ):
        with pytest.raises(ValueError, match=word):
            build()


def test_a_span_without_answers_scores_nothing():
    assert not Span(torch.ones(2, 3, dtype=torch.int64)).columns(0, 3)[1].any()


def test_strings_one_after_another():
    problem = CopyPaste((3, 3), (2, 5))
    ids, scored = drawn(replace(problem, rounds=3), rows=4).dense()
    first = drawn(problem, rows=4).dense()
    length = first[0].shape[1]
    assert ids.shape == (4, 3 * length)
    assert torch.equal(ids[:, :length], first[0])
    rounds = ids.view(4, 3, length)
    assert torch.equal(scored.view(4, 3, length), first[1][:, None].expand(4, 3, length))
    for row in rounds.flatten(0, 1):
        start = row.tolist().index(COPY) + 1
        assert torch.equal(row[start : start + 4], row[-4:])
    assert len({tuple(row[-4:].tolist()) for row in rounds.flatten(0, 1)}) == 12  # other letters every time
    last = drawn(replace(problem, rounds=3, last=True), rows=4).dense()
    assert torch.equal(last[0], ids)
    assert torch.equal(last[1], scored & (torch.arange(3 * length) >= 2 * length))
    with pytest.raises(ValueError, match="at least one string"):
        replace(problem, rounds=0)
