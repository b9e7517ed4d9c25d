"""Register the X-rays of a public data set from known starting poses, and count how often that succeeds.

    python -m benchmarks.datasets deepfluoro ipcai_2020_full_res_data.h5
    python -m benchmarks.datasets ljubljana ljubljana.h5

The protocol is that of van de Kraats et al. (Standardized evaluation methodology for 2-D-3-D registration, IEEE
Transactions on Medical Imaging 24(9), 2005). Each X-ray is registered from several starting poses. They are rotated
about the centroid of the landmarks and shifted in random directions, by as much as makes the mean target
registration error (mTRE) a given number of millimetres: from 0 to 20, as many starts in each millimetre. Afterwards
are measured, over the same landmarks, the mTRE, and the mean reprojection distance (mRPD), which hardly counts
depth, where a single view is nearly blind. A registration succeeds if its mRPD is below 2 mm. The capture range is
the largest starting error up to which, in each millimetre, 95 % succeed.

Three more rates are in the table because others report them: mTRE below 1 mm (the sub-millimetre success rate of
Gopalakrishnan et al., Intraoperative 2D/3D image registration via differentiable X-ray rendering, CVPR 2024) and
below 2 mm, and a rotation within 1 degree of the truth (Grupp et al., International Journal of Computer Assisted
Radiology and Surgery 15, 2020). Those works start from predictions of networks, so only the error measures are
theirs.

The poses of DeepFluoro are shifted by half a voxel, as a later program of its author does
(`DeepFluoro(corrected=True)`); `--published` leaves them. Four of its X-rays are left out, because their true poses
are in doubt; `--all` keeps them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from tqdm import tqdm

from diffdrr.compare import reprojection_distance, rotation_error, target_registration_error
from diffdrr.geometry import RigidTransform, make_matrix, so3_exp_map
from diffdrr.rendering import DRR
from diffdrr.xrays import DeepFluoro, Ljubljana, RegistrationDataset

from . import machine
from .report import markdown_table

DOUBTFUL = {
    "17-1882": ("003", "050"),
    "18-2799": ("002", "004"),
}  # https://github.com/rg2/DeepFluoroLabeling-IPCAI2020/issues/8
SUCCESS = 2.0  # mm
CAPTURED = 0.95  # of the starts in a bin
BISECTIONS = 50  # each halves the interval, so this is exact to rounding


def displaced(
    pose: RigidTransform,  # (1) float64
    points: torch.Tensor,  # (1, N, 3) float64, mm
    direction: torch.Tensor,  # (6,) unit vector: shift, and rotation about the centroid of the points
    size: float,  # mm
) -> RigidTransform:  # (1)
    "Shift and rotate the patient; for the points, a shift and a rotation of the same size count alike."
    centroid = points.mean(dim=1)
    radius = torch.linalg.vector_norm(points - centroid, dim=-1).square().mean().sqrt()
    R = so3_exp_map(size * direction[None, 3:] / radius)
    shift = size * direction[None, :3] + centroid - (R @ centroid[..., None])[..., 0]
    return pose.compose(RigidTransform(make_matrix(R, shift)))


def starting_pose(
    pose: RigidTransform,  # (1) true pose
    points: torch.Tensor,  # (1, N, 3) landmarks in world coordinates, mm
    error: float,  # mTRE of the start, mm
    generator: torch.Generator,
) -> RigidTransform:  # (1)
    "Draw a pose with a given error."
    exact, points = RigidTransform(pose.matrix.double()), points.double()
    direction = torch.randn(6, generator=generator, dtype=torch.float64)
    direction /= direction.norm()

    def reached(size: float) -> float:  # mm
        return target_registration_error(exact, displaced(exact, points, direction, size), points).item()

    low, high = 0.0, 2 * error
    while reached(high) < error:
        high *= 2
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if reached(middle) < error else (low, middle)
    return RigidTransform(displaced(exact, points, direction, high).matrix.to(pose.matrix))


def runs(
    data: RegistrationDataset,
    register: Callable,  # (drr, xray, init) -> an object with `pose`, `failed` and `reason`
    xrays: list[str],  # names of the X-rays to register
    starts: int,  # for each X-ray, in each millimetre of the starting error
    furthest: int,  # starting error, mm
    factor: int,  # on the size of a pixel
    seed: int = 0,
) -> Iterator[dict]:
    "Register X-rays of one specimen, and measure."
    generator = torch.Generator().manual_seed(seed)
    points = data.subject.fiducials
    drr = None
    for name in xrays:
        xray = data[data.names.index(name)].bin(factor)
        if drr is None:
            drr = DRR(data.subject, **vars(xray.camera), renderer="trilinear")
        intrinsics = dict(vars(xray.camera))
        del intrinsics["beam"]  # a DRR keeps its own
        drr.set_intrinsics_(**intrinsics)
        for millimetre in range(furthest):
            for error in (millimetre + torch.rand(starts, generator=generator, dtype=torch.float64)).tolist():
                init = starting_pose(xray.pose, points, error, generator)
                begin = time.perf_counter()
                result = register(drr, xray.image, init)
                seconds = time.perf_counter() - begin
                with torch.no_grad():
                    yield {
                        "specimen": data.specimen,
                        "xray": name,
                        "start": error,
                        "mtre": target_registration_error(xray.pose, result.pose, points).item(),
                        "mrpd": reprojection_distance(xray.pose, result.pose, points, drr.detector).item(),
                        "degrees": rotation_error(xray.pose, result.pose, degrees=True).item(),
                        "failed": bool(result.failed),
                        "reason": result.reason,
                        "seconds": seconds,
                    }


def capture_range(
    start: pd.Series,  # starting errors, mm
    succeeded: pd.Series,
    width: float = 1.0,  # of a bin, mm
) -> float:  # mm
    "Find the largest starting error up to which nearly all registrations succeed, in each bin that has any."
    rates = succeeded.groupby((start // width).astype(int)).mean()
    enough = (rates >= CAPTURED).cummin()
    return float(width * (rates.index[enough].max() + 1)) if enough.any() else 0.0


def summarize(
    measured: pd.DataFrame,  # a row for each registration
) -> pd.DataFrame:  # a row for each specimen, and one for all
    "Lay out errors and success rates."

    def percent(condition: pd.Series) -> float:
        return 100.0 * condition.mean()

    rows = []
    for name, group in [*measured.groupby("specimen"), ("all", measured)]:
        rows.append(
            {
                "specimen": name,
                "X-rays": group["xray"].groupby(group["specimen"]).nunique().sum(),
                "runs": len(group),
                "start, mm": group["start"].median(),
                "mTRE, mm": group["mtre"].median(),
                "mTRE, 95th percentile": group["mtre"].quantile(0.95),
                "mRPD, mm": group["mrpd"].median(),
                "rotation, degrees": group["degrees"].median(),
                f"mRPD < {SUCCESS:g} mm, %": percent(group["mrpd"] < SUCCESS),
                "mTRE < 1 mm, %": percent(group["mtre"] < 1),
                "mTRE < 2 mm, %": percent(group["mtre"] < 2),
                "within 1 degree, %": percent(group["degrees"] < 1),
                "capture range, mm": capture_range(group["start"], group["mrpd"] < SUCCESS),
                "reported as failed, %": percent(group["failed"]),
                "seconds": group["seconds"].median(),
            }
        )
    return pd.DataFrame(rows)


def trusted(
    data: RegistrationDataset,
    everything: bool,  # keep X-rays whose true pose is in doubt
    most: int | None,  # how many X-rays, at most
) -> list[str]:
    "Choose the X-rays of a specimen."
    doubtful = () if everything or not isinstance(data, DeepFluoro) else DOUBTFUL.get(data.specimen, ())
    return [name for name in data.names if name not in doubtful][:most]


def load(arguments: argparse.Namespace) -> list[RegistrationDataset]:
    "Open the specimens that the user chose."
    kind, options = Ljubljana, {}
    if arguments.dataset == "deepfluoro":
        kind, options = (
            DeepFluoro,
            {"corrected": not arguments.published, "border": arguments.border, "labels": arguments.labels},
        )
    return [
        kind(arguments.file, specimen, **options) for specimen in arguments.specimens or kind.specimens(arguments.file)
    ]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.datasets",
        description="Register the X-rays of a public data set, and print errors and success rates.",
    )
    parser.add_argument("dataset", choices=("deepfluoro", "ljubljana"))
    parser.add_argument("file", type=Path, help="the HDF5 file, downloaded and unpacked")
    parser.add_argument("--specimens", nargs="+", metavar="NAME", help="such as 17-1882 or subject01 (default: all)")
    parser.add_argument("--xrays", type=int, metavar="N", help="of each specimen, at most (default: all)")
    parser.add_argument(
        "--starts",
        type=int,
        default=1,
        help="for each X-ray and each millimetre of the starting error (default: %(default)s)",
    )
    parser.add_argument("--furthest", type=int, default=20, metavar="MM", help="starting error (default: %(default)s)")
    parser.add_argument(
        "--factor", type=int, default=8, help="average blocks of so many pixels squared (default: %(default)s)"
    )
    parser.add_argument(
        "--labels",
        type=int,
        nargs="+",
        help="structures of DeepFluoro to render; 1 2 3 4 7 are the pelvis and the spine (default: everything)",
    )
    parser.add_argument(
        "--border",
        type=int,
        default=50,
        help="pixels of DeepFluoro's pictures to cut off on each side (default: %(default)s)",
    )
    parser.add_argument(
        "--published", action="store_true", help="use DeepFluoro's poses without the shift by half a voxel"
    )
    parser.add_argument("--all", action="store_true", help="keep DeepFluoro's X-rays whose true poses are in doubt")
    parser.add_argument("--seed", type=int, default=0, help="of the starting poses (default: %(default)s)")
    parser.add_argument("--csv", type=Path, help="where to write a row for each registration")
    return parser.parse_args(arguments)


def main(
    arguments: list[str] | None = None,  # of the command line
    register: Callable | None = None,  # instead of that of `diffdrr.registration`
) -> pd.DataFrame:  # a row for each registration
    "Run the evaluation, and print a table."
    chosen = parse(arguments)
    if register is None:
        from diffdrr.registration import pipeline as registration

        register = partial(registration.register, verbose=False)  # one progress bar is enough
    measured = []
    for data in load(chosen):
        xrays = trusted(data, chosen.all, chosen.xrays)
        steps = runs(data, register, xrays, chosen.starts, chosen.furthest, chosen.factor, chosen.seed)
        measured += tqdm(steps, total=len(xrays) * chosen.starts * chosen.furthest, desc=data.specimen)
    measured = pd.DataFrame(measured)
    print(markdown_table(summarize(measured)))
    if chosen.csv is not None:
        machine.write(chosen.csv, measured.to_csv(index=False))
    return measured


if __name__ == "__main__":
    main()
