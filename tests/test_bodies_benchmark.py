"""The benchmark of bodies in real X-rays reads its data, and measures what it says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.special import ndtr

from benchmarks import biplane, outlines
from diffdrr.bodies import MeshBody, ball
from diffdrr.geometry import Camera, Detector, RigidTransform, orientation_matrix
from diffdrr.xrays import XRay

REAL = pytest.mark.skipif(biplane.missing() is not None, reason=str(biplane.missing()))
STILL = RigidTransform(torch.eye(4))
SIZE, DEPTH, SDD, DELX = 96, 600.0, 1000.0, 0.5
RADIUS = 11.7  # of a ball of metal, mm


def at(*translation: float) -> RigidTransform:
    matrix = torch.eye(4)
    matrix[:3, 3] = torch.tensor(translation)
    return RigidTransform(matrix)


def seen(image: np.ndarray) -> XRay:
    image = torch.from_numpy(image).float()[None, None]
    return XRay(image, torch.ones_like(image), Camera(SDD, SIZE, SIZE, DELX), pose=STILL)


@pytest.fixture(scope="module")
def metal() -> MeshBody:
    return MeshBody(ball(RADIUS, 64), biplane.METAL)


def simulated(metal: MeshBody, place: RigidTransform, blur: float, monkeypatch) -> XRay:
    "Tissue that varies, haze, the detector's blur, noise, and 8 bits; made with finer rays than the measure's."
    with monkeypatch.context() as finer:
        finer.setattr(outlines, "OVERSAMPLING", 7)
        finer.setattr(outlines, "SHARPNESS", 0.0)
        intensity = outlines.alone(metal, place, seen(np.ones((SIZE, SIZE))))[1]
    across, noise = np.arange(SIZE), np.random.default_rng(0).standard_normal((SIZE, SIZE))
    tissue = np.exp(-0.8 - 0.5 * np.sin(across / 20) - 0.4 * np.cos(across / 15)[:, None])
    counted = gaussian_filter(0.8 * intensity * tissue + 0.15, blur)
    return seen(((counted + 0.01 * counted**0.5 * noise) * 255).clip(0, 255).round() / 255)


@pytest.mark.parametrize("blur", [0.3, 0.7, 1.1])
def test_the_outline_of_a_body_where_it_is_lies_on_its_edge(metal, blur, monkeypatch):
    place = at(1.3, -2.1, DEPTH)
    found = outlines.outline(metal, place, simulated(metal, place, blur, monkeypatch))
    assert found.seen > 0.95 and found.rms < 0.1 and abs(found.mean) < 0.06


def test_an_outline_shows_by_how_much_a_body_is_off(metal, monkeypatch):
    xray = simulated(metal, at(0, 0, DEPTH), 0.7, monkeypatch)
    pixel = DELX * DEPTH / SDD
    aside = outlines.outline(metal, at(pixel, -2 * pixel, DEPTH), xray)
    nearer = outlines.outline(metal, at(0, 0, DEPTH * 0.96), xray)
    assert aside.sideways == pytest.approx([1, -2], abs=0.05) and aside.rms == pytest.approx(2.5**0.5, abs=0.05)
    assert nearer.mean == pytest.approx(-0.04 * RADIUS / pixel, abs=0.1)


def test_the_outline_of_a_disk_is_traced():
    away = np.hypot(*np.mgrid[-30.5:31, -40.5:41])
    points, normals = outlines.trace((20.3 - away + 0.5).clip(0, 1))
    outward = points - [41.0, 31.0]
    assert np.linalg.norm(outward, axis=1) == pytest.approx(20.3, abs=0.1)  # straight lines between pixels
    assert (normals * outward).sum(axis=1) == pytest.approx(20.3, abs=0.1)
    assert len(points) == pytest.approx(2 * np.pi * 20.3, abs=2)


def test_an_edge_is_found_between_pixels_or_not_at_all():
    columns = np.arange(40) + 0.5
    picture = np.tile(ndtr((columns - 20.37) / 0.8), (30, 1))
    points, normals = np.array([[18.0, 15.0], [23.0, 15.2], [9.0, 15.0]]), np.array([[1.0, 0.0]] * 3)
    found, slope = outlines.edges(picture, points, normals)
    assert found[:2] == pytest.approx([2.37, -2.63], abs=0.02) and np.isnan(found[2])
    assert slope[0] == pytest.approx(1 / (2 * np.pi * (0.8**2 + outlines.BLUR**2)) ** 0.5, rel=0.02)


def test_a_calibration_projects_as_opencv_does(tmp_path):
    turn = np.linalg.qr(np.random.default_rng(1).standard_normal((3, 3)))[0]
    turn *= np.sign(np.linalg.det(turn))
    K, t = np.array([[4000.0, 0, 390.0], [0, 4020.0, 610.0], [0, 0, 1]]), np.array([3.0, -20.0, 1200.0])
    rows = ["\n".join(",".join(f"{x:.12f}" for x in np.atleast_1d(row)) for row in part) for part in (K, turn, t)]
    text = "image size\n1024,768\n\ncamera matrix\n{}\n\nrotation\n{}\n\ntranslation\n{}\n".format(*rows)
    (tmp_path / "cam.txt").write_text(text)
    camera, pose = biplane.calibrated(tmp_path / "cam.txt", 1500.0)
    points = torch.randn(1, 5, 3, generator=torch.Generator().manual_seed(0)) * 40
    projected = Detector.from_camera(camera, orientation_matrix(None)).project(pose, points)[0].numpy()
    depth = points[0].numpy() @ turn.T + t
    assert (camera.width, camera.height) == (1024, 768)
    assert projected == pytest.approx((depth @ K.T / depth[:, 2:])[:, :2] + 0.5, abs=2e-2)


def test_a_window_shows_the_body_at_its_place(metal):
    corners = at(3, 4, DEPTH)(metal.corners[None].float())
    whole = seen(np.random.default_rng(0).random((SIZE, SIZE)))
    part = biplane.window(whole, corners, margin=3)
    full, cut = (
        Detector.from_camera(x.camera, orientation_matrix(None)).project(STILL, corners) for x in (whole, part)
    )
    left, top = (full - cut)[0, 0].round().int().tolist()
    assert (full - cut - torch.tensor([left, top])).abs().max() < 1e-3
    assert torch.equal(part.image, whole.image[..., top : top + part.camera.height, left : left + part.camera.width])
    with pytest.raises(ValueError, match="must lie in the picture"):
        biplane.window(whole, corners + 500)


def test_absent_data_are_named(tmp_path):
    assert "knee and wrist" in biplane.missing(tmp_path)


@REAL
def test_real_data_are_read():
    xrays, poses = biplane.knee_xrays(0), biplane.femur_poses()
    assert [tuple(x.image.shape) for x in xrays] == [(1, 1, 1024, 1024)] * 2 and len(poses) == len(biplane.KNEE_FRAMES)
    assert all(0.7 < x.mask.mean() < 0.9 and x.image.max() == 1 for x in xrays)
    radius = biplane.bone("radius")
    assert tuple(radius.density.shape) == (68, 86, 128) and 0.03 < radius.density.max() < 0.1
