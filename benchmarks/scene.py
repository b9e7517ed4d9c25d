"""What is photographed, from where, and what the pictures should show.

The geometry is written down here once more, from the conventions of the project (`nbs/api/000_conventions.ipynb`)
and in float64, so that the camera of the package is measured like everything else.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from diffdrr.kernels import reference
from diffdrr.volumes import load_example_ct, read

from .machine import ROOT

CT = ROOT.parent / "shared" / "data" / "chest_ct.nii.gz"
REORIENT = torch.tensor(
    [[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]], dtype=torch.float64
)  # "AP": the camera looks to the back, its y axis points to the head
RAYS_AT_ONCE = 200
FRONTAL, OBLIQUE = (0.0, 0.0, 0.0), (0.6, 0.35, 0.1)


@dataclass(frozen=True)
class Camera:
    "A detector, and the poses of its pictures."

    rotation: tuple[tuple[float, float, float], ...] = (FRONTAL,)  # Euler angles ZXY of each picture, radians
    translation: tuple[tuple[float, float, float], ...] = ((0.0, 850.0, 0.0),)  # mm
    sdd: float = 1020.0  # source-to-detector distance, mm
    height: int = 200  # rows and columns, pixels
    delx: float = 2.0  # size of a pixel, mm

    def resized(self, height: int) -> Camera:
        "Change the number of pixels; the detector keeps its size."
        return Camera(self.rotation, self.translation, self.sdd, height, self.delx * self.height / height)

    def turned(self, rotation: tuple[float, float, float], batch: int = 1) -> Camera:
        "Look from elsewhere, `batch` times, half a degree apart."
        rotations = tuple((rotation[0] + 0.0087 * i, *rotation[1:]) for i in range(batch))
        return Camera(rotations, self.translation[:1] * batch, self.sdd, self.height, self.delx)


def rotation_matrix(
    angles: torch.Tensor,  # (3,) Euler angles ZXY, radians
) -> torch.Tensor:  # (3, 3)
    "Turn about the y axis, then about x, then about z."
    (cz, cx, cy), (sz, sx, sy) = angles.cos(), angles.sin()
    one, zero = torch.ones_like(cz), torch.zeros_like(cz)
    about_z = torch.stack([cz, -sz, zero, sz, cz, zero, zero, zero, one]).view(3, 3)
    about_x = torch.stack([one, zero, zero, zero, cx, -sx, zero, sx, cx]).view(3, 3)
    about_y = torch.stack([cy, zero, sy, zero, one, zero, -sy, zero, cy]).view(3, 3)
    return about_z @ about_x @ about_y


def world_from_camera(
    rotation: torch.Tensor,  # (3,) Euler angles ZXY, radians
    translation: torch.Tensor,  # (3,) mm
) -> torch.Tensor:  # (4, 4)
    "Reorient the camera, move it, and then turn it."
    matrix = torch.cat([rotation_matrix(rotation), torch.zeros(1, 3, dtype=rotation.dtype)])
    return (
        torch.cat([matrix, torch.cat([matrix[:3] @ translation, torch.ones(1, dtype=rotation.dtype)])[:, None]], dim=1)
        @ REORIENT
    )


def pixel_centres(camera: Camera) -> torch.Tensor:  # (N, 3) in the frame of the camera, mm
    "Place the pixels; (0, 0) is at the upper left, and the axes of the camera point to the left and to the top."
    offset = (camera.height / 2 - 0.5 - torch.arange(camera.height, dtype=torch.float64)) * camera.delx
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    return torch.stack(
        [x.flatten(), y.flatten(), torch.full((camera.height**2,), camera.sdd, dtype=torch.float64)], dim=-1
    )


def draw_weights(camera: Camera) -> np.ndarray:  # (B, H, W) float32
    "Draw the weights of the pixels in the loss whose gradient is taken."
    return (
        np.random.default_rng(0).uniform(-1, 1, (len(camera.rotation), camera.height, camera.height)).astype(np.float32)
    )


def load_density(
    path: Path | None,  # of a CT; the built-in example without one
) -> tuple[np.ndarray, np.ndarray]:  # (X, Y, Z) float32 and (4, 4)
    "Read the CT that is photographed."
    subject = load_example_ct() if path is None else read(path)
    return subject.density.data[0].numpy(), subject.volume.affine


def resize(
    density: np.ndarray,  # (X, Y, Z)
    size: int,  # voxels along each axis
) -> np.ndarray:  # (S, S, S)
    "Resample a volume to a cube of voxels over the same box."
    return F.interpolate(
        torch.from_numpy(density)[None, None], size=(size,) * 3, mode="trilinear", align_corners=False
    )[0, 0].numpy()


def resize_affine(
    shape: tuple[int, int, int],  # of the volume before
    affine: np.ndarray,  # (4, 4)
    size: int,  # voxels along each axis afterwards
) -> np.ndarray:  # (4, 4)
    "Return where the voxels of the cube are."
    scale = np.array(shape) / size
    change = np.diag([*scale, 1.0])
    change[:3, 3] = (scale - 1) / 2
    return affine @ change


def save(
    folder: Path,
    density: np.ndarray | None,  # (X, Y, Z); None if it is there already
    affine: np.ndarray,  # (4, 4)
    camera: Camera,
    weights: np.ndarray,  # (B, H, W) of the pixels in the loss
) -> Path:  # the folder
    "Write a scene for the workers."
    folder.mkdir(parents=True, exist_ok=True)
    if density is not None:
        np.save(folder / "density.npy", np.ascontiguousarray(density, dtype=np.float32))
    np.save(folder / "weights.npy", weights)
    poses = [
        world_from_camera(*torch.tensor(pose, dtype=torch.float64)).tolist()
        for pose in zip(camera.rotation, camera.translation)
    ]
    description = {**asdict(camera), "width": camera.height, "affine": affine.tolist(), "world_from_camera": poses}
    (folder / "scene.json").write_text(json.dumps(description))
    return folder


@dataclass(frozen=True)
class Reference:
    "What a picture should show."

    pixels: np.ndarray  # (N,) indices of the pixels that are compared
    values: dict[str, np.ndarray]  # by model: (N,)
    gradients: dict[
        str, dict[str, np.ndarray]
    ]  # by model and part of the pose: (3,), of the weighted sum of these pixels


def compute_reference(
    density: np.ndarray,  # (X, Y, Z)
    affine: np.ndarray,  # (4, 4)
    camera: Camera,  # of one picture
    n_rays: int,  # how many pixels to draw at random
) -> Reference:
    """Integrate exactly along some rays with the readable kernels, in float64, and differentiate with respect to the
    pose."""
    pixels = np.sort(np.random.default_rng(1).permutation(camera.height**2)[:n_rays])
    weights = torch.from_numpy(draw_weights(camera).ravel()[pixels]).double()
    centres, volume, voxel_from_world = (
        pixel_centres(camera)[pixels],
        torch.from_numpy(density).double(),
        torch.from_numpy(np.linalg.inv(affine)),
    )
    values, gradients = {}, {}
    for model, kernel in (("constant", reference.siddon), ("trilinear", reference.trilinear)):
        pose = [
            torch.tensor(x[0], dtype=torch.float64, requires_grad=True) for x in (camera.rotation, camera.translation)
        ]
        pieces = []
        for centre, weight in tqdm(
            list(zip(centres.split(RAYS_AT_ONCE), weights.split(RAYS_AT_ONCE))), desc=f"reference, {model}", leave=False
        ):
            voxel_from_camera = voxel_from_world @ world_from_camera(*pose)
            target = centre @ voxel_from_camera[:3, :3].T + voxel_from_camera[:3, 3]
            picture = kernel(volume, voxel_from_camera[None, None, :3, 3], target[None], centre.norm(dim=-1)[None])[
                0, 0
            ]
            (picture * weight).sum().backward()
            pieces.append(picture.detach())
        values[model] = torch.cat(pieces).numpy()
        gradients[model] = {name: x.grad.numpy() for name, x in zip(("rotation", "translation"), pose)}
    return Reference(pixels, values, gradients)


def relative_error(
    values: np.ndarray,
    truth: np.ndarray,
) -> float:
    "Compare in the L2 norm."
    return float(np.linalg.norm(values.ravel().astype(np.float64) - truth.ravel()) / np.linalg.norm(truth))
