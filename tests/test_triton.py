"""The GPU kernels against the reference: in Triton's interpreter, compiled for CUDA, and on a GPU if there is one."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

CUDA = torch.cuda.is_available()
if not CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton
pytest.importorskip("triton", reason="triton is not installed")

from diffdrr.geometry import RigidTransform, calibration_matrix, convert, pose_from_view
from diffdrr.kernels import dispatch, frames, reference
from diffdrr.kernels.gpu import frames as gpu_frames
from diffdrr.kernels.gpu import launch, siddon, trilinear
from diffdrr.kernels.request import Rays, Rule
from diffdrr.rendering import DRR

ROOT = Path(__file__).parents[1]
DEVICE = "cuda" if CUDA else "cpu"
on_gpu = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
# Of the largest value. Sums of some hundred terms; crossings in float32 are rounded to 1e-4 of a voxel on rays of a
# thousand voxels, and noise hides none of it.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
KERNELS = {
    "siddon": (siddon, Rule("siddon")),
    "exact": (trilinear, Rule("trilinear")),
    "samples": (trilinear, Rule("trilinear", 16)),
    "nearest": (trilinear, Rule("trilinear", 16, "nearest")),
}
kernels = pytest.mark.parametrize("kernel", KERNELS)


def example(**grid: object) -> object:
    "Load the example for a test of whole DRRs; the others run where torchio and roma are missing."
    for package in ("torchio", "roma"):
        pytest.importorskip(package)
    from diffdrr.volumes import load_example_ct

    return load_example_ct(**grid)


@contextmanager
def poisoned():
    "Fill memory that is not initialised with NaN, as torch does in this mode. Atomic additions are not allowed in it."
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def test_poison():
    with poisoned():
        assert torch.zeros(2).new_empty(3).isnan().all()


def scene(shape: tuple[int, int, int], n_rays: int, pictures: int = 1, volumes: int = 1):
    "Return a volume, labels below 3, and rays of all kinds: through, into and past it, parallel to one axis or two."
    torch.manual_seed(0)
    dtype = torch.float64
    volume = torch.rand(volumes, *shape, dtype=dtype)
    labels = torch.randint(0, 3, volume.shape, dtype=torch.uint8)
    size = torch.tensor(shape, dtype=dtype)
    source, target = (torch.rand(2, pictures, n_rays, 3, dtype=dtype) * 2.4 - 0.7) * size
    kinds = torch.arange(n_rays) % 16
    for axis in range(3):
        for kind in (axis, 3 + axis, 3 + (axis + 1) % 3):  # one axis, then pairs
            target[:, kinds == kind, axis] = source[:, kinds == kind, axis]
    rays = Rays(source, target, torch.rand(pictures, n_rays, dtype=dtype) + 0.5)
    return volume.to(DEVICE), labels.to(DEVICE), rays.map(lambda x: x.to(DEVICE))


def by_label(rule: Rule, labels: torch.Tensor) -> Rule:
    "Give each of three labels a channel."
    return rule._replace(labels=labels, n_labels=3)


def close(ours: torch.Tensor, theirs: torch.Tensor, dtype: torch.dtype = torch.float64) -> bool:
    return torch.allclose(ours.double(), theirs.double(), rtol=0, atol=TOLERANCE[dtype] * theirs.abs().max().item())


@pytest.mark.parametrize("shape", [(1, 5, 7), (6, 1, 4), (1, 1, 1), (3, 40, 2)], ids=str)
@kernels
def test_odd_shapes(kernel, shape):
    "The long one has rays in two parts."
    module, rule = KERNELS[kernel]
    volume, _, rays = scene(shape, 64)
    with poisoned():
        assert close(module.render(volume, rays, rule), reference.render(volume, rays, rule))


@pytest.mark.parametrize(
    "labelled", [pytest.param(False, id="sum"), pytest.param(True, id="labels", marks=pytest.mark.slow)]
)
@kernels
def test_batch_of_volumes(kernel, labelled):
    "Two pictures of two volumes, 17 x 18 rays, in tiles that stick out."
    module, rule = KERNELS[kernel]
    volume, labels, rays = scene((3, 2, 4), 17 * 18, pictures=2, volumes=2)
    rule = (by_label(rule, labels) if labelled else rule)._replace(width=18)
    with poisoned():
        assert close(module.render(volume, rays, rule), reference.render(volume, rays, rule))


@pytest.mark.parametrize("kernel", ["siddon", pytest.param("exact", marks=pytest.mark.slow)])
def test_labels_and_volumes_may_be_shared(kernel):
    "One of both serves all pictures."
    module, rule = KERNELS[kernel]
    volume, labels, rays = scene((2, 3, 2), 20, pictures=2, volumes=2)
    gradient = torch.randn(2, 3, 20, dtype=torch.float64, device=DEVICE)
    for v, l in ((volume, labels[:1]), (volume[:1], labels)):
        shared, own = by_label(rule, l), by_label(rule, l.expand_as(labels))
        each = v.expand_as(volume)
        assert torch.equal(module.render(v, rays, shared), module.render(each, rays, own))
        adjoint = module.backproject(gradient, each, rays, own)
        adjoint = adjoint if len(v) == 2 else adjoint.sum(dim=0, keepdim=True)
        assert close(module.backproject(gradient, v, rays, shared), adjoint)


@kernels
def test_rays_may_share_their_source(kernel):
    "The source of each picture is read once, not copied for every ray; it may be given once, too."
    module, rule = KERNELS[kernel]
    volume, _, rays = scene((5, 4, 6), 70, pictures=2)
    one = rays._replace(source=rays.source[:, :1])
    image, slopes = module.render_with_slopes(volume, one.each_with_source().map(torch.Tensor.contiguous), rule)
    for shared in (one, one.each_with_source()):
        ours = module.render_with_slopes(volume, shared, rule)
        assert torch.equal(ours[0], image) and torch.equal(ours[1], slopes)


def lattice_rays() -> Rays:
    "Rays through corners, along edges and in faces of voxels, through centres, and from a point to itself."
    half = torch.arange(-2, 10, dtype=torch.float64) / 2
    torch.manual_seed(1)
    source, target = half[torch.randint(0, len(half), (2, 1, 240, 3))]
    target[:, :20] = source[:, :20]
    target[:, 20:60, :2] = source[:, 20:60, :2]
    target[:, 60:80] = source[:, 60:80] + torch.tensor([3.0, -3.0, 3.0], dtype=torch.float64)
    return Rays(source, target, (target - source).norm(dim=-1)).map(lambda x: x.to(DEVICE))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", ["siddon", "exact", "samples"])
def test_values_of_lattice_rays(kernel, dtype):
    "Whatever rounding does at an edge, it decides about no length; a ray in a face is in the upper voxel."
    module, rule = KERNELS[kernel]
    volume = scene((4, 3, 5), 1)[0]
    rays = lattice_rays()
    with poisoned():
        ours = module.render(volume, rays.map(lambda x: x.to(dtype)), rule)
    assert close(ours, reference.render(volume, rays, rule), dtype)


@pytest.mark.parametrize("labelled", [False, True], ids=["sum", "labels"])
@kernels
def test_gradients(kernel, labelled):
    module, rule = KERNELS[kernel]
    volume, labels, rays = scene((5, 18, 3), 90, pictures=2, volumes=2 if labelled else 1)
    rule = by_label(rule, labels) if labelled else rule
    inputs = [x.clone().requires_grad_() for x in (volume, *rays)]
    image = reference.render(inputs[0], Rays(*inputs[1:]), rule)
    gradient = torch.randn_like(image)
    theirs = torch.autograd.grad(image, inputs, gradient, allow_unused=True)
    with poisoned():
        slopes, totals = module.ray_gradient(gradient, volume, rays, rule)
    assert close(slopes.mT, torch.cat(theirs[1:3], dim=-1))
    assert close(totals, theirs[3])
    assert close(module.backproject(gradient, volume, rays, rule), theirs[0])


@kernels
def test_slopes(kernel):
    "A volume long enough to have rays in parts."
    module, rule = KERNELS[kernel]
    volume, _, rays = scene((3, 4, 36), 60)
    inputs = rays.map(lambda x: x.clone().requires_grad_())
    with poisoned():
        image, slopes = module.render_with_slopes(volume, rays, rule)
        assert close(image, module.render(volume, rays, rule))
    theirs = reference.render(volume, inputs, rule)
    assert close(image, theirs)
    assert close(slopes.mT, torch.cat(torch.autograd.grad(theirs.sum(), inputs[:2]), dim=-1))


@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_alphas(mode):
    "Sampling between given ends, per ray, also outside the volume."
    volume, labels, rays = scene((5, 4, 6), 70)
    alphas = torch.stack([torch.rand_like(rays.length) * 1.5 - 0.4, torch.rand_like(rays.length) * 1.5], dim=-1)
    rule = Rule("trilinear", 9, mode, labels, 3, alphas)
    inputs = [x.clone().requires_grad_() for x in (volume, *rays)]
    theirs = reference.render(inputs[0], Rays(*inputs[1:]), rule)
    gradient = torch.randn_like(theirs)
    grads = torch.autograd.grad(theirs, inputs, gradient, allow_unused=True)
    grads = [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, grads)]
    with poisoned():
        assert close(trilinear.render(volume, rays, rule), theirs)
        slopes, totals = trilinear.ray_gradient(gradient, volume, rays, rule)
    assert close(slopes.mT, torch.cat(grads[1:3], dim=-1)) and close(totals, grads[3])
    assert close(trilinear.backproject(gradient, volume, rays, rule), grads[0])


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kernel", ["siddon", "exact"])
def test_volumes_are_read_as_stored(kernel, stored):
    module, rule = KERNELS[kernel]
    volume, _, rays = scene((5, 4, 6), 60)
    volume, rays = volume.to(stored), rays.map(torch.Tensor.float)
    theirs = reference.render(volume.double(), rays.map(torch.Tensor.double), rule)
    with poisoned():
        ours = module.render(volume, rays, rule)
    assert ours.dtype == torch.float32 and close(ours, theirs, torch.float32)
    adjoint = module.backproject(torch.ones_like(ours), volume, rays, rule)
    assert adjoint.dtype == (torch.float64 if stored == torch.float64 else torch.float32)
    assert abs((adjoint.double() * volume.double()).sum() / ours.double().sum() - 1) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("integers", [torch.int16, torch.int32, torch.int64], ids=str)
def test_labels_of_any_integers(integers):
    volume, labels, rays = scene((5, 4, 6), 60)
    theirs = siddon.render(volume, rays, by_label(Rule("siddon"), labels))
    assert torch.equal(siddon.render(volume, rays, by_label(Rule("siddon"), labels.to(integers))), theirs)


@pytest.mark.parametrize(
    "integers", [torch.int32, *(pytest.param(x, marks=pytest.mark.slow) for x in (torch.uint8, torch.int64))], ids=str
)
@kernels
def test_labels_that_changed_unseen(kernel, integers):
    "Written through `.data`, labels without a channel count for the nearest one. Nothing is written or read elsewhere."
    module, rule = KERNELS[kernel]
    volume, labels, rays = scene((5, 4, 6), 60)
    labels, wrong = labels.to(integers), torch.randint(0, 5, labels.shape, device=DEVICE)
    poked, nearest = by_label(rule, labels.clone()), by_label(rule, labels.clone())
    poked.labels.data[wrong == 0], nearest.labels[wrong == 0] = 255, 2
    if integers.is_signed:
        poked.labels.data[wrong == 1], nearest.labels[wrong == 1] = -7, 0
    gradient = torch.randn(1, 3, 60, dtype=torch.float64, device=DEVICE)
    for results in zip(*(every_use_of_labels(module, gradient, volume, rays, rule) for rule in (poked, nearest))):
        assert torch.equal(*results)


def every_use_of_labels(module, gradient: torch.Tensor, volume: torch.Tensor, rays: Rays, rule: Rule) -> list:
    back = module.backproject(gradient, volume, rays, rule)
    return [module.render(volume, rays, rule), *module.ray_gradient(gradient, volume, rays, rule), back]


@pytest.mark.parametrize("kernel", ["siddon", pytest.param("exact", marks=pytest.mark.slow)])
def test_float32_of_a_long_march(kernel):
    "A cone beam through 300 voxels from a source 900 voxels away, against float64."
    module, rule = KERNELS[kernel]
    torch.manual_seed(0)
    volume = torch.rand(1, 12, 300, 9, device=DEVICE)
    source = torch.tensor([5.0, -900.0, 4.0], device=DEVICE).expand(1, 64, 3)
    low, size = torch.tensor([[-1.0, 500.0, -1.0], [14.0, 1.0, 11.0]], device=DEVICE)
    target = torch.rand(1, 64, 3, device=DEVICE) * size + low
    rays = Rays(source, target, (target - source).norm(dim=-1))
    inputs = rays.map(lambda x: x.double().contiguous().requires_grad_())
    theirs = reference.render(volume.double(), inputs, rule)
    image, slopes = module.render_with_slopes(volume, rays, rule)
    assert close(image, theirs, torch.float32)
    assert close(slopes.mT, torch.cat(torch.autograd.grad(theirs.sum(), inputs[:2]), dim=-1), torch.float32)


def test_label_of_a_ray_close_to_a_face():
    "A ray leaves the face y = 7.5 downwards, by less than float32 can tell from its position in the volume."
    volume, labels = torch.ones(1, 3, 17, 1, device=DEVICE), torch.zeros(1, 3, 17, 1, dtype=torch.uint8, device=DEVICE)
    labels[:, :, 8:] = 1
    source = torch.tensor([[[0.0, 7.5, -0.35]]], device=DEVICE)
    target = torch.tensor([[[0.0, 7.4999, -300.0]]], device=DEVICE)
    rays = Rays(source, target, torch.ones(1, 1, device=DEVICE))
    for kernel in ("siddon", "exact"):
        module, rule = KERNELS[kernel]
        below, above = module.render(volume, rays, rule._replace(labels=labels, n_labels=2))[0, :, 0].tolist()
        assert below > 0 and above == 0


@kernels
def test_lost_rays_are_nan(kernel):
    "Coordinates that are not finite give NaN, and disturb no other ray."
    module, rule = KERNELS[kernel]
    volume, _, rays = scene((5, 4, 6), 40)
    theirs = module.render(volume, rays, rule)
    rays.source[0, 3, 1], rays.target[0, 5, 2], rays.target[0, 7, 0] = torch.nan, torch.inf, -torch.inf
    lost = torch.tensor([3, 5, 7])
    ours = module.render(volume, rays, rule)
    assert ours[0, 0, lost].isnan().all()
    ours[0, 0, lost] = theirs[0, 0, lost] = 0
    assert torch.equal(ours, theirs)


@kernels
def test_no_rays(kernel):
    module, rule = KERNELS[kernel]
    volume, labels, rays = scene((5, 4, 6), 0)
    assert module.render(volume, rays, rule).shape == (1, 1, 0)
    assert module.render(volume, rays, by_label(rule, labels)).shape == (1, 3, 0)
    assert (module.backproject(torch.zeros(1, 1, 0, dtype=torch.float64, device=DEVICE), volume, rays, rule) == 0).all()


@kernels
def test_inputs_need_not_be_contiguous(kernel):
    module, rule = KERNELS[kernel]
    volume, labels, rays = scene((5, 4, 6), 40)
    rays = rays._replace(source=rays.source[:, :1].expand_as(rays.target))
    theirs = module.render(volume, rays.map(torch.Tensor.contiguous), by_label(rule, labels))

    def strange(x):
        return x.movedim(-1, 0).contiguous().movedim(0, -1)

    assert not strange(volume).is_contiguous()
    ours = module.render(strange(volume), rays._replace(target=strange(rays.target)), by_label(rule, strange(labels)))
    assert torch.equal(ours, theirs)


@kernels
def test_deterministic_adjoint_is_refused(kernel):
    module, rule = KERNELS[kernel]
    volume, _, rays = scene((5, 4, 6), 1)
    with poisoned(), pytest.raises(RuntimeError, match="backend='torch'"):
        module.backproject(torch.ones(1, 1, 1, dtype=torch.float64, device=DEVICE), volume, rays, rule)


@pytest.mark.parametrize("kernel", ["siddon", "exact"])
def test_shapes_that_disagree(kernel):
    module, rule = KERNELS[kernel]
    volume, labels, rays = scene((5, 4, 6), 1, pictures=3, volumes=2)
    with pytest.raises(ValueError, match=r"volume must have shape \(1 or B, X, Y, Z\) with B = 3, not \(2, 5, 4, 6\)"):
        module.render(volume, rays, rule)
    with pytest.raises(ValueError, match=r"labels must have shape \(1 or B, X, Y, Z\) with B = 3, X = 5, .* not \(2, "):
        module.render(volume[:1], rays, by_label(rule, labels))


def import_kernels(before: str) -> subprocess.CompletedProcess:
    "Import the kernels in a process of their own, after some other code."
    code = f"{before}; import diffdrr.kernels.gpu.siddon"
    settings = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)


def test_missing_triton_is_named():
    done = import_kernels("import sys; sys.modules['triton'] = None")
    assert done.returncode and "ImportError: the GPU kernels need triton: pip install triton" in done.stderr


def test_old_triton_is_named():
    "Before 3.4, tuples cannot go from function to function of a kernel."
    done = import_kernels("import triton; triton.__version__ = '3.3.1'")
    assert done.returncode and "ImportError: the GPU kernels need triton 3.4 or newer, not 3.3.1" in done.stderr


COMPILE = """
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from diffdrr.kernels.gpu import exact, sampled, siddon

