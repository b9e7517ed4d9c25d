"""The conditions of practice give what they claim, a run goes on where it was stopped, and its report counts right."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from benchmarks import conditions, machine, radiographs, registration, trust
from benchmarks.conditions import CONDITIONS, Run
from diffdrr.geometry import RigidTransform, matrix_to_twist, pose_from_view, twist_to_matrix
from diffdrr.registration import register

needs_chest = pytest.mark.skipif(not radiographs.CT.exists(), reason="the real chest CT is not beside the project")


def test_the_field_is_as_large_as_stated():
    for part in (1.0, 0.25, 0.14):
        assert radiographs.field_of(part).mean().item() == pytest.approx(part, abs=0.01)


def test_processing_keeps_the_order_of_values():
    depth = torch.rand(1, 1, 40, 40, generator=torch.Generator().manual_seed(0)) * 3
    for response in ("linear", "gamma", "equalised"):
        seen = radiographs.respond(depth, response)
        assert (seen.flatten()[depth.flatten().argsort()].diff() >= 0).all()
    assert len(seen.unique()) <= 256


def test_an_xray_comes_with_what_is_wrongly_known():
    image = torch.rand(1, 1, 200, 200)
    cropped = conditions.as_given(CONDITIONS["collimated, cropped"], image)
    assert cropped.mask.min() == 1 and cropped.mask.numel() == pytest.approx(0.14 * 200**2, rel=0.03)
    assert conditions.as_given(CONDITIONS["collimated"], image).mask.mean() < 0.15
    assert conditions.as_given(CONDITIONS["collimated, no mask"], image).mask.min() == 1
    shifted = conditions.as_given(CONDITIONS["principal point"], image).camera
    assert (shifted.x0, shifted.sdd) == (10.0, radiographs.CAMERA.sdd)
    larger = conditions.as_given(CONDITIONS["pixel size"], image).camera
    assert (larger.delx, larger.dely) == pytest.approx((2.2, 2.2))


def test_the_distance_of_the_truth_counts_standard_deviations():
    centre, twist = torch.tensor([10.0, -20.0, 30.0]), torch.tensor([[0.4, 0.0, 0.0, 0.0, 0.02, 0.0]])
    move = RigidTransform(torch.eye(4)[None])
    move.matrix[0, :3, 3] = centre
    found = pose_from_view("AP", 850.0)
    around = move.matrix @ twist_to_matrix(twist) @ torch.linalg.inv(move.matrix)
    covariance = torch.tensor([0.2] * 3 + [0.01] * 3).double().square().diag()
    distance = conditions.squared_distance(RigidTransform(around @ found.matrix), found, covariance, centre)
    assert distance == pytest.approx(4.0 + 4.0, rel=1e-3)


def test_far_starts_are_uniform_in_size():
    motions = [conditions.random_motion((60.0, 180.0), seed, 1, uniform=True).matrix for seed in range(100)]
    twists = matrix_to_twist(torch.cat(motions))
    turn, shift = twists[:, 3:].norm(dim=1).rad2deg() / 60, twists[:, :3].norm(dim=1) / 180
    torch.testing.assert_close(turn, shift, rtol=1e-3, atol=1e-3)
    quarters = torch.histc(shift, 4, 0.0, 1.0)
    assert quarters.sum() == 100 and (quarters - 25).abs().max() < 13  # three deviations


def test_conditions_have_their_kinds():
    kinds = {name: condition.kind for name, condition in CONDITIONS.items()}
    assert set(kinds.values()) == set(trust.KINDS)
    assert [kinds[name] for name in ("gamma", "biplane", "frontal, far starts")] == ["picture"] * 3
    assert [kinds[name] for name in ("abdomen", "ribs", "ends cut", "lungs 1.6 %")] == ["patient"] * 4
    assert [kinds[name] for name in ("pixel size", "biplane, sdd")] == ["geometry"] * 2
    assert kinds["biplane, refine sdd"] == "geometry refined"


def run(error: float, reason: str | None = None, distance: float = 5.0, **others) -> Run:
    return replace(Run("frontal", 0, 50.0, error, 1.0, 0.8, distance, 0.5 * distance, reason), **others)


def table(*runs: Run) -> pd.DataFrame:
    return pd.DataFrame([asdict(one) for one in runs])


def test_the_table_counts_verdicts():
    runs = table(run(0.5), run(2.0, "odd"), run(4.0), run(90.0, "lost", 20.0))
    (row,) = trust.summarize(runs).to_dict("records")
    assert (row["wrong, not flagged"], row["right, but flagged"], row["worst, mm"]) == (1, 1, 90.0)
    assert (row["< 1 mm, %"], row["< 3 mm, %"], row["> 10 mm, %"]) == (25.0, 50.0, 25.0)
    assert (row["median, mm"], row["75th, mm"]) == (3.0, 25.5)
    assert (row["truth in the 95 % region, %"], row["with the geometry's, %"]) == (75.0, 100.0)
    found = trust.verdicts(runs)
    assert (found["runs"], found["wrong"], found["flagged"]) == (4, 2, 2)
    assert {found[f"{name}, %"].percent for name in ("wrong of the unflagged", "flagged of the right")} == {50.0}
    assert found["flagged of the wrong, %"].percent == 50.0


def test_intervals_are_exact():
    never = trust.Share.of(pd.Series([False] * 10))
    assert (never.percent, never.low) == (0.0, 0.0) and never.high == pytest.approx(100 * (1 - 0.025 ** (1 / 10)))
    assert str(trust.Share.of(pd.Series([True, False] * 10))) == "50.0 (27.2 to 72.8)"
    assert str(trust.Share.of(pd.Series([], dtype=bool))) == "-"


def test_what_is_calibrated_holds_as_many_truths_as_it_should():
    squares = np.random.default_rng(0).chisquare(6, 4000)
    runs = table(*(run(0.5, distance=square) for square in squares), run(50.0, "refused", float("nan")))
    found = trust.calibration(runs, "distance")
    assert list(found["nominal"]) == [50, 68, 80, 90, 95, 99]
    assert ((found["percent"] - found["nominal"]).abs() < 2.5).all()  # three deviations of 4000
    assert (trust.calibration(runs, "total")["percent"] > found["percent"]).all()
    refused = pd.concat([runs[:10], *[runs[-1:]] * 10])  # has no region
    pd.testing.assert_frame_equal(trust.calibration(refused, "total"), trust.calibration(runs[:10], "total"))
    assert list(trust.calibration_table(refused)["runs"]) == [10] * 8
    (row,) = trust.summarize(refused).to_dict("records")
    assert row["runs"] == 20 and row["with the geometry's, %"] == 100 * (runs["total"][:10] < 12.592).mean()


def test_successes_are_counted_by_how_far_starts_were_off():
    near, further = [run(0.5, start=5.0 + i) for i in range(10)], [run(2.0, start=25.0), run(9.0, start=39.0)]
    curve = trust.capture_curve(table(*near, *further))
    assert list(curve["to, mm"]) == [20.0, 40.0] and list(curve["runs"]) == [10, 2]
    assert [(exact.percent, right.percent) for exact, right in zip(curve["exact"], curve["right"])] == [
        (100.0, 100.0),
        (0.0, 50.0),
    ]


def with_origin(*runs: Run, **changes) -> list[dict]:
    origin = machine.session(threads=1) | {"ct": "chest.nii.gz"} | changes
    return [asdict(one) | origin for one in runs]


def test_the_report_says_what_was_measured():
    rows = with_origin(run(0.5), run(4.0, seed=1), run(0.7, seed=2), commit="one", date="2026-12-01")
    rows += with_origin(run(12.0, "lost", condition="sdd", seed=7), commit="another", date="2026-12-02")
    text = trust.as_markdown(pd.DataFrame(rows))
    assert "2026-12-01 and 2026-12-02, commit one and another, diffdrr" in text
    assert "4 registrations of simulated X-rays of chest.nii.gz, seeds 0 to 2, 7: 2026" in text
    assert "| all | 4 | 2 | 1 | 33.3 (0.8 to 90.6) | 0.0 (0.0 to 84.2) | 50.0 (1.3 to 98.7) |" in text
    assert "Where only the picture differs: 0 mm" in text and "- geometry: a wrong geometry, taken for right" in text


def test_a_log_must_be_whole_and_say_what_was_measured(tmp_path):
    (whole,), log = with_origin(run(0.5)), tmp_path / "log"
    origin = {name: whole[name] for name in ("commit", "ct")}
    log.write_text(json.dumps(whole) + "\n")
    assert conditions.read_log(log, origin) == [whole]
    log.write_text(json.dumps(whole) + "\n" + json.dumps(whole)[:50])
    with pytest.raises(ValueError, match="line 2 of --log .* is not whole; remove it"):
        conditions.read_log(log, origin)
    log.write_text(json.dumps(asdict(run(0.5))))
    with pytest.raises(ValueError, match="line 1 of --log .* lacks commit, ct; add what is known, or remove it"):
        conditions.read_log(log, origin)


def test_conditions_are_chosen_by_name(capsys):
    assert registration.parse(["--only", "sdd", "--starts", "2"]).only == ["sdd"]
    with pytest.raises(SystemExit):
        registration.parse(["--only", "sunshine"])
    assert "lungs 1.6 %" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        registration.parse(["--only", "sdd", "--ct", "own.nii.gz"])
    assert "--ct own.nii.gz is not for --only" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        registration.parse(["--only", "sdd", "--starts", "0"])
    assert "--starts must be at least 1, or 0 for the report of a --log that exists, not 0" in capsys.readouterr().err


@pytest.mark.slow
@needs_chest
@pytest.mark.parametrize("motion", [(0.05, 0.0, 0.0), (0.0, 10.0, 0.0), (0.0, 0.0, 10.0)])
def test_tissue_moves_and_vertebrae_hold_still(motion):
    before, after = radiographs.deformed(0.0, 0.0, 0.0), radiographs.deformed(*motion)
    still, changed = radiographs.structure("vertebrae"), (after - before).abs()
    assert changed[still].mean() < 0.1 * changed[~still & (changed > 0)].mean()


@pytest.mark.slow
@needs_chest
def test_lungs_grow_and_organs_go_where_they_should():
    before, inhaled = (radiographs.deformed(growth, 0.0, 0.0) for growth in (0.0, 0.05))
    air = [((volume < -500) & (volume > -950)).sum().item() for volume in (before, inhaled)]
    assert 1.02 < air[1] / air[0] < 1.25
    sunk, raised = radiographs.deformed(0.0, 10.0, 0.0), radiographs.deformed(0.0, 0.0, 10.0)
    spacing = radiographs.chest().volume.spacing[2]
    for name, after, way in (("spleen", sunk, 1), ("humerus_left", raised, -1)):
        inside = radiographs.structure(name).nonzero().T
        come_from = inside[2] + round(way * 10 / spacing)
        kept = (come_from >= 0) & (come_from < before.shape[2])
        x, y, z = inside[:, kept]
        there = (after[x, y, z] - before[x, y, come_from[kept]]).abs().mean()
        assert there < 0.5 * (after[x, y, z] - before[x, y, z]).abs().mean()


@pytest.mark.slow
@needs_chest
def test_parts_of_the_ct_stay_where_they_were():
    whole = conditions.shown_by_ct("whole")
    for part in ("ends cut", "middle third", "spine"):
        shown = conditions.shown_by_ct(part)
        corner = torch.as_tensor(shown.volume.affine)[:3, 3]
        at = torch.linalg.solve(
            torch.as_tensor(whole.volume.affine), torch.cat([corner, torch.ones(1).to(corner)])
        ).round()
        assert torch.equal(whole.mask.data[0, 0, 0, int(at[2])].int(), shown.mask.data[0, 0, 0, 0].int())
        assert shown.density.data.max() > 0


@needs_chest
def test_groups_of_structures_are_listed():
    assert conditions.labels_of(None) is None
    for group in ("vertebrae", "ribs", "skeleton"):
        inside = radiographs.structure(group)
        assert set(conditions.labels_of(group)) == set(radiographs.chest().mask.data[0][inside].tolist())


def test_a_run_that_was_stopped_goes_on(tmp_path, monkeypatch):
    tried = []

    def take(name, subject, seed, method, chosen):
        tried.append((name, seed))
        return run(0.5 + seed, condition=name, seed=seed)

    def measured(*options):
        where = ["--log", str(tmp_path / "log"), "--results", str(tmp_path), "--name", "here"]
        return registration.practice(None, registration.parse([*options, *where]))

    monkeypatch.setattr(conditions, "run", take)
    monkeypatch.setattr(conditions, "shown_by_ct", lambda what: None)
    assert len(measured("--only", "frontal", "--starts", "1")) == 1
    both = measured("--only", "frontal", "--starts", "2")
    again = measured("--only", "sdd", "--starts", "0")
    assert tried == [("frontal", 0), ("frontal", 1)] and len((tmp_path / "log").read_text().splitlines()) == 2
    pd.testing.assert_frame_equal(again, both)
    stored = pd.read_csv(tmp_path / "here-conditions.csv", dtype={"commit": str})
    assert list(stored.columns) == list(both.columns) and list(stored["error"]) == [0.5, 1.5]
    assert (stored["commit"] == machine.commit()).all() and (stored["ct"] == radiographs.CT.name).all()
    assert (tmp_path / "here-conditions.md").read_text() == trust.as_markdown(both)


@needs_chest
def test_a_condition_is_run_from_start_to_end(tmp_path):
    def right(subject, xrays, init, refine, labels):
        return SimpleNamespace(
            pose=init,
            similarity=1.0,
            reason=None,
            covariance=torch.eye(6).double(),
            total_covariance=torch.eye(6).double(),
        )

    chosen = registration.parse(["--only", "frontal", "--cache", str(tmp_path), "--starts", "1"])
    (row,) = conditions.collect(right, chosen).to_dict("records")
    assert row["error"] == row["start"] > 5 and row["distance"] == row["total"] > 0


@pytest.mark.slow
@needs_chest
def test_a_long_valley_is_walked_to_its_end(tmp_path):
    "The pose of this X-ray lies at the end of a long valley, in which it was left, and trusted."
    chosen = registration.parse(["--only", "ends cut", "--cache", str(tmp_path)])
    found = conditions.run(
        "ends cut", conditions.shown_by_ct("ends cut"), 1001, partial(register, verbose=False), chosen
    )
    assert found.error < 1 and found.reason is None


@pytest.mark.slow
@needs_chest
def test_details_tell_which_optimum_is_right(tmp_path):
    "Of the middle third of a CT, coarse stages preferred a pose 53 mm off, which was then the only one to be improved."
    chosen = registration.parse(["--only", "middle third", "--cache", str(tmp_path)])
    subject = conditions.shown_by_ct("middle third")
    assert conditions.run("middle third", subject, 1000, partial(register, verbose=False), chosen).error < 3
