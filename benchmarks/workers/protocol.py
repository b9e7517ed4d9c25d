"""What all workers share: the scene, the clock, the memory gauge and the conversation with the benchmark.

A worker runs in the environment of its contestant, so this file needs numpy alone. It reads one JSON object per line
and answers with one: `load` a scene, `check` a task (run it once, gauge its memory, save what it computes), `run` it
several times.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass
class Scene:
    "A volume and pictures to take of it. World coordinates are RAS+ mm."

    density: np.ndarray  # (X, Y, Z) float32
    affine: np.ndarray  # (4, 4) world from voxel; whole numbers are centres
    rotation: np.ndarray  # (B, 3) Euler angles ZXY, radians
    translation: np.ndarray  # (B, 3) mm
    world_from_camera: (
        np.ndarray
    )  # (B, 4, 4) the camera looks along its z axis; its x and y axes point to the left and the top of the picture
    sdd: float  # mm
    height: int  # rows, pixels
    width: int  # columns, pixels
    delx: float  # mm, of a pixel in both directions
    weights: np.ndarray  # (B, H, W) of the pixels in the loss whose gradient is taken
    device: str  # "cpu" or "cuda"
    threads: int

    @classmethod
    def load(cls, folder: str, **changes) -> Scene:
        "Read what `scene.Scenery.save` wrote."
        description = json.loads((Path(folder) / "scene.json").read_text())
        arrays = {name: np.load(Path(folder) / f"{name}.npy") for name in ("density", "weights")}
        matrices = {
            name: np.array(description.pop(name)) for name in ("affine", "rotation", "translation", "world_from_camera")
        }
        return cls(**arrays, **matrices, **description, **changes)


def lps_grid(scene: Scene) -> tuple[np.ndarray, np.ndarray, np.ndarray]:  # (X, Y, Z), spacing (3,), origin (3,), mm
    "Turn the volume so that its axes are those of DICOM coordinates (x to the left, y to the back, z to the head)."
    affine = np.diag([-1.0, -1, 1, 1]) @ scene.affine
    order = np.abs(affine[:3, :3]).argmax(axis=1)
    volume, affine = scene.density.transpose(order), affine[:, [*order, 3]]
    for axis in range(3):
        if affine[axis, axis] < 0:
            affine[:3, 3] += affine[:3, axis] * (volume.shape[axis] - 1)
            affine[:3, axis] *= -1
            volume = np.flip(volume, axis)
    spacing = np.diag(affine)[:3]
    if not np.allclose(affine[:3, :3], np.diag(spacing), atol=1e-6):
        raise ValueError(f"the axes of the volume must be those of the world, not {scene.affine.tolist()}")
    return volume, spacing, affine[:3, 3]


@dataclass
class Task:
    "Something to time. `prepare` is not timed; its result is handed to `run`."

    run: Callable
    prepare: Callable | None = None
    arrays: Callable[..., Arrays] = lambda result: {"image": result}
    seconds: Callable | None = None  # reads the time from the result, where a program reports its own

    def __call__(self, synchronize: Callable[[], None]) -> tuple[float, object]:
        "Run once."
        state = () if self.prepare is None else (self.prepare(),)
        synchronize()
        start = time.perf_counter()
        result = self.run(*state)
        synchronize()
        seconds = time.perf_counter() - start
        return (seconds if self.seconds is None else self.seconds(result)), result


def status_bytes(key: str) -> int:
    "Read a size from the status of this process."
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def peak_of_process(run: Callable[[], object]) -> int:  # bytes
    "Measure by how much the resident set grows at most during a run."
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # hand freed memory back, so that a run cannot use it unseen
    Path("/proc/self/clear_refs").write_text("5")  # reset the high-water mark
    before = status_bytes("VmRSS")
    run()
    return status_bytes("VmHWM") - before


@dataclass
class Contestant:
    "What a worker offers for a scene."

    tasks: dict[str, dict[str, Task]]  # by method and name
    versions: dict[str, str]
    models: dict[str, str]  # by method, what it integrates: "constant" voxels, or the "trilinear" interpolation
    synchronize: Callable[[], None] = lambda: None
    peak: Callable[[Callable[[], object]], int] = peak_of_process
    notes: dict[str, str] = field(default_factory=dict)  # by method
    facts: dict[str, float] = field(default_factory=dict)  # measured on loading


def check(contestant: Contestant, task: Task, path: str) -> dict:
    "Run a task once, save what it computes, and return its time and by how much memory grew."
    results = []
    peak = contestant.peak(lambda: results.append(task(contestant.synchronize)))
    [(seconds, result)] = results
    np.savez(path, **task.arrays(result))
    return {"seconds": seconds, "bytes": peak}


def answer(contestant: Contestant, request: dict) -> dict:
    "Do what is asked with a task."
    task = contestant.tasks[request["method"]][request["task"]]
    if request["do"] == "check":
        return check(contestant, task, request["path"])
    if request["do"] == "run":
        return {"seconds": [task(contestant.synchronize)[0] for _ in range(request["repeats"])]}
    raise ValueError(f"no such request: {request['do']!r}")


def serve(load: Callable[[Scene], Contestant]) -> None:
    "Answer requests until the input ends. What the libraries print goes to the standard error."
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    contestant = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "load":
                contestant = None  # before the next one takes memory
                contestant = load(Scene.load(request["scene"], device=request["device"], threads=request["threads"]))
                reply = {
                    "tasks": {method: list(tasks) for method, tasks in contestant.tasks.items()},
                    **{name: getattr(contestant, name) for name in ("versions", "models", "notes", "facts")},
                }
            else:
                reply = answer(contestant, request)
        except Exception as error:
            reply = {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        print(json.dumps(reply), file=answers, flush=True)


def peak_of_children(baseline: int) -> int:  # bytes
    "Return by how much the largest child process so far exceeds a baseline."
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 - baseline
