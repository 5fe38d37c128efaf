"""The Neural Turing Machine on the copy task of its paper (arXiv 1410.5401, 4.1): `python -m benchmarks.ntm RUN`.

Vectors of eight random bits are shown, then a delimiter on a channel of its own, then nothing while the machine must
write them again. Trained on 1 to 20 vectors, measured on up to 120. A run that was stopped is continued.

Settings of the paper: LSTM controller of 100 units, one read and one write head, memory 128 x 20, RMSProp with momentum
0.9 and learning rate 1e-4, gradient values clipped to (-10, 10). Not of the paper: batches of 16 sequences of equal
length instead of one sequence, RMSProp as PyTorch has it (decay 0.95, not centred), the mean loss of all bits.

Shapes: B sequences, k vectors of a sequence, T = 2k + 1 positions, 9 inputs, 8 outputs.
"""

import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from pmnet.baselines import NTMConfig, NTMCore
from pmnet.report.provenance import provenance, write_json
from pmnet.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from pmnet.train.progress import Reporter

BITS = 8
LONGEST = 20
LENGTHS = (1, 5, 10, 20, 30, 40, 60, 80, 100, 120)


class Copier(PreTrainedModel):
    """`NTMCore` from nine channels to eight."""

    config_class = NTMConfig

    def __init__(self, config: NTMConfig):
        super().__init__(config)
        self.core = NTMCore(BITS + 1, BITS, config.hidden_size, config.memory_slots, config.memory_width)

    def forward(self, inputs: Tensor) -> Tensor:
        """Logits of the bits: `[B, T, 9]` to `[B, T, 8]`."""
        return self.core(inputs)[0]


def sequences(rows: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Inputs `[B, 2k + 1, 9]` and the bits to write in the last k positions, `[B, k, 8]`."""
    bits = torch.randint(0, 2, (rows, length, BITS), generator=generator).float()
    inputs = torch.zeros(rows, 2 * length + 1, BITS + 1)
    inputs[:, :length, :BITS] = bits
    inputs[:, length, BITS] = 1
    return inputs, bits


def batch(seed: int, step: int, rows: int) -> tuple[Tensor, Tensor]:
    """The training batch of a step, a function of seed and step."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)
    length = int(torch.randint(1, LONGEST + 1, (), generator=generator))
    return sequences(rows, length, generator)


def learn(model: Copier, run: Path, steps: int, rows: int, rate: float, seed: int) -> None:
    """Train to `steps` optimizer steps from the newest checkpoint of `run`, or from the beginning."""
    optimizer = torch.optim.RMSprop(model.parameters(), lr=rate, alpha=0.95, momentum=0.9)
    found = latest_checkpoint(run)
    done = 0 if found is None else int(load_checkpoint(found, model, [optimizer])[1]["step"])
    run.mkdir(parents=True, exist_ok=True)
    reporter, saved = Reporter(run, steps, done), time.monotonic()
    for step in range(done + 1, steps + 1):
        inputs, bits = batch(seed, step, rows)
        logits = model(inputs)[:, -bits.shape[1] :]
        loss = F.binary_cross_entropy_with_logits(logits, bits)
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        torch.nn.utils.clip_grad_value_(model.parameters(), 10.0)
        optimizer.step()
        correct = float(((logits > 0) == (bits > 0)).float().mean())
        reporter.step(
            {"step": step, "loss": loss.item(), "correct": correct, "norm": float(norm), "vectors": len(bits[0])}
        )
        if step == steps or time.monotonic() - saved > 60:
            save_checkpoint(run, step, model, [optimizer], [], {})
            saved = time.monotonic()
    reporter.close()


@torch.no_grad()
def measure(model: Copier, length: int, rows: int, seed: int) -> dict[str, Any]:
    """Share of right bits and of sequences without a wrong one."""
    inputs, bits = sequences(rows, length, torch.Generator().manual_seed(seed))
    right = (model(inputs)[:, -length:] > 0) == (bits > 0)
    return {"vectors": length, "sequences": rows, "bits": float(right.float().mean()),
            "exact": float(right.flatten(1).all(1).float().mean())}  # fmt: skip


def main(
    run: Annotated[Path, typer.Argument(help="Run folder; copy.json is written there.")],
    steps: Annotated[int, typer.Option(min=1)] = 15_000,
    batch_size: Annotated[int, typer.Option(min=1)] = 16,
    learning_rate: Annotated[float, typer.Option(min=0.0)] = 1e-4,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    strings: Annotated[int, typer.Option("--sequences", min=1, help="To measure, of each length.")] = 200,
) -> None:
    """Train the machine, then measure it on lengths it never saw."""
    torch.manual_seed(seed)
    model = Copier(NTMConfig())
    learn(model, run, steps, batch_size, learning_rate, seed)
    rows = [measure(model, length, strings, seed) for length in LENGTHS]
    for row in rows:
        print(f"{row['vectors']:4} vectors: {row['exact']:7.1%} of sequences exact, {row['bits']:8.2%} of bits right")
    settings = {"steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    size = sum(p.numel() for p in model.parameters())
    write_json(run / "copy.json", provenance() | settings | {"parameters": size, "longest": LONGEST, "lengths": rows})


if __name__ == "__main__":
    typer.run(main)
