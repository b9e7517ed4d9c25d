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
from diffdrr.geometry import Camera, Detector, RigidTransform, orientation_matrix, read_mayacam, so3_exp_map
from diffdrr.volumes import Grid
from diffdrr.xrays import XRay, find_field

from .scene import ROOT

DATA = ROOT.parent / "shared" / "data"
FAR = {"knee": 1800.0, "wrist": 1400.0}  # source to detector, mm: free, as long as the bodies lie between the two
VIEWS = (1, 2)
KNEE_FRAMES = range(60)
WRIST_FRAMES = (2, 99)
SPACING = (0.39625, 0.39625, 0.625)  # of the voxels of a wrist's bones, mm
ENDS = {  # of bones at moments: columns and rows of the joint and of the shaft where it leaves the field, by camera, by hand
    ("radius", 2): (((890, 1219), (913, 1635)), ((629, 1225), (568, 1635))),
    ("ulna", 2): (((831, 1216), (810, 1592)), ((746, 1246), (746, 1635))),
    ("radius", 99): (((847, 1214), (898, 1635)), ((714, 1230), (640, 1635))),
    ("ulna", 99): (((771, 1219), (765, 1592)), ((858, 1257), (810, 1635))),
}
TURNS = {  # about the shaft, from where `laid_between` leaves a bone, degrees: found by trying all round
    ("radius", 2): -160.0,
    ("ulna", 2): 110.0,
    ("radius", 99): -175.0,
    ("ulna", 99): 115.0,
}
METAL, WATER = 1.0, 0.02  # attenuation of cobalt and chromium near 60 keV, and of water, 1/mm


def missing(
    data: Path = DATA,
) -> str | None:
    "Say why there is nothing to measure, if that is so."
    absent = [name for name in FAR if not (data / name).is_dir()]
    return f"the real X-rays of {' and '.join(absent)} are not in {data.name}/ beside the project" if absent else None


def picture(
    path: Path,
    camera: Camera,
    pose: RigidTransform,  # (1) room from camera
) -> XRay:  # from 0, dark, to 1
    "Read what a camera saw, and find its round field."
    values = torch.from_numpy(np.array(Image.open(path), dtype=np.float32) / 255)[None, None]
    return find_field(XRay(values, torch.ones_like(values), camera, pose=pose))


def moment(
    knee_or_wrist: str,  # a key of `FAR`
    names: list[str],  # of the files of both views
    data: Path,
) -> list[XRay]:
    "Read both views of a moment."
    folder = data / knee_or_wrist
    cameras = [read_mayacam(folder / f"cam{view}.txt", FAR[knee_or_wrist]) for view in VIEWS]
    return [picture(folder / name, *at) for name, at in zip(names, cameras)]


def knee_xrays(
    frame: int,  # one of `KNEE_FRAMES`
    data: Path = DATA,
) -> list[XRay]:
    return moment("knee", [f"cam{view}/{frame:03d}.png" for view in VIEWS], data)


def wrist_xrays(
    frame: int,  # one of `WRIST_FRAMES`
    data: Path = DATA,
) -> list[XRay]:
    return moment("wrist", [f"cam{view}_{frame:04d}.tif" for view in VIEWS], data)


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


def triangulate(
    xrays: list[XRay],  # with their poses
    pixels: list[tuple[float, float]],  # column and row in each
) -> torch.Tensor:  # (3) in the room, mm
    "Find the point that comes nearest to rays through pixels."
    normal, right = torch.zeros(3, 3), torch.zeros(3)
    for xray, pixel in zip(xrays, pixels):
        detector = Detector.from_camera(xray.camera, orientation_matrix(None))
        source, end = xray.pose.translation[0], detector.backproject(xray.pose, torch.tensor([[pixel]]).float())[0, 0]
        along = (end - source) / (end - source).norm()
        across = torch.eye(3) - torch.outer(along, along)
        normal, right = normal + across, right + across @ source
    return torch.linalg.solve(normal, right)


def laid_between(
    body: VoxelBody,  # a long bone along its third axis, with the joint where that begins
    joint: torch.Tensor,  # (3) in the room, mm
    shaft: torch.Tensor,  # (3) in the room, mm
) -> RigidTransform:  # (1) room from body; how it is turned about its axis is not known
    "Lay a bone along a line."
    dense = (body.density > 0.5 * body.density.max()).nonzero().float()
    places = dense @ body.grid.affine[:3, :3].float().T + body.grid.affine[:3, 3].float()
    low, high = (
        places[(dense[:, 2] - z).abs() < 6].mean(dim=0) for z in (dense[:, 2].min() + 6, dense[:, 2].max() - 6)
    )
    before, after = ((end - start) / (end - start).norm() for start, end in ((low, high), (joint, shaft)))
    axis = torch.linalg.cross(before, after)
    angle = torch.atan2(axis.norm(), before @ after)
    rotation = so3_exp_map(axis / axis.norm().clamp(min=1e-9) * angle)
    matrix = torch.eye(4)
    matrix[:3, :3], matrix[:3, 3] = rotation, joint - rotation @ low
    return RigidTransform(matrix)


def turned(
    pose: RigidTransform,  # (1) room from body
    middle: torch.Tensor,  # (3) of the body, in its frame, mm
    degrees: float,
) -> RigidTransform:  # (1)
    "Turn a bone about its long axis, the third of its frame."
    matrix = torch.eye(4)
    matrix[:3, :3] = so3_exp_map(torch.tensor([0, 0, np.deg2rad(degrees)]).float())
    matrix[:3, 3] = middle - matrix[:3, :3] @ middle
    return RigidTransform(matrix).compose(pose)


def wrist_start(
    name: str,  # radius or ulna
    frame: int,  # one of `WRIST_FRAMES`
    xrays: list[XRay],
    body: VoxelBody,
) -> RigidTransform:  # (1) room from body
    "Lay a bone where a hand has marked its ends, and turn it about its shaft, so that it fits best."
    laid = laid_between(body, *(triangulate(xrays, list(pixels)) for pixels in zip(*ENDS[name, frame])))
    return turned(laid, body.corners.mean(dim=0).float(), TURNS[name, frame])
