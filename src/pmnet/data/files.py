"""Bytes of files and folders, read window by window and never loaded whole.

The text of several files is one stream of documents: file after file in sorted order, each preceded by BOS.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pmnet.model.tokenizer import BOS


@dataclass(frozen=True)
class ByteFiles:
    """Non-empty files, each one document.

    Attributes:
        paths: the files.
        sizes: their sizes in bytes.
    """

    paths: tuple[Path, ...]
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(self.sizes)

    @property
    def digest(self) -> str:
        """Of names, sizes, and the first and last KiB of every file, wherever the folders are."""
        digest = hashlib.sha256()
        for file, (path, size) in enumerate(zip(self.paths, self.sizes, strict=True)):
            digest.update(f"{path.name} {size}\n".encode("utf-8", "surrogateescape"))
            digest.update(self.read(file, 0, min(size, 1024)) + self.read(file, max(0, size - 1024), size))
        return digest.hexdigest()

    def read(self, file: int, start: int, stop: int) -> bytes:
        """Bytes `[start, stop)` of one file.

        Raises:
            OSError: if the file cannot be read or has become shorter.
        """
        with self.paths[file].open("rb") as handle:
            handle.seek(start)
            data = handle.read(stop - start)
        if len(data) != stop - start:
            raise OSError(f"{self.paths[file]} changed while it was being read: expected {self.sizes[file]} bytes")
        return data


def open_files(paths: list[Path]) -> ByteFiles:
    """Collect files, and the files below folders (hidden ones excepted), in sorted order, each once.

    Raises:
        FileNotFoundError: if a path does not exist, or a link in a folder leads nowhere.
        ValueError: if a named file, or everything together, is empty.
        PermissionError: if a file or a folder cannot be read.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            shown = (p for p in _below(path) if not any(part.startswith(".") for part in p.relative_to(path).parts))
            for file in sorted(shown):
                if not file.exists():
                    raise FileNotFoundError(f"{file} is a link to nothing")
                found += [file] if file.is_file() else []
        elif path.is_file():
            if path.stat().st_size == 0:
                raise ValueError(f"{path} is empty")
            found.append(path)
        else:
            raise FileNotFoundError(f"no file or folder at {path}")
    once: dict[str, Path] = {}  # a file may be named twice, in two spellings or by a link
    for path in found:
        once.setdefault(os.path.realpath(path), path)
    full = [path for path in once.values() if path.stat().st_size > 0]
    if not full:
        raise ValueError(f"no bytes to read in {', '.join(map(str, paths))}")
    for path in full:
        with path.open("rb"):
            pass
    return ByteFiles(tuple(full), tuple(p.stat().st_size for p in full))


def _below(folder: Path) -> Iterator[Path]:
    """Files in a folder and the folders in it but hidden ones, linked ones included, each folder once."""
    seen = {os.path.realpath(folder)}
    for inside, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        fresh: dict[str, str] = {}
        for name in sorted(name for name in folders if not name.startswith(".")):
            fresh.setdefault(os.path.realpath(os.path.join(inside, name)), name)
        folders[:] = [name for place, name in fresh.items() if place not in seen]
        seen |= set(fresh)
        yield from (Path(inside) / name for name in names)


def _refuse(error: OSError) -> None:
    raise error


class RandomWindows(Dataset[dict[str, Tensor]]):
    """Training batches: windows of `length` bytes drawn uniformly from all files.

    A window never crosses a file; a shorter file is padded at the end (label -100). Batch i is a function of the
    seed and i alone, so the cursor of a resumed run is one number.

    Args:
        files: what to draw from.
        length: T.
        batch_size: B.
        seed: of the draw.
        first: id that a document begins with.
    """

    def __init__(self, files: ByteFiles, length: int, batch_size: int, seed: int, first: int = BOS):
        self.files, self.length, self.batch_size, self.seed, self.first = files, length, batch_size, seed, first
        starts = np.array([max(1, size - length + 1) for size in files.sizes], dtype=np.float64)
        self.weights = starts / starts.sum()

    def batch(self, index: int) -> dict[str, Tensor]:
        """`input_ids` and `labels`, int64 `[B, T]`: labels[t] is the byte after input_ids[t]."""
        random = np.random.default_rng([self.seed, index])
        ids = torch.zeros(self.batch_size, self.length, dtype=torch.int64)
        labels = torch.full((self.batch_size, self.length), -100, dtype=torch.int64)
        for row, file in enumerate(random.choice(len(self.files.sizes), self.batch_size, p=self.weights)):
            size = self.files.sizes[file]
            start = int(random.integers(0, max(1, size - self.length + 1)))
            data = self.files.read(int(file), start, min(size, start + self.length))
            text = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
            before = self.first if start == 0 else self.files.read(int(file), start - 1, start)[0]
            ids[row, 0] = before
            ids[row, 1 : len(text)] = text[:-1]
            labels[row, : len(text)] = text
        return {"input_ids": ids, "labels": labels}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Batch `index`, for a `DataLoader` with `batch_size=None`."""
        return self.batch(index)
