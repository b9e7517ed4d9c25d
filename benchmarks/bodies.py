"""Find a femoral component and the bones of a wrist in real X-rays from two calibrated views.

    python -m benchmarks.bodies [--quick]

Nobody knows the true poses. What can be measured: how far outlines lie from the edges of the X-rays (`outlines.py`),
how far poses are from those that came with the knee, whether a pose from one view agrees with that from both by the
uncertainty it states, and how the ulna moves against the radius: about its shaft, as a forearm turns, and not much
else. The data (`biplane.py`) are not part of the project; reports hold numbers only.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import diffdrr
from diffdrr.geometry import RigidTransform
from diffdrr.tracking import Track, register_bodies, track
from diffdrr.xrays import XRay

from . import biplane, machine
from .distances import (
    Distance,
    centre,
    distance,
    in_sigmas,
    moved_together,
    one,
    points_of,
    seen_apart,
    start,
    twist_between,
)
from .outlines import outline
from .report import markdown_table

RESULTS = Path(__file__).parent / "results"
RIGHT, WRONG = (1.0, 1.0), 3.0  # mm and degrees from the pose to compare with; mm from which on a pose is wrong


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
    similarity: dict[str, float]  # of pictures and X-rays, at most 1
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
    turn: float = 0.0  # about the long axis of a bone, one way or the other, degrees

    def __str__(self) -> str:
        seen = "two views" if len(self.views) == 2 else f"camera {self.views[0] + 1}"
        turn = f"{self.turn:g}° about the shaft, then " if self.turn else ""
        return f"{self.body}, {seen}, {turn}N(0, {self.spread[0]:g}°) x N(0, {self.spread[1]:g} mm)"

    def start(
        self,
        right: RigidTransform,  # (1) room from body
        middle: torch.Tensor,  # (3) of the body, in its frame, mm
        seed: int,
    ) -> RigidTransform:  # (1)
        "Move a body away from where it is."
        return start(biplane.turned(right, middle, self.turn * (-1) ** seed), middle, self.spread, seed)


NEAR, FAR_OFF, CLOSE, ROUND = (10.0, 30.0), (20.0, 60.0), (10.0, 5.0), (60.0, 10.0)
KNEE = [Condition("femur", views, spread) for spread in (NEAR, FAR_OFF) for views in ((0, 1), (0,), (1,))]
WRIST = [Condition(bone, views, CLOSE) for bone in ("radius", "ulna") for views in ((0, 1), (0,), (1,))]
WRIST += [Condition(bone, (0, 1), CLOSE, 60.0) for bone in ("radius", "ulna")]


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
    xrays, spread = [both[view] for view in condition.views], ROUND if condition.turn else condition.spread
    found = method({name: body}, xrays, {name: condition.start(right, middle, seed)}, spread)
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
    for condition, group in pd.DataFrame([asdict(each) for each in attempts]).groupby("condition", sort=False):
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


def by_register_bodies(
    bodies: dict[str, torch.nn.Module],
    xrays: list[XRay],
    init: dict[str, RigidTransform],  # (1) room from body
    spread: tuple[float, float],  # degrees and mm
) -> Found:
    "Find bodies as a user would."
    result = register_bodies(bodies, xrays, init, spread, verbose=False)
    covariance = {name: result.covariance_of(name) for name in bodies}
    return Found(result.poses, covariance, result.similarity, result.reasons, result.seconds)


def knee_attempts(
    method: Method,
    frames: list[int],
    seeds: range,  # starts of each frame and condition
    body: torch.nn.Module,  # the femoral component
) -> list[Attempt]:
    "Find the component in single frames."
    poses, found = biplane.femur_poses(), []
    for frame in tqdm(frames, desc="knee"):
        moment = frame, biplane.knee_xrays(frame)
        for condition in KNEE:
            found += [attempt(method, condition, body, moment, one(poses, frame), seed) for seed in seeds]
    return found


@dataclass(frozen=True)
class Followed:
    "A sequence that was tracked."

    step: int  # every so many frames
    frames: int
    kept: int  # frames that are right
    lost: int | None  # the first frame that is wrong
    unflagged: int  # wrong frames that are trusted
    distance: float  # median over the frames that are right, mm over points of the body
    degrees: float
    rate: float  # frames a second


def follow(
    tracker: Callable[..., Track],  # (bodies, moments, init)
    step: int,  # every so many frames
    body: torch.nn.Module,  # the femoral component
) -> Followed:
    "Track the component through the knee's sequence, from the pose given for its first frame."
    frames, poses = list(biplane.KNEE_FRAMES)[::step], biplane.femur_poses()
    moments = [biplane.knee_xrays(frame) for frame in frames]
    begin = time.perf_counter()
    found = tracker({"femur": body}, moments, {"femur": one(poses, frames[0])})
    seconds = time.perf_counter() - begin
    apart = [
        distance(RigidTransform(pose.float()), one(poses, frame), points_of(body))
        for pose, frame in zip(found.poses["femur"].matrix[:, None], frames)
    ]
    table = pd.DataFrame([asdict(each) for each in apart]).assign(trusted=found.trusted("femur").numpy())
    right = table.points < WRONG
    return Followed(
        step,
        len(frames),
        int(right.sum()),
        None if right.all() else frames[int((~right).argmax())],
        int((~right & table.trusted).sum()),
        float(table.points[right].median()),
        float(table.degrees[right].median()),
        len(frames) / seconds,
    )


def wrist_poses(
    method: Method,
    frame: int,
    xrays: list[XRay],  # of both cameras
    bones: dict[str, torch.nn.Module],
    tries: int = 3,
) -> dict[str, RigidTransform]:  # (1) room from bone
    "Find the bones from where a hand has laid them, several times, and take what fits best."
    found = {}
    for name, bone in bones.items():
        init, middle = biplane.wrist_start(name, frame, xrays, bone), centre(bone)
        starts = [init, *(start(init, middle, (15.0, 2.0), seed) for seed in range(tries - 1))]
        results = [method({name: bone}, xrays, {name: init}, (15.0, 8.0)) for init in starts]
        found[name] = max(results, key=lambda result, name=name: result.similarity[name]).poses[name]
    return found


def wrist_attempts(
    method: Method,
    seeds: range,  # starts of each moment and condition
    bones: dict[str, torch.nn.Module],
) -> tuple[list[Attempt], Distance]:  # and how the ulna moved against the radius from one moment to the other
    "Find the bones of the wrist from starts around their common pose."
    found, moments = [], []
    for frame in tqdm(biplane.WRIST_FRAMES, desc="wrist"):
        xrays = biplane.wrist_xrays(frame)
        moments.append(wrist_poses(method, frame, xrays, bones))
        for condition in WRIST:
            name = condition.body
            args = method, condition, bones[name], (frame, xrays), moments[-1][name]
            found += [attempt(*args, seed) for seed in seeds]
    return found, moved_together(*moments, points_of(bones["ulna"]))


@dataclass
class Measurements:
    "Everything that was measured."

    outlines: pd.DataFrame  # of the poses given with the knee
    knee: list[Attempt] = field(default_factory=list)
    tracks: list[Followed] = field(default_factory=list)
    wrist: list[Attempt] = field(default_factory=list)
    apart: Distance | None = None  # how the ulna moved against the radius


def measure(
    chosen: argparse.Namespace,
    method: Method,
    tracker: Callable[..., Track],  # see `follow`
) -> Measurements:
    "Measure everything."
    frames, seeds = list(biplane.KNEE_FRAMES)[:: len(biplane.KNEE_FRAMES) // chosen.frames], range(chosen.seeds)
    body, bones = biplane.femur(), {name: biplane.bone(name) for name in ("radius", "ulna")}
    results = Measurements(given_outlines(frames))
    results.knee = knee_attempts(method, frames, seeds, body)
    results.tracks = [follow(tracker, step, body) for step in tqdm(chosen.steps, desc="tracks")]
    results.wrist, results.apart = wrist_attempts(method, seeds, bones)
    return results


def as_markdown(
    chosen: argparse.Namespace,
    about: dict,  # the machine
    results: Measurements,
) -> str:
    "Write the report that people read."
    together = f"{results.apart.points:.2f} mm over its box, and {results.apart.degrees:.2f}°"
    return "\n\n".join(
        [
            f"# Bodies in real X-rays on {about['cpu']}, {about['cores']} cores",
            f"{datetime.date.today()}, commit {about['commit']}, diffdrr {diffdrr.__version__}, torch "
            f"{torch.__version__}, {chosen.threads} threads, {about['memory_gb']} GB, {about['system']}.",
            "Two calibrated views each of a knee with a femoral component, 1024 x 1024 pixels, and of a wrist, 1760 x "
            "1760; bones of the wrist as CT. `register_bodies` as it comes: no boxes, masks or stages by hand. "
            f"A pose is wrong from {WRONG:g} mm on. Poses of the knee are compared with those that came with it, which "
            "are no measurement of their own: their outlines lie as far off as the first table says. Those of the "
            "wrist are compared with the best of several registrations of both views.",
            "## Outlines of the poses given with the knee\n\n" + markdown_table(results.outlines),
            f"## The knee, single moments\n\n{chosen.frames} moments, {chosen.seeds} starts of each.\n\n"
            + markdown_table(summarize(results.knee)),
            "## The knee, tracked\n\n" + markdown_table(pd.DataFrame([asdict(each) for each in results.tracks])),
            f"## The wrist\n\n2 moments, {chosen.seeds} starts of each.\n\n" + markdown_table(summarize(results.wrist)),
            f"From one moment to the other, the ulna moved against the radius by {together}.",
        ]
    )


def as_json(
    about: dict,  # the machine
    results: Measurements,
) -> str:
    "Write the report that programs read."
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    outlines = json.loads(results.outlines.to_json(orient="records"))
    plain = {name: value for name, value in vars(results).items() if name != "outlines"}
    found = json.loads(json.dumps(plain, default=asdict))
    return json.dumps({"machine": about, "date": date, "outlines": outlines, **found}, indent=1)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bodies", description="Find bodies in real X-rays from two calibrated views."
    )
    parser.add_argument("--frames", type=int, default=10, help="moments of the knee (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=9, help="starts of each moment and condition (default: 9)")
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5, 10], help="frames from one to the next, tracked")
    parser.add_argument("--quick", action="store_true", help="2 moments, 2 starts, every 10th frame tracked")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="where the report goes (default: %(default)s)")
    parser.add_argument("--name", help="of this machine, in the names of the files (default: made from its processor)")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.frames, chosen.seeds, chosen.steps = 2, 2, [10]
    if not 1 <= chosen.frames <= len(biplane.KNEE_FRAMES) or chosen.seeds < 1:
        parser.error(f"--frames must be 1 to {len(biplane.KNEE_FRAMES)} and --seeds at least 1")
    return chosen


def main(
    arguments: list[str] | None = None,  # of the command line
) -> Measurements | None:
    "Measure, print the report and store it."
    chosen, reason = parse(arguments), biplane.missing()
    if reason is not None:
        print(f"nothing is measured: {reason}")
        return None
    torch.set_num_threads(chosen.threads)
    about = machine.describe()
    results = measure(chosen, by_register_bodies, partial(track, verbose=False))
    text = as_markdown(chosen, about, results)
    print("\n" + text)
    stem = f"{chosen.name or machine.slug(about)}-bodies"
    for suffix, contents in ((".md", text), (".json", as_json(about, results))):
        machine.write(chosen.results / (stem + suffix), contents)
        print(f"written to {chosen.results / (stem + suffix)}")
    return results


if __name__ == "__main__":
    main()
