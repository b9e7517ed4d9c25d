"""How many pictures a worker of `synthesize` makes for each second of a core, and how much of its time the kernels take.

    python -m benchmarks.synthesis [--pictures 20]

The picture is that of the project's README: 200 x 200 pixels of the built-in chest, 512 x 512 x 133 voxels. Workers are
processes with one thread each, as those of Dask are; each renders and encodes the same pictures, at the same time, after
a few for compilers and caches. Two rates are stated: pictures for each second on the clock, which other programs slow
down, and for each second that the worker itself was on a core. The share of the kernels is the time within compiled
code, of the time on the clock."""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch

from diffdrr.kernels.cpu import launch
from diffdrr.synthesis import Cameras, Output, Physics, Recipe
from diffdrr.synthesis.patients import Patient, find_cases
from diffdrr.synthesis.samples import encode, make_sample

from . import machine
from .report import markdown_table

RESULTS = Path(__file__).parent / "results"
CAMERA = Cameras(height=200, delx=2.0)
STRUCTURES = (
    "heart aorta liver lung_upper_lobe_left clavicula_left rib_left_5 vertebrae_T8 sternum trachea spinal_cord".split()
)
MASKS = Output(structures=STRUCTURES, masks=True, boxes=True)
PHYSICS = Physics(kvp=(60, 120), photons=5000, scatter=0.3, blur=0.8, focal_spot=0.6, electronic=0.001)
RECIPES = {
    "picture": Recipe(camera=CAMERA),
    "picture, masks of ten structures": Recipe(camera=CAMERA, output=MASKS),
    "picture with physics": Recipe(camera=CAMERA, physics=PHYSICS),
    "picture with physics, masks of ten structures": Recipe(camera=CAMERA, physics=PHYSICS, output=MASKS),
}
WARM = 3  # pictures before the clock starts


@dataclass(frozen=True)
class Turn:
    "What one worker did."

    seconds: float  # on the clock
    cpu: float  # seconds on a core
    kernels: float  # seconds within compiled code


def work(what: str, pictures: int, ready: object, turns: object) -> None:
    "Be a worker: render and encode pictures, when all are ready."
    torch.set_num_threads(1)
    recipe, kernels, in_threads = RECIPES[what], [0.0], launch.in_threads

    def timed(*task: object) -> None:
        start = time.perf_counter()
        in_threads(*task)
        kernels[0] += time.perf_counter() - start

    launch.in_threads = timed
    (case,) = find_cases(recipe)
    patient = Patient(recipe, case)

    def make(count: int) -> None:
        for index in range(count):
            encode(make_sample(recipe, patient, index), recipe.output)

    make(WARM)
    ready.wait()
    kernels[0], start, cpu = 0.0, time.perf_counter(), time.process_time()
    make(pictures)
    turns.put(Turn(time.perf_counter() - start, time.process_time() - cpu, kernels[0]))


def measure(what: str, workers: int, pictures: int) -> list[Turn]:
    "Let workers make pictures at the same time."
    context = multiprocessing.get_context("spawn")
    ready, turns = context.Barrier(workers), context.Queue()
    processes = [context.Process(target=work, args=(what, pictures, ready, turns)) for _ in range(workers)]
    for process in processes:
        process.start()
    found = [turns.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    return found


def row(what: str, workers: int, pictures: int, turns: list[Turn]) -> dict[str, object]:
    "Summarise what workers did."
    seconds, cpu, kernels = (sum(getattr(turn, name) for turn in turns) for name in asdict(turns[0]))
    made = pictures * workers
    return {
        "what": what,
        "workers": workers,
        "pictures per second and worker": f"{made / seconds:.1f}",
        "pictures per second on a core": f"{made / cpu:.1f}",
        "share of the kernels": f"{kernels / seconds:.2f}",
        "load of the machine": f"{os.getloadavg()[0]:.1f}",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast a worker makes synthetic X-rays.")
    parser.add_argument("--pictures", type=int, default=20, help="of each worker and kind")
    pictures, rows, about = parser.parse_args().pictures, [], machine.describe()
    for what in RECIPES:
        for workers in (1, 2):
            rows.append(row(what, workers, pictures, measure(what, workers, pictures)))
            print(rows[-1], flush=True)
    text = f"# Synthetic X-rays per second\n\n{about['cpu']}, {about['cores']} cores, commit {about['commit']}\n\n"
    note = "The machine is busy where its load is above the number of workers; the rate on the clock is then too low."
    path = RESULTS / f"{machine.slug(about)}-synthesis.md"
    machine.write(path, text + markdown_table(pd.DataFrame(rows)) + f"\n\n{note}\n")
    print(path)


if __name__ == "__main__":
    main()
