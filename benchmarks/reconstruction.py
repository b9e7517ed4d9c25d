"""Reconstruct from few and many views, with and without noise, beside ITK-RTK: how good, how fast, in how much memory.

    python -m benchmarks.reconstruction

Two phantoms: the CT, with its voxels joined in blocks, and the Shepp-Logan head in three dimensions. Pictures of the
CT are taken of its full resolution, with rays finer than pixels; those of the head are exact line integrals of its
ellipsoids. So nothing is reconstructed by the model that it was made with. Quality is measured inside the body,
where no view is cut off.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from skimage.metrics import structural_similarity
from tqdm import tqdm

import diffdrr
from diffdrr.geometry import Camera
from diffdrr.reconstruction import Projector, circular_orbit
from diffdrr.volumes import Ellipsoid, Grid, block_mean, load_example_ct, read

from . import machine
from .peers import FOLDER, Unavailable, prepare
from .report import markdown_table
from .scene import CT, ROOT
from .worker import SCRIPTS, THREADS, Failure

RESULTS = Path(__file__).parent / "results"
WATER = 0.02  # attenuation, 1/mm
SDD, SOD = 1300.0, 850.0  # mm
FINER = 2  # rays along each side of a pixel
CONTESTANTS = {"ours": "ours", "rtk": "ITK-RTK"}
# Half axes, centre (of the unit cube), rotation about z in degrees, and what is added: the head of Shepp and Logan
# (1974), in three dimensions after Kak and Slaney (1988), with contrasts that can be seen (Toft, 1996).
HEAD = (
    ((0.69, 0.92, 0.81), (0, 0, 0), 0, 1.0),
    ((0.6624, 0.874, 0.78), (0, -0.0184, 0), 0, -0.8),
    ((0.11, 0.31, 0.22), (0.22, 0, 0), -18, -0.2),
    ((0.16, 0.41, 0.28), (-0.22, 0, 0), 18, -0.2),
    ((0.21, 0.25, 0.41), (0, 0.35, -0.15), 0, 0.1),
    ((0.046, 0.046, 0.05), (0, 0.1, 0.25), 0, 0.1),
    ((0.046, 0.046, 0.05), (0, -0.1, 0.25), 0, 0.1),
    ((0.046, 0.023, 0.05), (-0.08, -0.605, 0), 0, 0.1),
    ((0.023, 0.023, 0.02), (0, -0.606, 0), 0, 0.1),
    ((0.023, 0.046, 0.02), (0.06, -0.605, 0), 0, 0.1),
)


@dataclass(frozen=True)
class Case:
    "What is reconstructed, and from what."

    phantom: str
    true: np.ndarray  # (X, Y, Z) 1/mm
    inside: np.ndarray  # (X, Y, Z) where quality is measured
    projector: Projector
    pictures: torch.Tensor  # (V, 1, H, W) line integrals


@dataclass(frozen=True)
class Outcome:
    "A reconstruction, and how good it is."

    phantom: str
    views: int
    noise: bool
    who: str
    method: str
    psnr: float  # decibel
    ssim: float
    seconds: float
    iterations: int
    memory: float  # MB that the process held at most, so far


def camera(pixels: tuple[int, int], delx: float) -> Camera:
    "Make a camera at the distance of all cases."
    return Camera(SDD, *pixels, delx)


def chest(path: Path | None, block: tuple[int, int, int], pixels: tuple[int, int], delx: float, views: int) -> Case:
    "Photograph a CT in full resolution, and join its voxels."
    subject = load_example_ct() if path is None else read(path)
    signs = np.sign(np.diag(np.asarray(subject.volume.affine))[:3])
    hu = subject.volume.data[0].float().flip([i for i in range(3) if signs[i] < 0])
    attenuation = WATER * (1 + hu / 1000).clamp(min=0)
    grid, orbit = Grid.around(tuple(hu.shape), subject.volume.spacing), circular_orbit(views, SOD)
    fine = Projector(camera(tuple(FINER * n for n in pixels), delx / FINER), grid, orbit)
    with torch.no_grad():
        each = (fine[i : i + 1] for i in tqdm(range(views), desc="chest", leave=False))
        pictures = torch.cat([F.avg_pool2d(one(attenuation), FINER) for one in each])
    true = block_mean(attenuation, block)
    inside = np.zeros(true.shape, dtype=bool)
    middle = slice(true.shape[2] // 3, 2 * true.shape[2] // 3)
    inside[..., middle] = true[..., middle].numpy() > 0.1 * WATER
    return Case("chest", true.numpy(), inside, Projector(camera(pixels, delx), grid.coarsen(block), orbit), pictures)


def head_solids(size: float) -> list[tuple[Ellipsoid, float]]:  # with the attenuation that each adds, 1/mm
    "Make the ellipsoids of the head in a cube."
    solids = []
    for axes, centre, degrees, value in HEAD:
        turn = np.deg2rad(degrees)
        rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
        solids.append(
            (
                Ellipsoid(size / 2 * np.array(centre, dtype=float), rotation @ np.diag(size / 2 * np.array(axes))),
                WATER * value,
            )
        )
    return solids


def head_integrals(size: float, projector: Projector) -> np.ndarray:  # (V, 1, H, W)
    "Integrate through the head exactly."
    source, target = (x.double().numpy() for x in projector.views.rays())
    source, length = np.broadcast_to(source, target.shape), np.linalg.norm(target - source, axis=-1)
    pictures = np.zeros(length.shape)
    for solid, attenuation in head_solids(size):
        entry, leave = solid.interval(source, target)
        pictures += attenuation * length * np.clip(np.nan_to_num(leave - entry, posinf=0, neginf=0), 0, None)
    return pictures.reshape(projector.picture_shape)


def head_values(size: float, points: np.ndarray) -> np.ndarray:  # (..., 3) -> (...) 1/mm
    "Look up the attenuation of the head."
    return sum(attenuation * solid.contains(points) for solid, attenuation in head_solids(size))


def head(shape: tuple[int, int, int], size: float, pixels: tuple[int, int], delx: float, views: int) -> Case:
    "Photograph the Shepp-Logan head."
    grid = Grid.around(shape, tuple(size / n for n in shape))
    projector = Projector(camera(pixels, delx), grid, circular_orbit(views, SOD))
    points = np.stack(
        np.meshgrid(*[((np.arange(3 * n) + 0.5) / (3 * n) - 0.5) * size for n in shape], indexing="ij"), axis=-1
    )  # 27 in each voxel
    true = F.avg_pool3d(torch.from_numpy(head_values(size, points))[None], 3)[0].float().numpy()
    inside = np.zeros(shape, dtype=bool)
    inside[..., shape[2] // 4 : -(shape[2] // 4)] = true[..., shape[2] // 4 : -(shape[2] // 4)] > 0
    return Case("Shepp-Logan", true, inside, projector, torch.from_numpy(head_integrals(size, projector)).float())


def with_noise(pictures: torch.Tensor, photons: float) -> torch.Tensor:
    "Count photons."
    counts = torch.poisson(photons * torch.exp(-pictures), generator=torch.Generator().manual_seed(0))
    return -(counts.clamp(min=1) / photons).log()


def reconstruct(
    name: str, python: Path, case: Case, pictures: torch.Tensor, settings: dict, threads: int
) -> Iterator[tuple[dict, np.ndarray]]:
    "Let a contestant reconstruct. Raises a `Failure` if it ends too early."
    environment = {
        **os.environ,
        **dict.fromkeys(THREADS, str(threads)),
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONWARNINGS": "ignore",
        "PYTHONPATH": str(ROOT) if name == "ours" else "",
        "CUDA_VISIBLE_DEVICES": "",
    }
    views, affine = case.projector.views, case.projector.grid.affine
    place = dict(
        sdd=SDD, delx=views.camera.delx, world_from_camera=views.detector.reorient.compose(views.pose).matrix.tolist()
    )
    box = dict(shape=case.true.shape, spacing=affine.diagonal()[:3].tolist(), origin=affine[:3, 3].tolist())
    job = settings | place | box | dict(threads=threads)
    with tempfile.TemporaryDirectory(prefix="diffdrr-reconstruction-") as folder:
        (Path(folder) / "job.json").write_text(json.dumps(job))
        np.save(Path(folder) / "pictures.npy", pictures[:, 0].numpy())
        done = subprocess.run(
            [python, SCRIPTS / f"{name}_reconstruction.py", folder], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            raise Failure(f"{name} ended: {done.stderr.strip().splitlines()[-1:]}")
        for line in done.stdout.splitlines():
            answer = json.loads(line)
            yield answer, np.load(Path(folder) / f"{answer['method']}.npy")


def quality(case: Case, volume: np.ndarray) -> tuple[float, float]:  # PSNR in decibel, and SSIM
    "Compare with the truth inside the body."
    span = float(case.true[case.inside].max())
    error = np.square(volume - case.true)[case.inside].mean()
    _, similarity = structural_similarity(case.true, volume, data_range=span, full=True)
    return float(10 * np.log10(span**2 / error)), float(similarity[case.inside].mean())


def measure(chosen: argparse.Namespace) -> tuple[list[Outcome], dict[str, str]]:  # and who does not take part, and why
    "Let everyone reconstruct everything."
    settings = dict(iterations=chosen.iterations, tv_iterations=chosen.tv_iterations, views_per_subset=3)
    outcomes, missing = [], {}
    photograph = {
        "chest": lambda views: chest(chosen.ct, tuple(chosen.block), tuple(chosen.pixels), chosen.delx, views),
        "head": lambda views: head((chosen.head,) * 3, 240.0, tuple(chosen.head_pixels), chosen.head_delx, views),
    }
    for phantom, views in tqdm(
        [(phantom, views) for phantom in photograph for views in chosen.views], desc="phantoms and views"
    ):
        case = photograph[phantom](views)
        for noise, name in [(noise, name) for noise in (False, True) for name in CONTESTANTS]:
            pictures = with_noise(case.pictures, chosen.photons) if noise else case.pictures
            job = dict(settings, weight=chosen.weight * views, hann=noise)
            try:
                for answer, volume in reconstruct(
                    name, prepare(name, chosen.environments), case, pictures, job, chosen.threads
                ):
                    steps = {"FDK": 1, "total variation": chosen.iterations + chosen.tv_iterations}.get(
                        answer["method"], chosen.iterations
                    )
                    outcomes.append(
                        Outcome(
                            case.phantom,
                            views,
                            noise,
                            CONTESTANTS[name],
                            answer["method"],
                            *quality(case, volume),
                            answer["seconds"],
                            steps,
                            answer["memory"],
                        )
                    )
            except (Unavailable, Failure) as reason:
                missing[CONTESTANTS[name]] = str(reason)
    return outcomes, missing


def as_markdown(chosen: argparse.Namespace, about: dict, outcomes: list[Outcome], missing: dict[str, str]) -> str:
    "Write the report that people read."
    table = pd.DataFrame([asdict(outcome) for outcome in outcomes])
    table["seconds per iteration"] = table["seconds"] / table["iterations"]
    table["noise"] = table["noise"].map({True: "yes", False: "no"})
    table = table.rename(columns={"psnr": "PSNR, dB", "ssim": "SSIM", "memory": "memory, MB"})
    contents = [
        f"# Reconstruction on {about['cpu']}, {about['cores']} cores",
        f"{datetime.date.today()}, commit {about['commit']}, diffdrr {diffdrr.__version__}, torch "
        f"{torch.__version__}, {chosen.threads} threads, {about['memory_gb']} GB, {about['system']}, "
        f"OMP_WAIT_POLICY=PASSIVE. {about['busy']:.2f} cores were busy, the contestants' included.",
        f"A full circle, source {SOD:g} mm from the axis and {SDD:g} mm from the detector. The chest "
        f"({chosen.ct.name if chosen.ct else 'the built-in example'}) in blocks of "
        f"{' x '.join(map(str, chosen.block))} voxels, on {chosen.pixels[0]} x {chosen.pixels[1]} pixels of "
        f"{chosen.delx:g} mm; "
        f"the head in {chosen.head}^3 voxels, on {chosen.head_pixels[0]} x {chosen.head_pixels[1]} pixels of "
        f"{chosen.head_delx:g} mm. Noise: {chosen.photons:g} photons for each pixel in air; FDK then with a Hann "
        f"window. SART: {chosen.iterations} iterations in subsets of 3 views, non-negative. Total variation (weight "
        f"{chosen.weight:g} for each view): {chosen.tv_iterations} iterations more. PSNR and SSIM inside the body. "
        "Memory is what the process held at most, until then: methods run one after the other.",
        markdown_table(table),
    ]
    if missing:
        contents.append("Left out:\n\n" + "\n".join(f"- {who}: {why}" for who, why in missing.items()))
    return "\n\n".join(contents) + "\n"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reconstruction", description="Reconstruct phantoms from few and many views."
    )
    parser.add_argument(
        "--views",
        type=int,
        nargs="+",
        default=[15, 30, 75, 180],
        help="how many, on a full circle (default: %(default)s)",
    )
    parser.add_argument(
        "--ct",
        type=Path,
        default=CT if CT.exists() else None,
        help=(
            "of the chest (default: the real CT beside the project where there is one, otherwise the built-in example)"
        ),
    )
    parser.add_argument(
        "--block", type=int, nargs=3, default=[8, 8, 4], help="voxels of the CT that become one (default: %(default)s)"
    )
    parser.add_argument(
        "--head", type=int, default=64, help="voxels of the head along each axis (default: %(default)s)"
    )
    parser.add_argument(
        "--pixels", type=int, nargs=2, default=[64, 80], help="rows and columns for the chest (default: %(default)s)"
    )
    parser.add_argument(
        "--delx", type=float, default=8.0, help="size of a pixel for the chest, mm (default: %(default)s)"
    )
    parser.add_argument(
        "--head-pixels",
        type=int,
        nargs=2,
        default=[96, 96],
        help="rows and columns for the head (default: %(default)s)",
    )
    parser.add_argument(
        "--head-delx", type=float, default=4.0, help="size of a pixel for the head, mm (default: %(default)s)"
    )
    parser.add_argument("--iterations", type=int, default=10, help="of SART (default: %(default)s)")
    parser.add_argument(
        "--tv-iterations",
        type=int,
        default=140,
        help="of total variation, which begins with the result of SART (default: %(default)s)",
    )
    parser.add_argument(
        "--weight", type=float, default=0.02, help="of total variation, for each view (default: %(default)s)"
    )
    parser.add_argument("--photons", type=float, default=1e5, help="for each pixel in air (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="(default: %(default)s)")
    parser.add_argument(
        "--environments", type=Path, default=FOLDER, help="where the other package is installed (default: %(default)s)"
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where the report is written (default: %(default)s)"
    )
    parser.add_argument("--name", help="of this machine, in the names of the files (default: made from its processor)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> list[Outcome]:
    "Measure, print the report and store it."
    chosen = parse(arguments)
    about = machine.describe()
    start, before = time.perf_counter(), machine.busy_seconds()
    outcomes, missing = measure(chosen)
    about["busy"] = (machine.busy_seconds() - before) / (time.perf_counter() - start)
    text = as_markdown(chosen, about, outcomes, missing)
    print("\n" + text)
    stem = f"{chosen.name or machine.slug(about)}-reconstruction"
    for suffix, contents in (
        (".md", text),
        (
            ".json",
            json.dumps({"machine": about, "outcomes": [asdict(o) for o in outcomes], "missing": missing}, indent=1),
        ),
    ):
        machine.write(chosen.results / (stem + suffix), contents)
        print(f"written to {chosen.results / (stem + suffix)}")
    return outcomes


if __name__ == "__main__":
    main()
