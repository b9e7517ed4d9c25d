"The call of each row: of the kernel alone, of the whole `DRR`, and how wrong it is."

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from diffdrr.geometry import RigidTransform, twist_to_matrix
from diffdrr.kernels import reference
from diffdrr.kernels.gpu import siddon, trilinear

from .scenes import N_LABELS, Case, make_drr, make_pose, make_rays

MODULES = {"siddon": siddon, "trilinear": trilinear}
N_RAYS = 200  # that the error is found on


class Setting:
    "What the calls of a row share."

    def __init__(self, case: Case, volume: torch.Tensor, backend: str = "auto"):
        self.case, self.drr = case, make_drr(case, volume, backend)
        self.pose = make_pose(case, volume.device)
        self.rays = make_rays(self.drr, self.pose)
        self.voxels, self.module = self.drr.density[None], MODULES[case.rule.method]
        self.rule = case.rule
        if case.task == "labels":
            self.rule = self.rule._replace(labels=self.drr.labels[None], n_labels=N_LABELS)
        random = torch.Generator(volume.device).manual_seed(1)
        shape = (case.picture.batch, 1, case.picture.height, case.picture.width)
        self.weights = torch.rand(shape, generator=random, device=volume.device, dtype=case.precision)

    def kernel(self) -> object:
        "Call the kernel, with what lays its arguments out."
        if self.case.task in ("pose gradient", "Jacobian"):
            return self.module.render_with_slopes(self.voxels, self.rays, self.rule)
        if self.case.task == "volume gradient":
            return self.module.backproject(self.weights.flatten(2), self.voxels, self.rays, self.rule)
        return self.module.render(self.voxels, self.rays, self.rule)

    def whole(self) -> object:
        "Call what users call, from the pose on."
        drr, options = self.drr, self.case.options
        if self.case.task == "pose gradient":
            return self.slopes(partial(drr, **options))
        if self.case.task == "Jacobian":
            return drr.jacobian(self.pose, **options)
        if self.case.task == "volume gradient":
            density = drr.density.detach().requires_grad_()
            image = drr.render(density, *drr.detector(self.pose), **options)
            return torch.autograd.grad(image, density, self.weights.flatten(2))[0]
        with torch.no_grad():
            return drr(self.pose, mask_to_channels=self.case.task == "labels", **options)

    def slopes(self, render: Callable[[RigidTransform], torch.Tensor]) -> torch.Tensor:  # (B, 6)
        "Differentiate pictures by a small motion of the camera."
        twist = self.weights.new_zeros(self.case.picture.batch, 6).requires_grad_()
        image = render(self.pose.compose(RigidTransform(twist_to_matrix(twist))))
        return torch.autograd.grad(image, twist, self.weights)[0]

    def captured(self) -> Callable[[], torch.Tensor]:
        "Capture the picture, or the picture and its gradient; what comes before it, as a small motion, is not."
        gradient = self.case.task == "pose gradient"
        render = self.drr.capture(self.pose, gradient=gradient, **self.case.options)
        return partial(self.slopes, render) if gradient else partial(render, self.pose)

    def error(self) -> float:
        "Compare with the reference in float64, on rays drawn at random, in the L2 norm."
        if self.case.task == "Jacobian":
            double = Setting(self.case._replace(bits=64), self.drr.density, self.drr.renderer.backend)
            return relative(self.whole()[1], double.whole()[1])
        if self.case.task == "volume gradient":
            image, pictures = self.module.render(self.voxels, self.rays, self.rule), self.weights.flatten(2)
            forward = (image.double() * pictures.double()).sum()
            return abs(((self.kernel().double() * self.voxels.double()).sum() / forward).item() - 1)
        which = torch.randperm(self.rays.shape[1], generator=torch.Generator().manual_seed(2))[:N_RAYS]
        rays = self.rays.picture(0).some(which.to(self.voxels.device)).map(torch.Tensor.double)
        voxels, found = self.voxels.double(), self.kernel()
        if self.case.task != "pose gradient":
            return relative(found[:1, :, which], reference.render(voxels, rays, self.rule))
        rays = rays.map(lambda x: x.contiguous().requires_grad_())
        truth = torch.autograd.grad(reference.render(voxels, rays, self.rule).sum(), rays[:2])
        return relative(found[1][:1, :, which].mT, torch.cat(truth, dim=-1))


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()
