"""Real X-rays in two calibrated views, the bodies seen in them, and what is known of their poses.

The data lie beside the project, in ../shared/data, and stay there: a knee with a femoral component, and the bones of a
wrist. Lengths are in mm; the room is the frame of the calibration.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageSequence

from diffdrr.bodies import MeshBody, VoxelBody, read_mesh
from diffdrr.geometry import Camera, Detector, RigidTransform, orientation_matrix, pose_from_opencv
from diffdrr.volumes import Grid
from diffdrr.xrays import XRay, find_field

from .scene import ROOT

DATA = ROOT.parent / "shared" / "data"
FAR = {"knee": 1800.0, "wrist": 1400.0}  # source to detector, mm: free, as long as the bodies lie between the two
VIEWS = (1, 2)
KNEE_FRAMES = range(60)
WRIST_FRAMES = (2, 99)
SPACING = (0.39625, 0.39625, 0.625)  # of the voxels of a wrist's bones, mm
METAL, WATER = 1.0, 0.02  # attenuation of cobalt and chromium near 60 keV, and of water, 1/mm


def missing(
    data: Path = DATA,
) -> str | None:
    "Say why there is nothing to measure, if that is so."
    absent = [name for name in FAR if not (data / name).is_dir()]
    return f"the real X-rays of {' and '.join(absent)} are not in {data.name}/ beside the project" if absent else None


def calibrated(
    path: Path,  # MayaCam 2.0
    sdd: float,  # mm
) -> tuple[Camera, RigidTransform]:  # the camera, and (1) room from camera
    "Read how a camera stood in the room."
    size, intrinsic, rotation, translation = [
        np.array([line.split(",") for line in part.splitlines()[1:]], dtype=np.float64)
        for part in path.read_text().strip().split("\n\n")
    ]
    extrinsic = np.eye(4)
    extrinsic[:3, :3], extrinsic[:3, 3:] = rotation, translation
    width, height = map(int, size[0])
    camera = Camera.from_opencv(torch.from_numpy(intrinsic), height, width, sdd)
    pose = pose_from_opencv(torch.from_numpy(extrinsic), torch.eye(4, dtype=torch.float64))
    return camera, RigidTransform(pose.matrix.float())


def picture(
    path: Path,
    camera: Camera,
    pose: RigidTransform,  # (1) room from camera
) -> XRay:  # from 0, dark, to 1
    "Read what a camera saw, and find its round field."
    values = torch.from_numpy(np.array(Image.open(path), dtype=np.float32) / 255)[None, None]
    return find_field(XRay(values, torch.ones_like(values), camera, pose=pose))


def knee_xrays(
    frame: int,  # one of `KNEE_FRAMES`
    data: Path = DATA,
) -> list[XRay]:
    "Read both views of a moment."
    folder = data / "knee"
    cameras = [calibrated(folder / f"cam{view}.txt", FAR["knee"]) for view in VIEWS]
    return [picture(folder / f"cam{view}" / f"{frame:03d}.png", *at) for view, at in zip(VIEWS, cameras)]


def wrist_xrays(
    frame: int,  # one of `WRIST_FRAMES`
    data: Path = DATA,
) -> list[XRay]:
    "Read both views of a moment."
    folder = data / "wrist"
    cameras = [calibrated(folder / f"cam{view}.txt", FAR["wrist"]) for view in VIEWS]
    return [picture(folder / f"cam{view}_{frame:04d}.tif", *at) for view, at in zip(VIEWS, cameras)]


def femur(
    data: Path = DATA,
) -> MeshBody:
    "Read the femoral component, and close its open edges."
    return MeshBody(read_mesh(data / "knee" / "femur.stl", repair=True), METAL)


def femur_poses(
    data: Path = DATA,
) -> RigidTransform:  # (60) room from femur
    "Read the poses that came with the pictures: another program's, not a measurement of their own."
    rows = np.loadtxt(data / "knee" / "femur_poses.csv", delimiter=",", skiprows=1)[:, 1:].reshape(-1, 3, 4)
    turns, _, others = np.linalg.svd(rows[:, :, :3])  # nine digits are not quite a rotation
    matrix = np.tile(np.eye(4), (len(rows), 1, 1))
    matrix[:, :3, :3], matrix[:, :3, 3] = turns @ others, rows[:, :, 3]
    return RigidTransform(torch.from_numpy(matrix).float())


def bone(
    name: str,  # radius or ulna
    data: Path = DATA,
) -> VoxelBody:
    "Read the CT of a bone by itself; its values less 1000 are taken for Hounsfield units."
    with Image.open(data / "wrist" / f"{name}.tif") as stack:
        values = np.stack([np.array(one, dtype=np.float32) for one in ImageSequence.Iterator(stack)])
    density = torch.from_numpy(values.T.copy()) * (WATER / 1000)
    return VoxelBody(density, Grid(density.shape, torch.diag(torch.tensor([*SPACING, 1.0], dtype=torch.float64))))


def window(
    xray: XRay,
    corners: torch.Tensor,  # (1, N, 3) of a box around a body, in the room, mm
    margin: int = 24,  # pixels
) -> XRay:  # the part of the picture that shows the box
    "Cut a picture to where a body is. Raises a `ValueError` for a body that is not in it."
    seen = Detector.from_camera(xray.camera, orientation_matrix(None)).project(xray.pose, corners)[0]
    size = torch.tensor([xray.camera.width, xray.camera.height])
    low = (seen.amin(dim=0).floor().long() - margin).clamp(min=0)
    high = torch.minimum(seen.amax(dim=0).ceil().long() + margin, size)
    if not (high > low).all():
        raise ValueError(f"corners must lie in the picture, but they are seen at {seen.tolist()}")
    (left, top), (right, bottom) = low.tolist(), (size - high).tolist()
    return xray.crop(top, bottom, left, right)
