"A contestant as the benchmark sees it: a process that stays alive and answers one request at a time."

from __future__ import annotations

import json
import os
import resource
import select
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .machine import memory
from .scene import ROOT

MEMORY_SHARE = 0.7  # of what is free, for one worker
SCRIPTS = Path(__file__).parent / "workers"
THREADS = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMBA_NUM_THREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS",
)


class Failure(Exception):
    "A request failed in the worker; the message says why."


class Late(Failure):
    "A request took longer than it may, and the worker was ended."


@dataclass(frozen=True)
class Check:
    "The first run of a task."

    seconds: float
    bytes: int  # by how much memory grew
    arrays: dict[str, np.ndarray]  # what was computed


class Worker:
    "A process in the environment of a contestant, for a device and a number of threads."

    def __init__(
        self,
        name: str,  # of a script in `workers/`
        python: Path,  # the interpreter of its environment
        device: str,  # "cpu" or "cuda"
        threads: int,
    ):
        self.name, self.python, self.device, self.threads = name, python, device, threads
        self.process: subprocess.Popen | None = None
        self.start()

    def start(self) -> None:
        environment = {**os.environ, **dict.fromkeys(THREADS, str(self.threads)), "PYTHONWARNINGS": "ignore"}
        environment["PYTHONPATH"] = str(ROOT) if self.name == "ours" else ""
        if self.device == "cpu":
            environment["CUDA_VISIBLE_DEVICES"] = ""
        self.messages = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [self.python, SCRIPTS / f"{self.name}.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.messages,
            env=environment,
        )
        if self.device == "cpu":  # an allocation then fails here, before the machine has to choose what to end
            most = int(MEMORY_SHARE * memory("MemAvailable"))
            resource.prlimit(self.process.pid, resource.RLIMIT_DATA, (most, most))

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None
            self.messages.close()

    def ask(
        self,
        limit: float,  # seconds; after it the worker is ended
        **request,
    ) -> dict:
        "Send a request and wait for the answer. Raises `Failure`, or `Late` after the limit."
        if self.process is None:
            raise Failure(f"{self.name} has been ended")
        end, answer = time.monotonic() + limit, b""
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError as error:
            raise Failure(f"{self.name} ended: {self.last_message()}") from error
        while not answer.endswith(b"\n"):
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.stop()
                raise Late(f"more than {limit:.0f} s")
            piece = os.read(self.process.stdout.fileno(), 2**16)
            if not piece:
                raise Failure(f"{self.name} ended: {self.last_message()}")
            answer += piece
        reply = json.loads(answer)
        if "error" in reply:
            raise Failure(f"{self.name}: {reply['error']}")
        return reply

    def last_message(self) -> str:
        "Return the end of what the worker wrote to its standard error, and end it."
        self.process.wait()
        self.messages.seek(0)
        lines = self.messages.read().decode(errors="replace").strip().splitlines() or [
            f"exit status {self.process.returncode}"
        ]
        self.stop()
        return lines[-1]

    def load(self, folder: Path, limit: float) -> dict:
        "Hand a scene over. Returns the tasks of each method, versions, models, notes and facts."
        return self.ask(limit, do="load", scene=str(folder), device=self.device, threads=self.threads)

    def warm_up(self, folder: Path, limit: float) -> None:
        "Start unless it runs, and do everything once in a small scene, so that code is compiled and loaded."
        if self.process is None:
            self.start()
        for method, tasks in self.load(folder, limit)["tasks"].items():
            for task in tasks:
                self.run(method, task, 1, limit)

    def run(self, method: str, task: str, repeats: int, limit: float) -> list[float]:  # seconds
        return self.ask(limit, do="run", method=method, task=task, repeats=repeats)["seconds"]

    def check(self, method: str, task: str, limit: float) -> Check:
        "Run a task for the first time."
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "result.npz"
            reply = self.ask(limit, do="check", method=method, task=task, path=str(path))
            with np.load(path) as arrays:
                return Check(reply["seconds"], reply["bytes"], dict(arrays))
