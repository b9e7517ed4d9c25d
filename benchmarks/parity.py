"""Before anything is timed: do our backends compute what the reference computes?

A fast wrong picture is worth nothing, so the benchmark ends here when a value or a gradient is off.
"""

from __future__ import annotations

import torch

from diffdrr.kernels import Rays, Rule, reference
from diffdrr.rendering import Siddon, Trilinear

TOLERANCE = (
    1e-4  # relative, in the L2 norm: float32 rounds crossings to about 1e-6 of a ray, which is 1e-4 of a voxel's side
)
SHAPE = (13, 11, 9)
CASES = {
    "Siddon": (Siddon, {}, Rule("siddon")),
    "trilinear, exact": (Trilinear, {"n_points": None}, Rule("trilinear")),
    "trilinear, 500 samples": (Trilinear, {"n_points": 500}, Rule("trilinear", 500)),
}


def make_inputs() -> dict[str, torch.Tensor]:
    "Make a volume with holes, and rays through it from two sources, in float64."
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.rand(*size, generator=generator, dtype=torch.float64)

    size = torch.tensor(SHAPE, dtype=torch.float64)
    volume = random(*SHAPE) * (random(*SHAPE) > 0.3)
    source = torch.tensor([[[-20.0, 3.3, 2.2]], [[4.1, 30.7, -9.4]]], dtype=torch.float64)
    target = 2 * (random(2, 64, 3) * (size - 1)) - source  # through points of the volume, and as far beyond
    length = 0.7 * (target - source).norm(dim=-1)
    return {"volume": volume, "source": source, "target": target, "length": length}


def value_and_gradients(
    render,  # a function of volume, source, target and length
    inputs: dict[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    "Render, and differentiate a weighted sum of the pixels with respect to every input."
    leaves = [x.clone().requires_grad_() for x in inputs.values()]
    image = render(*leaves)
    weights = torch.linspace(-1, 2, image.numel(), dtype=image.dtype, device=image.device).view_as(image)
    return {"value": image.detach(), **dict(zip(inputs, torch.autograd.grad((image * weights).sum(), leaves)))}


def faults(
    device: str,  # "cpu" or "cuda"
) -> list[str]:  # one line for each disagreement
    "Compare every method that is timed with the reference in float64."
    found, inputs = [], make_inputs()
    backend = "triton" if device == "cuda" else "auto"
    for name, (renderer, options, rule) in CASES.items():
        module = renderer(backend=backend)

        def specify(volume, source, target, length):
            return reference.render(volume[None], Rays(source, target, length), rule)

        def render(volume, source, target, length):
            return module(volume, source, target, length[:, None], **options)

        expected = value_and_gradients(specify, inputs)
        try:
            computed = value_and_gradients(render, {k: x.to(device, torch.float32) for k, x in inputs.items()})
        except Exception as error:  # whatever stops a backend is the reason to report
            found.append(f"{name} on {device}: {type(error).__name__}: {error}")
            continue
        for what, truth in expected.items():
            error = ((computed[what].cpu().double() - truth).norm() / truth.norm()).item()
            if not error <= TOLERANCE:
                found.append(f"{name} on {device}: {what} is off by {error:.1e}, more than {TOLERANCE:.0e}")
    return found
