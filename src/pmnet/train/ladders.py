"""The ladder of each synthetic task: which stages lead to `recipe.size`, and what the last one is made of."""

from collections.abc import Callable
from dataclasses import replace

from pmnet.data.tasks import CopyPaste, Filler, Lookup, Needle, Problem, Recall, SelectiveCopy
from pmnet.train.ladder import Ladder, Part
from pmnet.train.recipes import Recipe

LARGEST = 2**16  # greatest size, rounds and gap: an episode is trained on as a whole, and each size is a stage

Curriculum = tuple[list[Problem], list[Part]]  # stages from easy to hard, and what the last one is made of


def copy_paste(recipe: Recipe) -> Curriculum:
    """Strings of up to `recipe.size` bytes behind all kinds of filler.

    Gaps are always beyond `recipe.gap`: a target that attention can see is relayed through attention, and the memory
    is never learned. The first stages have one letter of 64 values and a single filler byte, then two, ... 32 of them;
    then the letter is any of 256 values; then the string grows, letter by letter. At last filler may be any byte too:
    one batch in eight has gaps from 0 up, and one in four has long gaps (in a quarter of the rows): without these, a
    model may learn to hold a string only about as long as it was trained to. A `recipe.finish` has no stages, and gaps
    within, just beyond and far beyond the reach in equal parts; with `recipe.rounds`, as often each number of strings.
    """
    size, reach = recipe.size, recipe.gap
    _check("rounds", recipe.rounds)
    _check("gap (reach of the window)", reach)
    every = (Filler(), Filler(), Filler("constant"), Filler("text"))
    near, beyond, far = (0, reach), (reach, reach + 6), (reach, reach + 4 * (2 * size + 4 + reach))
    if recipe.finish:
        strings = (((1, min(4, size)), 0.25), ((1, size), 0.25), ((size, size), 0.5))
        gaps = (((0, 4), 1 / 6, 1.0), (near, 1 / 6, 1.0), (beyond, 1 / 3, 1.0), (far, 1 / 3, 1 / 4))
        rounds = range(1, recipe.rounds + 1)
        return [], [
            Part(CopyPaste(k, g, every, rounds=n), w * v, rows / n)
            for n in rounds
            for k, w in strings
            for g, v, rows in gaps
        ]
    alphabets = [CopyPaste((1, 1), (reach, reach + n), (Filler(least=256 - 2**n),), 64) for n in range(6)]
    few = (Filler(least=224),)
    letters = [CopyPaste((1, 1), beyond, few, values) for values in (128, 256)]
    lengths = [CopyPaste((k, k), beyond, few) for k in range(2, size + 1)]
    mixture = [
        part
        for shortest, weight in ((1, 0.3), (size, 0.7))
        for part in (
            Part(CopyPaste((shortest, size), near, every), weight / 8),
            Part(CopyPaste((shortest, size), far, every), weight / 4, rows=1 / 4),
            Part(CopyPaste((shortest, size), beyond, every), weight * 5 / 8),
        )
    ]
    return [*alphabets, *letters, *lengths], mixture


def selective_copy(recipe: Recipe) -> Curriculum:
    """Up to `recipe.size` letters strewn over sixteen times as many columns; MAD's vocabulary of 16."""
    sizes = range(1, recipe.size + 1)
    stages: list[Problem] = [SelectiveCopy(k, 16 * k) for k in sizes]
    return stages, [Part(SelectiveCopy(recipe.size, 16 * recipe.size))]


def recall(recipe: Recipe) -> Curriculum:
    """Up to `recipe.size` pairs in sixteen times as many symbols, from 64 to 256 (or four times the pairs).

    One pair and then two begin with alphabets of 4, 16 and 64 symbols, of which keys and values both are: a model that
    need not look at the key to tell a value learns to keep values, and not which key they belong to. Questions stand
    anywhere: those that attention can see over would teach nothing. The last stage has Zoology's early questions too.
    """
    doubled = {m << n for m in (1, 3) for n in range(recipe.size.bit_length())}
    sizes = [*sorted(pairs for pairs in doubled if 2 < pairs < recipe.size), recipe.size] if recipe.size > 2 else []
    few = [Recall(64, n, power=1.0, symbols=symbols, mixed=True) for n in (1, 2) for symbols in (4, 16, 64, None)]
    grown = [Recall(max(64, min(256, 16 * pairs), 4 * pairs), pairs, power=1.0) for pairs in sizes]
    return [*few, *grown], [Part(replace(problem, power=power)) for problem in grown for power in (0.01, 1.0)]


def lookup(recipe: Recipe) -> Curriculum:
    """Strings of up to `recipe.size` bytes, suffix and prefix keys of three letters in turns."""
    sizes = [4, *range(6, recipe.size + 1, 4)]
    keys = ("prefix", "suffix")
    stages: list[Problem] = [Lookup((4, size), key=key) for size in sizes for key in keys]
    return stages, [Part(Lookup((4, recipe.size), key=key)) for key in keys]


def needle(recipe: Recipe) -> Curriculum:
    """A number at any depth of real text of up to `recipe.size` bytes."""
    lengths = (length << n for n in range(5, recipe.size.bit_length()) for length in (3, 4))
    sizes = [*(length for length in lengths if length < recipe.size), recipe.size] if recipe.size >= 96 else []
    stages: list[Problem] = [Needle(length) for length in sizes]
    return stages, [Part(Needle(size)) for size in sizes[-1:]]


CURRICULA: dict[str, Callable[[Recipe], Curriculum]] = {
    "copy-paste": copy_paste,
    "selective-copy": selective_copy,
    "recall": recall,
    "lookup": lookup,
    "needle": needle,
}


def _check(name: str, value: int) -> None:
    if value > LARGEST:
        raise ValueError(f"{name} is at most {LARGEST:,} in training, got {value:,}")


def build_ladder(task: str, recipe: Recipe, processes: int = 1) -> Ladder:
    """The ladder of `task`, read by `processes` in turns; all stages are left by the middle of training at the latest.

    Raises:
        ValueError: if the task has no problem of `recipe.size`, or size, rounds or gap are beyond `LARGEST`.
    """
    _check("size", recipe.size)
    try:
        stages, mixture = CURRICULA[task](recipe)
    except ValueError as error:
        raise ValueError(f"size {recipe.size}: {error}") from error
    if not mixture:
        raise ValueError(f"there is nothing to learn at size {recipe.size}: this task begins at a larger one")
    return Ladder(stages, mixture, recipe.batch_size, recipe.seed, recipe.steps // 2, processes=processes)
