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
    """Read `size` pseudo-random bytes twice, in chunks of 64 KiB and of 1 KiB (a quarter and an eighth, if short).

    Returns:
        `rows`: after each chunk the bytes per second of that chunk and the resident bytes of the process. `verdict`:
        growth of the resident bytes after the first chunk as a fraction of them, the last chunk's rate over the
        first's, whether the phase memory and whether the whole saved state are equal, bit for bit, in both passes.
    """
    chunk, finer = min(CHUNK, size // 4), min(FINER, size // 8)
    ids = torch.randint(256, (1, size), generator=torch.Generator().manual_seed(0)).to(model.device)
    coarse, rows = _read(model, ids, chunk)
    fine, _ = _read(model, ids, finer)
    first, last = rows[0], rows[-1]
    verdict = {
        "resident_growth": last["resident_bytes"] / first["resident_bytes"] - 1,
        "last_rate_over_first": last["bytes_per_second"] / first["bytes_per_second"],
        "memory_equal": all(torch.equal(a, b) for a, b in zip(coarse.memory, fine.memory, strict=True)),
        "state_equal": _same(_saved(coarse), _saved(fine)),
    }
    sizes = {"bytes": size, "chunk": chunk, "finer_chunk": finer, "state_bytes": coarse.nbytes}
    parameters = sum(p.numel() for p in model.parameters())
    return {"kind": "stream", "parameters": parameters, **sizes, "rows": rows, "left_out": [], "verdict": verdict}


def _read(model: PMNetForCausalLM, ids: torch.Tensor, chunk: int) -> tuple[PMNetCache, list[dict[str, float]]]:
    cache, rows, done = PMNetCache(model.config, device=model.device), [], 0
    for part in ids.split(chunk, dim=1):
        start = time.perf_counter()
        model(part, past_key_values=cache, logits_to_keep=1)
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
