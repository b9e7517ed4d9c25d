"ITK-RTK: the forward projectors of the Reconstruction Toolkit, C++ with threads."

from __future__ import annotations

from importlib.metadata import version

import itk
import numpy as np
from itk import RTK
from protocol import Contestant, Scene, Task, lps_grid, serve

LPS = np.array([-1.0, -1, 1])  # from RAS
Image = itk.Image[itk.F, 3]


def volume_image(scene: Scene) -> Image:
    "Wrap the volume, on the axes of the world."
    volume, spacing, origin = lps_grid(scene)
    image = itk.image_from_array(np.ascontiguousarray(volume.T))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(origin.tolist())
    return image


def detector_image(scene: Scene) -> Image:
    "Make the empty stack of projections, with the middle of the detector at its origin."
    image = itk.image_from_array(np.zeros((len(scene.rotation), scene.height, scene.width), dtype=np.float32))
    image.SetSpacing([scene.delx, scene.delx, 1.0])
    image.SetOrigin([(1 - scene.width) / 2 * scene.delx, (1 - scene.height) / 2 * scene.delx, 0.0])
    return image


def geometry(scene: Scene) -> RTK.ThreeDCircularProjectionGeometry:
    "Place each source and detector."
    result = RTK.ThreeDCircularProjectionGeometry.New()
    for matrix in scene.world_from_camera:
        left, top, forward, source = (LPS * matrix[:3, i] for i in range(4))

        def point(x):
            return itk.Point[itk.D, 3](x.tolist())

        def vector(x):
            return itk.Vector[itk.D, 3](x.tolist())

        if not result.AddProjection(point(source), point(source + scene.sdd * forward), vector(-left), vector(-top)):
            raise RuntimeError("RTK does not accept the geometry")
    return result


def projector(kind: type, scene: Scene, volume: Image) -> Task:
    "Set a filter up; a run executes it anew."
    forward = kind[Image, Image].New()
    forward.SetInPlace(False)  # the empty projections serve every run
    forward.SetInput(0, detector_image(scene))
    forward.SetInput(1, volume)
    forward.SetGeometry(geometry(scene))

    def run() -> Image:
        forward.Modified()
        forward.Update()
        return forward.GetOutput()

    return Task(run, arrays=lambda image: {"image": itk.array_from_image(image)})


def load(scene: Scene) -> Contestant:
    itk.MultiThreaderBase.SetGlobalMaximumNumberOfThreads(scene.threads)
    itk.MultiThreaderBase.SetGlobalDefaultNumberOfThreads(scene.threads)
    volume = volume_image(scene)
    methods = {"Joseph": RTK.JosephForwardProjectionImageFilter}
    return Contestant(
        tasks={name: {"forward": projector(kind, scene, volume)} for name, kind in methods.items()},
        versions={name: version(name) for name in ("itk-rtk", "itk")},
        models=dict.fromkeys(methods, "trilinear"),
        notes={"Joseph": "bilinear in each slice"},
    )


if __name__ == "__main__":
    serve(load)
