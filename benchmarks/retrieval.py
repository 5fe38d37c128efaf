"""The tables of `results/retrieval/README.md`, made of the JSON files beside it: `python -m benchmarks.retrieval`."""

from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.pages import Json, load, metrics, table

OUTSIDE = (  # models that are not in the box
    "Eight slots",
    "Short gaps",
    "Longer strings",
    "Quiet filler",
    "Four heads",
    "Twelve letters",
    "Wide window",
    "Eight heads",
    "More slots",
    "Sixty-four letters",
)
ROOT = Path(__file__).parent.parent / "results" / "retrieval"


def main() -> None:
    """Write the page."""
    (ROOT / "README.md").write_text(page(ROOT))


def page(root: Path) -> str:
    """The page for the results below `root`."""
    parts = [
        "# Retrieval",
        "Made by `python -m benchmarks.retrieval` from the files beside this page, which name their command, seed,\n"
        "commit, versions and machine. Tasks and scores are defined in [docs/tasks.md](../../docs/tasks.md).",
        *_section("The model of `models/copy-paste`", _cells(root.glob("box/*/copy-paste.json"))),
        *(
            line
            for title in OUTSIDE
            for folder in sorted(root.glob(f"{title.lower().replace(' ', '-')}/*"))
            for line in _section(
                f"{title}: a model that is not in the box, `{folder.parent.name}/{folder.name}`",
                _cells(folder.glob("**/copy-paste.json")),
            )
        ),
        *_rounds("One string after another in the same state", sorted(root.glob("rounds/*/*/copy-paste.json"))),
        *_section("A million bytes: demo preset, seed 0", _cells(root.glob("demo/million/copy-paste.json"))),
        *_seeds("Demo preset, trained from scratch", sorted(root.glob("demo/seed-*"))),
        *_seeds("Demo preset, Muon in float32", sorted(root.glob("demo-float32/seed-*"))),
        *_runs("Controls: about equal parameters, as many batches", sorted(root.glob("controls/*")), "model"),
        *_runs("Grid of rotations, seed 0", [root / "demo" / "seed-0", *root.glob("phase-bits/*")], "phase_bits"),
        *_tasks("Other tasks, demo preset", sorted(root.glob("tasks/*"))),
        *_tasks("A number in text: controls of equal size", sorted(root.glob("needle-controls/*"))),
        *_memory("How it does it", root),
    ]
    return "\n\n".join(parts) + "\n"


def _cells(paths: Any) -> list[Json]:
    return [cell | {"reach": stored["reach"]} for path in sorted(paths) for stored in [load(path)]
            for cell in stored["cells"]]  # fmt: skip


def _section(title: str, cells: list[Json]) -> list[str]:
    if not cells:
        return []
    order = sorted(cells, key=lambda c: (c["variant"], c["size"], c["distance"]))
    rows = [
        [c["variant"], str(c["size"]), f"{c['distance']:,.12g}", f"{c['distance'] / c['reach']:,.1f}",
         f"{c['strings']:,}", _percent(c["exact"]), f"{_percent(c['low'])} to {_percent(c['high'])}",
         f"{100 * c['letters']:.3f} %", "" if c["control"] is None else _percent(c["control"]["exact"])]
        for c in order
    ]  # fmt: skip
    heads = ["filler", "letters", "distance", "x reach", "strings", "exact", "95 %", "bytes right", "memory off: exact"]
    return [f"## {title}", table(heads, rows)]


def _rounds(title: str, paths: list[Path]) -> list[str]:
    """The last of several strings, per model (the folder above), place and length."""
    rows = [
        [path.parent.parent.name, str(stored["rounds"]), str(c["size"]), f"{c['distance']:,.12g}", f"{c['strings']:,}",
         _percent(c["exact"]), f"{_percent(c['low'])} to {_percent(c['high'])}", _percent(c["letters"])]
        for path in paths for stored in [load(path)] for c in stored["cells"]
    ]  # fmt: skip
    heads = ["model", "string", "letters", "distance", "strings", "exact", "95 %", "bytes right"]
    return [f"## {title}", table(heads, rows)] if rows else []


def _seeds(title: str, folders: list[Path]) -> list[str]:
    """Medians and ranges over seeds, per distance."""
    found = [load(folder / "copy-paste.json") for folder in folders if (folder / "copy-paste.json").exists()]
    if not found:
        return []
    rows = []
    for cells in zip(*(stored["cells"] for stored in found), strict=True):
        exact, off = [cell["exact"] for cell in cells], [c["control"]["letters"] for c in cells if c["control"]]
        first, reach = cells[0], found[0]["reach"]
        rows.append(
            [first["variant"], str(first["size"]), f"{first['distance']:,.12g}", f"{first['distance'] / reach:,.2f}",
             _percent(median(exact)), f"{_percent(min(exact))} to {_percent(max(exact))}",
             _percent(median(off)) if off else ""]
        )  # fmt: skip
    heads = ["filler", "letters", "distance", "x reach", "exact: median", "range", "memory off: bytes right"]
    return [
        f"## {title}",
        f"{len(found)} seeds, {found[0]['cells'][0]['strings']:,} strings each.",
        table(heads, rows),
    ]