def compile(kernel, rays, volume, **constants):
    def kind(name):
        if name in constants:
            return "constexpr"
        if not name.endswith("_ptr"):
            return "i32"
        added = "*fp64" if volume == "fp64" else "*fp32"
        return {"volume_ptr": "*" + volume, "labels_ptr": "*u8", "adjoint_ptr": added}.get(name, "*" + rays)

    source = ASTSource(fn=kernel, signature={p.name: kind(p.name) for p in kernel.params}, constexprs=constants)
    code = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, enable_fp_fusion=True))
    assert code.asm["cubin"] and ".target sm_90" in code.asm["ptx"]

none = dict(labels_ptr=None, gradient_ptr=None)
small = dict(BATCHED=False, LABELS_BATCHED=False, INDEX=tl.int32, ROWS=16, BLOCK=128)
large = dict(BATCHED=True, LABELS_BATCHED=True, INDEX=tl.int64, ROWS=1, BLOCK=128)
whole, half = dict(PER_UNIT=1, UNROLL=2), dict(PER_UNIT=2, UNROLL=2)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "jobs",
    [
        """
compile(siddon.integrate_kernel, "fp32", "bf16", slopes_ptr=None, **none, **small)
compile(siddon.integrate_kernel, "fp64", "fp64", **large)
compile(siddon.channels_kernel, "fp32", "fp16", **large)
compile(siddon.adjoint_kernel, "fp64", "fp64", **large)
""",
        """
compile(exact.integrate_kernel, "fp32", "bf16", slopes_ptr=None, **none, **small, **whole)
compile(exact.integrate_kernel, "fp64", "fp32", **large, **half)
compile(exact.channels_kernel, "fp32", "fp32", **small, **half)
compile(exact.adjoint_kernel, "fp32", "fp32", **large, **half)
compile(sampled.integrate_kernel, "fp32", "fp16", labels_ptr=None, gradient_ptr=None, **small, NEAREST=False)
compile(sampled.integrate_kernel, "fp64", "fp64", alphas_ptr=None, **large, NEAREST=True)
compile(sampled.channels_kernel, "fp32", "bf16", alphas_ptr=None, **large, NEAREST=False)
compile(sampled.adjoint_kernel, "fp32", "fp32", alphas_ptr=None, **large, NEAREST=False)
""",
    ],
    ids=["siddon", "trilinear"],
)
def test_kernels_compile_for_cuda(jobs, tmp_path):
    "The whole compiler, up to machine code, runs without a GPU."
    settings = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    settings |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", COMPILE + jobs], env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def view(dtype: torch.dtype, shape: tuple[int, int, int] = (160, 193, 90), size: int = 200):
    "A cone beam on a noisy volume, tilted. With 192 voxels along y, samples would lie in faces: rounding would decide."
    torch.manual_seed(0)
    volume = torch.rand(1, *shape, device=DEVICE, dtype=torch.float64)
    centre = torch.tensor(shape, device=DEVICE, dtype=torch.float64) / 2
    grid = torch.linspace(-1, 1, size, device=DEVICE, dtype=torch.float64)
    u, v = torch.meshgrid(grid, grid, indexing="ij")
    target = (centre + torch.stack([150 * v + 40, 260 + 60 * u, 150 * u], dim=-1)).view(1, -1, 3)
    source = (centre - torch.tensor([60.0, 500, -20], device=DEVICE)).expand_as(target)
    rays = Rays(source.contiguous(), target, (target - source).norm(dim=-1))
    return volume.to(dtype), rays.map(lambda x: x.to(dtype))


