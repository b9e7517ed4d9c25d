"All contestants side by side: rounds in which each has its turn, and the table made of them."

from __future__ import annotations

import os
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from tqdm import tqdm

from . import machine, scene, startup
from .peers import PEERS, Unavailable, prepare
from .worker import Check, Failure, Worker

TASKS = {
    "forward": "forward",
    "pose_gradient": "forward + pose gradient",
    "jacobian": "Jacobian image",
    "volume_gradient": "volume gradient",
}
SECONDS_PER_TURN = 0.4  # a fast task is repeated this long in each turn
MOST_REPEATS = 20
Key = tuple[str, str, str, str]  # contestant, device, method, task


@dataclass
class Options:
    "What the user chose."

    contestants: list[str]
    environments: Path
    ct: Path | None
    camera: scene.Camera
    rounds: int
    slow: float  # a task that takes longer than this, in seconds,
    slow_rounds: int  # takes part in so many rounds only
    limit: float  # seconds; a task that takes longer is left out
    threads: int
    reference_rays: int
    devices: list[str]
    extras: bool  # also measure what concerns us alone


@dataclass
class Measurements:
    "Everything that was measured."

    checks: dict[Key, Check] = field(default_factory=dict)
    rounds: dict[Key, dict[int, float]] = field(default_factory=dict)  # seconds: the median of each turn
    errors: dict[Key, dict[str, float]] = field(default_factory=dict)  # by model, of the picture or of the gradient
    models: dict[Key, str] = field(default_factory=dict)
    notes: dict[Key, str] = field(default_factory=dict)
    versions: dict[str, dict[str, str]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)  # who does not take part, or what was left out, and why
    extras: dict[str, float] = field(default_factory=dict)

    def seconds(self, key: Key) -> float | None:
        "Return the median over the rounds."
        return statistics.median(self.rounds[key].values()) if self.rounds.get(key) else None

    def times_as_fast(self, key: Key, than: Key) -> float | None:
        "Return how many times as long the other takes: the median over the rounds that both took part in."
        common = self.rounds.get(key, {}).keys() & self.rounds.get(than, {}).keys()
        return statistics.median(self.rounds[than][r] / self.rounds[key][r] for r in common) if common else None


def errors(task: str, check: Check, truth: scene.Reference) -> dict[str, float]:
    "Compare a picture, or the gradient with respect to the pose, with both models."
    if task == "forward":
        return {
            model: scene.relative_error(check.arrays["image"].ravel()[truth.pixels], values)
            for model, values in truth.values.items()
        }
    if task == "pose_gradient" and "rotation" in check.arrays:
        return {
            model: max(scene.relative_error(check.arrays[part], g) for part, g in parts.items())
            for model, parts in truth.gradients.items()
        }
    return {}


def devices_of(name: str, devices: list[str]) -> tuple[str, ...]:
    "Say on which devices a contestant may be entered; one that needs a GPU is, without one, to say so."
    if name == "ours":
        return ("cpu", "cuda")
    peer = PEERS[name]
    return (("cpu",) if peer.on_cpu or "cuda" not in devices else ()) + (("cuda",) if peer.on_cuda else ())


