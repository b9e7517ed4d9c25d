"""How long a kernel should take on a card: the largest of what its instructions, its caches and its memory need.

Instructions are those of the compiled code (`tools/gpu/costs.csv`); traffic is that of the rays (`traffic.py`). A
multiprocessor issues four instructions of a warp in a cycle, two for each of the ALU and the multiplier of whole
numbers, and a sixteenth of a warp for conversions. Programs that are resident hide the latency of one another.

The model was calibrated on one measurement of another package: nanodrr's own benchmark on an RTX 6000 Ada says 69 to
78 microseconds for its kernel and small ones around it; the model says what `anchor` returns. All numbers for views
that are not frontal lean on the assumption about L1, which that measurement does not test."""

from __future__ import annotations

import csv
import math
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .traffic import Rays, Traffic, tiles_of, traffic, walk_cells, walk_samples, walk_voxels

COSTS = Path(__file__).parents[2] / "tools" / "gpu" / "costs.csv"
EFFICIENCY = 0.95  # of the busiest unit
LAUNCH = 2.0  # microseconds
BEGIN = 1500  # cycles before the loop of a program that has a multiprocessor to itself
PROGRAMS, SHORTEST_PART, ROWS = 2048, 16, 16  # as in diffdrr.kernels.gpu.launch


class Card(NamedTuple):
    "A kind of GPU. Bandwidths are reached ones, or 0.85 to 0.95 of what the vendor names."

    name: str
    sms: int  # multiprocessors
    ghz: float  # under load
    arch: int  # compute capability times ten, as in the table of costs
    l2: float  # TB/s
    dram: float  # TB/s
    l2_mb: float  # of a volume, that stays in L2 from picture to picture
    warps: int  # on a multiprocessor
    latency: int  # of L2, cycles


CARDS = (
    Card("A100", 108, 1.30, 80, 4.0, 1.35, 32, 64, 270),
    Card("H100", 132, 1.70, 90, 5.5, 2.9, 40, 64, 270),
    Card("H200", 132, 1.70, 90, 5.5, 4.3, 45, 64, 270),
    Card("L40S", 142, 2.50, 89, 4.5, 0.78, 88, 48, 300),
    Card("RTX 4090", 128, 2.70, 89, 4.5, 0.95, 65, 48, 300),
    Card("RTX 6000 Ada", 142, 2.70, 89, 4.5, 0.91, 88, 48, 300),
    Card("RTX 5070 Ti", 70, 2.70, 120, 2.8, 0.85, 44, 48, 330),
    Card("RTX 5090", 170, 2.60, 120, 5.5, 1.6, 88, 48, 330),
)


class Code(NamedTuple):
    "A compiled kernel: instructions of a turn of its loop, by unit, and around it."

    registers: int
    before: int
    loop: int
    after: int
    alu: int
    heavy: int
    xu: int
    steps: int  # of a ray, in a turn
    spare: int  # steps that are walked for rounding


STEPS = {"Siddon": (4, 2), "exact": (2, 6), "sampled": (1, 0)}
WALKS = {"Siddon": walk_voxels, "exact": walk_cells, "sampled": walk_samples}
NANODRR = Code(39, 271, 94, 5, 42, 6, 6, 1, 0)  # nanodrr 0.1.7 for sm_89, forward, counted by `tools.gpu.sass`


@cache
def codes() -> dict[tuple[int, str], Code]:  # by architecture and call
    "Read what the kernels cost."
    found = {}
    with COSTS.open(newline="") as file:
        for row in csv.DictReader(file):
            method, _, task = row["call"].partition(" ")
            if method in STEPS:
                steps, spare = STEPS[method]
                steps = 1 if method == "exact" and "adjoint" in task else steps
                counts = (int(row[name]) for name in ("registers", "before", "loop", "after", "alu", "heavy", "xu"))
                found[int(row["arch"]), row["call"]] = Code(*counts, steps, spare)
    return found