@on_gpu
@kernels
def test_pictures_on_a_gpu(kernel):
    module, rule = KERNELS[kernel]
    few = kernel in ("samples", "nearest")  # samples of noise show where they are
    for dtype in [torch.float64] if few else TOLERANCE:
        volume, rays = view(dtype)
        exact = rays.map(torch.Tensor.double)
        with torch.no_grad():
            chunks = [exact.some(slice(i, i + 2000)) for i in range(0, 40000, 2000)]
            theirs = [reference.render(volume.double(), chunk, rule) for chunk in chunks]
        assert close(module.render(volume, rays, rule), torch.cat(theirs, dim=-1), dtype)


@on_gpu
@kernels
def test_adjoint_on_a_gpu(kernel):
    module, rule = KERNELS[kernel]
    for dtype in TOLERANCE:
        volume, rays = view(dtype)
        image = module.render(volume, rays, rule)
        weights = torch.rand_like(image)
        adjoint = module.backproject(weights, volume, rays, rule)
        forward, backward = (weights.double() * image.double()).sum(), (adjoint.double() * volume.double()).sum()
        assert abs(backward / forward - 1) < TOLERANCE[dtype]


@on_gpu
@kernels
def test_cuda_graph(kernel):
    "Nothing waits for the GPU, so that a graph can be captured, and replayed with other rays."
    module, rule = KERNELS[kernel]
    volume, rays = view(torch.float32)
    module.render_with_slopes(volume, rays, rule)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        image, slopes = module.render_with_slopes(volume, rays, rule)
    rays.source.add_(3.0)
    graph.replay()
    again, slopes_again = module.render_with_slopes(volume, rays, rule)
    assert torch.equal(image, again) and torch.equal(slopes, slopes_again)


