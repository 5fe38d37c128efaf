"""Recipes: everything that decides a training run, as typed values with names."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from transformers import PreTrainedConfig

from pmnet.config import PMNetConfig, pmnet_30m, pmnet_119m


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        model: configuration of the model.
        start: folder of a model of this configuration, or of one with fewer slots, to train further; None: fresh
            weights.
        finish: practise the task as a whole from the first step on, for a `start` that knows it (copy-paste).
        steps: optimizer steps.
        batch_size: B.
        length: T (files only; other tasks have their own).
        carry: read files in order, and carry the state from window to window, if it has a constant size (files only).
        piece: with `carry`, bytes that a row reads in one go before it turns to another place; None: a whole file.
        size: how large a task grows: letters of a string (copy-paste), and so on (`pmnet.train.ladders`).
        gap: least filler between question and answer in training (copy-paste), the reach of the attention.
        rounds: strings of an episode, one after another in the same state: at most so many (copy-paste, `finish`).
        practice: every so many batches, one of copy-paste instead of text (files only); None: text alone.
        quiet: weight of an auxiliary loss, the mean rotation of filler below the root in radians (copy-paste); 0: none.
        learning_rate: peak of the optimizer.
        silent_reads: start with memory reads that add nothing: their output maps are zero. Not the published
            initialisation; a language model learns faster with it.
        muon: train the matrices of linear maps with Muon instead of AdamW, at the same learning rate.
        final_rate: share of the peak left at the end.
        hold: share of the steps at the peak before a cosine decay begins (0: plain cosine with warm-up).
        warmup: steps.
        weight_decay: on matrices and anchors, not on norms and biases.
        clip: greatest gradient norm; 0 clips nothing.
        betas: of AdamW.
        precision: `"no"` (float32) or `"bf16"` (autocast).
        compile: trace the step with `torch.compile`: worth its minutes on a GPU, not with the CPU kernels.
        seed: of initialisation and data.
        checkpoint_seconds: time between checkpoints.

    Raises:
        ValueError: if a value is out of range, or two of them do not go together.
    """

    model: PreTrainedConfig
    steps: int
    start: str | None = None
    finish: bool = False
    batch_size: int = 32
    length: int = 512
    carry: bool = False
    piece: int | None = None
    size: int = 8
    gap: int = 15
    rounds: int = 1
    practice: int | None = None
    quiet: float = 0.0
    learning_rate: float = 5e-4
    silent_reads: bool = False
    muon: bool = False
    final_rate: float = 0.1
    hold: float = 0.0
    warmup: int = 100
    weight_decay: float = 0.1
    clip: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    precision: str = "no"
    compile: bool = False
    seed: int = 0
    checkpoint_seconds: float = 120.0

    def __post_init__(self) -> None:
        if self.precision not in ("no", "bf16"):
            raise ValueError(f"precision is no or bf16, not {self.precision!r}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate must be positive and finite, not {self.learning_rate}")
        if self.muon and self.learning_rate > 1e30:  # Muon multiplies it, in float32
            raise ValueError(f"learning_rate is at most 1e30 with Muon, not {self.learning_rate}")
        if not 0 <= self.quiet < math.inf:
            raise ValueError(f"quiet must be finite and not negative, not {self.quiet}")
        if self.piece is not None and not self.carry:
            raise ValueError(f"piece ({self.piece}) is for reading in order: it needs carry")
        if self.rounds > 1 and not self.finish:
            raise ValueError(f"{self.rounds} rounds are for a model that knows the task: they need finish (box-finish)")
        if self.carry and self.compile:
            raise ValueError("a step traced with torch.compile (compile) reads windows without a carried state (carry)")
        if self.quiet and self.compile:
            raise ValueError("a loss on the rotations of filler (quiet) is not for a step traced with torch.compile")

    def facts(self) -> dict[str, Any]:
        """The recipe as JSON-able values, without the model's configuration."""
        return {name: value for name, value in asdict(self).items() if name != "model"}

    def plan(self) -> dict[str, Any]:
        """What has to be the same for a run to be continued, as it looks after a round trip through JSON."""
        recipe = {name: value for name, value in self.facts().items() if name != "checkpoint_seconds"}
        later = {"architectures", "dtype", "transformers_version"}  # a model adds them when it is made or saved
        model = {name: value for name, value in self.model.to_dict().items() if name not in later}
        found: dict[str, Any] = json.loads(json.dumps({"recipe": recipe, "model": model}))
        return found


def demo_model() -> PMNetConfig:
    """Two layers, two levels of eight slots to a group, window 8: it learns copy-paste on two CPU cores in minutes.

    With four slots strings grew more slowly: a root of few slots is what limits them.
    """
    return PMNetConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        sliding_window=8,
        memory_size=32,
        num_memory=8,
        memory_write_period=1,
        phase_bits=5,
        initializer_gain=0.45,
        anchor_initializer_range=0.5,
        rope_theta=1e4,
        attn_implementation="eager",  # matters where the native kernels are off
    )


