"""What the kernels compile to, with Triton as it is installed: each call, each kind of GPU, and what the code costs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tools.gpu.budgets import ARCHS, faults, read
from tools.gpu.sass import Cost, find_loop

ROOT = Path(__file__).parents[1]


def run(module: str, *arguments: str) -> subprocess.CompletedProcess:
    "Run a tool in a process of its own: Triton decides on its first import whether it compiles."
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", f"tools.gpu.{module}", *arguments]
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)


def test_a_kernel_costs_no_more():
    "Siddon's slopes, which registration waits for, with offsets of 32 and 64 bits."
    done = run("budgets", "--arch", "90", "--only", "Siddon slopes")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHS)
def test_no_kernel_costs_more(arch):
    done = run("budgets", "--arch", str(arch))
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == sum(known == arch for known, _ in read())


def test_launches_of_odd_sizes():
    "The host's side of a launch, up to the driver: for one ray, and for one sample."
    done = run("host", "--only", "one ")
    assert done.returncode == 0 and "0 faults in 2 calls" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("arch", [80, 90, 120])
def test_all_launches(arch):
    done = run("host", "--arch", str(arch))
    assert done.returncode == 0 and "0 faults" in done.stdout, done.stdout + done.stderr


def test_what_is_more_than_the_table_allows():
    cost = Cost(64, 0, 500, 200, 10, {"fma": 64, "load": 12})
    assert faults("x", cost._replace(loop=210, registers=72), cost) == []
    (fault,) = faults("x", cost._replace(loop=211), cost)
    assert fault == "x: 211 instructions in a turn of the loop, not 200"
    (fault,) = faults("x", cost._replace(registers=73), cost)
    assert "73 registers" in fault
    (fault,) = faults("x", cost._replace(stack=8), cost)
    assert "8 bytes of stack" in fault
    (fault,) = faults("x", cost._replace(pipes={"local": 1}), cost)
    assert "local memory" in fault
    (fault,) = faults("x", cost, None)
    assert "--store" in fault


def test_the_loop_is_the_innermost_that_reads():
    code = ["MOV R1", *["FADD R0"] * 6, "LDG.E R3", *["FFMA R0"] * 5, "BRA `(.L_x_2)", "NOP", "BRA `(.L_x_1)"]
    assert find_loop(code, {".L_x_1": 1, ".L_x_2": 3}) == (3, 13)