class Picture(NamedTuple):
    "What is rendered: the picture of the README by default."

    view: str = "frontal"
    height: int = 200
    width: int = 200
    batch: int = 1
    shape: tuple[int, int, int] = (512, 512, 133)
    spacing: tuple[float, float, float] = (0.7, 0.7, 2.5)  # mm
    sdd: float = 1020.0  # mm
    sod: float = 850.0  # source to the middle of the volume, mm
    side: float = 400.0  # of the detector, the longer one, mm


VIEWS = {"frontal": (0.0, 0.0, 0.0), "oblique": (0.6, 0.35, 0.1), "axial": (0.0, math.pi / 2, 0.0)}


def turned(angles: tuple[float, float, float]) -> np.ndarray:  # (3, 3)
    "Turn about y, then about x, then about z (Euler angles ZXY)."
    (cz, cx, cy), (sz, sx, sy) = np.cos(angles), np.sin(angles)
    about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
    about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
    return about_z @ about_x @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])


def rays_of(picture: Picture) -> Rays:
    "Make the rays of a view that looks along -y before it is turned."
    pitch = picture.side / max(picture.height, picture.width)
    row, column = np.indices((picture.height, picture.width)).reshape(2, -1)
    x = (picture.width / 2 - 0.5 - column) * pitch
    z = (picture.height / 2 - 0.5 - row) * pitch
    target = np.stack([x, np.full(x.shape, picture.sod - picture.sdd), z], axis=-1)
    rotation, spacing = turned(VIEWS[picture.view]), np.array(picture.spacing)
    centre = (np.array(picture.shape) - 1) / 2
    source = rotation @ np.array([0.0, picture.sod, 0.0]) / spacing + centre
    return Rays(source, target @ rotation.T / spacing + centre, picture.shape)


