"""Write small files in the layouts of public data sets: the phantom, photographed by cameras that are built here from
the documents of the data sets.

Nothing of `diffdrr.xrays.datasets` is used. Pictures are integrals along rays from the source to the centre of each pixel,
both placed in the voxels of the stored volume by this file, so that a loader that misreads an axis, a flip, a unit
or half a pixel gives another picture.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import torch

from diffdrr.rendering import Siddon
from diffdrr.volumes import chest_ct, transform_hu_to_density

SHAPE, SPACING = (56, 48, 40), (6.0, 7.0, 8.0)  # of the volume along x, y, z; mm
CENTRE = np.array([12.0, -31.0, -940.0])  # of the volume in the frame of the file, mm
SDD = 1020.0  # source-to-detector distance, mm
ATTENUATION = 0.02  # of a voxel with density 1, per mm
UNATTENUATED = 65487.0  # intensity without a patient
BACKGROUND, CONTRAST = 0.75, 0.001  # of subtracted pictures: their grey, and the darkening by 1 mm of density 1
FRONT, BACK, LEFT, DOWN = np.eye(3)[1] * -1, np.eye(3)[1], np.eye(3)[0], np.eye(3)[2] * -1  # in LPS


@dataclass(frozen=True)
class Film:
    "A detector: pixels, their size, and where the ray at right angles to it meets it."

    height: int = 64  # rows
    width: int = 52  # columns
    row_spacing: float = 6.2  # mm
    col_spacing: float = 6.6  # mm
    off_centre: tuple[float, float] = (3.25, -2.5)  # columns and rows

    @property
    def principal_point(self) -> np.ndarray:  # (2,) column and row, where the centre of the first pixel is (0, 0)
        return np.array([(self.width - 1) / 2, (self.height - 1) / 2]) + self.off_centre

    def intrinsic(self, first_pixel: float) -> np.ndarray:  # (3, 3)
        """Return the matrix of the data sets, whose focal lengths are negative; `first_pixel` is the coordinate of the
        centre of the first pixel."""
        u, v = self.principal_point + first_pixel
        return np.array([[-SDD / self.col_spacing, 0, u], [0, -SDD / self.row_spacing, v], [0, 0, 1]])


def turned(axis: np.ndarray, angle: float) -> np.ndarray:  # (3, 3)
    "Return a rotation, by Rodrigues' formula."
    x, y, z = axis / np.linalg.norm(axis)
    w = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * w + (1 - np.cos(angle)) * w @ w


def camera(
    to_source: np.ndarray,  # (3,) direction from the patient to the source, before the rotation
    rows: np.ndarray,  # (3,) direction in which rows count up, before the rotation
    rotation: np.ndarray,  # (3, 3) about the centre of the volume
    distance: float,  # from the source to the centre, mm
    aside: tuple[float, float] = (0.0, 0.0),  # of the source along columns and rows, mm
) -> (
    np.ndarray
):  # (4, 4) volume from camera; x along the columns, y along the rows, z to the source, where the origin is
    "Place a camera."
    axes = rotation @ np.stack(
        [np.cross(rows, to_source), rows, to_source], axis=1
    )  # right-handed: columns x rows = to the source
    matrix = np.eye(4)
    matrix[:3, :3] = axes
    matrix[:3, 3] = CENTRE + axes @ [*aside, distance]
    return matrix


@cache
def scan() -> tuple[
    np.ndarray, np.ndarray, np.ndarray
]:  # Hounsfield units and labels (X, Y, Z), and LPS from voxel (4, 4)
    "Scan the phantom onto a grid whose axes run to the left, to the back and to the head."
    hu, _, _ = chest_ct(SHAPE, SPACING, noise=0.0)
    hu = np.ascontiguousarray(hu[:, ::-1]).astype(np.float32)  # the phantom's second axis runs to the front
    left = np.arange(SHAPE[0])[:, None, None] >= SHAPE[0] // 2
    labels = np.where(hu > 150, np.where(left, 1, 2), 0).astype(np.uint8)
    lps_from_voxel = np.diag([*SPACING, 1.0])
    lps_from_voxel[:3, 3] = CENTRE - np.diag(SPACING) @ ((np.array(SHAPE) - 1) / 2)
    return hu, labels, lps_from_voxel


def line_integrals(
    density: torch.Tensor,  # (X, Y, Z)
    volume_from_voxel: np.ndarray,  # (4, 4)
    volume_from_camera: np.ndarray,  # (4, 4) as `camera` makes it
    film: Film,
) -> np.ndarray:  # (H, W) float64, mm
    "Integrate along the rays to the centres of all pixels, in voxel coordinates."
    row, col = np.indices((film.height, film.width))
    offset = np.stack([col, row], axis=-1) - film.principal_point
    on_film = np.concatenate(
        [offset * [film.col_spacing, film.row_spacing], np.full((*offset.shape[:2], 1), -SDD)], axis=-1
    )
    voxel_from_camera = np.linalg.inv(volume_from_voxel) @ volume_from_camera
    target = on_film.reshape(-1, 3) @ voxel_from_camera[:3, :3].T + voxel_from_camera[:3, 3]
    source, target = (torch.from_numpy(x)[None] for x in (voxel_from_camera[None, :3, 3], target))
    length = torch.from_numpy(np.linalg.norm(on_film.reshape(1, 1, -1, 3), axis=-1))
    return Siddon()(density.double(), source, target, length)[0, 0].view(film.height, film.width).numpy()


def project(
    points: np.ndarray,  # (N, 3) in the frame of the volume, mm
    volume_from_camera: np.ndarray,  # (4, 4)
    film: Film,
) -> np.ndarray:  # (N, 2) columns and rows; the centre of the first pixel is (0, 0)
    "Find by similar triangles where points are seen."
    x, y, z = ((points - volume_from_camera[:3, 3]) @ volume_from_camera[:3, :3]).T
    return film.principal_point + np.stack([SDD * x / -z / film.col_spacing, SDD * y / -z / film.row_spacing], axis=-1)


LANDMARKS = {  # mm from the centre of the volume, in the frame of the file
    "ASIS-l": (95.0, -60.0, 40.0),
    "ASIS-r": (-88.0, -55.0, 52.0),
    "FH-l": (70.0, 20.0, -70.0),
    "FH-r": (-75.0, 15.0, -82.0),
    "IPS-l": (20.0, -40.0, 5.0),
    "SPS-r": (-15.0, 33.0, 12.0),
}
BONES = {1: "left bones", 2: "right bones"}
PROJECTION_FROM_C_ARM = np.eye(
    4
)  # the camera frame of DeepFluoro's poses is that of the C-arm, not that of the projection
PROJECTION_FROM_C_ARM[:3, :3] = turned(np.array([1.0, 1.0, 0.2]), 2.0)
PROJECTION_FROM_C_ARM[:3, 3] = [-157.6, -2.7, -631.8]
FEMUR_FROM_PELVIS = np.eye(4)  # how far the left femur moved after the scan
FEMUR_FROM_PELVIS[:3, :3] = turned(LEFT, 0.2)
FEMUR_FROM_PELVIS[:3, 3] = [1.0, -2.0, 3.0]


def single(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, dtype=np.float32)


def write_deepfluoro(
    path: Path,
    film: Film = Film(),
) -> list[np.ndarray]:  # the line integrals that the pictures show, (H, W), mm: the right way up
    """Write a file as Grupp et al. (2020) publish it, with two specimens and three X-rays each; the second X-ray is
    upside down."""
    hu, labels, lps_from_voxel = scan()
    density = transform_hu_to_density(torch.from_numpy(hu))
    views = [  # of the source, seen from the back; whether the picture is upside down
        (camera(BACK, DOWN, turned(DOWN, 0.15), 700.0, (8.0, -5.0)), False),
        (camera(BACK, -DOWN, turned(LEFT, -0.2), 650.0), True),
        (camera(BACK, DOWN, turned(DOWN, 0.6) @ turned(LEFT, 0.25), 720.0, (-12.0, 20.0)), False),
    ]
    pictures = []
    with h5py.File(path, "w") as file:
        file["proj-params/extrinsic"], file["proj-params/intrinsic"] = (
            single(PROJECTION_FROM_C_ARM),
            single(film.intrinsic(0.0)),
        )
        file["proj-params/num-cols"], file["proj-params/num-rows"] = film.width, film.height
        file["proj-params/pixel-col-spacing"], file["proj-params/pixel-row-spacing"] = (
            film.col_spacing,
            film.row_spacing,
        )
        specimen = file.create_group("17-1882")
        file["18-1109"] = specimen
        for name, voxels in (("vol", hu), ("vol-seg/image", labels)):
            specimen[f"{name}/pixels"] = voxels.transpose(2, 1, 0)  # slices, rows, columns
            specimen[f"{name}/spacing"], specimen[f"{name}/origin"] = (
                single(SPACING)[:, None],
                single(lps_from_voxel[:3, 3:]),
            )
            specimen[f"{name}/dir-mat"] = np.eye(3, dtype=np.float32)
        for label, name in BONES.items():
            specimen[f"vol-seg/labels-def/{label}"] = name
        points = CENTRE + np.array(list(LANDMARKS.values()))
        for name, point in zip(LANDMARKS, points):
            specimen[f"vol-landmarks/{name}"] = single(point)[:, None]
        for i, (volume_from_camera, upside_down) in enumerate(views):
            projection = specimen.create_group(f"projections/{i:03d}")
            integrals = line_integrals(density, lps_from_voxel, volume_from_camera, film)
            pictures.append(np.rot90(integrals, 2) if upside_down else integrals)
            projection["image/pixels"] = single(UNATTENUATED * np.exp(-ATTENUATION * integrals))
            projection["rot-180-for-up"] = int(upside_down)
            volume_from_c_arm = volume_from_camera @ PROJECTION_FROM_C_ARM
            projection["gt-poses/cam-to-pelvis-vol"] = single(volume_from_c_arm)
            projection["gt-poses/cam-to-left-femur-vol"] = single(FEMUR_FROM_PELVIS @ volume_from_c_arm)
            for name, pixel in zip(LANDMARKS, project(points, volume_from_camera, film)):
                projection[f"gt-landmarks/{name}"] = single(pixel)[:, None]
    return pictures


def write_ljubljana(
    path: Path,
    film: Film = Film(),
) -> list[np.ndarray]:  # the line integrals that the pictures show, (H, W), mm
    "Write a file like the repackaged angiograms of Mitrović et al. (2013), with two subjects and two X-rays each."
    hu, _, volume_from_voxel = scan()
    vessels = np.where(hu > 150, 1000 + hu, np.clip(hu, 0, 900))
    density = transform_hu_to_density(torch.from_numpy(np.where(vessels < 1000, 0, vessels)))
    views = {
        "ap": camera(FRONT, DOWN, turned(DOWN, -0.1), 750.0, (30.0, 10.0)),
        "lat": camera(LEFT, DOWN, turned(FRONT, 0.08), 800.0, (-10.0, 25.0)),
    }
    pictures = []
    with h5py.File(path, "w") as file:
        subject = file.create_group("subject01")
        file["subject02"] = subject
        subject["volume/pixels"] = single(vessels[::-1])  # the first axis is stored backwards
        subject["volume/spacing"], subject["volume/origin"] = single(SPACING), single(volume_from_voxel[:3, 3])
        subject["points"] = single(CENTRE + np.array(list(LANDMARKS.values())))
        for view, volume_from_camera in views.items():
            integrals = line_integrals(density, volume_from_voxel, volume_from_camera, film)
            pictures.append(integrals)
            subject[f"proj-{view}/pixels"] = single(BACKGROUND - CONTRAST * integrals)
            subject[f"proj-{view}/extrinsic"], subject[f"proj-{view}/intrinsic"] = (
                single(np.linalg.inv(volume_from_camera)),
                single(film.intrinsic(0.5)),
            )
            subject[f"proj-{view}/col-spacing"], subject[f"proj-{view}/row-spacing"] = (
                film.col_spacing,
                film.row_spacing,
            )
    return pictures