def demo(size: int) -> Recipe:
    """A synthetic task of this size on the demo model: minutes on two CPU cores."""
    return Recipe(model=demo_model(), steps=6000, size=size, learning_rate=2e-3, muon=True, final_rate=0.01, hold=0.2)


def box() -> Recipe:
    """The first half of a model of long strings: up to 15 bytes, whose marker attention sees from every letter.

    It has sixteen slots to a group: with the eight of the demo, strings end before 20 letters. And eight heads, twice
    those of the demo: a letter is placed by how much each of them sees of the marker, and less of that is noise. At a
    rotary base of 100 most frequencies have periods within a window; at 10,000 distances of a period apart look alike.
    """
    model = demo_model()
    model.sliding_window, model.num_memory, model.rope_theta = 16, 16, 100.0
    model.num_attention_heads = model.num_key_value_heads = 8
    return replace(demo(15), model=model, gap=model.receptive_field, hold=0.5)


def box_finish() -> Recipe:
    """The second half of `box`: strings of up to 32 bytes, all gaps alike, filler that turns only the root.

    Attention widens to 34 keys, which see the marker from every letter, and groups to 32 slots, so that letters have
    room; trained so from scratch, strings do not grow.
    """
    recipe = box()
    recipe.model.sliding_window, recipe.model.num_memory = 34, 32
    return replace(
        recipe, size=32, gap=recipe.model.receptive_field, batch_size=16, steps=5000, learning_rate=1.5e-3, hold=0.0,
        finish=True, quiet=1.0,
    )  # fmt: skip


def recall() -> Recipe:
    """Associative recall on the model of `box`: on that of the demo it stalls at two pairs."""
    return replace(box(), size=64, batch_size=64, steps=20_000)


def paper() -> Recipe:
    """Copy-paste at the paper's scale: 12 layers, window 128, 4 levels, reach 1,525, about 15 M parameters."""
    model = PMNetConfig(
        hidden_size=256,
        intermediate_size=512,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=32,
        memory_size=128,
        phase_bits=7,
        initializer_gain=0.45,
        anchor_initializer_range=0.5,
    )
    return Recipe(
        model=model, steps=100_000, size=64, gap=1525, learning_rate=2e-3, muon=True, final_rate=0.01, hold=0.2,
        precision="bf16", compile=True,
    )  # fmt: skip


def lm_tiny() -> Recipe:
    """A byte language model of about 1.1 M parameters, for two CPU cores and an afternoon.

    It reads 98 MB in order, with its state carried. Attention reaches 61 bytes, and the memory has two levels.
    """
    model = PMNetConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        sliding_window=16,
        memory_size=32,
        num_memory=8,
        memory_write_period=2,
        phase_bits=7,
        initializer_gain=0.45,
        rope_theta=1e4,
    )
    return Recipe(
        model=model, steps=24_000, batch_size=16, length=256, carry=True, learning_rate=1e-2,
        silent_reads=True, muon=True, final_rate=0.05, hold=0.3, warmup=50,
    )  # fmt: skip


def lm_demo() -> Recipe:
    """A byte language model of 0.2 M parameters: `--from` can begin it with one that has learned copy-paste."""
    return replace(lm_tiny(), model=demo_model())


def lm_small() -> Recipe:
    """A byte language model of about 25 M parameters, meant for 25 minutes of one large GPU; not run yet."""
    model = PMNetConfig(
        hidden_size=384,
        intermediate_size=1024,
        num_attention_heads=6,
        num_key_value_heads=6,
        sliding_window=32,
        memory_size=64,
        phase_bits=7,
        initializer_gain=0.45,
        rope_theta=1e4,
    )
    return replace(
        lm_tiny(), model=model, steps=12_000, batch_size=64, length=1024, learning_rate=1e-3, precision="bf16"
    )


def lm_30m() -> Recipe:
    """The smaller published variant with its published optimizer."""
    return Recipe(model=pmnet_30m(), steps=100_000, batch_size=16, length=1024, precision="bf16", compile=True)


def lm_119m() -> Recipe:
    """The published model; 18.8 billion bytes in all."""
    return Recipe(model=pmnet_119m(), steps=143_433, batch_size=32, length=4096, precision="bf16", compile=True)


MODELS = {"demo": demo_model, "30m": pmnet_30m, "119m": pmnet_119m}
RECIPES: dict[str, dict[str, Callable[[], Recipe]]] = {
    "lm": {"tiny": lm_tiny, "demo": lm_demo, "small": lm_small, "30m": lm_30m, "119m": lm_119m},
    "copy-paste": {"demo": partial(demo, 8), "box": box, "box-finish": box_finish, "paper": paper},
    "selective-copy": {"demo": partial(demo, 16)},
    "recall": {"demo": recall},
    "lookup": {"demo": partial(demo, 50)},
    "needle": {"demo": partial(demo, 1024)},
}
