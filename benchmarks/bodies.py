"""Find a femoral component and the bones of a wrist in real X-rays from two calibrated views.

    python -m benchmarks.bodies [--quick]

Nobody knows the true poses. What can be measured: how far outlines lie from the edges of the X-rays (`outlines.py`),
how far poses are from those that came with the knee, whether a pose from one view agrees with that from both by the
uncertainty it states, and whether radius and ulna, which a ligament ties, stay together. The data (`biplane.py`) are
not part of the project; reports hold numbers only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from diffdrr.compare import rotation_error
from diffdrr.geometry import RigidTransform, matmul, matrix_to_twist, twist_to_matrix
from diffdrr.xrays import XRay

from . import biplane
from .outlines import outline

RESULTS = Path(__file__).parent / "results"
RIGHT, WRONG = (1.0, 1.0), 3.0  # mm and degrees from the pose to compare with; mm from which on a pose is wrong


@dataclass(frozen=True)
class Distance:
    "How far one pose of a body is from another."

    points: float  # root mean square over points of the body, mm
    degrees: float


def one(
    poses: RigidTransform,  # (N)
    index: int,
) -> RigidTransform:  # (1)
    return RigidTransform(poses.matrix[index : index + 1])


def centre(
    body: torch.nn.Module,
) -> torch.Tensor:  # (3) in the frame of the body, mm
    return body.corners.mean(dim=0).float()


def points_of(
    body: torch.nn.Module,
) -> torch.Tensor:  # (1, N, 3) in the frame of the body, mm
    "Take the vertices of a mesh, or the corners of the box around voxels."
    return getattr(body, "vertices", body.corners)[None].float()


def distance(
    a: RigidTransform,  # (1) room from body
    b: RigidTransform,  # (1)
    points: torch.Tensor,  # (1, N, 3) in the frame of the body, mm
) -> Distance:
    "Compare two poses of a body."
    apart = (a(points) - b(points)).square().sum(dim=-1).mean().sqrt().item()
    return Distance(apart, rotation_error(a, b, degrees=True).item())


def seen_apart(
    a: RigidTransform,  # (1) room from body
    b: RigidTransform,  # (1)
    middle: torch.Tensor,  # (3) of the body, in its frame, mm
    camera: RigidTransform,  # (1) room from camera
) -> tuple[float, float]:  # mm across the ray through the body, and along it: in depth
    "Divide the distance between two places of a body as a camera sees it."
    first, second = (camera.inverse()(pose(middle[None, None]))[0, 0] for pose in (a, b))
    ray = second / second.norm()
    along = (first - second) @ ray
    return (first - second - along * ray).norm().item(), along.abs().item()


def twist_between(
    a: RigidTransform,  # (1) room from body
    b: RigidTransform,  # (1)
    middle: torch.Tensor,  # (3) of the body, in its frame, mm
) -> torch.Tensor:  # (6) mm and rad, about the body's centre at `a`, in the axes of the room; float64
    "Find the twist that takes a body from one place to another."
    a, b = (pose.matrix[0].double() for pose in (a, b))
    origin = torch.eye(4, dtype=torch.float64)
    origin[:3, 3] = -(a[:3, :3] @ middle.double() + a[:3, 3])
    return matrix_to_twist(matmul(origin, matmul(b, torch.linalg.inv(matmul(origin, a)))))


def in_sigmas(
    twist: torch.Tensor,  # (6)
    covariance: torch.Tensor,  # (6, 6)
) -> float:  # 1 if the distance is as large as the covariance says, on average
    "Measure a distance in units of its stated uncertainty."
    return (twist @ torch.linalg.solve(covariance.double(), twist) / 6).sqrt().item()


def moved_together(
    first: dict[str, RigidTransform],  # (1) room from body, at one moment
    second: dict[str, RigidTransform],  # at another
    points: torch.Tensor,  # (1, N, 3) of the ulna, in its frame, mm
) -> Distance:
    "Measure how the ulna moves against the radius from one moment to another."
    against = [moment["ulna"].compose(moment["radius"].inverse()) for moment in (first, second)]
    return distance(*against, points)


def start(
    pose: RigidTransform,  # (1) room from body
    middle: torch.Tensor,  # (3) of the body, in its frame, mm
    spread: tuple[float, float],  # standard deviations about and along each axis of the room, degrees and mm
    seed: int,
) -> RigidTransform:  # (1)
    "Move a body by a random twist about its centre."
    normal = np.random.default_rng((seed, 2)).standard_normal((2, 3))
    twist = torch.tensor(np.concatenate([spread[1] * normal[0], np.deg2rad(spread[0]) * normal[1]]))
    away = torch.eye(4, dtype=torch.float64)
    away[:3, 3] = pose(middle[None, None])[0, 0].double()
    motion = matmul(away, matmul(twist_to_matrix(twist), torch.linalg.inv(away)))
    return RigidTransform(matmul(motion, pose.matrix.double()).float())


def outlines_at(
    body: torch.nn.Module,
    place: RigidTransform,  # (1) room from body
    xrays: list[XRay],
) -> list[float]:  # rms of each view, pixels
    "Measure the outline of a body in all views."
    corners = place(body.corners[None].float())
    return [outline(body, place, biplane.window(xray, corners)).rms for xray in xrays]


def rms(values: np.ndarray | pd.Series) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def given_outlines(
    frames: list[int],
) -> pd.DataFrame:  # a row for each view
    "Measure the outlines of the poses that came with the knee."
    body, poses = biplane.femur(), biplane.femur_poses()
    found = [
        outlines_at(body, one(poses, frame), biplane.knee_xrays(frame)) for frame in tqdm(frames, desc="given poses")
    ]
    return pd.DataFrame(
        {"view": view, "frames": len(frames), "rms, pixels": rms(values), "worst frame": float(max(values))}
        for view, values in zip(biplane.VIEWS, np.transpose(found))
    )


@dataclass(frozen=True)
class Found:
    "What a method says of bodies at one moment."

    poses: dict[str, RigidTransform]  # (1) room from body
    covariance: dict[str, torch.Tensor]  # (6, 6) of the twist about each body's centre, in the axes of the room
    reasons: dict[str, str | None]  # why not to trust a pose
    seconds: float


Method = Callable[[dict[str, torch.nn.Module], list[XRay], dict[str, RigidTransform], tuple[float, float]], Found]
"Find bodies, in X-rays, from poses (1) that are off by a spread in degrees and mm."


@dataclass(frozen=True)
class Condition:
    "Which X-rays, and how far off a method starts."

    body: str  # femur, radius or ulna
    views: tuple[int, ...]  # some of 0 and 1
    spread: tuple[float, float]  # standard deviations about and along each axis, degrees and mm

    def __str__(self) -> str:
        seen = "two views" if len(self.views) == 2 else f"camera {self.views[0] + 1}"
        return f"{self.body}, {seen}, N(0, {self.spread[0]:g}°) x N(0, {self.spread[1]:g} mm)"


NEAR, FAR_OFF, CLOSE = (10.0, 30.0), (20.0, 60.0), (10.0, 5.0)
KNEE = [Condition("femur", views, spread) for spread in (NEAR, FAR_OFF) for views in ((0, 1), (0,), (1,))]
WRIST = [Condition(bone, views, CLOSE) for bone in ("radius", "ulna") for views in ((0, 1), (0,), (1,))]


@dataclass(frozen=True)
class Attempt:
    "A pose that was found, and how it compares."

    condition: str
    frame: int
    seed: int
    distance: float  # from the pose to compare with, mm over points of the body
    degrees: float
    across: float  # mm, as the first camera of the condition sees it
    depth: float
    sigmas: float  # the distance in units of the stated uncertainty
    outlines: list[float]  # rms of each camera, pixels; of meshes only
    seconds: float
    reason: str | None


def attempt(
    method: Method,
    condition: Condition,
    body: torch.nn.Module,
    moment: tuple[int, list[XRay]],  # frame, and X-rays of both cameras
    right: RigidTransform,  # (1) the pose to compare with
    seed: int,
) -> Attempt:
    "Find a body from a random start, and compare."
    (frame, both), name, middle = moment, condition.body, centre(body)
    xrays = [both[view] for view in condition.views]
    found = method({name: body}, xrays, {name: start(right, middle, condition.spread, seed)}, condition.spread)
    pose = found.poses[name]
    apart = distance(pose, right, points_of(body))
    return Attempt(
        str(condition),
        frame,
        seed,
        apart.points,
        apart.degrees,
        *seen_apart(pose, right, middle, xrays[0].pose),
        in_sigmas(twist_between(right, pose, middle), found.covariance[name]),
        outlines_at(body, pose, both) if hasattr(body, "vertices") and apart.points < WRONG else [],
        found.seconds,
        found.reasons[name],
    )


def summarize(
    attempts: list[Attempt],
) -> pd.DataFrame:  # a row for each condition
    "Lay errors, outlines, verdicts and times out. Distances are medians over the starts that are not wrong."
    rows = []
    for condition, group in pd.DataFrame([asdict(one) for one in attempts]).groupby("condition", sort=False):
        wrong, flagged = group.distance >= WRONG, group.reason.notna()
        right = group[~wrong]
        outlines = np.array([each for each in right.outlines if each])
        rows.append(
            {
                "condition": condition,
                "starts": len(group),
                f"within {RIGHT[0]:g} mm and {RIGHT[1]:g}°, %": 100.0
                * ((group.distance < RIGHT[0]) & (group.degrees < RIGHT[1])).mean(),
                "distance, mm": right.distance.median(),
                "degrees": right.degrees.median(),
                "across, mm": right.across.median(),
                "depth, mm": right.depth.median(),
                "in sigmas": right.sigmas.median(),
                "outlines, pixels": " and ".join(f"{rms(column):.2f}" for column in outlines.T) or "-",
                "wrong and flagged": int((wrong & flagged).sum()),
                "wrong, not flagged": int((wrong & ~flagged).sum()),
                "right, but flagged": int((~wrong & flagged).sum()),
                "seconds": group.seconds.median(),
            }
        )
    return pd.DataFrame(rows)
