"""Compiled PTX executed on numpy, lane by lane, with a check of every access to memory.

Programs run one after the other, and the 128 lanes of each step together: what this cannot show is races between
warps, the order of memory, and time. Branches must not divide a program; in these kernels none does."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from .driver import Launch
from .memory import Memory, bytes_of
from .ptx import Entry, Instruction, Unsupported, dtype_of, joined, meaning_of, parse

LANES = 128
SHARED = 2**16  # bytes of shared memory
REGISTER = re.compile(r"^%(p|rs|rd|r|fd|f)\d+$")
BITS = {"rs": 16, "r": 32, "f": 32, "rd": 64, "fd": 64}
SPECIAL = ("%tid.x", "%ctaid.x", "%ctaid.y", "%nctaid.x", "%nctaid.y", "global_smem")
ADDRESS = re.compile(r"^\[\s*([%\w]+)\s*(?:\+\s*(-?\w+))?\s*\]$")
Step = Callable[[], None]


class Diverged(Exception):
    "Lanes of a program would go different ways."


class Registers:
    "The registers of a program, one number for each lane, and its parameters."

    def __init__(self):
        self.arrays = {name: np.zeros(LANES, np.uint32) for name in SPECIAL}
        self.arrays["%tid.x"][:] = np.arange(LANES)
        self.parameters: dict[str, np.ndarray] = {}

    def array(self, name: str) -> np.ndarray:
        "Find a register, or begin it."
        if name not in self.arrays:
            kind = REGISTER.match(name)[1]
            self.arrays[name] = np.zeros(LANES, bool if kind == "p" else f"u{BITS[kind] // 8}")
        return self.arrays[name]

    def read(self, operand: str, kind: str) -> np.ndarray:
        "View an operand in a type: a register, of which the lower bits count, a special one, or a constant."
        dtype = dtype_of(kind)
        operand = operand.strip("{} ")
        if REGISTER.match(operand) or operand in SPECIAL:
            array = self.array(operand)
            return array if array.dtype == bool else low_bits(array, dtype)
        if operand[:2] in ("0f", "0d"):
            return np.full(LANES, int(operand[2:], 16), f"u{dtype.itemsize}").view(dtype)
        if kind == "pred":
            return np.full(LANES, bool(int(operand)))
        return np.full(LANES, int(operand, 0) % 2 ** (8 * dtype.itemsize), f"u{dtype.itemsize}").view(dtype)

    def parameter(self, name: str, kind: str) -> np.ndarray:
        "View a parameter of the kernel."
        return low_bits(self.parameters.setdefault(name, np.zeros(LANES, np.uint64)), dtype_of(kind))

    def write(self, operand: str, kind: str) -> np.ndarray:
        "View the register of a result: all its bits, in a dtype that extends the type by its sign or with zeros."
        array = self.array(operand.strip("{} "))
        return array if array.dtype == bool else array.view(f"{dtype_of(kind).kind}{array.itemsize}")


def low_bits(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    "View the lower bits of numbers in another dtype."
    return array.view(dtype)[:: array.itemsize // dtype.itemsize]


class Block(NamedTuple):
    "Instructions without a branch, and where they lead."

    steps: list[Step]
    guard: np.ndarray | None  # for which lanes to go to `target`; None for all
    negated: bool
    target: str | None  # label of a block; None to go on with the next


class Program:
    "A kernel, ready to run."

    def __init__(self, entry: Entry):
        self.registers, self.memory, self.shared = Registers(), Memory(), Memory()
        self.parameters = entry.parameters
        self.labels: dict[str, int] = {}
        self.blocks: list[Block] = []
        self.instructions = 0
        self.cut(entry)

    def cut(self, entry: Entry) -> None:
        "Cut the instructions into blocks."
        steps: list[Step] = []
        for line in entry.lines:
            if isinstance(line, str):
                self.blocks.append(Block(steps, None, False, None))
                self.labels[line], steps = len(self.blocks), []
            elif line.name in ("bra", "ret"):
                guard = line.guard and self.registers.array(line.guard.lstrip("!"))
                target = line.operands[0] if line.name == "bra" else "end"
                self.blocks.append(Block(steps, guard, bool(line.guard) and line.guard[0] == "!", target))
                steps = []
            elif line.name not in ("bar", "barrier", "membar", "fence"):
                steps.append(self.step(line))
        self.blocks.append(Block(steps, None, False, "end"))
        self.labels["end"] = len(self.blocks)

    def step(self, line: Instruction) -> Step:
        "Make what carries an instruction out."
        if line.name in ("ld", "st", "atom", "red") and line.modifiers[0] != "param":
            return self.access(line)
        if line.name == "ld":
            source = self.registers.parameter(line.operands[1].strip("[]"), line.type)
            return self.assign(line, line.operands[0], line.type, np.copy, (source,))
        if line.name == "mov" and line.operands[0].startswith("{"):
            return self.take_apart(line)
        if line.name == "mov" and line.operands[1].startswith("{"):
            halves = line.operands[1].strip("{}").split(",")
            sources = tuple(self.registers.read(half, f"b{int(line.type[1:]) // 2}") for half in halves)
            return self.assign(line, line.operands[0], line.type, joined, sources)
        meaning = meaning_of(line)
        sources = tuple(self.registers.read(*pair) for pair in zip(line.operands[1:], meaning.sources))
        return self.assign(line, line.operands[0], meaning.result, meaning.function, sources)

    def assign(
        self, line: Instruction, to: str, kind: str, function: Callable, sources: tuple[np.ndarray, ...]
    ) -> Step:
        "Compute a register, in the lanes for which the instruction is done."
        result, lanes = self.registers.write(to, kind), self.lanes(line)

        def run() -> None:
            np.copyto(result, function(*sources), casting="unsafe", where=lanes())

        return run

    def lanes(self, line: Instruction) -> Callable[[], np.ndarray | bool]:
        "Tell for which lanes an instruction is done."
        if line.guard is None:
            return lambda: True
        guard = self.registers.array(line.guard.lstrip("!"))
        return (lambda: ~guard) if line.guard[0] == "!" else (lambda: guard)

    def take_apart(self, line: Instruction) -> Step:
        "Split a register into two of half its size; `_` stands for a half that is not wanted."
        half = int(line.type[1:]) // 2
        source = self.registers.read(line.operands[1], line.type)
        names = [name.strip() for name in line.operands[0].strip("{}").split(",")]
        functions = (np.copy, lambda x: x >> x.dtype.type(half))
        pairs = [(name, function) for name, function in zip(names, functions) if name != "_"]
        steps = [self.assign(line, name, f"b{half}", function, (source,)) for name, function in pairs]

        def run() -> None:
            for step in steps:
                step()

        return run

    def access(self, line: Instruction) -> Step:
        "Read, write or add to memory in the lanes for which the instruction is done."
        memory = self.shared if "shared" in line.modifiers else self.memory
        at = next(i for i, operand in enumerate(line.operands) if operand.startswith("["))
        addresses, dtype, lanes = self.addresses(line.operands[at]), dtype_of(line.type), self.lanes(line)
        everyone = np.arange(LANES)
        if line.name == "ld":
            result = self.registers.write(line.operands[0], line.type)

            def load(active: np.ndarray) -> None:
                result[active] = memory.load(addresses()[active], dtype, line.text)

            return for_active(load, lanes, everyone)
        if line.name != "st" and "add" not in line.modifiers:
            raise Unsupported(line.text)
        value = self.registers.read(line.operands[at + 1], line.type)
        change = memory.store if line.name == "st" else memory.add_to
        return for_active(lambda active: change(addresses()[active], value[active], line.text), lanes, everyone)

    def addresses(self, operand: str) -> Callable[[], np.ndarray]:
        "Find addresses: a register and a number of bytes."
        base, offset = ADDRESS.match(operand).groups()
        array, offset = self.registers.array(base), int(offset or "0", 0)
        return lambda: array.astype(np.int64) + offset

    def run(self, launch: Launch) -> None:
        "Run all programs of a launch. Raises `BadAccess` or `Diverged`."
        self.shared.clear()
        self.shared.add(np.zeros(SHARED, np.uint8))
        self.memory.clear()
        self.memory.add(np.zeros(0, np.uint8))  # nothing is at address 0
        for name, value in zip(self.parameters, launch.arguments.values()):
            if isinstance(value, torch.Tensor):
                value = self.memory.add(bytes_of(value), value.data_ptr() % 256)
            elif not isinstance(value, int):
                raise Unsupported(f"an argument of type {type(value).__name__}")
            self.registers.parameter(name, "b64")[:] = value % 2**64
        numbers = self.registers.arrays
        numbers["%nctaid.x"][:], numbers["%nctaid.y"][:] = launch.grid[:2]
        with np.errstate(all="ignore"):
            for y in range(launch.grid[1]):
                for x in range(launch.grid[0]):
                    numbers["%ctaid.x"][:], numbers["%ctaid.y"][:] = x, y
                    self.run_one()

    def run_one(self) -> None:
        "Run one program."
        number = 0
        while number < len(self.blocks):
            block = self.blocks[number]
            for step in block.steps:
                step()
            self.instructions += len(block.steps)
            goes = block.target is not None
            if goes and block.guard is not None:
                if block.guard.any() != block.guard.all():
                    raise Diverged(f"a branch to {block.target} is for some lanes only")
                goes = block.guard[0] != block.negated
            number = self.labels[block.target] if goes else number + 1


def for_active(
    act: Callable[[np.ndarray], None],  # on numbers of lanes
    lanes: Callable[[], np.ndarray | bool],
    everyone: np.ndarray,
) -> Step:
    "Act on the lanes for which an instruction is done, if there are any."

    def run() -> None:
        chosen = lanes()
        active = everyone if chosen is True else np.flatnonzero(chosen)
        if len(active):
            act(active)

    return run


class Emulator:
    "Runs launches, and counts what it did."

    def __init__(self):
        self.programs: dict[str, Program] = {}  # by the hash of their kernel
        self.launches = self.blocks = 0

    def __call__(self, launch: Launch) -> None:
        if launch.kernel.metadata.num_warps * 32 != LANES:
            raise Unsupported(f"{launch.kernel.metadata.num_warps} warps; programs must have {LANES} lanes")
        key = launch.kernel.hash
        if key not in self.programs:
            self.programs[key] = Program(parse(launch.kernel.asm["ptx"]))
        self.launches += 1
        self.blocks += launch.grid[0] * launch.grid[1]
        self.programs[key].run(launch)

    def __str__(self) -> str:
        steps = sum(program.instructions for program in self.programs.values())
        checked = sum(program.memory.accesses for program in self.programs.values())
        return (
            f"{len(self.programs)} kernels in PTX, {self.launches} launches, {self.blocks} programs, "
            f"{steps} instructions of {LANES} lanes; {checked} accesses checked"
        )
