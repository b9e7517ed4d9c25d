"""Public data sets: what is read from files in their layouts is what was photographed, and a file that cannot be read
says why."""

from __future__ import annotations

import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from dataset_files import (
    ATTENUATION,
    BONES,
    CONTRAST,
    FEMUR_FROM_PELVIS,
    LANDMARKS,
    SDD,
    Film,
    write_deepfluoro,
    write_ljubljana,
)

from benchmarks import datasets as evaluation
from diffdrr.compare import target_registration_error
from diffdrr.geometry import RigidTransform
from diffdrr.rendering import DRR
from diffdrr.xrays import DeepFluoro, Ljubljana

PIXELS = 1e-3  # the files hold matrices in float32: coordinates of up to 2000 mm are known to 1e-4 mm
RELATIVE = 1e-4  # of the brightest pixel: a ray that moves by 1e-4 mm enters other voxels near edges
FILMS = {
    "square": Film(60, 60, 6.5, 6.5, (0.0, 0.0)),
    "portrait": Film(),
    "landscape": Film(40, 72, 7.5, 5.0, (-6.0, 4.75)),
}
BORDER = 3


@pytest.fixture(scope="module", params=FILMS)
def hip(request, tmp_path_factory):
    path, film = tmp_path_factory.mktemp(request.param) / "hip.h5", FILMS[request.param]
    integrals = write_deepfluoro(path, film)
    return DeepFluoro(path, "17-1882", border=BORDER), integrals, film


@pytest.fixture(scope="module", params=FILMS)
def brain(request, tmp_path_factory):
    path, film = tmp_path_factory.mktemp(request.param) / "brain.h5", FILMS[request.param]
    integrals = write_ljubljana(path, film)
    return Ljubljana(path, "subject01"), integrals, film


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    write_deepfluoro(folder / "hip.h5"), write_ljubljana(folder / "brain.h5")
    return folder


@pytest.fixture
def copy(files, tmp_path):
    "Copies of the files, to be damaged."
    for name in ("hip.h5", "brain.h5"):
        (tmp_path / name).write_bytes((files / name).read_bytes())
    return tmp_path


def assert_consistent(data, xray, integrals, scale, film):
    "The rendered picture is the stored one, the fiducials are seen on the landmarks, and the detector has its size."
    measures = [getattr(xray.camera, name) for name in ("sdd", "delx", "dely")]
    assert measures == pytest.approx([SDD, film.col_spacing, film.row_spacing], rel=1e-6)
    drr = DRR(data.subject, **vars(xray.camera))
    picture = drr(xray.pose)
    assert picture.shape == xray.image.shape
    assert xray.bright_bones and xray.logarithmic
    brightest = float(integrals.max())
    assert (picture[0, 0] - torch.from_numpy(np.ascontiguousarray(integrals))).abs().max() < RELATIVE * brightest
    assert (scale * picture - xray.image).abs().max() < RELATIVE * scale * brightest
    seen = drr.perspective_projection(xray.pose, data.subject.fiducials)
    assert (seen - xray.landmarks).abs().max() < PIXELS
    assert torch.allclose(torch.linalg.det(xray.pose.rotation), torch.ones(1), atol=1e-5)


def test_deepfluoro_round_trip(hip):
    data, pictures, film = hip
    assert len(data) == len(pictures) == 3
    for xray, integrals in zip(data, pictures):
        assert_consistent(data, xray, integrals[BORDER:-BORDER, BORDER:-BORDER], ATTENUATION, film)
        assert xray.camera.reverse_x_axis is True


def test_ljubljana_round_trip(brain):
    data, pictures, film = brain
    assert len(data) == len(pictures) == 2
    for xray, integrals in zip(data, pictures):
        assert_consistent(data, xray, integrals, CONTRAST, film)
        assert xray.camera.reverse_x_axis is False


