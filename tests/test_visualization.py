"""Pictures, films and scenes: what the notebook does not show."""

from __future__ import annotations

import base64
import functools
import inspect
import io
import json
import subprocess
import sys
import zlib
from pathlib import Path

import matplotlib

matplotlib.use("agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffdrr import visualization
from diffdrr.geometry import RigidTransform, convert
from diffdrr.rendering import DRR
from diffdrr.show import film as film_module
from diffdrr.show import page as page_module
from diffdrr.show.colors import MASK_COLORS, distinct_colors, parse_color, structure_names
from diffdrr.show.film import animate
from diffdrr.show.overlays import OVERLAYS, find_edges, overlay, plot_overlay, plot_registration, stretch
from diffdrr.show.page import save_scene
from diffdrr.show.pictures import plot_drr, plot_img_and_mask, plot_mask
from diffdrr.show.scene import BONE_COLOR, add_image, beam_corners, img_to_mesh, visualize_scene
from diffdrr.show.surfaces import MESH_METHODS, drr_to_mesh, labelmap_to_mesh
from diffdrr.volumes import read

needs_pyvista = functools.partial(pytest.importorskip, "pyvista", reason="pyvista comes with the extra [viz]")


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def ball(centre=(40.0, 10.0, 60.0), radius=15.0, orientation="AP", **kwargs):
    "A ball of 1000 HU in thin matter, on the right and near the head, in a volume of 200 mm around the origin."
    affine = np.array([[5.0, 0, 0, -97.5], [0, 5, 0, -97.5], [0, 0, 5, -97.5], [0, 0, 0, 1]])
    grid = np.stack(np.meshgrid(*[np.arange(40.0)] * 3, indexing="ij"), axis=-1) * 5 - 97.5
    hu = np.where(np.linalg.norm(grid - centre, axis=-1) < radius, 1000.0, -700.0)
    labels = (hu > 0).astype(np.uint8) * 3
    table = pd.DataFrame({"id": [3], "structure": ["ball"]})
    return read(
        torch.as_tensor(hu),
        torch.as_tensor(labels),
        affine=affine,
        center_volume=False,
        orientation=orientation,
        structures=table,
        **kwargs,
    )


def pose(*angles: float, depth: float = 850.0) -> RigidTransform:
    return convert(
        torch.tensor([(*angles, 0.0, 0.0, 0.0)[:3]]),
        torch.tensor([[0.0, depth, 0.0]]),
        parameterization="euler_angles",
        convention="ZXY",
    )


def renderer(subject, **kwargs) -> DRR:
    return DRR(subject, **{"sdd": 1020.0, "height": 60, "width": 80, "delx": 4.0, **kwargs})


# The interface of 0.6.1

SIGNATURES = {  # the parameters, with their defaults, and the name of further keyword arguments
    "add_image": ("drr pose pl", {}, None),
    "animate": (
        "out df drr parameterization convention ground_truth verbose dtype device",
        {"convention": None, "ground_truth": None, "verbose": True, "dtype": torch.float32, "device": "cpu"},
        "kwargs",
    ),
    "drr_to_mesh": (
        "subject method threshold extract_largest verbose",
        {"threshold": 150, "extract_largest": True, "verbose": True},
        None,
    ),
    "img_to_mesh": ("drr pose calibration", {"calibration": None}, "kwargs"),
    "labelmap_to_mesh": ("subject verbose", {"verbose": True}, None),
    "plot_drr": (
        "img title ticks axs cmap",
        {"title": None, "ticks": True, "axs": None, "cmap": "gray"},
        "imshow_kwargs",
    ),
    "plot_img_and_mask": (
        "img title ticks axs cmap alpha",
        {"title": None, "ticks": True, "axs": None, "cmap": "gray", "alpha": 0.5},
        "imshow_kwargs",
    ),
    "plot_mask": (
        "img axs colors alpha return_masks",
        {
            "colors": [
                "rgb(102,194,165)",
                "rgb(252,141,98)",
                "rgb(141,160,203)",
                "rgb(231,138,195)",
                "rgb(166,216,84)",
                "rgb(255,217,47)",
                "rgb(229,196,148)",
            ],
            "alpha": 0.5,
            "return_masks": False,
        },
        None,
    ),
    "visualize_scene": (
        "drr pose labelmap grid verbose",
        {"labelmap": False, "grid": True, "verbose": False},
        "kwargs",
    ),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_begin_as_in_0_6_1(name: str):
    names, defaults, keywords = SIGNATURES[name]
    parameters = inspect.signature(getattr(visualization, name)).parameters
    assert " ".join(parameters).startswith(names)
    assert [p.name for p in parameters.values() if p.kind is p.VAR_KEYWORD] == ([keywords] if keywords else [])
    required = [p.name for p in parameters.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    assert required == [name for name in names.split() if name not in defaults], "new arguments must be optional"
    assert {name: parameters[name].default for name in defaults} == defaults


# Radiographs


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.bool]
)
def test_any_dtype_is_plotted(dtype: torch.dtype):
    img = torch.tensor([[0.0, 1, 0], [1, 1, 0]]).expand(1, 2, 2, 3).to(dtype)
    if dtype.is_floating_point:
        img = img.clone().requires_grad_()
    ax = plot_drr(img)
    assert ax.images[0].get_array().tolist() == [[0, 2, 0], [2, 2, 0]]
    assert plot_drr(img[:, :1])[0].images[0].get_array().tolist() == [[0, 1, 0], [1, 1, 0]]


def test_axes_come_back_as_in_0_6_1():
    "Axes of radiographs are indexed like a list, however many there are; one picture with silhouettes gives its axes."
    one = plot_drr(torch.rand(1, 1, 4, 5))
    assert len(one) == 1 and isinstance(one[0], plt.Axes)
    several = plot_drr(torch.rand(3, 1, 4, 5), title="t")
    assert several.shape == (3,) and all(ax.get_title() == "t" for ax in several)
    given_axes = plt.subplots(2, 2)[1]
    assert list(plot_drr(torch.rand(4, 1, 4, 5), axs=given_axes)) == list(given_axes.flatten())
    assert list(plot_drr(torch.rand(1, 1, 4, 5), axs=given_axes[0, 1])) == [given_axes[0, 1]]
    assert len(plt.get_fignums()) == 3, "axes that are given are used"
    for plot in (plot_drr, plot_img_and_mask):
        assert isinstance(plot(torch.rand(1, 3, 4, 5)), plt.Axes)
        assert plot(torch.rand(2, 3, 4, 5)).shape == (2,)


def test_label_renders_show_their_channels_as_in_0_6_1():
    "All channels but the first are drawn over the sum, half transparent, in the seven colours in turn."
    img = torch.zeros(2, 10, 11, 5)
    for channel in range(10):
        img[:, channel, channel] = channel + 1.0
    axs = plot_drr(img, title=["a", "b"], ticks=False, cmap="bone", vmax=20.0)
    for ax, picture, title in zip(axs, img, "ab", strict=True):
        below, *silhouettes = ax.images
        assert (
            (below.get_array() == picture.sum(dim=0).numpy()).all()
            and below.cmap.name == "bone"
            and below.norm.vmax == 20
        )
        assert ax.get_title() == title and ax.get_xticks().tolist() == []
        assert [silhouette.get_alpha() for silhouette in silhouettes] == [0.5] * 9
        for i, silhouette in enumerate(silhouettes):
            assert tuple(silhouette.get_array()[i + 1, 0] / 255) == (*parse_color(MASK_COLORS[i % 7]), 1)


def test_pixel_numbers_count_from_one():
    (ax,) = plot_drr(torch.rand(1, 1, 4, 5))
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "5"] and ax.get_xticks().tolist() == [0, 4]


