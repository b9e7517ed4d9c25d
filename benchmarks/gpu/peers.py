"The other packages for GPUs, where they are installed beside this one: through the workers of the benchmarks."

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from diffdrr.geometry import orientation_matrix

from . import clock
from .model import VIEWS, Picture, turned
from .scenes import APART, Case, make_drr, make_volume

WORKERS = Path(__file__).parents[1] / "workers"
PEERS = {"nanodrr": "nanodrr_017", "flashdrr": "flashdrr_060"}


def scene_of(picture: Picture, device: str):
    "Describe a picture as the workers want it."
    from protocol import Scene

    volume = make_volume(picture.shape, device)
    drr = make_drr(Case("Siddon", "forward", 32, picture), volume)
    rotation = np.array([VIEWS[picture.view]], dtype=np.float64) + [[APART * i, 0, 0] for i in range(picture.batch)]
    translation = np.tile([0.0, picture.sod, 0.0], (picture.batch, 1))
    return Scene(
        density=volume.cpu().numpy(),
        affine=drr.grid.affine.numpy(),
        rotation=rotation,
        translation=translation,
        world_from_camera=world_from_camera(rotation, picture),
        sdd=picture.sdd,
        height=picture.height,
        width=picture.width,
        delx=picture.side / max(picture.height, picture.width),
        weights=np.ones((picture.batch, picture.height, picture.width), np.float32),
        device=device,
        threads=1,
    )


def world_from_camera(rotation: np.ndarray, picture: Picture) -> np.ndarray:  # (B, 4, 4)
    matrices = np.tile(np.eye(4), (len(rotation), 1, 1))
    for matrix, angles in zip(matrices, rotation):
        matrix[:3, :3] = turned(angles)
        matrix[:3, 3] = matrix[:3, :3] @ [0.0, picture.sod, 0.0]
    return matrices @ orientation_matrix("AP").numpy()


def measure(name: str, picture: Picture, device: str) -> list[dict]:
    "Time the tasks of another package."
    contestant = import_module(PEERS[name]).load(scene_of(picture, device))
    rows = []
    for method, tasks in contestant.tasks.items():
        for task, its in tasks.items():
            row = dict(package=name, method=method, task=task, view=picture.view, height=picture.height)
            row["call"] = 1e6 * clock.on_host(its.run, device)
            try:
                row["kernel"] = 1e6 * clock.on_gpu(its.run)
            except RuntimeError as error:  # it waits, or copies from the host
                torch.cuda.synchronize()
                row["note"] = f"not captured: {str(error).splitlines()[0]}"
            rows.append(row)
    return rows


def run(device: str) -> tuple[list[dict], dict[str, str]]:  # rows, and who cannot take part and why
    "Time the others on the picture of the README, and on a larger one."
    sys.path.insert(0, str(WORKERS))
    rows, missing = [], {}
    for name in PEERS:
        if device != "cuda" or find_spec(name) is None:
            missing[name] = "there is no card" if device != "cuda" else "not installed"
            continue
        for picture in (Picture(), Picture("oblique"), Picture("axial"), Picture(height=1024, width=1024)):
            try:
                rows += measure(name, picture, device)
            except Exception as error:  # the next picture, or package, may do
                missing[f"{name}, {picture.view}, {picture.height} rows"] = f"{type(error).__name__}: {error}"
    return rows, missing
