"What a GPU must show before its times mean anything."

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from ..machine import ROOT
from . import clock
from .calls import Setting
from .model import Picture
from .scenes import METHODS, TASKS, Case, make_volume
from .table import CAPTURED, FEW, TINY

LARGEST_ERROR = 1e-4  # of float32


class Skipped(Exception):
    "A check that cannot be made here; the message says why."


def need_card() -> None:
    if not torch.cuda.is_available():
        raise Skipped("there is no card")


def run(command: list[str], seconds: float, **settings: str) -> str:
    "Run a program, and return what it printed. Raises a `RuntimeError` with the end of it if it fails."
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | settings
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds
    )
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}: ...{done.stdout[-2000:]}")
    return done.stdout


def suite(device: str) -> str:
    "Run the tests of the kernels, on the GPU. They need pytest, and no other file of the tests."
    only = [] if device == "cuda" else ["-k", "test_poison"]
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "tests/test_triton.py"]
    return re.findall(r"\d+ passed.*", run([*command, *only], 200))[-1]


def small(device: str) -> str:
    "Do everything once, in a small scene, and compare with the reference."
    volume, faults, worst = make_volume(TINY["shape"], device), [], 0.0
    for method in METHODS:
        for task in TASKS:
            setting = Setting(Case(method, task, 32, Picture("oblique", 9, 12, 2, **TINY), FEW), volume, "triton")
            setting.whole()
            error = setting.error()
            worst = max(worst, error)
            if not error < LARGEST_ERROR:
                faults.append(f"{method}, {task}: {error:.1e}")
    if faults:
        raise RuntimeError("errors are too large: " + "; ".join(faults))
    return f"the largest error is {worst:.1e}"


def sanitizer(device: str) -> str:
    "Look for accesses outside of tensors, in the small scene."
    need_card()
    program = shutil.which("compute-sanitizer")
    if program is None:
        raise Skipped("compute-sanitizer is not on the PATH")
    checked = [sys.executable, "-m", "benchmarks.gpu", "--only", "small"]
    text = run(
        [program, "--tool", "memcheck", "--error-exitcode", "9", *checked], 120, PYTORCH_NO_CUDA_MEMORY_CACHING="1"
    )
    return re.findall(r"ERROR SUMMARY: .*", text)[-1]


def setting_of(task: str, device: str, method: str = "Siddon") -> Setting:
    "Make the picture of the README."
    picture = Picture()
    return Setting(Case(method, task, 32, picture), make_volume(picture.shape, device), "triton")


def graph(device: str) -> str:
    "Capture whole calls, from the pose to the gradient, and replay them."
    need_card()
    lines = []
    for task in TASKS:
        setting = setting_of(task, device)
        eager, captured = clock.on_host(setting.whole, device), clock.on_gpu(setting.whole)
        lines.append(f"{task}: {1e6 * eager:.0f} us one after the other, {1e6 * captured:.0f} us captured")
    return "; ".join(lines)


def replay(device: str) -> str:
    "Replay a captured call with another pose: the picture must follow."
    need_card()
    setting, image = setting_of("forward", device), []

    def act() -> None:
        image[:] = [setting.whole()]

    captured, matrix = clock.capture(act), setting.pose.matrix
    held = image[0]
    matrix[:, :3, 3] += 20.0
    captured.replay()
    again = setting.whole()
    if not torch.equal(held, again):
        raise RuntimeError(f"the replay differs by {(held - again).abs().max().item():.1e}")
    return "the same picture"


def capture(device: str) -> str:
    "Capture pictures and gradients by `DRR.capture`, and compare them with those of the DRR."
    need_card()
    for method in METHODS:
        for task in CAPTURED:
            setting = setting_of(task, device, method)
            captured, matrix = setting.captured(), setting.pose.matrix
            matrix[:, :3, 3] += 20.0
            ours, theirs = captured(), setting.whole()
            if not torch.allclose(ours, theirs, rtol=0, atol=1e-6 * theirs.abs().max().item()):
                raise RuntimeError(f"{method}, {task}: they differ by {(ours - theirs).abs().max().item():.1e}")
    return f"the same in {len(METHODS) * len(CAPTURED)} calls"


def waits(device: str) -> str:
    "Let torch raise an error where the host waits."
    need_card()
    settings = [setting_of(task, device, method) for method in METHODS for task in TASKS]
    for setting in settings:
        setting.whole()  # compiles, and looks labels up
    faults = []
    torch.cuda.set_sync_debug_mode("error")
    try:
        for setting in settings:
            try:
                setting.whole()
            except RuntimeError as error:
                faults.append(f"{setting.case.method}, {setting.case.task}: {str(error).splitlines()[0]}")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if faults:
        raise RuntimeError("; ".join(faults))
    return f"none in {len(settings)} calls"


def stream(device: str) -> str:
    "Render on a second stream what a slow program there makes."
    need_card()
    setting = setting_of("forward", device)
    truth = 2 * setting.whole()
    volume, side = setting.drr.density, torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(50_000_000)
        setting.drr.density = volume * 2
        image = setting.whole()
    side.synchronize()
    if not torch.allclose(image, truth, rtol=1e-5):
        raise RuntimeError(f"pictures differ by {(image - truth).abs().max().item():.1e}")
    return "the same picture"


def second_card(device: str) -> str:
    "Render on a card that is not the current one."
    need_card()
    if torch.cuda.device_count() < 2:
        raise Skipped("there is one card")
    picture = Picture()
    images = [
        Setting(Case("Siddon", "forward", 32, picture), make_volume(picture.shape, "cuda:0").to(card), "triton").whole()
        for card in ("cuda:0", "cuda:1")
    ]
    if not torch.equal(images[0].cpu(), images[1].cpu()):
        raise RuntimeError("the pictures differ")
    return "the same picture"


CHECKS: dict[str, Callable[[str], str]] = {
    "suite": suite,
    "small": small,
    "sanitizer": sanitizer,
    "waits": waits,
    "replay": replay,
    "capture": capture,
    "stream": stream,
    "second_card": second_card,
    "graph": graph,
}


def make(name: str, device: str) -> dict[str, str | float]:
    "Make a check: what came of it, in words, and how long it took."
    start = time.monotonic()
    try:
        outcome, text = "passed", CHECKS[name](device)
    except Skipped as reason:
        outcome, text = "skipped", str(reason)
    except Exception as error:  # one that fails must not keep the others from being made
        outcome, text = "FAILED", f"{type(error).__name__}: {error}"
    about = CHECKS[name].__doc__.rstrip(".")
    return dict(check=name, what=about, outcome=outcome, text=text, seconds=time.monotonic() - start)
