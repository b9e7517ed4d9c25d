"diffdrr 0.6.1: Siddon by sorted crossings, and trilinear sampling, in PyTorch."

from __future__ import annotations

import torch
from protocol import Contestant, Scene, serve
from torch_tasks import Pictures, peak_on, synchronize_on
from torchio import ScalarImage, Subject

from diffdrr.drr import DRR

AP = [[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]]


def camera(scene: Scene, renderer: str) -> DRR:
    "Make a renderer of the density as it is."
    image = ScalarImage(tensor=torch.from_numpy(scene.density)[None], affine=scene.affine)
    subject = Subject(volume=image, density=image, mask=None, reorient=torch.tensor(AP))
    return DRR(subject, sdd=scene.sdd, height=scene.height, width=scene.width, delx=scene.delx, renderer=renderer).to(
        scene.device
    )


def load(scene: Scene) -> Contestant:
    torch.set_num_threads(scene.threads)
    siddon, trilinear = (camera(scene, renderer) for renderer in ("siddon", "trilinear"))
    euler = dict(parameterization="euler_angles", convention="ZXY")
    methods = {
        "Siddon, sorted crossings": lambda rotation, translation: siddon(rotation, translation, **euler),
        "trilinear, 500 samples": lambda rotation, translation: trilinear(rotation, translation, n_points=500, **euler),
    }
    return Contestant(
        tasks={name: Pictures(scene, render).tasks() for name, render in methods.items()},
        versions={"diffdrr": "0.6.1", "torch": torch.__version__},
        models=dict(zip(methods, ("constant", "trilinear"))),
        synchronize=synchronize_on(scene.device),
        peak=peak_on(scene.device),
    )


if __name__ == "__main__":
    serve(load)
