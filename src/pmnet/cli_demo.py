"""`pmnet demo`: a string of the user's, carried live across as much filler as time allows."""

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from pmnet.data.tasks import Filler
from pmnet.data.tasks.copy_paste import marked
from pmnet.eval.ablate import recurrence_off
from pmnet.eval.retrieval import CHUNK
from pmnet.model import PMNetCache, PMNetForCausalLM
from pmnet.model.load import load_model
from pmnet.model.tokenizer import PASTE
from pmnet.report.console import out

DEFAULT = "Hello, memory!"


def demo_command(
    model: Annotated[Path, typer.Argument(help="Folder of a model trained on copy-paste.")] = Path("models/copy-paste"),
    string: Annotated[str | None, typer.Option(help="What to remember; asked for on a terminal.")] = None,
    seconds: Annotated[float, typer.Option(min=0.0, help="How long to read filler.")] = 30.0,
    least: Annotated[int, typer.Option(min=0, help="Bytes of filler to read at least.")] = 100_000,
    filler: Annotated[str, typer.Option(help="random, constant or text.")] = "random",
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1)] = 0,
) -> None:
    """Remember a string across filler that attention cannot see over, live; and what is left without the memory."""
    network = load_model(model)
    longest: Any = getattr(network.config, "task_specific_params", None)
    for name in ("copy-paste", "size"):
        longest = longest.get(name) if isinstance(longest, dict) else None
    if type(longest) is not int or longest < 1:
        raise ValueError(f"{model} was not trained on copy-paste")
    filling = Filler(filler).draw(1, 2**40, torch.Generator().manual_seed(seed))
    if string is None:
        string = DEFAULT[:longest]
        if sys.stdin.isatty():
            string = out.input(f"A string of up to {longest} bytes to remember [{string}]: ") or string
    typed = string.encode("utf-8", "surrogateescape")
    if not 1 <= len(typed) <= longest:
        raise ValueError(f"the string must have 1 to {longest} bytes, {string!r} has {len(typed)}")
    reach = network.config.receptive_field
    out.print(f"{network.num_parameters():,} parameters; attention reaches {reach} bytes; memory {_size(network)}")

    cache, read, first, resident = PMNetCache(network.config), 0, 0, 0
    last = marked(torch.tensor([list(typed)]))
    process, started = psutil.Process(), time.monotonic()
    columns = (TextColumn("reading"), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
    with torch.no_grad(), Progress(*columns, console=out, disable=not out.is_terminal) as progress:
        network(last, past_key_values=cache, logits_to_keep=1)
        bar = progress.add_task("reading", total=1.0, text="")
        while (elapsed := time.monotonic() - started) < seconds or read < least:
            new, _ = filling.columns(read, read + CHUNK)
            network(new, past_key_values=cache, logits_to_keep=1)
            read, last = read + CHUNK, torch.cat([last, new], dim=1)[:, -CHUNK:]
            resident = process.memory_info().rss
            first = first or (resident if read >= 65_536 else 0)
            share = min((elapsed / seconds) if seconds else 1.0, read / max(1, least))
            text = f"{read:,} bytes  {read / (elapsed + 1e-9):,.0f} bytes/s  {resident / 2**20:,.0f} MiB resident"
            progress.update(bar, completed=share, text=text)
        elapsed = time.monotonic() - started
        recalled = answer(network, cache, longest)
        with recurrence_off(network):  # knows nothing beyond the attention's reach: the last bytes are enough
            forgotten = PMNetCache(network.config)
            network(last, past_key_values=forgotten, logits_to_keep=1)
            control = answer(network, forgotten, longest)
    growth = f"; resident memory {(resident - first) / 2**20:+.1f} MiB since the first 64 KiB" if first else ""
    out.print(
        f"{read:,} bytes of {filler} filler in {elapsed:.0f} s ({read / elapsed:,.0f} bytes/s), "
        f"{read / reach:,.0f} times the reach{growth}"
    )
    for name, said in (("you typed", typed), ("memory on", recalled), ("memory off", control)):
        verdict = "" if name == "you typed" else ("  exact" if said == typed else "  wrong")
        out.print(f"{name:>10}: {said.decode('utf-8', 'backslashreplace')!r}{verdict}")


def answer(model: PMNetForCausalLM, cache: PMNetCache, longest: int) -> bytes:
    """What the model writes, greedily, after PASTE: up to EOS, or `longest` bytes; other special ids end it too."""
    written, step = b"", torch.tensor([[PASTE]])
    for _ in range(longest + 1):
        step = model(step, past_key_values=cache).logits[:, -1].argmax(-1, keepdim=True)
        if int(step) >= 256 or len(written) == longest:
            break
        written += bytes([int(step)])
    return written


def _size(model: PMNetForCausalLM) -> str:
    phases = sum(level.numel() for level in PMNetCache(model.config).memory)
    return f"{phases:,} angles"
