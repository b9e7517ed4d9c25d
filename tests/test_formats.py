"""CTs in the formats that hospitals and programs write, and files that cannot be rendered."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from diffdrr.geometry import convert
from diffdrr.rendering import DRR
from diffdrr.volumes import load_example_ct, read

SHAPE, SPACING, ORIGIN = (12, 11, 10), (2.0, 2.5, 3.0), (-40.0, 15.0, -300.0)


@pytest.fixture(scope="module")
def image() -> sitk.Image:
    "A small CT with a different number of voxels along each axis, off the origin, with a bright corner."
    rng = np.random.default_rng(0)
    voxels = rng.integers(-1000, 600, SHAPE[::-1]).astype(np.int16)
    voxels[:4, :4, :4] = 1500
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(SPACING)
    image.SetOrigin(ORIGIN)
    return image


def write_dicom(folder: Path, image: sitk.Image, series: str) -> None:
    "Write a CT as a DICOM series, one file a slice."
    folder.mkdir(exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    for k in range(image.GetDepth()):
        piece = image[:, :, k]
        position = image.TransformIndexToPhysicalPoint((0, 0, k))
        tags = {
            "0008|0060": "CT",
            "0020|000e": series,
            "0020|000d": "1.2.3",
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{series}.{k}",
            "0020|0013": str(k + 1),
            "0020|0032": "\\".join(map(str, position)),
            "0020|0037": "1\\0\\0\\0\\1\\0",
            "0018|0050": str(SPACING[2]),
            "0028|1052": "0",
            "0028|1053": "1",
        }
        for tag, value in tags.items():
            piece.SetMetaData(tag, value)
        writer.SetFileName(str(folder / f"{series}-{k:03}.dcm"))
        writer.Execute(piece)


def picture(subject) -> torch.Tensor:
    pose = convert(
        torch.tensor([[0.3, 0.2, 0.1]]),
        torch.tensor([[0.0, 200.0, 0.0]]),
        parameterization="euler_angles",
        convention="ZXY",
    )
    return DRR(subject, sdd=300.0, height=20, delx=3.0)(pose)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii", ".nrrd", ".mha", ".mhd"])
def test_every_format_gives_the_same_picture(tmp_path, image, suffix):
    sitk.WriteImage(image, str(tmp_path / f"ct{suffix}"))
    sitk.WriteImage(image, str(tmp_path / "reference.nii"))
    assert torch.allclose(picture(read(tmp_path / f"ct{suffix}")), picture(read(tmp_path / "reference.nii")), atol=1e-3)


def test_dicom_series(tmp_path, image):
    write_dicom(tmp_path / "series", image, "1.2.3.4")
    sitk.WriteImage(image, str(tmp_path / "reference.nii"))
    subject = read(tmp_path / "series")
    assert tuple(subject.volume.spatial_shape) == SHAPE
    assert torch.allclose(picture(subject), picture(read(tmp_path / "reference.nii")), atol=1e-3)


def test_mixed_dicom_folder_names_its_series(tmp_path, image):
    write_dicom(tmp_path, image, "1.2.3.4")
    write_dicom(tmp_path, image[:, :, :4], "1.2.3.5")
    with pytest.raises(ValueError, match="2 DICOM series.*1.2.3.5"):
        read(tmp_path)


def test_stored_order_of_axes_does_not_matter(tmp_path, image):
    sitk.WriteImage(image, str(tmp_path / "ct.nii"))
    sitk.WriteImage(sitk.DICOMOrient(image, "SRP"), str(tmp_path / "turned.nii"))
    assert torch.allclose(picture(read(tmp_path / "ct.nii")), picture(read(tmp_path / "turned.nii")), atol=1e-3)


def test_label_map_on_another_grid(tmp_path, image):
    "A label map stored in another orientation selects the same voxels."
    labels = sitk.Cast(image > 1000, sitk.sitkUInt8)
    sitk.WriteImage(image, str(tmp_path / "ct.nii"))
    sitk.WriteImage(labels, str(tmp_path / "labels.nii"))
    sitk.WriteImage(sitk.DICOMOrient(labels, "ASL"), str(tmp_path / "turned.nii"))
    same, turned = (read(tmp_path / "ct.nii", tmp_path / name, labels=1) for name in ("labels.nii", "turned.nii"))
    assert torch.equal(same.mask.data, turned.mask.data) and (same.density.data > 0).sum() == 64
    assert torch.allclose(picture(same), picture(turned), atol=1e-4)


@pytest.mark.parametrize(
    "shape, message",
    [((3, 4, 5, 6), "must hold one 3D image"), ((5, 6), "single slice|three-dimensional")],
    ids=["4D", "2D"],
)
def test_wrong_dimensions(tmp_path, shape, message):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros(shape, dtype=np.float32), isVector=False), str(tmp_path / "ct.nii"))
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "ct.nii")


def test_nan_voxels(tmp_path):
    voxels = np.zeros((4, 5, 6), dtype=np.float32)
    voxels[1, 2, 3] = np.nan
    sitk.WriteImage(sitk.GetImageFromArray(voxels), str(tmp_path / "ct.nrrd"))
    with pytest.raises(ValueError, match="1 voxels are NaN"):
        read(tmp_path / "ct.nrrd")


def test_real_ct_offline(monkeypatch):
    "Without a network, the message says what works without one."
    import torchio

    def offline(name):
        raise OSError("no route to host")

    monkeypatch.setattr(torchio.datasets, "Slicer", offline)
    with pytest.raises(ConnectionError, match=r"no route to host.*load_example_ct\(\)"):
        load_example_ct("CTChest")


def test_interrupted_cache_leaves_nothing_behind(tmp_path, monkeypatch):
    "A cache file appears whole or not at all."
    monkeypatch.setenv("DIFFDRR_CACHE", str(tmp_path))

    def full(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space left"):
        load_example_ct(shape=(8, 8, 8), spacing=(40.0, 40, 40))
    assert list(tmp_path.iterdir()) == []
