"""The GPU kernels executed on compiled PTX (see tools/gpu): all that `test_triton.py` can test without a GPU, and that a
wrong access is found."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from tools.gpu.memory import BadAccess, Memory, bytes_of
from tools.gpu.ptx import Unsupported, meaning_of, parse_instruction

ROOT = Path(__file__).parents[1]


def run(*arguments: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    "Run Python in a process of its own: Triton decides on its first import whether it compiles."
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)]), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, *arguments], env=environment, cwd=folder, capture_output=True, text=True)


RENDER = """
from tools.gpu.driver import install
from tools.gpu.emulator import Emulator
emulator = Emulator()
install(emulator)
import torch
from diffdrr.kernels import reference
from diffdrr.kernels.gpu import siddon
from diffdrr.kernels.request import Rays, Rule
shape, rule = torch.tensor([3, 40, 2]), Rule("siddon", width=9)
target = torch.rand(1, 153, 3) * shape + 0.5 * shape
rays = Rays(-shape.expand_as(target).to(target), target, torch.ones(1, 153))
volume = torch.rand(1, *shape)
picture, truth = siddon.render(volume, rays, rule), reference.render(volume.double(), rays.map(torch.Tensor.double), rule)
print((picture - truth).abs().max().item() / truth.max().item(), emulator)
"""


def test_a_picture():
    "A small one: 17 x 9 rays, which stick out of a tile to all sides, in two parts each."
    done = run("-c", RENDER)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[0]) < 2e-5
    assert "8 programs" in done.stdout and int(re.search(r"(\d+) accesses checked", done.stdout)[1]) > 1000


@pytest.mark.slow
def test_all_that_needs_no_gpu():
    done = run("-m", "pytest", "-p", "tools.gpu.on_ptx", "-p", "no:cacheprovider", "tests/test_triton.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) > 80
    assert int(re.search(r"(\d+) accesses checked", done.stdout)[1]) > 100_000


MUTANTS = {
    "a row below the picture": ("launch", "(row < height) & ", "(row <= height) & ", "byte .* of a buffer of"),
    "a voxel beyond the last": ("siddon", "n.m.to(s.x.dtype) - 0.5)", "n.m.to(s.x.dtype) + 8.5)", "byte .* of a buf"),
    "a misaligned store": (
        "siddon",
        "tl.store(image_ptr + find_row(place, tiles)",
        "tl.store((image_ptr.to(tl.int64) + 2).to(image_ptr.dtype, bitcast=True) + find_row(place, tiles)",
        "misaligned by 2 bytes",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_access_of_a_kernel_is_found(mutant, tmp_path):
    "Break a line of a copy of the kernels."
    module, old, new, message = MUTANTS[mutant]
    shutil.copytree(ROOT / "diffdrr", tmp_path / "diffdrr", ignore=shutil.ignore_patterns("__pycache__"))
    path = tmp_path / "diffdrr" / "kernels" / "gpu" / f"{module}.py"
    text = path.read_text()
    assert text.count(old) >= 1, f"{old!r} is not in {path.name}: has it been rewritten?"
    path.write_text(text.replace(old, new, 1))
    done = run("-c", RENDER, folder=tmp_path)
    assert re.search(rf"BadAccess: .*{message}", done.stderr), done.stdout + done.stderr


def test_accesses_are_checked():
    memory = Memory()
    tensor = torch.arange(12, dtype=torch.float32)[2:8:2]  # elements 2, 4 and 6: five from the first to the last
    start = memory.add(bytes_of(tensor), 8)
    other = memory.add(np.zeros(64, np.uint8))
    lanes = np.array([0, 16])
    assert memory.load(start + lanes, np.dtype("f4"), "ld").tolist() == [2.0, 6.0]
    memory.add_to(start + np.array([8, 8]), np.float32([1, 2]), "red")
    assert tensor.tolist() == [2.0, 7.0, 6.0]
    memory.store(other + lanes, np.uint16([7, 9]), "st")
    for wrong, message in (
        (start + 20, "byte 20 of a buffer of 20, by 2 lanes"),
        (start - 4, "byte"),
        (other + 63, "misaligned"),
        (other + 2**40, "in no buffer"),
    ):
        with pytest.raises(BadAccess, match=message):
            memory.load(np.array([wrong, wrong]), np.dtype("f4"), "ld")


@pytest.mark.parametrize(
    ("text", "operands", "result"),
    [
        ("fma.rn.f32 %f1, %f2, %f3, %f4;", ("f4", 1 + 2**-12, 1 - 2**-12, -1.0), np.float32(-(2.0**-24))),
        ("shl.b32 %r1, %r2, %r3;", ("u4", 1, 35), 0),
        ("shr.s32 %r1, %r2, %r3;", ("i4", -8, 40), -1),
        ("div.s32 %r1, %r2, %r3;", ("i4", -7, 2), -3),
        ("rem.s32 %r1, %r2, %r3;", ("i4", -7, 2), -1),
        ("mul.wide.s32 %rd1, %r2, %r3;", ("i4", 2**30, -4), -(2**32)),
        ("max.f32 %f1, %f2, %f3;", ("f4", np.nan, 2.0), 2.0),
        ("setp.neu.f32 %p1, %f2, %f3;", ("f4", np.nan, 2.0), True),
        ("setp.ne.f32 %p1, %f2, %f3;", ("f4", np.nan, 2.0), False),
        ("cvt.rzi.s32.f32 %r1, %f2;", ("f4", 3e9), 2**31 - 1),
        ("cvt.rzi.s32.f32 %r1, %f2;", ("f4", -1.7), -1),
        ("cvt.rmi.f32.f32 %f1, %f2;", ("f4", -1.2), -2.0),
    ],
    ids=str,
)
def test_instructions(text, operands, result):
    kind, *values = operands
    with np.errstate(all="ignore"):
        found = meaning_of(parse_instruction(text.rstrip(";"))).function(*(np.array([v], kind) for v in values))
    assert found[0] == result


def test_an_instruction_that_is_not_known_is_named():
    with pytest.raises(Unsupported, match="sin.approx.f32"):
        meaning_of(parse_instruction("sin.approx.f32 %f1, %f2"))