class Comparison:
    "The course of the benchmark."

    def __init__(self, options: Options, folder: Path):
        self.options, self.folder = options, folder
        self.results, self.workers = Measurements(), {}
        self.density, self.affine = scene.load_density(options.ct)

    def save_scene(self, name: str, camera: scene.Camera, pixels: np.ndarray | slice = slice(None)) -> Path:
        "Write a scene of the volume, whose loss is of some pixels only; all scenes share one copy of the volume."
        folder = self.folder / name
        folder.mkdir()
        shared = self.folder / "density.npy"
        if not shared.exists():
            np.save(shared, self.density)
        (folder / "density.npy").symlink_to(shared)
        weights = scene.draw_weights(camera)
        some = np.zeros_like(weights)
        some.reshape(len(weights), -1)[:, pixels] = weights.reshape(len(weights), -1)[:, pixels]
        return scene.save(folder, None, self.affine, camera, some)

    def start(self, name: str, device: str, threads: int) -> Worker:
        return Worker(name, prepare(name, self.options.environments), device, threads)

    def enter(self, name: str, device: str, tiny: Path, some: Path, main: Path, truth: scene.Reference) -> None:
        """Start a contestant, warm it up on a tiny picture, run each of its tasks once, and hand it the scene for the
        rounds."""
        limit = self.options.limit
        worker = self.workers[name, device] = self.start(name, device, self.options.threads)
        worker.warm_up(tiny, limit)
        info = worker.load(some, limit)
        self.results.versions[name] = info["versions"]
        self.results.extras |= info["facts"]
        for method, task in (
            (method, task) for method, tasks in info["tasks"].items() for task in tasks if task != "one_by_one"
        ):
            key = name, device, method, task
            try:
                check = self.results.checks[key] = worker.check(method, task, limit)
            except Failure as failure:
                self.results.missing[f"{name} on {device}, {method}, {TASKS.get(task, task)}"] = str(failure)
                if worker.process is None:
                    worker.warm_up(tiny, limit)
                    worker.load(some, limit)
                continue
            self.results.models[key], self.results.notes[key] = info["models"][method], info["notes"].get(method, "")
            self.results.errors[key] = errors(task, check, truth)
        worker.load(main, limit)

    def take_turns(self) -> None:
        "Let everyone have a turn in each round."
        keys = [key for key in self.results.checks if key[3] in TASKS]
        todo = [(r, key) for r in range(self.options.rounds) for key in keys if r < self.last_round(key)]
        for r, key in tqdm(todo, desc="rounds", unit="turn"):
            name, device, method, task = key
            repeats = int(np.clip(SECONDS_PER_TURN / self.results.checks[key].seconds, 1, MOST_REPEATS))
            try:
                seconds = self.workers[name, device].run(method, task, repeats, self.options.limit * repeats)
                self.results.rounds.setdefault(key, {})[r] = statistics.median(seconds)
            except Failure as failure:
                self.results.missing[f"{name} on {device}, {method}, {TASKS[task]}, round {r + 1}"] = str(failure)

    def busy_with_others(self) -> float:  # seconds
        "Return for how long the cores have worked, except for this benchmark."
        return machine.busy_seconds() - sum(
            machine.process_seconds(pid)
            for pid in [os.getpid(), *(w.process.pid for w in self.workers.values() if w.process)]
        )

    def last_round(self, key: Key) -> int:
        "Say in how many rounds a task takes part."
        return self.options.slow_rounds if self.results.checks[key].seconds > self.options.slow else self.options.rounds

    def run(self) -> Measurements:
        "Measure everything."
        options, results = self.options, self.results
        truth = scene.compute_reference(self.density, self.affine, options.camera, options.reference_rays)
        tiny, main = (
            self.save_scene(name, camera)
            for name, camera in (("tiny", options.camera.resized(16)), ("main", options.camera))
        )
        some = self.save_scene("some", options.camera, truth.pixels)
        entries = [
            (name, device)
            for name in options.contestants
            for device in options.devices
            if device in devices_of(name, options.devices)
        ]
        for name, device in tqdm(entries, desc="contestants"):
            try:
                self.enter(name, device, tiny, some, main, truth)
            except (Unavailable, Failure) as error:
                results.missing[f"{name} on {device}"] = str(error)
        start, before = time.perf_counter(), self.busy_with_others()
        self.take_turns()
        if options.extras and "ours" in options.contestants:
            self.measure_extras(main)
        results.extras["cores used by others"] = (self.busy_with_others() - before) / (time.perf_counter() - start)
        return results

    def measure_extras(self, main: Path) -> None:
        "Measure what concerns us alone: threads, batches, large pictures, and a fresh process."
        results, limit = self.results, self.options.limit
        worker, single = self.workers["ours", "cpu"], self.start("ours", "cpu", 1)
        siddon = "Siddon", "forward"
        single.load(main, limit)
        single.run(*siddon, 1, limit)
        if self.options.threads > 1:
            results.extras["one thread over all"] = self.alternate([(single, siddon), (worker, siddon)])
        single.stop()
        worker.load(self.save_scene("batch", self.options.camera.turned(scene.OBLIQUE, batch=8)), limit)
        one_by_one = "Siddon", "one_by_one"
        for task in (siddon, one_by_one):
            worker.run(*task, 1, limit)
        results.extras["batch over one by one"] = self.alternate([(worker, siddon), (worker, one_by_one)])
        worker.load(self.save_scene("large", self.options.camera.resized(2048)), limit)
        try:
            large = worker.check("Siddon", "pose_gradient", 10 * limit)
            results.extras |= {"2048 x 2048, seconds": large.seconds, "2048 x 2048, bytes": large.bytes}
        except Failure as failure:
            results.missing["ours, 2048 x 2048 with pose gradient"] = str(failure)
        results.extras |= {f"fresh process, {name}": seconds for name, seconds in startup.measure(3).items()}

    def alternate(self, contestants: list[tuple[Worker, tuple[str, str]]]) -> float:
        "Let two tasks take turns, and return the median ratio of the first to the second."

        def turn(worker, task):
            return statistics.median(worker.run(*task, 3, 3 * self.options.limit))

        ratios = [turn(*contestants[0]) / turn(*contestants[1]) for _ in range(self.options.rounds)]
        return statistics.median(ratios)

    def stop(self) -> None:
        for worker in self.workers.values():
            worker.stop()


def compare(options: Options) -> Measurements:
    "Run the comparison, and leave nothing running."
    with tempfile.TemporaryDirectory(prefix="diffdrr-benchmark-") as folder:
        comparison = Comparison(options, Path(folder))
        try:
            return comparison.run()
        finally:
            comparison.stop()


def frame(results: Measurements) -> pd.DataFrame:
    "Lay the measurements out: a row for each contestant and method."
    rows = []
    for name, device, method, task in results.checks:
        if task != "forward":
            continue

        def row(task):
            return (name, device, method, task)

        milliseconds = {
            f"{title}, ms": 1000 * s if (s := results.seconds(row(task))) else None for task, title in TASKS.items()
        }
        check = results.checks.get(row("pose_gradient"), results.checks[row("forward")])
        rows.append(
            {
                "contestant": name,
                "method": method,
                "device": device,
                **milliseconds,
                "extra memory, MB": max(check.bytes, results.checks[row("forward")].bytes) / 1e6,
                **{f"error, {model}": results.errors[row("forward")][model] for model in ("constant", "trilinear")},
                "error of the pose gradient": results.errors.get(row("pose_gradient"), {}).get(
                    results.models[row("forward")]
                ),
                "integrates": results.models[row("forward")],
                "rounds": len(results.rounds.get(row("forward"), {})),
                "note": results.notes[row("forward")],
            }
        )
    return pd.DataFrame(rows)
