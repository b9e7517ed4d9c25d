"""What is rendered: a volume that is made here, so that nothing has to be read, and the views of `model.py`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from diffdrr.geometry import Camera, RigidTransform, make_matrix
from diffdrr.kernels import Rays, Rule
from diffdrr.rendering import DRR
from diffdrr.volumes import Grid

from .model import VIEWS, Picture, turned

N_LABELS = 8
APART = 0.0087  # the views of a batch, rad
METHODS = ("Siddon", "exact", "sampled")
TASKS = ("forward", "pose gradient", "Jacobian", "volume gradient", "labels")


class Case(NamedTuple):
    "A row of the table."

    method: str  # a member of `METHODS`
    task: str  # a member of `TASKS`
    bits: int = 32  # of a voxel
    picture: Picture = Picture()
    samples: int = 500  # of a ray, with the method "sampled"

    @property
    def rule(self) -> Rule:
        "What kernels are told."
        rule = Rule("siddon") if self.method == "Siddon" else Rule("trilinear", **self.options)
        return rule._replace(width=self.picture.width)

    @property
    def options(self) -> dict[str, int | None]:
        "What the renderer is told in a call."
        return {"Siddon": {}, "exact": dict(n_points=None), "sampled": dict(n_points=self.samples)}[self.method]

    @property
    def stored(self) -> torch.dtype:
        return {16: torch.bfloat16, 32: torch.float32, 64: torch.float64}[self.bits]

    @property
    def precision(self) -> torch.dtype:  # of the rays
        return torch.float64 if self.bits == 64 else torch.float32


def make_volume(shape: tuple[int, int, int], device: str) -> torch.Tensor:  # (X, Y, Z)
    "Make a body of water with a spine, and noise, so that errors cannot hide."
    x, y, z = (torch.linspace(-1, 1, n, device=device) for n in shape)
    body = ((x / 0.9)[:, None] ** 2 + (y / 0.6)[None] ** 2 < 1).float()
    spine = ((x / 0.15)[:, None] ** 2 + ((y + 0.4) / 0.15)[None] ** 2 < 1).float()
    noise = torch.rand(shape, device=device, generator=torch.Generator(device).manual_seed(0))
    return 0.02 * ((body + 0.8 * spine)[..., None] * (1 + 0.1 * z) + 0.1 * noise)


def make_labels(shape: tuple[int, int, int], device: str) -> torch.Tensor:  # (X, Y, Z) uint8
    "Divide a volume into blocks."
    blocks = [torch.arange(n, device=device) * 4 // n for n in shape]
    x, y, z = torch.meshgrid(*blocks, indexing="ij")
    return ((x + 2 * y + 3 * z) % N_LABELS).to(torch.uint8)


def make_drr(case: Case, volume: torch.Tensor, backend: str = "auto") -> DRR:
    "Make a DRR without a subject, for which no other package is needed."
    picture = case.picture
    affine = np.diag([*picture.spacing, 1.0])
    affine[:3, 3] = -(np.array(picture.shape) - 1) / 2 * picture.spacing
    pitch = picture.side / max(picture.height, picture.width)
    camera = Camera(picture.sdd, picture.height, picture.width, pitch)
    grid = Grid(picture.shape, torch.tensor(affine))
    drr = DRR.empty(camera, grid, renderer=case.rule.method, backend=backend)
    drr = drr.to(volume.device, case.precision)
    drr.density = volume.to(case.stored)
    if case.task == "labels":
        drr.mask = make_labels(picture.shape, str(volume.device))
    return drr


def make_pose(case: Case, device: torch.device) -> RigidTransform:
    "Look at the middle of the volume, from views half a degree apart."
    z, x, y = VIEWS[case.picture.view]
    angles = [(z + APART * i, x, y) for i in range(case.picture.batch)]
    rotation = torch.tensor(np.stack([turned(one) for one in angles]), device=device, dtype=case.precision)
    return RigidTransform(make_matrix(rotation, rotation[..., 1] * case.picture.sod))


def make_rays(drr: DRR, pose: RigidTransform) -> Rays:  # voxel coordinates
    "Make the rays that the kernels get."
    source, target = drr.detector(pose)
    length = Rays.between(source, target).length
    return Rays(drr.affine_inverse(source), drr.affine_inverse(target), length).each_with_source()
