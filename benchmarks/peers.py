"""The other packages, each in an environment of its own outside of the repository.

The import name `diffdrr` belongs to two of them, and their requirements need not agree.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path.home() / ".cache" / "diffdrr" / "benchmarks"
TORCH = "torch==2.13.0"  # first and alone, so that pip takes the build of this machine and not another one for a requirement


class Unavailable(Exception):
    "A contestant cannot take part; the message says why, and what would help."


@dataclass(frozen=True)
class Peer:
    "A package to compare with."

    steps: tuple[tuple[str, ...], ...] = ()  # the arguments of `pip install`, one call after the other
    program: str = ""  # instead: a program that must be on the PATH
    remedy: str = ""  # how to install that program
    on_cuda: bool = False  # takes part when there is a GPU
    on_cpu: bool = True  # takes part without one


PEERS = {
    "diffdrr_061": Peer(
        steps=(
            (TORCH,),
            (
                "torchio==1.2.1",
                "kornia==0.9.0",
                "numpy",
                "scipy",
                "pandas",
                "einops",
                "fastcore",
                "nibabel",
                "setuptools",
            ),
            ("--no-deps", "diffdrr==0.6.1"),  # what is left out serves modules that are not used here
        ),
        on_cuda=True,
    ),
    "nanodrr_017": Peer(steps=((TORCH,), ("torchio==1.2.1", "nanodrr==0.1.7")), on_cuda=True),
    "flashdrr_060": Peer(steps=((TORCH, "numpy"), ("--no-deps", "flashdrr==0.6.0")), on_cuda=True, on_cpu=False),
    "rtk": Peer(steps=(("itk-rtk==2.7.0.post1",),)),
    "plastimatch": Peer(program="plastimatch", remedy="apt-get install plastimatch"),
}


def prepare(
    name: str,  # "ours", or a key of `PEERS`
    folder: Path,  # where the environments are
) -> Path:  # the interpreter for its worker
    "Make the environment of a peer unless it is there. Raises `Unavailable` where it cannot take part."
    if name == "ours":
        return Path(sys.executable)
    peer = PEERS[name]
    if not peer.on_cpu and not torch.cuda.is_available():
        raise Unavailable("needs a CUDA GPU; there is none")
    if peer.program:
        if shutil.which(peer.program) is None:
            raise Unavailable(f"{peer.program} is not on the PATH: {peer.remedy}")
        return Path(sys.executable)
    environment = folder / name
    python, stamp = environment / "bin" / "python", environment / "installed.txt"
    wanted = "\n".join(" ".join(step) for step in peer.steps)
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"preparing {name} in {environment}", flush=True)
    venv.create(environment, clear=True, with_pip=True)
    for step in peer.steps:
        command = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *step]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        if result.returncode:
            raise Unavailable(f"pip install {' '.join(step)} failed: {result.stdout.strip().splitlines()[-1:]}")
    temporary = stamp.with_suffix(".new")
    temporary.write_text(wanted)
    temporary.replace(stamp)
    return python
