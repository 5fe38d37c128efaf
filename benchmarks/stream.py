"""One long stream through one state: the memory stays, the rate stays, and the cut into chunks leaves no trace."""

import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from benchmarks.limits import synchronize
from benchmarks.memory import resident_bytes
from pmnet import PMNetCache, PMNetForCausalLM

CHUNK = 64 * 1024
FINER = 1024


@torch.no_grad()
def measure_stream(model: PMNetForCausalLM, size: int) -> dict[str, Any]:
    """Read `size` pseudo-random bytes twice, in calls of 1 KiB and then of 64 KiB (an eighth and a quarter, if short).

    Returns:
        `rows`: after every 64 KiB of the first pass, its bytes per second and the resident bytes of the process;
        `coarse_rows`: the same of the second pass. `verdict`: growth of the resident bytes after the first row as a
        fraction of them, and the last row's rate over the first's, for `rows` and (`coarse_...`) for `coarse_rows`;
        whether the phase memory and whether the whole saved state are equal, bit for bit, in both passes.
    """
    chunk, finer = min(CHUNK, size // 4), min(FINER, size // 8)
    ids = torch.randint(256, (1, size), generator=torch.Generator().manual_seed(0)).to(model.device)
    model(ids[:, :finer])  # first calls compile kernels and fill caches
    fine, rows = _read(model, ids, finer, chunk)
    coarse, coarse_rows = _read(model, ids, chunk, chunk)
    verdict = {
        **_course(rows, ""),
        **_course(coarse_rows, "coarse_"),
        "memory_equal": all(torch.equal(a, b) for a, b in zip(coarse.memory, fine.memory, strict=True)),
        "state_equal": _same(_saved(coarse), _saved(fine)),
    }
    sizes = {"bytes": size, "chunk": chunk, "finer_chunk": finer, "state_bytes": coarse.nbytes}
    parameters = sum(p.numel() for p in model.parameters())
    found = {"rows": rows, "coarse_rows": coarse_rows, "left_out": [], "verdict": verdict}
    return {"kind": "stream", "parameters": parameters, **sizes, **found}


def _course(rows: list[dict[str, float]], prefix: str) -> dict[str, float]:
    first, last = rows[0], rows[-1]
    return {
        f"{prefix}resident_growth": last["resident_bytes"] / first["resident_bytes"] - 1,
        f"{prefix}last_rate_over_first": last["bytes_per_second"] / first["bytes_per_second"],
    }


def _read(
    model: PMNetForCausalLM, ids: torch.Tensor, chunk: int, every: int
) -> tuple[PMNetCache, list[dict[str, float]]]:
    cache, rows, done = PMNetCache(model.config, device=model.device), [], 0
    for part in ids.split(every, dim=1):
        start = time.perf_counter()
        for piece in part.split(chunk, dim=1):
            model(piece, past_key_values=cache, logits_to_keep=1)
        synchronize(model.device)
        seconds = time.perf_counter() - start
        done += part.shape[1]
        rate = part.shape[1] / seconds
        rows.append({"bytes": done, "bytes_per_second": rate, "resident_bytes": resident_bytes()})
    return cache, rows


def _saved(cache: PMNetCache) -> dict[str, torch.Tensor]:
    """Everything that a saved state holds, by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "state.safetensors"
        cache.save(path)
        return load(path.read_bytes())


def _same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8)) for name in a)
