"""Conditions of practice, and how `register` does under them.

    NUMBA_NUM_THREADS=1 python -m benchmarks.registration --only frontal lateral --starts 20

The X-rays are those of `radiographs.py`. Errors are mean target registration errors over points in the vertebrae. With
`--log`, a run that was stopped goes on, and `trust.py` makes the report of all that the log holds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torchio import LabelMap, ScalarImage, Subject
from tqdm import tqdm

from diffdrr.compare import target_registration_error
from diffdrr.geometry import RigidTransform, matrix_to_twist, pose_from_view, twist_to_matrix
from diffdrr.volumes import read
from diffdrr.xrays import XRay

from . import machine
from .radiographs import CAMERA, Exposure, cached_radiograph, chest, field_of, vertebral_points
from .scene import CT

SOD = 850.0  # mm
TURNS = (6.0, 15.0)  # standard deviations of the true poses about the view, degrees and mm
STARTS = (10.0, 30.0)  # of the starts about the true poses
FURTHEST = (60.0, 180.0)  # of the starts that go far, degrees and mm


@dataclass(frozen=True)
class Condition:
    "How the X-ray is taken, and what is known when it is registered."

    views: tuple[str, ...] = ("AP",)
    exposure: Exposure = Exposure()
    ct: str = "whole"  # or "ends cut", "middle third", "spine"
    handling: str = "mask"  # of a collimated field: or "crop", or "none"
    part: float = 1.0  # of the picture's area that is kept
    wrong: dict[str, float] = field(default_factory=dict)  # intrinsics, and how far they are off: part, for x0 in mm
    refine: tuple[str, ...] = ()
    labels: str | None = None  # group of the structures whose pose is meant; None for the default of `register`
    far: bool = False  # starts are uniform in size up to `FURTHEST`, instead of N(0, `STARTS`)

    @property
    def kind(self) -> str:
        "What the model does not know of, beside noise."
        changed = self.exposure.breath or self.exposure.abdomen or self.exposure.shoulders
        if self.wrong:
            return "geometry refined" if self.refine else "geometry"
        return "patient" if changed or self.labels or self.ct != "whole" else "picture"


def collimated(handling: str) -> Condition:
    return Condition(exposure=Exposure(field=0.14), handling=handling)


PLAIN = Exposure()
CONDITIONS = {
    "frontal": Condition(),
    "lateral": Condition(("left lateral",)),
    "oblique": Condition(("LAO 40 CRA 15",)),
    "biplane": Condition(("AP", "left lateral")),
    "ends cut": Condition(ct="ends cut"),
    "plate": Condition(exposure=replace(PLAIN, plate=0.1)),
    "gamma": Condition(exposure=replace(PLAIN, kvp=60.0, response="gamma")),
    "equalised": Condition(exposure=replace(PLAIN, response="equalised")),
    "500 photons": Condition(exposure=replace(PLAIN, photons=500.0)),
    "quarter": Condition(part=0.25),
    "collimated": collimated("mask"),
    "collimated, cropped": collimated("crop"),
    "collimated, no mask": collimated("none"),
    "middle third": Condition(ct="middle third"),
    "spine": Condition(ct="spine"),
    "vertebrae": Condition(labels="vertebrae"),
    "ribs": Condition(labels="ribs"),
    "skeleton": Condition(labels="skeleton"),
    "lungs 1.6 %": Condition(exposure=replace(PLAIN, breath=0.016)),
    "lungs 5 %": Condition(exposure=replace(PLAIN, breath=0.05)),
    "abdomen": Condition(exposure=replace(PLAIN, abdomen=10.0)),
    "shoulders": Condition(exposure=replace(PLAIN, shoulders=10.0)),
    "sdd": Condition(wrong={"sdd": 0.02}),
    "principal point": Condition(wrong={"x0": 10.0}),
    "pixel size": Condition(wrong={"delx": 0.1, "dely": 0.1}),
    "sdd 5 %": Condition(wrong={"sdd": 0.05}),
    "biplane, sdd": Condition(("AP", "left lateral"), wrong={"sdd": 0.02}),
    "biplane, principal point": Condition(("AP", "left lateral"), wrong={"x0": 10.0}),
    "biplane, refine sdd": Condition(("AP", "left lateral"), wrong={"sdd": 0.02}, refine=("sdd",)),
    "refine sdd": Condition(wrong={"sdd": 0.02}, refine=("sdd",)),
    "refine principal point": Condition(wrong={"x0": 10.0}, refine=("x0", "y0")),
    "frontal, far starts": Condition(far=True),
}


@dataclass(frozen=True)
class Run:
    "A registration, and how good it is."

    condition: str
    seed: int
    start: float  # mTRE, mm
    error: float
    seconds: float
    similarity: float
    distance: float  # squared Mahalanobis distance of the truth, by the covariance
    total: float  # the same, by the covariance that holds how well the geometry is known
    reason: str | None


def labels_of(
    group: str | None,
) -> list[int] | None:
    "List the labels of a group that the CT has."
    if group is None:
        return None
    present, table = set(chest().mask.data.unique().tolist()), chest().structures
    return [int(i) for i in table["id"][table["group"] == group] if i in present]


def shown_by_ct(what: str) -> Subject:
    "Return the part of the CT that is registered, in the coordinates of the whole."
    whole = chest()
    if what == "whole":
        return whole
    if what == "spine":
        labels = labels_of("vertebrae")
        return read(whole.volume, whole.mask, labels=labels, center_volume=False, structures=whole.structures)
    n = whole.volume.spatial_shape[2]
    first, last = {"ends cut": (n // 8, n - n // 8), "middle third": (n // 3, 2 * n // 3)}[what]
    affine = whole.volume.affine.copy()
    affine[:3, 3] += first * affine[:3, 2]
    volume, mask = whole.volume.data[..., first:last], whole.mask.data[..., first:last]
    images = ScalarImage(tensor=volume, affine=affine), LabelMap(tensor=mask, affine=affine)
    return read(*images, center_volume=False, structures=whole.structures)


def random_motion(
    spread: tuple[float, float],  # degrees and mm
    *seed: int,
    uniform: bool = False,  # in size, up to the spread, which is otherwise a standard deviation about and along each axis
) -> RigidTransform:  # (1)
    "Draw a twist about the isocentre."
    generator = np.random.default_rng(seed)
    drawn = generator.standard_normal((2, 3))
    if uniform:
        drawn *= generator.uniform() / np.linalg.norm(drawn, axis=1, keepdims=True)
    twist = np.concatenate([spread[1] * drawn[0], np.deg2rad(spread[0]) * drawn[1]])
    return RigidTransform(twist_to_matrix(torch.tensor(twist[None], dtype=torch.float32)))


def as_given(
    condition: Condition,
    image: torch.Tensor,  # (1, 1, H, W)
) -> XRay:
    "Return the X-ray as it comes to the registration, with what is wrongly known of it."
    opened = field_of(condition.exposure.field)
    xray = XRay(image, opened, CAMERA, bright_bones=True, logarithmic=True)
    if condition.handling == "none":
        xray = replace(xray, mask=torch.ones_like(opened))
    kept = condition.part * (condition.exposure.field if condition.handling == "crop" else 1.0)
    margin = int((field_of(kept)[0, 0].amax(dim=0) == 0).sum()) // 2
    xray = xray.crop(margin, margin, margin, margin)
    values = vars(xray.camera)
    given = {k: values[k] + v if k in ("x0", "y0") else values[k] * (1 + v) for k, v in condition.wrong.items()}
    return replace(xray, camera=xray.camera.replace(**given))


def squared_distance(
    true: RigidTransform,  # (V)
    found: RigidTransform,  # (V)
    covariance: torch.Tensor,  # (P, P) of the twist, and maybe of intrinsics
    centre: torch.Tensor,  # (3) about which twists turn, mm
) -> float:
    "Measure how far off the truth is in terms of the covariance."
    shift = torch.eye(4, dtype=torch.float64)
    shift[:3, 3] = centre.double()
    left = true.matrix[:1].double() @ torch.linalg.inv(found.matrix[:1].double())
    twist = matrix_to_twist(torch.linalg.inv(shift) @ left @ shift)[0]
    covariance = covariance[:6, :6]
    unit = covariance.diagonal().sqrt().clamp(min=1e-12)
    return float(twist / unit @ torch.linalg.pinv(covariance / unit / unit[:, None], hermitian=True) @ (twist / unit))


def run(
    name: str,  # of the condition
    subject: Subject,
    seed: int,
    method: Callable,  # (subject, X-rays, initial poses, refine=..., labels=...) -> result
    chosen: argparse.Namespace,
) -> Run:
    "Take X-rays, begin off the truth, register, and measure. A start that is refused counts as noticed."
    condition, points = CONDITIONS[name], vertebral_points()
    turn = random_motion(TURNS, seed, 0).matrix
    off = random_motion(FURTHEST if condition.far else STARTS, seed, 1, uniform=condition.far)
    poses = [RigidTransform(turn @ pose_from_view(view, SOD, "AP").matrix) for view in condition.views]
    images = [cached_radiograph(pose, condition.exposure, seed, chosen.cache) for pose in poses]
    init = RigidTransform(torch.cat([off.matrix @ pose.matrix for pose in poses]))
    xrays = [as_given(condition, image) for image in images]
    begin = time.perf_counter()

    def error(pose):
        return target_registration_error(poses[0], RigidTransform(pose.matrix[:1]), points).item()

    try:
        result = method(subject, xrays, init, refine=condition.refine, labels=labels_of(condition.labels))
    except ValueError as refusal:
        seconds = time.perf_counter() - begin
        return Run(name, seed, error(init), error(init), seconds, 0.0, float("nan"), float("nan"), str(refusal))
    seconds = time.perf_counter() - begin
    centre = torch.as_tensor(subject.volume.get_center())
    distances = [
        squared_distance(poses[0], result.pose, x, centre) for x in (result.covariance, result.total_covariance)
    ]
    found = error(result.pose)
    return Run(name, seed, error(init), found, seconds, result.similarity, *distances, result.reason)


def measure(
    method: Callable,
    chosen: argparse.Namespace,  # with `only`, `starts`, `first` and `cache`
    done: set[tuple[str, int]],  # conditions and seeds to leave out
) -> Iterator[Run]:
    "Register under each condition."
    for name in chosen.only:
        seeds = [i for i in range(chosen.first, chosen.first + chosen.starts) if (name, i) not in done]
        subject = shown_by_ct(CONDITIONS[name].ct) if seeds else None
        for seed in tqdm(seeds, desc=name):
            yield run(name, subject, seed, method, chosen)


def read_log(
    path: Path,
    origin: dict,  # what is stored of each registration beside its results
) -> list[dict]:
    "Read what was measured before. Raises a `ValueError` for a line that is not whole, or does not say on what it was."
    rows, needed = [], [*(one.name for one in fields(Run)), *origin]
    for i, line in enumerate(path.read_text().splitlines(), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            raise ValueError(f"line {i} of --log {path} is not whole; remove it") from None
        if lacking := [name for name in needed if name not in rows[-1]]:
            raise ValueError(f"line {i} of --log {path} lacks {', '.join(lacking)}; add what is known, or remove it")
    return rows


def collect(
    method: Callable,
    chosen: argparse.Namespace,
) -> pd.DataFrame:  # a row for each registration
    "Register under the chosen conditions, except for what the log holds, and add that. Each is a line of the log."
    origin = machine.session(chosen.threads) | {"ct": CT.name}
    rows = read_log(chosen.log, origin) if chosen.log and chosen.log.exists() else []
    for one in measure(method, chosen, {(row["condition"], row["seed"]) for row in rows}):
        rows.append(asdict(one) | origin)
        if chosen.log:
            with chosen.log.open("a") as lines:
                lines.write(json.dumps(rows[-1]) + "\n")
    return pd.DataFrame(rows)
