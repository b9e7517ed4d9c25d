"""The registration that users of 0.6.1 write: render, compare by normalised cross-correlation, step with Adam.

Runs in 0.6.1 and in this repository.

Reads a folder with `job.json` and arrays, and writes one line of JSON for each registration.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import torch
from torchio import ScalarImage, Subject


def do_without(*packages: str) -> None:
    """Let 0.6.1 import what is not installed, because nothing here uses it: it imports a library of networks along with
    its registration, and one of blurs along with its metrics."""
    for package in packages:
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            sys.modules[package] = MagicMock()


do_without("torchvision.transforms.functional", "torchvision.transforms", "torchvision", "timm")

from diffdrr.drr import DRR  # noqa: E402
from diffdrr.metrics import NormalizedCrossCorrelation2d  # noqa: E402
from diffdrr.registration import Registration  # noqa: E402

AP = [[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]
EULER = dict(parameterization="euler_angles", convention="ZXY")


def camera(folder: Path, job: dict) -> DRR:
    "Make a renderer of the density as it is."
    image = ScalarImage(tensor=torch.from_numpy(np.load(folder / "density.npy"))[None], affine=np.array(job["affine"]))
    subject = Subject(volume=image, density=image, mask=None, reorient=torch.tensor(AP))
    return DRR(subject, sdd=job["sdd"], height=job["height"], delx=job["delx"])


def target(
    drr: DRR, job: dict, start: dict, folder: Path
) -> tuple[torch.Tensor, torch.Tensor]:  # picture and mask, (1, 1, H, W)
    "Read an X-ray, or render the picture from a given pose, all of which counts."
    if "xray" in start:
        return tuple(torch.from_numpy(np.load(folder / start[name])) for name in ("xray", "mask"))
    with torch.no_grad():
        picture = drr(*(torch.tensor([start["true"][name]]) for name in ("rotation", "translation")), **EULER)
    return picture, torch.ones_like(picture)


def register(drr: DRR, job: dict, start: dict, folder: Path) -> dict:
    """Climb from a start until the correlation is high enough, or the iterations or the time are used up.

    The best pose counts, not the last."""
    picture, mask = target(drr, job, start, folder)
    registration = Registration(drr, torch.tensor([start["rotation"]]), torch.tensor([start["translation"]]), **EULER)
    rates = [
        {"params": [registration.rotation], "lr": job["lr_rotation"]},
        {"params": [registration.translation], "lr": job["lr_translation"]},
    ]
    optimizer = torch.optim.Adam(rates, maximize=True)
    similarity = NormalizedCrossCorrelation2d()
    best, iterations, begin = (
        {"similarity": -np.inf, "pose": registration.pose.matrix.detach()[0].tolist()},
        0,
        time.perf_counter(),
    )
    while True:
        optimizer.zero_grad()
        value = similarity(picture * mask, registration() * mask).sum()
        if value.item() > best["similarity"]:
            best = {"similarity": value.item(), "pose": registration.pose.matrix.detach()[0].tolist()}
        seconds = time.perf_counter() - begin
        reached = value.item() > job["enough"]
        if reached or value.isnan() or iterations == job["iterations"] or seconds > job["limit"]:
            return {**best, "iterations": iterations, "seconds": seconds, "reached": reached}
        value.backward()
        optimizer.step()
        iterations += 1


def main() -> None:
    "Do a job. What the libraries print goes to the standard error."
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    drr = camera(folder, job)
    register(drr, job | {"iterations": 1}, job["starts"][0], folder)  # compiles and loads code
    for start in job["starts"]:
        print(json.dumps(register(drr, job, start, folder)), file=answers, flush=True)


if __name__ == "__main__":
    main()