def assert_bins(data, n):
    "Whatever is cut off, the landmarks are seen where they were, and the picture is the average of the large one."
    large, raw = data[1], data.raw(1)
    small = large.bin(n)
    seen = DRR(data.subject, **vars(small.camera)).perspective_projection(small.pose, data.subject.fiducials)
    assert (n * seen - large.landmarks).abs().max() < n * PIXELS
    rows, cols = (size // n for size in large.image.shape[-2:])
    blocks = raw.image[0, 0, : rows * n, : cols * n].reshape(rows, n, cols, n)
    assert torch.allclose(raw.bin(n).image[0, 0], blocks.mean(dim=(1, 3)), rtol=1e-5)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_binning_of_deepfluoro(hip, n):
    assert_bins(hip[0], n)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_binning_of_ljubljana(brain, n):
    assert_bins(brain[0], n)


def test_pixels_of_the_file_are_kept(files):
    with h5py.File(files / "hip.h5") as file:
        stored = [file[f"17-1882/projections/{i:03d}/image/pixels"][()] for i in range(2)]
    data = DeepFluoro(files / "hip.h5", "17-1882", border=0)
    assert np.array_equal(data.raw(0).image[0, 0], stored[0])
    assert np.array_equal(data.raw(1).image[0, 0], stored[1][::-1, ::-1])  # it lies on its head


def test_subject_of_deepfluoro(files):
    data = DeepFluoro(files / "hip.h5", "17-1882", border=0)
    assert data.subject.landmark_names == sorted(LANDMARKS)
    assert dict(zip(data.subject.structures["id"], data.subject.structures["structure"])) == BONES
    left = data.subject.fiducials[0, [name.endswith("-l") for name in data.subject.landmark_names], 0]
    assert (left < 0).all()  # RAS: the left is where x is negative
    offset = np.array([LANDMARKS[name] for name in sorted(LANDMARKS)]) * [-1, -1, 1]
    assert np.allclose(data.subject.fiducials[0], offset, atol=1e-3)  # the centre of the volume is the origin
    voxels = np.argwhere(data.subject.mask.data[0].numpy() == 1)
    assert (voxels @ data.subject.volume.affine[:3, :3].T + data.subject.volume.affine[:3, 3])[:, 0].max() < 0
    channels = DRR(data.subject, **vars(data[0].camera))(data[0].pose, mask_to_channels=True)
    columns = (channels[0, 1:] * torch.arange(channels.shape[-1])).sum(dim=(1, 2)) / channels[0, 1:].sum(dim=(1, 2))
    assert columns[0] > columns[1]  # seen from the back, and mirrored: the left is on the right


def test_labels_and_bones(files):
    bright, plain = (
        DeepFluoro(files / "hip.h5", "17-1882", bone_attenuation_multiplier=3.0),
        DeepFluoro(files / "hip.h5", "17-1882"),
    )
    assert not torch.equal(bright.subject.density.data, plain.subject.density.data)
    left = DeepFluoro(files / "hip.h5", "17-1882", labels=1).subject
    assert torch.equal(left.density.data > 0, (plain.subject.density.data > 0) & (plain.subject.mask.data == 1))


def test_femur_has_its_own_pose(files):
    pelvis, femur = (DeepFluoro(files / "hip.h5", "17-1882", body=body, border=0) for body in ("pelvis", "left-femur"))
    lps_from_world = np.linalg.inv(pelvis.subject.world_from_scanner.numpy() @ np.diag([-1.0, -1.0, 1.0, 1.0]))
    moved = np.linalg.inv(lps_from_world) @ FEMUR_FROM_PELVIS @ lps_from_world
    assert np.allclose(femur[2].pose.matrix[0], moved @ pelvis[2].pose.matrix[0].numpy(), atol=1e-3)
    with pytest.raises(ValueError, match="cam-to-right-femur-vol"):
        DeepFluoro(files / "hip.h5", "17-1882", body="right-femur", border=0)[0]


def test_corrected_poses_see_the_volume_half_a_voxel_on(files):
    "The camera moves by half a voxel to lower indices; so does the picture of a volume that is moved the same way."
    published, corrected = (DeepFluoro(files / "hip.h5", "17-1882", border=0, corrected=c) for c in (False, True))
    a, b = published[1], corrected[1]
    shifted = DRR(
        published.subject, **vars(a.camera), voxel_shift=0.0
    )  # voxels half a voxel further, as the renderer of the data set had them
    exact = DRR(published.subject, **vars(b.camera))
    assert (shifted(a.pose) - exact(b.pose)).abs().max() < RELATIVE * exact(b.pose).max()
    assert torch.equal(a.landmarks, b.landmarks)


def test_sequence(files):
    data = DeepFluoro(files / "hip.h5", "17-1882", border=0)
    assert data.names == ["000", "001", "002"] and len(list(data)) == 3
    assert torch.equal(data[-1].image, data[2].image)
    for index in (3, -4):
        with pytest.raises(IndexError, match=rf"from 0 to 2, .* not {index}"):
            data[index]
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[0].pose.matrix, data[0].pose.matrix)