# Structures


def test_masks_are_as_in_0_6_1():
    "Every channel is drawn, in these colours in turn, and returned as red, green, blue and opacity."
    img = torch.zeros(2, 9, 12, 10)
    for channel in range(9):
        img[:, channel, channel] = 10.0 ** (channel - 4)
    axs = plt.subplots(1, 2)[1]
    colors = ["rgb(102,194,165)", "rgb(252,141,98)", (0.0, 0.0, 1.0), "rgb(231, 138, 195)"]
    masks = plot_mask(img, axs, colors, return_masks=True)
    assert masks.shape == (2, 9, 12, 10, 4) and masks.dtype == torch.uint8
    expected = torch.tensor([[102, 194, 165], [252, 141, 98], [0, 0, 255], [231, 138, 195]])
    for channel in range(9):
        assert (masks[:, channel, channel, :, :3] == expected[channel % 4]).all() and (
            masks[:, channel, channel, :, 3] == 255
        ).all()
        assert masks[:, channel].sum() == masks[:, channel, channel].sum()
    assert [len(ax.images) for ax in axs] == [9, 9]


def test_img_and_mask_leave_the_background_out():
    img = torch.ones(1, 3, 4, 5)
    img[:, 2] = 0
    ax = plot_img_and_mask(img, alpha=0.25)
    assert len(ax.images) == 2 and ax.images[1].get_alpha() == 0.25
    assert (ax.images[1].get_array()[..., :3] == (102, 194, 165)).all()


