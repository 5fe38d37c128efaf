"""Training windows in reading order: each row of a batch reads whole documents from beginning to end.

With a state that is carried from window to window this is truncated back-propagation through time.
"""

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from pmnet.data.files import ByteFiles
from pmnet.model.tokenizer import BOS


class ContiguousWindows(Dataset[dict[str, Tensor]]):
    """Batches of consecutive windows of `length` bytes, documents in an order drawn anew for every epoch.

    All windows of an epoch, document after document, are cut into as many lanes as there are rows; a row reads its
    lane. The last window of a document is padded (label -100). Batch i is a function of the seed and i alone, so the
    cursor of a resumed run is one number.

    A long document can keep a row busy for the whole of a short run. With `piece`, documents are cut into pieces, and
    the pieces are put in order instead.

    Args:
        files: what to read.
        length: T.
        batch_size: B, rows of one process.
        seed: of the order of documents.
        processes: how many share the lanes; batch `i` is for process `i % processes`.
        piece: bytes that are read in one go; None reads whole documents.
        first: id that a document begins with.

    Raises:
        ValueError: if there are fewer windows than rows, or a piece is shorter than a window.
    """

    def __init__(
        self,
        files: ByteFiles,
        length: int,
        batch_size: int,
        seed: int,
        processes: int = 1,
        piece: int | None = None,
        first: int = BOS,
    ):
        if piece is not None and piece < length:
            raise ValueError(f"pieces of {piece:,} bytes are shorter than windows of {length:,}")
        self.files, self.length, self.batch_size, self.seed = files, length, batch_size, seed
        self.processes, self.first = processes, first
        sizes = np.array(files.sizes)
        longest = sizes if piece is None else np.full_like(sizes, piece)
        self.file = np.repeat(np.arange(len(sizes)), -(-sizes // longest))  # of every piece
        self.start = np.concatenate([np.arange(0, *each) for each in zip(sizes, longest, strict=True)])
        self.size = np.minimum(longest[self.file], sizes[self.file] - self.start)
        self.windows = -(-self.size // length)
        self.epoch, self.order, self.ends = -1, self.file, self.file  # drawn with the first batch
        self.steps = int(self.windows.sum()) // (batch_size * processes)
        if self.steps == 0:
            raise ValueError(
                f"{files.total:,} bytes are too few for {batch_size * processes} rows of {length} bytes; use fewer rows"
            )

    def batch(self, index: int) -> dict[str, Tensor]:
        """`input_ids` and `labels`, int64 `[B, T]`, and `restart`, bool `[B]`: the row starts from an empty state."""
        step, process = divmod(index, self.processes)
        epoch, step = divmod(step, self.steps)
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.windows))
            self.ends = self.windows[self.order].cumsum()
        ids = torch.zeros(self.batch_size, self.length, dtype=torch.int64)
        labels = torch.full((self.batch_size, self.length), -100, dtype=torch.int64)
        restart = torch.zeros(self.batch_size, dtype=torch.bool)
        for row in range(self.batch_size):
            window = (process * self.batch_size + row) * self.steps + step
            place = int(np.searchsorted(self.ends, window, side="right"))
            piece = self.order[place]
            inside = int(window - (self.ends[place] - self.windows[piece])) * self.length
            file, first, size = (int(each[piece]) for each in (self.file, self.start, self.size))
            start, stop = first + inside, first + min(size, inside + self.length)
            data = self.files.read(file, max(0, start - 1), stop)
            text = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
            seen = text[:-1] if start else torch.cat([text.new_tensor([self.first]), text[:-1]])
            ids[row, : len(seen)] = seen
            labels[row, : len(seen)] = text[-len(seen) :]
            restart[row] = inside == 0 or step == 0
        return {"input_ids": ids, "labels": labels, "restart": restart}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Batch `index`, for a `DataLoader` with `batch_size=None`."""
        return self.batch(index)
