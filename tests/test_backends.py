"""The compiled kernel against the reference, on pictures of the example: values and all gradients."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffdrr.geometry import RigidTransform, convert
from diffdrr.kernels import Rays, Rule
from diffdrr.kernels.cpu import siddon as numba_siddon
from diffdrr.kernels.cpu import trilinear as numba_trilinear
from diffdrr.kernels.dispatch import as_classes
from diffdrr.rendering import DRR
from diffdrr.volumes import load_example_ct

ROOT = Path(__file__).parents[1]
GRID = dict(shape=(65, 64, 33), spacing=(5.6, 5.6, 10.0))
# Of the largest value. Both compute the same integral; the reference does it in the precision of the rays, at voxel
# coordinates of some hundred.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-10}


RENDERERS = {
    "siddon": ({}, {}),
    "exact trilinear": (dict(renderer="trilinear"), dict(n_points=None)),
    "sampled trilinear": (dict(renderer="trilinear"), dict(n_points=60)),
}
FRONTAL = dict(parameterization="euler_angles", convention="ZXY")


def frontal(dtype: torch.dtype = torch.float32):
    return convert(torch.zeros(1, 3, dtype=dtype), torch.tensor([[0.0, 850, 0]], dtype=dtype), **FRONTAL)


def pictures(
    dtype: torch.dtype, backend: str, orientation: str | None, labels: bool, renderer: str = "siddon", **options
):
    "Render three views; return them with the gradients of a weighted sum."
    choices, arguments = RENDERERS[renderer]
    drr = DRR(
        load_example_ct(orientation=orientation, **GRID),
        sdd=1020.0,
        height=23,
        width=30,
        delx=15.0,
        x0=20.0,
        backend=backend,
        **choices,
        **options,
    ).to(dtype)
    place = {"AP": [3.0, 850, 7], "PA": [3.0, -850, 7], None: [3.0, 7, -850]}[orientation]
    rotation = torch.tensor([[0.1, 0.2, -0.1], [1.2, -0.3, 0.2], [-0.7, 0.1, 2.0]], dtype=dtype, requires_grad=True)
    translation = torch.tensor([place] * 3, dtype=dtype, requires_grad=True)
    volume = drr.density.clone().requires_grad_()
    pose = convert(rotation, translation, **FRONTAL)
    img = drr.render(volume, *drr.detector(pose), mask_to_channels=labels, **arguments)
    weights = torch.randn(img.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    return img, *torch.autograd.grad((img * weights).sum(), (volume, rotation, translation))


PLACES = [("AP", "cone"), ("AP", "parallel"), ("PA", "cone"), (None, "cone")]  # orientation and beam


@pytest.mark.parametrize(
    "orientation, beam, labels",
    [
        *((*place, False) for place in PLACES),
        (*PLACES[0], True),
        *(pytest.param(*place, True, marks=pytest.mark.slow) for place in PLACES[1:]),
    ],
)
@pytest.mark.parametrize("renderer", RENDERERS)
def test_float64(renderer, orientation, beam, labels):
    reference, compiled = (
        pictures(torch.float64, backend, orientation, labels, renderer, beam=beam) for backend in ("torch", "numba")
    )
    for name, a, b in zip(("picture", "volume", "rotation", "translation"), reference, compiled):
        assert torch.allclose(a, b, rtol=0, atol=TOLERANCE[torch.float64] * a.abs().max().item()), name


@pytest.mark.parametrize("renderer", RENDERERS)
def test_float32_pictures(renderer):
    reference, compiled = (pictures(torch.float32, backend, "AP", False, renderer)[0] for backend in ("torch", "numba"))
    assert compiled.dtype == torch.float32
    assert torch.allclose(reference, compiled, rtol=0, atol=TOLERANCE[torch.float32] * reference.max().item())


@pytest.mark.parametrize(
    "options, reason",
    [
        (dict(reducefn="max"), "reducefn='max'"),
        (dict(mode="bilinear"), "mode='bilinear'"),
        (dict(renderer="trilinear", reducefn="max"), "reducefn='max'"),
    ],
    ids=["max", "bilinear", "trilinear"],
)
def test_named_backend_that_cannot_serve_says_why(options, reason):
    drr = DRR(load_example_ct(**GRID), sdd=1020.0, height=4, delx=80.0, backend="numba", **options)
    with pytest.raises(ValueError, match=f"backend 'numba' cannot serve.*{reason}"):
        drr(frontal())


@pytest.mark.parametrize(
    "labels", [pytest.param(False, id="sum"), pytest.param(True, id="labels", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("renderer", RENDERERS)
def test_torch_compiles_the_whole_render(renderer, labels):
    "`fullgraph=True` raises where the graph would break."
    choices, arguments = RENDERERS[renderer]
    drr = DRR(load_example_ct(**GRID), sdd=1020.0, height=8, delx=40.0, backend="numba", **choices)
    rotation, translation = (
        torch.full((1, 3), 0.1, requires_grad=True),
        torch.tensor([[0.0, 850, 0]], requires_grad=True),
    )

    def loss(r, t):
        return drr(r, t, mask_to_channels=labels, **FRONTAL, **arguments).square().mean()

    plain = loss(rotation, translation)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(rotation, translation)
    assert torch.allclose(plain, compiled, rtol=1e-5)
    for a, b in zip(*(torch.autograd.grad(x, (rotation, translation)) for x in (plain, compiled))):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5 * a.abs().max().item())


@pytest.mark.parametrize("n_labels, nearest", [(3, [0, 2]), (300, [0, 5])])
def test_a_graph_gives_labels_to_the_nearest_channel(n_labels, nearest):
    compiled = torch.compile(as_classes, fullgraph=True, backend="eager")
    assert compiled(torch.tensor([0, 5], dtype=torch.uint8), n_labels, (2,))[0].tolist() == nearest


def test_a_compiled_render_follows_the_label_map():
    drr = DRR(load_example_ct(**GRID), sdd=1020.0, height=8, delx=40.0, backend="numba")

    def render(matrix):
        return drr(RigidTransform(matrix), mask_to_channels=True)

    pose, compiled = frontal().matrix, torch.compile(render, fullgraph=True, backend="aot_eager")
    n = compiled(pose).shape[1]

    drr.mask = torch.where(drr.mask > 0, n + 2, 0).to(drr.mask.dtype)
    assert compiled(pose).shape[1] == n + 3 and torch.equal(compiled(pose), render(pose))
    other = DRR(load_example_ct(**GRID), sdd=1020.0, height=8, delx=40.0)
    drr.load_state_dict(other.state_dict())
    assert compiled(pose).shape[1] == n and torch.equal(compiled(pose), render(pose))

    whole = render(pose).sum(dim=1)
    drr.mask[:] = 255  # a graph does not notice that; it must not write to other memory
    assert compiled(pose).shape[1] == n and torch.allclose(compiled(pose)[:, -1], whole)
    assert render(pose).shape[1] == 256
    drr.mask = None
    with pytest.raises(Exception, match="mask_to_channels needs a label map"):
        compiled(pose)


@pytest.mark.parametrize("renderer", RENDERERS)
def test_transforms_of_torch_func_pass_through(renderer):
    choices, arguments = RENDERERS[renderer]
    drr = DRR(load_example_ct(**GRID), sdd=1020.0, height=5, delx=60.0, backend="numba", **choices).double()
    translation = torch.tensor([[2.0, 850, 1]], dtype=torch.float64)

    def picture(r):
        return drr(r, translation, **FRONTAL, **arguments)[0, 0]

    rotation = torch.tensor([[0.1, 0.2, -0.1]], dtype=torch.float64)
    by_rows = torch.autograd.functional.jacobian(picture, rotation)
    assert torch.allclose(torch.func.jacrev(picture)(rotation), by_rows, rtol=1e-9)
    assert torch.allclose(
        torch.func.jacfwd(picture)(rotation), by_rows, rtol=1e-6, atol=1e-6 * by_rows.abs().max().item()
    )
    three = torch.stack([rotation, rotation + 0.2, rotation - 0.3])
    assert torch.allclose(torch.func.vmap(picture)(three), torch.stack([picture(r) for r in three]), rtol=1e-9)
    for channels in (False, True):

        def size(r):
            return drr(r, translation, **FRONTAL, mask_to_channels=channels, **arguments).square().sum()

        assert torch.allclose(
            torch.func.hessian(size)(rotation), torch.autograd.functional.hessian(size, rotation), rtol=1e-6
        )


def test_deterministic_algorithms_are_no_obstacle():
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (pictures(torch.float32, "numba", "AP", False) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_half_precision_volume():
    drr = DRR(load_example_ct(**GRID), sdd=1020.0, height=8, delx=40.0, backend="numba")
    rays = drr.detector(frontal())
    half, full = drr.render(drr.density.half(), *rays), drr.render(drr.density, *rays)
    assert torch.allclose(half, full, rtol=0, atol=2e-3 * full.max().item())  # voxels with 11 bits


class Views(torch.utils.data.Dataset):
    "Renders in the workers of a data loader."

    def __init__(self, drr: DRR):
        self.drr = drr

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.drr(
            convert(
                torch.full((1, 3), 0.1 * i),
                torch.tensor([[0.0, 850, 0]]),
                parameterization="euler_angles",
                convention="ZXY",
            )
        )[0]


@pytest.mark.skipif("fork" not in torch.multiprocessing.get_all_start_methods(), reason="this platform cannot fork")
def test_workers_of_a_data_loader_render():
    "Forked workers inherit the compiled kernel without its threads; they start their own."
    views = Views(DRR(load_example_ct(**GRID), sdd=1020.0, height=16, delx=20.0, backend="numba"))
    here = torch.stack([views[i] for i in range(len(views))])  # starts the threads
    loader = torch.utils.data.DataLoader(views, batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    assert torch.allclose(torch.cat(list(loader)), here, atol=1e-6 * here.max().item())


@pytest.mark.slow
def test_compiled_code_on_disk_is_out_of_date_when_what_it_calls_has_changed(tmp_path):
    """An update of one file of the kernels must not leave the compiled code of another at work: Numba looks at the file
    of a function only."""
    shutil.copytree(
        Path(__file__).parents[1] / "diffdrr", tmp_path / "diffdrr", ignore=shutil.ignore_patterns("__pycache__")
    )
    code = """
