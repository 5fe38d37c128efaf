"""What a position costs: arithmetic, functions, weights and traffic of every part, counted from the configuration.

Two formulations of the same model are counted side by side. *Published* projects the values of all N slots and mixes
them, and its attention is a T x T product under a mask. *Ours* mixes the slots first and projects the mixture once
(values are linear), and attends to W keys.

Counted, per position: 2 FLOP per multiply-add of every matrix product, of attention scores and of the mixing of values;
2 FLOP (difference, sum) per phase of every memory score; and, apart from these, calls of tanh, sin, cos and exp. Not
counted: norms, biases, residual sums, rotary angles, the scan's one addition per phase.

Symbols: D hidden size, I MLP width, V vocabulary, H query heads, K key/value heads, E head_dim, W window, T length,
N slots, M phases, R read heads, L levels, P layers per level, G groups of a level.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from pmnet.config import PMNetConfig

FLOAT_BYTES = 4
TRAINING_FACTOR = 3  # forward, gradient of the inputs, gradient of the weights


@dataclass(frozen=True)
class Work:
    """Work of one position in one layer."""

    flops: int
    functions: int = 0  # calls of tanh, sin, cos, exp


@dataclass(frozen=True)
class Part:
    """One part of the model: how many layers have it, what it costs in one of them, how many weights it has there."""

    name: str
    layers: int
    published: Work
    ours: Work
    parameters: int


def parts(config: PMNetConfig, length: int | None = None) -> list[Part]:
    """All parts of the model, every parameter in exactly one of them.

    Args:
        config: the model.
        length: T; the published attention then pays for T keys a position, ours for min(W, T). None: W keys in both,
            which is also what one step of decoding costs.

    Returns:
        Every layer has the parts of attention, read and MLP; the first layer of a level also has a write.
    """
    anchors = config.num_groups * config.num_memory * config.memory_size
    return [
        _projections(config),
        _window_attention(config, length),
        _write(config),
        *_read(config),
        _mlp(config),
        _head(config),
        Part("anchors", 1, Work(0), Work(0), anchors),
    ]


def _projections(config: PMNetConfig) -> Part:
    """Queries and output `4 D H E`, keys and values `4 D K E`.

    Weights: half of that, the norm before them `D`, the norms of query and key heads `2 E`.
    """
    heads = config.num_attention_heads + config.num_key_value_heads
    weights = 2 * config.hidden_size * heads * config.head_dim
    norms = config.hidden_size + 2 * config.head_dim
    work = Work(2 * weights)
    return Part("attention projections", config.num_hidden_layers, work, work, weights + norms)


def _window_attention(config: PMNetConfig, length: int | None) -> Part:
    """Scores and mixing, `4 H E` FLOP and H exp per key: W keys; the published form T keys."""

    def over(keys: int) -> Work:
        heads = config.num_attention_heads
        return Work(4 * heads * config.head_dim * keys, heads * keys)

    window = config.sliding_window if length is None else min(config.sliding_window, length)
    return Part("window attention", config.num_hidden_layers, over(length or window), over(window), 0)


def _write(config: PMNetConfig) -> Part:
    """`2 D M` query, `4 N M M` keys, `2 D M + 2 M M` rotation, `2 N M` scores.

    Functions: `2 M` tanh of query and rotation, `N M` tanh of keys, `N M` cos and N exp of scores, `2 N M` sin and cos
    of what the write sees. Ours takes another `2 N M` here, of what all reads of the level see.

    Weights: `2 (D M + M)` query and value, `2 M M + M` keys, `M M + M` output, the norm `D`.
    """
    width, slots, size = config.hidden_size, config.num_memory, config.memory_size
    flops = 4 * width * size + (4 * slots + 2) * size * size + 2 * slots * size
    geometry = 2 * slots * size
    functions = 2 * size + 2 * slots * size + slots + geometry
    weights = 2 * width * size + 3 * size * size + 4 * size + width
    return Part("write", config.num_levels, Work(flops, functions), Work(flops, functions + geometry), weights)


def _read(config: PMNetConfig) -> list[Part]:
    """Per layer: queries `2 D R M`; keys `4 N R M M`; scores `2 N R M`; mixing and values; output `2 R M D`.

    Values, published: project N slots `4 N R M M`, mix them `2 N R M`. Ours: mix the geometry `4 N R M`, project the
    mixture `4 R M M`. Functions: `R M` tanh of queries, `N R M` tanh of keys, `N R M` cos and `N R` exp of scores; the
    published form also takes `2 N M` sin and cos of the phases in every layer.
    """
    width, slots, size = config.hidden_size, config.num_memory, config.memory_size
    heads, layers = config.num_memory_read_heads, config.num_hidden_layers
    inner = heads * size

    def part(name: str, published: Work, ours: Work, parameters: int) -> Part:
        return Part(f"read: {name}", layers, published, ours, parameters)

    queries, output = Work(2 * width * inner, inner), Work(2 * inner * width)
    keys = Work(4 * slots * inner * size, slots * inner)
    keys_from_phases = Work(keys.flops, keys.functions + 2 * slots * size)
    scores = Work(2 * slots * inner, slots * inner + slots * heads)
    values = Work(4 * slots * inner * size + 2 * slots * inner)
    mixed_first = Work(4 * slots * inner + 4 * inner * size)
    projection = 2 * size * inner + inner
    return [
        part("queries", queries, queries, width * inner + inner + width),
        part("keys", keys_from_phases, keys, projection),
        part("scores", scores, scores, 0),
        part("values", values, mixed_first, projection),
        part("output", output, output, inner * width + width),
    ]


def _mlp(config: PMNetConfig) -> Part:
    """`6 D I`, and I exp of the gate. Weights: half of that, and the norm `D`."""
    weights = 3 * config.hidden_size * config.intermediate_size
    work = Work(2 * weights, config.intermediate_size)
    return Part("MLP", config.num_hidden_layers, work, work, weights + config.hidden_size)


def _head(config: PMNetConfig) -> Part:
    """Logits `2 D V`; the final norm, and the embedding, which is the head's own matrix where they are tied."""
    matrix, copies = config.hidden_size * config.vocab_size, 1 if config.tie_word_embeddings else 2
    work = Work(2 * matrix)
    return Part("embedding and head", 1, work, work, copies * matrix + config.hidden_size)


