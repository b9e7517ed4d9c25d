"The phantoms of the reconstruction benchmark are what they claim to be, and its report says what was measured."

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import large
from benchmarks import reconstruction as benchmark
from benchmarks.worker import Failure

PIXELS, DELX = (20, 24), 26.0


@pytest.fixture(scope="module")
def head():
    return benchmark.head((48,) * 3, 240.0, PIXELS, DELX, views=6)


def test_pictures_of_the_head_are_those_of_its_voxels(head):
    coarse = benchmark.head((24,) * 3, 240.0, PIXELS, DELX, views=6)

    def error(case):
        return ((case.projector(torch.from_numpy(case.true)) - case.pictures).norm() / case.pictures.norm()).item()

    assert error(head) < 0.13 and error(head) < 0.75 * error(
        coarse
    )  # thin bone in voxels of 5 and 10 mm: the square root of their size
    assert head.true[head.inside].min() >= 0 and head.true.max() == pytest.approx(benchmark.WATER, rel=1e-3)
    assert head.true[24, 24, 24] == pytest.approx(0.2 * benchmark.WATER, rel=0.05)  # the brain


def test_pictures_of_the_chest_are_those_of_its_voxels():
    case = benchmark.chest(None, (16, 16, 8), PIXELS, DELX, views=3)
    seen = case.projector(torch.from_numpy(case.true))
    assert (seen - case.pictures).norm() / case.pictures.norm() < 0.1  # voxels of 11 x 11 x 20 mm
    body = case.true[case.inside]
    assert len(body) > 50 and 0.3 * benchmark.WATER < body.mean() < benchmark.WATER


def test_noise_is_that_of_photons():
    pictures = torch.full((1, 1, 100, 100), 2.0)
    noisy = benchmark.with_noise(pictures, 1e4)
    assert noisy.mean().item() == pytest.approx(2.0, abs=2e-3)
    assert noisy.std().item() == pytest.approx((1e4 * np.exp(-2)) ** -0.5, rel=0.05)


def test_quality(head):
    exact = head.true.copy()
    psnr, ssim = benchmark.quality(head, exact + np.where(head.inside, 0.01 * head.true[head.inside].max(), 0))
    assert psnr == pytest.approx(40, abs=1e-3)
    assert benchmark.quality(head, exact + 1e-9)[1] == pytest.approx(1, abs=1e-6) and ssim < 1


@pytest.mark.slow
def test_the_whole_benchmark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(benchmark, "CONTESTANTS", {"ours": "ours"})
    small = (
        "--views 6 --block 16 16 8 --head 16 --pixels 20 24 --delx 26 --head-pixels 20 24 --head-delx 16 --iterations "
        "2 --tv-iterations 3 --name test"
    ).split()
    monkeypatch.setattr(benchmark, "CT", tmp_path / "none")
    outcomes = benchmark.main([*small, "--results", str(tmp_path)])
    stored = json.loads((tmp_path / "test-reconstruction.json").read_text())
    assert len(stored["outcomes"]) == len(outcomes) == 2 * 2 * 4 and not stored["missing"]
    assert {one.method for one in outcomes} == {"FDK", "SART", "SART, trilinear", "total variation"}
    assert all(one.psnr > 5 and one.seconds > 0 and one.memory > 100 for one in outcomes)
    assert "Shepp-Logan" in (tmp_path / "test-reconstruction.md").read_text()


def test_large_benchmark(tmp_path: Path):
    rows = large.main(
        ["--voxels", "32", "--pixels", "48", "--views", "48", "--name", "test", "--results", str(tmp_path)]
    )
    assert [row["what"] for row in rows] == ["preparation", "iteration 1", "iteration 2"]
    nothing, first, second = (row["error, % of water"] for row in rows)
    assert second < first < 0.75 * nothing
    assert (
        json.loads((tmp_path / "test-large.json").read_text())["rows"] == rows
        and "48 views" in (tmp_path / "test-large.md").read_text()
    )


def test_a_contestant_that_breaks_says_why(head):
    with pytest.raises(Failure, match="ours ended: .*KeyError"):
        list(benchmark.reconstruct("ours", Path(sys.executable), head, head.pictures, {}, 1))