def test_masks_have_seven_colors_in_turn_or_all_differ():
    img = torch.ones(1, 9, 4, 5)
    for options, expected in (
        ({}, [parse_color(MASK_COLORS[i % 7]) for i in range(9)]),
        ({"colors": None}, distinct_colors(9)),
    ):
        masks = plot_mask(img, plt.subplots()[1], return_masks=True, **options)
        np.testing.assert_allclose(masks[0, :, 0, 0, :3] / 255, expected, atol=0.5 / 255)


@pytest.mark.parametrize("n", [1, 7, 8, 40, 118])
def test_colors_differ_from_each_other_and_from_grey(n: int):
    colors = np.array(distinct_colors(n))
    assert colors.shape == (n, 3) and len(np.unique(colors, axis=0)) == n
    assert np.ptp(colors, axis=1).min() > 0.1
    assert distinct_colors(n) == distinct_colors(118)[:n], "a label keeps its colour"


def test_names_come_from_the_table():
    assert structure_names(ball().structures, 4) == ["label 1", "label 2", "ball", "label 4"]
    with pytest.raises(ValueError, match="columns 'id' and 'structure', but it has 'name'"):
        structure_names(pd.DataFrame({"name": ["a"]}), 1)
    with pytest.raises(ValueError, match="one name for each of the 3 structures"):
        structure_names("abc", 3)
    subject = ball()
    ax = plot_img_and_mask(renderer(subject)(pose(), mask_to_channels=True), names=subject.structures)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["ball"]
    assert np.allclose(ax.get_legend().get_patches()[0].get_facecolor()[:3], distinct_colors(3)[2])


@pytest.mark.parametrize("color", ["rgb(1,2)", "rgb(1,2,300)", "rgb(a,b,c)", "no color"])
def test_bad_colors_raise(color: str):
    with pytest.raises(ValueError):
        parse_color(color)


# Overlays


@settings(max_examples=40, deadline=None)
@given(
    scale=st.floats(1e-3, 1e3),
    offset=st.floats(-1e3, 1e3),
    kind=st.sampled_from(list(OVERLAYS)),
    seed=st.integers(0, 99),
)
def test_overlays_ignore_scale_and_offset(scale: float, offset: float, kind: str, seed: int):
    fixed, moving = torch.rand(2, 1, 1, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    same = overlay(fixed, moving, kind)
    other = overlay(scale * fixed + offset, moving / scale - offset, kind)
    assert np.mean(abs(same - other) > 1e-6) < 0.01, "rounding may move a few edges, or bins of a colour map"


@pytest.mark.parametrize("kind", OVERLAYS)
def test_overlays_show_both_pictures(kind: str):
    fixed, moving, other = torch.rand(3, 1, 1, 20, 24)
    shown = overlay(fixed, moving, kind)
    assert shown.shape == (1, 20, 24, 3) and shown.min() >= 0 and shown.max() <= 1
    assert abs(overlay(other, moving, kind) - shown).max() > 0.1
    assert abs(overlay(fixed, other, kind) - shown).max() > 0.1


def test_one_fixed_picture_serves_a_batch():
    fixed, moving = torch.rand(1, 1, 6, 7), torch.rand(3, 1, 6, 7)
    axs = plot_overlay(fixed, moving, "colors", title=list("abc"))
    assert (axs[2].images[0].get_array() == overlay(fixed, moving[2:], "colors")[0]).all()


def test_edges_lie_on_a_circle():
    row, column = np.indices((80, 90))
    distance = np.hypot(row - 40, column - 44)
    found = find_edges(np.clip(25.5 - distance, 0, 1)[None])[0]
    assert found.sum() > 2 * np.pi * 25 * 0.7, "most of the circle is found"
    assert abs(distance[found] - 25).max() < 1.5


def test_a_registration_is_shown_in_four_panels():
    drr, there = renderer(ball()), pose()
    xray = drr(there)
    mask = torch.ones_like(xray)
    mask[..., :10] = 0
    axs = plot_registration(drr, xray, pose(0.1), there, mask)
    assert [ax.get_title() for ax in axs] == ["X-ray", "initial pose", "found", "edges of the DRR"]
    assert (axs[0].images[0].get_array()[:, :10] == 0).all()
    assert (axs[2].images[0].get_array() == overlay(xray * mask, xray * mask)[0]).all()


def test_a_blank_or_spotted_picture_is_shown():
    assert not overlay(torch.zeros(1, 1, 9, 9), torch.zeros(1, 1, 9, 9), "checkerboard").any()
    spotted = torch.rand(1, 1, 40, 40)
    clean = stretch(spotted)
    spotted[0, 0, 3, 3] = 1e6
    assert abs(stretch(spotted) - clean)[0, 10:].max() < 0.02


# Films


def table(n: int = 3) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "alpha": np.linspace(0.3, 0, n),
            "beta": 0.0,
            "gamma": 0.0,
            "bx": 0.0,
            "by": 850.0,
            "bz": 0.0,
            "loss": np.linspace(1, 0, n),
        }
    )


