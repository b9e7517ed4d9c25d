"What a worker has held in memory."

from __future__ import annotations

from pathlib import Path


def most_memory() -> float:  # MB
    "Read how much this process has held at most. (The counter of getrusage begins with what its parent held.)"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))
