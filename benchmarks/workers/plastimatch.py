"""plastimatch: exact DRRs of the Debian package, C++ with OpenMP.

It is a program, which reads the volume and writes the picture. Counted is what it reports itself: its total time,
which begins after the volume is read, less its time for writing the picture.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from protocol import Contestant, Scene, Task, lps_grid, peak_of_children, serve

LPS = np.array([-1.0, -1, 1])  # from RAS
MILLIMETRES = 10.0  # it integrates over centimetres


def write_mha(path: Path, scene: Scene) -> None:
    "Write the volume in the MetaImage format."
    volume, spacing, origin = lps_grid(scene)

    def text(values):
        return " ".join(f"{value:.9g}" for value in values)

    header = f"""ObjectType = Image
NDims = 3
BinaryData = True
BinaryDataByteOrderMSB = False
TransformMatrix = 1 0 0 0 1 0 0 0 1
Offset = {text(origin)}
ElementSpacing = {text(spacing)}
DimSize = {text(volume.shape)}
ElementType = MET_FLOAT
ElementDataFile = LOCAL
"""
    with path.open("wb") as file:
        file.write(header.encode())
        file.write(np.ascontiguousarray(volume.T, dtype="<f4").tobytes())


def read_pfm(path: Path) -> np.ndarray:  # (H, W)
    "Read a picture of floating-point numbers; plastimatch writes the upper row first."
    with path.open("rb") as file:
        _, size, order = (file.readline().split() for _ in range(3))
        width, height = (int(x) for x in size)
        return np.frombuffer(file.read(), dtype="<f4" if float(order[0]) < 0 else ">f4").reshape(height, width)


class Program:
    "plastimatch, with the arguments of a scene."

    def __init__(self, scene: Scene, algorithm: str):
        self.folder = tempfile.TemporaryDirectory()
        self.volume = Path(self.folder.name) / "volume.mha"
        write_mha(self.volume, scene)
        left, top, forward, source = (LPS * scene.world_from_camera[0][:3, i] for i in range(4))
        distance = float(np.linalg.norm(source))

        def text(values):
            return " ".join(f"{value:.9g}" for value in values)

        size = scene.height * scene.delx, scene.width * scene.delx
        options = {
            "-i": algorithm,
            "-P": "none",
            "-t": "pfm",
            "-A": "cpu",
            "--sad": f"{distance:.9g}",
            "--sid": f"{scene.sdd:.9g}",
        }
        options |= {
            "-n": text(-forward),
            "--vup": text(top),
            "-o": text(source + distance * forward),
            "-z": text(size),
            "-r": f"{scene.height} {scene.width}",
        }
        self.options, self.environment = options, {**os.environ, "OMP_NUM_THREADS": str(scene.threads)}

    def run(self, **changes: str) -> tuple[float, np.ndarray]:
        "Render. Returns the time that plastimatch reports, and the picture."
        options = {**self.options, **changes, "-O": str(Path(self.folder.name) / "picture_")}
        command = ["plastimatch", "drr", *(word for pair in options.items() for word in pair), str(self.volume)]
        text = subprocess.run(command, capture_output=True, text=True, check=True, env=self.environment).stdout
        total, writing = (float(re.search(rf"{name} time: ([\d.e-]+) sec", text)[1]) for name in ("Total", "I/O"))
        return total - writing, MILLIMETRES * read_pfm(next(Path(self.folder.name).glob("picture_*.pfm")))


def load(scene: Scene) -> Contestant:
    if len(scene.rotation) > 1:
        raise ValueError("plastimatch renders one picture of a pose at a time")
    program = Program(scene, "exact")
    program.run(**{"-r": "2 2"})
    baseline = peak_of_children(0)
    task = Task(program.run, seconds=lambda result: result[0], arrays=lambda result: {"image": result[1][None]})

    def peak(run) -> int:
        run()
        return peak_of_children(baseline)

    version = subprocess.run(["plastimatch", "--version"], capture_output=True, text=True, check=True).stdout
    return Contestant(
        tasks={"exact": {"forward": task}},
        versions={"plastimatch": version.split()[-1]},
        models={"exact": "constant"},
        peak=peak,
        notes={"exact": "its own report, without reading and writing"},
    )


if __name__ == "__main__":
    serve(load)
