"""DICOM series as scanners, archives and transfers leave them: each lies where its slices say, or is refused with the
reason and the remedy."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
import torch
import torchio
from dicom_files import (
    SERIES,
    SPACING,
    enhanced_dataset,
    item,
    random_pixels,
    save,
    slice_dataset,
    straight,
    write_series,
)
from pydicom import Dataset, dcmread, dcmwrite
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    EncapsulatedPDFStorage,
    ExplicitVRBigEndian,
    ImplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    RLELossless,
    RTDoseStorage,
    RTStructureSetStorage,
    SecondaryCaptureImageStorage,
)

from diffdrr.volumes import read

RAS = np.array([-1.0, -1, 1])  # from DICOM's LPS
EXACT = 1e-6  # mm: the positions in the files have six decimals


def volume_of(path: Path, **choices):
    "Read a CT in the coordinates of its files."
    return read(path, center_volume=False, **choices).volume


def misplaced(volume, positions: np.ndarray, pixels: np.ndarray, intercept: float = -1024) -> float:
    """Measure the largest distance, in mm, between the places of voxels and those of the slices whose values they
    have; a slice that is nowhere in the volume is infinitely far."""
    slices = volume.data[0].permute(2, 1, 0).numpy()
    worst = 0.0
    for position, values in zip(positions, pixels, strict=True):
        (found,) = np.nonzero((slices == values + float(intercept)).all(axis=(1, 2)))
        if len(found) != 1:
            return np.inf
        place = volume.affine @ np.array([0, 0, found[0], 1])
        worst = max(worst, np.linalg.norm(place[:3] - RAS * position))
    return worst


def turned(*angles: float) -> np.ndarray:
    "Make the directions of rows and columns, and the normal, as rows of a matrix."
    matrix = np.eye(3)
    for axis, angle in enumerate(np.deg2rad(angles)):
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[a, a], turn[a, b], turn[b, a], turn[b, b] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
        matrix = turn @ matrix
    return matrix.T


ORIENTATIONS = {
    "axial": np.eye(3),
    "coronal": np.array([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]]),
    "sagittal": np.array([[0.0, 1, 0], [0, 0, -1], [-1, 0, 0]]),
    "prone": np.array([[-1.0, 0, 0], [0, -1, 0], [0, 0, 1]]),
    "feet first": np.array([[-1.0, 0, 0], [0, 1, 0], [0, 0, -1]]),
    "decubitus": np.array([[0.0, 1, 0], [-1, 0, 0], [0, 0, 1]]),
    "oblique": turned(20, -35, 50),
}


@pytest.mark.parametrize("order", ["forward", "backward", "shuffled"])
@pytest.mark.parametrize("name", ORIENTATIONS)
def test_regular_series(tmp_path, name, order):
    "Slices lie where their headers say, whatever the orientation and the order of the files."
    right, down, normal = ORIENTATIONS[name]
    order = {"forward": range(7), "backward": range(6, -1, -1), "shuffled": [3, 0, 6, 1, 5, 2, 4]}[order]
    positions = straight(7, 2.5 * normal)[list(order)]
    cosines = [float(f"{x:.12f}") for x in (*right, *down)]
    pixels = write_series(tmp_path, positions, ImageOrientationPatient=cosines)
    volume = volume_of(tmp_path)
    assert misplaced(volume, positions, pixels) < 2 * EXACT
    assert np.allclose(volume.affine[:3, 0], RAS * right * SPACING[1], atol=EXACT)
    assert np.allclose(volume.affine[:3, 1], RAS * down * SPACING[0], atol=EXACT)


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_regular_series_reads_as_before(tmp_path, name):
    "SimpleITK's reader, which took every series before, gives the same voxels at the same places."
    right, down, normal = ORIENTATIONS[name]
    cosines = [float(f"{x:.12f}") for x in (*right, *down)]
    write_series(tmp_path, straight(5, 2.5 * normal), ImageOrientationPatient=cosines)
    before, now = read_with_sitk(tmp_path), volume_of(tmp_path)
    assert np.array_equal(before[0], now.data[0].numpy())
    assert np.allclose(before[1], now.affine, atol=EXACT)


def read_with_sitk(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    "Read a folder as TorchIO does: voxels, and the matrix to RAS."
    image = sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder)))
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return sitk.GetArrayFromImage(image).transpose(), np.diag([-1.0, -1, 1, 1]) @ affine


@pytest.mark.parametrize("angle", [16.0, -18.0])
def test_gantry_tilt(tmp_path, angle):
    "The table moves along z while slices are tilted: the affine has the shear."
    tilt = np.deg2rad(angle)
    cosines = [1, 0, 0, 0, round(np.cos(tilt), 9), round(np.sin(tilt), 9)]
    positions = straight(9, (0, 0, 5.0))
    pixels = write_series(tmp_path, positions, ImageOrientationPatient=cosines, GantryDetectorTilt=angle)
    volume = volume_of(tmp_path)
    assert misplaced(volume, positions, pixels) < EXACT
    corner = volume.affine @ [4, 5, 8, 1]
    right, down = np.array(cosines).reshape(2, 3)
    assert np.allclose(corner[:3], RAS * (positions[8] + 4 * 0.7 * right + 5 * 0.8 * down), atol=1e-5)


@pytest.mark.parametrize(
    "spread",
    [(0, 0, 1e-4), (0.02, -0.02, 0.03), (0, 0, 0.05)],
    ids=["fourth decimal", "in the plane", "second decimal"],
)
def test_rounded_positions_are_regular(tmp_path, spread):
    positions = straight(12)
    positions[1:-1] += np.where(np.arange(10)[:, None] % 2, 1, -1) * np.array(spread)
    pixels = write_series(tmp_path, positions)
    assert misplaced(volume_of(tmp_path), positions, pixels) < 0.1 * min(SPACING)


def test_sign_of_the_spacing_between_slices_does_not_matter(tmp_path):
    pixels = write_series(tmp_path, straight(5), SpacingBetweenSlices=-2.5)
    assert misplaced(volume_of(tmp_path), straight(5), pixels) < EXACT


UNEVEN = {
    "a missing slice": (np.delete(straight(8), 4, 0), "5 mm between '0003.dcm' and '0004.dcm'"),
    "a far slice": (np.vstack([straight(5, 1.25), straight(1) + [0, 0, 207.5]]), "202.5 mm between"),
    "three distances": (straight(7) * [1, 1, 0] + np.c_[[0] * 7, [0] * 7, [0, 1.08, 2.16, 3.24, 7.24, 11.24, 18.24]],
                        "1.08 mm.*4 mm between.*7 mm between"),
    "growing distances": (straight(9) + np.c_[[0] * 9, [0] * 9, 0.05 * np.arange(9) ** 2], "uneven distances"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_distances(tmp_path, name):
    positions, message = UNEVEN[name]
    write_series(tmp_path, positions)
    with pytest.raises(ValueError, match=f"{message}.*slice_spacing="):
        read(tmp_path)


def test_resampling_to_even_distances(tmp_path):
    "The value of a voxel is its depth: interpolated slices must have that of their place."
    positions = straight(7, 1.0, (0, 0, 0))
    positions[:, 2] = [0, 1, 2, 5, 6, 9, 10]
    write_series(tmp_path, positions, np.repeat(100 * positions[:, 2], 30).reshape(7, 6, 5).astype(np.uint16))
    volume = volume_of(tmp_path, slice_spacing=2.5)
    assert torch.allclose(volume.data[0, 2, 3].double(), torch.tensor([0, 250, 500, 750, 1000.0]).double() - 1024)
    assert np.allclose(volume.affine[:3, 2], [0, 0, 2.5])


def repeated(pixels: np.ndarray) -> np.ndarray:
    "Make slices of twice as many, of which no two are the same."
    return np.concatenate([pixels, pixels[::-1] + 1])


DOUBLES = {
    "one": (np.vstack([straight(5), straight(5)[2:3]]), "1 of 6 slices have the place of another: '0002.dcm' and"),
    "all": (np.vstack([straight(5), straight(5)]), "5 of 10 slices.*'0000.dcm' and '0005.dcm'"),
    "four at one place": (np.vstack([straight(5), np.repeat(straight(5)[2:3], 3, 0)]), "3 of 8 slices"),
    "nothing else": (np.repeat(straight(1), 4, 0), "3 of 4 slices"),
}  # fmt: skip


@pytest.mark.parametrize("name", DOUBLES)
def test_doubled_slices(tmp_path, name):
    positions, message = DOUBLES[name]
    write_series(tmp_path, positions)
    with pytest.raises(ValueError, match=f"{message}.*keep one at each place"):
        read(tmp_path)


def test_copies_of_a_file_are_left_out(tmp_path):
    pixels = write_series(tmp_path, straight(5))
    shutil.copy(tmp_path / "0002.dcm", tmp_path / "copy of 0002.dcm")
    with pytest.warns(UserWarning, match="1 of 6 files are left out, such as 'copy of 0002.dcm': they are copies"):
        volume = volume_of(tmp_path)
    assert misplaced(volume, straight(5), pixels) < EXACT


PHASES = {
    "temporal position": ("TemporalPositionIdentifier", [1, 2]),
    "acquisition": ("AcquisitionNumber", [3, 4]),
    "trigger time": ("TriggerTime", [120.5, 840.0]),
    "kernel": ("ConvolutionKernel", ["B30f", "B70f"]),
}


@pytest.mark.parametrize("lost", [0, 1], ids=["whole", "one phase shorter"])
@pytest.mark.parametrize("name", PHASES)
def test_phases(tmp_path, name, lost):
    "Two scans of one place in one series: the user chooses by the value of the tag."
    keyword, values = PHASES[name]
    first = write_series(tmp_path, straight(5), prefix="a", **{keyword: values[0]})
    second = random_pixels(5) + 4000
    write_series(tmp_path, straight(5)[lost:], second[lost:], prefix="b", **{keyword: values[1]})
    with pytest.raises(ValueError, match=rf"2 phases or scans.*{keyword}.*{values[0]}.*5 slices.*phase='{values[0]:}"):
        read(tmp_path)
    assert misplaced(volume_of(tmp_path, phase=values[0]), straight(5), first) < EXACT
    assert misplaced(volume_of(tmp_path, phase=str(values[1])), straight(5)[lost:], second[lost:]) < EXACT
    with pytest.raises(ValueError, match=f"phase must be one of .*'7'.*{keyword}"):
        read(tmp_path, phase=7)


def test_a_phase_of_a_series_without_phases(tmp_path):
    write_series(tmp_path, straight(5))
    with pytest.raises(ValueError, match="phase=1 cannot be chosen: no tag divides"):
        read(tmp_path, phase=1)


LATERAL = [0, 1, 0, 0, 0, -1]
LOCALIZER = ["ORIGINAL", "PRIMARY", "LOCALIZER"]


def test_scouts_are_not_a_ct(tmp_path):
    write_series(tmp_path, straight(1), prefix="a", ImageType=LOCALIZER, ImageOrientationPatient=[1, 0, 0, 0, 0, -1])
    write_series(tmp_path, straight(1), prefix="b", ImageType=LOCALIZER, ImageOrientationPatient=LATERAL)
    with pytest.raises(ValueError, match="is a localizer .scout.*LOCALIZER.*give a CT"):
        read(tmp_path)


@pytest.mark.parametrize("shape", [(6, 5), (9, 8)], ids=["same matrix", "another matrix"])
def test_localizer_inside_a_series(tmp_path, shape):
    "It says itself that it is no slice, so it is left out, with a warning."
    pixels = write_series(tmp_path, straight(5))
    scout = random_pixels(1, *shape) + 7
    orientation = [1, 0, 0, 0, 0, -1]
    write_series(tmp_path, straight(1), scout, prefix="scout", ImageType=LOCALIZER, ImageOrientationPatient=orientation)
    with pytest.warns(UserWarning, match="1 of 6 files are left out, such as 'scout0000.dcm': they are localizers"):
        volume = volume_of(tmp_path)
    assert misplaced(volume, straight(5), pixels) < EXACT


ODD = {
    "orientation": ({"ImageOrientationPatient": LATERAL}, "another orientation or pixel spacing.*'odd0000.dcm'"),
    "pixel spacing": ({"PixelSpacing": [0.8, 0.75]}, r"another orientation or pixel spacing.*'odd0000.dcm'.*0.8.0.75"),
    "matrix": ({"pixels": random_pixels(1, 7, 5)}, r"another matrix.*'odd0000.dcm'.*Rows .0028,0010. '7'"),
    "frame of reference": ({"FrameOfReferenceUID": "1.2.3.10"}, "another frame of reference.*'odd0000.dcm'"),
    "place": ({"shift": 30.0}, "do not lie on one line: 'odd0000.dcm' is 30 mm beside it"),
    "no rescale": ({"RescaleIntercept": None}, "'odd0000.dcm', lack the tag RescaleIntercept"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_slice(tmp_path, name):
    "A slice that differs from the others is named."
    tags, message = ODD[name]
    tags = dict(tags)
    position = straight(3)[2:3] + [tags.pop("shift", 0.0), 0, 0]
    write_series(tmp_path, np.delete(straight(5), 2, 0))
    write_series(tmp_path, position, tags.pop("pixels", random_pixels(1) + 9), prefix="odd", **tags)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_two_orientations_by_halves(tmp_path):
    write_series(tmp_path, straight(4), prefix="a")
    write_series(tmp_path, straight(4, (2.5, 0, 0)), prefix="b", ImageOrientationPatient=LATERAL)
    with pytest.raises(ValueError, match="4 of 8 slices have another orientation.*and 1 more"):
        read(tmp_path)


TAGS = {
    "no spacing": ("PixelSpacing", None, "(0028,0030) of '0000.dcm' must hold 2 positive numbers, not nothing"),
    "zeros": ("PixelSpacing", [0, 0], r"(0028,0030) of '0000.dcm' must hold 2 positive numbers, not '0.0\0.0'"),
    "three spacings": ("PixelSpacing", [1, 1, 1], r"must hold 2 positive numbers, not '1.0\1.0\1.0'"),
    "a comma": ("PixelSpacing", "0,7", "must hold 2 positive numbers with a decimal point, not '0,7'"),
    "negative": ("PixelSpacing", [0.7, -0.7], r"2 positive numbers, not '0.7\-0.7'"),
    "no position": ("ImagePositionPatient", None, "ImagePositionPatient (0020,0032) of '0000.dcm' must hold 3 numbers"),
    "empty position": ("ImagePositionPatient", "", "must hold 3 numbers, not ''"),
    "no orientation": ("ImageOrientationPatient", None, "ImageOrientationPatient (0020,0037) of '0000.dcm' must"),
    "no direction": ("ImageOrientationPatient", [0] * 6, r"of length 1 at right angles, not '0.0\0.0\0.0\0.0\0.0\0.0'"),
    "oblique axes": ("ImageOrientationPatient", [1, 0, 0, 0.6, 0.8, 0], "two directions of length 1 at right angles"),
    "no slope": ("RescaleSlope", None, "RescaleSlope (0028,1053) of '0000.dcm' must hold a number, not nothing"),
    "slope of zero": ("RescaleSlope", 0, "(0028,1053) of '0000.dcm' must hold a number other than 0, not '0.0'"),
    "text as intercept": ("RescaleIntercept", "", "RescaleIntercept (0028,1052) of '0000.dcm' must hold a number"),
    "absurd slope": ("RescaleSlope", 1e9, "(0028,1053) of '0000.dcm' must hold a number from -1000000 to 1000000, not"),
    "absurd intercept": ("RescaleIntercept", -1e9, "(0028,1052) of '0000.dcm' must hold a number from -1000000 to"),
    "large slope": ("RescaleSlope", 900000, "RescaleSlope (0028,1053) '900000.0', RescaleIntercept (0028,1052) '-1024"),
    "no bits": ("BitsAllocated", 0, "(the tag BitsAllocated (0028,0100) of the file must hold 8, 16 or 32, not '0'"),
    "12 bits": ("BitsAllocated", 12, "(the tag BitsAllocated (0028,0100) of the file must hold 8, 16 or 32, not '12'"),
    "too many bits": ("BitsStored", 17, "(0028,0101) of '0000.dcm' must hold a number from 1 to 16, not '17'"),
    "negative frames": ("NumberOfFrames", -1, "(0028,0008) of the file must hold a positive number, not '-1'"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning:pydicom")
@pytest.mark.parametrize("name", TAGS)
def test_bad_tag(tmp_path, name):
    "A tag that cannot be used is named with what it holds; nothing is invented."
    keyword, value, message = TAGS[name]

    def edit(dataset, k):
        if value is None:
            delattr(dataset, keyword)
        elif isinstance(value, str):
            dataset[keyword]._value = value
        else:
            setattr(dataset, keyword, value)

    write_series(tmp_path, straight(4), edit=edit)
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path)


NOT_A_CT = {
    "secondary capture": ({"SOPClassUID": SecondaryCaptureImageStorage}, "is a secondary capture"),
    "MR": ({"Modality": "MR"}, "is an image of the modality 'MR', whose values are not Hounsfield units"),
    "8 bits": ({"pixels": random_pixels(5).astype(np.uint8)}, "has 8 bits for a pixel, too few"),
    "projection": ({"ImageType": ["DERIVED", "SECONDARY", "MIP"]}, "is a projection through slices"),
    "electron density": ({"RescaleType": "ED"}, "values in units of 'ED'"),
    "no rescale": ({"RescaleSlope": None, "RescaleIntercept": None}, "no value is near that of air.*lowest is"),
}


@pytest.mark.parametrize("name", NOT_A_CT)
def test_what_poses_as_a_ct(tmp_path, name):
    tags, message = NOT_A_CT[name]
    write_series(tmp_path, straight(5), **tags)
    with pytest.raises(ValueError, match=message):
        read(tmp_path)


def test_colours(tmp_path):
    def edit(dataset, k):
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation, dataset.PlanarConfiguration = 3, "RGB", 0
        dataset.PixelData = 3 * dataset.PixelData

    write_series(tmp_path, straight(5), edit=edit)
    with pytest.raises(ValueError, match="is a coloured picture"):
        read(tmp_path)


def test_the_class_says_the_modality_where_nothing_else_does(tmp_path):
    pixels = write_series(tmp_path, straight(5), Modality="")
    assert np.array_equal(read(tmp_path).volume.data[0].numpy().T, pixels.astype(int) - 1024)


def test_an_object_of_another_kind_is_named(tmp_path):
    dose = slice_dataset(random_pixels(1)[0], (0, 0, 0), SOPClassUID=RTDoseStorage, Modality="RTDOSE")
    with pytest.raises(ValueError, match="it holds an object of the kind 'RT Dose Storage', not slices of a CT"):
        read(save(dose, tmp_path / "dose.dcm"))


@pytest.mark.parametrize(
    "tags, message",
    [
        ({"ImageType": ["DERIVED", "SECONDARY", "REFORMATTED"]}, "computed from other images .ImageType 'DERIVED"),
        ({"RescaleSlope": None, "RescaleIntercept": None}, "values, from -1000 to .* are taken for Hounsfield units"),
    ],
    ids=["reformatted", "no rescale, but values of air"],
)
def test_doubtful_ct(tmp_path, tags, message):
    "What may be right is read with a warning."
    pixels = (random_pixels(5).astype(np.int16) - 1024).clip(-1000)
    pixels[:, 0, 0] = -1000
    write_series(tmp_path, straight(5), pixels, **{"RescaleIntercept": 0, **tags})
    with pytest.warns(UserWarning, match=message):
        assert misplaced(volume_of(tmp_path), straight(5), pixels, intercept=0) < EXACT


def test_slopes_of_each_slice(tmp_path):
    "Hounsfield units are computed with the slope and intercept of their own slice."
    slopes, intercepts = [1, 2, 0.5, 1.25, 1], [-1024, -1000, -1024.5, -1024, 0]

    def edit(dataset, k):
        dataset.RescaleSlope, dataset.RescaleIntercept = slopes[k], intercepts[k]

    pixels = write_series(tmp_path, straight(5), edit=edit)
    expected = pixels * np.array(slopes)[:, None, None] + np.array(intercepts)[:, None, None]
    assert np.array_equal(volume_of(tmp_path).data[0].permute(2, 1, 0).numpy(), expected)


PADDING = {
    "unsigned wrap, no tag": (np.uint16, 63536, {}),
    "unsigned wrap in 12 bits": (np.uint16, 63536, {"BitsStored": 12, "HighBit": 11}),
    "unsigned wrap in the tag": (np.uint16, 63536, {"PixelPaddingValue": 63536}),
    "signed": (np.int16, 9000, {"PixelPaddingValue": 9000}),
    "a range": (np.uint16, 4090, {"PixelPaddingValue": 4095, "PixelPaddingRangeLimit": 4080}),
}


@pytest.mark.parametrize("syntax", [None, ImplicitVRLittleEndian, ExplicitVRBigEndian])
@pytest.mark.parametrize("name", PADDING)
def test_padding_is_air(tmp_path, name, syntax):
    "Outside the round field of view there is air, whatever number the scanner writes there."
    kind, value, tags = PADDING[name]
    pixels = random_pixels(5).astype(kind)
    pixels[:, 0] = value

    def edit(dataset, k):
        if syntax:
            dataset.file_meta.TransferSyntaxUID = syntax
            order = "big" if syntax == ExplicitVRBigEndian else "little"
            dataset.PixelData = pixels[k].astype(pixels.dtype.newbyteorder(order)).tobytes()
            dataset["PixelData"].VR = "OW"

    write_series(tmp_path, straight(5), pixels, edit=edit, **tags)
    slices = volume_of(tmp_path).data[0].permute(2, 1, 0)
    assert (slices[:, 0] == -1000).all()
    assert np.array_equal(slices[:, 1:].numpy(), pixels[:, 1:].astype(int) - 1024)


def test_padding_below_air_stays(tmp_path):
    "It renders as air, so the voxels stay as they are in the file."
    pixels = random_pixels(5).astype(np.int16)
    pixels[:, 0] = -2000
    write_series(tmp_path, straight(5), pixels, PixelPaddingValue=-2000)
    assert (volume_of(tmp_path).data[0, :, 0] == -3024).all()


def test_padding_with_the_value_of_water(tmp_path):
    pixels = random_pixels(5).astype(np.int16)
    pixels[:, 0] = 0
    write_series(tmp_path, straight(5), pixels, PixelPaddingValue=0, RescaleIntercept=0)
    with pytest.warns(UserWarning, match="PixelPaddingValue .0028,0120. holds 0, that is 0 HU.*taken for air"):
        assert (volume_of(tmp_path).data[0, :, 0] == -1000).all()


def test_graphics_in_unused_bits(tmp_path):
    "Old files keep drawings in the bits above those of the values."
    pixels = random_pixels(5)
    drawn = pixels.copy()
    drawn[:, 2, 1:4] |= 0x8000
    write_series(tmp_path, straight(5), drawn, BitsStored=12, HighBit=11)
    assert misplaced(volume_of(tmp_path), straight(5), pixels) < EXACT


def packed_by_gdcm(dataset: Dataset, pixels: np.ndarray, path: Path, compressor: str) -> None:
    "Put pixels into a slice as GDCM compresses them."
    writer = sitk.ImageFileWriter()
    writer.SetImageIO("GDCMImageIO")
    writer.SetUseCompression(True)
    writer.SetCompressor(compressor)
    writer.SetFileName(str(path))
    writer.Execute(sitk.GetImageFromArray(pixels))
    donor = dcmread(path)
    dataset.file_meta.TransferSyntaxUID = donor.file_meta.TransferSyntaxUID
    dataset.PixelData = donor.PixelData


@pytest.mark.parametrize("compressor", ["JPEG2000", "JPEG", "RLE"])
def test_compressed_pixels(tmp_path, compressor):
    "What GDCM decodes needs no other library; values are those of the twin that is not compressed."

    def edit(dataset, k):
        if compressor == "RLE":
            dataset.compress(RLELossless, pixels[k], generate_instance_uid=False)
        else:
            packed_by_gdcm(dataset, pixels[k], tmp_path / "donor.dcm", compressor)

    pixels = random_pixels(4, 16, 16)
    tags = {"RescaleSlope": 1.5, "RescaleIntercept": -1024.25}
    write_series(tmp_path / "plain", straight(4), pixels, **tags)
    write_series(tmp_path / "packed", straight(4), pixels, edit, **tags)
    expected, found = (volume_of(tmp_path / name) for name in ("plain", "packed"))
    assert torch.equal(expected.data, found.data) and np.allclose(expected.affine, found.affine)
    assert torch.equal(found.data[0].permute(2, 1, 0), torch.as_tensor(pixels * 1.5 - 1024.25, dtype=torch.float32))


@pytest.mark.parametrize(("kind", "value"), [(np.uint16, 65535), (np.uint32, 2**32 - 1), (np.int32, -(2**31))])
def test_no_value_wraps(tmp_path, kind, value):
    "Slope and pixel may lead beyond 32 bits: such voxels are refused, whether in one slice or in all."

    def edit(dataset, k):
        dataset.RescaleSlope = 1000 if k == 2 else 1

    pixels = random_pixels(4).astype(kind)
    pixels[2, 0, 0] = value
    write_series(tmp_path, straight(4), pixels, edit)
    with pytest.raises(
        ValueError, match="the voxels of '0002.dcm' go from .*, but no value can be beyond 1000000 .Resc"
    ):
        read(tmp_path)


def test_values_beyond_16_bits(tmp_path):
    "An extended scale for metals is read as it stands."
    pixels = random_pixels(4)
    pixels[2, 0, 0] = 65535
    write_series(tmp_path, straight(4), pixels, RescaleSlope=10)
    assert np.array_equal(volume_of(tmp_path).data[0].permute(2, 1, 0), pixels.astype(int) * 10 - 1024)


@pytest.mark.parametrize(("at", "value"), [(6, 27), (8, 41), (10, 40), (11, 3)])  # bits, rows, columns, channels
def test_streams_with_a_damaged_header(tmp_path, at, value):
    "GDCM crashed at 27 bits, and Python with it."

    def edit(dataset, k):
        packed_by_gdcm(dataset, pixels[k], tmp_path / "donor", "JPEG")
        stream = bytearray(get_frame(dataset.PixelData, 0, number_of_frames=1))
        start = stream.index(b"\xff\xc3") - 2  # of the frame; lossless
        stream[start + at] = value
        dataset.PixelData = encapsulate([bytes(stream)])

    pixels = random_pixels(3, 16, 16)
    write_series(tmp_path / "ct", straight(3), pixels, edit)
    with pytest.raises(
        ValueError, match="the file '0000.dcm' holds pixels .JPEG.*channels and bits are .*copy the file"
    ):
        read(tmp_path / "ct")


def test_compressed_frames(tmp_path):
    "Each frame is decoded by itself, and has its own slope and intercept."
    pixels, places = random_pixels(4, 16, 16), straight(4)
    dataset, streams = enhanced_dataset(places, pixels), []
    for k, groups in enumerate(dataset.PerFrameFunctionalGroupsSequence):
        groups.PixelValueTransformationSequence[0].RescaleSlope = k + 1
        packed_by_gdcm(dataset, pixels[k], tmp_path / "donor", "JPEG2000")
        streams.append(get_frame(dataset.PixelData, 0, number_of_frames=1))
    dataset.PixelData = encapsulate(streams)
    save(dataset, tmp_path / "ct.dcm")
    expected = pixels * np.arange(1, 5)[:, None, None] - 1024
    assert np.array_equal(volume_of(tmp_path / "ct.dcm").data[0].permute(2, 1, 0), expected)


def test_old_files_of_ge(tmp_path):
    "Their pixels alone are big-endian (transfer syntax 1.2.840.113619.5.2)."
    pixels = random_pixels(4)
    for k, position in enumerate(straight(4)):
        dataset = slice_dataset(pixels[k].astype(">u2"), position, k + 1)
        dataset.file_meta.TransferSyntaxUID = UID("1.2.840.113619.5.2")
        path = tmp_path / f"{k}.dcm"
        dcmwrite(path, dataset, implicit_vr=True, little_endian=True, enforce_file_format=True)
    assert misplaced(volume_of(tmp_path), straight(4), pixels) < EXACT


def test_a_file_that_says_it_has_no_frame(tmp_path):
    "Some write 0 frames into a file with one."
    pixels = write_series(tmp_path, straight(4), NumberOfFrames=0)
    assert misplaced(volume_of(tmp_path), straight(4), pixels) < EXACT


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, DeflatedExplicitVRLittleEndian])
def test_other_ways_to_write(tmp_path, syntax):
    def edit(dataset, k):
        dataset.file_meta.TransferSyntaxUID = syntax
        dataset["PixelData"].VR = "OW"

    pixels = write_series(tmp_path, straight(4), edit=edit)
    assert misplaced(volume_of(tmp_path), straight(4), pixels) < EXACT


def test_files_without_the_mark(tmp_path):
    "Old archives write neither the preamble nor the file's own header."
    pixels = random_pixels(4)
    for k, position in enumerate(straight(4)):
        dataset = slice_dataset(pixels[k], position, k + 1)
        del dataset.file_meta
        dataset.save_as(tmp_path / f"IM{k}", implicit_vr=True, little_endian=True)
    assert misplaced(volume_of(tmp_path), straight(4), pixels) < EXACT


@pytest.mark.parametrize(
    "size, message",
    [
        (0, "is empty"),
        (200, "ends before its pixels"),
        (500, "ends before its pixels"),
        (-10, "is cut short: of 60 bytes"),
    ],
    ids=["empty", "within the first tags", "within the header", "within the pixels"],
)
def test_cut_files(tmp_path, size, message):
    "A file that is not whole is named, and not left out."
    write_series(tmp_path, straight(4))
    path = tmp_path / "0002.dcm"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=f"the file '0002.dcm'.*{message}.*get it again"):
        read(tmp_path)


def test_a_cut_file_without_a_class(tmp_path):
    "What is cut before it says what it is, is named, too."
    write_series(tmp_path, straight(5))
    path = tmp_path / "0000.dcm"
    for size in (140, 180):
        dataset = slice_dataset(random_pixels(1)[0], (0, 0, 0))
        del dataset.file_meta
        dataset.save_as(path, implicit_vr=True, little_endian=True)
        path.write_bytes(path.read_bytes()[: size - 128])
        with pytest.raises(ValueError, match="the file '0000.dcm' (ends before its pixels|cannot be understood)"):
            read(tmp_path)


def test_cut_file_of_another_series(tmp_path):
    write_series(tmp_path, straight(4), prefix="a", SeriesInstanceUID=f"{SERIES}.1")
    pixels = write_series(tmp_path, straight(4), prefix="b", SeriesInstanceUID=f"{SERIES}.2")
    path = tmp_path / "a0002.dcm"
    path.write_bytes(path.read_bytes()[:-10])
    assert misplaced(volume_of(tmp_path, series=f"{SERIES}.2"), straight(4), pixels) < EXACT


def test_several_series(tmp_path):
    "The message lists them, and the argument chooses."
    first = write_series(tmp_path, straight(4), prefix="a", SeriesInstanceUID=f"{SERIES}.1", SeriesDescription="Lung")
    second = random_pixels(6) + 5
    write_series(tmp_path, straight(6), second, prefix="b", SeriesInstanceUID=f"{SERIES}.2")
    with pytest.raises(
        ValueError, match=r"2 DICOM series.*series=.*2 .CT, 'Chest', 6 slices.; .*1 .CT, 'Lung', 4 slic"
    ):
        read(tmp_path)
    assert misplaced(volume_of(tmp_path, series=f"{SERIES}.1"), straight(4), first) < EXACT
    assert misplaced(volume_of(tmp_path, series=f"{SERIES}.2"), straight(6), second) < EXACT
    with pytest.raises(ValueError, match="series must be one of .*not '1.2'"):
        read(tmp_path, series="1.2")


def test_choices_without_dicom(tmp_path):
    with pytest.raises(ValueError, match="series='1.2' chooses among DICOM slices, but volume holds none"):
        read(torch.zeros(4, 4, 4), affine=np.eye(4), series="1.2")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read(tmp_path / "nothing", phase=1)


def beside(folder: Path) -> None:
    "Write what exports hold beside the slices of a CT."
    others = {
        "dose": {"SOPClassUID": RTDoseStorage, "Modality": "RTDOSE", "NumberOfFrames": 1},
        "mr": {"Modality": "MR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4"},
        "scout": {"ImageType": LOCALIZER},
        "report": {"SOPClassUID": SecondaryCaptureImageStorage},
    }
    for number, (name, tags) in enumerate(others.items()):
        write_series(folder, straight(1), prefix=name, SeriesInstanceUID=f"1.9.{number}", **tags)
    for name, kind in {"structures": RTStructureSetStorage, "pdf": EncapsulatedPDFStorage}.items():
        dataset = slice_dataset(random_pixels(1)[0], straight(1)[0], SOPClassUID=kind, Modality="OT", Rows=None)
        del dataset.PixelData
        save(dataset, folder / f"{name}.dcm")
    directory = slice_dataset(random_pixels(1)[0], straight(1)[0], SOPClassUID=MediaStorageDirectoryStorage, Rows=None)
    del directory.PixelData
    save(directory, folder / "DICOMDIR")
    (folder / "notes.txt").write_text("dictated by")
    (folder / ".DS_Store").write_bytes(b"\0" * 200)


@pytest.mark.parametrize("below", ["", "PAT0/ST0/SE1"], ids=["in the folder", "in folders below"])
def test_other_objects_beside_a_series(tmp_path, below):
    beside(tmp_path / below)
    pixels = write_series(tmp_path / below, straight(5))
    assert misplaced(volume_of(tmp_path), straight(5), pixels) < EXACT


def test_folder_without_a_series(tmp_path):
    (tmp_path / "notes.txt").write_text("dictated by")
    with pytest.raises(ValueError, match="it holds no slices of a DICOM series; give the folder"):
        read(tmp_path)


def test_one_slice(tmp_path):
    write_series(tmp_path, straight(1))
    for path in (tmp_path, tmp_path / "0000.dcm"):
        with pytest.raises(ValueError, match="'0000.dcm' is a single slice; give the folder that holds all slices"):
            read(path)


@pytest.mark.parametrize("order", [slice(None), slice(None, None, -1)], ids=["forward", "backward"])
def test_enhanced_ct(tmp_path, order):
    "All slices in one file: each lies where its functional group says, with its own slope."
    positions, pixels = straight(6, (0.2, 0, 2.5))[order], random_pixels(6)
    dataset = enhanced_dataset(positions, pixels)
    slopes = [1, 1, 2, 1, 1, 0.5]
    for groups, slope in zip(dataset.PerFrameFunctionalGroupsSequence, slopes, strict=True):
        groups.PixelValueTransformationSequence[0].RescaleSlope = slope
    save(dataset, tmp_path / "ct.dcm")
    expected = pixels * np.array(slopes)[:, None, None]
    assert misplaced(volume_of(tmp_path / "ct.dcm"), positions, expected) < EXACT
    assert misplaced(volume_of(tmp_path), positions, expected) < EXACT


@pytest.mark.parametrize(
    "edit, message",
    [
        (lambda groups: groups.pop(2), "5 mm between 'ct.dcm' frame 2 and 'ct.dcm' frame 3"),
        (lambda groups: setattr(groups[2], "PlaneOrientationSequence", item(ImageOrientationPatient=LATERAL)),
         "another orientation.*'ct.dcm' frame 3"),
        (lambda groups: groups[3].pop("PlanePositionSequence"), "ImagePositionPatient .0020,0032. of 'ct.dcm' frame 4"),
    ],
    ids=["a missing frame", "a turned frame", "no position"],
)  # fmt: skip
def test_odd_enhanced_ct(tmp_path, edit, message):
    dataset = enhanced_dataset(straight(6), random_pixels(6))
    edit(dataset.PerFrameFunctionalGroupsSequence)
    dataset.NumberOfFrames = len(dataset.PerFrameFunctionalGroupsSequence)
    dataset.PixelData = dataset.PixelData[: 60 * dataset.NumberOfFrames]
    save(dataset, tmp_path / "ct.dcm")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "ct.dcm")


def test_enhanced_ct_without_the_places_of_all_frames(tmp_path):
    save(enhanced_dataset(straight(6), random_pixels(6), NumberOfFrames=7), tmp_path / "ct.dcm")
    with pytest.raises(ValueError, match="the file 'ct.dcm' has 7 frames, but places for 6"):
        read(tmp_path / "ct.dcm")


def test_label_map_of_a_series(tmp_path):
    "Its values need not be Hounsfield units."
    write_series(tmp_path / "ct", straight(5))
    labels = (random_pixels(5) > 1500).astype(np.uint8)
    tags = {"RescaleSlope": None, "RescaleIntercept": None, "SOPClassUID": SecondaryCaptureImageStorage}
    write_series(tmp_path / "labels", straight(5), labels, **tags)
    subject = read(tmp_path / "ct", tmp_path / "labels")
    assert np.array_equal(subject.mask.data[0].permute(2, 1, 0).numpy(), labels)


def test_image_that_is_not_loaded_yet(tmp_path):
    "An image of TorchIO that is still in its folder is read like the folder; a loaded one is taken as it is."
    write_series(tmp_path, np.delete(straight(6), 3, 0))
    with pytest.raises(ValueError, match="uneven distances"):
        read(torchio.ScalarImage(tmp_path))
    image = torchio.ScalarImage(tmp_path)
    image.load()
    assert read(image).volume.spatial_shape == (5, 6, 5)


def test_each_file_is_opened_once_however_many_series_there_are(tmp_path, monkeypatch):
    "The time to find a series grows with the number of files."
    for number in range(12):
        write_series(tmp_path, straight(3), prefix=f"{number}_", SeriesInstanceUID=f"{SERIES}.{number}")
    opened = []
    monkeypatch.setattr(
        pydicom, "dcmread", lambda file, **options: opened.append(file.name) or dcmread(file, **options)
    )
    with pytest.raises(ValueError, match=r"12 DICOM series.*\); and 2 more"):
        read(tmp_path)
    assert len(opened) == len(set(opened)) == 36


MEMORY = """
import resource, sys
from diffdrr.volumes import read
import pydicom, SimpleITK, torchio
unit = 1 if sys.platform == "darwin" else 1024
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
read(sys.argv[1])
print(unit * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.parametrize(
    "slope", [pytest.param(1, id="whole numbers"), pytest.param(1.001, id="fractions", marks=pytest.mark.slow)]
)
def test_memory(tmp_path, slope):
    "Reading takes no more than three times the voxels in float32."
    pytest.importorskip("resource")
    write_series(tmp_path, straight(80), random_pixels(80, 512, 512), RescaleSlope=slope)
    taken = subprocess.run([sys.executable, "-c", MEMORY, tmp_path], capture_output=True, text=True, check=True).stdout
    assert int(taken) < 3 * 4 * 80 * 512 * 512
