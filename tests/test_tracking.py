"""Tracks of bodies through simulated sequences: what a notebook cannot show, such as frames that show nothing, a body
that leaves and returns, and memory."""

import math
import weakref

import pytest
import torch

from diffdrr.bodies import MeshBody, Scene, VoxelBody, box, screw
from diffdrr.geometry import Camera, RigidTransform, axis_angle_to_matrix, make_matrix, pose_from_opencv
from diffdrr.tracking import Track, track
from diffdrr.volumes import Grid
from diffdrr.xrays import XRay

CAMERA = Camera(sdd=1200.0, height=80, width=80, delx=2.0)


def cameras(angles):
    "Look at the origin from 900 mm away."
    poses = []
    for angle in angles:
        extrinsic = torch.eye(4)
        extrinsic[:3, :3], extrinsic[2, 3] = axis_angle_to_matrix(torch.tensor([0.0, angle, 0])), 900.0
        poses.append(pose_from_opencv(extrinsic, torch.eye(4)))
    return poses


def motion(places, turns):
    "Make poses of centres (F, 3) and rotation vectors (F, 3)."
    return RigidTransform(make_matrix(axis_angle_to_matrix(torch.tensor(turns)), torch.tensor(places)))


def moments(bodies, poses, views, noise=0.01, hidden=()):
    "Render a sequence, one moment when it is asked for; in some frames without the bodies."
    scene = Scene(bodies, CAMERA, orientation=None)
    for i in range(len(next(iter(poses.values())))):
        generator, xrays = torch.Generator().manual_seed(i), []
        for view in views:
            image = torch.ones(1, 1, 80, 80)
            if i not in hidden:
                with torch.no_grad():
                    image = torch.exp(
                        -scene(view, {name: RigidTransform(pose.matrix[i]) for name, pose in poses.items()})
                    )
            image = image + noise * torch.randn(image.shape, generator=generator)
            xrays.append(XRay(image, torch.ones_like(image), CAMERA, pose=view))
        yield xrays


def first(poses):
    return {name: RigidTransform(pose.matrix[:1]) for name, pose in poses.items()}


def errors(found, poses, name):
    "Distance of the centre, mm, and angle, degrees."
    true = RigidTransform(poses[name].matrix.double())
    there = true(found.centres[name].expand(len(found), 1, 3))[:, 0]
    turn = found.poses[name].rotation @ true.rotation.mT
    angle = ((turn.diagonal(dim1=1, dim2=2).sum(dim=1) - 1) / 2).clamp(-1, 1).acos().rad2deg()
    return (found.centre(name) - there).norm(dim=1), angle


def bone():
    "Make a flat tube of bone with two unlike ends, of 2 mm voxels."
    grid = Grid((14, 12, 30), torch.diag(torch.tensor([2.0, 2, 2, 1])))
    x, y, z = torch.meshgrid(*(torch.arange(n) - (n - 1) / 2 for n in grid.shape), indexing="ij")
    wide = 3.0 + 0.15 * z.abs() + 2 * (z > 9) * (x > 0)
    radius = (x.square() + 3 * y.square()).sqrt()  # as wide as a forearm's bone: it shows how it is turned
    return VoxelBody(0.06 * (radius < wide) - 0.03 * (radius < wide - 1.5), grid)


def test_bone_of_voxels_in_two_views():
    bodies, F = {"bone": bone()}, 8
    poses = {
        "bone": motion([[-10.0 + 2 * i, 3 - i, -30] for i in range(F)], [[0.1 * i, 0.3, -0.05 * i] for i in range(F)])
    }
    found = track(bodies, moments(bodies, poses, cameras([0.0, 1.4])), first(poses), spread=(2, 2), verbose=False)
    mm, degrees = errors(found, poses, "bone")
    assert found.trusted("bone").all()
    assert mm.max() < 0.3 and degrees.max() < 0.6