def read_film(content: bytes) -> list[np.ndarray]:
    with Image.open(io.BytesIO(content)) as image:
        frames = []
        for i in range(image.n_frames):
            image.seek(i)
            frames.append(np.asarray(image.convert("RGB")).astype(int))
        return frames


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_animated_pictures(suffix: str, tmp_path: Path):
    drr, out = renderer(ball()), tmp_path / f"film{suffix.upper()}"
    assert animate(out, table(), drr, "euler_angles", "ZXY", ground_truth=drr(pose()), verbose=False, fps=4) is None
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    with Image.open(out) as image:
        assert image.n_frames == 3 and image.size == (1200, 320)
        assert suffix == ".webp" or image.info["duration"] == 250  # Pillow does not read it there
    with Image.open(
        io.BytesIO(animate("<bytes>", table(), drr, "euler_angles", "ZXY", verbose=False, extension=suffix))
    ) as image:
        assert image.n_frames == 3 and image.size == (600, 320), "no fixed picture: moving picture and curve"


def test_video(tmp_path: Path):
    ffmpeg = pytest.importorskip("imageio_ffmpeg", reason="imageio-ffmpeg comes with the extra [viz]")
    drr, out = renderer(ball()), tmp_path / "film.mp4"
    animate(str(out), table(7), drr, "euler_angles", "ZXY", ground_truth=drr(pose()), verbose=False, fps=5)
    frames = ffmpeg.read_frames(str(out))
    meta = next(frames)
    assert meta["size"] == (1200, 320) and meta["fps"] == 5 and len(list(frames)) == 7
    assert [p.name for p in tmp_path.iterdir()] == ["film.mp4"]


def test_video_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(ImportError, match=r"pip install '.\[viz\]'"):
        animate(tmp_path / "film.mp4", table(), renderer(ball()), "euler_angles", "ZXY", verbose=False)
    assert not list(tmp_path.iterdir())


def test_a_film_that_fails_leaves_the_old_one(tmp_path: Path):
    out = tmp_path / "film.gif"
    out.write_text("old")
    drr = renderer(ball())
    drr.density = None
    with pytest.raises(ValueError, match="density is None"):
        animate(out, table(), drr, "euler_angles", "ZXY", verbose=False)
    assert out.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["film.gif"]


def test_a_film_shows_what_the_renderer_gives():
    "The ball wanders from one side to the middle of the moving picture, and the difference fades in the last frame."
    drr = renderer(ball(centre=(0.0, 0.0, 0.0)))
    shifted = table(3).assign(alpha=0.0, bx=[60.0, 30.0, 0.0]).drop(columns="loss")
    frames = read_film(
        animate(
            "<bytes>",
            shifted,
            drr,
            "euler_angles",
            "ZXY",
            ground_truth=drr(pose()),
            verbose=False,
            extension=".webp",
            lossless=True,
        )
    )
    assert frames[0].shape == (320, 900, 3)
    fading = [np.ptp(frame[:, 600:], axis=-1).max() for frame in frames]
    assert fading[0] > 100 and fading[1] > 100 and fading[2] < 20

    def centre_of(panel: np.ndarray) -> float:
        return np.average(np.arange(200), weights=(panel[80:240, 50:250].mean(axis=(0, 2)) ** 4))

    places = [centre_of(frame[:, 300:600]) for frame in frames]
    assert abs(places[2] - centre_of(frames[0][:, :300])) < 2 < abs(places[1] - places[2]) < abs(places[0] - places[2])


