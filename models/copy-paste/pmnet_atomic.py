"""Files and folders that appear complete or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which takes the place of `target` at the end unless something goes wrong.

    Where `target` is a link, of what it points to. It lies in a hidden folder of its own beside `target`, so several
    processes can write to one place; the last one stays.

    Raises:
        OSError: if the disk is full or not writable, or if a device or a pipe is there; it is then untouched.
    """
    if target.is_symlink():
        target = target.resolve()
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise OSError(f"could not write {target}: it is neither a file nor a folder")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name[:40]}.", dir=target.parent) as scratch:
            partial, before = Path(scratch) / target.name, Path(scratch) / "before"
            yield partial
            try:
                if partial.is_dir() and os.path.lexists(target):  # a folder cannot replace one that is not empty
                    os.replace(target, before)
                os.replace(partial, target)
            finally:
                if os.path.lexists(before) and not os.path.lexists(target):
                    os.replace(before, target)
    except (SafetensorError, OSError) as error:
        raise OSError(f"could not write {target}: {error}") from error
