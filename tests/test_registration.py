"""The driver of registrations: what it accepts, which attempt it keeps, and what its result holds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torchio import Subject

from diffdrr.compare import target_registration_error
from diffdrr.geometry import RigidTransform, convert, pose_from_view, twist_to_matrix
from diffdrr.registration import (
    Objective,
    Registrar,
    RegistrationResult,
    Stage,
    levenberg_marquardt,
    make_views,
    pyramid,
    register,
    search,
)
from diffdrr.registration import pipeline as registration
from diffdrr.rendering import DRR
from diffdrr.volumes import load_example_ct
from diffdrr.xrays import XRay, invert, xray_of_rendering

QUICK = (Stage(32, 0.15, 3, float("inf")), Stage(64, 0.05, 1, 2.0))
POINTS = torch.rand(1, 100, 3, generator=torch.Generator().manual_seed(0)) * 200 - 100  # mm


@pytest.fixture(scope="module")
def subject() -> Subject:
    return load_example_ct(shape=(128, 128, 66), spacing=(2.8, 2.8, 5.0))


@pytest.fixture(scope="module")
def drr(subject: Subject) -> DRR:
    return DRR(subject, sdd=1020.0, height=64, delx=6.0, renderer="trilinear")


@pytest.fixture(scope="module")
def true() -> RigidTransform:
    return pose_from_view("LAO 10", 850.0, "AP")


@pytest.fixture(scope="module")
def xray(drr: DRR, true: RigidTransform) -> XRay:
    with torch.no_grad():
        return xray_of_rendering(drr(true, n_points=None), drr.detector, true)


def near(true: RigidTransform) -> RigidTransform:
    "Move a pose by a few degrees and millimetres."
    return true.compose(
        convert(
            torch.tensor([[0.05, 0.05, -0.05]]),
            torch.tensor([[10.0, 5.0, -5.0]]),
            parameterization="euler_angles",
            convention="ZXY",
        ).to(true.matrix)
    )


def error(result: RegistrationResult, true: RigidTransform) -> float:  # mm
    return target_registration_error(true, result.pose, POINTS).item()


def test_an_xray_brings_its_geometry_its_mask_and_its_pose(subject: Subject, xray: XRay, true: RigidTransform):
    result = register(subject, xray, schedule=QUICK, n_starts=1, verbose=False)
    assert error(result, true) < 0.5 and not result.failed
    hidden = replace(xray, image=xray.image.clone(), mask=xray.mask.clone())
    hidden.image[..., :16, :] = torch.nan
    hidden.mask[..., :16, :] = 0
    assert error(register(subject, hidden, schedule=QUICK, n_starts=1, verbose=False), true) < 0.5


def test_a_volume_that_is_optimised_can_be_registered(subject: Subject, drr: DRR, xray: XRay):
    learned = DRR(subject, sdd=1020.0, height=64, delx=6.0, renderer="trilinear")
    learned.density = torch.nn.Parameter(learned.density)
    plain, found = (
        register(each, xray, schedule=QUICK, n_starts=1, verbose=False).pose.matrix for each in (drr, learned)
    )
    assert torch.equal(found, plain) and not found.requires_grad


def test_a_registrar_averages_voxels_once(monkeypatch: pytest.MonkeyPatch, subject: Subject, xray: XRay):
    averaged, block_mean = [], pyramid.block_mean
    monkeypatch.setattr(pyramid, "block_mean", lambda *args: averaged.append(args) or block_mean(*args))
    registrar = Registrar(subject, schedule=QUICK)
    first = registrar(xray, n_starts=1, verbose=False)
    n, second = len(averaged), registrar(xray, n_starts=1, verbose=False)
    assert n == len(averaged) == 3  # two sizes, and the vertebrae
    assert torch.equal(first.pose.matrix, second.pose.matrix)


def test_all_of_a_ct_is_one_body_without_labels(subject: Subject, xray: XRay, true: RigidTransform):
    unlabelled = Subject(volume=subject.volume, density=subject.density, mask=None, reorient=subject.reorient)
    brief = dict(init=near(true), schedule=QUICK, n_starts=1, verbose=False)
    rigid, plain = register(subject, xray, labels=[], **brief), register(unlabelled, xray, **brief)
    assert torch.equal(rigid.pose.matrix, plain.pose.matrix)
    named = register(subject, xray, labels=["rib_left_5", "rib_right_5"], **brief)
    assert not torch.equal(named.pose.matrix, rigid.pose.matrix) and error(named, true) < 0.5


def test_a_drr_with_another_geometry_is_refused(subject: Subject, xray: XRay, true: RigidTransform):
    other = DRR(subject, sdd=1060.0, height=64, delx=6.6)
    with pytest.raises(
        ValueError, match="but has sdd=1060 instead of 1020, delx=6.6 instead of 6, dely=6.6 instead of 6"
    ):
        register(other, xray, true, verbose=False)
    with pytest.raises(ValueError, match="reverse_x_axis=False instead of True"):
        register(DRR(subject, sdd=1020.0, height=64, delx=6.0, reverse_x_axis=False), xray, true, verbose=False)


def test_raw_values_are_refused(subject: Subject, xray: XRay):
    with pytest.raises(ValueError, match="diffdrr.xrays.prepare makes them"):
        register(subject, invert(xray), verbose=False)


def test_the_backend_that_was_chosen_renders(subject: Subject, xray: XRay, true: RigidTransform):
    drr = DRR(subject, sdd=1020.0, height=64, delx=6.0, backend="torch")
    made = pyramid.make_pyramid(make_views(drr, xray.image, true), [32, 64])
    assert {view.drr.renderer.backend for views in made.values() for view in views} == {"torch"}


def test_the_trusted_attempt_is_kept(monkeypatch: pytest.MonkeyPatch, drr: DRR, xray: XRay, true: RigidTransform):
    reasons = iter(["a reason", None])
    monkeypatch.setattr(registration, "reason_to_doubt", lambda *args, **kwargs: next(reasons))
    assert not register(drr, xray.image, near(true), schedule=QUICK, n_starts=10, verbose=False).failed


def test_a_random_start_that_fits_the_negative_is_no_reason_to_doubt(
    monkeypatch: pytest.MonkeyPatch, drr: DRR, xray: XRay, true: RigidTransform
):
    best_starts = registration.best_starts
    monkeypatch.setattr(
        registration, "best_starts", lambda *args: best_starts(*args)._replace(negative=0.999)
    )  # better than the pose that is found
    assert not register(drr, xray.image, near(true), schedule=QUICK, n_starts=10, verbose=False).failed


def test_a_subject_made_by_hand(subject: Subject, xray: XRay, true: RigidTransform):
    plain = Subject(volume=subject.volume, density=subject.density, mask=None, reorient=subject.reorient)
    result = register(
        DRR(plain, sdd=1020.0, height=64, delx=6.0), xray.image, near(true), schedule=QUICK, n_starts=1, verbose=False
    )
    assert torch.equal(result.pose_in_scanner.matrix, result.pose.matrix)


def test_digits_survive_in_a_file(subject: Subject, xray: XRay, true: RigidTransform, tmp_path: Path):
    drr = DRR(subject, sdd=1020.0, height=64, delx=6.0).double()
    result = register(drr, xray.image, near(true), schedule=QUICK, n_starts=1, verbose=False)
    result.save(tmp_path / "result.json")
    assert (
        torch.equal(RegistrationResult.load(tmp_path / "result.json").pose.matrix, result.pose.matrix)
        and result.pose.matrix.dtype == torch.float64
    )


def test_iterations_are_counted_from_where_a_stage_begins(drr: DRR, xray: XRay, true: RigidTransform):
    def still(objective, start, robustness):
        return registration.levenberg_marquardt(objective, start, robustness, iterations=0)

    result = register(drr, xray.image, true, schedule=QUICK, n_starts=1, solver=still, verbose=False)
    assert result.iterations == 0 and list(result.trace.pixels) == [32, 64]


def test_results_and_placements_compare_by_identity(drr: DRR, xray: XRay, true: RigidTransform):
    result = register(drr, xray.image, true, schedule=QUICK, n_starts=1, verbose=False)
    assert result == result and result != replace(result, covariance=result.covariance.clone()) and hash(result)


def test_a_start_that_is_right_stays_right(drr: DRR, xray: XRay, true: RigidTransform):
    "Few pixels can lead away from it; the solver does so here."

    def astray(objective, start, robustness):
        moves = torch.tensor([[0.0, 60, 0, 0.5, 0, 0]]) * (objective.views[0].xray.camera.height < 64)
        away = start.moved(moves.expand(len(start), 6), objective.pivot)
        return [*registration.levenberg_marquardt(objective, start, robustness, iterations=0)] + [
            registration.levenberg_marquardt(objective, away, robustness, iterations=0)[0]
        ]

    result = register(drr, xray.image, true, schedule=QUICK, n_starts=1, solver=astray, verbose=False)
    assert error(result, true) < 0.01
    assert list(result.trace.pixels) == [32, 32, 64, 64]


def test_what_pictures_do_not_tell_the_spread_holds(drr: DRR, true: RigidTransform):
    noise = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    run = dict(schedule=QUICK, n_starts=1, attempts=1, verbose=False)
    held = error(register(drr, noise, true, spread=(0.5, 1.0), **run), true)
    assert held < 5 < error(register(drr, noise, true, spread=(0.0, 0.0), **run), true)


def test_a_pose_that_is_too_far_from_the_start_is_doubted(drr: DRR, xray: XRay, true: RigidTransform):
    run = dict(schedule=QUICK, n_starts=1, verbose=False)
    result = register(drr, xray.image, near(true), spread=(0.5, 1.5), **run)
    assert "standard deviations off the initial one" in result.reason
    assert not register(drr, xray.image, near(true), spread=(3.0, 10.0), **run).failed


def test_a_pose_that_is_still_on_its_way_is_doubted(drr: DRR, xray: XRay, true: RigidTransform):
    hasty = partial(levenberg_marquardt, iterations=1)
    result = register(drr, xray.image, near(true), schedule=QUICK, n_starts=1, solver=hasty, verbose=False)
    assert "the last step still moved the CT by" in result.reason


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_noise_is_no_reason_to_doubt(drr: DRR, xray: XRay, true: RigidTransform, seed: int):
    noise = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(seed))
    noisy = xray.image + 0.3 * xray.image.std() * noise
    result = register(drr, noisy, near(true), schedule=QUICK, n_starts=1, verbose=False)
    assert error(result, true) < 3 and result.similarity < 0.8 and not result.failed


@pytest.mark.slow
def test_a_pose_that_does_not_stand_out_is_doubted(drr: DRR, xray: XRay, true: RigidTransform):
    upside_down = RigidTransform(torch.diag(torch.tensor([-1.0, 1, -1, 1])) @ true.matrix)
    run = dict(schedule=QUICK, n_starts=20, attempts=1, verbose=False)
    assert register(drr, xray.image, upside_down, **run).failed


def test_a_curved_response_of_the_detector_is_no_misfit(drr: DRR, xray: XRay, true: RigidTransform):
    processed = 1 - torch.exp(-3 * xray.image / xray.image.max())
    result = register(drr, processed, near(true), schedule=QUICK, n_starts=1, verbose=False)
    assert error(result, true) < 1 and result.similarity > 0.98 and not result.failed


def test_only_the_field_counts(drr: DRR, xray: XRay, true: RigidTransform):
    "What the mask hides is no part of the picture, also for intrinsics, which are those of the whole detector."
    mask = torch.zeros_like(xray.image)
    mask[..., 20:44, 20:44] = 1
    found = register(drr, xray.image, near(true), mask=mask, schedule=QUICK, n_starts=50, verbose=False)
    assert error(found, true) < 1 and not found.failed
    mask[..., 24:60] = 1  # off the middle
    run = dict(schedule=QUICK, n_starts=1, refine={"x0": 1.0}, verbose=False)
    inside, whole = (register(drr, xray.image, true, mask=m, **run) for m in (mask, None))
    assert inside.intrinsics[0]["x0"] == pytest.approx(whole.intrinsics[0]["x0"], abs=1.0)


def test_known_intrinsics_are_held(subject: Subject, xray: XRay, true: RigidTransform):
    wrong = DRR(subject, sdd=1020.0, height=64, delx=6.0, x0=8.0, renderer="trilinear")
    run = dict(schedule=QUICK, n_starts=1, verbose=False)
    held = register(wrong, xray.image, true, refine={"x0": 0.01}, **run).intrinsics[0]["x0"]
    assert held == pytest.approx(8.0, abs=0.1)
    with pytest.raises(ValueError, match=r"refine\['x0'\]"):
        register(wrong, xray.image, true, refine={"x0": -1.0}, **run)


SMALL = dict(shape=(64, 64, 33), spacing=(5.6, 5.6, 10.0))


@pytest.fixture(scope="module")
def small() -> dict[str, DRR]:
    "The example with few voxels and few pixels, by its orientation."
    return {
        orientation: DRR(load_example_ct(orientation=orientation, **SMALL), 1020.0, 64, 6.0, renderer="trilinear")
        for orientation in ("AP", "PA")
    }


def taken_from(drr: DRR, view: str, seed: int, haze: float = 0.0) -> torch.Tensor:
    "Take an X-ray from near a view, with what a CT does not show."
    generator = torch.Generator().manual_seed(seed)
    twist = torch.randn(1, 6, generator=generator) * torch.tensor([15.0] * 3 + [0.1] * 3)
    pose = RigidTransform(twist_to_matrix(twist) @ pose_from_view(view, 850.0, drr.orientation).matrix)
    with torch.no_grad():
        image = drr(pose, n_points=None)
    noise = torch.nn.functional.avg_pool2d(torch.randn(1, 1, 66, 66, generator=generator), 3, stride=1)
    return image + haze * image.std() * noise


@pytest.mark.parametrize(
    "read, view, fits, remedy",
    [
        ("PA", "AP", "with left and right exchanged (", "orientation='AP' instead of 'PA', and make the initial pose"),
        pytest.param(
            "AP",
            "PA",
            "from the other side of the patient (",
            "turn the initial pose by 180 degrees",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "PA",
            "PA",
            "from the other side of the patient with left and right exchanged (",
            "orientation='AP' instead of 'PA', and make the initial pose for the other side",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["mirrored", "behind", "both"],
)
def test_the_right_side_is_named(small: dict[str, DRR], read: str, view: str, fits: str, remedy: str):
    "A picture of the orientation AP, taken from the front, is registered as another, and from another side."
    xray = taken_from(small["AP"], "AP", 0)
    result = register(small[read], xray, pose_from_view(view, 850.0, read), schedule=QUICK, n_starts=50, verbose=False)
    assert result.failed and f"the X-ray fits {fits}" in result.reason and remedy in result.reason


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_the_right_side_is_never_blamed(small: dict[str, DRR], seed: int):
    "Pictures are so unlike the CT that all sides are tried; every third begins upside down."
    view, orientation = ("AP", "LAO 30", "PA", "RAO 20")[seed % 4], ("AP", "PA")[seed % 2]
    xray = taken_from(small[orientation], view, seed, haze=1.0)
    init = pose_from_view(view, 850.0, orientation).matrix
    if seed % 3 == 0:
        init = torch.diag(torch.tensor([-1.0, 1, -1, 1])) @ init
    brief = dict(schedule=QUICK, n_starts=50, attempts=1, verbose=False)
    result = register(small[orientation], xray, RigidTransform(init), **brief)
    assert result.similarity < registration.ALIKE
    assert "fits with left" not in str(result.reason) and "other side" not in str(result.reason)


def test_of_equal_stages_only_the_last_bends(
    monkeypatch: pytest.MonkeyPatch, drr: DRR, xray: XRay, true: RigidTransform
):
    bends = []

    class Recorded(Objective):
        def __init__(self, *args: object, **options: object) -> None:
            bends.append(options["bends"])
            super().__init__(*args, **options)

    monkeypatch.setattr(search, "Objective", Recorded)
    register(drr, xray.image, near(true), schedule=QUICK[1:] * 2, n_starts=1, verbose=False)
    assert bends[:2] == [False, True]


def shown(height: int, delx: float) -> tuple[DRR, torch.Tensor, RigidTransform, RigidTransform]:
    "A DRR, a picture without noise, its pose, and one beside it."
    subject = load_example_ct(shape=(64, 64, 64), spacing=(5.6, 5.6, 5.2))
    drr, true = DRR(subject, sdd=1020.0, height=height, delx=delx), pose_from_view("AP", 850.0)
    place = dict(parameterization="euler_angles", convention="ZXY", degrees=True)
    beside = convert(torch.tensor([[3.0, -3.0, 2.0]]), torch.tensor([[10.0, 860.0, -8.0]]), **place)
    return drr, drr(true).detach(), true, beside


@pytest.mark.parametrize("values", [torch.float32, torch.int16])
def test_air_without_noise_tells_nothing_of_noise(values: torch.dtype):
    drr, xray, _, beside = shown(96, 8.0)
    result = register(drr, xray.to(values), beside, verbose=False)
    assert not result.failed and result.standard_deviation[:3].max() < 3


def test_a_picture_that_says_too_little_is_doubted():
    drr, xray, _, beside = shown(12, 22.0)
    result = register(drr, xray, beside, verbose=False)
    assert "the pictures hardly tell the pose" in result.reason and result.sensitivity == {}


@pytest.mark.filterwarnings("ignore:.* of the X-ray shows nothing")
def test_a_frame_of_zeros_does_not_count():
    drr, xray, true, beside = shown(64, 4.0)
    xray[..., :8, :] = xray[..., -8:, :] = xray[..., :8] = xray[..., -8:] = 0
    result = register(drr, xray, beside, verbose=False)
    points = torch.rand(1, 100, 3) * 200 - 100
    assert not result.failed and target_registration_error(true, result.pose, points).item() < 3