import torch
from diffdrr.kernels import Rays, Rule, project
source, target = torch.tensor([[[[1.0, 1.0, -7.0]]], [[[1.0, 1.0, 9.0]]]])
print(project(torch.ones(3, 3, 3), Rays(source, target, torch.full((1, 1), 16.0)), Rule("siddon"), backend="numba").item())
"""

    def render():
        return float(
            subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
            ).stdout
        )

    whole = render()
    march = tmp_path / "diffdrr" / "kernels" / "cpu" / "march.py"
    text = march.read_text()
    march.write_text(
        text.replace(
            "enter, leave, enter_axis, leave_axis = 0.0, 1.0,", "enter, leave, enter_axis, leave_axis = 0.0, 0.5,"
        )
    )
    assert march.read_text() != text and render() == pytest.approx(whole / 2)


def test_compiled_code_on_disk_is_loaded_without_the_compiler():
    """A fresh process has its first picture, channels and gradients before Numba could have got ready to compile.

    Raise `NEWEST_NUMBA` if this fails with a new one, and all other tests pass."""
    code = """
import sys
import torch
from diffdrr.kernels.cpu import siddon, trilinear
from diffdrr.kernels.request import Rays, Rule
torch.manual_seed(0)
volume, target, length = torch.rand(1, 5, 6, 7), 4 * torch.rand(1, 70, 3) + 9, torch.ones(1, 70)
source, labels = torch.full((1, 1, 3), -9.0).expand_as(target), (volume > 0.5).byte()
rays = Rays(source, target, length)
for kernel, rule in (siddon, Rule("siddon")), (trilinear, Rule("trilinear")):
    image, slopes = kernel.render_with_slopes(volume, rays, rule)
    channels = kernel.render(volume, rays, rule._replace(labels=labels, n_labels=2))
    results = kernel.render(volume, rays, rule), slopes, channels, kernel.backproject(image, volume, rays, rule)
    print(*(x.double().sum().item() for x in results))