@on_gpu
@pytest.mark.parametrize("renderer", ["siddon", "trilinear"])
def test_the_host_never_waits(renderer):
    "From the parameters of a pose to the picture, the channels and the gradients."
    subject = example(shape=(32, 32, 16), spacing=(11.2, 11.2, 20.0))
    drr = DRR(subject, sdd=1020.0, height=32, delx=10.0, renderer=renderer).to(DEVICE)
    angles = dict(parameterization="euler_angles", convention="ZXY")
    rotation, translation = torch.zeros(1, 3, device=DEVICE), torch.tensor([[0.0, 850, 0]], device=DEVICE)

    def render():
        ends = [x.clone().requires_grad_() for x in (rotation, translation)]
        for channels in (False, True):
            drr(*ends, **angles, mask_to_channels=channels).sum().backward()
        with torch.no_grad():
            return drr(*ends, **angles), drr.jacobian(*ends, **angles)

    render()  # compiles, and looks at the labels
    torch.cuda.set_sync_debug_mode("error")
    try:
        render()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(CUDA, reason="the interpreter plays the GPU")
@pytest.mark.parametrize("renderer", ["siddon", pytest.param("trilinear", marks=pytest.mark.slow)])
def test_a_picture_says_how_wide_it_is(monkeypatch, renderer):
    "Other rays than those of all pixels do not, and any width gives the same picture."
    monkeypatch.setattr(dispatch, "DEVICES", {"numba": "nothing", "triton": "cpu"})
    widths, picture_shape = [], launch.picture_shape
    monkeypatch.setattr(launch, "picture_shape", lambda n, width: widths.append(width) or picture_shape(n, width))
    subject = example(shape=(4, 4, 4), spacing=(90.0, 90.0, 80.0))
    drr = DRR(subject, 1020.0, height=20, width=24, delx=16.0, renderer=renderer)
    pose = pose_from_view("AP", 850.0)
    image, exact = drr(pose, **drr.renderer.exact), drr.renderer.exact
    drr.jacobian(pose, **exact)
    source, target = drr.detector(pose)
    whole = drr.render(drr.density, source, target, **exact)
    some = drr.render(drr.density, source, target[:, :48], **exact)
    subset = DRR(subject, 1020.0, height=20, width=24, delx=16.0, renderer=renderer, p_subsample=0.2)
    subset(pose, **exact)
    assert widths == [24, 24, 24, None, None] and torch.equal(some[0, 0], whole[0, 0, :48])
    assert close(image.flatten(), whole.flatten(), torch.float32)


