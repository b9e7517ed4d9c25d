"""Calibrate a camera whose source-to-detector distance is 2 % wrong from several X-rays of a real chest.

    NUMBA_NUM_THREADS=1 python -m benchmarks.calibration --first 500 --seeds 5

The X-rays are those of `radiographs.py`, from sides that the registration does not know of each other. Errors are mean
target registration errors over points in the vertebrae, of each X-ray registered alone and of all together.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from diffdrr.compare import target_registration_error
from diffdrr.geometry import RigidTransform, pose_from_view
from diffdrr.registration import Registrar, calibrate

from .conditions import CONDITIONS, SOD, STARTS, TURNS, as_given, random_motion
from .peers import FOLDER
from .radiographs import CAMERA, cached_radiograph, chest, vertebral_points
from .report import markdown_table

VIEWS = ("AP", "LAO 40 CRA 15", "left lateral", "RAO 30", "LAO 15 CAU 20")
NAMES = ("sdd", "x0", "y0")


def median_error(
    true: Sequence[RigidTransform],  # (1) each
    found: Sequence[RigidTransform],  # (1) each
) -> float:  # mm
    "Measure how far off the poses are."
    points = vertebral_points()
    errors = [target_registration_error(*pair, points).item() for pair in zip(true, found)]
    return torch.tensor(errors).median().item()


def measure(
    seed: int,
    n: int,  # X-rays
    cache: Path,  # where X-rays are kept
) -> dict[str, object]:  # a row of the table
    "Take X-rays, each of a patient who was moved, begin off the truth, and calibrate."
    condition = CONDITIONS["sdd"]
    turns, offs = (
        [random_motion(spread, seed, k, i).matrix for i in range(n)] for k, spread in enumerate((TURNS, STARTS))
    )
    true = [RigidTransform(turn @ pose_from_view(view, SOD, "AP").matrix) for turn, view in zip(turns, VIEWS)]
    images = [cached_radiograph(pose, condition.exposure, 1000 * seed + i, cache) for i, pose in enumerate(true)]
    xrays = [as_given(condition, image) for image in images]
    inits = [RigidTransform(off @ pose.matrix) for off, pose in zip(offs, true)]
    registrar = Registrar(chest())
    alone = [registrar(*each, verbose=False).pose for each in zip(xrays, inits)]
    found = calibrate(registrar, xrays, NAMES, RigidTransform(torch.cat([pose.matrix for pose in inits])))
    off = torch.tensor([found.intrinsics[name] - getattr(CAMERA, name) for name in NAMES], dtype=torch.float64)
    row = {f"{name}, mm": f"{found.intrinsics[name]:.1f} ± {found.standard_deviation[name]:.1f}" for name in NAMES}
    return row | {
        "squared distance of the truth": (off @ torch.linalg.solve(found.covariance, off)).item(),
        "alone, mTRE, mm": median_error(true, alone),
        "together": median_error(true, [RigidTransform(pose) for pose in found.pose.matrix.split(1)]),
        "doubted": found.failed,
    }


def main(
    arguments: list[str] | None = None,  # of the command line
) -> pd.DataFrame:
    "Calibrate from several sets of X-rays, and print the table."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.calibration", description=__doc__.split("\n")[0])
    parser.add_argument("--first", type=int, default=0, help="seed of the first set (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="sets of X-rays (default: %(default)s)")
    parser.add_argument(
        "--views", type=int, choices=range(2, len(VIEWS) + 1), default=len(VIEWS), help="X-rays of each"
    )
    parser.add_argument("--cache", type=Path, default=FOLDER / "xrays", help="where X-rays are kept")
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    seeds = range(chosen.first, chosen.first + chosen.seeds)
    table = pd.DataFrame([{"seed": seed} | measure(seed, chosen.views, chosen.cache) for seed in tqdm(seeds)])
    print("\n" + markdown_table(table))
    return table


if __name__ == "__main__":
    main()