def flops(config: PMNetConfig, length: int | None = None, published: bool = False) -> int:
    """FLOP of one position, forward; training takes `TRAINING_FACTOR` times that."""
    return _total(parts(config, length), lambda part: (part.published if published else part.ours).flops)


def parameters(config: PMNetConfig) -> int:
    """Parameters of the model."""
    return _total(parts(config), lambda part: part.parameters)


def state_bytes(config: PMNetConfig) -> dict[str, int]:
    """What one sequence keeps: int32 phases `4 N M` per group, keys and values `2 (W - 1) K E` per layer."""
    past = 2 * (config.sliding_window - 1) * config.num_key_value_heads * config.head_dim
    phases = config.num_groups * config.num_memory * config.memory_size
    window = config.num_hidden_layers * past * FLOAT_BYTES
    return {"phases": 4 * phases, "keys and values": window, "total": 4 * phases + window}


def decode_bytes(config: PMNetConfig, batch: int = 1) -> dict[str, int]:
    """What one step of decoding must read, for `batch` sequences together.

    All weights once, except anchors (and a separate embedding, of which a step reads one row); of the anchors and of
    every sequence's phases one group per level, at most all G; the keys and values of every sequence.
    """
    group = config.num_memory * config.memory_size
    fixed = sum(part.layers * part.parameters for part in parts(config) if part.name != "anchors")
    if not config.tie_word_embeddings:
        fixed -= config.vocab_size * config.hidden_size
    visited = sum(min(batch, config.groups_of(level)) for level in range(config.num_levels))
    counts = {
        "weights": fixed * FLOAT_BYTES,
        "visited anchors": visited * group * FLOAT_BYTES,
        "visited phases": batch * config.num_levels * group * 4,
        "keys and values": batch * state_bytes(config)["keys and values"],
    }
    return counts | {"total": sum(counts.values())}


def facts(config: PMNetConfig, length: int | None = None) -> dict[str, Any]:
    """Everything counted, ready for JSON: FLOP and functions per position, weights and traffic in bytes (float32)."""
    counted = parts(config, length)
    sums = {
        "published": _total(counted, lambda part: part.published.flops),
        "ours": _total(counted, lambda part: part.ours.flops),
    }
    return {
        "length": length,
        "parts": [
            {
                "part": part.name, "layers": part.layers, "weight_bytes": FLOAT_BYTES * part.layers * part.parameters,
                "flops": {"published": part.layers * part.published.flops, "ours": part.layers * part.ours.flops},
                "functions": {
                    "published": part.layers * part.published.functions, "ours": part.layers * part.ours.functions,
                },
            }
            for part in counted
        ],
        "forward_flops": sums,
        "training_flops": {name: TRAINING_FACTOR * count for name, count in sums.items()},
        "functions": {
            "published": _total(counted, lambda part: part.published.functions),
            "ours": _total(counted, lambda part: part.ours.functions),
        },
        "weight_bytes": FLOAT_BYTES * parameters(config),
        "decode_bytes": decode_bytes(config),
        "state_bytes": state_bytes(config),
    }  # fmt: skip


def tables(config: PMNetConfig, length: int | None = None) -> list[Table]:
    """The counts of `facts` to look at: one table of parts, one of decoding."""
    counted = facts(config, length)
    where = "any length, W keys" if length is None else f"T = {length:,}"
    work = Table(
        title=f"per position, forward, all layers together ({where})",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    titles = (
        "part", "layers", "weights\nMB", "paper's\nMFLOP", "ours\nMFLOP", "paper's\nfunct.", "ours\nfunct."
    )  # fmt: skip
    for title in titles:
        work.add_column(title, justify="left" if title == "part" else "right", no_wrap=title == "part")

    def row(name: str, layers: str, weights: int, work_of: dict[str, int], functions: dict[str, int] | None) -> None:
        calls = [f"{functions[who]:,}" if functions else "" for who in ("published", "ours")]
        figures = [f"{work_of[who] / 1e6:,.2f}" for who in ("published", "ours")]
        work.add_row(name, layers, f"{weights / 1e6:,.2f}" if weights else "", *figures, *calls)

    for part in counted["parts"]:
        row(part["part"], str(part["layers"]), part["weight_bytes"], part["flops"], part["functions"])
    work.add_section()
    row("forward", "", counted["weight_bytes"], counted["forward_flops"], counted["functions"])
    row(f"training ({TRAINING_FACTOR} x)", "", 0, counted["training_flops"], None)

    traffic = Table(title="one sequence, float32, MB")
    traffic.add_column("what")
    traffic.add_column("MB", justify="right")
    for title, key in (("a decode step reads", "decode_bytes"), ("state", "state_bytes")):
        for name, count in counted[key].items():
            traffic.add_row(f"{title}: {name}", f"{count / 1e6:,.3f}")
        traffic.add_section()
    return [work, traffic]


def _total(counted: list[Part], of: Callable[[Part], int]) -> int:
    return sum(part.layers * of(part) for part in counted)
