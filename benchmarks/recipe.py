"""The recipe of 0.6.1's users, in 0.6.1 and in this repository: two environments, one program, the same pictures and
starts."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torchio import Subject

from diffdrr.geometry import RigidTransform, bin_pixels
from diffdrr.volumes import block_mean, voxel_from_block

from .scene import ROOT
from .worker import SCRIPTS, THREADS, Failure

BLOCK = (4, 4, 2)  # voxels of the CT that become one
HEIGHT = 64  # pixels


@dataclass(frozen=True)
class Recipe:
    "How to climb."

    lr_rotation: float = 0.1  # rad
    lr_translation: float = 5.0  # mm
    enough: float = 0.999  # correlation
    iterations: int = 250  # at most
    limit: float = 60.0  # seconds for each start


@dataclass(frozen=True)
class Start:
    "A picture, and the pose to start from. The picture is an X-ray, or is rendered from a true pose."

    init: RigidTransform  # (1)
    true: RigidTransform  # (1)
    xray: torch.Tensor | None = None  # (1, 1, H, W)
    mask: torch.Tensor | None = None  # (1, 1, H, W)


@dataclass(frozen=True)
class Climb:
    "Where a start led to."

    pose: list[list[float]]  # (4, 4) the best
    similarity: float  # its correlation
    iterations: int
    seconds: float
    reached: bool  # whether the correlation was enough


def parameters(
    pose: RigidTransform,  # (1)
) -> dict[str, list[float]]:
    "Write a pose down as the recipe wants it: three Euler angles (ZXY, rad) and a translation (mm)."
    return {
        name: value[0].tolist() for name, value in zip(("rotation", "translation"), pose.convert("euler_angles", "ZXY"))
    }


def save_start(
    start: Start,
    name: str,
    folder: Path,
) -> dict:
    "Write the picture of a start, with pixels as large as the recipe wants them. Returns the description."
    if start.xray is None:
        return {**parameters(start.init), "true": parameters(start.true)}
    n = start.xray.shape[-1] // HEIGHT
    mask = (bin_pixels(start.mask, n) == 1).to(start.mask)  # a pixel counts if all of it lies in the field
    np.save(folder / f"{name}-xray.npy", bin_pixels(start.xray, n).numpy())
    np.save(folder / f"{name}-mask.npy", mask.numpy())
    return {**parameters(start.init), "xray": f"{name}-xray.npy", "mask": f"{name}-mask.npy"}


def save_job(
    subject: Subject,
    starts: list[Start],
    recipe: Recipe,
    sdd: float,  # source-to-detector distance, mm
    width: float,  # of the detector, mm
    threads: int,
    folder: Path,
) -> None:
    "Write everything for the program that runs in either environment."
    np.save(folder / "density.npy", block_mean(subject.density.data[0], BLOCK).numpy())
    affine = torch.as_tensor(subject.density.affine) @ voxel_from_block(BLOCK)
    camera = {"affine": affine.tolist(), "sdd": sdd, "height": HEIGHT, "delx": width / HEIGHT}
    described = [save_start(start, str(i), folder) for i, start in enumerate(starts)]
    (folder / "job.json").write_text(json.dumps({**asdict(recipe), **camera, "threads": threads, "starts": described}))


def climb(
    name: str,  # "ours", or a key of `peers.PEERS`
    python: Path,  # the interpreter of its environment
    subject: Subject,
    starts: list[Start],
    recipe: Recipe,
    sdd: float,  # mm
    width: float,  # of the detector, mm
    threads: int,
) -> Iterator[Climb]:
    "Follow the recipe from each start. Raises a `Failure` if the program ends too early."
    environment = {
        **os.environ,
        **dict.fromkeys(THREADS, str(threads)),
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(ROOT) if name == "ours" else "",
        "CUDA_VISIBLE_DEVICES": "",
    }
    with tempfile.TemporaryDirectory(prefix="diffdrr-recipe-") as folder, tempfile.TemporaryFile() as messages:
        save_job(subject, starts, recipe, sdd, width, threads, Path(folder))
        command = [python, SCRIPTS / "registration_recipe.py", folder]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=messages, env=environment, text=True) as process:
            try:
                for line in process.stdout:
                    yield Climb(**json.loads(line))
                process.wait()
            finally:
                process.kill()  # unless it has ended
        messages.seek(0)
        last = messages.read().decode(errors="replace").strip().splitlines()[-1:]
    if process.returncode:
        raise Failure(f"{name} ended: {''.join(last) or f'exit status {process.returncode}'}")
