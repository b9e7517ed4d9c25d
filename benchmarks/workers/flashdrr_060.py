"FlashDRR 0.6.0: trilinear sampling in Triton, on a GPU."

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import torch
from flashdrr.rendering import VolumeRaycaster
from protocol import Contestant, Scene, Task, serve
from torch_tasks import peak_on, synchronize_on

MILLIMETRES = 10.0  # it integrates over centimetres


def load(scene: Scene) -> Contestant:
    torch.set_num_threads(scene.threads)
    half = (scene.height - 1) / 2 * scene.delx  # its first and last rays go through the edges of the field of view
    drr = VolumeRaycaster(
        ray_samples=500,
        resolution=(scene.width, scene.height),
        fov=float(np.rad2deg(2 * np.arctan(half / scene.sdd))),
        return_tau=True,
    ).to(scene.device)
    axes = np.diag([-1.0, 1, 1, 1])  # its x axis points to the right of the picture
    view = torch.tensor(scene.world_from_camera @ axes, dtype=torch.float32, device=scene.device)
    voxel_from_world = torch.tensor(np.linalg.inv(scene.affine), dtype=torch.float32, device=scene.device)
    volume = torch.from_numpy(scene.density).to(scene.device)[None, None]
    weights = torch.from_numpy(scene.weights).to(scene.device)

    def render(view: torch.Tensor) -> torch.Tensor:
        return MILLIMETRES * drr(volume.expand(len(view), -1, -1, -1, -1), view, voxel_from_world, triton=True)

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return render(view)

    def pose_gradient() -> tuple[torch.Tensor, torch.Tensor]:
        pose = view.clone().requires_grad_()
        image = render(pose)
        (image[:, 0] * weights).sum().backward()
        return image, pose.grad

    return Contestant(
        tasks={
            "trilinear, 500 samples": {
                "forward": Task(forward, arrays=lambda image: {"image": image[:, 0].float().cpu().numpy()}),
                "pose_gradient": Task(
                    pose_gradient, arrays=lambda result: {"image": result[0][:, 0].detach().float().cpu().numpy()}
                ),
            }
        },
        versions={name: version(name) for name in ("flashdrr", "torch", "triton")},
        models={"trilinear, 500 samples": "trilinear"},
        synchronize=synchronize_on(scene.device),
        peak=peak_on(scene.device),
        notes={"trilinear, 500 samples": "Triton"},
    )


if __name__ == "__main__":
    serve(load)
