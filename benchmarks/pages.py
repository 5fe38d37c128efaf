"""What the pages made of stored results share."""

import json
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, right-aligned."""
    lines = [heads, ["---:"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def load(path: Path) -> Json:
    """A stored result."""
    loaded: Json = json.loads(path.read_text())
    return loaded


def metrics(folder: Path) -> list[Json]:
    """The rows of a training run."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
