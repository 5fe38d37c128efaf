"""The CPU kernels: C++ compiled once on first use, called through `ctypes`.

They exist because neither a matrix library nor a tracing compiler promises that a position's bits do not depend on
how many positions are computed beside it; here every operation and every order of summation is written down.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLAGS = [
    "-std=c++17", "-O3", "-march=native", "-mprefer-vector-width=512", "-ffp-contract=off", "-fno-math-errno",
    "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared", "-w",
]  # fmt: skip

_DIGEST = hashlib.sha256().digest_size
_POINTER, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "rms_norm": [_POINTER] * 3 + [_INT] * 2 + [_FLOAT],
    "rms_norm_backward": [_POINTER] * 5 + [_INT] * 3 + [_FLOAT],
    "norm_rotate": [_POINTER] * 5 + [_INT] * 4 + [_FLOAT],
    "norm_rotate_backward": [_POINTER] * 7 + [_INT] * 5 + [_FLOAT],
    "rotary_table": [_POINTER] * 3 + [_INT] * 2 + [ctypes.c_double],
    "silu_product": [_POINTER] * 3 + [_INT],
    "silu_product_backward": [_POINTER] * 5 + [_INT],
    "linear": [_POINTER, _INT, *[_POINTER] * 4, *[_INT] * 4],
    "window_attention": [_POINTER] * 5 + [_INT] * 7 + [_FLOAT],
    "window_attention_backward": [_POINTER] * 8 + [_INT] * 7 + [_FLOAT],
    "address": [_POINTER] * 3 + [_INT] * 4,
    "address_backward": [_POINTER] * 7 + [_INT] * 4,
    "mix": [_POINTER] * 3 + [_INT] * 4,
    "mix_backward": [_POINTER] * 5 + [_INT] * 4,
    "geometry": [_POINTER] * 4 + [_INT] * 3,
    "geometry_backward": [_POINTER] * 3 + [_INT] * 2,
    "read_slots": [_POINTER] * 6 + [_INT] * 4,
    "segment_counts": [_POINTER] * 4 + [_INT] * 3,
    "step": [_POINTER] * 8,
    "phase_write": [_POINTER] * 7 + [_INT] * 7,
    "phase_write_backward": [_POINTER] * 9 + [_INT] * 6,
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None without their sources or, with one log line, without a C++ compiler with OpenMP."""
    folder = Path(__file__).parent
    sources = sorted(folder.glob("*.cpp"))
    if not sources:  # code exported with a model goes without them
        return None
    try:
        compiler = shlex.split(os.environ.get("CXX") or "c++")
        version = subprocess.run([*compiler, "--version"], capture_output=True, check=True).stdout
        text = b"".join(path.read_bytes() for path in [*sources, *sorted(folder.glob("*.h"))])
        command = [*compiler, *FLAGS]
        key = hashlib.sha256(text + version + shlex.join(command).encode() + processor_flags()).hexdigest()[:24]
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pmnet"
        loaded = _load([*command, *map(str, sources)], cache / f"kernels-{key}.so")
    except (OSError, RuntimeError, ValueError, subprocess.CalledProcessError) as error:  # also: no home, a bad CXX
        reason = getattr(error, "stderr", None) or error
        logging.getLogger("pmnet").warning("CPU kernels are off, plain PyTorch is used instead: %s", reason)
        return None
    for name, arguments in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.argtypes, function.restype = arguments, None
    return loaded


def _load(command: list[str], target: Path) -> ctypes.CDLL:
    """The library at `target`, compiled if it is not there and whole; for this process alone if it cannot be kept."""
    if _is_whole(target):
        with suppress(OSError):  # a folder that no library may be loaded from
            return ctypes.CDLL(str(target))
    with tempfile.TemporaryDirectory() as folder:
        built = Path(folder) / target.name
        subprocess.run([*command, "-o", str(built)], capture_output=True, check=True, text=True)
        try:
            _keep(built.read_bytes(), target)
            return ctypes.CDLL(str(target))
        except OSError as error:
            logging.getLogger("pmnet").warning("CPU kernels are compiled for this process alone: %s", error)
            return ctypes.CDLL(str(built))


def _keep(library: bytes, target: Path) -> None:
    """Write it with its digest, which nobody reads who loads it, so that it appears complete or not at all."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        complete = Path(scratch) / target.name
        with complete.open("wb") as file:
            file.write(library + hashlib.sha256(library).digest())
            file.flush()
            os.fsync(file.fileno())
        os.replace(complete, target)


def _is_whole(library: Path) -> bool:
    """Whether the digest at its end is its own: a library that was cut off kills the process that looks into it."""
    try:
        content = library.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]


def kernels() -> Any:
    """The compiled kernels, for code that runs only where `runs_native` is true; RuntimeError if there are none."""
    found = library()
    if found is None:
        raise RuntimeError("there are no CPU kernels: they need their sources and a C++ compiler with OpenMP")
    return found


def pointers(*tensors: Tensor | None) -> list[int | None]:
    """Addresses to pass to a kernel; the tensors must be contiguous and outlive the call."""
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]


def check_range(name: str, indices: Tensor, count: int) -> None:
    """ValueError unless indices lie in `[0, count)`: a kernel would read and write elsewhere."""
    if indices.numel():
        low, high = (int(x) for x in torch.aminmax(indices))
        if low < 0 or high >= count:
            raise ValueError(f"{name} must lie in [0, {count}), got {low if low < 0 else high}")


def dense_like(x: Tensor, *_: Any) -> Tensor:
    """An uninitialised contiguous tensor of the shape and dtype of the first argument."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def processor_flags() -> bytes:
    """What the processor can do, on which `-march=native` depends."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features"))).encode()
    except (OSError, StopIteration):
        return f"{platform.machine()} {platform.processor()}".encode()
