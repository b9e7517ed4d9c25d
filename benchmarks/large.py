"""One large reconstruction: 512^3 voxels from 360 views of 512 x 512 pixels.

How long does a step take, and in how much memory?

    python -m benchmarks.large

The phantom is the Shepp-Logan head; its pictures are exact line integrals of its ellipsoids, computed view by view.
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

import diffdrr
from diffdrr.reconstruction import SIRT, Projector, circular_orbit
from diffdrr.volumes import Grid

from . import machine
from .reconstruction import RESULTS, SDD, SOD, WATER, camera, head_integrals, head_values
from .report import markdown_table
from .workers.process_memory import most_memory

SIZE = 240.0  # of the cube around the head, mm


def photograph(projector: Projector) -> torch.Tensor:  # (V, 1, H, W)
    "Integrate through the head, one view at a time."
    views = (projector[i : i + 1] for i in tqdm(range(len(projector)), desc="pictures"))
    return torch.cat([torch.from_numpy(head_integrals(SIZE, one)).float() for one in views])


def error(volume: torch.Tensor) -> float:  # 1/mm
    "Compare the middle layers with the head: the root mean square of the difference."
    n = len(volume)
    place = (np.arange(n) + 0.5) * (SIZE / n) - SIZE / 2
    points = (
        np.stack(np.meshgrid(place, place, place[k], indexing="ij"), axis=-1)[:, :, 0]
        for k in range(3 * n // 8, 5 * n // 8)
    )
    layers = volume[..., 3 * n // 8 : 5 * n // 8].numpy()
    return float(
        np.sqrt(np.mean([np.square(layers[..., i] - head_values(SIZE, p)).mean() for i, p in enumerate(points)]))
    )


def measure(chosen: argparse.Namespace) -> list[dict]:
    "Reconstruct."
    shape = (chosen.voxels,) * 3
    delx = 1.1 * SIZE * SDD / SOD / chosen.pixels  # sees all of the head
    grid = Grid.around(shape, (SIZE / chosen.voxels,) * 3)
    projector = Projector(camera((chosen.pixels, chosen.pixels), delx), grid, circular_orbit(chosen.views, SOD))
    pictures = photograph(projector)
    rows = []

    def note(what: str, begin: float, volume: torch.Tensor) -> None:
        rows.append(
            {
                "what": what,
                "seconds": time.perf_counter() - begin,
                "error, % of water": 100 * error(volume) / WATER,
                "memory, GB": most_memory() / 1024,
            }
        )
        print(rows[-1], flush=True)

    begin = time.perf_counter()
    solver = SIRT(projector, pictures, subsets=chosen.subsets)
    note("preparation", begin, solver.volume)
    for i in range(chosen.iterations):
        begin = time.perf_counter()
        note(f"iteration {i + 1}", begin, solver.run(1, verbose=False))
    return rows


def as_markdown(chosen: argparse.Namespace, about: dict, rows: list[dict]) -> str:
    "Write the report that people read."
    volume, data = 4 * chosen.voxels**3 / 2**30, 4 * chosen.views * chosen.pixels**2 / 2**30
    return (
        "\n\n".join(
            [
                f"# A large reconstruction on {about['cpu']}, {about['cores']} cores",
                f"{datetime.date.today()}, commit {about['commit']}, diffdrr {diffdrr.__version__}, torch "
                f"{torch.__version__}, {about['memory_gb']} GB, {about['system']}. {about['busy']:.2f} cores were "
                "busy, this program's own included.",
                f"The Shepp-Logan head in {chosen.voxels}^3 voxels ({volume:.2f} GB) from {chosen.views} views of "
                f"{chosen.pixels} x {chosen.pixels} pixels ({data:.2f} GB) on a full circle. SIRT in {chosen.subsets} "
                "subsets, constant voxels. "
                "The error is the root mean square over the middle layers, air included. Memory is what the process "
                "held at most, until then.",
                markdown_table(pd.DataFrame(rows)),
            ]
        )
        + "\n"
    )


def main(arguments: list[str] | None = None) -> list[dict]:
    "Measure, print the report and store it."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.large", description="Reconstruct a large volume.")
    parser.add_argument("--voxels", type=int, default=512, help="along each axis (default: %(default)s)")
    parser.add_argument("--pixels", type=int, default=512, help="rows and columns (default: %(default)s)")
    parser.add_argument("--views", type=int, default=360, help="on a full circle (default: %(default)s)")
    parser.add_argument("--subsets", type=int, default=4, help="of views (default: %(default)s)")
    parser.add_argument("--iterations", type=int, default=2, help="of SIRT (default: %(default)s)")
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where the report is written (default: %(default)s)"
    )
    parser.add_argument("--name", help="of this machine, in the names of the files (default: made from its processor)")
    chosen = parser.parse_args(arguments)
    about = machine.describe()
    start, before = time.perf_counter(), machine.busy_seconds()
    rows = measure(chosen)
    about["busy"] = (machine.busy_seconds() - before) / (time.perf_counter() - start)
    text = as_markdown(chosen, about, rows)
    print("\n" + text)
    stem = f"{chosen.name or machine.slug(about)}-large"
    machine.write(chosen.results / f"{stem}.md", text)
    machine.write(chosen.results / f"{stem}.json", json.dumps({"machine": about, "rows": rows}, indent=1))
    return rows


if __name__ == "__main__":
    main()
