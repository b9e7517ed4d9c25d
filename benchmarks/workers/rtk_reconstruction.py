"""Reconstructions by ITK-RTK.

Reads a folder with `job.json` and arrays; writes a volume, and one line of JSON, for each method.

RTK turns around its y axis, so coordinates are permuted: its (x, y, z) are (x, z, -y) of the world.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import itk
import numpy as np
from itk import RTK
from process_memory import most_memory

Image = itk.Image[itk.F, 3]
RTK_FROM_WORLD = np.array([[1.0, 0, 0], [0, 0, 1], [0, -1, 0]])


def geometry(job: dict) -> RTK.ThreeDCircularProjectionGeometry:
    "Place each source and detector."
    result = RTK.ThreeDCircularProjectionGeometry.New()

    def point(x):
        return itk.Point[itk.D, 3](x.tolist())

    def vector(x):
        return itk.Vector[itk.D, 3](x.tolist())

    for matrix in np.array(job["world_from_camera"]):
        left, top, forward, source = (RTK_FROM_WORLD @ matrix[:3, i] for i in range(4))
        if not result.AddProjection(point(source), point(source + job["sdd"] * forward), vector(-left), vector(top)):
            raise RuntimeError("RTK does not accept the geometry")
    return result


def projections(job: dict, folder: Path) -> Image:
    pictures = np.load(folder / "pictures.npy")
    image = itk.image_from_array(
        np.ascontiguousarray(pictures[:, ::-1])
    )  # rows from the bottom, so that rows x columns points to the source
    image.SetSpacing([job["delx"], job["delx"], 1.0])
    image.SetOrigin([(1 - n) / 2 * job["delx"] for n in pictures.shape[:0:-1]] + [0.0])
    return image


def empty_volume(job: dict) -> Image:
    (nx, ny, nz), (sx, sy, sz) = job["shape"], job["spacing"]
    x, y, z = job["origin"]  # centre of the first voxel in the world, mm
    image = itk.image_from_array(np.zeros((ny, nz, nx), dtype=np.float32))
    image.SetSpacing([sx, sz, sy])
    image.SetOrigin([x, z, -(y + (ny - 1) * sy)])
    return image


def from_rtk(image: Image) -> np.ndarray:  # (X, Y, Z)
    "Put the axes of a volume back into order."
    return np.ascontiguousarray(itk.array_from_image(image)[::-1].transpose(2, 0, 1))


def fdk(job: dict, folder: Path) -> Image:
    method = RTK.FDKConeBeamReconstructionFilter[Image].New()
    method.SetInput(0, empty_volume(job))
    method.SetInput(1, projections(job, folder))
    method.SetGeometry(geometry(job))
    method.GetRampFilter().SetTruncationCorrection(0.0)
    method.GetRampFilter().SetHannCutFrequency(1.0 if job["hann"] else 0.0)
    method.Update()
    return method.GetOutput()


def sart(job: dict, folder: Path) -> Image:
    method = RTK.SARTConeBeamReconstructionFilter[Image, Image].New()
    method.SetForwardProjectionFilter(method.ForwardProjectionType_FP_JOSEPH)
    method.SetBackProjectionFilter(method.BackProjectionType_BP_JOSEPH)
    method.SetInput(0, empty_volume(job))
    method.SetInput(1, projections(job, folder))
    method.SetGeometry(geometry(job))
    method.SetNumberOfIterations(job["iterations"])
    method.SetNumberOfProjectionsPerSubset(job["views_per_subset"])
    method.SetLambda(1.0)
    method.SetEnforcePositivity(True)
    method.Update()
    return method.GetOutput()


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    itk.MultiThreaderBase.SetGlobalMaximumNumberOfThreads(job["threads"])
    itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(job["threads"])
    methods = {"FDK": fdk, "SART": sart}
    for method in methods.values():  # loads code
        method({**job, "shape": [8, 8, 8], "iterations": 1}, folder)
    for name, method in methods.items():
        begin = time.perf_counter()
        volume = from_rtk(method(job, folder))
        seconds = time.perf_counter() - begin
        np.save(folder / f"{name}.npy", volume)
        print(json.dumps({"method": name, "seconds": seconds, "memory": most_memory()}), file=answers, flush=True)


if __name__ == "__main__":
    main()
