"Every kernel for GPUs, called in the ways that compile to different code."

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product

import torch

from diffdrr.kernels.gpu import frames, launch, siddon, trilinear
from diffdrr.kernels.request import Rays, Rule

SHAPE = (64, 60, 40)
METHODS = {
    "Siddon": (siddon, Rule("siddon")),
    "exact": (trilinear, Rule("trilinear")),
    "sampled": (trilinear, Rule("trilinear", 500)),
    "nearest": (trilinear, Rule("trilinear", 500, "nearest")),
}
TASKS = ("forward", "slopes", "channels", "gradient of channels", "adjoint", "adjoint of channels")
Call = Callable[[], object]


def scene(
    n_rays: int = 256,  # of a square picture, which is cut into tiles
    rays: torch.dtype = torch.float32,
    stored: torch.dtype = torch.float32,  # of the volume
) -> tuple[torch.Tensor, Rays]:
    "Make a volume of noise, and rays through it."
    random = torch.Generator().manual_seed(0)
    size = torch.tensor(SHAPE, dtype=rays)
    target = torch.rand(1, n_rays, 3, generator=random, dtype=rays) * size + size
    source = torch.rand(1, 1, 3, generator=random, dtype=rays) * -size
    volume = torch.rand(1, *SHAPE, generator=random).to(stored)
    return volume, Rays(source.expand_as(target), target, torch.ones(1, n_rays, dtype=rays))


def labels_of(volume: torch.Tensor, n_labels: int = 3) -> torch.Tensor:
    return (torch.arange(volume[0].numel()) // 7 % n_labels).view_as(volume).to(torch.uint8)


def call(
    method: str,  # a key of `METHODS`
    task: str,  # a member of `TASKS`
    volume: torch.Tensor,
    rays: Rays,
    **more,  # what the rule says besides
) -> object:
    "Start the kernel of a method for a task."
    module, rule = METHODS[method]
    rule = rule._replace(**more)
    if "channels" in task:
        rule = rule._replace(labels=labels_of(volume), n_labels=3)
    pictures = torch.ones(rays.shape[0], rule.n_labels, rays.shape[1], dtype=rays.target.dtype)
    if task == "slopes":
        return module.render_with_slopes(volume, rays, rule)
    if task == "gradient of channels":
        return module.ray_gradient(pictures, volume, rays, rule)
    if "adjoint" in task:
        return module.backproject(pictures, volume, rays, rule)
    return module.render(volume, rays, rule)


@contextmanager
def as_if_large() -> Iterator[None]:
    "Let kernels take offsets of 64 bits, as for volumes of more than 2**31 voxels."
    prepare = launch.prepare

    def for_large(*arguments, **options):
        started = prepare(*arguments, **options)
        return started._replace(arguments=started.arguments | dict(INDEX=launch.tl.int64))

    launch.prepare = for_large
    try:
        yield
    finally:
        launch.prepare = prepare


def large(method: str, task: str) -> object:
    with as_if_large():
        return call(method, task, *scene())


def frame_calls(dtype: torch.dtype) -> dict[str, Call]:
    "List the calls that make rays, and do something with their slopes."
    matrix, unit = torch.eye(4, dtype=dtype)[None], torch.ones(1, 1100, 3, dtype=dtype)
    scene = frames.Scene(unit[:, :1], unit, matrix, matrix, matrix)
    slopes, ends, pixel = Rays(unit[:, :1], unit, unit[..., 0]), (unit, unit), unit[..., :1].mT
    return {
        "rays": partial(frames.make_rays, scene),
        "slopes": partial(frames.sum_slopes, scene, slopes),
        "twists": partial(frames.twist_slopes, scene, ends),
        "twists of a frame": partial(frames.twist_slopes, scene, ends, matrix),
        "weights": partial(launch.weigh, pixel, pixel, pixel.expand(1, 6, -1), slopes, Rule("siddon")),
    }


def calls() -> dict[str, Call]:
    "List all calls, by what they are."
    found: dict[str, Call] = {}
    for dtype, ending in ((torch.float32, ""), (torch.float64, " float64")):
        found |= {f"frames {name}{ending}": call for name, call in frame_calls(dtype).items()}
    for method, task in product(METHODS, TASKS):
        found[f"{method} {task}"] = partial(call, method, task, *scene())
    for method, task in product(("Siddon", "exact", "sampled"), ("forward", "slopes", "adjoint")):
        found[f"{method} {task} 64-bit offsets"] = partial(large, method, task)
        for stored in (torch.float16, torch.bfloat16):
            found[f"{method} {task} {name_of(stored)}"] = partial(call, method, task, *scene(stored=stored))
        doubles = scene(rays=torch.float64, stored=torch.float64)
        found[f"{method} {task} float64"] = partial(call, method, task, *doubles)
    return found | odd_calls()


def odd_calls() -> dict[str, Call]:
    "List calls whose numbers or addresses might be compiled in: of one ray, of one sample, of an unaligned volume."
    volume, rays = scene()
    unaligned = torch.rand(volume.numel() + 1)[1:].view_as(volume)
    ends = torch.rand(*rays.shape, 2)
    return {
        "one ray": partial(call, "Siddon", "forward", *scene(1)),
        "one sample": partial(call, "sampled", "forward", volume, rays, n_points=1),
        "an unaligned volume": partial(call, "Siddon", "forward", unaligned, rays),
        "given ends of samples": partial(call, "sampled", "forward", volume, rays, alphas=ends),
        "rays finer than the volume": partial(call, "exact", "slopes", *scene(rays=torch.float64)),
        "a volume finer than the rays": partial(call, "exact", "slopes", *scene(stored=torch.float64)),
    }


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
