"""Scenes of bodies: parts that make the whole on any grid, and what must survive a copy, a file and a move."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from diffdrr.bodies import MeshBody, Scene, VoxelBody, screw
from diffdrr.geometry import Camera, RigidTransform, convert
from diffdrr.volumes import Grid

CAMERA = Camera(sdd=400.0, height=9, width=11, delx=4.0)


def turned(*angles: float, at: tuple[float, float, float] = (0.0, 0.0, 0.0)) -> RigidTransform:
    rotation, translation = (torch.tensor([x], dtype=torch.float64) for x in (angles, at))
    return convert(rotation, translation, parameterization="axis_angle")


def oblique_body(renderer: str, voxel_shift: float = 0.5) -> VoxelBody:
    "Make a body of random voxels on a grid that is turned and sheared."
    linear = torch.tensor([[1.9, 0.2, -0.1], [-0.3, 2.1, 0.4], [0.1, -0.2, 2.4]], dtype=torch.float64)
    affine = torch.eye(4, dtype=torch.float64)
    affine[:3, :3], affine[:3, 3] = linear, torch.tensor([-10.0, -9.0, -11.0])
    density = torch.rand(12, 10, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return VoxelBody(density, Grid((12, 10, 9), affine, voxel_shift), renderer)


@pytest.mark.parametrize("voxel_shift", [0.5, 0.0])
@pytest.mark.parametrize("renderer", ["siddon", "trilinear"])
def test_parts_make_the_whole(renderer: str, voxel_shift: float):
    "Also where they move together, and where a part is a single voxel."
    whole = oblique_body(renderer, voxel_shift)
    part = torch.randint(3, whole.grid.shape, generator=torch.Generator().manual_seed(1))
    part[6, 5, 4] = 3
    parts = {str(k): whole.cut(part == k) for k in range(4)}
    assert parts["3"].grid.shape == (1, 1, 1)
    pose = RigidTransform(torch.cat([turned(0.3 * k, 0.2, -0.4 * k, at=(2.0, 250, k)).matrix for k in range(3)]))
    for together in ({}, {name: turned(0.4, 0.1, -0.3, at=(3.0, 2, 1)) for name in [*parts, "whole"]}):
        places = [{name: together[name] for name in some if name in together} for some in (parts, ["whole"])]
        ours = Scene(parts, CAMERA).double()(pose, places[0])
        assert (ours - Scene({"whole": whole}, CAMERA).double()(pose, places[1])).abs().max() < 1e-10 * ours.max()


def test_a_body_that_moves_is_a_camera_that_moves_the_other_way():
    scene = Scene(
        {"block": oblique_body("siddon"), "screw": MeshBody(screw(24.0, 3.0, 0.9, 3.0, n=8))}, CAMERA
    ).double()
    pose, move = turned(0.1, 0.2, 0.3, at=(1.0, 250, 2)), turned(0.5, -0.1, 0.7, at=(3.0, -4, 5))
    moved = scene(pose.compose(move), dict.fromkeys(scene.names, move))
    assert (moved - scene(pose)).abs().max() < 1e-10 * moved.max()


def test_copies_and_files():
    scene = Scene({"block": oblique_body("trilinear"), "screw": MeshBody(screw(24.0, 3.0, 0.9, 3.0, n=8))}, CAMERA)
    pose, places = turned(0.0, 0.0, 0.1, at=(0.0, 250, 0)).float(), {"screw": turned(0.9, 0, 0, at=(9.0, 3, 1)).float()}
    image = scene(pose, places)
    for other in (copy.deepcopy(scene), pickle.loads(pickle.dumps(scene))):
        assert torch.equal(other(pose, places), image)
        other.load_state_dict(scene.state_dict())
        assert torch.equal(other(pose, places), image)
    assert (scene.double()(pose.double(), {"screw": places["screw"].double()}) - image).abs().max() < 1e-4 * image.max()


def test_two_cameras_share_bodies():
    bodies = {"block": oblique_body("siddon")}
    first, second = (Scene(bodies, CAMERA.replace(sdd=sdd)) for sdd in (400.0, 500.0))
    pose = turned(0.0, 0.0, 0.1, at=(0.0, 250, 0)).float()
    bodies["block"].density = torch.nn.Parameter(bodies["block"].density)
    (first(pose) - second(pose)).square().mean().backward()
    assert bodies["block"].density.grad.any()