SMALL = dict(sdd=1020.0, height=6, width=7, delx=55.0)
DETECTORS = {
    "cone": {},
    "parallel": dict(beam="parallel"),
    "some pixels": dict(p_subsample=0.3),
}


def small_drr(monkeypatch, **choices) -> DRR:
    "Make a DRR in double precision that is rendered by Triton, also where its interpreter plays the GPU."
    monkeypatch.setattr(dispatch, "DEVICES", {"numba": "nothing", "triton": DEVICE})
    subject = example(shape=(5, 6, 4), spacing=(70.0, 60.0, 80.0))
    torch.manual_seed(0)  # some pixels are drawn
    return DRR(subject, **SMALL, **choices).double().to(DEVICE)


ANGLES = dict(parameterization="euler_angles", convention="ZXY")
INTRINSICS = dict(sdd=[1000.0, 1100], delx=[55.0, 50], dely=[52.0, 57], x0=[3.0, -5], y0=[0.0, 2])


def pose_parameters() -> list[torch.Tensor]:
    "Euler angles and translations of two poses."
    ends = [[0.1, -0.2, 0.3], [-0.4, 0.2, 0.1]], [[3.0, 820, -7], [9, 850, 12]]
    return [torch.tensor(x, dtype=torch.float64, device=DEVICE).requires_grad_() for x in ends]


