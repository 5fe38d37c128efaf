"""Files and folders appear complete or not at all, whoever else writes."""

import os
from pathlib import Path

import pytest

from pmnet.atomic import replacing


def test_a_folder_takes_the_place_of_another_or_leaves_it(tmp_path, monkeypatch):
    target, elsewhere = tmp_path / "model", tmp_path / "elsewhere"
    target.mkdir()
    (target / "old").write_text("old")
    kept = tmp_path / "model.old"  # somebody's own
    kept.mkdir()

    def write():
        with replacing(target) as partial:
            partial.mkdir()
            (partial / "new").write_text("new")

    rename = os.replace

    def full(source, place):
        if Path(place) == target and Path(source).name == "model":
            raise OSError(28, "No space left on device")
        rename(source, place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match=r"could not write .*model: .*No space left"):
            write()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "model.old"]
    assert (target / "old").read_text() == "old"
    write()
    assert [path.name for path in target.iterdir()] == ["new"]
    target.rename(elsewhere)
    target.symlink_to(elsewhere)
    write()
    assert [path.name for path in target.iterdir()] == ["new"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "model", "model.old"]


def test_a_link_is_written_through_and_a_pipe_left_alone(tmp_path):
    pipe, link, real = tmp_path / "pipe", tmp_path / "link", tmp_path / "real"
    os.mkfifo(pipe)
    link.symlink_to(real)
    with pytest.raises(OSError, match=r"could not write .*pipe: it is neither a file nor a folder"), replacing(pipe):
        pass
    assert pipe.is_fifo()
    for text in ("one", "two"):
        with replacing(link) as partial:
            partial.write_text(text)
        assert link.is_symlink()
        assert real.read_text() == text


def test_two_writers_of_one_place_do_not_meet(tmp_path):
    target, own = tmp_path / "x", tmp_path / "x.partial"
    own.write_text("somebody's own")
    with replacing(target) as slow:
        slow.write_text("slow, ")
        with replacing(target) as fast:
            fast.write_text("fast")
        assert target.read_text() == "fast"
        with slow.open("a") as file:
            file.write("and whole")
    assert target.read_text() == "slow, and whole"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "x.partial"]
    assert own.read_text() == "somebody's own"
