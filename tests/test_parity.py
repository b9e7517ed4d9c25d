"""Compatibility with diffdrr 0.6.1: the same program gives the same numbers, except where 0.6.1 is wrong.

The programs are the cases of `parity/make_fixtures.py`; what 0.6.1 made of them is stored in `parity/fixtures`.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from parity import make_fixtures as cases

# Tolerances, one per kind. Pictures are compared relative to the maximum of the stored picture, other arrays relative
# to the
# largest magnitude of the stored array (which is why a translation of 900 mm and a rotation are never one array).

# Siddon is exact: what differs is the rounding of float32 crossings at voxel coordinates of some hundred (measured:
# 1.3e-5).
SIDDON = 1e-4
# Siddon with interpolation: 0.6.1 also samples where a ray crosses planes of voxels just outside the volume; it is
# right to stop
# at the volume. The chest is cut by the field of view, so this shows at the border of the picture (measured: 1.1e-2).
SIDDON_BILINEAR = 2e-2
# Sampling: 0.6.1 spreads its samples from the first to the last voxel that any ray of the batch meets, weighs them with
# n / (n - 1), and drops the border half voxels; a correct renderer samples the support of each ray, at midpoints. Both
# sample
# with an error. Against the exact integral 0.6.1 is off by 3e-4 (n = 500) and 7e-3 (n = 100) for an interpolated
# volume. A volume
# of steps, as of nearest neighbours and labels, is off by up to one sample at each step: by 2e-2 and 4e-2. Between
# given alphas
# that end inside the body the weights of 0.6.1 are 1 / (n - 1) = 2e-3 too large. The tolerance is about twice that.
TRILINEAR = {
    ("smooth", 500): 1e-3,
    ("smooth", 100): 1.5e-2,
    ("steps", 500): 4e-2,
    ("steps", 100): 8e-2,
    ("inside", 500): 4e-3,
}
# Sampling errors of different rays cancel in the mean of the picture (measured: 3e-5, 2.5e-3, 1.5e-3).
TRILINEAR_MEAN = {"smooth": 1e-4, "steps": 5e-3, "inside": 3e-3}
# Gradients of Siddon jump where a ray passes an edge between voxels; float32 decides some of these cases either way.
# Against
# float64, 0.6.1 is off by 2e-3, a correct renderer in float32 by up to 9e-3.
GRADIENT_SIDDON = 2e-2
# Against the gradient of the exact integral, that of 500 samples of 0.6.1 is off by 6.5e-2.
GRADIENT_TRILINEAR = 1e-1
# Rotations and projections in float32 (measured: 1e-6).
GEOMETRY = 1e-5
# Densities are the same operations on the same numbers (measured: 1e-7).
DENSITY = 1e-6
# Interpolation of a picture by another implementation (measured: 8e-6).
RESAMPLING = 1e-4


@cache
def stored(section: str) -> dict[str, dict[str, np.ndarray]]:
    "Load the results of 0.6.1: {case: {name: array}}."
    results: dict[str, dict[str, np.ndarray]] = {}
    with np.load(cases.FOLDER / f"{section}.npz") as arrays:
        for key, array in arrays.items():
            case, name = key.split("/")
            results.setdefault(case, {})[name] = array
    return results


def parity(section: str) -> pytest.MarkDecorator:
    "Make one test of each case of a section."
    return pytest.mark.parametrize("name", cases.SECTIONS[section])


def run(section: str, name: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    "Run a case, and pair its arrays with those of 0.6.1."
    made, wanted = cases.SECTIONS[section][name](), stored(section)[name]
    assert made.keys() == wanted.keys()
    pairs = {key: (value.detach().numpy(), wanted[key]) for key, value in made.items()}
    for key, (a, b) in pairs.items():
        assert a.shape == b.shape, f"{key} has shape {a.shape}; that of 0.6.1 has {b.shape}"
    return pairs


def compare(pairs: dict[str, tuple[np.ndarray, np.ndarray]], tolerance: float) -> None:
    "Compare arrays relative to the largest magnitude in each."
    for key, (made, wanted) in pairs.items():
        np.testing.assert_allclose(made, wanted, rtol=0, atol=tolerance * (np.abs(wanted).max() or 1), err_msg=key)


def test_every_case_is_stored() -> None:
    for section, functions in cases.SECTIONS.items():
        assert functions.keys() == stored(section).keys(), section


@parity("siddon")
def test_siddon(name: str) -> None:
    compare(run("siddon", name), SIDDON_BILINEAR if "bilinear" in name else SIDDON)


@parity("trilinear")
def test_trilinear(name: str) -> None:
    stepped = any(part in name for part in ("nearest", "mask", "by-hand"))
    kind = "inside" if "inside" in name else "steps" if stepped else "smooth"
    pairs = run("trilinear", name)
    compare(pairs, TRILINEAR[kind, int(name.rsplit("-", 1)[1])])
    for made, wanted in pairs.values():
        np.testing.assert_allclose(made.mean(), wanted.mean(), rtol=TRILINEAR_MEAN[kind])


@parity("gradients")
def test_gradients(name: str) -> None:
    compare(run("gradients", name), GRADIENT_TRILINEAR if "trilinear" in name else GRADIENT_SIDDON)


@parity("pose")
def test_pose(name: str) -> None:
    compare(run("pose", name), GEOMETRY)


@parity("detector")
def test_detector(name: str) -> None:
    compare(run("detector", name), GEOMETRY)


@parity("utils")
def test_utils(name: str) -> None:
    compare(run("utils", name), RESAMPLING if "resample" in name else GEOMETRY)


@parity("read")
def test_read(name: str) -> None:
    compare(run("read", name), DENSITY)


# ---------------------------------------------------------------------------------------------------------------------
# Where 0.6.1 is wrong: (right values, tolerance)

FLOAT32 = 1e-5
MILLIMETRES = 1e-3  # float32, at distances of 700 mm
NOTHING = 0.0


def gradient_by_differences(name: str, step: float = 1e-5) -> torch.Tensor:
    "Differentiate a pose with respect to its parameters at the identity by central differences in float64."
    at = torch.tensor([cases.IDENTITY[name]], dtype=torch.float64)
    steps = step * torch.eye(at.shape[1], dtype=torch.float64)
    slopes = [(cases.pose_sum(name, at + s) - cases.pose_sum(name, at - s)) / (2 * step) for s in steps]
    return torch.stack(slopes)[None]


def largest_voxel_on_a_ray() -> float:
    "Walk along the ray of the case in small steps."
    alphas = np.linspace(0, 1, 200_001)[:, None]
    voxels = np.rint(np.array([0.3, 0.2, -10]) + alphas * np.array([4.6, 5.1, 30])).astype(int)
    inside = voxels[((voxels >= 0) & (voxels < 6)).all(axis=1)]
    return cases.ramp().numpy()[tuple(inside.T)].max()


def length(*direction: float) -> float:
    return float(np.linalg.norm(direction))


ANGLES = [length(*v) for v in cases.AXIS_ANGLES]
EQUAL = ({"difference": NOTHING}, FLOAT32)

RIGHT: dict[str, tuple[dict, float]] = {
    # The ray ends 3.5 voxels behind its start; or it starts behind the volume; or it is wholly inside.
    "siddon-segment-end": ({"value": 3.5 * length(0.1, 0.1, 18) / 18}, FLOAT32),
    "siddon-segment-start": ({"value": NOTHING}, FLOAT32),
    "siddon-segment-inside": ({"value": length(3, 2, 2)}, FLOAT32),
    "siddon-looking-away": ({"brightest": NOTHING}, FLOAT32),
    "siddon-beyond-the-detector": EQUAL,
    "siddon-parallel-nan": ({"value": 6}, FLOAT32),
    # 0.6.1 rounds half to even, so that two faces belong to layer 2 and none to layer 3.
    "siddon-rounded-faces": ({"layer": [1, 2, 3, 4, 5]}, FLOAT32),
    "siddon-filter": ({"value": 6 * length(0.1, -0.1, 30) / 30}, FLOAT32),
    "siddon-max": ({"value": largest_voxel_on_a_ray()}, FLOAT32),
    "siddon-bilinear-labels": ({"channels": [0, 5, 10]}, FLOAT32),
    "trilinear-max": ({"value": 3}, FLOAT32),
    # The interpolated field falls to zero from the outer centres on, over one voxel: half of it at each end.
    "trilinear-border": ({"value": 6}, 1e-4),
    "trilinear-weights": ({"value": 0.5 * length(3, 3, 3)}, FLOAT32),
    "trilinear-batch-mates-100": EQUAL,
    "trilinear-batch-mates-50": EQUAL,
    "trilinear-patches-100": EQUAL,
    "patch-larger-than-picture": EQUAL,
    "n_patches-without-patches": ({"n": 1}, NOTHING),
    "subsample-batch": ({"shape": [3, 1, 10, 13], "difference": NOTHING}, FLOAT32),
    "subsample-mask": ({"shape": [3, 119, 10, 13], "difference": NOTHING}, FLOAT32),
    "calibration-batch": ({"shape": [2, 1, 10, 13]}, NOTHING),
    "whole-numbers": EQUAL,
    "x0-sign": ({"x0": 7, "y0": -3}, NOTHING),
    "intrinsic-gradient": ({"delx": -1200 / 18**2, "sdd": 1 / 18}, FLOAT32),
    "inverse_projection-input": ({"pixels": [[[3, 4], [10, 12]]]}, NOTHING),
    **{
        f"pinhole-{o}-{r}": ({"millimetres": NOTHING, "pixels": NOTHING}, MILLIMETRES)
        for o in ("AP", "PA", None)
        for r in (True, False)
    },
    "resample-focal-delx": EQUAL,
    "resample-focal-delx-x0": EQUAL,
    **{f"float64-{n}": ({"matrix": np.eye(4)[None]}, 1e-15) for n in ("rotation_10d", "quaternion_adjugate")},
    "gimbal-ZXZ": EQUAL,
    "gimbal-XYX": EQUAL,
    "near-gimbal-ZXY": ({"difference": NOTHING}, 1e-6),  # 0.6.1 takes the arcsine of a number near 1
    "small-twist": ({"millimetres": NOTHING}, 1e-9),  # float64; 0.6.1 clamps the angle at 0.01
    "matrix-round-trip": ({"matrix": cases.rigid().matrix}, 1e-4),  # translations of 900 mm
    "so3_rotation_angle": ({"angle": ANGLES}, 1e-5),
    "so3_relative_angle": ({"angle": ANGLES}, 1e-5),
    "acos_linear_extrapolation": ({"angle": np.arccos([0.2, -0.7])}, FLOAT32),
    "read-changes-its-input": ({"affine": NOTHING, "voxels": NOTHING, "labels": NOTHING}, NOTHING),
    "read-twice": ({"density": 1}, FLOAT32),
    "read-fiducials-twice": EQUAL,
    "mask-flipped": EQUAL,
    "mask-permuted": EQUAL,
    "mask-permuted-labels": ({"labels": [0, 5]}, NOTHING),
    "transform-labels": EQUAL,
    "transform-mask": ({"millimetres": NOTHING}, FLOAT32),
    "air-only": ({"density": np.zeros((1, 5, 6, 7))}, NOTHING),
    "water-only": ({"density": np.zeros((1, 5, 6, 7))}, NOTHING),
    "bone-in-air": ({"brightest": 1, "air": NOTHING}, NOTHING),
}
AT_IDENTITY = ("axis_angle", "se3_log_map", "rotation_9d", "rotation_10d")


def is_right(values: dict[str, np.ndarray], right: dict, tolerance: float) -> bool:
    "Say whether values, which may be those of an exception, are the right ones."
    if "raises" in values:
        return False
    assert values.keys() == right.keys()
    wanted = {key: np.asarray(value, dtype=np.float64) for key, value in right.items()}
    found = {key: np.squeeze(value) if wanted[key].ndim == 0 else value for key, value in values.items()}
    return all(
        found[k].shape == w.shape and np.allclose(found[k], w, rtol=tolerance, atol=tolerance)
        for k, w in wanted.items()
    )


def differs_on_purpose(name: str, right: dict, tolerance: float) -> None:
    "Check that a value is right, and that the one of 0.6.1 was wrong, ten times beyond the tolerance."
    values = {key: value.detach().numpy() for key, value in cases.FAULTS[name]().items()}
    assert is_right(values, right, tolerance), f"{values} instead of {right}"
    assert not is_right(stored("faults")[name], right, 10 * tolerance), "0.6.1 had this right"


def test_every_fault_is_tested() -> None:
    assert cases.FAULTS.keys() == RIGHT.keys() | {f"gradient-at-identity-{n}" for n in AT_IDENTITY}


@pytest.mark.parametrize("name", RIGHT)
def test_differs_on_purpose(name: str) -> None:
    differs_on_purpose(name, *RIGHT[name])


@pytest.mark.parametrize("name", AT_IDENTITY)
def test_differs_on_purpose_gradient_at_identity(name: str) -> None:
    # float32: the gradient sums products with a translation of 700 mm
    differs_on_purpose(f"gradient-at-identity-{name}", {"gradient": gradient_by_differences(name)}, 1e-3)


def test_float64_parameterizations_stay_in_float64() -> None:
    for name in ("rotation_10d", "quaternion_adjugate"):
        assert cases.in_float64(name)()["matrix"].dtype == torch.float64


# ---------------------------------------------------------------------------------------------------------------------
# What code written for 0.6.1 also leans on


def test_intrinsics_are_floats() -> None:
    detector = cases.camera(sdd=1200, delx=18, dely=16).detector
    assert all(type(x) is float for x in (detector.sdd, detector.delx, detector.dely, detector.x0, detector.y0))


def test_mask_is_sampled_as_floats_and_rendered_as_integers() -> None:
    drr = cases.camera(cases.subject())
    assert not drr.labels.dtype.is_floating_point
    assert drr.mask.dtype == torch.float32
    assert torch.equal(drr.mask, drr.labels.float())


def test_state_of_0_6_1_can_be_loaded() -> None:
    "0.6.1 kept masks as floats."
    drr = cases.camera(cases.subject(), **cases.SMALL)
    wanted = drr(cases.POSES["oblique"](), mask_to_channels=True)
    state = {name: tensor.clone().float() for name, tensor in drr.state_dict().items()}
    drr.density.zero_()
    drr.mask.zero_()
    drr.load_state_dict(state)
    assert torch.equal(drr(cases.POSES["oblique"](), mask_to_channels=True), wanted)


def test_subsamples_are_lists() -> None:
    drr = cases.camera(p_subsample=0.25)
    assert isinstance(drr.detector.subsamples[-1], list)
    assert sorted(drr.detector.subsamples[-1]) == drr(cases.POSES["oblique"]()).flatten().nonzero().flatten().tolist()


def test_callable_reducefn_receives_contributions_along_rays() -> None:
    "The function is given (B, N, S): densities times lengths, in the order along the ray."
    seen = []
    drr = cases.camera(reducefn=lambda x: seen.append(x) or x.sum(dim=-1))
    img = drr(cases.POSES["three"]())
    assert [x.shape[:2] for x in seen] == [(3, 480)]
    torch.testing.assert_close(seen[0].sum(dim=-1).view(3, 1, 20, 24), img)
