"nanodrr 0.1.7: trilinear sampling, in PyTorch on the CPU and in Triton on a GPU."

from __future__ import annotations

from importlib.metadata import version

import torch
from nanodrr.camera import make_rt_inv
from nanodrr.data import Subject
from nanodrr.drr import DRR
from protocol import Contestant, Scene, serve
from torch_tasks import Pictures, peak_on, synchronize_on
from torchio import ScalarImage


def load(scene: Scene) -> Contestant:
    torch.set_num_threads(scene.threads)
    image = ScalarImage(tensor=torch.from_numpy(scene.density)[None], affine=scene.affine)
    subject = Subject.from_images(image, convert_to_mu=False).to(scene.device)
    drr = DRR.from_carm_intrinsics(
        scene.sdd, scene.delx, scene.delx, 0.0, 0.0, scene.height, scene.width, dtype=torch.float32, device=scene.device
    )
    methods = {
        "trilinear, 500 samples": lambda rotation, translation: drr(
            subject, make_rt_inv(rotation, translation), n_samples=500
        )
    }
    return Contestant(
        tasks={name: Pictures(scene, render, degrees=True).tasks() for name, render in methods.items()},
        versions={name: version(name) for name in ("nanodrr", "torch")},
        models=dict.fromkeys(methods, "trilinear"),
        synchronize=synchronize_on(scene.device),
        peak=peak_on(scene.device),
        notes=dict.fromkeys(methods, "Triton" if scene.device == "cuda" else "torch"),
    )


if __name__ == "__main__":
    serve(load)
