"""What the host does in a rendering on a GPU, seen on tensors that pretend to be on one: it waits for nothing,
copies nothing to the GPU, mixes no devices, and launches no more than the table says."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton
pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.gpu.model import LAUNCHES
from diffdrr.geometry import PARAMETERIZATIONS, convert
from diffdrr.kernels import dispatch
from diffdrr.rendering import DRR
from diffdrr.volumes import load_example_ct
from tools.gpu.pretend import Record, watching

SUBJECT = load_example_ct(shape=(32, 32, 16), spacing=(11.2, 11.2, 20.0))
CHOICES = dict(sdd=1020.0, height=32, delx=12.5)
ANGLES = dict(parameterization="euler_angles", convention="ZXY")
RENDERERS = {
    "siddon": (dict(renderer="siddon"), {}),
    "samples": (dict(renderer="trilinear"), {}),
    "exact": (dict(renderer="trilinear"), dict(n_points=None)),
}
WIDTHS = dict(
    matrix=(3, 3), quaternion=(4,), rotation_6d=(6,), rotation_9d=(9,), rotation_10d=(10,), quaternion_adjugate=(10,)
)
NOT_YET = {  # what waits, or copies, and where; a line goes when it is mended
    "back to Euler angles": "roma chooses by masks",
    "back to a twist": "linalg.solve in matrix_to_twist looks whether it succeeded",
}


class Scene:
    "A DRR on the pretended device, and the parameters of a pose there."

    def __init__(self, renderer: str = "siddon", **choices):
        kind, self.options = RENDERERS[renderer]
        self.drr = DRR(SUBJECT, **(CHOICES | kind | choices)).to("meta")
        self.rotation, self.translation = (torch.zeros(1, 3, device="meta") for _ in range(2))
        with watching():
            self.pose = convert(self.rotation, self.translation, **ANGLES)

    def record(self, act) -> Record:
        "Do something twice, and watch the second time: the first may look labels up."
        with pytest.MonkeyPatch.context() as patch, watching():
            patch.setattr(dispatch, "find_range", lambda labels: (0, 5))
            act(self)
        with watching() as record:
            act(self)
        return record


def euler(scene: Scene, **more):
    return scene.drr(scene.rotation, scene.translation, **ANGLES, **scene.options, **more)


def euler_and_gradient(scene: Scene):
    ends = [x.detach().requires_grad_() for x in (scene.rotation, scene.translation)]  # a clone would be a launch
    image = scene.drr(*ends, **ANGLES, **scene.options)
    image.backward(torch.ones_like(image))


def jacobian(scene: Scene, **more):
    return scene.drr.jacobian(scene.rotation, scene.translation, **ANGLES, **scene.options, **more)


CALLS = {
    "pose": lambda s: s.drr(s.pose, **s.options),
    "Euler angles": euler,
    "degrees": lambda s: euler(s, degrees=True),
    "channels": lambda s: s.drr(s.pose, mask_to_channels=True, **s.options),
    "Jacobian": jacobian,
    "Jacobian of camera and intrinsics": lambda s: jacobian(s, frame="camera", intrinsics=True),
}
OPTIONS = dict(beam="parallel", voxel_shift=0.0, p_subsample=0.1)
GEOMETRY = {
    "project": lambda s: s.drr.perspective_projection(s.pose, torch.zeros(1, 5, 3, device="meta")),
    "backproject": lambda s: s.drr.inverse_projection(s.pose, torch.zeros(1, 5, 2, device="meta")),
    "align_corners": lambda s: euler(s, align_corners=True),
    "inverse of the affine": lambda s: s.drr.affine.inverse(),
    "back to Euler angles": lambda s: s.pose.convert("euler_angles", "ZXY"),
    "back to a twist": lambda s: s.pose.get_se3_log(),
}


def each(names) -> list:
    "Name the cases, those that fail so far with the reason."
    marks = {name: pytest.mark.xfail(strict=True, reason=reason) for name, reason in NOT_YET.items()}
    return [pytest.param(name, marks=marks.get(name, ())) for name in names]


def assert_free(record: Record) -> None:
    assert record.waits == [] and record.copies == []


@pytest.mark.parametrize("call", each(CALLS))
@pytest.mark.parametrize("renderer", RENDERERS)
def test_renderings(renderer, call):
    record = Scene(renderer=renderer).record(CALLS[call])
    assert_free(record)
    assert record.kernels


@pytest.mark.parametrize("parameterization", sorted(PARAMETERIZATIONS))
def test_parameterizations(parameterization):
    convention = dict(convention="ZXY") if parameterization == "euler_angles" else {}

    def act(scene):
        rotation = torch.zeros(1, *WIDTHS.get(parameterization, (3,)), device="meta")
        scene.drr(rotation, scene.translation, parameterization=parameterization, **convention)

    assert_free(Scene().record(act))


@pytest.mark.parametrize("call", each(GEOMETRY))
def test_geometry(call):
    assert_free(Scene().record(GEOMETRY[call]))


@pytest.mark.parametrize("choice", each(OPTIONS))
def test_options(choice):
    assert_free(Scene(**{choice: OPTIONS[choice]}).record(euler))


def test_the_watch_sees():
    "Each kind of fault is found."
    here, there = torch.zeros(3, device="meta"), torch.zeros(3)
    with watching() as record:
        torch.tensor([1.0], device="meta")
        there.to("meta")
        here[torch.tensor([0, 2])]
        torch.linalg.inv(torch.eye(3, device="meta"))
        for act in (lambda: here.sum().item(), lambda: here[here > 0], lambda: here.cpu(), lambda: here + there):
            with pytest.raises((RuntimeError, NotImplementedError)):
                act()
    assert [line.split()[0] for line in record.copies] == ["tensor", "_to_copy", "index"]
    waits = ["_linalg_check_errors", "_local_scalar_dense", "index", "_to_copy"]
    assert [line.split()[0] for line in record.waits] == waits


@pytest.mark.parametrize("call", LAUNCHES)
def test_launches(call):
    act = euler_and_gradient if call == "Euler angles and gradient" else CALLS[call]
    record = Scene().record(act)
    assert (len(record.launches), len(record.kernels)) <= LAUNCHES[call]