@pytest.mark.filterwarnings("ignore::diffdrr.geometry.BlackPicture")
@pytest.mark.slow
def test_a_body_leaves_and_returns():
    bodies = {"block": MeshBody(box(30.0, 20.0, 25.0), 0.05)}
    x = [0.0, 10, 20, 30, 45, 60, 200, 200, 60, 45, 30, 20, 10, 0]
    poses = {"block": motion([[a, 0.0, 0.3 * a] for a in x], [[0.3, 0.02 * i, 0.1] for i in range(len(x))])}
    found = track(bodies, moments(bodies, poses, cameras([0.0, 0.6])), first(poses), spread=(2, 2), verbose=False)
    trusted = found.trusted("block")
    mm, _ = errors(found, poses, "block")
    assert trusted[:4].all() and trusted[-3:].all()
    assert not trusted[6:8].any()
    assert mm[trusted].max() < 1.0


@pytest.mark.filterwarnings("ignore::diffdrr.geometry.BlackPicture")
@pytest.mark.parametrize("reason", [pytest.param("hidden", marks=pytest.mark.slow), "black", "missing", "repeated"])
def test_frames_that_show_nothing_new(reason):
    bodies, F = {"block": MeshBody(box(30.0, 20.0, 25.0), 0.05)}, 8
    poses = {"block": motion([[3.0 * i, 2 * i, i] for i in range(F)], [[0.3, 0.05 * i, 0.1] for i in range(F)])}
    shown = list(moments(bodies, poses, cameras([0.0, 1.4]), hidden=[4] if reason == "hidden" else []))
    if reason == "missing":
        shown[4] = None
    if reason == "repeated":
        shown[4] = shown[3]
    if reason == "black":
        zero = torch.zeros_like(shown[4][0].image)
        shown[4] = [XRay(zero, zero + 1, CAMERA, pose=xray.pose) for xray in shown[4]]
    found = track(bodies, shown, first(poses), spread=(2, 2), smoothing=False, verbose=False)
    assert found.trusted("block").tolist() == [i != 4 for i in range(F)]
    mm, degrees = errors(found, poses, "block")
    assert mm.max() < 1.0 and degrees.max() < 1.5  # the prediction goes on where nothing was seen
    deviation = found.standard_deviation("block")
    assert (deviation[4] > deviation[3]).all() and (deviation[4] > deviation[5]).all()


def test_a_single_view_leaves_the_depth_to_the_prediction():
    bodies, F = {"screw": MeshBody(screw(50.0, 6.0, 1.5, 8.0, n=16), 0.1)}, 6
    poses = {"screw": motion([[2.0 * i, i, 5.0] for i in range(F)], [[0.5, 0.3 + 0.03 * i, 0.2] for i in range(F)])}
    found = track(bodies, moments(bodies, poses, cameras([0.0])), first(poses), spread=(2, 2), verbose=False)
    true = poses["screw"](torch.zeros(F, 1, 3))[:, 0]
    off = (found.centre("screw") - true).abs()
    assert found.trusted("screw").all()
    assert off[:, :2].max() < 0.4 and off[:, 2].max() < 8
    deviation = found.standard_deviation("screw")
    assert (deviation[:, 2] > 3 * deviation[:, 0]).all()


def test_nothing_of_a_frame_is_kept():
    bodies, F = {"block": MeshBody(box(30.0, 20.0, 25.0), 0.05)}, 6
    poses = {"block": motion([[float(i), 0, 0] for i in range(F)], [[0.3, 0.05 * i, 0.1] for i in range(F)])}
    alive, most = weakref.WeakSet(), []

    def watched():
        for xrays in moments(bodies, poses, cameras([0.0, 1.4])):
            alive.update(xray.image for xray in xrays)
            most.append(len(alive))
            yield xrays

    track(bodies, watched(), first(poses), spread=(2, 2), verbose=False)
    assert max(most) <= 2 * 2  # the moment before, while the next one is made


def test_a_track_is_the_same_after_a_file(tmp_path):
    bodies, F = {"block": MeshBody(box(30.0, 20.0, 25.0), 0.05)}, 4
    poses = {"block": motion([[float(i), 0, 0] for i in range(F)], [[0.3, 0.05 * i, 0.1] for i in range(F)])}
    path = tmp_path / "track.json"
    views = cameras([0.0, 1.4])
    found = track(bodies, moments(bodies, poses, views), first(poses), (2, 2), None, False, path, False)
    again = Track.load(path)
    assert torch.equal(again.poses["block"].matrix, found.poses["block"].matrix)
    assert torch.equal(again.covariance["block"], found.covariance["block"])
    assert again.about == found.about and again.reasons == found.reasons
    assert math.isclose(again.similarity["block"][0], found.similarity["block"][0])
