"""The oracle: the unitary phasor update, one position after the other, on complex numbers.

Deliberately slow and plain. It shares no code with the kernels it judges.
"""

import cmath

import torch
from torch import Tensor


def phase_scan_reference(
    delta: Tensor, segments: Tensor, initial_state: Tensor, documents: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Apply `z <- z * exp(i * delta)` token by token in double precision (docs/model.md, write).

    Args:
        delta: rotations in radians, `[B, T, C]`.
        segments: group of every position, integers in `[0, G)`, `[B, T]`.
        initial_state: angles in radians before the first position, `[B, G, C]`.
        documents: optional non-decreasing document index, `[B, T]`; 0 continues `initial_state`, every new
            index starts from angle 0.

    Returns:
        The angle in radians of the visited group right after each position, `[B, T, C]`, and the angles of all
        groups at the end, `[B, G, C]`; float64, in `(-pi, pi]`.
    """
    batch, length, channels = delta.shape
    groups = initial_state.shape[1]
    states = torch.zeros(batch, length, channels, dtype=torch.float64)
    final = torch.zeros(batch, groups, channels, dtype=torch.float64)
    for b in range(batch):
        phasors = [[cmath.exp(1j * a) for a in row] for row in initial_state[b].double().tolist()]
        current = 0
        for t in range(length):
            if documents is not None and int(documents[b, t]) != current:
                current = int(documents[b, t])
                phasors = [[1 + 0j] * channels for _ in range(groups)]
            slot = phasors[int(segments[b, t])]
            for c, angle in enumerate(delta[b, t].double().tolist()):
                slot[c] *= cmath.exp(1j * angle)
            states[b, t] = torch.tensor([cmath.phase(z) for z in slot], dtype=torch.float64)
        final[b] = torch.tensor([[cmath.phase(z) for z in row] for row in phasors], dtype=torch.float64)
    return states, final
