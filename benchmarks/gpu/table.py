"The rows: what is measured of each, and beside it what the model says."

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import product

import torch

from . import clock
from .calls import Setting
from .model import CARDS, Card, Picture, predict
from .scenes import METHODS, TASKS, Case, make_volume

SIDES = (64, 128, 200, 512, 1024, 2048)
OBLONG = ((200, 201), (384, 512), (1536, 1024))
TINY = dict(shape=(7, 6, 5), spacing=(30.0, 30.0, 30.0))
FEW = 12  # samples there: none lies in a face of a voxel, where rounding would decide
CAPTURED = ("forward", "pose gradient")
KERNEL_TASK = {"forward": "forward", "pose gradient": "slopes", "Jacobian": "slopes"}


@dataclass
class Row:
    "What was measured. Times are in microseconds."

    method: str
    bits: int
    task: str
    view: str
    height: int
    width: int
    batch: int
    kernel: float | None = None  # the kernel and what lays its arguments out, without launches
    call: float | None = None  # the whole call from the pose on, one after the other
    captured: float | None = None  # the same by `DRR.capture`
    predicted: float | None = None  # the kernel
    limit: str = ""  # what limits it, by the model
    bandwidth: float | None = None  # of the card's, if each sector of the volume came from memory once
    error: float | None = None
    fault: str = ""


def cases(tiny: bool) -> Iterator[Case]:
    "List the rows: the picture of the README in every way, then one thing after the other changes."
    if tiny:
        for method, task in product(METHODS, TASKS):
            yield Case(method, task, 32, Picture(height=8, width=8, **TINY), FEW)
        yield Case("Siddon", "forward", 16, Picture("oblique", 5, 9, 2, **TINY))
        return
    for method, view, task, bits in product(METHODS, ("frontal", "oblique", "axial"), TASKS, (32, 16)):
        yield Case(method, task, bits, Picture(view))
    for side, method, view, task in product(SIDES, METHODS, ("frontal", "oblique"), TASKS[:2]):
        if side != 200:
            yield Case(method, task, 32, Picture(view, side, side))
    for (height, width), method, task in product(OBLONG, METHODS, TASKS[:2]):
        yield Case(method, task, 32, Picture("frontal", height, width))
    for batch, method, task in product((4, 16), METHODS, TASKS[:2]):
        yield Case(method, task, 32, Picture("frontal", batch=batch))


def this_card() -> Card | None:
    "Find the card in the table of the model."
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((card for card in CARDS if card.name in name), None)


def compare(row: Row, case: Case, card: Card | None, bytes_per_second: float | None) -> None:
    "Put what the model says beside a measurement."
    if card is None or case.task not in KERNEL_TASK or case.bits not in (16, 32):
        return
    said = predict(card, case.method, KERNEL_TASK[case.task], case.picture, case.bits)
    row.predicted, row.limit = said.total, said.limit
    if row.kernel and bytes_per_second:
        row.bandwidth = said.bytes / (row.kernel * 1e-6) / bytes_per_second


def measure(case: Case, volume: torch.Tensor, card: Card | None, bytes_per_second: float | None) -> Row:
    "Measure a row. What fails is written into it."
    picture, device = case.picture, volume.device.type
    row = Row(case.method, case.bits, case.task, picture.view, picture.height, picture.width, picture.batch)

    def attempt(name: str, act: Callable[[], float]) -> None:
        try:
            setattr(row, name, act())
        except Exception as error:  # the other columns, and the other rows, are of interest still
            row.fault += f"{name}: {type(error).__name__}: {str(error).splitlines()[:1]} "

    try:
        setting = Setting(case, volume, "triton")
    except Exception as error:
        row.fault = f"{type(error).__name__}: {error}"
        return row
    attempt("error", setting.error)
    if device == "cuda":
        attempt("kernel", lambda: 1e6 * clock.on_gpu(setting.kernel))
    attempt("call", lambda: 1e6 * clock.on_host(setting.whole, device))
    if device == "cuda" and case.task in CAPTURED:
        attempt("captured", lambda: 1e6 * clock.on_host(setting.captured(), device))
    compare(row, case, card, bytes_per_second)
    return row


def run(device: str, tiny: bool, until: float) -> tuple[list[dict], int]:  # rows, and how many there was no time for
    "Measure rows as long as there is time."
    volume, chosen, rows = None, list(cases(tiny)), []
    card, bytes_per_second = this_card(), clock.bandwidth() if device == "cuda" else None
    for case in chosen:
        if time.monotonic() > until:
            break
        if volume is None or tuple(volume.shape) != case.picture.shape:
            volume = make_volume(case.picture.shape, device)
        rows.append(asdict(measure(case, volume, card, bytes_per_second)))
    return rows, len(chosen) - len(rows)