def _runs(title: str, folders: list[Path], head: str) -> list[str]:
    """One row per run: what it saw, how long it took, exact strings by distance; in the order of `head`."""
    rows, distances = [], []
    for folder in folders:
        if not (folder / "copy-paste.json").exists():
            continue
        stored, last = load(folder / "copy-paste.json"), metrics(folder)[-1]
        distances = [f"{cell['distance']:,.12g}" for cell in stored["cells"]]
        name = f"{stored['model']['phase_bits']:2}" if head == "phase_bits" else folder.name
        rows.append([name, f"{stored['parameters']:,}", f"{last['bytes'] / 1e6:.2f} MB", f"{last['step']:,}",
                     f"{last['seconds']:.0f} s", *(_percent(cell["exact"]) for cell in stored["cells"])])  # fmt: skip
    heads = [head, "parameters", "bytes seen", "steps", "training", *(f"exact at {d}" for d in distances)]
    return [f"## {title}", table(heads, sorted(rows))] if rows else []


def _tasks(title: str, folders: list[Path]) -> list[str]:
    rows = []
    for folder in folders:
        config, last = load(folder / "config.json"), metrics(folder)[-1]
        plan = config["recipe"]
        for stored in (load(path) for path in sorted(folder.glob("*.json")) if path.name != "config.json"):
            text = Path(stored["text"] or "").stem
            rows += [
                [stored["task"], config["architecture"], f"{plan['size']:,}", f"{plan['steps']:,}",
                 f"{last['bytes'] / 1e6:.1f} MB", c["variant"], text, f"{c['size']:,}",
                 f"{c['distance']:.12g}", f"{c['strings']:,}", _percent(c["exact"]), _percent(c["letters"]),
                 "" if c["control"] is None else _percent(c["control"]["letters"])]
                for c in stored["cells"]
            ]  # fmt: skip
    heads = ["task", "model", "trained up to", "steps", "bytes seen", "variant", "text", "size", "depth", "answers",
             "exact", "bytes right", "memory off: bytes right"]  # fmt: skip
    return [f"## {title}", table(heads, rows)] if rows else []


def _memory(title: str, root: Path) -> list[str]:
    parts = []
    for path in sorted(root.glob("*/**/memory.json")):
        stored = load(path)
        rows = [
            [str(index), f"{level['letters']['groups_visited']} of {level['groups']}",
             f"{level['letters']['mean_theta_radians']:.2f}", f"{level['filler']['mean_theta_radians']:.2f}",
             _percent(level["letters"]["turned"]), _percent(level["filler"]["turned"]), _percent(level["same_group"]),
             " / ".join(_percent(share) for share in level["same_slot"]),
             f"{_percent(level['drift_phases'])} by {level['drift_bytes']:,} bytes"]
            for index, level in enumerate(stored["levels"])
        ]  # fmt: skip
        heads = ["level", "groups visited", "mean angle, letters (rad)", "filler (rad)", "turned by a letter",
                 "by a filler byte", "same group", "same slot", "phases that filler turned"]  # fmt: skip
        without = [[name, *map(_percent, right.values())] for name, right in stored["without"].items()]
        parts.append(f"### {path.parent.relative_to(root)}, strings of {stored['size']}")
        parts += [table(heads, rows), table(["set to zero", "exact", "bytes right"], without), *_slots(stored)]
    return [f"## {title}", *parts] if parts else []


def _slots(stored: Json) -> list[str]:
    """Which letters share a slot, of every level that letters turn, and in how many strings each is right."""
    found = [
        [str(index), f"{group}.{slot}", ", ".join(str(n + 1) for n in letters),
         ", ".join(f"{level['places'][n]['weight']:.2f}" for n in letters),
         ", ".join(f"{100 * stored['right'][n]:.1f} %" for n in letters)]
        for index, level in enumerate(stored["levels"]) if level["letters"]["turned"] > 0
        for group, slot in sorted({(p["group"], p["slot"]) for p in level.get("places", []) if p["turned"] > 0.01})
        for letters in [[n for n, p in enumerate(level["places"]) if (p["group"], p["slot"]) == (group, slot)]]
    ]  # fmt: skip
    heads = ["level", "group.slot", "letters that mostly turn it", "mean weight of each", "right, of each"]
    return [table(heads, found)] if found else []


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


if __name__ == "__main__":
    main()