def test_film_follows_dtype_and_index(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr(
        film_module,
        "draw_frames",
        lambda pictures, steps, *rest: (
            seen.append((steps.tolist(), rest)),
            (np.zeros((4, 4, 3), np.uint8) for _ in pictures),
        )[1],
    )
    drr = renderer(ball()).double()
    late = table(6).iloc[[0, 4, 5]].rename(columns={"loss": "ncc"})
    animate("<bytes>", late, drr, "euler_angles", "ZXY", verbose=False, extension=".gif")
    animate(
        "<bytes>", late.set_index(pd.Index(list("abc"))), drr, "euler_angles", "ZXY", verbose=False, extension=".gif"
    )
    assert [steps for steps, _ in seen] == [[0, 4, 5], [0, 1, 2]]
    assert seen[0][1][1].tolist() == late["ncc"].tolist() and seen[0][1][2] == "ncc"


def test_progress_is_shown(capsys: pytest.CaptureFixture):
    drr = renderer(ball())
    animate("<bytes>", table(2), drr, "euler_angles", "ZXY", extension=".gif")
    assert "Rendering the film" in capsys.readouterr().err
    animate("<bytes>", table(2), drr, "euler_angles", "ZXY", extension=".gif", verbose=False)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": "film"}, "out must end in one of .gif, .webp, .mp4, not 'film'"),
        ({"out": "<bytes>"}, "extension must end in one of"),
        ({"df": table()[:0]}, "at least one row"),
        ({"df": table().drop(columns=["gamma", "bz"])}, "gamma, bz are missing; it has alpha, beta, bx, by, loss"),
        ({"df": table().assign(by=[850.0, np.nan, 850.0])}, "row 1 holds"),
        ({"parameterization": "matrix"}, "must have the columns pose"),
        ({"parameterization": "euler"}, "parameterization must be one of"),
        ({"convention": "ZZZ"}, "convention"),
        ({"ground_truth": torch.rand(1, 1, 80, 60)}, r"\(1, C, 60, 80\), not \(1, 1, 80, 60\)"),
        ({"ground_truth": torch.rand(2, 1, 60, 80)}, "one picture"),
        ({"drr": renderer(ball(), reshape=False)}, "reshape=True"),
    ],
)
def test_bad_films_raise_before_rendering(changes: dict, message: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(film_module, "draw_frames", lambda *_: pytest.fail("it rendered"))
    arguments = {
        "out": "film.gif",
        "df": table(),
        "drr": renderer(ball()),
        "parameterization": "euler_angles",
        "convention": "ZXY",
        "verbose": False,
    }
    with pytest.raises(ValueError, match=message):
        animate(**{**arguments, **changes})


# Scenes


@pytest.mark.parametrize(
    "call",
    [
        lambda subject, drr: drr_to_mesh(subject, "marching_cubes"),
        lambda subject, drr: labelmap_to_mesh(subject),
        lambda subject, drr: img_to_mesh(drr, pose()),
        lambda subject, drr: visualize_scene(drr, pose()),
        lambda subject, drr: add_image(drr, pose(), None),
    ],
)
def test_scenes_name_the_extra(call, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyvista", None)
    subject = ball()
    with pytest.raises(ImportError, match=r"pip install '.\[viz\]'"):
        call(subject, renderer(subject))


@pytest.mark.parametrize("orientation", ["AP", "PA", None])
@pytest.mark.parametrize(
    "options", [{}, {"reverse_x_axis": False}, {"x0": 30.0, "y0": -20.0, "dely": 5.0}, {"beam": "parallel"}]
)
def test_the_shadow_of_a_ball_lies_behind_it(orientation: str | None, options: dict):
    """From the source, through the centre of the ball, the ray meets the detector where the texture is brightest:
    mirrored or turned it would not."""
    needs_pyvista()
    centre = (40.0, 10.0, 60.0)
    subject = ball(centre, orientation=orientation)
    drr = renderer(subject, **options)
    away = {"AP": (0.0, 850.0, 0.0), "PA": (0.0, -850.0, 0.0), None: (0.0, 0.0, -850.0)}[orientation]
    there = convert(
        torch.tensor([[0.3, -0.2, 0.1]]), torch.tensor([away]), parameterization="euler_angles", convention="ZXY"
    )
    _, detector, texture, _ = img_to_mesh(drr, there)
    image = np.asarray(texture.to_array())[..., 0].astype(float)
    row, column = np.indices(image.shape)
    v, u = (
        1 - (np.average(row, weights=image) + 0.5) / image.shape[0],
        (np.average(column, weights=image) + 0.5) / image.shape[1],
    )

    uv = np.asarray(detector.active_texture_coordinates, dtype=float)
    to_point, *_ = np.linalg.lstsq(np.c_[uv, np.ones(4)], np.asarray(detector.points, dtype=float), rcond=None)
    shadow = np.array([u, v, 1.0]) @ to_point
    starts, ends = beam_corners(drr, there)
    along = centre - starts[4] if drr.detector.beam == "cone" else ends[4] - starts[4]
    from_start = shadow - starts[4] if drr.detector.beam == "cone" else shadow - centre
    off = np.linalg.norm(np.cross(from_start, along / np.linalg.norm(along)))
    assert off < 4, "mm; a pixel has 4 mm"


def test_parallel_rays_start_on_the_side_of_the_source():
    subject = ball()
    cone, parallel = (beam_corners(renderer(subject, beam=beam), pose(0.3, -0.2)) for beam in ("cone", "parallel"))
    assert np.allclose(parallel[1], cone[1], atol=1e-2), "the detector is the same"
    assert np.allclose(parallel[0][4], cone[0][4], atol=1e-2), "the central ray is the same"
    assert np.allclose(parallel[0] - parallel[0][4], parallel[1] - parallel[1][4], atol=1e-2)


def test_parallel_rays_start_at_the_source_of_any_calibration():
    drr, there = renderer(ball(), beam="parallel"), pose(0.3, -0.2)
    calibration = drr.detector.calibration.matrix.clone()
    calibration[:, 2, 3] += 50.0  # the detector is farther away, and so are the sources
    sources = drr.detector(there, RigidTransform(calibration))[0]
    assert np.allclose(beam_corners(drr, there, RigidTransform(calibration))[0][4], sources.mean(dim=1), atol=1e-2)


def test_meshes_are_where_the_ball_is():
    needs_pyvista()
    subject = ball(radius=20.0)
    labels = labelmap_to_mesh(subject, verbose=False)
    assert set(labels["boundary_labels"]) == {3}
    for mesh in (labels, *(drr_to_mesh(subject, method, 0, verbose=False) for method in MESH_METHODS)):
        assert np.linalg.norm(np.array(mesh.center) - (40, 10, 60)) < 1.5
        assert abs(np.ptp(np.array(mesh.bounds).reshape(3, 2), axis=1) - 40).max() < 6  # voxels have 5 mm
        assert mesh.is_all_triangles and mesh.volume > 0


def test_largest_part_and_progress(capsys: pytest.CaptureFixture):
    needs_pyvista()
    subject = ball(radius=20.0)
    subject.volume.data[0, 2:5, 2:5, 2:5] = 1000
    methods = {
        method: [drr_to_mesh(subject, method, 150, largest, verbose=False).bounds[0] for largest in (True, False)]
        for method in MESH_METHODS
    }
    for with_largest, without in methods.values():
        assert with_largest > 15 and without < -85
    assert "Surfaces" not in capsys.readouterr().err
    labelmap_to_mesh(subject)
    assert "Surfaces of structures" in capsys.readouterr().err


def test_volume_that_fills_its_borders_is_closed():
    needs_pyvista()
    full = read(torch.full((8, 9, 10), 1000.0), torch.ones(8, 9, 10), affine=np.diag([3.0, 3, 3, 1]))
    full.volume.data[0, 0, 0, 0] = -1000.0
    for mesh in (drr_to_mesh(full, "marching_cubes", verbose=False), labelmap_to_mesh(full, verbose=False)):
        assert mesh.n_open_edges == 0 and abs(mesh.volume / (720 * 27) - 1) < 0.25


def test_empty_subjects_raise():
    needs_pyvista()
    subject = read(torch.rand(5, 5, 5), torch.zeros(5, 5, 5), affine=np.eye(4))
    with pytest.raises(ValueError, match="every voxel is background"):
        labelmap_to_mesh(subject, verbose=False)
    with pytest.raises(ValueError, match="threshold must be between"):
        visualize_scene(renderer(subject), pose(), off_screen=True)


@functools.cache
def can_draw() -> bool:
    "Draw in another process, since VTK crashes where it cannot."
    code = (
        "import pyvista; p = pyvista.Plotter(off_screen=True); p.add_mesh(pyvista.Sphere()); "
        "p.screenshot(return_img=True)"
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120).returncode == 0


@pytest.fixture
def pyvista():
    module = needs_pyvista()
    if not can_draw():
        pytest.skip("VTK cannot draw here: there is neither a display nor EGL nor OSMesa")
    return module


def test_triton_can_be_imported_after_drawing(pyvista):
    pytest.importorskip("triton")
    code = (
        "from diffdrr.show.page import import_pyvista; pv = import_pyvista(); p = pv.Plotter(off_screen=True); "
        "p.add_mesh(pv.Sphere()); p.screenshot(return_img=True); import triton"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("orientation", ["AP", "PA"])
def test_detector_shows_the_radiograph(pyvista, orientation: str):
    "On the screen, a place of the detector has the brightness of its pixel; in a mirrored picture it would not."
    from vtkmodules.vtkRenderingCore import vtkCoordinate

    subject = ball(radius=40.0, orientation=orientation)
    drr, there = renderer(subject), pose(0.2, 0.1, depth=850.0 if orientation == "AP" else -850.0)
    scene = visualize(drr, there, window_size=(500, 400))
    for name, actor in scene.actors.items():
        actor.SetVisibility(name == "detector 1")
    corners = beam_corners(drr, there)[1]
    normal = np.cross(corners[1] - corners[0], corners[3] - corners[0])
    scene.camera_position = [corners[4] - 800 * normal / np.linalg.norm(normal), corners[4], (0, 0, 1)]
    screen = scene.screenshot(return_img=True)
    row, column = (x.ravel() for x in np.mgrid[3:57:3, 3:77:3])
    places = drr.inverse_projection(
        there, torch.tensor(np.stack([column, row], axis=1) + 0.5, dtype=torch.float32)[None]
    )[0].numpy()
    coordinate, shown = vtkCoordinate(), []
    coordinate.SetCoordinateSystemToWorld()
    for place in places:
        coordinate.SetValue(*place.astype(float))
        x, y = coordinate.GetComputedDisplayValue(scene.renderer)
        shown.append(screen[399 - y, x, 0])
    picture = stretch(drr(there))[0]

    def correlation(a: np.ndarray) -> float:
        return np.corrcoef(a[row, column], shown)[0, 1]

    assert correlation(picture) > 0.98
    assert max(correlation(picture[::-1]), correlation(picture[:, ::-1]), correlation(picture[::-1, ::-1])) < 0.8


def visualize(drr: DRR, there: RigidTransform, **kwargs):
    return visualize_scene(drr, there, off_screen=True, **kwargs)


def test_scene_has_the_colors_of_its_parts(pyvista, tmp_path: Path):
    from matplotlib.colors import rgb_to_hsv, to_rgb

    subject = ball(radius=60.0, centre=(0.0, 0.0, 0.0))
    scenes = {
        label: visualize(renderer(subject), pose(), labelmap=label, grid=False, window_size=(400, 300))
        for label in (False, True)
    }
    for scene in scenes.values():  # keep letters and lines out of the count
        for name in ("volume", "sides-labels"):
            scene.actors[name].SetVisibility(False)
    hues = {"bones": to_rgb(BONE_COLOR), "ball": distinct_colors(3)[2], "source 1": to_rgb("#ee7733")}

    def count(scene, name):
        save_scene(tmp_path / "scene.png", scene)
        colors = rgb_to_hsv(np.asarray(Image.open(tmp_path / "scene.png").convert("RGB")) / 255)
        hue, saturation, _ = rgb_to_hsv(hues[name])
        return ((abs(colors[..., 0] - hue) < 0.03) & (abs(colors[..., 1] - saturation) < 0.12)).sum()

    assert count(scenes[False], "bones") > 500 > 20 > count(scenes[True], "bones")
    assert count(scenes[True], "ball") > 500 > 20 > count(scenes[False], "ball")
    for scene in scenes.values():
        assert 20 < count(scene, "source 1") < 500
    assert [p.name for p in tmp_path.iterdir()] == ["scene.png"]


def test_scene_passes_options_on_to_drr_to_mesh():
    "0.6.1 takes them beside the options of the scene; those of PyVista are new."
    needs_pyvista()
    subject = ball(radius=20.0)
    subject.volume.data[0, 2:5, 2:5, 2:5] = 300

    def bones(**options):
        return visualize(renderer(subject), pose(), **options).actors["bones"].mapper.dataset

    assert (
        bones(threshold=150, extract_largest=False).bounds[0]
        < -80
        < 0
        < bones(threshold=350, extract_largest=False).bounds[0]
    )
    assert bones(extract_largest=True).bounds[0] > 0
    with pytest.raises(TypeError, match="did you mean 'threshold'"):
        bones(treshold=150)


def test_page_holds_the_scene(tmp_path: Path):
    needs_pyvista()
    subject = ball(radius=30.0)
    scene = visualize(renderer(subject), RigidTransform(torch.cat([pose().matrix, pose(0.5).matrix])), labelmap=True)
    scene.actors["beam 2"].visibility = False
    save_scene(tmp_path / "scene.html", scene, verbose=False)
    page = (tmp_path / "scene.html").read_text(encoding="utf-8")
    assert [p.name for p in tmp_path.iterdir()] == ["scene.html"] and len(page) < 200_000
    content = json.loads(zlib.decompress(base64.b64decode(page.split('const DATA = "')[1].split('"')[0])))
    parts = {part["name"]: part for part in content["parts"]}
    numbered = {f"{name} {i}" for name in ("detector", "beam", "central ray", "source") for i in (1, 2)}
    assert set(parts) == {"ball", "volume"} | numbered - {"beam 2"}
    assert np.allclose(parts["ball"]["color"], distinct_colors(3)[2], atol=1 / 255)
    low, high = np.array(scene.actors["volume"].bounds).reshape(3, 2).T
    for label in content["labels"]:
        axis, side = {"R": (0, 1), "L": (0, -1), "A": (1, 1), "P": (1, -1), "S": (2, 1), "I": (2, -1)}[label["text"]]
        outside = np.clip(label["at"], low, high) - label["at"]
        assert np.argmax(abs(outside)) == axis and np.sign(-outside[axis]) == side
    assert len(content["labels"]) == 6
    assert (
        content["view"]["aspect"] == scene.window_size[0] / scene.window_size[1]
    )  # a narrower frame shows all of it, smaller
    points = (
        np.cumsum(np.array(parts["ball"]["points"]).reshape(-1, 3), axis=0) * parts["ball"]["size"] / 65535
        + parts["ball"]["origin"]
    )
    assert np.linalg.norm((points.min(axis=0) + points.max(axis=0)) / 2 - (40, 10, 60)) < 1
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(parts["detector 1"]["picture"].split(",")[1]))))[..., 0]
    assert abs(picture / 255 - stretch(renderer(subject)(pose()))[0]).max() <= 0.5 / 255 + 1e-6
    corner = next(i for i, uv in enumerate(np.array(parts["detector 1"]["uv"]).reshape(-1, 2)) if uv.tolist() == [0, 1])
    detector = parts["detector 1"]
    corners = (
        np.cumsum(np.array(detector["points"]).reshape(-1, 3), axis=0) * detector["size"] / 65535 + detector["origin"]
    )
    assert np.allclose(corners[corner], beam_corners(renderer(subject), pose())[1][0], atol=0.05)


def test_drawing_is_refused_where_it_would_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.setattr(page_module.ctypes.util, "find_library", lambda name: None)
    with pytest.raises(RuntimeError, match="apt install libegl1"):
        save_scene(tmp_path / "scene.png", None)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(page_module.ctypes.util, "find_library", lambda name: "libEGL.so.1" if name == "EGL" else None)
    page_module.check_drawing()
