"""Compiled kernels against the reference on rays of all kinds: random geometry, and thousands of rays along faces, edges and corners."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffdrr.kernels import dispatch

# Of the largest value. In float64 the same sum in another order; in float32 positions of up to some ten voxels, rounded to 1e-6 of a voxel.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
# 32 samples between opposite faces of up to twelve voxels fall on no face between voxels, where the nearest voxel is a matter of rounding.
RULES = {
    "siddon": (dispatch.siddon, {}), "exact": (dispatch.trilinear, {}), "sampled": (dispatch.trilinear, dict(n_points=32)),
    "nearest": (dispatch.trilinear, dict(n_points=32, mode="nearest")),
}
rules = pytest.mark.parametrize("rule", RULES)


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return torch.allclose(ours.double(), expected.double(), rtol=0, atol=tolerance * max(1e-3, expected.abs().max().item()))


def both(rule: str, volume, source, target, labels, n_labels: int, dtype: torch.dtype, gradients: bool):
    "Yield values, and gradients of a weighted sum, of the compiled kernel and of the reference in float64."
    kernel, options = RULES[rule]
    for backend, precision in (("numba", dtype), ("torch", torch.float64)):
        inputs = [x.detach().to(precision, copy=True).requires_grad_(gradients) for x in (volume, source, target, (target - source).norm(dim=-1))]
        image = kernel(*inputs, labels, n_labels, backend=backend, **options)
        if not gradients:
            yield (image,)
            continue
        weights = torch.linspace(-1, 2, image.numel(), dtype=precision).view(image.shape)
        yield (image, *torch.autograd.grad((image * weights).sum(), inputs))


def scene(seed: int, shape: tuple[int, int, int], rays: int, volumes: int):
    "A random volume, labels, and rays from around it to around it."
    torch.manual_seed(seed)
    size = torch.tensor(shape, dtype=torch.float64)
    volume = torch.rand(*((2,) if volumes == 2 else ()), *shape, dtype=torch.float64)
    labels = torch.randint(0, 4, volume.shape, dtype=torch.uint8)
    source, target = ((torch.rand(2, rays, 3, dtype=torch.float64) - 0.5) * (3 * size + 4) + size / 2 for _ in range(2))
    return volume, labels, source, target


@rules
@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 2**31), shape=st.tuples(*[st.integers(1, 12)] * 3), labelled=st.booleans(), volumes=st.sampled_from([1, 2]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_random_rays(rule, seed, shape, labelled, volumes, dtype):
    if rule == "nearest":
        dtype = torch.float64  # in float32 a sample close to a face may round to another voxel
    if rule == "sampled" and dtype == torch.float32:
        labelled = False  # and here to another label
    volume, labels, source, target = scene(seed, shape, 40, volumes)
    volume, source, target = (x.to(dtype).double() for x in (volume, source, target))  # the reference gets the same numbers
    ours, expected = both(rule, volume, source, target, labels if labelled else None, 4 if labelled else 1, dtype, gradients=dtype == torch.float64)
    for a, b in zip(ours, expected):
        assert close(a, b, TOLERANCE[dtype] if a is ours[0] else 100 * TOLERANCE[dtype])  # derivatives divide by small numbers


@pytest.mark.parametrize("rule", ["siddon", "exact", "sampled"])
def test_rays_along_faces_edges_and_corners(rule):
    "Ends on a lattice of half voxels: rays in planes between voxels, along edges, through corners, of length zero."
    generator = torch.Generator().manual_seed(0)
    shape = (5, 4, 3)
    volume = torch.rand(shape, dtype=torch.float64, generator=generator)
    source, target = (torch.randint(-5, 14, (1, 6000, 3), generator=generator).double() / 2 for _ in range(2))
    target[:, :1500, 0] = source[:, :1500, 0]
    target[:, 1000:2500, 1] = source[:, 1000:2500, 1]
    target[:, 2000:3500, 2] = source[:, 2000:3500, 2]
    ours, expected = both(rule, volume, source, target, None, 1, torch.float64, gradients=False)
    assert close(ours[0], expected[0], 1e-11)
    single, _ = both(rule, volume, source, target, None, 1, torch.float32, gradients=False)
    assert close(single[0], expected[0], 2e-5)


@pytest.mark.parametrize("rule", ["siddon", "exact", "sampled"])
def test_sources_far_away(rule):
    "A source so far away that float32 knows its place to some hundredths of a voxel: the ray through these numbers is still integrated to seven digits."
    volume, _, source, target = scene(5, (30, 25, 20), 2000, 1)
    source = source * 1e4
    volume, source, target = (x.float().double() for x in (volume, source, target))
    ours, expected = both(rule, volume, source, target, None, 1, torch.float32, gradients=False)
    assert close(ours[0], expected[0], TOLERANCE[torch.float32])


@rules
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["float32", "float64"])
def test_adjoint_identity(rule, dtype, tolerance):
    "The gradient with respect to the volume is the transpose of the projection."
    kernel, options = RULES[rule]
    volume, _, source, target = (x.to(dtype) for x in scene(0, (33, 21, 17), 4000, 1))
    y = torch.rand(2, 1, 4000, dtype=dtype)
    volume.requires_grad_()
    image = kernel(volume, source, target, (target - source).norm(dim=-1), backend="numba", **options)
    image.backward(y)
    there, back = (image * y).sum(dtype=torch.float64).item(), (volume.detach() * volume.grad).sum(dtype=torch.float64).item()
    assert abs(there - back) < tolerance * abs(there)


@rules
@pytest.mark.parametrize("labelled", [False, True], ids=["sum", "labels"])
def test_every_number_is_written(rule, labelled, monkeypatch):
    "Memory that a kernel gets without zeros in it is full of NaN here."
    volume, labels, source, target = scene(3, (6, 5, 4), 50, 1)
    compare = lambda: both(rule, volume, source, target, labels if labelled else None, 4 if labelled else 1, torch.float64, gradients=True)
    compare()  # what is compiled only now must still know NumPy
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda *args, **kwargs: empty(*args, **kwargs) * np.nan)
    ours, expected = compare()
    for a, b in zip(ours, expected):
        assert a.isfinite().all() and close(a, b, 1e-9)


@rules
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_volumes_are_read_as_such(rule, dtype):
    kernel, options = RULES[rule]
    volume, _, source, target = scene(4, (9, 8, 7), 500, 1)
    rays = source, target, (target - source).norm(dim=-1)
    half = volume.to(dtype).requires_grad_()
    image = kernel(half, *rays, backend="numba", **options)
    assert torch.allclose(image, kernel(half.double(), *rays, backend="numba", **options), rtol=0, atol=1e-12)
    slope, = torch.autograd.grad(image.sum(), half)
    assert slope.dtype == dtype and slope.abs().max() > 0


@rules
def test_voxels_that_are_not_numbers_stay_where_they_are(rule):
    "A NaN or an infinity shows in the pixels whose rays meet it, and in no other."
    kernel, options = RULES[rule]
    volume = torch.ones(9, 9, 9)
    source = torch.tensor([[[4.0, 4.0, -20.0]]]).expand(1, 81, 3)
    target = torch.cartesian_prod(torch.arange(9.0), torch.arange(9.0), torch.tensor([30.0]))[None]
    clean = kernel(volume, source, target, torch.full((1, 81), 50.0), backend="numba", **options)
    for strange in (torch.nan, torch.inf):
        volume[4, 4, 4] = strange
        image = kernel(volume, source, target, torch.full((1, 81), 50.0), backend="numba", **options)
        assert not image[0, 0, 40].isfinite() and torch.equal(image[0, 0, :9], clean[0, 0, :9])


@rules
@pytest.mark.parametrize("labelled", [False, True], ids=["sum", "labels"])
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_coordinates_that_are_not_numbers_give_such_pixels(rule, labelled, strange):
    "And leave the other pixels alone; an optimiser that has gone astray is noticed."
    kernel, options = RULES[rule]
    volume, labels, _, _ = scene(5, (6, 5, 4), 1, 1)
    source, target = torch.tensor([[[-5.0, 2.2, 1.7]] * 7], dtype=torch.float64), torch.tensor([[[12.0, 2.9, 2.1]] * 7], dtype=torch.float64)
    for axis in range(3):
        source[0, axis, axis] = strange
        target[0, 3 + axis, axis] = strange
    source.requires_grad_(), target.requires_grad_()
    image = kernel(volume, source, target, torch.ones(1, 7, dtype=torch.float64), labels if labelled else None, backend="numba", **options)
    assert image[..., :6].isnan().all() and (image[..., 6] > 0).any() and image[..., 6].isfinite().all()
    for gradient in torch.autograd.grad(image[..., 6].sum(), (source, target)):
        assert gradient[0, 6].isfinite().all()
