"""How far the golden vectors, and this implementation, are from a float64 evaluation of the same weights.

Run: `python -m benchmarks.golden_error`; writes `results/golden.json`.
"""

from pathlib import Path
from typing import Any

import torch

from pmnet.ops import circular_difference
from pmnet.report.provenance import provenance, write_json
from tests.test_golden import ALL, Golden, stream


def measure(name: str) -> dict[str, Any]:
    """Largest absolute errors of logits, and of states in radians (circular)."""
    golden = Golden(name)
    ours, exact = golden.model("eager"), golden.model("eager", torch.float64)
    with torch.no_grad():
        truth, logits = exact(golden.ids).logits, ours(golden.ids).logits
    published = golden.tensors["logits"]
    chunks, states = golden.chunks, golden.states(ours.config)

    def largest(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
        return max(circular_difference(x, y).abs().max().item() for x, y in zip(a, b, strict=True))

    true_states, our_states = stream(exact, golden.ids, chunks), stream(ours, golden.ids, chunks)
    return {
        "logits": {
            "vectors_from_float64": (published - truth).abs().max().item(),
            "ours_from_float64": (logits - truth).abs().max().item(),
            "ours_from_vectors": (logits - published).abs().max().item(),
            "standard_deviation": published.std().item(),
        },
        "states_rad": {
            "vectors_from_float64": largest(states, true_states),
            "ours_from_float64": largest(our_states, true_states),
            "ours_from_vectors": largest(our_states, states),
        },
    }


if __name__ == "__main__":
    write_json(Path("results/golden.json"), {**provenance(), "files": {name: measure(name) for name in ALL}})
