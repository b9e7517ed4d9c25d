"What the numbers were measured on."

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

import diffdrr

ROOT = Path(__file__).parents[1]


def cpu_model() -> str:
    "Return the name of the processor."
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def memory(key: str = "MemTotal") -> int:  # bytes
    "Read an entry of the machine's memory table."
    return next(
        int(line.split()[1]) * 1024
        for line in Path("/proc/meminfo").read_text().splitlines()
        if line.startswith(key + ":")
    )


def busy_seconds() -> float:
    "Return for how long all cores together have worked since the start of the machine."
    user, nice, system, _, _, *interrupts = (int(x) for x in Path("/proc/stat").read_text().split()[1:9])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def process_seconds(pid: int) -> float:
    "Return for how long a process and its children that ended have worked."
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(x) for x in fields[11:15]) / os.sysconf("SC_CLK_TCK")


def commit() -> str:
    "Return the commit, and whether files differ from it."
    if shutil.which("git") is None:
        return "unknown"

    def run(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return (run("rev-parse", "--short=12", "HEAD") or "unknown") + (
        "-dirty" if run("status", "--porcelain", "--", "diffdrr") else ""
    )


def describe() -> dict[str, str | int]:
    "Describe the machine."
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(memory() / 1e9),
        "gpu": gpu,
        "system": platform.platform(),
        "commit": commit(),
    }


def session(
    threads: int,  # of this process
) -> dict[str, str | int]:
    "Describe the machine, the day, and the programs that run on it."
    versions = {"diffdrr": diffdrr.__version__, "torch": torch.__version__}
    return describe() | {"date": str(datetime.date.today()), **versions, "threads": threads}


def in_words(
    about: Mapping[str, object],  # a session
) -> str:
    "Say when a report was measured, and on what."
    return (
        "{date}, commit {commit}, diffdrr {diffdrr}, torch {torch}, {threads} threads, {memory_gb} GB, {system}."
    ).format_map(about)


def slug(machine: dict[str, str | int]) -> str:
    "Make a file name of the machine."
    parts = [machine["cpu"], f"{machine['cores']} cores", machine["gpu"]]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(str(part) for part in parts if part).lower()).strip("-")


def write(path: Path, text: str) -> None:
    "Write a file under a temporary name and rename it."
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".new")
    temporary.write_text(text)
    temporary.replace(path)


def write_report(
    folder: Path,
    stem: str,  # of the names of the files
    texts: Mapping[str, str],  # by suffix
) -> None:
    "Write a report in several formats, and print where it is."
    for suffix, text in texts.items():
        write(folder / (stem + suffix), text)
        print(f"written to {folder / (stem + suffix)}")
