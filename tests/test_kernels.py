"""Compiled kernels against the reference on rays of all kinds: random geometry, and thousands of rays along faces,
edges and corners."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffdrr.kernels import Rays, Rule, backproject, kernel_threads, project, serial_torch

# Of the largest value. In float64 the same sum in another order; in float32 positions of up to some ten voxels, rounded
# to 1e-6 of a voxel.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}
# 32 samples between opposite faces of up to twelve voxels fall on no face between voxels, where the nearest voxel is a
# matter of rounding.
RULES = {
    "siddon": Rule("siddon"),
    "exact": Rule("trilinear"),
    "sampled": Rule("trilinear", 32),
    "nearest": Rule("trilinear", 32, "nearest"),
}
rules = pytest.mark.parametrize("rule", RULES)


def close(ours: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    return torch.allclose(
        ours.double(), expected.double(), rtol=0, atol=tolerance * max(1e-3, expected.abs().max().item())
    )


def between(source: torch.Tensor, target: torch.Tensor) -> Rays:
    "Rays as long as source and target are apart."
    return Rays(source, target, (target - source).norm(dim=-1))


def both(rule: str, volume, source, target, labels, n_labels: int, dtype: torch.dtype, gradients: bool):
    "Yield values, and gradients of a weighted sum, of the compiled kernel and of the reference in float64."
    chosen = RULES[rule]._replace(labels=labels, n_labels=n_labels)
    for backend, precision in (("numba", dtype), ("torch", torch.float64)):
        inputs = [
            x.detach().to(precision, copy=True).requires_grad_(gradients) for x in (volume, *between(source, target))
        ]
        image = project(inputs[0], Rays(*inputs[1:]), chosen, backend=backend)
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
    seed=st.integers(0, 2**31),
    shape=st.tuples(*[st.integers(1, 12)] * 3),
    labelled=st.booleans(),
    volumes=st.sampled_from([1, 2]),
    dtype=st.sampled_from(list(TOLERANCE)),
)
def test_random_rays(rule, seed, shape, labelled, volumes, dtype):
    if rule == "nearest":
        dtype = torch.float64  # in float32 a sample close to a face may round to another voxel
    if rule == "sampled" and dtype == torch.float32:
        labelled = False  # and here to another label
    volume, labels, source, target = scene(seed, shape, 40, volumes)
    volume, source, target = (
        x.to(dtype).double() for x in (volume, source, target)
    )  # the reference gets the same numbers
    ours, expected = both(
        rule,
        volume,
        source,
        target,
        labels if labelled else None,
        4 if labelled else 1,
        dtype,
        gradients=dtype == torch.float64,
    )
    for a, b in zip(ours, expected):
        assert close(
            a, b, TOLERANCE[dtype] if a is ours[0] else 100 * TOLERANCE[dtype]
        )  # derivatives divide by small numbers


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
    """A source so far away that float32 knows its place to some hundredths of a voxel: the ray through these numbers is
    still integrated to seven digits."""
    volume, _, source, target = scene(5, (30, 25, 20), 2000, 1)
    source = source * 1e4
    volume, source, target = (x.float().double() for x in (volume, source, target))
    ours, expected = both(rule, volume, source, target, None, 1, torch.float32, gradients=False)
    assert close(ours[0], expected[0], TOLERANCE[torch.float32])


@rules
@pytest.mark.parametrize("labelled", [False, True], ids=["sum", "labels"])
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["float32", "float64"]
)
def test_adjoint_identity(rule, labelled, dtype, tolerance):
    """The backprojection is the transpose of the projection, and the gradient with respect to the volume is the
    backprojection."""
    volume, labels, source, target = scene(0, (33, 21, 17), 4000, 1)
    chosen = RULES[rule]._replace(labels=labels if labelled else None, n_labels=4 if labelled else 1)
    rays, volume = between(source.to(dtype), target.to(dtype)), volume.to(dtype).requires_grad_()
    y = torch.rand(2, chosen.n_labels, 4000, dtype=dtype)
    image, adjoint = project(volume, rays, chosen, backend="numba"), backproject(y, volume.shape, rays, chosen, "numba")
    there, back = ((a * b).sum(dtype=torch.float64).item() for a, b in ((image, y), (volume, adjoint)))
    assert abs(there - back) < tolerance * abs(there)
    assert torch.equal(torch.autograd.grad(image, volume, y)[0], adjoint)


@rules
@pytest.mark.parametrize("labelled", [False, True], ids=["sum", "labels"])
def test_every_number_is_written(rule, labelled, monkeypatch):
    "Memory that a kernel gets without zeros in it is full of NaN here."
    volume, labels, source, target = scene(3, (6, 5, 4), 50, 1)

    def compare():
        return both(
            rule,
            volume,
            source,
            target,
            labels if labelled else None,
            4 if labelled else 1,
            torch.float64,
            gradients=True,
        )

    compare()  # what is compiled only now must still know NumPy
    empty = np.empty
    monkeypatch.setattr(np, "empty", lambda *args, **kwargs: empty(*args, **kwargs) * np.nan)
    ours, expected = compare()
    for a, b in zip(ours, expected):
        assert a.isfinite().all() and close(a, b, 1e-9)


@rules
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)], ids=str)
def test_half_precision_volumes_are_read_as_such(rule, dtype):
    volume, _, source, target = scene(4, (9, 8, 7), 500, 1)
    rays, half = between(source, target), volume.to(dtype).requires_grad_()
    image = project(half, rays, RULES[rule], backend="numba")
    assert torch.allclose(image, project(half.double(), rays, RULES[rule], backend="numba"), rtol=0, atol=1e-12)
    (slope,) = torch.autograd.grad(image.sum(), half)
    assert slope.dtype == dtype and slope.abs().max() > 0


@rules
def test_voxels_that_are_not_numbers_stay_where_they_are(rule):
    "A NaN or an infinity shows in the pixels whose rays meet it, and in no other."
    volume = torch.ones(9, 9, 9)
    source = torch.tensor([[[4.0, 4.0, -20.0]]]).expand(1, 81, 3)
    target = torch.cartesian_prod(torch.arange(9.0), torch.arange(9.0), torch.tensor([30.0]))[None]
    rays = Rays(source, target, torch.full((1, 81), 50.0))
    clean = project(volume, rays, RULES[rule], backend="numba")
    for strange in (torch.nan, torch.inf):
        volume[4, 4, 4] = strange
        image = project(volume, rays, RULES[rule], backend="numba")
        assert not image[0, 0, 40].isfinite() and torch.equal(image[0, 0, :9], clean[0, 0, :9])


@rules
@pytest.mark.parametrize("labelled", [False, True], ids=["sum", "labels"])
@pytest.mark.parametrize("strange", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_coordinates_that_are_not_numbers_give_such_pixels(rule, labelled, strange):
    "And leave the other pixels alone; an optimiser that has gone astray is noticed."
    volume, labels, _, _ = scene(5, (6, 5, 4), 1, 1)
    source, target = (
        torch.tensor([[[-5.0, 2.2, 1.7]] * 7], dtype=torch.float64),
        torch.tensor([[[12.0, 2.9, 2.1]] * 7], dtype=torch.float64),
    )
    for axis in range(3):
        source[0, axis, axis] = strange
        target[0, 3 + axis, axis] = strange
    source.requires_grad_(), target.requires_grad_()
    chosen = RULES[rule]._replace(labels=labels, n_labels=None) if labelled else RULES[rule]
    image = project(volume, Rays(source, target, torch.ones(1, 7, dtype=torch.float64)), chosen, backend="numba")
    assert image[..., :6].isnan().all() and (image[..., 6] > 0).any() and image[..., 6].isfinite().all()
    for gradient in torch.autograd.grad(image[..., 6].sum(), (source, target)):
        assert gradient[0, 6].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", ["auto", "torch", "numba"])
def test_rays_of_16_bits_are_refused(dtype, backend):
    volume, _, source, target = scene(6, (5, 4, 3), 10, 1)
    rays = between(source, target).map(lambda x: x.to(dtype))
    with pytest.raises(ValueError, match=f"rays must be float32 or float64, not {dtype}.*drr.float()"):
        project(volume.to(dtype), rays, Rule("siddon"), backend=backend)


def test_threads_that_render_at_once_leave_torch_its_threads():
    """Each render makes torch serial for a moment; threads go in and out in any order, and the last one out puts things
    right."""
    volume, _, source, target = scene(7, (9, 8, 7), 200, 1)
    rays = between(source, target)
    before = torch.get_num_threads()

    def work() -> int:
        for _ in range(50):
            with serial_torch():
                assert kernel_threads() == 3
                project(volume, rays, Rule("siddon"), backend="numba")
        return torch.get_num_threads()

    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(6) as several:
            assert [done.result() for done in [several.submit(work) for _ in range(6)]] == [3] * 6
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
