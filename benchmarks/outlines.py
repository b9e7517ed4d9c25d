"""How far the outline of a body lies from the edge in an X-ray.

The outline is the line at which a body covers half of a pixel. At points of it, one pixel apart, the edge of a picture
is where its intensity, blurred by one pixel, rises most steeply along the outline's normal, within a few pixels. A
round body is thin at its rim, so its edge lies somewhat within its outline: what counts is how much further out the
edge in the X-ray lies than that in a picture of the body alone, found in the same way.

The place of an edge depends on how well metal stops radiation (`biplane.METAL`) and on how sharp the detector is. On
simulated pictures of a body where it is, the rms is 0.04 pixels if both are as assumed, 0.03 to 0.12 for a detector
that is perfect or half as sharp, and 0.15 to 0.24, with a mean of -0.19 to 0.13, for half or twice the attenuation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from contourpy import contour_generator
from scipy.ndimage import gaussian_filter, map_coordinates

from diffdrr.bodies import Scene
from diffdrr.geometry import RigidTransform
from diffdrr.xrays import XRay

OVERSAMPLING = 4  # rays along each side of a pixel
BLUR = 1.0  # of the search for edges, standard deviation, pixels
SHARPNESS = 0.7  # of an image intensifier with pixels of 0.3 mm: standard deviation of its blur, pixels
REACH, STEP = 5.0, 0.25  # of the search along a normal, pixels
FAINT = 0.25  # of the median slope: a fainter edge is none


@dataclass(frozen=True)
class Outline:
    "Edges of an X-ray along the outline of a body. `shift` is positive where they lie outside."

    points: np.ndarray  # (N, 2) column and row of those where an edge is seen, pixels
    normals: np.ndarray  # (N, 2) outward
    shift: np.ndarray  # (N) pixels
    seen: float  # share of the outline

    @property
    def rms(self) -> float:
        return float(np.sqrt((self.shift**2).mean()))

    @property
    def mean(self) -> float:
        return float(self.shift.mean())

    @property
    def sideways(self) -> np.ndarray:  # (2) pixels
        "The displacement of the whole outline that explains most of the shifts."
        return np.linalg.lstsq(self.normals, self.shift, rcond=None)[0]


def alone(
    body: torch.nn.Module,
    place: RigidTransform,  # (1) room from body
    xray: XRay,  # whose pose is known
) -> tuple[np.ndarray, np.ndarray]:  # (H, W) part of each pixel that is covered; intensity
    "Render a body by itself, as a detector sees it."
    camera = xray.camera.resize(OVERSAMPLING * xray.camera.height, OVERSAMPLING * xray.camera.width)
    with torch.no_grad():
        integrals = Scene({"body": body}, camera, orientation=None)(xray.pose, {"body": place})
    covered, intensity = (F.avg_pool2d(x, OVERSAMPLING) for x in ((integrals > 0).float(), (-integrals).exp()))
    return covered[0, 0].double().numpy(), gaussian_filter(intensity[0, 0].double().numpy(), SHARPNESS)


def gradient(
    picture: np.ndarray,  # (H, W)
    sigma: float = BLUR,
) -> np.ndarray:  # (2, H, W) along columns and rows, per pixel
    return np.stack([gaussian_filter(picture, sigma, order=order) for order in ((0, 1), (1, 0))])


def sample(
    picture: np.ndarray,  # (H, W)
    points: np.ndarray,  # (..., 2) column and row, pixels
) -> np.ndarray:  # (...)
    return map_coordinates(picture, np.moveaxis(points[..., ::-1] - 0.5, -1, 0), order=3, mode="nearest")


def trace(
    covered: np.ndarray,  # (H, W)
) -> tuple[np.ndarray, np.ndarray]:  # (N, 2) points and outward normals
    "Walk along the outline, a pixel at a time."
    points = []
    for line in contour_generator(z=covered).lines(0.5):
        way = np.concatenate([[0], np.hypot(*np.diff(line, axis=0).T).cumsum()])
        at = np.arange(0, way[-1], 1.0)
        points.append(np.stack([np.interp(at, way, along) for along in line.T], axis=-1) + 0.5)
    points = np.concatenate(points) if points else np.zeros((0, 2))
    normals = -np.stack([sample(slope, points) for slope in gradient(covered)], axis=-1)
    return points, normals / np.linalg.norm(normals, axis=-1, keepdims=True).clip(1e-12)


def edges(
    picture: np.ndarray,  # (H, W) intensity
    points: np.ndarray,  # (N, 2)
    normals: np.ndarray,  # (N, 2)
) -> tuple[np.ndarray, np.ndarray]:  # (N) pixels outwards, NaN where none is within reach; slope
    "Find where a picture brightens most steeply along normals, between samples by a parabola."
    offsets = np.arange(-REACH, REACH + STEP / 2, STEP)
    along = points[:, None] + offsets[:, None] * normals[:, None]
    across = np.stack([sample(slope, along) for slope in gradient(picture)], axis=-1)
    slope = (across * normals[:, None]).sum(axis=-1)
    best = slope.argmax(axis=1)
    inner = best.clip(1, len(offsets) - 2)
    before, peak, after = (slope[np.arange(len(slope)), inner + k] for k in (-1, 0, 1))
    bend = (before - 2 * peak + after).clip(max=-1e-12)
    found = offsets[inner] + STEP * (before - after) / (2 * bend)
    return np.where(best == inner, found, np.nan), peak


def outline(
    body: torch.nn.Module,
    place: RigidTransform,  # (1) room from body
    xray: XRay,  # intensity; bright is air; its pose is known
) -> Outline:
    "Compare the outline of a body with the edges of an X-ray."
    covered, expected = alone(body, place, xray)
    points, normals = trace(covered)
    (own, own_slope), (found, slope) = (edges(p, points, normals) for p in (expected, xray.image[0, 0].numpy()))
    field = xray.mask[0, 0].numpy().astype(float)
    ends = np.stack([sample(field, points + side * (REACH + 2) * normals) for side in (-1, 1)])
    counts = (ends > 0.5).all(axis=0) & np.isfinite(found - own)
    for each in (own_slope, slope):
        counts &= each > FAINT * np.median(each[counts]) if counts.any() else False
    return Outline(points[counts], normals[counts], (found - own)[counts], counts.mean() if len(counts) else 0.0)