def test_nothing_is_read_before_it_is_needed(copy):
    data = DeepFluoro(copy / "hip.h5", "17-1882", border=0)
    with h5py.File(copy / "hip.h5", "r+") as file:  # it is not kept open
        del file["17-1882/vol"]
    assert len(data) == 3
    with pytest.raises(ValueError, match="no '17-1882/vol'"):
        data[0]


def test_view_over_all_frames(copy):
    with h5py.File(copy / "brain.h5", "r+") as file:
        file.copy("subject01/proj-lat", "subject01/proj-lat-max")
    data = Ljubljana(copy / "brain.h5", "subject01", views=["lat-max"])
    assert data.names == ["lat-max"] and torch.equal(
        data.raw(0).image, Ljubljana(copy / "brain.h5", "subject01").raw(1).image
    )


def test_noise_of_the_volume_is_removed(files):
    kept = Ljubljana(files / "brain.h5", "subject01", background=0.0).subject.density.data
    removed = Ljubljana(files / "brain.h5", "subject01").subject.density.data
    assert (kept > 0).sum() > 2 * (removed > 0).sum() > 0


@pytest.mark.parametrize(
    "missing",
    [
        "proj-params",
        "proj-params/intrinsic",
        "17-1882/projections",
        "17-1882/vol-seg/labels-def",
        "17-1882/vol-landmarks",
        "17-1882/projections/001/gt-poses",
        "17-1882/projections/001/image/pixels",
    ],
)
def test_missing_group_of_deepfluoro(copy, missing):
    with h5py.File(copy / "hip.h5", "r+") as file:
        del file[missing]
    with pytest.raises(ValueError, match=f"no '{missing}'"):
        DeepFluoro(copy / "hip.h5", "17-1882", border=0)[1]


@pytest.mark.parametrize("missing", ["subject01/volume/origin", "subject01/points", "subject01/proj-lat/extrinsic"])
def test_missing_group_of_ljubljana(copy, missing):
    with h5py.File(copy / "brain.h5", "r+") as file:
        del file[missing]
    with pytest.raises(ValueError, match=f"no '{missing}'"):
        Ljubljana(copy / "brain.h5", "subject01")[1]


def test_bad_input(files, tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a file; download"):
        DeepFluoro(tmp_path / "none.h5", "17-1882")
    (tmp_path / "archive.zip").write_bytes(b"PK\x03\x04")
    with pytest.raises(ValueError, match="not an HDF5 file"):
        Ljubljana(tmp_path / "archive.zip", "subject01")
    with pytest.raises(ValueError, match="no 'proj-params'"):
        DeepFluoro(files / "brain.h5", "17-1882")
    with pytest.raises(ValueError, match="no group 'subject01'"):
        Ljubljana(files / "hip.h5", "subject01")
    with pytest.raises(ValueError, match="one of '17-1882', '18-1109', not 'x'"):
        DeepFluoro(files / "hip.h5", "x")
    with pytest.raises(ValueError, match="one of 'subject01', 'subject02', not 3"):
        Ljubljana(files / "brain.h5", 3)
    with pytest.raises(ValueError, match="body must be one of 'pelvis', 'left-femur', 'right-femur', not 'hip'"):
        DeepFluoro(files / "hip.h5", "17-1882", body="hip")
    with pytest.raises(
        ValueError, match="border must be a whole number from 0 to 25, not 26; it is cut off on each side"
    ):
        DeepFluoro(files / "hip.h5", "17-1882", border=26)[0]
    with pytest.raises(ValueError, match="some of 'ap', 'lat', not 'pa'"):
        Ljubljana(files / "brain.h5", "subject01", views=("ap", "pa"))
    for n in (0, 1.5, 53, True):
        with pytest.raises(ValueError, match="n must be a whole number from 1 to 52"):
            Ljubljana(files / "brain.h5", "subject01")[0].bin(n)


def test_error_without_h5py(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ImportError, match=r"\[datasets\]"):
        DeepFluoro(files / "hip.h5", "17-1882")


def test_import_is_light():
    program = (
        "import sys, diffdrr.xrays.datasets.deepfluoro, diffdrr.xrays.datasets.ljubljana; print(*(m for m in ('h5py', "
        "'torchio', 'pandas', 'SimpleITK', 'matplotlib.pyplot') if m in sys.modules))"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    ).stdout.split()
    assert loaded == []


# The evaluation


@dataclass
class Result:
    pose: RigidTransform
    failed: bool = False
    reason: str = ""


def leave(drr: DRR, xray: torch.Tensor, init: RigidTransform) -> Result:
    "A registration that does nothing."
    return Result(init, True, "nothing was tried")


def test_starting_poses_have_the_wanted_error(files):
    data = DeepFluoro(files / "hip.h5", "17-1882", border=0)
    generator, true, points = torch.Generator().manual_seed(0), data[0].pose, data.subject.fiducials
    starts = [
        evaluation.starting_pose(true, points, error, generator) for error in (0.01, 1.0, 7.5, 20.0) for _ in range(3)
    ]
    errors = torch.cat([target_registration_error(true, start, points) for start in starts])
    assert torch.allclose(errors, torch.tensor([0.01, 1.0, 7.5, 20.0]).repeat_interleave(3), atol=1e-3)
    assert len({tuple(start.translation[0].tolist()) for start in starts}) == len(starts)
    assert torch.allclose(
        torch.linalg.det(torch.cat([start.rotation for start in starts])), torch.ones(len(starts)), atol=1e-5
    )


def test_evaluation_measures_the_start_of_an_idle_registration(files, capsys, tmp_path):
    options = [
        "ljubljana",
        str(files / "brain.h5"),
        "--specimens",
        "subject01",
        "--furthest",
        "4",
        "--factor",
        "4",
        "--starts",
        "2",
        "--csv",
        str(tmp_path / "out" / "runs.csv"),
    ]
    measured = evaluation.main(options, leave)
    assert len(measured) == 2 * 4 * 2 and measured["failed"].all()
    assert np.allclose(measured["mtre"], measured["start"], atol=1e-3)
    assert (measured["mrpd"] < measured["mtre"] + 1e-4).all()
    assert measured.groupby(["xray", measured["start"].astype(int)]).size().eq(2).all()
    assert "| subject01 |" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "out" / "runs.csv")) == len(measured)


