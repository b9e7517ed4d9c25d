"How long a fresh process needs until it is imported, and until it has rendered."

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from .scene import ROOT

RENDER = """
import torch
from torchio import ScalarImage, Subject
from diffdrr.geometry import orientation_matrix
from diffdrr.rendering import DRR
image = ScalarImage(tensor=torch.rand(1, 64, 64, 64), affine=torch.eye(4).double())
subject = Subject(volume=image, density=image, mask=None, reorient=orientation_matrix("AP"))
drr = DRR(subject, sdd=1020.0, height=200, delx=2.0)
drr(torch.zeros(1, 3), torch.tensor([[0.0, 850.0, 0.0]]), parameterization="euler_angles", convention="ZXY")
"""
PROGRAMS = {
    "python": "pass",
    "diffdrr": "import diffdrr",
    "torch": "import torch",
    "torchio": "import torch, torchio",
    "render": RENDER,
}


LEAVE = "\nimport os; os._exit(0)"  # when the work is done, without the interpreter's tidying up


def seconds(program: str) -> float:
    "Run a program in a fresh process."
    start = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", program + LEAVE], cwd=ROOT, check=True)
    return time.perf_counter() - start


def measure(rounds: int) -> dict[str, float]:  # seconds by program
    "Run each program several times, in turn, after a first time that fills the caches."
    for program in PROGRAMS.values():
        seconds(program)
    times = [{name: seconds(program) for name, program in PROGRAMS.items()} for _ in range(rounds)]
    return {name: statistics.median(t[name] for t in times) for name in PROGRAMS}
