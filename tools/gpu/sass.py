"""What a compiled kernel costs: its registers, its stack, and the instructions of its loop.

`nvdisasm` and `cuobjdump` come with Triton."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

PIPES = {  # which unit of a multiprocessor executes an opcode; what is not named here is counted as "alu"
    "fma": ("FADD", "FMUL", "FFMA", "FADD2", "FMUL2", "FFMA2", "HADD2", "HFMA2", "HMUL2"),
    "heavy": ("IMAD",),
    "xu": ("F2I", "FRND", "MUFU", "I2F", "F2F"),
    "fp64": ("DADD", "DMUL", "DFMA", "DSETP", "DMNMX"),
    "load": ("LDG",),
    "add": ("RED", "REDG", "ATOM", "ATOMG"),
    "local": ("LDL", "STL"),
    "other": ("BRA", "BSSY", "BSYNC", "EXIT", "NOP", "WARPSYNC", "MOV", "CS2R", "S2R", "LDS", "STS", "LDC", "STG"),
}
PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes}


class Cost(NamedTuple):
    "What a kernel costs."

    registers: int  # of a lane
    stack: int  # bytes
    before: int  # instructions before the loop
    loop: int  # instructions of the loop
    after: int
    pipes: dict[str, int]  # instructions of the loop, by the unit that executes them


@cache
def program(name: str) -> str:
    "Find a program of Triton's."
    import triton

    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def run(name: str, *arguments: str) -> str:
    return subprocess.run([program(name), *arguments], capture_output=True, text=True, check=True).stdout


def disassemble(path: Path) -> tuple[list[str], dict[str, int]]:  # opcodes with their targets, and labels
    "List the instructions of a cubin."
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in run("nvdisasm", "-c", str(path)).splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?)\s*;", line):
            code.append(found[1])
    return code, labels


def opcode(instruction: str) -> str:
    return re.split(r"[.\s]", instruction, maxsplit=1)[0]


def find_loop(code: list[str], labels: dict[str, int]) -> tuple[int, int]:  # first and last instruction
    "Find the longest of the innermost loops that touch the memory of the GPU; without a loop, all is one turn."
    loops = []
    for last, instruction in enumerate(code):
        target = re.search(r"^BRA\b.*\((\.L_x_\d+)\)", instruction)
        first = labels[target[1]] if target else last
        if first < last - 4 and any(PIPE_OF.get(opcode(x)) in ("load", "add") for x in code[first:last]):
            loops.append((first, last))
    inner = [a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)]
    return max(inner, key=lambda loop: loop[1] - loop[0], default=(0, len(code) - 1))


def cost_of(cubin: bytes) -> Cost:
    "Look at a compiled kernel."
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        code, labels = disassemble(path)
        usage = run("cuobjdump", "-res-usage", str(path))
    first, last = find_loop(code, labels)
    end = next((i for i in range(last, len(code)) if opcode(code[i]) == "EXIT"), len(code))
    pipes = Counter(PIPE_OF.get(opcode(instruction), "alu") for instruction in code[first : last + 1])
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return Cost(registers, stack, first, last - first + 1, end - last, dict(pipes))