def test_evaluation_of_a_registration_that_knows_the_truth(files):
    """A registration that finds the pose from what it is given, the X-ray: the truth of the sample with the same
    picture."""
    data = DeepFluoro(files / "hip.h5", "17-1882", border=0)
    truths = [(sample.bin(4).image, sample) for sample in data]

    def know(drr, xray, init):
        sample = next(sample for seen, sample in truths if torch.equal(seen, xray))
        assert (
            ATTENUATION * drr(sample.pose, n_points=None) - xray
        ).abs().mean() < 0.05 * xray.mean()  # the camera is that of the X-ray
        return Result(sample.pose)

    options = ["deepfluoro", str(files / "hip.h5"), "--furthest", "3", "--factor", "4", "--border", "0"]
    measured = evaluation.main([*options, "--published"], know)
    table = evaluation.summarize(measured).set_index("specimen")
    assert list(table.index) == ["17-1882", "18-1109", "all"]
    assert list(table["X-rays"]) == [3, 3, 6] and list(table["runs"]) == [9, 9, 18]
    assert (table[["mTRE < 1 mm, %", "mRPD < 2 mm, %", "within 1 degree, %"]] == 100).all(axis=None)
    assert (table["capture range, mm"] == 3).all() and (table["reported as failed, %"] == 0).all()
    assert evaluation.load(evaluation.parse(options))[0].corrected


def test_capture_range_ends_where_registrations_fail():
    start = pd.Series((np.arange(200) + 0.5) / 20)  # 20 in each of 10 mm
    always, never = start > 0, start < 0
    assert evaluation.capture_range(start, (start < 4) | (start >= 5)) == 4.0
    assert evaluation.capture_range(start, (start < 4) | (start >= 5), width=2.0) == 4.0
    assert evaluation.capture_range(start, always) == 10.0
    assert evaluation.capture_range(start, never) == 0.0
    assert evaluation.capture_range(start, start % 1 >= 0.05) == 10.0  # 19 of 20 succeed
    apart = (start < 2) | (start >= 3)  # no start from 2 to 3 mm
    assert evaluation.capture_range(start[apart], always[apart]) == 10.0
    assert evaluation.capture_range(start[apart], start[apart] < 3) == 2.0


def test_doubtful_xrays_are_left_out(copy):
    with h5py.File(copy / "hip.h5", "r+") as file:
        file["17-1882/projections/003"] = file["17-1882/projections/000"]
    data = DeepFluoro(copy / "hip.h5", "17-1882")
    assert evaluation.trusted(data, False, None) == ["000", "001", "002"]
    assert evaluation.trusted(data, True, None) == ["000", "001", "002", "003"]
    assert evaluation.trusted(data, False, 2) == ["000", "001"]
