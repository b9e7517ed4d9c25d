"""The benchmark for the first hour on a GPU, rehearsed without one, and the model that it compares with."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu.model import CARDS, Picture, anchor, codes, predict, rays_of
from benchmarks.gpu.traffic import Rays, bank_cycles, count_cycles, distinct, tiles_of, walk_cells, walk_voxels

ROOT = Path(__file__).parents[1]
WITHOUT = """
import runpy, sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torchio", "roma", "SimpleITK", "nibabel", "pydicom", "pandas", "matplotlib"}:
            raise ModuleNotFoundError(f"no {name} here", name=name)
sys.meta_path.insert(0, Missing())
sys.argv[0] = "benchmarks.gpu"
runpy.run_module("benchmarks.gpu", run_name="__main__", alter_sys=True)
"""


def rehearse(folder: Path, *only: str) -> dict:
    "Run the benchmark where little more than torch and Triton is installed; return its report."
    command = [sys.executable, "-c", WITHOUT, "--results", str(folder), "--only", *only]
    settings = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (text,) = folder.glob("*-gpu.md")
    assert "Checks that failed: none." in text.read_text()
    return json.loads(text.with_suffix(".json").read_text())


def test_checks_without_a_card(tmp_path):
    pytest.importorskip("triton", reason="triton is not installed")
    found = rehearse(tmp_path, "waits", "stream", "capture", "graph", "peers")
    assert {check["outcome"] for check in found["checks"]} == {"skipped"}
    assert found["missing"] == {"nanodrr": "there is no card", "flashdrr": "there is no card"}


@pytest.mark.slow
def test_rehearsal(tmp_path):
    "All of it, on tiny sizes in the interpreter."
    found = rehearse(tmp_path, "suite", "small", "table")
    assert [check["outcome"] for check in found["checks"]] == ["passed", "passed"]
    assert found["left_out"] == 0 and len(found["rows"]) == 16
    assert all(row["error"] < 1e-4 and row["call"] > 0 for row in found["rows"])


def test_anchor():
    "nanodrr measured 69 to 78 microseconds, small kernels of some 10 included, on an RTX 6000 Ada."
    assert 69 * 0.75 < anchor() < 69


def test_predictions():
    "What the model must say: fewer pixels, a faster card and a warm cache take less time; slopes take more."
    card = {card.name: card for card in CARDS}
    base = predict(card["H200"], "Siddon").total
    assert 30 < base < 80  # 53 with the programs of a picture played through one by one
    assert predict(card["H200"], "Siddon", picture=Picture(height=64, width=64)).total < base
    assert predict(card["H200"], "Siddon", "slopes").total > base
    assert predict(card["A100"], "Siddon").total > base
    assert predict(card["RTX 4090"], "Siddon", warm=False).total > predict(card["RTX 4090"], "Siddon").total
    assert predict(card["H200"], "Siddon", picture=Picture(batch=4)).total > 2 * base


def test_every_card_has_its_code():
    table = codes()
    for card in CARDS:
        for method in ("Siddon", "exact", "sampled"):
            assert {(card.arch, f"{method} {task}") for task in ("forward", "slopes", "forward bfloat16")} <= set(table)


def test_tiles_cover_a_picture_once():
    for rows in (1, 8, 16):
        pixels = np.sort(tiles_of(20, 37, rows).ravel())
        assert np.array_equal(pixels[pixels >= 0], np.arange(20 * 37))


def test_rays_look_at_the_middle():
    rays = rays_of(Picture("oblique", 3, 3, shape=(9, 9, 9), spacing=(1.0, 1.0, 1.0)))
    middle = rays.source + (rays.target[4] - rays.source) * 850 / 1020
    assert np.allclose(middle, 4)


def test_steps_of_a_straight_ray():
    "One that goes along y, through the middles of voxels: it reads each voxel once."
    rays = Rays(np.array([2.0, -5.0, 1.0]), np.array([[2.0, 20.0, 1.0]]), (4, 6, 3))
    lane = np.full((1, 4, 32), -1)
    lane[0, 0, 0] = 0
    read = [voxels[:, 0, 0, 0] for voxels, _ in walk_voxels(rays, lane)]
    assert [(row[0] // 3 % 6, (row[1:] >= 0).sum()) for row in read] == [(y, 0) for y in range(6)]
    cells = list(walk_cells(rays, lane))
    assert len(cells) == 7 and (cells[3][0] >= 0).sum() == 8


def test_counts():
    numbers = np.full((1, 32), -1)
    assert distinct(numbers) == 0 and bank_cycles(numbers) == 0
    numbers[0, :4] = 0, 32, 64, 1  # three of them in bank 0
    assert distinct(numbers) == 4 and bank_cycles(numbers) == 3
    loads = np.full((1, 1, 4, 32), -1)
    loads[0, 0, 0] = np.arange(32)  # one line
    steps, cycles = count_cycles(iter([(loads, loads[0] >= 0)]), 4)
    assert steps.tolist() == [1] and cycles == 1
