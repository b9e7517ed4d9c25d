"diffdrr of this repository, through its public interface."

from __future__ import annotations

import platform

import numpy as np
import torch
from protocol import Contestant, Scene, Task, serve
from torch_tasks import Pictures, bandwidth_of_card, peak_on, synchronize_on
from torchio import ScalarImage, Subject

import diffdrr
from diffdrr.geometry import RigidTransform, convert, orientation_matrix
from diffdrr.rendering import DRR

EULER = dict(parameterization="euler_angles", convention="ZXY")
METHODS = {  # renderer, arguments of its forward, what it integrates
    "Siddon": ("siddon", {}, "constant"),
    "trilinear, exact": ("trilinear", {"n_points": None}, "trilinear"),
    "trilinear, 500 samples": ("trilinear", {"n_points": 500}, "trilinear"),
}


class Method(Pictures):
    "One renderer, and everything that can be asked of it."

    def __init__(self, scene: Scene, subject: Subject, renderer: str, options: dict):
        backend = "triton" if scene.device == "cuda" else "auto"
        self.drr = DRR(
            subject,
            sdd=scene.sdd,
            height=scene.height,
            width=scene.width,
            delx=scene.delx,
            renderer=renderer,
            backend=backend,
        ).to(scene.device)
        self.options = options
        super().__init__(scene, lambda rotation, translation: self.drr(rotation, translation, **EULER, **options))

    def pose(self) -> RigidTransform:
        return convert(self.rotation, self.translation, **EULER)

    def line_integrals(self, density: torch.Tensor) -> torch.Tensor:  # (B, 1, N)
        return self.drr.render(density, *self.drr.detector(self.pose(), None), **self.options)

    def ready_for_volume_gradient(self) -> tuple[torch.Tensor, torch.Tensor]:
        density = self.drr.density.clone().requires_grad_()
        return self.line_integrals(density), density

    def volume_gradient(self, state: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        "Go back from the pixels to the voxels: the adjoint of the projection."
        image, density = state
        return torch.autograd.grad(image, density, self.weights.flatten(1)[:, None])[0]

    def adjoint_identity(self) -> dict[str, np.ndarray]:
        """Compare <Ax, y> with <x, A'y> for a random volume x and pixels y; the products are summed in float64.

        Count the voxels that rays meet, too."""
        volume = torch.rand(self.drr.density.shape, generator=torch.Generator().manual_seed(0)).to(self.drr.density)
        x, y = volume.requires_grad_(), self.weights.flatten(1)[:, None] + 2
        image = self.line_integrals(x)
        adjoint = torch.autograd.grad(image, x, y)[0]
        left, right = (image.detach().double() * y).sum(), (x.detach().double() * adjoint).sum()
        return {
            "error": ((left - right).abs() / left.abs()).cpu().numpy(),
            "touched": (adjoint != 0).sum().cpu().numpy(),
        }

    def one_by_one(self) -> list[torch.Tensor]:
        "Render the poses of the batch in a call each."
        with torch.no_grad():
            return [
                self.render(rotation[None], translation[None])
                for rotation, translation in zip(self.rotation, self.translation)
            ]

    def tasks(self) -> dict[str, Task]:
        def jacobian():
            return self.drr.jacobian(self.pose(), **self.options)

        return super().tasks() | {
            "jacobian": Task(
                jacobian, arrays=lambda result: dict(zip(("image", "jacobian"), (x.cpu().numpy() for x in result)))
            ),
            "volume_gradient": Task(self.volume_gradient, self.ready_for_volume_gradient, lambda gradient: {}),
            "adjoint_identity": Task(self.adjoint_identity, arrays=lambda result: result),
            "one_by_one": Task(self.one_by_one),
        }


def load(scene: Scene) -> Contestant:
    torch.set_num_threads(scene.threads)
    image = ScalarImage(tensor=torch.from_numpy(scene.density)[None], affine=scene.affine)
    subject = Subject(volume=image, density=image, mask=None, reorient=orientation_matrix("AP"))
    return Contestant(
        tasks={
            name: Method(scene, subject, renderer, options).tasks() for name, (renderer, options, _) in METHODS.items()
        },
        versions={"diffdrr": diffdrr.__version__, "torch": torch.__version__, "python": platform.python_version()},
        models={name: model for name, (_, _, model) in METHODS.items()},
        synchronize=synchronize_on(scene.device),
        peak=peak_on(scene.device),
        facts={"bandwidth": bandwidth_of_card()} if scene.device == "cuda" else {},
    )


if __name__ == "__main__":
    serve(load)
