"""Reconstructions by this repository.

Reads a folder with `job.json` and arrays; writes a volume, and one line of JSON, for each method."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from process_memory import most_memory

from diffdrr.geometry import Camera, RigidTransform
from diffdrr.reconstruction import SIRT, Projector, TotalVariation, fdk
from diffdrr.volumes import Grid


def load(job: dict, folder: Path, renderer: str) -> tuple[Projector, torch.Tensor]:
    "Make the projector, and read the pictures."
    affine = torch.diag(torch.tensor([*job["spacing"], 1.0], dtype=torch.float64))
    affine[:3, 3] = torch.tensor(job["origin"])
    pictures = torch.from_numpy(np.load(folder / "pictures.npy"))[:, None]
    camera, grid = Camera(job["sdd"], *pictures.shape[2:], job["delx"]), Grid(job["shape"], affine)
    pose = RigidTransform(torch.tensor(job["world_from_camera"]))
    return Projector(camera, grid, pose, orientation=None, renderer=renderer), pictures


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    projector, pictures = load(job, folder, "siddon")
    smooth, _ = load(job, folder, "trilinear")
    for one in (projector, smooth):
        one[:1].T(one[:1](one.zeros()))  # compiles and loads code
    subsets = -(-len(projector) // job["views_per_subset"])

    def sart(projector):
        return SIRT(projector, pictures, subsets=subsets).run(job["iterations"], verbose=False)

    methods = {
        "FDK": lambda: fdk(projector, pictures, hann=job["hann"], verbose=False),
        "SART": lambda: sart(projector),
        "SART, trilinear": lambda: sart(smooth),
        "total variation": lambda: TotalVariation(
            projector, pictures, weight=job["weight"], volume=sart(projector)
        ).run(job["tv_iterations"], verbose=False),
    }
    for name, method in methods.items():
        begin = time.perf_counter()
        volume = method()
        seconds = time.perf_counter() - begin
        np.save(folder / f"{name}.npy", volume.numpy())
        print(json.dumps({"method": name, "seconds": seconds, "memory": most_memory()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
