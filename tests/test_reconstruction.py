"""The projector has a matched transpose, the methods find what they should, and wrong input is refused."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import lsqr
from torch.utils._python_dispatch import TorchDispatchMode

from diffdrr.geometry import Camera, RigidTransform, convert
from diffdrr.reconstruction import (
    CGLS,
    SIRT,
    Batch,
    Descent,
    FreeGeometry,
    Projector,
    TotalVariation,
    analytic,
    circular_orbit,
    fdk,
)
from diffdrr.rendering import DRR
from diffdrr.volumes import Ellipsoid, Grid, read

WATER = 0.02  # 1/mm
ORIENTATIONS = ("AP", "PA")


def make_drr(shape=(12, 10, 9), spacing=(8.0, 9.0, 10.0), orientation="AP", **camera) -> DRR:
    "An unequal grid with something in it, so that a wrong axis is noticed."
    hu = torch.full(shape, -1000.0)
    hu[tuple(slice(n // 4, -(n // 4)) for n in shape)] = 100.0
    hu[shape[0] // 2, shape[1] // 2, shape[2] // 2] = 800.0
    subject = read(hu, affine=np.diag([*spacing, 1.0]), orientation=orientation)
    return DRR(subject, **dict(sdd=700.0, height=14, width=11, delx=15.0, dely=13.0) | camera)


def oblique(n: int, dtype=torch.float32, orientation="AP") -> RigidTransform:
    generator = torch.Generator().manual_seed(1)
    rotation, shift = torch.randn(2, n, 3, generator=generator, dtype=dtype)
    return convert(
        rotation,
        torch.tensor([0.0, 450.0 if orientation == "AP" else -450.0, 0.0], dtype=dtype) + 10 * shift,
        parameterization="euler_angles",
        convention="ZXY",
    )


def mismatch(projector: Projector) -> float:
    "Compare the products of random volumes and pictures."
    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.rand(shape, generator=generator, dtype=projector.zeros().dtype)
        for shape in (projector.volume_shape, projector.picture_shape)
    )
    there, back = ((a * b).sum(dtype=torch.float64) for a, b in ((projector(x), y), (x, projector.T(y))))
    return abs(float(there / back) - 1)


@pytest.mark.parametrize("renderer", ["siddon", "trilinear"])
@pytest.mark.parametrize("beam", ["cone", "parallel"])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_transpose_is_matched(renderer, beam, orientation, dtype, tolerance):
    drr = make_drr(orientation=orientation, renderer=renderer, beam=beam).to(dtype)
    pose = oblique(5, dtype, orientation)
    assert mismatch(Projector.from_drr(drr, pose, views_at_once=2)) < tolerance
    camera = drr.detector.camera.replace(x0=torch.arange(5.0, dtype=dtype))
    assert mismatch(Projector.from_drr(drr, pose, camera, views_at_once=2)) < tolerance


@pytest.mark.parametrize("renderer", ["siddon", "trilinear"])
def test_a_camera_and_a_grid_are_enough(renderer: str):
    drr = make_drr(renderer=renderer)
    camera = Camera(sdd=700.0, height=14, width=11, delx=15.0, dely=13.0)
    grid = Grid.around((12, 10, 9), (8.0, 9.0, 10.0))
    expected = drr(oblique(3), **drr.renderer.exact)
    torch.testing.assert_close(
        Projector(camera, grid, oblique(3), renderer=renderer)(drr.density), expected, rtol=1e-5, atol=1e-5
    )
    double = Projector(camera, grid, oblique(3).to(torch.float64), renderer=renderer)
    torch.testing.assert_close(double(drr.density.double()).float(), expected, rtol=1e-4, atol=1e-4)
    volume, pictures = torch.rand(double.volume_shape).double(), torch.rand(double.picture_shape).double()
    back, seen = double.there_and_back(volume, lambda seen, which: pictures[which] - seen)
    torch.testing.assert_close(seen, double(volume), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(back, double.T(pictures - seen), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(reducefn="max"), "renderer must integrate.*not 'max'"),
        (dict(reducefn=torch.amax), "renderer must integrate"),
        (dict(stop_gradients_through_grid_sample=True), "renderer must be differentiable in the volume"),
    ],
)
def test_renderers_that_are_not_linear_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Projector.from_drr(make_drr(**options), oblique(2))


def test_views_are_those_of_the_drr():
    drr, pose = make_drr(), oblique(5)
    projector = Projector.from_drr(drr, pose, views_at_once=2)
    volume = drr.density.clone()
    torch.testing.assert_close(projector(volume), drr(pose), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(projector[1::2](volume), drr(pose)[1::2], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(projector[torch.tensor([3, 0])](volume), drr(pose)[[3, 0]], rtol=1e-6, atol=1e-6)


def test_a_coarse_grid_has_a_shape_of_its_own():
    coarse = make_drr().coarsen(1, (2, 2, 2))
    projector = Projector.from_drr(coarse, oblique(2))
    assert torch.equal(projector(coarse.density), coarse(oblique(2)))
    with pytest.raises(ValueError, match=r"X = 6, Y = 5, Z = 5, not \(12, 10, 9\)"):
        projector(make_drr().density)


def test_a_compiled_renderer_integrates_exactly():
    plain, compiled = (make_drr(renderer="trilinear", compile_renderer=compile) for compile in (False, True))
    exact = Projector.from_drr(plain, oblique(2))(plain.density)
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(Projector.from_drr(compiled, oblique(2))(plain.density), exact)


def test_gradients_pass_through_both():
    projector = Projector.from_drr(
        make_drr(shape=(4, 3, 5), height=3, width=4).double(), oblique(2, torch.float64), views_at_once=1
    )
    volume = torch.rand(projector.volume_shape, dtype=torch.float64, requires_grad=True)
    pictures = torch.rand(projector.picture_shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(projector, volume)
    assert torch.autograd.gradcheck(projector.T, pictures)


def test_scipy_finds_the_same_as_cgls():
    drr = make_drr(shape=(5, 6, 4)).double()
    projector = Projector.from_drr(drr, oblique(12, torch.float64))
    true = torch.rand(projector.volume_shape, dtype=torch.float64)
    pictures = projector(true)
    ours = CGLS(projector, pictures).run(400, tolerance=1e-10, verbose=False)
    theirs = lsqr(projector.as_linear_operator(), pictures.numpy().ravel(), atol=1e-12, btol=1e-12)[0]
    np.testing.assert_allclose(ours.ravel(), theirs, atol=1e-5)
    torch.testing.assert_close(ours, true, rtol=0, atol=1e-5)


Ball = tuple[Projector, torch.Tensor, torch.Tensor, torch.Tensor]


def make_ball(n_views: int = 72, orientation: str = "AP", **camera) -> Ball:
    """Exact line integrals of a ball of water, of radius 50 mm, seen from a circle; where its inside and its outside
    are."""
    drr = make_drr(
        shape=(33, 35, 21),
        spacing=(4.0, 4.0, 5.0),
        orientation=orientation,
        **dict(sdd=1000.0, height=50, width=70, delx=4.0, dely=4.0) | camera,
    )
    projector = Projector.from_drr(drr, circular_orbit(n_views, 600.0, orientation=orientation))
    solid = Ellipsoid(np.array([3.0, -5.0, 2.0]), np.diag([50.0, 50.0, 50.0]))
    source, target = (x.double().numpy() for x in projector.views.rays())
    enter, leave = solid.interval(np.broadcast_to(source, target.shape), target)
    length = np.linalg.norm(target - source, axis=-1) * np.clip(np.nan_to_num(leave - enter), 0, None)
    pictures = WATER * torch.from_numpy(length).float().view(projector.picture_shape)
    voxels = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float32) for n in projector.volume_shape])
    distance = (drr.affine(voxels[None])[0] - torch.tensor([3.0, -5.0, 2.0])).norm(dim=1).view(projector.volume_shape)
    return projector, pictures, distance < 40, (distance > 60) & (distance < 65)


@pytest.fixture(scope="module")
def ball() -> Ball:
    return make_ball()


def test_fdk_finds_the_attenuation_of_water(ball):
    projector, pictures, inside, outside = ball
    for hann in (False, True):
        volume = fdk(projector, pictures, hann=hann, verbose=False)
        assert volume[inside].mean().item() == pytest.approx(WATER, rel=0.02)  # cone artefacts grow with the angle
        assert volume[outside].mean().abs().item() < 0.05 * WATER
    assert volume[inside].std() < 0.05 * WATER


@pytest.mark.parametrize(("x0", "width"), [(10.0, 70), (30.0, 50), (60.0, 40), (-60.0, 40)])
@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("reverse_x_axis", [True, False])
def test_fdk_takes_displaced_detectors(x0, width, orientation, reverse_x_axis):
    projector, pictures, inside, outside = make_ball(
        orientation=orientation, x0=x0, width=width, reverse_x_axis=reverse_x_axis
    )
    volume = fdk(projector, pictures, verbose=False)
    assert volume[inside].mean().item() == pytest.approx(WATER, rel=0.02)
    assert volume[inside].std() < 0.05 * WATER
    assert volume[outside].mean().abs().item() < 0.05 * WATER


def test_fdk_wants_to_see_the_axis():
    projector, pictures, *_ = make_ball(x0=100.0, width=40)
    with pytest.raises(ValueError, match="sees the axis: x0 displaces it too far"):
        fdk(projector, pictures)


def test_fdk_takes_views_in_any_order_and_equal_calibrations(ball):
    projector, pictures, *_ = ball
    expected = fdk(projector, pictures, verbose=False)
    order = torch.randperm(len(projector), generator=torch.Generator().manual_seed(0))
    camera, poses = projector.views.camera, projector.views.pose.matrix
    same = Projector(camera.replace(x0=torch.zeros(len(projector))), projector.grid, RigidTransform(poses[order]))
    torch.testing.assert_close(fdk(same, pictures[order], verbose=False), expected, rtol=0, atol=1e-3 * WATER)
    projector, pictures, inside, _ = make_ball(delx=8.0, dely=8.0)
    wide = Projector(camera.replace(delx=8.0, dely=8.0), projector.grid, projector.views.pose)
    assert torch.equal(fdk(wide, pictures, verbose=False), fdk(projector, pictures, verbose=False))


class Largest(TorchDispatchMode):
    "Remember how many numbers the largest tensor has that was made."

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        if isinstance(result, torch.Tensor):
            self.numbers = max(self.numbers, result.numel())
        return result


def test_fdk_goes_through_voxels_some_at_a_time(monkeypatch: pytest.MonkeyPatch):
    projector = Projector.from_drr(make_drr(shape=(40, 41, 42), height=6, width=5), circular_orbit(4, 450.0))
    pictures = torch.rand(projector.picture_shape)
    expected = fdk(projector, pictures, verbose=False)
    monkeypatch.setattr(analytic, "VOXELS_AT_ONCE", 1000)
    with Largest() as largest:
        torch.testing.assert_close(fdk(projector, pictures, verbose=False), expected, rtol=1e-4, atol=1e-6)
    assert largest.numbers <= expected.numel()


@pytest.mark.parametrize(
    ("method", "options", "steps"),
    [
        (SIRT, dict(subsets=6), 10),
        (CGLS, {}, 8),
        (TotalVariation, dict(weight=0.01), 80),
        pytest.param(Descent, dict(optimizer=torch.optim.Adam, rate=1e-3), 150, marks=pytest.mark.slow),
    ],
)
def test_methods_find_the_attenuation_of_water(ball, method, options, steps):
    projector, pictures, inside, outside = ball
    solver = method(projector[::4], pictures[::4], **options)
    volume = solver.run(steps, verbose=False)
    assert volume[inside].mean().item() == pytest.approx(WATER, rel=0.03)
    assert solver.residuals[-1] < 0.045  # what voxels can not say of a ball
    assert min(solver.residuals) == pytest.approx(solver.residuals[-1], rel=0.5)


@pytest.mark.slow
def test_total_variation_minimises_its_objective_and_helps_against_few_views(ball):
    projector, pictures, inside, outside = ball
    few = projector[::9]
    noisy = pictures[::9] + 0.05 * torch.randn(few.picture_shape, generator=torch.Generator().manual_seed(0))
    smooth = TotalVariation(few, noisy, weight=1.0)
    objectives = []
    smooth.run(150, callback=lambda solver: objectives.append(solver.objective()), verbose=False)
    assert objectives[-1] < objectives[20] < smooth.objective(smooth.projector.zeros())
    assert objectives[-1] == pytest.approx(min(objectives), rel=1e-2)
    other = SIRT(few, noisy, subsets=4).run(20, verbose=False)

    def error(volume):
        return (volume[inside] - WATER).square().mean().sqrt()

    assert error(smooth.volume) < 0.3 * error(other)
    assert smooth.volume.min() >= 0


def lbfgs(parameters, lr):
    return torch.optim.LBFGS(parameters, lr=1.0, max_iter=12, line_search_fn="strong_wolfe")


@pytest.mark.slow
def test_lbfgs_works_too(ball):
    projector, pictures = (x[::4] for x in ball[:2])

    def penalty(volume):
        return 1e4 * volume.clamp(max=0).square().mean()

    plain, penalised = (
        Descent(projector, pictures, lbfgs, rate=1.0, nonnegative=False, regularizer=regularizer)
        for regularizer in (None, penalty)
    )
    for solver in (plain, penalised):
        solver.run(8, verbose=False)
        assert solver.residuals[-1] < 0.05
    assert penalised.volume.min() > 0.05 * plain.volume.min()
    with pytest.raises(ValueError, match="nonnegative must be False for LBFGS"):
        Descent(projector, pictures, lbfgs, rate=1.0)


def solvers(projector, pictures):
    return {
        "SIRT": lambda: SIRT(projector, pictures, subsets=2),
        "CGLS": lambda: CGLS(projector, pictures),
        "TotalVariation": lambda: TotalVariation(projector, pictures, weight=0.1),
        "Descent": lambda: Descent(
            FreeGeometry(projector, ["x0"]), pictures, torch.optim.Adam, rate=1e-3, batch=Batch(views=3)
        ),
    }


@pytest.mark.parametrize("name", ["SIRT", "CGLS", "TotalVariation", "Descent"])
def test_resumed_is_uninterrupted(ball, tmp_path: Path, name: str):
    projector, pictures, *_ = ball
    make = solvers(projector[::9], pictures[::9])[name]
    whole = make()
    whole.run(5, verbose=False)

    def interrupt(solver):
        if len(solver.residuals) == 3:
            raise KeyboardInterrupt

    interrupted = make()
    with pytest.raises(KeyboardInterrupt):
        interrupted.run(5, checkpoint=tmp_path / "state.pt", callback=interrupt, verbose=False)
    resumed = make()
    resumed.load(tmp_path / "state.pt")
    for solver in (interrupted, resumed):
        solver.run(2, verbose=False)
        torch.testing.assert_close(solver.volume, whole.volume, rtol=0, atol=0)
        assert solver.residuals == whole.residuals
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


@pytest.mark.parametrize(("optimizer", "refine"), [(torch.optim.Adam, False), (torch.optim.Adam, True), (lbfgs, False)])
def test_a_step_that_is_interrupted_leaves_nothing_behind(ball, optimizer, refine):
    projector, pictures = (x[::9] for x in ball[:2])
    calls, stop = 0, None

    def regularizer(volume):
        nonlocal calls
        calls += 1
        if calls == stop:
            raise KeyboardInterrupt
        return 1e-3 * volume.square().mean()

    def make():
        return Descent(
            FreeGeometry(projector) if refine else projector,
            pictures,
            optimizer,
            rate=1e-3,
            regularizer=regularizer,
            batch=Batch(views=4),
            nonnegative=False,
        )

    whole = make()
    whole.run(2, verbose=False)
    interrupted = make()
    interrupted.run(1, verbose=False)
    stop = calls + (3 if optimizer is lbfgs else 1)
    with pytest.raises(KeyboardInterrupt):
        interrupted.run(1, verbose=False)
    interrupted.run(1, verbose=False)
    torch.testing.assert_close(interrupted.volume, whole.volume, rtol=0, atol=0)
    assert interrupted.residuals == whole.residuals


@pytest.mark.parametrize("method", [SIRT, CGLS])
def test_solvers_keep_no_graph(ball, method):
    projector, pictures = (x[::9] for x in ball[:2])
    solver = method(FreeGeometry(projector, ["x0"])(), pictures.clone().requires_grad_())
    solver.run(2, verbose=False)
    assert not any(x.requires_grad for x in solver.state.values())


def test_files_of_other_runs_are_refused(ball, tmp_path: Path):
    projector, pictures = (x[::9] for x in ball[:2])
    CGLS(projector, pictures).run(1, checkpoint=tmp_path / "cgls.pt", verbose=False)
    Descent(projector, pictures, torch.optim.Adam, rate=1e-3).run(1, checkpoint=tmp_path / "adam.pt", verbose=False)
    (tmp_path / "text.pt").write_text("hello")
    torch.save({"x": 1}, tmp_path / "foreign.pt")
    for solver, name, message in (
        (SIRT(projector, pictures), "cgls", "with method CGLS, not SIRT"),
        (CGLS(projector[::2], pictures[::2]), "cgls", r"with shape of pictures \(8, 1, 50, 70\), not \(4, 1, 50, 70\)"),
        (CGLS(projector, 2 * pictures), "cgls", "with norm of pictures"),
        (Descent(projector, pictures, lbfgs, rate=1.0, nonnegative=False), "adam", "with optimiser Adam, not LBFGS"),
        (
            Descent(FreeGeometry(projector), pictures, torch.optim.Adam, rate=1e-3),
            "adam",
            "with geometry False, not True",
        ),
        (CGLS(projector, pictures), "text", "text.pt' does not hold the state of a solver"),
        (CGLS(projector, pictures), "foreign", "foreign.pt' does not hold the state of a solver"),
    ):
        with pytest.raises(ValueError, match=message):
            solver.load(tmp_path / f"{name}.pt")
        assert not solver.residuals
    with pytest.raises(FileNotFoundError):
        CGLS(projector, pictures).load(tmp_path / "none.pt")


def test_geometry_is_refined(ball):
    projector, pictures, *_ = ball
    volume = SIRT(projector[::4], pictures[::4], subsets=6).run(10, verbose=False)
    moved = FreeGeometry(projector[::12], ["x0", "y0"])
    with torch.no_grad():
        moved.shift.copy_(3 * torch.randn(moved.shift.shape, generator=torch.Generator().manual_seed(0)))
        shaken = moved()(volume)
    camera = moved().views.camera
    torch.testing.assert_close(torch.stack([camera.x0, camera.y0], dim=1), moved.shift, rtol=0, atol=0)
    geometry = FreeGeometry(projector[::12], ["x0", "y0"], rate=0.3)
    geometry.twist.requires_grad_(False)
    Descent(geometry, shaken, torch.optim.Adam, rate=0.0, volume=volume).run(60, verbose=False)
    torch.testing.assert_close(geometry.shift, moved.shift, rtol=0, atol=0.3)  # mm, of pixels of 4 mm


def test_stopping(ball):
    projector, pictures, *_ = ball
    solver = CGLS(projector[::9], pictures[::9])
    solver.run(50, tolerance=0.1, verbose=False)
    assert solver.residuals[-1] < 0.1 <= solver.residuals[-2]
    solver.run(50, callback=lambda solver: True, verbose=False)
    assert len(solver.residuals) < 20


def test_stopping_when_nothing_changes(ball):
    projector, pictures = (x[::9] for x in ball[:2])
    noisy = pictures + 0.1 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(0))
    volumes = []
    solver = SIRT(projector, noisy, subsets=4)
    solver.run(100, change=0.02, callback=lambda solver: volumes.append(solver.volume), verbose=False)
    changes = [float((after - before).norm() / after.norm()) for before, after in zip(volumes, volumes[1:])]
    assert len(volumes) < 100
    assert changes[-1] < 0.02 <= min(changes[:-1])


def test_successive_subsets_are_far_apart(ball):
    projector, pictures = ball[:2]
    first = np.array([group.start for group in SIRT(projector, pictures, subsets=72).groups])
    apart = np.abs(np.diff(first))
    assert sorted(first) == list(range(72))
    assert np.minimum(apart, 72 - apart).min() > 20


@pytest.mark.parametrize("beam", ["cone", "parallel"])
def test_some_rays_are_those_of_whole_pictures(beam):
    drr = make_drr(beam=beam)
    projector, pixels = Projector.from_drr(drr, oblique(3), views_at_once=2), torch.tensor([5, 70, 71, 130])
    torch.testing.assert_close(
        projector(drr.density, pixels), projector(drr.density).flatten(2)[..., pixels], rtol=1e-6, atol=1e-6
    )


def test_descent_draws_rays(ball):
    projector, pictures, inside, _ = ball
    solver = Descent(projector[::4], pictures[::4], torch.optim.Adam, rate=1e-3, batch=Batch(views=6, rays=700))
    volume = solver.run(150, verbose=False)
    assert volume[inside].mean().item() == pytest.approx(WATER, rel=0.05)
    assert solver.residuals[0] == pytest.approx(1, rel=0.2)  # scaled to all pixels
    assert np.mean(solver.residuals[-10:]) < 0.06


def test_total_variation_knows_how_far_voxels_are_apart():
    drr = make_drr(shape=(6, 8, 10), spacing=(2.0, 2.0, 10.0))
    projector = Projector.from_drr(drr, circular_orbit(3, 450.0))
    solver = TotalVariation(projector, torch.zeros(projector.picture_shape), weight=3.0)
    for axis, expected in ((0, 8 * 10), (1, 6 * 10), (2, 6 * 8 / 5)):
        step = projector.zeros()
        step.narrow(axis, 3, step.shape[axis] - 3).fill_(1.0)
        assert solver.objective(step) - float(projector(step).square().sum()) / 2 == pytest.approx(
            3.0 * expected, rel=1e-3
        )


def test_one_shift_for_all_views(ball):
    projector, pictures = (x[::12] for x in ball[:2])
    volume = SIRT(projector, pictures, subsets=3).run(10, verbose=False)
    geometry, moved = (FreeGeometry(projector, ["x0"], shared=True, rate=0.2) for _ in range(2))
    with torch.no_grad():
        moved.shift.fill_(3.0)
        shifted = moved()(volume)
    assert geometry.shift.shape == (1, 1)
    geometry.twist.requires_grad_(False)
    Descent(geometry, shifted, torch.optim.Adam, rate=0.0, volume=volume).run(100, verbose=False)
    torch.testing.assert_close(geometry.shift, moved.shift, rtol=0, atol=0.1)  # mm


def test_divergence_keeps_the_last_good_volume(ball):
    projector, pictures, *_ = ball
    solver = Descent(projector[::9], pictures[::9], torch.optim.SGD, rate=1e30, nonnegative=False)
    with pytest.raises(FloatingPointError, match="Descent diverges after"):
        solver.run(50, verbose=False)
    assert solver.volume.isfinite().all()
    assert torch.equal(solver.parameter, solver.volume)


def test_wrong_input_is_refused(ball):
    projector, pictures, *_ = ball
    camera, pose = projector.views.camera, projector.views.pose
    with pytest.raises(ValueError, match="camera must be one for each of the 72 views, or one for all"):
        Projector(camera.replace(sdd=torch.full((3,), 1000.0)), projector.grid, pose)
    with pytest.raises(ValueError, match="must render whole pictures"):
        Projector.from_drr(make_drr(p_subsample=0.5), pose)
    with pytest.raises(ValueError, match=r"X = 33, Y = 35, Z = 21, not \(3, 3, 3\)"):
        projector(torch.zeros(3, 3, 3))
    with pytest.raises(ValueError, match="pictures must have shape"):
        projector.T(pictures[:3])
    with pytest.raises(ValueError, match="one picture for each view"):
        SIRT(projector, pictures[:3])
    nan = pictures.clone()
    nan[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="pictures must be finite, but 1 of 252000 pixels are NaN or infinite"):
        CGLS(projector, nan)
    with pytest.raises(ValueError, match="subsets must be a whole number from 1 to 72, not 73"):
        SIRT(projector, pictures, subsets=73)
    with pytest.raises(ValueError, match="relaxation must be between 0 and 2, not 2.5"):
        SIRT(projector, pictures, relaxation=2.5)
    with pytest.raises(ValueError, match="weight must be a positive number, not -1"):
        TotalVariation(projector, pictures, weight=-1)
    for views in (0, 2.5, 100):
        with pytest.raises(ValueError, match=f"views must be a whole number from 1 to 72, not {views}"):
            Descent(projector, pictures, torch.optim.Adam, rate=1e-3, batch=Batch(views=views))
    with pytest.raises(ValueError, match="rays must be a whole number from 1 to 3500, not 4000"):
        Descent(projector, pictures, torch.optim.Adam, rate=1e-3, batch=Batch(rays=4000))
    with pytest.raises(
        ValueError,
        match="optimizer must take parameters, in groups for volume and geometry, as torch.optim.Adam does: LBFGS",
    ):
        Descent(FreeGeometry(projector), pictures, lbfgs, rate=1.0, nonnegative=False)
    with pytest.raises(ValueError, match="intrinsics must be some of 'sdd'"):
        FreeGeometry(projector, ["focal"])
    with pytest.raises(ValueError, match="n_views must be a whole number of at least 1, not 0"):
        circular_orbit(0, 600.0)


def test_wrong_views_are_refused(ball):
    projector, *_ = ball
    camera, grid, pose, drr = projector.views.camera, projector.grid, projector.views.pose, make_drr()
    for count in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match=f"views_at_once must be a whole number of at least 1, not {count}"):
            Projector(camera, grid, pose, views_at_once=count)
    with pytest.raises(ValueError, match="pose must hold at least one view"):
        projector[100:]
    for given in (pose.matrix, [pose]):
        with pytest.raises(TypeError, match=f"pose must be a.*Transform.*not {type(given).__name__}"):
            Projector(camera, grid, given)
    with pytest.raises(TypeError, match="camera must be a Camera, not DRR; Projector.from_drr takes a DRR"):
        Projector(drr, grid, pose)
    with pytest.raises(TypeError, match=r"grid must be a Grid, not tuple; Grid\(shape, affine\) makes one"):
        Projector(camera, grid.shape, pose)
    with pytest.raises(
        ValueError, match="pose and the DRR must have the same dtype, not torch.float32 and torch.float64"
    ):
        Projector.from_drr(drr.double(), circular_orbit(3, 450.0))
    with pytest.raises(ValueError, match="pose and the DRR must have the same device, not meta and cpu"):
        Projector.from_drr(make_drr(), circular_orbit(3, 450.0).to("meta"))


@pytest.mark.parametrize("solve", [fdk, SIRT, CGLS, lambda *arguments: TotalVariation(*arguments, weight=0.1)])
def test_a_projector_that_sees_nothing_is_refused(ball, solve):
    projector, pictures, *_ = ball
    turned = Projector(projector.views.camera, projector.grid, circular_orbit(len(projector), 600.0, orientation="PA"))
    with pytest.raises(ValueError, match="no ray meets the volume"):
        solve(turned, pictures)


def test_wrong_guesses_are_refused(ball):
    projector, pictures = (x[::9] for x in ball[:2])
    with pytest.raises(ValueError, match=r"X = 33, Y = 35, Z = 21, not \(3, 3, 3\)"):
        CGLS(projector, pictures, volume=torch.zeros(3, 3, 3))
    with pytest.raises(ValueError, match="volume must be finite, but 33 of 24255 voxels are NaN or infinite"):
        CGLS(
            projector,
            pictures,
            volume=torch.full(projector.volume_shape, torch.inf).where(
                torch.arange(21) == torch.arange(35)[:, None] + 20, 0
            ),
        )
    guess = np.ones(projector.volume_shape)
    solver = CGLS(projector, pictures, volume=guess)
    assert solver.volume.dtype == torch.float32
    empty = CGLS(projector, torch.zeros_like(pictures), volume=guess)
    assert empty.run(5, verbose=False).abs().mean() < 0.5


def test_pictures_of_any_kind(ball):
    projector, pictures = (x[::4] for x in ball[:2])
    expected = fdk(projector, pictures, verbose=False)
    for given in (pictures.double(), pictures.numpy(), pictures.double().numpy()):
        torch.testing.assert_close(fdk(projector, given, verbose=False), expected, rtol=0, atol=1e-6)
        assert CGLS(projector, given).run(1, verbose=False).dtype == torch.float32
    counts = (1e4 * torch.exp(-pictures)).to(torch.int32)
    for wrong in (counts, -pictures):
        with pytest.warns(UserWarning, match="they seem to be intensities"):
            fdk(projector, wrong, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fdk(projector, pictures, verbose=False)


def test_fdk_wants_a_full_circle(ball):
    projector, pictures, *_ = ball
    with pytest.raises(ValueError, match="at least 3 views on a circle"):
        fdk(projector[:2], pictures[:2])
    with pytest.raises(ValueError, match="spread evenly over a full circle"):
        fdk(projector[:40], pictures[:40])
    camera, grid = projector.views.camera, projector.grid
    tilted = Projector(camera, grid, oblique(5))
    with pytest.raises(ValueError, match="not 5 on another path"):
        fdk(tilted, torch.zeros(tilted.picture_shape))
    angles = torch.cat([projector.views.pose.matrix, projector.views.pose.matrix[:1]])
    again = Projector(camera, grid, RigidTransform(angles))
    with pytest.raises(ValueError, match=r"4.932 degrees apart, but from view (0 to view 72|72 to view 0) it is 0"):
        fdk(again, torch.zeros(again.picture_shape))
    differing = camera.replace(x0=torch.eye(72)[3])
    with pytest.raises(ValueError, match="same camera for all views"):
        fdk(Projector(differing, grid, projector.views.pose), pictures)
    parallel = Projector(camera.replace(beam="parallel"), grid, circular_orbit(8, 400.0))
    with pytest.raises(ValueError, match="must have a cone beam"):
        fdk(parallel, torch.zeros(parallel.picture_shape))


@pytest.mark.parametrize("method, options", [(SIRT, dict(subsets=2)), (CGLS, {})], ids=["SIRT", "CGLS"])
def test_rays_and_sums_of_columns_need_not_be_kept(ball, monkeypatch: pytest.MonkeyPatch, method, options):
    projector, pictures, *_ = ball
    kept = method(projector[::9], pictures[::9], **options)
    assert kept.projector.kept is not None
    for module in ("projector", "iterative"):
        monkeypatch.setattr(f"diffdrr.reconstruction.{module}.CACHED_BYTES", 0)
    made_again = method(projector[::9], pictures[::9], **options)
    assert made_again.projector.kept is None
    assert torch.equal(made_again.run(2, verbose=False), kept.run(2, verbose=False))
