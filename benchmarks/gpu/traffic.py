"""Which voxels the lanes of a GPU read: the rays of a picture are walked as the kernels walk them, and the addresses of
each load are counted as the caches see them.

A cache line has 128 bytes in four sectors of 32, which are what L1 asks of L2. An L1 looks 4 lines up in a cycle, in four
sets, and serves 32 banks of 4 bytes (NVIDIA's forum, threads 49571 and 312884): a load takes the larger number of
cycles."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

SAMPLE = 24  # programs that are walked
SQUARE = 6  # and neighbours, in each direction
WARP = 32
Loads = tuple[np.ndarray, np.ndarray]  # numbers of voxels (loads, P, 4, 32), -1 for none; and which lanes go on


class Rays(NamedTuple):
    "The rays of one picture, in voxel coordinates."

    source: np.ndarray  # (3,)
    target: np.ndarray  # (N, 3)
    shape: tuple[int, int, int]  # of the volume


class Traffic(NamedTuple):
    "What a step of a warp costs, on average, and what all programs read."

    steps: np.ndarray  # (P,) of some programs, each of its longest lane
    l1_cycles: float  # of a step of a warp
    l2_bytes: float  # distinct sectors of each program, of a whole picture
    dram_bytes: float  # distinct sectors of the whole picture


def tiles_of(
    height: int,
    width: int,
    rows: int,  # of a tile, which has 128 pixels
) -> np.ndarray:  # (P, 4, 32) numbers of pixels, -1 outside of the picture
    "Say which pixel each lane has: a warp is a column of its tile, `rows` high."
    columns, lane = 128 // rows, np.arange(128)
    across = -(-width // columns)
    tile = np.arange(across * -(-height // rows))[:, None]
    row = tile // across * rows + lane % WARP // (WARP // rows)
    column = tile % across * columns + lane // WARP * (WARP // rows) + lane % (WARP // rows)
    return np.where((row < height) & (column < width), row * width + column, -1).reshape(-1, 4, WARP)


def clip(
    source: np.ndarray,
    direction: np.ndarray,  # (..., 3), nowhere 0
    lower: float | np.ndarray,
    upper: float | np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:  # where rays enter and leave a box
    first, last = (lower - source) / direction, (upper - source) / direction
    enter = np.maximum(np.minimum(first, last).max(axis=-1), 0)
    return enter, np.maximum(np.minimum(np.maximum(first, last).min(axis=-1), 1), enter)


def directions(rays: Rays, pixels: np.ndarray) -> np.ndarray:
    "Return where rays go; nowhere exactly along a plane."
    direction = rays.target[np.maximum(pixels, 0)] - rays.source
    return np.where(direction == 0, 1e-30, direction)


def walk_voxels(rays: Rays, pixels: np.ndarray) -> Iterator[Loads]:
    "Go from slab to slab along the main axis, as Siddon's kernel: a slab has up to three voxels."
    direction, shape = directions(rays, pixels), np.array(rays.shape)
    enter, leave = clip(rays.source, direction, -0.5, shape - 0.5)
    leave = np.where(pixels >= 0, leave, enter)
    order = (np.abs(direction).argmax(axis=-1)[..., None] + np.arange(3)) % 3
    d = np.take_along_axis(direction, order, axis=-1)
    s, n = rays.source[order], shape[order]
    stride = np.array([shape[1] * shape[2], shape[2], 1])[order]
    step = np.where(d > 0, 1, -1)
    voxel = np.clip(np.floor(s + enter[..., None] * d + 0.5).astype(np.int64), 0, n - 1)
    plane = voxel - 0.5 + (d > 0)
    a, offset = enter, (voxel * stride).sum(axis=-1)
    while (goes := a < leave).any():
        at = (plane - s) / d
        after = np.maximum(np.minimum(at[..., 0], leave), a)
        crosses = goes[..., None] & (at[..., 1:] < after[..., None])
        jump = stride * step
        middle = offset + np.where(at[..., 1] <= at[..., 2], jump[..., 1], jump[..., 2])
        last = offset + (crosses * jump[..., 1:]).sum(axis=-1)
        some, both = crosses.any(axis=-1), crosses.all(axis=-1)
        yield np.stack([np.where(goes, offset, -1), np.where(some, middle, -1), np.where(both, last, -1)]), goes
        plane += np.concatenate([np.ones_like(goes)[..., None], crosses], axis=-1) * step
        a, offset = after, last + jump[..., 0]


def corners(cell: np.ndarray, goes: np.ndarray, shape: np.ndarray, x_first: bool = False) -> np.ndarray:
    "Number the eight centres around points; where z is not the fastest axis but x, as in other packages."
    corner = cell + np.array([[i >> 2 & 1, i >> 1 & 1, i & 1] for i in range(8)])[:, None, None, None]
    inside = goes & ((corner >= 0) & (corner < shape)).all(axis=-1)
    x, y, z = np.moveaxis(corner, -1, 0)
    number = (z * shape[1] + y) * shape[0] + x if x_first else (x * shape[1] + y) * shape[2] + z
    return np.where(inside, number, -1)


def walk_cells(rays: Rays, pixels: np.ndarray) -> Iterator[Loads]:
    "Go from plane to plane of voxel centres, as the exact kernel: a piece has eight corners."
    direction, shape = directions(rays, pixels), np.array(rays.shape)
    a, leave = clip(rays.source, direction, -1.0, shape)
    leave = np.where(pixels >= 0, leave, a)
    step = np.where(direction > 0, 1, -1)
    plane = np.clip(np.floor(rays.source + a[..., None] * direction + 1), 0, shape) - 1.0 + (direction > 0)
    while (goes := a < leave).any():
        at = (plane - rays.source) / direction
        after = np.maximum(np.minimum(at.min(axis=-1), leave), a)
        yield corners((plane - (direction > 0)).astype(np.int64), goes, shape), goes
        plane += step * (np.arange(3) == at.argmin(axis=-1)[..., None])
        a = after


def walk_samples(
    rays: Rays,
    pixels: np.ndarray,
    n_points: int = 500,
    x_first: bool = False,
) -> Iterator[Loads]:
    "Go from sample to sample."
    direction, shape = directions(rays, pixels), np.array(rays.shape)
    enter, leave = clip(rays.source, direction, -1.0, shape)
    goes = (pixels >= 0) & (enter < leave)
    for k in range(n_points):
        at = enter + (leave - enter) * (k + 0.5) / n_points
        cell = np.floor(rays.source + at[..., None] * direction).astype(np.int64)
        yield corners(cell, goes, shape, x_first), goes


def distinct(numbers: np.ndarray) -> np.ndarray:
    "Count different numbers along the last axis, without -1."
    ordered = np.sort(numbers, axis=-1)
    return ((ordered[..., 1:] != ordered[..., :-1]) & (ordered[..., 1:] >= 0)).sum(axis=-1) + (ordered[..., 0] >= 0)


@cache
def fullest_of_four() -> np.ndarray:  # (33,)
    "Return how many of some lines fall into the fullest of four sets, on average."
    random = np.random.default_rng(1)
    mean = [np.mean([np.bincount(random.integers(0, 4, n)).max() for _ in range(500)]) for n in range(1, WARP + 1)]
    return np.array([0.0, *mean])


def bank_cycles(words: np.ndarray) -> np.ndarray:  # (...) of (..., 32) numbers of words of 4 bytes, -1 for none
    "Count the different words of the bank that has most of them."
    ordered = np.sort(words.reshape(-1, WARP), axis=-1)
    new = np.concatenate([ordered[:, :1] >= 0, (ordered[:, 1:] != ordered[:, :-1]) & (ordered[:, 1:] >= 0)], axis=1)
    counts = np.zeros((len(ordered), 32), np.int32)
    load, lane = np.nonzero(new)
    np.add.at(counts, (load, ordered[load, lane] & 31), 1)
    return counts.max(axis=-1).reshape(words.shape[:-1])


def count_cycles(loads: Iterator[Loads], n_bytes: int) -> tuple[np.ndarray, float]:  # (P,) steps; L1 cycles of a step
    "Count the steps of each program, and what every third of them costs an L1."
    warps, cycles, steps = 0, 0.0, 0
    for number, (voxels, goes) in enumerate(loads):
        active = goes.any(axis=-1)
        steps = steps + active.any(axis=-1)
        if number % 3 == 0:
            address = np.where(voxels < 0, -1, voxels * n_bytes)
            lines = fullest_of_four()[distinct(address >> 7)]  # -1 stays -1
            cycles += np.maximum(lines, bank_cycles(address >> 2)).sum()
            warps += active.sum()
    return np.asarray(steps), cycles / max(1, warps)


def find_sectors(loads: Iterator[Loads], n_bytes: int, n_sectors: int) -> np.ndarray:  # (P, n_sectors) bool
    "Mark the sectors of the volume that programs read."
    read: np.ndarray | None = None
    for voxels, _ in loads:
        if read is None:
            read = np.zeros((voxels.shape[1], n_sectors), bool)
        _, program, *_ = where = np.nonzero(voxels >= 0)
        read[program, voxels[where] * n_bytes >> 5] = True
    return np.zeros((1, 1), bool) if read is None else read


def traffic(
    walk: Callable[[Rays, np.ndarray], Iterator[Loads]],
    rays: Rays,
    tiles: np.ndarray,  # (P, 4, 32), see `tiles_of`
    across: int,  # tiles in a row
    n_bytes: int,  # of a voxel
) -> Traffic:
    "Walk some programs, all over the picture, and a square of neighbours for what they share."
    n_sectors = (int(np.prod(rays.shape)) * n_bytes >> 5) + 1
    chosen = tiles[np.sort(np.random.default_rng(0).permutation(len(tiles))[:SAMPLE])]
    steps, cycles = count_cycles(walk(rays, chosen), n_bytes)
    l2 = 32.0 * len(tiles) / len(chosen) * find_sectors(walk(rays, chosen), n_bytes, n_sectors).sum()
    square = range(-SQUARE // 2, SQUARE // 2)
    middle = len(tiles) // across // 2 * across + across // 2
    numbers = (middle + i * across + j for i in square for j in square)
    near = find_sectors(walk(rays, tiles[[n for n in numbers if 0 <= n < len(tiles)]]), n_bytes, n_sectors)
    shared = near.any(axis=0).sum() / max(1, near.sum())
    return Traffic(steps, cycles, l2, min(32.0 * n_sectors, l2 * shared))
