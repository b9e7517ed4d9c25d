"""How far poses of bodies are apart, in the room, as a camera sees it, and in units of their stated uncertainty."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from diffdrr.compare import rotation_error
from diffdrr.geometry import RigidTransform, matmul, matrix_to_twist, twist_to_matrix


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
