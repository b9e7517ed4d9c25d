"""Runs in processes of their own, to be killed, with the workers that they start."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def start(program: Path, *arguments: object) -> subprocess.Popen:
    "Start a program in a session of its own."
    command = [sys.executable, program, *arguments]
    return subprocess.Popen(list(map(str, command)), start_new_session=True, stderr=subprocess.PIPE)


def wait_for(count: Callable[[], int], least: int, run: subprocess.Popen) -> None:
    "Wait until a program has done some of its work, but not all."
    deadline = time.monotonic() + 240
    while count() < least:
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.02)


def end(run: subprocess.Popen) -> None:
    "Wait for a program, and see that it ends well."
    assert run.wait(timeout=400) == 0, run.stderr.read().decode()


def children(pid: int) -> list[int]:
    "List the workers that a process started, by their command lines, busy ones first."
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            line = (path / "cmdline").read_bytes()
            session = os.getsid(int(path.name))
        except OSError:
            continue
        if session == pid and b"spawn_main" in line:
            found.append((int(fields[11]) + int(fields[12]), int(path.name)))
    return [child for _, child in sorted(found, reverse=True)]
