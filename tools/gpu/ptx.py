"""What PTX says: instructions, and what each does to 128 lanes of numpy.

The PTX instruction set is NVIDIA's "Parallel Thread Execution ISA". What the kernels of this package are compiled to
is here; an instruction that is not raises `Unsupported`."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

LABEL = re.compile(r"^(\$\w+):")
GUARD = re.compile(r"^@(!?%p\d+)\s+")
OPERANDS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^\s,{}\[\]]+")


class Unsupported(Exception):
    "An instruction without a meaning here."


class Instruction(NamedTuple):
    "One line of PTX."

    text: str
    guard: str | None  # "%p1" or "!%p1": lanes for which it is done
    name: str  # "add"
    modifiers: tuple[str, ...]  # what follows the name after dots; the type comes last
    operands: tuple[str, ...]  # the result first; "{%r1, %r2}" and "[%rd1 + 4]" are one operand

    @property
    def type(self) -> str:
        return self.modifiers[-1]


def parse_instruction(text: str) -> Instruction:
    "Take a line of PTX apart."
    guard = GUARD.match(text)
    rest = text[guard.end() :] if guard else text
    word, _, operands = rest.replace("\t", " ").partition(" ")
    name, *modifiers = word.split(".")
    found = (part.strip() for part in OPERANDS.findall(operands))
    return Instruction(text, guard and guard[1], name, tuple(modifiers), tuple(found))


class Entry(NamedTuple):
    "A kernel in PTX."

    parameters: tuple[str, ...]
    lines: tuple[str | Instruction, ...]  # labels, and instructions


def parse(ptx: str) -> Entry:
    "Read the one kernel of a PTX module."
    head, _, body = ptx[ptx.index(".entry") :].partition("\n{\n")
    lines: list[str | Instruction] = []
    for line in body[: body.index("\n}\n")].splitlines():
        line = line.partition("//")[0].strip()
        if label := LABEL.match(line):
            lines.append(label[1])
        elif line and not line.startswith((".", "{", "}")):
            lines += [parse_instruction(part.strip()) for part in line.split(";") if part.strip()]
    return Entry(tuple(re.findall(r"\w+_param_\d+", head)), tuple(lines))


def dtype_of(kind: str) -> np.dtype:
    "Return the dtype of a PTX type; plain bits are unsigned numbers."
    if kind == "pred":
        return np.dtype(bool)
    letter = {"f": "f", "s": "i"}.get(kind[0], "u")
    return np.dtype(f"{letter}{int(kind[1:]) // 8}")


class Meaning(NamedTuple):
    "What an instruction does to each lane by itself."

    function: Callable[..., np.ndarray]
    result: str  # type
    sources: tuple[str, ...]  # types of the operands after the first


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    "Multiply and add with one rounding (float32: two, the first to 53 bits)."
    wider = np.longdouble if a.dtype == np.float64 else np.float64
    return (a.astype(wider) * b + c).astype(a.dtype)


def divide_whole(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    "Divide whole numbers, rounding towards zero."
    divisor = np.where(b == 0, 1, b)
    return np.where((a < 0) != (divisor < 0), -(abs(a) // abs(divisor)), abs(a) // abs(divisor)).astype(a.dtype)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a - divide_whole(a, b) * b


def shift_left(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    bits = 8 * a.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), 0).astype(a.dtype)


def shift_right(a: np.ndarray, by: np.ndarray) -> np.ndarray:
    bits = 8 * a.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(by < bits, shifted, 0).astype(a.dtype)


def extract_bits(a: np.ndarray, start: np.ndarray, count: np.ndarray) -> np.ndarray:
    one = a.dtype.type(1)
    return (a >> start.astype(a.dtype)) & ((one << count.astype(a.dtype)) - one)


def select(a: np.ndarray, b: np.ndarray, which: np.ndarray) -> np.ndarray:
    return np.where(which, a, b)


def exchange(a: np.ndarray, distance: np.ndarray) -> np.ndarray:
    "Take the number of the lane whose index differs in some bits."
    return a[np.arange(len(a)) ^ distance.astype(int)]


def joined(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    "Make one number of two halves."
    return np.stack([low, high], axis=-1).view(f"u{2 * low.itemsize}")[:, 0]


def to_whole(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    "Round towards zero, to the nearest number that there is; NaN is 0."
    limits = np.iinfo(dtype)
    finite = np.nan_to_num(np.trunc(x.astype(np.float64)), nan=0.0, posinf=limits.max, neginf=limits.min)
    most = np.nextafter(float(limits.max), 0) if limits.bits == 64 else limits.max
    return np.where(finite >= limits.max, limits.max, np.clip(finite, limits.min, most).astype(dtype)).astype(dtype)


SIMPLE = {  # all operands are of the type that the instruction ends with
    "add": (np.add, 2),
    "sub": (np.subtract, 2),
    "abs": (np.abs, 1),
    "neg": (np.negative, 1),
    "and": (np.bitwise_and, 2),
    "or": (np.bitwise_or, 2),
    "xor": (np.bitwise_xor, 2),
    "not": (np.invert, 1),
    "mov": (np.copy, 1),
    "fma": (fused, 3),
    "sqrt": (np.sqrt, 1),
}
COMPARED = dict(lt=np.less, le=np.less_equal, gt=np.greater, ge=np.greater_equal, eq=np.equal, ne=np.not_equal)


def meaning_of(instruction: Instruction) -> Meaning:
    "Look up what an instruction does. Raises `Unsupported`."
    name, kind = instruction.name, instruction.type
    if name in SIMPLE:
        function, count = SIMPLE[name]
        return Meaning(function, kind, (kind,) * count)
    special = {
        "mul": product,
        "mad": product,
        "div": quotient,
        "rem": lambda _: Meaning(remainder, kind, (kind, kind)),
        "min": extreme,
        "max": extreme,
        "shl": lambda _: Meaning(shift_left, kind, (kind, "u32")),
        "shr": lambda _: Meaning(shift_right, kind, (kind, "u32")),
        "bfe": lambda _: Meaning(extract_bits, kind, (kind, "u32", "u32")),
        "selp": lambda _: Meaning(select, kind, (kind, kind, "pred")),
        "shfl": lambda _: Meaning(exchange, "b32", ("b32", "b32")),
        "setp": comparison,
        "cvt": conversion,
    }
    if name not in special or name == "shfl" and "bfly" not in instruction.modifiers:
        raise Unsupported(instruction.text)
    return special[name](instruction)


def product(instruction: Instruction) -> Meaning:
    "Multiply, and with `mad` add; the lower half, or with `wide` all of it."
    kind = instruction.type
    adds = instruction.name == "mad"
    if "wide" not in instruction.modifiers:
        if kind[0] != "f" and "lo" not in instruction.modifiers:
            raise Unsupported(instruction.text)
        return Meaning((lambda a, b, c: a * b + c) if adds else np.multiply, kind, (kind,) * (3 if adds else 2))
    wide = f"{kind[0]}{2 * int(kind[1:])}"
    into = dtype_of(wide)
    if adds:
        return Meaning(lambda a, b, c: a.astype(into) * b.astype(into) + c, wide, (kind, kind, wide))
    return Meaning(lambda a, b: a.astype(into) * b.astype(into), wide, (kind, kind))


def quotient(instruction: Instruction) -> Meaning:
    kind = instruction.type
    return Meaning(np.divide if kind[0] == "f" else divide_whole, kind, (kind, kind))


def extreme(instruction: Instruction) -> Meaning:
    "The smaller or the larger; a NaN counts only with `NaN`."
    kind = instruction.type
    keeps = kind[0] != "f" or "NaN" in instruction.modifiers
    table = {"min": (np.fmin, np.minimum), "max": (np.fmax, np.maximum)}
    return Meaning(table[instruction.name][keeps], kind, (kind, kind))


def comparison(instruction: Instruction) -> Meaning:
    "Compare; `ltu` and the like are true also where a number is NaN, and `ne` is false there."
    (word, *rest), kind = instruction.modifiers, instruction.type
    if set(rest) - {"ftz", kind}:
        raise Unsupported(instruction.text)
    unordered = word[:-1] in COMPARED and word.endswith("u")
    function = COMPARED[word[:-1] if unordered else word]
    if kind[0] != "f":
        return Meaning(function, "pred", (kind, kind))

    def compare(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        lost = np.isnan(a) | np.isnan(b)
        return function(a, b) | lost if unordered else function(a, b) & ~lost

    return Meaning(compare, "pred", (kind, kind))


def conversion(instruction: Instruction) -> Meaning:
    "Convert from the last type to the one before it."
    *rounding, into, kind = instruction.modifiers
    if kind == "bf16":
        return Meaning(lambda x: (x.astype(np.uint32) << np.uint32(16)).view(np.float32), into, ("b16",))
    if into == "bf16":
        raise Unsupported(instruction.text)
    dtype = dtype_of(into)
    if kind[0] != "f":
        return Meaning(lambda x: x.astype(dtype), into, (kind,))
    if into[0] != "f":
        if "rzi" not in rounding:
            raise Unsupported(instruction.text)
        return Meaning(lambda x: to_whole(x, dtype), into, (kind,))
    whole = {"rmi": np.floor, "rzi": np.trunc, "rpi": np.ceil}
    to_integer = next((whole[word] for word in rounding if word in whole), None)
    return Meaning(to_integer or (lambda x: x.astype(dtype)), into, (kind,))
