"""Captured pictures without a GPU: what would be recorded waits for nothing and copies nothing, and what a replay would
get wrong, since it always uses the same memory, is right or refused."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton
pytest.importorskip("triton", reason="triton is not installed")

from diffdrr.geometry import RigidTransform, calibration_matrix, convert, pose_from_view
from diffdrr.kernels import dispatch
from diffdrr.rendering import DRR
from diffdrr.volumes import load_example_ct
from tools.gpu.pretend import watching

SUBJECT = load_example_ct(shape=(6, 6, 4), spacing=(60.0, 60.0, 80.0))
ANGLES = dict(parameterization="euler_angles", convention="ZXY")
CAMERA = dict(sdd=1020.0, height=5, delx=80.0)


class Graphed:
    "What `torch.cuda.make_graphed_callables` returns: a function whose results and gradients are always in one place."

    def __init__(self, function: Callable[..., torch.Tensor], inputs: tuple[torch.Tensor, ...]):
        self.function, self.inputs, self.wanted = function, inputs, any(x.requires_grad for x in inputs)
        self.result = function(*inputs).detach().clone()
        self.gradients = [torch.zeros_like(x) for x in inputs]
        self.passes = 0

    def __call__(self, *inputs: torch.Tensor) -> torch.Tensor:
        return Replay.apply(self, *inputs)


class Replay(torch.autograd.Function):
    "One replay."

    @staticmethod
    def forward(ctx, graphed, *inputs):
        ctx.graphed = graphed
        for ours, given in zip(graphed.inputs, inputs):
            ours.data.copy_(given)
        with torch.set_grad_enabled(graphed.wanted):
            graphed.recorded = graphed.function(*graphed.inputs)
        graphed.result.copy_(graphed.recorded.detach())
        return graphed.result.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        found = torch.autograd.grad(ctx.graphed.recorded, ctx.graphed.inputs, gradient)  # of the last replay
        for ours, new in zip(ctx.graphed.gradients, found):
            ours.copy_(new)
        return None, *(x.detach() for x in ctx.graphed.gradients)


@pytest.fixture
def drr(monkeypatch) -> DRR:
    "A DRR, where the CPU plays the GPU."
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", Graphed)
    monkeypatch.setitem(dispatch.DEVICES, "triton", "cpu")
    return DRR(SUBJECT, **CAMERA, backend="numba").double()


def pose(y: float = 850.0) -> RigidTransform:
    return RigidTransform(pose_from_view("AP", y).matrix.double())


def parameters(*angles: float) -> list[torch.Tensor]:
    rotation, translation = torch.tensor([angles]).double(), torch.tensor([[3.0, 850, -9]]).double()
    return [rotation.requires_grad_(), translation.requires_grad_()]


def test_pictures_and_gradients(drr):
    "They are those of the DRR, for other parameters than were captured."
    render = drr.capture(*parameters(0.0, 0, 0), **ANGLES)
    for angles in ((0.1, 0.2, -0.1), (0.3, -0.2, 0.2)):
        ours, theirs = parameters(*angles), parameters(*angles)
        images = render(*ours), drr(*theirs, **ANGLES)
        assert torch.allclose(*images, rtol=0, atol=1e-12)
        for image in images:
            image.square().sum().backward()
        assert all(torch.allclose(a.grad, b.grad, rtol=1e-12) and b.grad.any() for a, b in zip(ours, theirs))


def test_results_have_memory_of_their_own(drr):
    "Also gradients, which torch would let a tensor keep."
    render = drr.capture(pose())
    first, second = (pose(y).matrix.requires_grad_() for y in (850.0, 700.0))
    image = render(RigidTransform(first))
    before = image.detach().clone()
    image.sum().backward()
    gradient = first.grad.clone()
    render(RigidTransform(second)).sum().backward()
    assert torch.equal(image, before) and torch.equal(first.grad, gradient)
    assert not torch.equal(second.grad, gradient)


def test_a_derivative_of_an_older_picture_is_refused(drr):
    render = drr.capture(pose())
    first, second = (render(RigidTransform(pose(y).matrix.requires_grad_())) for y in (850.0, 700.0))
    second.sum().backward()
    with pytest.raises(RuntimeError, match="the derivative of its last call only, and this is older; call backward"):
        first.sum().backward()


def test_what_was_exchanged_is_refused(drr):
    render = drr.capture(pose(), mask_to_channels=True, gradient=False)
    before = render(pose())
    drr.density.mul_(2)
    assert torch.allclose(render(pose()), 2 * before)
    for exchange in (
        lambda: setattr(drr, "density", drr.density.clone()),
        lambda: setattr(drr, "mask", drr.mask.clone()),
        lambda: drr.set_intrinsics_(x0=3.0),
    ):
        render = drr.capture(pose(), mask_to_channels=True, gradient=False)
        exchange()
        with pytest.raises(RuntimeError, match="was exchanged, which the graph does not see; capture again"):
            render(pose())


def test_other_inputs_are_refused(drr):
    render = drr.capture(pose(), gradient=False)
    two = RigidTransform(pose().matrix.repeat(2, 1, 1))
    for wrong in ((two,), (RigidTransform(pose().matrix.float()),), (), (pose(), pose())):
        with pytest.raises(ValueError, match="inputs must be like those that were captured, torch.float64 of shape"):
            render(*wrong)
    asks = RigidTransform(pose().matrix.requires_grad_())
    with pytest.raises(ValueError, match="the gradient was not captured; capture again with gradient=True"):
        render(asks)
    with torch.no_grad():
        assert not render(asks).requires_grad


def test_what_cannot_be_captured(drr):
    with pytest.raises(TypeError, match="give one RigidTransform, not nothing"):
        drr.capture()
    with pytest.raises(ValueError, match="pose and drr must have the same dtype"):
        drr.capture(RigidTransform(pose().matrix.float()))
    calibration = calibration_matrix(*torch.tensor([1020.0, 80, 80, 0, 0]).double().requires_grad_())
    with pytest.raises(ValueError, match="gradients by its inputs only.* detach the volume and the calibration"):
        drr.capture(pose(), calibration=RigidTransform(calibration))
    drr.density = torch.nn.Parameter(drr.density)
    with pytest.raises(ValueError, match="gradients by its inputs only"):
        drr.capture(pose())


@pytest.mark.parametrize("options", [{}, dict(mask_to_channels=True), dict(parallel=True)], ids=str)
def test_what_is_recorded_waits_for_nothing(monkeypatch, options):
    "The picture, and its derivative. What a graph would record is seen on a device that only pretends."
    beam = "parallel" if options.pop("parallel", False) else "cone"
    drr, recorded = DRR(SUBJECT, **CAMERA, beam=beam).to("meta"), []
    monkeypatch.setattr(dispatch, "find_range", lambda labels: (0, 5))

    def graphed(function, inputs):
        function(*inputs)  # warms up: labels are looked at
        with watching() as record:
            image = function(*inputs)
            torch.autograd.grad(image, inputs, torch.empty_like(image))
        recorded.append(record)
        return function

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", graphed)
    ends = [torch.zeros(1, 3, device="meta") for _ in range(2)]
    with watching():
        drr.capture(*ends, **ANGLES, **options)
        drr.capture(convert(*ends, **ANGLES), **options)
    of_picture = ["channels_kernel", "integrate_kernel"] if options else ["integrate_kernel", "weigh_kernel"]
    for record in recorded:
        assert record.waits == [] and record.copies == []
        assert record.kernels == ["rays_kernel", *of_picture, "slopes_kernel"]
    assert len(recorded) == 2 and len(recorded[1].launches) < len(recorded[0].launches)
