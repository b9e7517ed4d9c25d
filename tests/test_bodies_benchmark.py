"""The benchmark of bodies in real X-rays reads its data, and measures what it says."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.special import ndtr

from benchmarks import biplane, bodies, distances, outlines
from diffdrr.bodies import MeshBody, VoxelBody, ball
from diffdrr.geometry import Camera, Detector, RigidTransform, orientation_matrix, twist_to_matrix
from diffdrr.volumes import Grid
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


POSE = RigidTransform(twist_to_matrix(torch.tensor([[30.0, -20, 700, 0.4, -0.7, 0.2]])))


def test_poses_of_a_body_are_compared(metal):
    moved = POSE.compose(at(3.0, 0, 4))
    apart = distances.distance(moved, POSE, distances.points_of(metal))
    assert apart.points == pytest.approx(5, abs=1e-3) and apart.degrees == pytest.approx(0, abs=0.05)
    across, depth = distances.seen_apart(at(3.0, 0, DEPTH + 4), at(0, 0, DEPTH), torch.zeros(3), STILL)
    assert (across, depth) == pytest.approx((3, 4), abs=1e-3)


def test_a_twist_between_poses_is_about_the_centre():
    middle = torch.tensor([5.0, -7, 9])
    there = distances.start(POSE, middle, (0.0, 10.0), 1)
    twist = distances.twist_between(POSE, there, middle)
    assert twist[3:].abs().max() < 1e-5
    centres = [pose(middle[None, None])[0, 0].double() for pose in (POSE, there)]
    assert twist[:3].numpy() == pytest.approx((centres[1] - centres[0]).numpy(), abs=1e-3)
    turned = distances.start(POSE, middle, (10.0, 0.0), 1)
    twist = distances.twist_between(POSE, turned, middle)
    assert twist[:3].abs().max() < 1e-3
    assert twist[3:].norm().rad2deg() == pytest.approx(
        distances.distance(turned, POSE, torch.zeros(1, 1, 3)).degrees, 1e-3
    )


def test_starts_differ_in_size_only():
    near, far = (
        distances.twist_between(POSE, distances.start(POSE, torch.zeros(3), (s, s), 4), torch.zeros(3)) for s in (2, 4)
    )
    assert far.numpy() == pytest.approx(2 * near.numpy(), rel=1e-2)


def test_distances_in_sigmas_are_one_on_average():
    generator = np.random.default_rng(0)
    root = generator.standard_normal((6, 6))
    C = torch.from_numpy(root @ root.T)
    draws = [distances.in_sigmas(torch.from_numpy(root @ generator.standard_normal(6)), C) ** 2 for _ in range(500)]
    assert np.mean(draws) == pytest.approx(1, abs=0.1)


def test_bones_that_move_as_one_do_not_move_against_each_other():
    first = {"radius": POSE, "ulna": at(20, 3, -4).compose(POSE)}
    motion = RigidTransform(twist_to_matrix(torch.tensor([[9.0, 4, -2, 0.1, 0.5, 0.3]])))
    second = {name: pose.compose(motion) for name, pose in first.items()}
    points = torch.randn(1, 9, 3, generator=torch.Generator().manual_seed(0)) * 30
    still = distances.moved_together(first, second, points)
    assert still.points < 1e-2 and still.degrees < 0.1
    slid = distances.moved_together(first, second | {"ulna": at(0, 0, 2).compose(second["ulna"])}, points)
    assert slid.points == pytest.approx(2, abs=1e-2)


def test_attempts_are_told_right_from_wrong(metal, monkeypatch):
    monkeypatch.setattr(bodies, "outlines_at", lambda body, pose, xrays: [0.3, 0.4])
    place, unknown = at(0, 0, DEPTH), torch.eye(6)
    condition = bodies.Condition("femur", (0,), (10.0, 30.0))
    xray = seen(np.ones((SIZE, SIZE)))

    def method_of(shift, reason):
        pose = at(0, 0, DEPTH + shift)
        return lambda *given: bodies.Found({"femur": pose}, {"femur": unknown}, {"femur": 0.5}, {"femur": reason}, 2.0)

    cases = ((0.5, None), (0.5, "unlike"), (50.0, "unlike"), (50.0, None))
    attempts = [bodies.attempt(method_of(*case), condition, metal, (0, [xray, xray]), place, 0) for case in cases]
    row = bodies.summarize(attempts).iloc[0]
    assert row["within 1 mm and 1°, %"] == 50 and row["depth, mm"] == pytest.approx(0.5, abs=1e-3)
    assert [row[name] for name in ("wrong and flagged", "wrong, not flagged", "right, but flagged")] == [1, 1, 1]
    assert row["outlines, pixels"] == "0.30 and 0.40" and row["in sigmas"] == pytest.approx((0.25 / 6) ** 0.5, 1e-3)


def test_a_bone_is_laid_between_its_ends():
    xrays = [XRay(*[torch.ones(1, 1, SIZE, SIZE)] * 2, Camera(SDD, SIZE, SIZE, DELX), pose=p) for p in (STILL, POSE)]
    point = torch.tensor([[[20.0, 10, 500]]])
    pixels = [Detector.from_camera(x.camera, orientation_matrix(None)).project(x.pose, point)[0, 0] for x in xrays]
    joint = biplane.triangulate(xrays, [tuple(pixel.tolist()) for pixel in pixels])
    assert joint.numpy() == pytest.approx(point[0, 0].numpy(), abs=0.05)
    rod = torch.zeros(9, 11, 60)
    rod[3:6, 4:7] = 1.0
    body = VoxelBody(rod, Grid.around((9, 11, 60), (1.0, 1.0, 1.0)))
    shaft = joint + torch.tensor([5.0, -40, 12])
    place = biplane.laid_between(body, joint, shaft)
    ends = place(torch.tensor([[[0.0, 0, -23.5], [0, 0, 0]]]))[0]
    assert ends[0].numpy() == pytest.approx(joint.numpy(), abs=0.05)
    direction = (ends[1] - ends[0]) / (ends[1] - ends[0]).norm()
    assert (direction @ (shaft - joint) / (shaft - joint).norm()).item() == pytest.approx(1, abs=1e-5)


def test_a_start_may_be_turned_about_the_shaft():
    middle = torch.tensor([5.0, -7, 9])
    for seed, sign in ((0, 1), (1, -1)):
        there = bodies.Condition("ulna", (0, 1), (0.0, 0.0), 60.0).start(POSE, middle, seed)
        twist = distances.twist_between(POSE, there, middle)
        assert twist[:3].abs().max() < 1e-3
        assert (twist[3:] / sign).rad2deg().numpy() == pytest.approx(60 * POSE.rotation[0, :, 2].numpy(), abs=0.05)


def test_the_report_holds_all_tables():
    attempts = [
        bodies.Attempt("femur, two views", 3, seed, 0.4 + seed, 0.2, 0.3, 0.1, 1.1, [0.3, 0.5], 2.0, None)
        for seed in range(2)
    ]
    followed = bodies.Followed(10, 6, 5, 50, 1, 0.4, 0.3, 12.0)
    outlines_given = pd.DataFrame([{"view": 1, "frames": 2, "rms, pixels": 1.1}])
    results = bodies.Measurements(outlines_given, attempts, [followed], attempts, distances.Distance(0.25, 0.15))
    chosen = bodies.parse(["--quick"])
    text = bodies.as_markdown(chosen, bodies.machine.describe(), results)
    assert "0.30 and 0.50" in text and "0.25 mm over its box, and 0.15°" in text and "| 10 | 6 | 5 | 50 | 1 |" in text
    stored = json.loads(bodies.as_json(bodies.machine.describe(), results))
    assert stored["knee"][1]["distance"] == 1.4 and stored["apart"]["degrees"] == 0.15
    assert str(biplane.DATA) not in text and str(biplane.DATA) not in json.dumps(stored)


def test_without_the_data_nothing_is_measured(monkeypatch, capsys):
    monkeypatch.setattr(biplane, "missing", lambda: "the X-rays are elsewhere")
    assert bodies.main([]) is None and "the X-rays are elsewhere" in capsys.readouterr().out
