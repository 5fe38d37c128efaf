"""Markdown of stored results. Every figure is read from a JSON file, none is written here."""

import json
from pathlib import Path
from statistics import median
from typing import Any

TIMED = ["contender", "parameters", "B", "T", "positions/s (range)", "time, ours = 1 (range)", "of the limit", "remark"]
MEMORY = ["contender", "parameters", "B", "T", "model, MiB", "peak, MiB", "difference, MiB"]
LIMITS = {
    "matmul_gflops": "GFLOP/s, float32 matrix product",
    "read_gbs": "GB/s, reading memory",
    "copy_gbs": "GB/s, copying memory (read and written)",
}
STREAM = ["bytes read", "bytes/s", "resident, MiB"]
SUMMARY = [  # case, which of our contenders, what
    ("prefill", "ours", "prefill, 1,024 bytes"),
    ("prefill-long", "ours", "prefill, 16,384 bytes or what time allowed, which may be less for the published form"),
    ("train", "ours", "training step"),
    ("train", "ours-checkpointed", "training step, activations computed again"),
    ("decode", "ours", "decode, one stream"),
    ("decode-int8", "ours-int8", "decode, 8-bit weights"),
    ("memory", "ours", "training memory beyond the model, times less"),
    ("memory", "ours-checkpointed", "the same, activations computed again"),
    ("scan", "ours", "write of a level alone"),
    ("read", "ours", "read of a layer alone"),
]


def write_table(folder: Path) -> Path:
    """Write `folder/README.md` from all its results; returns its path.

    Raises:
        ValueError: if there are none.
    """
    paths = sorted(folder.glob("*.json"))
    sections = [section(path) for path in paths if "case" in json.loads(path.read_text())]
    if not sections:
        raise ValueError(f"no results of pmnet bench in {folder}")
    head = "# Benchmarks\n\nWritten by `pmnet bench --table` from the JSON files beside it, which hold every sample.\n"
    target = folder / "README.md"
    target.write_text("\n".join([head, *summary(folder), "", *sections]))
    return target


def summary(folder: Path) -> list[str]:
    """How many times faster than the published formulation, by case and preset; empty where it was not measured."""
    presets = [name for name in ("demo", "30m", "119m") if any(folder.glob(f"*-{name}.json"))]
    rows = [
        [f"`{case}`", what, *(_times(folder / f"{case}-{preset}.json", name) for preset in presets)]
        for case, name, what in SUMMARY
    ]
    return _markdown(["case", "times faster", *presets], [row for row in rows if any(row[2:])])


def _times(path: Path, name: str) -> str:
    """Of one of our contenders, round by round; a ratio of bytes for the case `memory`."""
    rows = {row["contender"]: row for row in json.loads(path.read_text())["rows"]} if path.exists() else {}
    ours, published = rows.get(name), rows.get("published")
    if ours is None or published is None:
        return ""
    if "difference_bytes" in ours:
        return f"{published['difference_bytes'] / ours['difference_bytes']:.1f}x"
    each, other = ([seconds / row["length"] for seconds in row["seconds"]] for row in (ours, published))
    return f"{median(b / a for a, b in zip(each, other, strict=True)):.1f}x"


def section(path: Path) -> str:
    """One stored result as Markdown: heading, machine, table, and what was left out."""
    result = json.loads(path.read_text())
    machine, commit = result["machine"], result["commit"] or "unknown"
    version = commit[:12] + ("+changes" if commit.endswith("+changes") else "")
    where = machine["accelerator"] if result["device"] == "cuda" else machine["processor"]
    lines = [
        f"## {result['case']}, {result['preset']}",
        "",
        result["description"],
        "",
        f"{where}, {machine['threads']} threads, commit {version}, {result['date'][:10]}.{_limit(result)}",
        "",
    ]
    rows = {"memory": _memory, "stream": _stream}.get(result["kind"], _timed)(result)
    lines += _markdown(*rows)
    lines += [f"\nNot measured: {entry['contender']} ({entry['reason']})." for entry in result["left_out"]]
    lines += _verdict(result) if "verdict" in result else []
    return "\n".join(lines) + "\n"


def _timed(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    def cells(row: dict[str, Any]) -> list[str]:
        remarks = [row.get("remark", "")]
        remarks += ["shorter, to keep to the time budget"] if row["shortened"] else []
        return [
            row["contender"],
            f"{row['parameters']:,}" if "parameters" in row else "",
            str(row["batch"]),
            f"{row['length']:,}",
            _spread(row["positions_per_second"], ",.0f"),
            _spread(row["times_ours"], ".2f"),
            f"{row['fraction_of_limit']:.1%}",
            "; ".join(filter(None, remarks)),
        ]

    return TIMED, [cells(row) for row in result["rows"]]


def _memory(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    def cells(row: dict[str, Any]) -> list[str]:
        sizes = [f"{row[key] / 2**20:,.0f}" for key in ("resident_bytes", "peak_bytes", "difference_bytes")]
        return [row["contender"], f"{row['parameters']:,}", str(row["batch"]), f"{row['length']:,}", *sizes]

    return MEMORY, [cells(row) for row in result["rows"]]


def _stream(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    rows = [
        [f"{row['bytes']:,}", f"{row['bytes_per_second']:,.0f}", f"{row['resident_bytes'] / 2**20:,.1f}"]
        for row in result["rows"]
    ]
    return STREAM, rows


def _verdict(result: dict[str, Any]) -> list[str]:
    verdict = result["verdict"]
    phases, state = ("equal" if verdict[key] else "NOT equal" for key in ("memory_equal", "state_equal"))
    return [
        "",
        f"Read in calls of {result['finer_chunk']:,} bytes: after the first row, resident memory grew by "
        f"{verdict['resident_growth']:.1%}, and the last row was read at {verdict['last_rate_over_first']:.2f} times "
        f"the rate of the first. In calls of {result['chunk']:,} bytes: {verdict['coarse_resident_growth']:.1%} and "
        f"{verdict['coarse_last_rate_over_first']:.2f} times. The phases of both are {phases} to the bit and the whole "
        f"state is {state}.",
    ]


def _limit(result: dict[str, Any]) -> str:
    if result["kind"] != "timed":
        return ""
    best, what = result["limits"][result["limit"]]["best"], LIMITS[result["limit"]]
    return f" Limit: {best:,.1f} {what}."


def _markdown(titles: list[str], rows: list[list[str]]) -> list[str]:
    rule = ["---" if title in ("contender", "remark", "case", "times faster") else "---:" for title in titles]
    return ["| " + " | ".join(cells) + " |" for cells in [titles, rule, *rows]]


def _spread(figures: dict[str, float], form: str) -> str:
    return f"{figures['median']:{form}} ({figures['min']:{form}}-{figures['max']:{form}})"
