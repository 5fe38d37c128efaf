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

    Where `target` is a link, of what it points to.

    Raises:
        OSError: if the disk is full or not writable, or if a device or a pipe is there; it is then untouched.
    """
    if target.is_symlink():
        target = target.resolve()
    if target.exists() and not (target.is_file() or target.is_dir()):
        raise OSError(f"could not write {target}: it is neither a file nor a folder")
    partial, aside = (target.with_name(target.name + end) for end in (".partial", ".partial-old"))
    _remove(partial)
    try:
        yield partial
        if partial.is_dir() and os.path.lexists(target):  # a folder cannot replace one that is not empty
            _remove(aside)
            os.replace(target, aside)
        os.replace(partial, target)
    except (SafetensorError, OSError) as error:
        raise OSError(f"could not write {target}: {error}") from error
    finally:
        if os.path.lexists(aside) and not os.path.lexists(target):
            os.replace(aside, target)
        _remove(aside)
        _remove(partial)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
