"""What the machine can do at best: the figures that every measurement is a fraction of."""

import time
from collections.abc import Callable
from typing import Any

import torch

READ_BYTES = 256 * 2**20


def best_device() -> torch.device:
    """The GPU if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    """Wait for everything that was started on `device`."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_limits(device: torch.device, size: int = 2048, count: int = READ_BYTES, repeats: int = 5) -> dict[str, Any]:
    """Matrix products and memory traffic, the best of several runs each.

    Args:
        device: where.
        size: width of the square matrices.
        count: bytes of the tensor that is read and copied.
        repeats: runs of each.

    Returns:
        Per limit `best`, every one of its `samples`, and `what` was run: `matmul_gflops` (float32), `read_gbs` and
        `copy_gbs` (read and written bytes together), 1 GB = 1e9 bytes; on a GPU also `bf16_matmul_gflops`.
    """
    tensor = torch.ones(count // 4, device=device)
    matrices = [torch.randn(size, size, device=device) for _ in range(2)]
    limits = {
        "matmul_gflops": _best(lambda: torch.mm(*matrices), 2 * size**3, device, repeats, f"float32 {size}^3 mm"),
        "read_gbs": _best(tensor.sum, count, device, repeats, f"sum of {count} bytes"),
        "copy_gbs": _best(tensor.clone, 2 * count, device, repeats, f"clone of {count} bytes, read and written"),
    }
    if device.type == "cuda":
        wide = [torch.randn(4 * size, 4 * size, device=device, dtype=torch.bfloat16) for _ in range(2)]
        work, what = 2 * (4 * size) ** 3, f"bfloat16 {4 * size}^3 mm"
        limits["bf16_matmul_gflops"] = _best(lambda: torch.mm(*wide), work, device, repeats, what)
    return limits


def _best(run: Callable[[], object], work: int, device: torch.device, repeats: int, what: str) -> dict[str, Any]:
    run()
    rates = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        rates.append(work / (time.perf_counter() - start) / 1e9)
    return {"best": max(rates), "samples": rates, "what": what}
