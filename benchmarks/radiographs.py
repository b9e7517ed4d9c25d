"""X-rays of a real chest that share no setting with the model that is registered to them.

The patient is water and cortical bone, voxels are constant, and nine rays meet each pixel. A tube's whole spectrum goes
through; scatter (half as much as primary radiation, as behind a grid), the focal spot and the counting of photons follow,
and the screen adds up energies. Wires lie on the patient. The registration sees one density, interpolates it, and knows of
nothing else.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torchio import LabelMap, ScalarImage, Subject

from diffdrr.geometry import Camera, RigidTransform
from diffdrr.physics import Blur, PolyenergeticBeam, Scatter, Tube, csi_response, tube_spectrum
from diffdrr.rendering import DRR
from diffdrr.volumes import read, save_arrays

from .scene import CT

CAMERA = Camera(sdd=1020.0, height=200, width=200, delx=2.0, dely=2.0)
OVERSAMPLING = 3
STRUCTURES = CT.with_name("chest_structures.csv")
LUNGS = ("lung_upper_lobe_left", "lung_lower_lobe_left", "lung_upper_lobe_right", "lung_middle_lobe_right",
         "lung_lower_lobe_right")  # fmt: skip
ABDOMEN = ("liver", "spleen", "stomach", "kidney_left", "kidney_right", "colon", "pancreas", "small_bowel", "duodenum",
           "gallbladder")  # fmt: skip
SHOULDERS = ("scapula_left", "scapula_right", "clavicula_left", "clavicula_right", "humerus_left", "humerus_right")


@dataclass(frozen=True)
class Exposure:
    "How an X-ray is taken, and what was done to it."

    breath: float = 0.0  # linear growth of the lungs since the CT
    abdomen: float = 0.0  # by how much it has sunk, mm
    shoulders: float = 0.0  # by how much they were raised, mm
    kvp: float = 100.0  # behind 3 mm of aluminium
    photons: float = 20000.0  # that reach a pixel without a patient
    plate: float = 0.0  # part of the picture that a metal plate hides
    field: float = 1.0  # part of the picture that is exposed
    response: str = "linear"  # or "gamma", or "equalised" in 8 bits


@cache
def chest() -> Subject:
    "Read the CT with its labels. What the scanner did not see is air."
    labels = LabelMap(CT.with_name("chest_labels.nii.gz"))
    volume = ScalarImage(CT)
    volume.set_data(volume.data.clamp(min=-1000))
    return read(volume, labels, structures=pd.read_csv(STRUCTURES))


def structure(
    group: str,  # of the table, or a name
) -> torch.Tensor:  # (X, Y, Z) bool
    "Return the voxels of some structures."
    table = chest().structures
    ids = table["id"][(table["group"] == group) | (table["structure"] == group)]
    return torch.isin(chest().mask.data[0], torch.tensor(ids.tolist(), dtype=torch.uint8))


def vertebral_points(n: int = 300) -> torch.Tensor:  # (1, n, 3) mm
    "Choose points within the vertebrae, where errors are measured."
    voxels = structure("vertebrae").nonzero()
    chosen = voxels[torch.randperm(len(voxels), generator=torch.Generator().manual_seed(0))[:n]].double()
    affine = torch.as_tensor(chest().volume.affine)
    return (chosen @ affine[:3, :3].T + affine[:3, 3])[None].float()


def smooth(
    mask: torch.Tensor,  # (X, Y, Z)
    coarser: int = 4,  # voxels of the plane that are averaged
) -> torch.Tensor:  # (1, 1, X, Y, Z), from 0 to 1
    "Blur a mask over about a centimetre."
    coarse = F.avg_pool3d(mask[None, None].float(), (coarser, coarser, 1))
    for _ in range(3):
        coarse = F.avg_pool3d(coarse, (5, 5, 5), stride=1, padding=2, count_include_pad=False)
    return F.interpolate(coarse, size=mask.shape, mode="trilinear")


def moves_with(
    names: tuple[str, ...],  # of structures
) -> torch.Tensor:  # (X, Y, Z) from 0 to 1
    "Say how far tissue follows structures that move: all of it within them, less around them, none near the vertebrae."
    moving = sum(structure(name) for name in names) > 0
    still = 2 * smooth(structure("vertebrae"))
    return (1.5 * smooth(moving) * (1 - still).clamp(min=0)).clamp(max=1)[0, 0]


@cache
def deformed(
    breath: float,  # see `Exposure`
    abdomen: float,
    shoulders: float,
) -> torch.Tensor:  # (X, Y, Z) Hounsfield units
    """Let the lungs grow away from the upper end of their back, the abdomen sink and the shoulders rise, and what is near
    them go along.

    Vertebrae hold still."""
    volume, affine = chest().volume.data[0].float(), torch.as_tensor(chest().volume.affine).float()
    if breath == abdomen == shoulders == 0:
        return volume
    lungs = (sum(structure(name) for name in LUNGS) > 0).nonzero().float()
    low, high = (lungs @ affine[:3, :3].T + affine[:3, 3]).aminmax(dim=0)
    fixed = torch.stack([(low[0] + high[0]) / 2, low[1], high[2]])  # the middle, the back, the apex
    pull = breath / (1 + breath) * moves_with(LUNGS)
    lift = shoulders * moves_with(SHOULDERS) - abdomen * moves_with(ABDOMEN)  # mm
    axes = []
    for axis, n in enumerate(volume.shape):  # the affine has no rotation
        voxel = torch.arange(n).float().reshape([-1 if i == axis else 1 for i in range(3)])
        centre = (fixed[axis] - affine[axis, 3]) / affine[axis, axis]
        come_from = voxel + pull * (centre - voxel) - (axis == 2) * lift / affine[2, 2]
        axes.append(2 * come_from / (n - 1) - 1)
    grid = torch.stack(axes[::-1], dim=-1)[None]
    return F.grid_sample(volume[None, None], grid, align_corners=True, padding_mode="border")[0, 0]


@cache
def materials(
    *motion: float,  # see `deformed`
) -> tuple[DRR, DRR]:  # of water and of cortical bone, in mm
    "Split each voxel into water and bone, whose attenuations at 70 keV add up to the Hounsfield unit's."
    volume, subject = deformed(*motion), chest()
    bone = ((volume - 100) / 1600).clamp(min=0)
    water = (1 + volume.clamp(max=100) / 1000).clamp(min=0) - bone
    affine, fine = subject.volume.affine, CAMERA.rescale(OVERSAMPLING)
    images = [ScalarImage(tensor=each[None], affine=affine) for each in (water, bone)]
    parts = [Subject(volume=each, density=each, mask=None, reorient=subject.reorient) for each in images]
    return tuple(DRR(part, **vars(fine), renderer="siddon") for part in parts)


def wires(
    generator: torch.Generator,
) -> torch.Tensor:  # (H, W) mm of steel
    "Lay three bent wires across the picture."
    n = CAMERA.height * OVERSAMPLING
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, n)] * 2, indexing="ij")
    steel = torch.zeros(n, n)
    for _ in range(3):
        angle, offset, bend = torch.rand(3, generator=generator) * torch.tensor([torch.pi, 1.0, 0.6])
        along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        distance = (across - offset + 0.5 - bend * along.square()) * 200  # mm
        steel += 2 * (1 - distance.square()).clamp(min=0).sqrt()
    return steel


def field_of(
    part: float,  # of the picture's area
) -> torch.Tensor:  # (1, 1, H, W) 1 inside
    "Open a square in the middle."
    side = torch.arange(CAMERA.height) + 0.5 - CAMERA.height / 2
    open_ = (side.abs() <= CAMERA.height / 2 * part**0.5).float()
    return (open_[:, None] * open_)[None, None]


def hidden_by_plate(
    part: float,  # of the picture's area
    generator: torch.Generator,
) -> torch.Tensor:  # (H, W) transmission
    "Lay a metal plate somewhere on the picture."
    n = CAMERA.height
    plate, size = torch.ones(n, n), round(n * part**0.5)
    row, column = (torch.rand(2, generator=generator) * (n - size)).int().tolist()
    plate[row : row + size, column : column + size] = 0.02
    return plate


def respond(
    depth: torch.Tensor,  # (1, 1, H, W) negative logarithm of the intensity
    response: str,
) -> torch.Tensor:  # (1, 1, H, W)
    "Process a picture as consoles do."
    if response == "linear":
        return depth
    low, high = depth.aminmax()
    if response == "gamma":
        return ((depth - low) / (high - low)) ** 0.6
    bits = ((depth - low) / (high - low) * 255).round().int().flatten()
    share = bits.bincount(minlength=256).cumsum(0) / bits.numel()
    return (share[bits] * 255).round().reshape(depth.shape)


def take_radiograph(
    pose: RigidTransform,  # (1)
    exposure: Exposure,
    seed: int,  # of noise, wires and plate
) -> torch.Tensor:  # (1, 1, H, W) bones are bright
    "Take an X-ray."
    generator = torch.Generator().manual_seed(seed)
    spectrum = tube_spectrum(Tube(exposure.kvp, {"aluminium": 3.0}))
    beam = PolyenergeticBeam(spectrum, ["water", "cortical bone"], csi_response(spectrum.energies), energy=None)
    with torch.no_grad():
        lengths = torch.cat(
            [drr(pose) for drr in materials(exposure.breath, exposure.abdomen, exposure.shoulders)], dim=1
        )
        primary = torch.exp(-beam(lengths).float() - 0.2 * wires(generator))
    opened = field_of(exposure.field)
    primary = F.avg_pool2d(primary, OVERSAMPLING) * opened
    if exposure.plate:
        primary = primary * hidden_by_plate(exposure.plate, generator)
    seen = Blur(0.8, CAMERA.delx)(Scatter(CAMERA.delx, amplitude=0.2, sigma=60.0)(primary))
    counted = torch.poisson(seen * exposure.photons, generator=generator).clamp(min=1) / exposure.photons
    return respond(-counted.log(), exposure.response)


def cached_radiograph(
    pose: RigidTransform,  # (1)
    exposure: Exposure,
    seed: int,
    folder: Path,
) -> torch.Tensor:  # (1, 1, H, W)
    "Take an X-ray, or read it, if this very file took it before. The response of the detector is not stored."
    plain = replace(exposure, response="linear")
    about = [vars(plain), pose.matrix.tolist(), seed, Path(__file__).read_text()]
    path = folder / f"{hashlib.blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()}.npz"
    if not path.exists():
        save_arrays(path, xray=take_radiograph(pose, plain, seed).numpy())
    with np.load(path) as arrays:
        return respond(torch.from_numpy(arrays["xray"]), exposure.response)
