"""The X-rays of the registration benchmark are what they claim to be, and its tables say what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from benchmarks import registration as benchmark
from benchmarks import xrays
from benchmarks.recipe import Recipe, Start, climb
from benchmarks.registration import Check, Outcome
from benchmarks.worker import Failure
from benchmarks.xrays import Exposure, Patient
from diffdrr.geometry import RigidTransform, twist_to_matrix
from diffdrr.registration import Objective, make_views
from diffdrr.volumes import load_example_ct, read

SMALL = Exposure(height=48, delx=400 / 48, oversampling=2)
CLEAN = replace(SMALL, photons=1e9, scatter=0.0, gain=0.0, steel=0.0)
FRONTAL = benchmark.convert(torch.zeros(1, 3), torch.tensor([benchmark.SOURCE]), **benchmark.EULER)
ROUNDING = 1e-4  # float32 sums of some hundred terms, and a logarithm


@pytest.fixture(scope="module")
def subject():
    return load_example_ct(shape=(64, 64, 33), spacing=(5.6, 5.6, 10.0))


@pytest.fixture(scope="module")
def patient(subject):
    return Patient.of(subject)


def moved(pose: RigidTransform, *twist: float) -> RigidTransform:
    return pose.compose(RigidTransform(twist_to_matrix(torch.tensor([twist], dtype=torch.float32))))


def slab(thickness: int) -> Patient:
    "Water, 4 mm thick for each slice, across the view from the front."
    hu = torch.full((40, 21, 40), -1000.0)
    hu[:, :thickness] = 0.0
    hu[0, -1, 0] = -700.0
    return Patient.of(read(hu, affine=np.diag([10.0, 4.0, 10.0, 1.0])))


def test_water_attenuates_as_it_should():
    primary = xrays.transmit(slab(10), FRONTAL, replace(CLEAN, height=7, delx=4.0, oversampling=1))
    assert primary[0, 0, 3, 3].log().item() == pytest.approx(
        -CLEAN.water * 40.0, rel=1e-3
    )  # the interpolation ends with the voxels, half a voxel beyond their centres


def test_a_pixel_averages_intensities(patient):
    fine = xrays.transmit(patient, FRONTAL, replace(SMALL, height=96, delx=400 / 96, oversampling=1))
    torch.testing.assert_close(
        xrays.transmit(patient, FRONTAL, SMALL), torch.nn.functional.avg_pool2d(fine, 2), rtol=ROUNDING, atol=0
    )


def test_without_disturbances_only_the_patient_is_seen(patient):
    xray, field = xrays.take_xray(patient, FRONTAL, CLEAN, 0), xrays.collimated_field(CLEAN) == 1
    primary = xrays.transmit(patient, FRONTAL, CLEAN)
    torch.testing.assert_close(
        xray[field], -primary[field].log(), rtol=0, atol=2e-2
    )  # 1e9 photons on a square millimetre, of which down to 1e-5 arrive in a pixel
    assert (xray[~field] == np.float32(np.log(CLEAN.photons_per_pixel))).all()


@pytest.mark.parametrize("seed", range(3))
def test_disturbed_xrays_fit_best_at_the_true_pose(subject, patient, seed):
    true = benchmark.true_pose(seed)
    xray, field = xrays.take_xray(patient, true, SMALL, seed), xrays.collimated_field(SMALL)
    objective = Objective(make_views(SMALL.camera(subject), xray, true, field), window=0.1)
    still, pixel = torch.eye(4)[None], SMALL.delx * 850 / 1020
    aside = [
        moved(RigidTransform(still), *(pixel * np.eye(6)[axis] * sign).tolist()).matrix
        for axis in (0, 2)
        for sign in (1, -1)
    ]
    here, *there = objective.score(objective.start(torch.cat([still, *aside]))).tolist()
    assert here > 0.6
    assert max(there) < here - 0.02


def test_noise_is_that_of_counting():
    intensity, photons = torch.full((1, 1, 200, 200), 0.05), SMALL.photons_per_pixel
    noisy = xrays.count_photons(intensity, photons, torch.Generator().manual_seed(0))
    assert noisy.mean().item() == pytest.approx(0.05, rel=1e-3)
    assert noisy.std().item() == pytest.approx(
        (0.05 / photons) ** 0.5, rel=0.02
    )  # 40 000 samples know a standard deviation to 0.35 %
    torch.testing.assert_close(noisy * photons, (noisy * photons).round(), rtol=0, atol=0.05)


def test_haze_has_the_stated_ratio_and_no_detail(patient):
    primary = xrays.transmit(patient, FRONTAL, SMALL)
    haze, behind = xrays.haze(primary, SMALL), primary < 0.5
    assert (haze[behind].sum() / primary[behind].sum()).item() == pytest.approx(SMALL.scatter, rel=ROUNDING)

    def steepest(x):
        return (x[..., 1:] - x[..., :-1]).abs().max() / x.max()

    assert steepest(haze) < 0.2 * steepest(primary)


def test_the_rod_hides_what_is_under_it():
    exposure = replace(SMALL, height=512, delx=400 / 512)
    through = xrays.rod_transmission(exposure, torch.Generator().manual_seed(0))
    assert through.min() < 1e-2 and through.max() == 1
    rows = (through < 0.99).sum(dim=0), (through < 0.99).sum(dim=1)
    narrowest = min(r[r > 0].float().median() for r in rows) * exposure.delx
    assert exposure.rod * 0.9 < narrowest < exposure.rod * 1.5  # cut at an angle of up to 45 degrees


def test_the_gain_changes_slowly():
    gain = xrays.uneven_gain(replace(SMALL, gain=0.05), torch.Generator().manual_seed(1))
    assert gain.mean().item() == pytest.approx(1.0, abs=1e-5)
    assert gain.std() > 0.01
    assert (gain.diff(dim=0).diff(dim=0).abs() < 1e-5).all()


def test_a_second_xray_is_read_and_every_parameter_counts(patient, tmp_path, monkeypatch):
    first = xrays.cached_xray(patient, FRONTAL, SMALL, 0, tmp_path)
    for pose, exposure, seed in (
        (FRONTAL, SMALL, 1),
        (moved(FRONTAL, 1, 0, 0, 0, 0, 0), SMALL, 0),
        (FRONTAL, replace(SMALL, gain=0.1), 0),
    ):
        assert not torch.equal(xrays.cached_xray(patient, pose, exposure, seed, tmp_path), first)
    assert len(list(tmp_path.iterdir())) == 4
    monkeypatch.setattr(xrays, "take_xray", None)  # which would raise
    assert torch.equal(xrays.cached_xray(patient, FRONTAL, SMALL, 0, tmp_path), first)
    with pytest.raises(TypeError):
        xrays.cached_xray(replace(patient, digest="another"), FRONTAL, SMALL, 0, tmp_path)


def test_starts_are_as_far_off_as_stated(subject):
    spread, true = (10.0, 30.0), benchmark.true_pose(0)
    moves = (
        true.inverse()
        .compose(RigidTransform(torch.cat([benchmark.starting_pose(true, spread, seed).matrix for seed in range(100)])))
        .get_se3_log()
    )
    deviation = moves.square().mean(dim=0).sqrt()
    assert deviation[:3].numpy() == pytest.approx(30.0, rel=0.3)  # 100 samples know a standard deviation to 7 %
    assert deviation[3:].rad2deg().numpy() == pytest.approx(10.0, rel=0.3)
    twice = true.inverse().compose(benchmark.starting_pose(true, (20.0, 60.0), 7)).get_se3_log()
    torch.testing.assert_close(twice, 2 * moves[7:8], rtol=1e-3, atol=1e-3)
    grid = benchmark.middle_grid(subject)
    assert grid.shape == (1, 125, 3)
    assert grid.mean(dim=1).abs().max() < 1e-3  # around the isocentre
    assert grid[0].max(dim=0).values.tolist() == pytest.approx([64 * 5.6 / 4, 64 * 5.6 / 4, 33 * 10 / 4], rel=1e-5)


def outcome(
    error: float, flagged: bool | None = False, who: str = "register", seed: int = 0, seconds: float = 1.0
) -> Outcome:
    return Outcome("P10", who, seed, 50.0, error, seconds, 40, flagged)


def test_the_table_counts_verdicts():
    made_up = [
        outcome(0.5),
        outcome(0.7, True),
        outcome(1.5),
        outcome(2.0),
        outcome(30.0),
        outcome(40.0, True, seconds=9.0),
    ] + [outcome(3.0, None, "recipe, ours")]
    register, recipe = benchmark.summarize(made_up).to_dict("records")
    assert (register["runs"], recipe["runs"]) == (6, 1)
    assert register["mTRE < 1 mm, %"] == pytest.approx(100 * 2 / 6)
    assert register["mTRE < 2 mm, %"] == pytest.approx(100 * 3 / 6)
    assert [register[x] for x in ("wrong and reported", "wrong, not reported", "right, but reported")] == [
        "1",
        "2",
        "1",
    ]
    assert [recipe[x] for x in ("wrong and reported", "wrong, not reported", "right, but reported")] == ["-", "-", "-"]
    assert register["mTRE, mm"] == pytest.approx(1.75)
    assert register["seconds, 90th percentile"] == pytest.approx(5.0)


def test_verdicts_compare_starts_that_all_reached():
    def made(who, start, reached, iterations, seconds):
        return Check(who, start, reached, iterations, seconds, 0.5, 1.0)

    checks = [
        made("ours", "a", True, 50, 1.0),
        made("ours", "b", True, 70, 1.0),
        made("0.6.1", "a", True, 60, 30.0),
        made("0.6.1", "b", False, 250, 99.0),
    ]
    rows = benchmark.verdicts([outcome(0.5)] * 18 + [outcome(5.0)] * 2, checks).set_index("measure")
    assert rows["value"].tolist() == pytest.approx([90.0, 1.0, 50 / 60, 1 / 30])
    assert rows["verdict"].tolist() == ["**not reached**", "reached", "reached", "reached"]
    ours, theirs = benchmark.summarize_checks(checks).to_dict("records")
    assert (ours["reached from"], theirs["reached from"], ours["compared"]) == ("2 of 2", "1 of 2", 1)
    assert (ours["iterations"], theirs["iterations"]) == (50.0, 60.0)
    assert benchmark.verdicts([], []).empty


def test_a_refused_start_is_a_failure_that_was_noticed(subject, patient, tmp_path):
    case = benchmark.take_case(patient, SMALL, (10.0, 30.0), 0, tmp_path)

    def refuse(*_):
        raise ValueError("init must show the CT")

    found = benchmark.attempt(refuse, SMALL.camera(subject), case, benchmark.middle_grid(subject), "P10")
    assert (found.flagged, found.reason, found.error) == (True, "init must show the CT", found.start)


def test_arguments(capsys):
    assert benchmark.parse([]).sets == ["P10", "hard"]
    assert benchmark.parse(["--sets", "hard", "--seeds", "3", "--recipe-seeds", "0"]).sets == ["hard"]
    for wrong in (["--seeds", "0"], ["--seeds", "3", "--recipe-seeds", "4"], ["--sets", "easy"]):
        with pytest.raises(SystemExit):
            benchmark.parse(wrong)
    assert "--recipe-seeds" in capsys.readouterr().err


def test_a_recipe_that_ends_says_why(subject, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
    broken.chmod(0o755)
    with pytest.raises(Failure, match="no such module"):
        list(climb("ours", broken, subject, [Start(FRONTAL, FRONTAL)], Recipe(), 1020.0, 400.0, 1))


@pytest.mark.slow
def test_the_whole_benchmark(subject, tmp_path, monkeypatch):
    "With a small CT and a method that finds the pose of every other X-ray."
    monkeypatch.setattr(benchmark, "load_subject", lambda path: subject)
    monkeypatch.setattr(benchmark, "Exposure", lambda: replace(SMALL, height=64, delx=400 / 64))
    monkeypatch.setattr(benchmark, "Recipe", partial(Recipe, iterations=60))
    monkeypatch.setattr(benchmark, "PACKAGES", {"ours": "ours"})
    monkeypatch.setattr(
        benchmark, "far_starts", lambda: {"slightly": Start(moved(FRONTAL, 0, 0, 0, 0, 0, 0.1), FRONTAL)}
    )
    poses = [benchmark.true_pose(seed) for seed in range(2)]
    found = iter([poses[0], *poses, poses[0], moved(poses[1], 10.0, 0, 0, 0, 0, 0)])

    def method(drr, xray, init, mask):
        return SimpleNamespace(pose=next(found), reason=None, iterations=5)

    monkeypatch.setattr(benchmark, "register", lambda *given, verbose: method(*given))
    results = benchmark.main(
        [
            "--seeds",
            "2",
            "--recipe-seeds",
            "1",
            "--threads",
            "1",
            "--cache",
            str(tmp_path / "xrays"),
            "--results",
            str(tmp_path),
            "--name",
            "here",
        ]
    )
    errors = [o.error for o in results.outcomes if o.who == "register"]
    assert errors == pytest.approx([0.0, 0.0, 0.0, 10.0], abs=1e-2)
    assert [(o.set, o.seed) for o in results.outcomes if o.who != "register"] == [("P10", 0), ("hard", 0)]
    assert results.checks[0].reached and 0 < results.checks[0].iterations < 60 and results.checks[0].degrees < 2
    text, data = (
        (tmp_path / "here-registration.md").read_text(),
        json.loads((tmp_path / "here-registration.json").read_text()),
    )
    assert "| hard | register | 2 |" in text and "recipe, ours" in text
    assert len(data["outcomes"]) == 6 and len(data["checks"]) == 1
    assert not list(tmp_path.glob("*.new"))