print("numba.np.linalg" in sys.modules)
"""

    def render():
        return subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.splitlines()

    *sums, _ = render()  # compiles what is not on disk yet
    *again, compiler = render()
    assert again == sums and compiler == "False"


@pytest.mark.slow
def test_without_a_folder_for_compiled_code():
    "A read-only installation in a container without a home renders, too."
    code = """
from numba.core import caching
for implementation in (caching.CompileResultCacheImpl, caching.CodeLibraryCacheImpl):
    implementation._locator_classes = []
import torch
from diffdrr.kernels import Rays, Rule, project
from diffdrr.kernels.cpu.compile import OPTIONS
assert not OPTIONS["cache"]
end = torch.tensor([[[1.0, 1.0, 9.0]]])
assert project(torch.ones(3, 3, 3), Rays(-end, end, torch.full((1, 1), 1.0)), Rule("siddon"), backend="numba") > 0
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr


def render_in_all_ways(labels: torch.Tensor | None) -> None:
    "Call every kernel for the CPU once."
    torch.manual_seed(0)
    volume = torch.rand(1, 5, 6, 7)
    rays = Rays(torch.rand(1, 20, 3) * 20 - 7, torch.rand(1, 20, 3) * 20 - 7, torch.rand(1, 20))
    n_labels = 1 if labels is None else 3
    for module, rule in (
        (numba_siddon, Rule("siddon", None, "nearest", labels, n_labels)),
        (numba_trilinear, Rule("trilinear", None, "bilinear", labels, n_labels)),
        (numba_trilinear, Rule("trilinear", 9, "bilinear", labels, n_labels)),
        (numba_trilinear, Rule("trilinear", 9, "nearest", labels, n_labels)),
    ):
        picture = module.render(volume, rays, rule)
        module.ray_gradient(picture, volume, rays, rule)
        module.backproject(picture, volume, rays, rule)


def test_kernels_give_back_the_memory_they_reserve():
    "References are counted only where memory is reserved: a wrong place would lose some, or give back too much."
    code = """
import torch
from numba.core.runtime import rtsys
from test_backends import render_in_all_ways
for labels in (None, torch.randint(0, 3, (1, 5, 6, 7), dtype=torch.uint8)):
    render_in_all_ways(labels)
    before = rtsys.get_allocation_stats()
    render_in_all_ways(labels)
    after = rtsys.get_allocation_stats()
    reserved = after.mi_alloc - before.mi_alloc
    assert reserved > 0, "nothing was counted"
    assert after.mi_free - before.mi_free == reserved, (before, after)
"""
    environment = os.environ | {"NUMBA_NRT_STATS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
