"""Structures in the picture: what the notebook does not show."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.testing import assert_close

from diffdrr import anatomy
from diffdrr.anatomy import surfaces
from diffdrr.anatomy.files import run_lengths
from diffdrr.anatomy.structures import select_structures
from diffdrr.geometry import RigidTransform, convert
from diffdrr.rendering import DRR
from diffdrr.volumes import read

TABLE = pd.DataFrame({"structure": ["background", "ball", "shell", "nowhere"], "id": [0, 3, 300, 5]})
AWAY = {"AP": (0.0, 850.0, 0.0), "PA": (0.0, -850.0, 0.0), None: (0.0, 0.0, -850.0)}


def patient(orientation: str | None = "AP", table: pd.DataFrame | None = TABLE, **kwargs):
    "A ball within a shell, off the isocentre, on a turned grid of thick slices; the label of the shell needs 16 bits."
    turn = (
        convert(
            torch.tensor([[0.2, -0.1, 0.3]], dtype=torch.float64),
            torch.zeros(1, 3, dtype=torch.float64),
            parameterization="euler_angles",
            convention="ZXY",
        )
        .matrix[0]
        .numpy()
    )
    affine = turn @ np.array([[-4.0, 0, 0, 98], [0, 4, 0, -78], [0, 0, 6, -87], [0, 0, 0, 1]])
    index = np.stack(np.meshgrid(np.arange(50), np.arange(40), np.arange(30), indexing="ij"), axis=-1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    distance = np.linalg.norm(world - (25.0, 10.0, -15.0), axis=-1)
    labels = np.where(distance < 25, 3, np.where((distance > 40) & (distance < 50), 300, 0)).astype(np.int16)
    hu = torch.as_tensor(np.where(labels == 3, 400.0, -1000.0) + 10 * index[..., 2])
    extra = {} if table is None else {"structures": table}
    return read(
        hu, torch.as_tensor(labels), affine=affine, center_volume=False, orientation=orientation, **extra, **kwargs
    )


def view(orientation: str | None = "AP", *more: tuple[float, float, float], dtype=torch.float32) -> RigidTransform:
    angles = torch.tensor([(0.3, -0.2, 0.1), *more], dtype=dtype)
    return convert(
        angles, torch.tensor([AWAY[orientation]], dtype=dtype), parameterization="euler_angles", convention="ZXY"
    )


def renderer(subject, **kwargs) -> DRR:
    return DRR(subject, **{"sdd": 1020.0, "height": 90, "width": 110, "delx": 2.0, **kwargs})


# Masks


@pytest.mark.parametrize("orientation", ["AP", "PA", None])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reverse_x_axis": False},
        {"x0": 30.0, "y0": -20.0, "dely": 1.5},
        {"beam": "parallel"},
        {"voxel_shift": 0.0},
        {"renderer": "trilinear"},
    ],
)
def test_rendering_and_geometry_agree(orientation: str | None, options: dict):
    """They differ only over pixels whose rays graze the structure to a thousandth of a pixel: rounding of single
    precision."""
    drr, pose = renderer(patient(orientation), **options), view(orientation)
    rendered, names = anatomy.structure_masks(drr, pose, ["ball", "shell"])
    for mask, name in zip(rendered[0], names):
        faces = surfaces.project_surface(drr, pose, name)[0]
        filled = torch.stack(
            [
                surfaces.fill_faces(faces + 1e-3 * torch.tensor(shift), 90, 110)
                for shift in ((1, 1), (1, -1), (-1, 1), (-1, -1))
            ]
        )
        surely, perhaps = filled.all(dim=0), filled.any(dim=0)
        assert surely.sum() > 300 and (perhaps & ~surely).sum() < 0.01 * surely.sum()
        assert (surely <= mask).all() and (mask <= perhaps).all()
        box = torch.cat([faces.flatten(0, 1).amin(dim=0), faces.flatten(0, 1).amax(dim=0)])
        limits = torch.tensor([0.0, 0, 0, 0]), torch.tensor([110.0, 90, 110, 90])
        assert_close(
            anatomy.bounding_boxes(mask[None, None])[0, 0], box.clamp(*limits), atol=1, rtol=0
        )  # a corner reaches between the centres of pixels


def test_a_ball_has_the_shadow_of_a_ball():
    "From the axis of the cone that touches it: an ellipse whose half axes are known, though voxels are coarse."
    drr, pose = renderer(patient()), view()
    centre = torch.tensor([[[25.0, 10.0, -15.0]]])
    column, row = drr.perspective_projection(pose, centre)[0, 0]
    source = drr.detector.reorient.compose(pose).inverse()(centre)[0, 0]
    mask = anatomy.structure_masks(drr, pose, ["ball"])[0][0, 0]
    radius = 25 * 1020 / source[2] / 2
    assert_close(
        mask.sum() / (torch.pi * radius**2), torch.tensor(1.0), atol=0.12, rtol=0
    )  # voxels stick out of the ball by half of their diagonal, 4 of 25 mm
    rows, columns = mask.nonzero().float().add(0.5).T
    assert_close(torch.stack([columns.mean(), rows.mean()]), torch.stack([column, row]), atol=0.5, rtol=0)


def test_each_picture_is_that_of_its_pose():
    drr, poses = renderer(patient()), view("AP", (0.0, 0.0, 0.0), (-0.5, 0.2, 0.0))
    together, _ = anatomy.structure_masks(drr, poses)
    for i in range(3):
        assert torch.equal(anatomy.structure_masks(drr, RigidTransform(poses.matrix[i : i + 1]))[0][0], together[i])


def test_density_renderer_and_reshape_change_nothing():
    drr, pose = renderer(patient()), view()
    expected, names = anatomy.path_lengths(drr, pose)
    assert names == ["ball", "shell"] and expected.shape == (1, 2, 90, 110)
    for options in (
        {"reshape": False},
        {"renderer": "trilinear"},
        {"patch_size": 30, "backend": "torch"},
        {"reducefn": "max"},
    ):
        other = renderer(patient(), **options)
        other.density = None
        assert_close(anatomy.path_lengths(other, pose)[0], expected, atol=1e-3, rtol=1e-4)
    assert drr.mask.max() == 300 and drr.density.max() == 1, "the DRR is as before"


def test_length_and_volume_agree():
    "Rays of a parallel beam, each with the area of a pixel, cut the structure into columns."
    subject = patient()
    drr = renderer(subject, beam="parallel", height=300, width=300, delx=0.7)
    lengths, _ = anatomy.path_lengths(drr, view(), ["ball", "shell"])
    voxels = torch.stack([(drr.mask == label).sum() for label in (3, 300)])
    assert_close(lengths.sum(dim=(2, 3))[0] * 0.7**2, voxels * 4.0 * 4 * 6, rtol=5e-3, atol=0)


def test_length_is_differentiable():
    drr = renderer(patient()).double()
    angles = torch.tensor([[0.3, -0.2, 0.1]], dtype=torch.float64, requires_grad=True)

    def total(angles: torch.Tensor) -> torch.Tensor:
        translation = torch.tensor([AWAY["AP"]], dtype=torch.float64)
        pose = convert(angles, translation, parameterization="euler_angles", convention="ZXY")
        return anatomy.path_lengths(drr, pose, ["shell"])[0][..., 40:50, 50:60].sum()

    (gradient,) = torch.autograd.grad(total(angles), angles)
    step = 1e-6 * torch.eye(3, dtype=torch.float64)
    numeric = torch.stack([(total(angles.detach() + s) - total(angles.detach() - s)) / 2e-6 for s in step])
    assert_close(gradient[0], numeric, rtol=1e-4, atol=1e-2)
    assert not anatomy.structure_masks(
        drr,
        convert(
            angles, torch.tensor([AWAY["AP"]], dtype=torch.float64), parameterization="euler_angles", convention="ZXY"
        ),
    )[0].requires_grad


def test_threshold_thins_the_border():
    drr, pose = renderer(patient()), view()
    lengths, _ = anatomy.path_lengths(drr, pose)
    thick, thin = (anatomy.structure_masks(drr, pose, threshold=t)[0] for t in (0.0, 10.0))
    assert torch.equal(thin, lengths > 10) and thin.sum() < thick.sum() and not (thin & ~thick).any()


def test_threshold_must_be_a_length():
    for bad in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="threshold must be a number of at least 0"):
            anatomy.structure_masks(renderer(patient()), view(), threshold=bad)


# Names


def test_absent_structures_have_empty_channels():
    drr = renderer(patient())
    masks, names = anatomy.structure_masks(drr, view(), ["shell", "nowhere", "ball"])
    assert names == ["shell", "nowhere", "ball"]
    assert masks.flatten(2).any(dim=2).tolist() == [[True, False, True]]
    assert not anatomy.structure_masks(drr, view(), ["nowhere"])[0].any()
    last, _ = anatomy.structure_masks(drr, view(), ["ball", "nowhere"])
    assert torch.equal(last[:, 0], masks[:, 2]) and not last[:, 1].any()
    fractions, _ = anatomy.visible_fraction(drr, view(), ["nowhere", "ball"])
    assert fractions[0, 0].isnan() and fractions[0, 1] == 1


def test_without_a_table():
    drr = renderer(patient(table=None))
    assert select_structures(drr) == {"label 3": 3, "label 300": 300}
    masks, names = anatomy.structure_masks(drr, view())
    assert names == ["label 3", "label 300"]
    assert torch.equal(masks, anatomy.structure_masks(renderer(patient()), view())[0])


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            pd.DataFrame({"name": ["ball"], "id": [3]}),
            r"columns 'structure' .* and 'id' .*, not one with \['name', 'id'\]",
        ),
        (pd.DataFrame({"structure": ["ball", "ball"], "id": [3, 300]}), "'ball' is there twice"),
    ],
)
def test_bad_tables(table: pd.DataFrame, message: str):
    with pytest.raises(ValueError, match=message):
        anatomy.structure_masks(renderer(patient(table=table)), view())


@pytest.mark.parametrize("call", [anatomy.path_lengths, anatomy.structure_masks, anatomy.visible_fraction])
def test_bad_names_and_poses(call):
    drr = renderer(patient())
    with pytest.raises(
        ValueError, match="names must be some of 'ball', 'shell', 'nowhere', not 'bal'; did you mean 'ball'"
    ):
        call(drr, view(), ["bal", "shel"])
    with pytest.raises(ValueError, match=r"write \['ball'\]"):
        call(drr, view(), "ball")
    drr.mask = None
    with pytest.raises(ValueError, match="no label map"):
        call(drr, view())


def test_poses_and_pixels_must_fit():
    with pytest.raises(ValueError, match="pose and drr must have the same dtype"):
        anatomy.structure_masks(renderer(patient()), view(dtype=torch.float64))
    with pytest.raises(ValueError, match="draws pixels at random"):
        anatomy.structure_masks(renderer(patient(), p_subsample=0.5), view())
    behind = RigidTransform(torch.eye(4)[None])
    with pytest.raises(ValueError, match="behind one of them"):
        surfaces.project_surface(renderer(patient()), behind, "ball")
    with pytest.raises(ValueError, match="no voxel is 'nowhere'; there are ball, shell"):
        anatomy.surface_faces(renderer(patient()), "nowhere")


# Geometry


def test_surface_is_complete():
    "Every face between a voxel inside and one outside is there, with its area, and its corners go around it."
    drr = renderer(patient())
    faces = anatomy.surface_faces(drr, "ball").double()
    edges = faces[:, 1] - faces[:, 0], faces[:, 3] - faces[:, 0]
    areas = torch.linalg.cross(*edges).norm(dim=1)
    mask = (drr.mask == 3).numpy()
    counts = [np.abs(np.diff(np.pad(mask, 1).astype(int), axis=axis)).sum() for axis in range(3)]
    assert len(faces) == sum(counts)
    assert_close(
        areas.sum(),
        torch.tensor(counts[0] * 24.0 + counts[1] * 24 + counts[2] * 16, dtype=torch.float64),
        rtol=1e-5,
        atol=0,
    )
    assert_close(faces[:, 0] + faces[:, 2], faces[:, 1] + faces[:, 3], atol=1e-3, rtol=0)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), scale=st.floats(0.3, 12.0))
def test_faces_are_filled_as_one_by_one(seed: int, scale: float):
    generator = torch.Generator().manual_seed(seed)
    corner, a, b = torch.rand(3, 5, 2, generator=generator, dtype=torch.float64)
    corner, a, b = corner * torch.tensor([20.0, 15.0]), scale * (a - 0.5), scale * (b - 0.5)
    faces = torch.stack([corner, corner + a, corner + a + b, corner + b], dim=1)
    row, column = np.indices((15, 20))
    expected = np.zeros((15, 20), bool)
    for c, u, v in zip(corner.numpy(), a.numpy(), b.numpy()):
        s, t = np.linalg.solve(
            np.stack([u, v], axis=1), np.stack([column + 0.5 - c[0], row + 0.5 - c[1]]).reshape(2, -1)
        ).reshape(2, 15, 20)
        expected |= (s >= 0) & (s <= 1) & (t >= 0) & (t <= 1)
    assert np.array_equal(surfaces.fill_faces(faces, 15, 20).numpy(), expected)


def test_visible_fraction_follows_the_masks():
    "What is in no mask is not visible, what is in the whole of a larger picture is."
    subject = patient()
    wide = renderer(subject, height=400, width=400)
    assert torch.equal(anatomy.visible_fraction(wide, view())[0], torch.ones(1, 2))
    gone = renderer(subject, x0=2000.0)
    assert torch.equal(anatomy.visible_fraction(gone, view())[0], torch.zeros(1, 2))
    behind = convert(
        torch.zeros(1, 3), torch.tensor([[0.0, -850.0, 0.0]]), parameterization="euler_angles", convention="ZXY"
    )
    assert torch.equal(anatomy.visible_fraction(wide, behind)[0], torch.zeros(1, 2)), "behind the source"
    far = convert(
        torch.zeros(1, 3), torch.tensor([[0.0, 1300.0, 0.0]]), parameterization="euler_angles", convention="ZXY"
    )
    assert torch.equal(anatomy.visible_fraction(wide, far)[0], torch.zeros(1, 2)), "behind the detector"
    assert not anatomy.structure_masks(wide, far)[0].any()


def test_visible_fraction_in_pieces(monkeypatch: pytest.MonkeyPatch):
    drr, poses = renderer(patient(), height=40, width=30), view("AP", (0.0, 0.0, 0.0))
    expected, _ = anatomy.visible_fraction(drr, poses)
    assert (expected > 0).all() and (expected < 1).any() and expected.shape == (2, 2)
    monkeypatch.setattr(surfaces, "VOXELS_AT_ONCE", 37)
    assert torch.equal(anatomy.visible_fraction(drr, poses)[0], expected)


def test_corners_as_origin_of_voxels():
    """With voxel_shift=0 the affine gives lower corners of voxels: the same as one of their centres, half a voxel
    further."""
    subject = patient()
    half = np.eye(4)
    half[:3, 3] = 0.5
    moved = read(
        subject.volume.data[0],
        subject.mask.data[0],
        affine=subject.volume.affine @ half,
        center_volume=False,
        structures=TABLE,
    )
    corner, centre = renderer(subject, voxel_shift=0.0, width=55), renderer(moved, width=55)
    fractions = anatomy.visible_fraction(corner, view())[0]
    assert (fractions < 1).all() and torch.equal(fractions, anatomy.visible_fraction(centre, view())[0])
    assert_close(anatomy.surface_faces(corner, "ball"), anatomy.surface_faces(centre, "ball"), atol=1e-3, rtol=0)


# Boxes and contours

pictures = st.integers(0, 2**30).map(lambda seed: torch.rand(9, 11, generator=torch.Generator().manual_seed(seed)))


@settings(max_examples=60, deadline=None)
@given(picture=pictures, level=st.floats(0, 1))
def test_boxes_contours_and_run_lengths(picture: torch.Tensor, level: float):
    mask = picture < level
    (box,) = anatomy.bounding_boxes(mask[None, None])[0]
    lines = anatomy.contours(mask)
    counts = run_lengths(mask)
    assert sum(counts) == 99 and all(n > 0 for n in counts[1:])
    assert np.array_equal(np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(11, 9).T, mask.numpy())
    if not mask.any():
        assert box.isnan().all() and lines == []
        return
    points = np.concatenate(lines)
    assert box.tolist() == [*points.min(axis=0), *points.max(axis=0)]
    row, column = mask.nonzero().T.tolist()
    assert box.tolist() == [min(column), min(row), max(column) + 1, max(row) + 1]
    assert all((line[0] == line[-1]).all() for line in lines)
    row, column = np.indices((9, 11))
    crossings = np.zeros((9, 11), int)  # of the contours by a line from just below each pixel centre to the right
    for (x0, y0), (x1, y1) in ((a, b) for line in lines for a, b in zip(line, line[1:])):
        y = row + 0.501
        if y0 != y1:
            crossings += ((y0 > y) != (y1 > y)) & (column + 0.5 < x0 + (y - y0) * (x1 - x0) / (y1 - y0))
    assert np.array_equal(crossings % 2 == 1, mask.numpy())


# Files


def test_coco_counts_on_over_batches(tmp_path: Path):
    drr, poses = renderer(patient()), view("AP", (0.0, 0.0, 0.0), (3.0, 0.0, 0.0))
    names = ["nowhere", "shell", "ball"]
    masks, _ = anatomy.structure_masks(drr, poses, names)
    masks[1, 2] = False
    batches = ((torch.full((1, 1, 90, 110), i / 4), mask[None]) for i, mask in enumerate(masks))
    anatomy.save_coco(tmp_path / "deep" / "set", batches, names, verbose=False)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["set"]
    coco = json.loads((tmp_path / "deep" / "set" / "annotations.json").read_text())
    assert [(a["image_id"], a["category_id"]) for a in coco["annotations"]] == [(1, 2), (1, 3), (2, 2), (3, 2), (3, 3)]
    assert [a["id"] for a in coco["annotations"]] == [1, 2, 3, 4, 5]
    assert [(c["id"], c["name"]) for c in coco["categories"]] == [(1, "nowhere"), (2, "shell"), (3, "ball")]
    for image, value in zip(coco["images"], (0, 64, 128)):
        picture = np.asarray(Image.open(tmp_path / "deep" / "set" / "images" / image["file_name"]))
        assert picture.shape == (image["height"], image["width"]) == (90, 110) and (picture == value).all()
    for a in coco["annotations"]:
        mask = masks[a["image_id"] - 1, a["category_id"] - 1].numpy()
        row, column = np.nonzero(mask)
        assert (
            a["bbox"] == [column.min(), row.min(), np.ptp(column) + 1, np.ptp(row) + 1]
            and a["area"] == len(row)
            and a["iscrowd"] == 0
        )


def test_a_data_set_that_fails_leaves_nothing(tmp_path: Path):
    masks = torch.ones(1, 1, 4, 5, dtype=torch.bool)

    def broken():
        yield torch.zeros(1, 1, 4, 5), masks
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        anatomy.save_coco(tmp_path / "set", broken(), ["a"], verbose=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "set").mkdir()
    for save in (
        lambda: anatomy.save_coco(tmp_path / "set", broken(), ["a"]),
        lambda: anatomy.save_masks_png(tmp_path / "set", masks, ["a"]),
        lambda: anatomy.save_masks_nifti(tmp_path / "set", masks, ["a"]),
    ):
        with pytest.raises(FileExistsError, match="exists already; choose another name"):
            save()
    assert not list((tmp_path / "set").iterdir())


def test_progress_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture):
    batch = torch.zeros(1, 1, 4, 5), torch.ones(1, 1, 4, 5, dtype=torch.bool)
    anatomy.save_coco(tmp_path / "a", [batch], ["a"])
    assert "Writing pictures" in capsys.readouterr().err
    anatomy.save_coco(tmp_path / "b", [batch], ["a"], verbose=False)
    assert not capsys.readouterr().err


@pytest.mark.parametrize(
    ("images", "masks", "names", "message"),
    [
        (torch.zeros(1, 1, 4, 5), torch.ones(1, 2, 4, 5, dtype=torch.bool), ["a"], "each of the 2 channels"),
        (torch.zeros(1, 1, 4, 5), torch.ones(1, 1, 4, 5, dtype=torch.bool), "a", "each of the 1 channels"),
        (torch.zeros(1, 1, 4, 5), torch.ones(1, 1, 4, 5), ["a"], "masks must be booleans"),
        (
            torch.zeros(1, 3, 4, 5),
            torch.ones(1, 1, 4, 5, dtype=torch.bool),
            ["a"],
            r"\(1, 1, 4, 5\), not \(1, 3, 4, 5\)",
        ),
        (
            torch.zeros(2, 1, 4, 5),
            torch.ones(3, 1, 4, 5, dtype=torch.bool),
            ["a"],
            r"\(3, 1, 4, 5\), not \(2, 1, 4, 5\)",
        ),
        (torch.full((1, 1, 4, 5), torch.nan), torch.ones(1, 1, 4, 5, dtype=torch.bool), ["a"], "pictures from 0 to 1"),
    ],
)
def test_bad_data_sets(images, masks, names, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        anatomy.save_coco(tmp_path / "set", [(images, masks)], names, verbose=False)
    assert not list(tmp_path.iterdir())
