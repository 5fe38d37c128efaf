"""The CPU kernels are compiled once, kept whole, and done without where there is no compiler."""

import hashlib
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from pmnet.ops import int8, native, write
from pmnet.ops.linear import MAX_DEPTH
from pmnet.ops.native import library
from pmnet.ops.phase import MOST_SLOTS

PROGRAM = """
import torch, pmnet
from pmnet.ops import use_backend
from tests.conftest import random_ids, small_model
try:
    with use_backend("native"): print("native")
except RuntimeError as error:
    print(error)
with torch.no_grad():
    print(small_model()(random_ids(1, 9)).logits.isfinite().all().item())
"""


def run_program(compiler, cache):
    environment = os.environ | {"CXX": str(compiler), "XDG_CACHE_HOME": str(cache)}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)


def compiler_script(path, line):
    path.write_text(f"#!/bin/sh\n{line}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def quick(tmp_path):
    """A compiler that is done at once: its result is the library of this process. It counts its calls."""
    if not Path(library()._name).exists():
        pytest.skip("this machine keeps no compiled kernels")
    built = shlex.quote(library()._name)
    lines = f'echo "$1" >> {tmp_path}/calls; test "$1" = --version && exit; for last; do :; done; cp {built} "$last"'
    return compiler_script(tmp_path / "quick", lines)


@pytest.mark.parametrize(
    ("name", "size"), [("PART", write._PART), ("MOST_SLOTS", MOST_SLOTS), ("DEPTH", MAX_DEPTH), ("LANES", int8._LANES)]
)
def test_python_has_the_sizes_of_the_kernels(name, size):
    text = "".join(path.read_text() for path in Path(native.__file__).parent.glob("*.[ch]*"))
    assert re.findall(rf"constexpr int\w* {name} = (\d+)", text) == [str(size)]


def test_without_a_compiler_plain_torch_is_used(tmp_path):
    broken = compiler_script(tmp_path / "broken", 'test "$1" = --version || { echo no such option >&2; exit 1; }')
    for compiler, reason in ((tmp_path / "missing", "No such file"), (broken, "no such option")):
        done = run_program(compiler, tmp_path)
        assert done.stdout.splitlines() == ["the native backend needs a C++ compiler with OpenMP", "True"]
        assert done.stderr.count("CPU kernels are off, plain PyTorch is used instead") == 1
        assert reason in done.stderr
    assert list(tmp_path.rglob("*.so")) == []


def test_kernels_are_compiled_once(quick, tmp_path):
    for _ in range(2):
        assert run_program(quick, tmp_path / "cache").stdout.splitlines() == ["native", "True"]
    assert (tmp_path / "calls").read_text().split() == ["--version", "-std=c++17", "--version"]
    (kernels,) = (tmp_path / "cache" / "pmnet").iterdir()
    whole = kernels.read_bytes()
    for left in (b"", whole[:-5000], whole[: len(whole) // 2]):  # as a full disk or a lost machine leaves it
        kernels.write_bytes(left)
        assert run_program(quick, tmp_path / "cache").stdout.splitlines() == ["native", "True"]
        assert kernels.read_bytes() == whole


def test_a_compiler_with_other_arguments_makes_other_kernels(quick, tmp_path):
    for compiler in (quick, f"{quick} -DNOTHING"):
        assert run_program(compiler, tmp_path / "cache").stdout.splitlines() == ["native", "True"]
    assert len(list((tmp_path / "cache" / "pmnet").iterdir())) == 2


def test_kernels_are_built_where_nothing_can_be_kept(quick, tmp_path):
    (tmp_path / "pmnet").write_text("a file where the folder should be")
    for _ in range(2):
        done = run_program(quick, tmp_path)
        assert done.stdout.splitlines() == ["native", "True"]
        assert done.stderr.count("CPU kernels are compiled for this process alone") == 1


def test_kernels_that_cannot_be_loaded_are_compiled_again(quick, tmp_path):
    assert run_program(quick, tmp_path / "cache").stdout.splitlines() == ["native", "True"]
    (kernels,) = (tmp_path / "cache" / "pmnet").iterdir()
    good, other = kernels.read_bytes(), b"whole, and not a library"
    kernels.write_bytes(other + hashlib.sha256(other).digest())
    assert run_program(quick, tmp_path / "cache").stdout.splitlines() == ["native", "True"]
    assert kernels.read_bytes()[:1000] == good[:1000]
