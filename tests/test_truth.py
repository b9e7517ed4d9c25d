"""Pictures against exact line integrals of solids, in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchio

from diffdrr.geometry import RigidTransform, calibration_matrix, convert
from diffdrr.rendering import DRR
from diffdrr.volumes import Box, Ellipsoid, Phantom, Structure, chest_ct, chest_phantom, read, water_equivalent

# Siddon is exact for volumes of constant voxels; this is the rounding of some hundred additions in float64.
EXACT = 1e-9

POSES = {
    "frontal": (0.0, 0.0, 0.0),
    "lateral": (np.pi / 2, 0.0, 0.0),
    "oblique": (0.7, -0.3, 0.2),
    "nearly along an axis": (1e-7, 0.0, 0.0),
}


def pose_of(rotation) -> RigidTransform:
    rotation, translation = (
        torch.tensor([rotation], dtype=torch.float64),
        torch.tensor([[1.0, 256.0, -2.0]], dtype=torch.float64),
    )
    return convert(rotation, translation, parameterization="euler_angles", convention="ZXY")


def render(
    density: np.ndarray, spacing: float, pose: RigidTransform, **options
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Render a density; return the picture and the rays.

    All numbers of the geometry are exact in float32, so that only the integrals can differ."""
    hu = torch.zeros(1, *density.shape)
    hu[0, 0, 0, 0] = 100
    drr = DRR(
        read(torchio.ScalarImage(tensor=hu, affine=np.diag([spacing, spacing, spacing, 1.0]))),
        sdd=512.0,
        height=12,
        width=14,
        delx=8.0,
        **options,
    ).double()
    source, target = drr.detector(pose)
    return drr.render(torch.tensor(density), source, target)[0, 0], source[0], target[0]


@pytest.mark.parametrize("rotation", POSES.values(), ids=POSES)
def test_siddon_of_boxes_is_exact(rotation):
    "Boxes whose faces lie between voxels: their volume is blocky, so the voxels lose nothing."
    spacing, shape = 4.0, (24, 20, 16)
    boxes = Phantom(
        tuple(
            Structure(Box(centre, radii), hu)
            for centre, radii, hu in (
                ((0, 0, 0), (40, 32, 24), 0.0),
                ((16, -8, 4), (16, 12, 8), 800.0),
                ((-20, 12, 0), (8, 8, 16), -1000.0),
                ((-20, 12, 0), (4, 4, 4), 2000.0),
            )
        )
    )
    affine = np.diag([spacing] * 3 + [1.0])
    affine[:3, 3] = -spacing * (np.array(shape) - 1) / 2
    density = water_equivalent(boxes.rasterize(shape, affine)[0].astype(np.float64))
    picture, source, target = render(density, spacing, pose_of(rotation))
    exact = boxes.line_integral(np.broadcast_to(source.numpy(), target.shape), target.numpy())
    assert exact.max() > 50
    np.testing.assert_allclose(picture.numpy(), exact, rtol=EXACT, atol=EXACT * exact.max())


@pytest.mark.parametrize("renderer", ["siddon", "trilinear"])
def test_ellipsoid_converges_to_its_chords(renderer):
    """A ball in finer and finer voxels: the error of the picture goes down with the size of the voxels, at least
    linearly."""
    ball = Phantom((Structure(Ellipsoid((2.0, -3.0, 1.0), (30, 22, 26)), 0.0),))
    errors = []
    for n in (16, 32, 64):
        spacing = 64.0 / n
        affine = np.diag([spacing] * 3 + [1.0])
        affine[:3, 3] = -spacing * (n - 1) / 2
        density = water_equivalent(ball.rasterize((n, n, n), affine)[0].astype(np.float64))
        picture, source, target = render(density, spacing, pose_of(POSES["oblique"]), renderer=renderer)
        exact = ball.line_integral(np.broadcast_to(source.numpy(), target.shape), target.numpy())
        errors.append(np.abs(picture.numpy() - exact).mean())
    assert errors[1] < 0.65 * errors[0] and errors[2] < 0.65 * errors[1], errors


def test_example_against_its_phantom():
    """The X-ray of the example's voxels is that of the phantom they were made from, within the noise and the size of
    the voxels."""
    hu, _, affine = chest_ct((180, 180, 111), (2.0, 2.0, 3.0))
    subject = read(torch.from_numpy(hu), affine=affine)
    drr = DRR(subject, sdd=1020.0, height=20, delx=16.0)
    pose = convert(
        torch.tensor([[0.3, 0.1, 0.0]]),
        torch.tensor([[0.0, 850.0, 0.0]]),
        parameterization="euler_angles",
        convention="ZXY",
    )
    source, target = drr.detector(pose)
    picture = drr.render(torch.tensor(water_equivalent(hu), dtype=torch.float32), source, target)[0, 0].numpy()
    exact = chest_phantom().line_integral(
        np.broadcast_to(source[0].double().numpy(), target[0].shape), target[0].double().numpy()
    )
    inside = exact > 30  # rays through the body
    assert np.abs(picture - exact)[inside].mean() < 0.015 * exact.max()
    assert np.corrcoef(picture, exact)[0, 1] > 0.995


def test_magnification():
    "A plate of 20 mm in the middle between source and detector is 40 mm wide in the picture."
    density = np.zeros((32, 32, 32))
    density[11:21, :, 11:21] = 1  # 20 mm along x and z
    hu = torch.zeros(1, 32, 32, 32)
    hu[0, 0, 0, 0] = 100
    drr = DRR(
        read(torchio.ScalarImage(tensor=hu, affine=np.diag([2.0, 2, 2, 1]))), sdd=1000.0, height=1, width=400, delx=0.25
    )
    pose = convert(
        torch.zeros(1, 3), torch.tensor([[0.0, 500.0, 0.0]]), parameterization="euler_angles", convention="ZXY"
    )
    profile = drr.render(torch.tensor(density, dtype=torch.float32), *drr.detector(pose))[0, 0]
    width = 0.25 * (profile > profile.max() / 2).sum()
    assert abs(width - 40) < 1.5


@pytest.mark.parametrize("name", ["sdd", "delx", "dely", "x0", "y0"])
@pytest.mark.parametrize("renderer", ["siddon", "trilinear"])
def test_intrinsic_gradients_against_finite_differences(renderer, name):
    rng = np.random.default_rng(0)
    density = torch.tensor(rng.random((8, 7, 6)))
    hu = torch.zeros(1, 8, 7, 6)
    hu[0, 0, 0, 0] = 100
    drr = DRR(
        read(torchio.ScalarImage(tensor=hu, affine=np.diag([4.0, 4, 4, 1]))),
        sdd=512.0,
        height=4,
        width=3,
        delx=8.0,
        renderer=renderer,
    ).double()
    values = dict(sdd=512.0, delx=8.3, dely=7.1, x0=1.3, y0=-2.1)
    options = {"n_points": None} if renderer == "trilinear" else {}

    def total(value: torch.Tensor) -> torch.Tensor:
        calibration = RigidTransform(
            calibration_matrix(
                **{k: value if k == name else torch.tensor(v, dtype=torch.float64) for k, v in values.items()}
            )
        )
        return drr.render(density, *drr.detector(pose_of((0.7, -0.3, 0.2)), calibration), **options).square().sum()

    assert torch.autograd.gradcheck(
        total, torch.tensor(values[name], dtype=torch.float64, requires_grad=True), rtol=1e-4
    )
