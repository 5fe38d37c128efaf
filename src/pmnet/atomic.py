"""Files and folders that appear complete or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """A path to write a file or a folder to, which takes the place of `target` at the end unless something goes wrong.

    Raises:
        OSError: if the disk is full or not writable; what was there before is then untouched.
    """
    partial = target.with_name(target.name + ".partial")
    _remove(partial)
    try:
        yield partial
        if partial.is_dir():
            shutil.rmtree(target, ignore_errors=True)  # a folder cannot replace one that is not empty
        os.replace(partial, target)
    except SafetensorError as error:
        raise OSError(f"could not write {target}: {error}") from error
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