def slopes_of(results: Sequence[torch.Tensor], inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    "Differentiate something of results."
    weights = [torch.linspace(0, 1, x.numel(), dtype=x.dtype, device=DEVICE).view_as(x) for x in results]
    return torch.autograd.grad(results, inputs, weights)


def of_rays(drr: DRR) -> tuple[torch.Tensor, ...]:
    "Rays of two poses, one camera and two, and their derivatives by poses and intrinsics."
    pose = pose_parameters()
    intrinsics = [pose[0].new_tensor(pair).requires_grad_() for pair in INTRINSICS.values()]
    one = drr._rays(convert(*pose, **ANGLES))
    each = drr._rays(convert(*pose, **ANGLES), RigidTransform(calibration_matrix(*intrinsics)))
    return *one, *slopes_of(one, pose), *each, *slopes_of(each, [*pose, *intrinsics])


@pytest.mark.parametrize("choice", DETECTORS)
def test_rays_of_a_kernel(monkeypatch, choice):
    "They are those of torch, and so are their derivatives."
    drr = small_drr(monkeypatch, **DETECTORS[choice])
    with poisoned():
        ours = of_rays(drr)
    monkeypatch.setattr(frames, "can_serve", lambda *_: False)
    assert all(torch.allclose(*pair, rtol=1e-10, atol=1e-10) for pair in zip(ours, of_rays(drr), strict=True))


def watch_starts(monkeypatch) -> list:
    "List the kernels that are started from now on."
    started, start = [], launch.start
    monkeypatch.setattr(launch, "start", lambda kernel, *a, **k: started.append(kernel) or start(kernel, *a, **k))
    return started


@pytest.mark.parametrize("frame", ["world", "camera"])
@pytest.mark.parametrize("choice", DETECTORS)
def test_a_jacobian_of_kernels(monkeypatch, choice, frame):
    "Rays, slopes and what a twist makes of them come from kernels, and are those of the reference and torch."
    drr, started = small_drr(monkeypatch, **DETECTORS[choice]), watch_starts(monkeypatch)
    pose = convert(*pose_parameters(), **ANGLES)
    with poisoned():
        ours = drr.jacobian(pose, frame=frame)
    kernels = [gpu_frames.rays_kernel, siddon.integrate_kernel, launch.weigh_kernel, gpu_frames.twist_kernel]
    assert started == kernels
    monkeypatch.setattr(frames, "can_serve", lambda *_: False)
    drr.renderer.backend = "torch"
    theirs = drr.jacobian(pose, frame=frame)
    assert all(close(*pair) for pair in zip(ours, theirs, strict=True)) and started == kernels


def test_a_jacobian_of_one_pose_and_two_cameras(monkeypatch):
    "The frame in which the twist acts is one for both pictures."
    drr, pose = small_drr(monkeypatch), convert(*(x[:1] for x in pose_parameters()), **ANGLES)
    cameras = RigidTransform(calibration_matrix(*(pose.matrix.new_tensor(x) for x in INTRINSICS.values())))
    image, columns = drr.jacobian(pose, calibration=cameras, frame="camera")
    for i in range(2):
        camera = RigidTransform(cameras.matrix[i : i + 1])
        one = drr.jacobian(pose, calibration=camera, frame="camera")
        assert close(image[i : i + 1], one[0]) and close(columns[i : i + 1], one[1])


def test_a_picture_from_rays_of_a_kernel(monkeypatch):
    "A kernel makes the rays, one renders them, one weighs the slopes, and one sums them up: as torch does."
    drr, pose, started = small_drr(monkeypatch), pose_parameters(), watch_starts(monkeypatch)
    with poisoned():
        image = drr(*pose, **ANGLES)
        ours = image, *slopes_of([image], pose)
    weigh = launch.weigh_kernel
    assert started == [gpu_frames.rays_kernel, siddon.integrate_kernel, weigh, gpu_frames.slopes_kernel]
    monkeypatch.setattr(frames, "can_serve", lambda *_: False)
    drr.renderer.backend = "torch"
    image = drr(*pose, **ANGLES)
    theirs = image, *slopes_of([image], pose)
    assert all(torch.allclose(*pair, rtol=1e-10, atol=1e-10) for pair in zip(ours, theirs))


def test_who_makes_rays(monkeypatch):
    "The kernels, but not for another derivative than one in reverse, nor from what they cannot read."
    drr, told = small_drr(monkeypatch), []
    can_serve = frames.can_serve
    monkeypatch.setattr(frames, "can_serve", lambda *a: told.append(can_serve(*a)) or told[-1])
    pose = pose_from_view("AP", 850.0).double().to(DEVICE)

    def rays(matrix):
        return drr._rays(RigidTransform(matrix))[1]

    rays(pose.matrix)
    torch.func.vjp(rays, pose.matrix)
    with torch.autograd.forward_ad.dual_level():
        rays(pose.matrix)
    drr._affine_inverse.requires_grad_()
    assert rays(pose.matrix).requires_grad and told == [True, False, False, False]
    points, matrix = torch.zeros(1, 4, 3, device=DEVICE), torch.eye(4, device=DEVICE)[None]
    assert can_serve((matrix, matrix), (points, points), matrix)
    for wrong in (points[:, :2], points.expand(2, -1, -1), points[0], points.double(), points.to("meta")):
        assert not can_serve((matrix, matrix), (wrong, points), matrix)


def test_rays_of_nothing(monkeypatch):
    drr = small_drr(monkeypatch)
    assert drr(RigidTransform(torch.zeros(0, 4, 4, dtype=torch.float64, device=DEVICE))).shape == (0, 1, 6, 7)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_length_of_a_ray_without_one(dtype):
    "It is the smallest normal number, as in `Rays.between`, and its slope is none."
    points, matrix = torch.zeros(1, 1, 3, dtype=dtype, device=DEVICE), torch.eye(4, dtype=dtype, device=DEVICE)[None]
    scene = gpu_frames.Scene(points, points, matrix, matrix, matrix)
    rays = gpu_frames.make_rays(scene)
    assert rays.length.item() == Rays.between(points, points).length.item() > 0
    found = gpu_frames.sum_slopes(scene, Rays(points, points, rays.length))
    assert not any(x.any() for x in found)


@on_gpu
def test_volume_beyond_32_bits():
    "Rays at the far end of 2.2 thousand million voxels."
    volume = torch.zeros(1, 1300, 1300, 1300, dtype=torch.bfloat16, device=DEVICE)
    volume[0, -1] = 1
    source = torch.tensor([[[1299.0, 1200.0, 1290.0]]], device=DEVICE)
    target = torch.tensor([[[1299.0, 1310.0, 1295.0]]], device=DEVICE)
    inside = 99.5 / 110 * 2  # up to the last face, of 2 mm
    rays = Rays(source, target, torch.full((1, 1), 2.0, device=DEVICE))
    for kernel in ("siddon", "exact"):
        module, rule = KERNELS[kernel]
        assert abs(module.render(volume, rays, rule).item() - inside) < 0.02
