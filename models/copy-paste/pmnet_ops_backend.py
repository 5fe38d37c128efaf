"""Which implementation an operator uses: the one dispatch point.

`torch` works everywhere and in every dtype; `native` (C++) is for float32 on the CPU; `triton` is for CUDA devices.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from .pmnet_ops_native import library

_TRACERS = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)
BACKENDS = ("auto", "torch", "native", "triton")
METHODS = ("forward", "propose", "features", "seen")  # of modules, that kernels stand for
_forced = "auto"
_installed: bool | None = None  # whether there is Triton, once somebody asked


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force a backend within a `with` block, for all threads of the process.

    Args:
        name: `auto`, `torch`, `native` or `triton`. A forced backend is used wherever it can be: `native` needs float32
            tensors on the CPU outside of autocast and 1,024 slots or fewer, `triton` needs the `triton` package and a
            CUDA device (or its interpreter).

    Raises:
        ValueError: if there is no such backend.
        RuntimeError: if it is not available on this machine.
    """
    global _forced
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; there are {', '.join(BACKENDS)}")
    if name == "native" and library() is None:
        raise RuntimeError("the native backend needs a C++ compiler with OpenMP")
    if name == "triton" and not (_triton_installed() and (torch.cuda.is_available() or interpreted())):
        raise RuntimeError("the triton backend needs the triton package and a CUDA device, or its interpreter")
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def runs_native(*tensors: Tensor | None) -> bool:
    """Whether an operator on these floats runs in C++: kernels get addresses, so every one must be float32.

    Raises:
        NotImplementedError: inside forward-mode differentiation or `torch.func.grad`, which the operators do not have.
    """
    if torch.autograd.forward_ad._current_level >= 0:
        raise NotImplementedError("a PMNet has no forward-mode derivative; use backward")
    if not torch.compiler.is_compiling() and _differentiated():
        raise NotImplementedError("torch.func.grad, and what is made of it, does not pass a PMNet; use backward")
    return (
        all(x is None or (x.device.type == "cpu" and x.dtype == torch.float32) for x in tensors)
        and _forced in ("auto", "native")
        and not torch.is_autocast_enabled("cpu")
        and _native_available()
    )


def direct(*tensors: Tensor | None) -> bool:
    """Whether a kernel may be called outside of an operator: nothing differentiates, traces or wraps the tensors."""
    if torch.is_grad_enabled() or traced():
        return False
    return all(x is None or type(x) in (Tensor, torch.nn.Parameter) for x in tensors)


def readable(x: Tensor) -> bool:
    """Whether the values of a tensor can be checked: it is on the CPU, and nothing traces or transforms it."""
    return x.device.type == "cpu" and not traced()


def traced() -> bool:
    """Whether a compiler, a tracer, a fake mode or a transform of `torch.func` is at work."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return any(torch._C._get_dispatch_mode(mode) is not None for mode in _TRACERS)


def plain(module: torch.nn.Module) -> bool:
    """Whether calling a module is what its class was written for: no hook of its own, nothing in its place.

    Hooks of all modules do not count: those who count products listen so, and would change what they count.
    """
    return whole(type(module)) and untouched(module)


def whole(kind: type[torch.nn.Module]) -> bool:
    """Whether a class of this library still has the methods it was written with: classes are patched, too."""
    methods = (vars(kind)[name] for name in METHODS if name in vars(kind))
    return all(getattr(method, "__module__", None) == kind.__module__ for method in methods)


def untouched(module: torch.nn.Module) -> bool:
    """Whether a module itself has no hook, and no `forward` but that of its class."""
    own = module.__dict__  # attributes of a module are slow, and every step asks
    return not (
        own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
        or "forward" in own
    )  # fmt: skip


def runs_triton(x: Tensor, worthwhile: bool = True) -> bool:
    """Whether an operator on `x` runs as a Triton kernel; `worthwhile`: whether it should where none is forced."""
    if not (x.device.type == "cuda" or interpreted()):
        return False
    return _forced == "triton" or (_forced == "auto" and worthwhile and x.device.type == "cuda" and _triton_installed())


def _differentiated() -> bool:
    """Whether `torch.func.grad` or the like is at work, in which operators with a gradient of their own fail."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return False
    levels = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() == torch._C._functorch.TransformType.Grad for level in levels)


@torch.compiler.assume_constant_result
def _native_available() -> bool:
    return library() is not None


@torch.compiler.assume_constant_result
def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter, on any device."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@torch.compiler.assume_constant_result
def _triton_installed() -> bool:
    global _installed
    if _installed is None:  # no functools.cache: Dynamo warns of it
        try:
            import triton  # noqa: F401

            from .pmnet_ops_triton import operators  # noqa: F401
        except ImportError:
            _installed = False
        else:
            _installed = True
    return _installed
