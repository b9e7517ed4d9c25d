"Tasks that all contestants written in PyTorch share."

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from protocol import Scene, Task, peak_of_process


class Pictures:
    """A differentiable camera: a function of rotations and translations, (B, 3) each, that returns pictures (B, 1, H,
    W)."""

    def __init__(
        self, scene: Scene, render: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], degrees: bool = False
    ):
        rotation = np.rad2deg(scene.rotation) if degrees else scene.rotation
        self.render, self.unit = render, 180 / np.pi if degrees else 1.0
        self.rotation, self.translation = (
            torch.tensor(x, dtype=torch.float32, device=scene.device) for x in (rotation, scene.translation)
        )
        self.weights = torch.from_numpy(scene.weights).to(scene.device)

    def forward(self) -> torch.Tensor:
        with torch.no_grad():
            return self.render(self.rotation, self.translation)

    def pose_gradient(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        "Render, and take the gradient of a weighted sum of the pixels."
        rotation, translation = (x.clone().requires_grad_() for x in (self.rotation, self.translation))
        image = self.render(rotation, translation)
        (image[:, 0] * self.weights).sum().backward()
        return image, rotation.grad * self.unit, translation.grad

    def tasks(self) -> dict[str, Task]:
        return {
            "forward": Task(self.forward, arrays=lambda image: {"image": image[:, 0].float().cpu().numpy()}),
            "pose_gradient": Task(
                self.pose_gradient,
                arrays=lambda result: dict(
                    zip(("image", "rotation", "translation"), (x.detach().float().cpu().numpy() for x in result))
                ),
            ),
        }


def synchronize_on(device: str) -> Callable[[], None]:
    "Return what waits until the device has finished."
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def peak_on(device: str) -> Callable[[Callable[[], object]], int]:
    "Return the gauge of the memory that a run takes beyond what is there."
    return peak_of_card if device == "cuda" else peak_of_process


def peak_of_card(run: Callable[[], object]) -> int:  # bytes
    "Measure how much more memory PyTorch holds on the card at most during a run."
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def bandwidth_of_card() -> float:  # bytes per second
    "Measure how fast the card reads and writes: the best of several copies of 1 GiB."
    source = torch.empty(2**28, dtype=torch.float32, device="cuda").normal_()
    target, times = torch.empty_like(source), []
    for _ in range(10):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return 2 * source.numel() * source.element_size() / min(times)
