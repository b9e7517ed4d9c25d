"""What the kernels may cost: `costs.csv` says what each costs now, on each architecture, and no more is allowed.

A turn of the loop is some steps of a ray: slabs (Siddon), pieces (exact) or samples. Versions of Triton differ by some
instructions; what is more than `SLACK` has to be looked at. A change that is meant is stored, and read in the diff.

Usage: python -m tools.gpu.budgets [--arch 90] [--only Siddon]   compare with the table
       python -m tools.gpu.budgets --store                       write the table anew"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator
from pathlib import Path

from .sass import Cost, cost_of

TABLE = Path(__file__).with_name("costs.csv")
ARCHS = (80, 89, 90, 120)
SLACK = 0.05
MORE_REGISTERS = 8  # the step in which an SM hands them out
UNITS = ("alu", "fma", "heavy", "xu", "fp64", "load", "add", "local", "other")
COUNTS = ("registers", "stack", "before", "loop", "after")
ODD = ("one ray", "one sample", "unaligned", "given ends", "finer", " float16")  # cost what others cost


def measure(arch: int, only: str = "") -> Iterator[tuple[str, Cost]]:
    "Compile every call for an architecture, and look at what came out."
    from .driver import Launch, install

    launches: list[Launch] = []
    install(launches.append, arch)
    from .calls import calls

    for name, call in calls().items():
        if only in name and not any(word in name for word in ODD):
            launches.clear()
            call()
            yield name, cost_of(launches[-1].kernel.asm["cubin"])


def read() -> dict[tuple[int, str], Cost]:  # by architecture and call
    "Read the table."
    with TABLE.open(newline="") as file:
        return {
            (int(row["arch"]), row["call"]): Cost(
                *(int(row[name]) for name in COUNTS), {unit: int(row[unit]) for unit in UNITS}
            )
            for row in csv.DictReader(file)
        }


def store(costs: dict[tuple[int, str], Cost]) -> None:
    "Write the table."
    temporary = TABLE.with_suffix(".new")
    with temporary.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["arch", "call", *COUNTS, *UNITS])
        for (arch, name), cost in sorted(costs.items()):
            counts = [getattr(cost, count) for count in COUNTS]
            writer.writerow([arch, name, *counts, *(cost.pipes.get(unit, 0) for unit in UNITS)])
    temporary.replace(TABLE)


def faults(name: str, cost: Cost, allowed: Cost | None) -> list[str]:
    "Say what is more than the table allows."
    found = [f"{name}: {cost.pipes['local']} accesses to local memory in the loop"] if cost.pipes.get("local") else []
    if allowed is None:
        return [*found, f"{name} is not in {TABLE.name}: python -m tools.gpu.budgets --store"]
    if cost.loop > (1 + SLACK) * allowed.loop:
        found.append(f"{name}: {cost.loop} instructions in a turn of the loop, not {allowed.loop}")
    if cost.registers > allowed.registers + MORE_REGISTERS:
        found.append(f"{name}: {cost.registers} registers, not {allowed.registers}")
    if cost.stack > allowed.stack:
        found.append(f"{name}: {cost.stack} bytes of stack, not {allowed.stack}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.budgets", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHS, help="compute capabilities times ten")
    parser.add_argument("--only", default="", help="only calls whose name has this text")
    parser.add_argument("--store", action="store_true", help="write the table")
    chosen = parser.parse_args()
    table = read() if TABLE.exists() else {}
    whole = not chosen.only and set(chosen.arch) == set(ARCHS)
    measured = {(arch, name): cost for arch in chosen.arch for name, cost in measure(arch, chosen.only)}
    if chosen.store:
        store(measured if whole else table | measured)
        return
    for (arch, name), cost in measured.items():
        print(f"sm_{arch} {name}: {cost.registers} registers, {cost.loop} instructions in a turn, {cost.pipes}")
    sys.exit("\n".join(f"sm_{a} {x}" for (a, n), c in measured.items() for x in faults(n, c, table.get((a, n)))) or 0)


if __name__ == "__main__":
    main()
