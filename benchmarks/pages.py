"""What the pages made of stored results share."""

import json
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def table(heads: list[str], rows: list[list[str]], left: int = 0) -> str:
    """A Markdown table of figures; its first `left` columns are words."""
    rule = [":---"] * left + ["---:"] * (len(heads) - left)
    return "\n".join("| " + " | ".join(line) + " |" for line in (heads, rule, *rows))


def load(path: Path) -> Json:
    """A stored result."""
    loaded: Json = json.loads(path.read_text())
    return loaded


def metrics(folder: Path) -> list[Json]:
    """The rows of a training run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