@lru_cache(maxsize=256)
def traffic_of(picture: Picture, method: str, n_bytes: int, rows: int) -> Traffic:
    "Walk the rays of a picture."
    tiles = tiles_of(picture.height, picture.width, rows)
    across = -(-picture.width // (128 // rows))
    return traffic(WALKS[method], rays_of(picture), tiles, across, n_bytes)


class Prediction(NamedTuple):
    "Times in microseconds, and what they come from."

    total: float
    limit: str  # what limits it
    instructions: float
    alu: float
    l1: float
    l2: float
    dram: float
    bytes: float  # of the volume, each sector once


def count_programs(picture: Picture, rows: int) -> tuple[int, int]:  # tiles of all pictures, and parts of each ray
    tiles = picture.batch * -(-picture.height // rows) * -(-picture.width // (128 // rows))
    return tiles, max(1, min(PROGRAMS // tiles, max(picture.shape) // SHORTEST_PART))


def rows_of(picture: Picture) -> int:
    "Say how many rows the tiles of the kernels have: one in pictures smaller than a tile."
    return ROWS if picture.height >= ROWS and picture.width >= 128 // ROWS else 1


def combine(card: Card, code: Code, flow: Traffic, programs: tuple[int, int], warm: bool) -> Prediction:
    "Find what limits a kernel."
    tiles, parts = programs
    turns = np.floor((flow.steps / parts + code.spare) / code.steps) + 1
    units = {  # cycles of a multiprocessor for a turn of a warp
        "instructions": code.loop / 4,
        "alu": max(code.alu, code.heavy) / 2,
        "conversions": 2 * code.xu,
        "l1": flow.l1_cycles * code.steps,
    }
    limit = max(units, key=units.get)
    around = (code.before + code.after) / 4
    work = 4 * (turns * units[limit] + around)  # of a program of four warps
    alone = BEGIN + turns * (1.1 * code.loop + card.latency + 60)
    resident = min(65536 // (-(-code.registers // 8) * 8 * 128), card.warps // 4)
    resident = max(1, min(resident, math.ceil(tiles * parts / card.sms)))
    each = np.maximum(work, alone / resident)
    cycles = max(each.mean() * tiles * parts / card.sms + (alone.mean() - each.mean()) / 2, alone.max())
    microseconds = 1 / (1e3 * card.ghz)
    missing = flow.dram_bytes if not warm else max(0.0, flow.dram_bytes - 1e6 * card.l2_mb)
    l2, dram = flow.l2_bytes / card.l2 / 1e6, missing / card.dram / 1e6
    busy = cycles * microseconds / EFFICIENCY
    per_turn = 4 * turns.mean() * tiles * parts / card.sms * microseconds
    total = max(busy, l2, dram)
    limit = {busy: limit, l2: "L2", dram: "memory"}[total]
    times = (per_turn * units["instructions"], per_turn * units["alu"], per_turn * units["l1"], l2, dram)
    return Prediction(total + LAUNCH, limit, *times, flow.dram_bytes)


def predict(
    card: Card,
    method: str,  # "Siddon", "exact" or "sampled"
    task: str = "forward",  # or "slopes": the picture and its derivatives
    picture: Picture | None = None,
    bits: int = 32,  # of a voxel: 16 or 32
    warm: bool = True,  # whether a picture of the same volume came before
) -> Prediction:
    "Predict the time of a kernel."
    picture = picture or Picture()
    rows = rows_of(picture)
    flow = traffic_of(picture._replace(batch=1), method, bits // 8, rows)
    flow = flow._replace(l2_bytes=flow.l2_bytes * picture.batch)
    code = codes()[card.arch, f"{method} {task}" + (" bfloat16" if bits == 16 else "")]
    return combine(card, code, flow, count_programs(picture, rows), warm)


HOST = 20.0  # microseconds of the host for a launch, Python included; within 40 %
BETWEEN = 2.0  # microseconds from one kernel to the next in a captured graph
# How many kernels a call launches, of torch and of this package: counted by tests/test_gpu_waits.py, which fails when
# there are more. Raise a number only with a reason.
LAUNCHES = {
    "pose": (3, 2),
    "Euler angles": (17, 2),
    "channels": (3, 2),
    "Jacobian": (19, 4),
    "Euler angles and gradient": (43, 4),
}

# What is left of them around a captured call: inputs are copied in, graphs are started, and what comes out is copied.
AROUND = {"pose": 3, "Euler angles": 4, "Euler angles and gradient": 8}


def call(
    kernel: float,  # microseconds
    launches: str,  # a key of `LAUNCHES`
    captured: bool = False,  # by `DRR.capture`; a key of `AROUND`
) -> float:  # microseconds
    "Predict a whole call: the host launches while the GPU works, and the slower of both is waited for."
    count = sum(LAUNCHES[launches])
    if not captured:
        return max(HOST * count, kernel)
    return max(HOST * AROUND[launches], kernel + BETWEEN * (count + AROUND[launches]))


def anchor() -> float:  # microseconds
    "Predict what nanodrr measured: 500 samples of rays in tiles of 2 x 16 for a warp, x fastest, each ray in 8 parts."
    picture = Picture()
    tiles = nanodrr_tiles(picture.height, picture.width)
    walk = partial(walk_samples, x_first=True)
    flow = traffic(walk, rays_of(picture), tiles, -(-picture.width // 16), 4)
    (card,) = (card for card in CARDS if card.name == "RTX 6000 Ada")
    return combine(card, NANODRR, flow, (len(tiles), 8), True).total


def nanodrr_tiles(height: int, width: int) -> np.ndarray:  # (P, 4, 32)
    "Say which pixel each lane of nanodrr has."
    across, lane = -(-width // 16), np.arange(128)
    tile = np.arange(across * -(-height // 8))[:, None]
    row, column = tile // across * 8 + lane // 16, tile % across * 16 + lane % 16
    return np.where((row < height) & (column < width), row * width + column, -1).reshape(-1, 4, 32)
