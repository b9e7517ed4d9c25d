"""Volumes and label maps of many programs: read rightly, or refused by name. Each test makes a small file with one
oddity, whose right answer it knows from how it was made."""

from __future__ import annotations

import gzip
import itertools
import struct
import warnings
from contextlib import nullcontext
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torchio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.io import netcdf_file
from test_formats import picture

from diffdrr.volumes import read

SHAPE = (12, 11, 10)
AFFINE = np.array([[0.0, -2, 0, 30], [1.5, 0, 0, -20], [0, 0, 3, 7], [0, 0, 0, 1]])
SHEARED = np.array([[0.0, -2, 0.9, 30], [1.5, 0, 0, -20], [0, 0, 3, 7], [0, 0, 0, 1]])
LPS = np.diag([-1.0, -1, 1, 1])
SROW, PIXDIM, QUATERN, SLOPE = 280, 76, 256, 112  # where numbers stand in the header of NIfTI-1


def scaled(factor: float, affine: np.ndarray) -> np.ndarray:
    return np.diag([factor, factor, factor, 1.0]) @ affine


def moved(millimetres: float, affine: np.ndarray = AFFINE) -> np.ndarray:
    shift = np.eye(4)
    shift[2, 3] = millimetres
    return shift @ affine


@pytest.fixture(scope="module")
def hu() -> np.ndarray:
    "Air with a bright corner, and noise."
    voxels = np.random.default_rng(0).integers(-1000, 600, SHAPE).astype(np.int16)
    voxels[:4, :4, :4] = 1500
    return voxels


@pytest.fixture(scope="module")
def labels() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 4, SHAPE).astype(np.uint8)


def quietly(*args, **options) -> torchio.Subject:
    "Read, and fail at a warning."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return read(*args, **options)


def assert_read(subject: torchio.Subject, hu: np.ndarray, affine: np.ndarray) -> None:
    "Compare voxels and place with what was written. The subject was not centred."
    assert np.allclose(subject.volume.affine, affine, atol=1e-4, rtol=1e-6)
    assert np.array_equal(subject.volume.data[0].numpy(), hu)


def patch(path: Path, offset: int, form: str, *values: float) -> Path:
    "Overwrite numbers of a header."
    content = bytearray(path.read_bytes())
    struct.pack_into(form, content, offset, *values)
    path.write_bytes(content)
    return path


def write_nifti(path: Path, hu: np.ndarray, sform=None, qform=None, codes=(1, 1), unit="mm") -> Path:
    "Write a NIfTI file with the forms that are given, and no other."
    image = (nib.Nifti1Image if ".nii" in path.name else nib.Nifti1Pair)(hu, None)
    zooms = nib.affines.voxel_sizes(next((form for form in (sform, qform) if form is not None), AFFINE))
    image.header.set_zooms((*zooms, *[1] * (hu.ndim - 3)))
    image.set_qform(qform, 0 if qform is None else codes[1], update_affine=False)
    image.set_sform(sform, 0 if sform is None else codes[0], update_affine=False)
    image.header.set_xyzt_units(unit)
    nib.save(image, path)
    return path


# NIfTI


@pytest.mark.parametrize(
    "forms, affine",
    [
        (dict(sform=AFFINE, qform=AFFINE), AFFINE),
        (dict(sform=AFFINE), AFFINE),
        (dict(qform=AFFINE), AFFINE),
        (dict(sform=AFFINE, qform=moved(1.4), codes=(2, 1)), AFFINE),  # by less than a voxel
        (dict(sform=SHEARED), SHEARED),
        (dict(sform=scaled(1e-3, AFFINE), unit="meter"), AFFINE),
        (dict(qform=scaled(1e-3, AFFINE), unit="meter"), AFFINE),
        (dict(sform=scaled(1e-3, SHEARED), unit="meter"), SHEARED),
        (dict(sform=scaled(1e3, AFFINE), unit="micron"), AFFINE),
        (dict(sform=scaled(1e3, SHEARED), unit="micron"), SHEARED),
        (dict(sform=AFFINE, unit="unknown"), AFFINE),
    ],
    ids=lambda case: "-".join(map(str, case)) if isinstance(case, dict) else "",
)
def test_place_of_nifti(tmp_path, hu, forms, affine):
    assert_read(quietly(write_nifti(tmp_path / "ct.nii", hu, **forms), center_volume=False), hu, affine)


@pytest.mark.parametrize("codes", [(1, 1), (2, 1), (4, 1), (1, 2)])
@pytest.mark.parametrize("sform, apart", [(moved(50.0), "50"), (SHEARED, "8.1")], ids=["moved", "sheared"])
def test_sform_counts_and_the_disagreement_is_told(tmp_path, hu, sform, apart, codes):
    path = write_nifti(tmp_path / "ct.nii", hu, sform, AFFINE, codes)
    with pytest.warns(UserWarning, match=rf"{apart} mm apart.*sform \(code {codes[0]}\) is taken, not the qform"):
        assert_read(read(path, center_volume=False), hu, sform)


@pytest.mark.parametrize("unit, size", [("mm", "1.5 x 2 x 3 mm"), ("meter", "1500 x 2000 x 3000 mm")])
def test_nifti_without_orientation(tmp_path, hu, unit, size):
    path = write_nifti(tmp_path / "ct.nii", hu, unit=unit)
    factor = 1000 if unit == "meter" else 1
    with pytest.warns(UserWarning, match=f"says nothing about its orientation.*{size}"):
        assert_read(read(path, center_volume=False), hu, scaled(factor, np.diag([1.5, 2.0, 3.0, 1.0])))


def test_analyze_has_no_orientation(tmp_path, hu):
    image = nib.AnalyzeImage(hu, None)
    image.header.set_zooms((1.5, 2, 3))
    nib.save(image, tmp_path / "ct.img")
    with pytest.warns(UserWarning, match="says nothing about its orientation"):
        assert_read(read(tmp_path / "ct.hdr", center_volume=False), hu, np.diag([1.5, 2.0, 3.0, 1.0]))


@pytest.mark.parametrize(
    "forms, patches, affine",
    [
        (dict(sform=AFFINE, qform=AFFINE), [(PIXDIM + 4, "<3f", 0, 0, 0)], AFFINE),
        (dict(sform=AFFINE, qform=AFFINE), [(PIXDIM + 4, "<f", np.nan)], AFFINE),
        (dict(sform=AFFINE, qform=AFFINE), [(QUATERN, "<f", np.nan)], AFFINE),
        (dict(qform=AFFINE), [(PIXDIM, "<f", 0)], AFFINE),  # anything but -1 is 1
        (dict(qform=AFFINE), [(PIXDIM + 4, "<f", -1.5)], AFFINE),
        (dict(qform=AFFINE @ np.diag([1, 1, -1, 1])), [], AFFINE @ np.diag([1, 1, -1, 1])),  # pixdim[0] is -1
    ],
)
def test_what_the_place_does_not_need_may_be_broken(tmp_path, hu, forms, patches, affine):
    path = write_nifti(tmp_path / "ct.nii", hu, **forms)
    for change in patches:
        patch(path, *change)
    assert_read(quietly(path, center_volume=False), hu, affine)


@pytest.mark.parametrize(
    "forms, change, message",
    [
        (dict(qform=AFFINE), (PIXDIM + 4, "<3f", 0, 0, 0), r"pixdim.* is \[0.0, 0.0, 0.0\]"),
        (dict(qform=AFFINE), (PIXDIM + 8, "<f", np.nan), r"pixdim.* is \[1.5, nan, 3.0\]"),
        (dict(qform=AFFINE), (QUATERN, "<f", np.nan), "its qform is"),
        (dict(qform=AFFINE), (QUATERN, "<3f", 1, 1, 1), "the rotation of its qform"),
        (dict(), (PIXDIM + 4, "<3f", 1.5, 0, 3), r"pixdim.* is \[1.5, 0.0, 3.0\]"),
        (dict(sform=AFFINE, qform=AFFINE), (SROW, "<f", np.nan), "sform_code is 1.*nan"),
        (dict(sform=AFFINE, qform=AFFINE), (SROW, "<12f", *[0] * 12), "sform_code is 1.*0.0"),
        (dict(sform=AFFINE), (SROW + 40, "<f", 0), "sform_code is 1"),  # slices without distance
    ],
)
def test_broken_place_of_nifti_is_refused(tmp_path, hu, forms, change, message):
    path = patch(write_nifti(tmp_path / "ct.nii", hu, **forms), *change)
    with pytest.raises(ValueError, match=rf"volume '.*ct.nii' cannot be read.*{message}"):
        read(path)


@pytest.mark.parametrize(
    "slope, inter, right",
    [
        (1, -1024, (1, -1024)),
        (2, -1000, (2, -1000)),
        (0.5, 0, (0.5, 0)),
        (0, -1024, (1, 0)),
        (np.nan, np.nan, (1, 0)),
    ],
)
def test_slope_and_intercept_of_nifti(tmp_path, hu, slope, inter, right):
    "A slope of 0 stands for no scaling, as the standard has it; an intercept beside it is asked about."
    path = patch(write_nifti(tmp_path / "ct.nii", hu, AFFINE), SLOPE, "<2f", slope, inter)
    told = pytest.warns(UserWarning, match="scl_inter = -1024, but scl_slope = 0") if slope == 0 else nullcontext()
    with told:
        assert_read(read(path, center_volume=False), hu * float(right[0]) + right[1], AFFINE)


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz", "ct.img", "ct.hdr", "ct.img.gz", "CT.NII.GZ"])
def test_names_of_nifti(tmp_path, hu, name):
    path = write_nifti(tmp_path / name.lower(), hu, AFFINE)
    (path if path.exists() else path.with_suffix(".img")).rename(tmp_path / name)
    assert_read(quietly(tmp_path / name, center_volume=False), hu, AFFINE)


@pytest.mark.parametrize("kind", ["NIfTI-2", "big-endian", "4D", "5D", "unpacked", "float64", "uint16"])
def test_kinds_of_nifti(tmp_path, hu, kind):
    path = tmp_path / "ct.nii.gz"
    header = nib.Nifti1Header(endianness=">") if kind == "big-endian" else None
    voxels = {"4D": hu[..., None], "5D": hu[..., None, None], "float64": hu.astype(float)}.get(kind, hu)
    voxels = hu.astype(np.uint16) if kind == "uint16" else voxels
    nib.save((nib.Nifti2Image if kind == "NIfTI-2" else nib.Nifti1Image)(voxels, AFFINE, header), path)
    if kind == "unpacked":
        path.write_bytes(gzip.decompress(path.read_bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if kind == "uint16" else "error")  # negative numbers without sign
        assert_read(read(path, center_volume=False), voxels.reshape(SHAPE), AFFINE)


@pytest.mark.parametrize(
    "voxels, message",
    [
        (
            np.zeros((*SHAPE, 2), np.int16),
            r"volume must hold one 3D image, not data of shape \(2, 12, 11, 10\); choose",
        ),
        (np.zeros((*SHAPE, 1, 3), np.int16), r"volume must hold one 3D image, not data of shape \(3, 12, 11, 10\)"),
        (np.zeros((12, 11), np.int16), "not a single slice"),
        (np.zeros(SHAPE, np.complex64), "complex64, not numbers"),
        (np.zeros(SHAPE, [("R", "u1"), ("G", "u1"), ("B", "u1")]), "colours or complex numbers are no volume"),
    ],
    ids=["4D", "5D", "2D", "complex", "colours"],
)
def test_nifti_of_something_else(tmp_path, voxels, message):
    nib.save(nib.Nifti1Image(voxels, AFFINE), tmp_path / "ct.nii")
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "ct.nii")


def test_half_a_pair(tmp_path, hu):
    path = write_nifti(tmp_path / "ct.img", hu, AFFINE)
    path.with_suffix(".hdr").unlink()
    with pytest.raises(ValueError, match="its header '.*ct.hdr' does not exist; copy both files"):
        read(path)


# Damage


def cut_in_half(content: bytes) -> bytes:
    return content[: len(content) * 7 // 10]


def cut_last_bytes(content: bytes) -> bytes:
    return content[:-9]


def flip_a_bit(content: bytes) -> bytes:
    return content[:-300] + bytes([content[-300] ^ 255]) + content[-299:]


FILES = [  # and the file in which their voxels are
    ("ct.nii", "ct.nii"),
    ("ct.nii.gz", "ct.nii.gz"),
    ("ct.img", "ct.img"),
    ("ct.img.gz", "ct.img.gz"),
    ("ct.mha", "ct.mha"),
    ("packed.mha", "packed.mha"),
    ("ct.mhd", "ct.raw"),
    ("packed.mhd", "packed.zraw"),
    ("ct.nrrd", "ct.nrrd"),
    ("packed.nrrd", "packed.nrrd"),
    ("ct.nhdr", "ct.raw"),
    ("packed.nhdr", "packed.raw.gz"),
]


def is_packed(name: str) -> bool:
    return "packed" in name or name.endswith(".gz")


DAMAGES = [(*files, damage) for files in FILES for damage in (cut_in_half, cut_last_bytes)]
DAMAGES += [(*files, flip_a_bit) for files in FILES if is_packed(files[0])]  # others have no checksum


@pytest.mark.parametrize("name, voxels, damage", DAMAGES)
def test_damaged_files_are_refused(tmp_path, capfd, hu, name, voxels, damage):
    "The reason is in the error, not beside it: there is no warning, and nothing on stderr."
    if name.endswith(".img.gz"):
        write_nifti(tmp_path / name, hu, AFFINE)
    else:
        sitk.WriteImage(sitk.GetImageFromArray(hu.T), str(tmp_path / name), is_packed(name))
    part = tmp_path / voxels
    quietly(tmp_path / name)
    part.write_bytes(damage(part.read_bytes()))
    capfd.readouterr()
    with warnings.catch_warnings(), pytest.raises(ValueError, match=rf"volume '.*{name}' cannot be read") as error:
        warnings.simplefilter("error")
        read(tmp_path / name)
    assert capfd.readouterr().err == ""
    assert "the file was cut short or damaged; copy or export it again" in str(error.value)


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz", "ct.mha"])
def test_bytes_that_nobody_knows(tmp_path, hu, name):
    path = tmp_path / name
    if name == "ct.mha":
        write_text(path, metaimage("ElementSpacing = 1.5 2 3"), hu)
    else:
        write_nifti(path, hu, AFFINE)
    content = gzip.decompress(path.read_bytes()) if name.endswith("gz") else path.read_bytes()
    path.write_bytes(gzip.compress(content + b"1234567") if name.endswith("gz") else content + b"1234567")
    affine = LPS @ STRAIGHT if name == "ct.mha" else AFFINE
    with pytest.warns(UserWarning, match="holds 7 bytes more than there are voxels; its header speaks of 12 (x )?11"):
        assert_read(read(path, center_volume=False), hu, affine)


@pytest.mark.parametrize("name", ["ct.nii", "ct.nii.gz", "ct.nrrd", "ct.mha", "ct.mhd", "ct", "ct.img", "ct.mgz"])
@pytest.mark.parametrize("content", [b"", b"not an image", b"\0" * 1000, b"\x1f\x8b\x08\0\0"])
def test_files_that_are_no_images(tmp_path, capfd, name, content):
    (tmp_path / name).write_bytes(content)
    with (
        warnings.catch_warnings(),
        pytest.raises(ValueError, match=rf"volume '.*{name}' cannot be read as an image: ."),
    ):
        warnings.simplefilter("error")
        read(tmp_path / name)
    assert capfd.readouterr().err == ""


BYTE = st.tuples(st.integers(0, 347), st.one_of(st.sampled_from([0, 1, 2, 3, 127, 128, 255]), st.integers(0, 255)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(BYTE, min_size=1, max_size=4))
def test_a_changed_header_is_read_as_it_stands_or_refused(tmp_path, hu, changes):
    path = write_nifti(tmp_path / "ct.nii", hu, AFFINE, AFFINE)
    for offset, byte in changes:
        patch(path, offset, "B", byte)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            subject = read(path, center_volume=False)
        except ValueError as error:
            assert str(error).startswith(("volume", "affine"))
            return
    with path.open("rb") as file:
        header = nib.Nifti1Header.from_fileobj(file, check=False)
    unit = {1: 1000.0, 3: 0.001}.get(int(header["xyzt_units"]) & 7, 1.0)
    if header["sform_code"] > 0:
        assert np.allclose(subject.volume.affine, scaled(unit, header.get_sform()), rtol=1e-6)
    assert subject.volume.spatial_shape == (*header.get_data_shape(), 1, 1, 1)[:3]


# Spacing is never invented


@pytest.mark.parametrize("suffix", ["tif", "png", "jpg", "bmp"])
@pytest.mark.parametrize("name", ["volume", "labelmap"])
def test_pictures_are_no_volumes(tmp_path, hu, suffix, name):
    pixels = sitk.GetImageFromArray(np.zeros((20, 30), np.uint8))
    if suffix == "tif":
        pixels = sitk.GetImageFromArray(np.zeros((10, 20, 30), np.uint8))  # several pages
    path = tmp_path / f"ct.{suffix}"
    sitk.WriteImage(pixels, str(path))
    if suffix != "jpg":
        path = path.rename(tmp_path / "ct.dat")  # the content tells, not the name
    given = {"volume": path} if name == "volume" else {"volume": hu, "labelmap": path, "affine": AFFINE}
    with pytest.raises(ValueError, match=rf"{name} '.*ct.*' cannot be read as an image: it is a picture.*affine="):
        read(**given)


def write_text(path: Path, header: str, hu: np.ndarray) -> Path:
    path.write_bytes(header.encode() + hu.astype("<i2").tobytes(order="F"))
    return path


def metaimage(*lines: str) -> str:
    start = ["ObjectType = Image", "NDims = 3", "BinaryData = True", "BinaryDataByteOrderMSB = False"]
    end = ["DimSize = 12 11 10", "ElementType = MET_SHORT", "ElementDataFile = LOCAL", ""]
    return "\n".join([*start, *lines, *end])


def nrrd(*lines: str) -> str:
    start = ["NRRD0004", "type: short", "dimension: 3", "sizes: 12 11 10", "encoding: raw", "endian: little"]
    return "\n".join([*start, *lines, "", ""])


DIRECTIONS = ("space directions: (1.5,0,0) (0,2,0) (0.3,0,3)", "space origin: (10,20,30)")
PLACE = np.array([[1.5, 0, 0.3, 10], [0, 2, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1]])  # in the frame of the file
STRAIGHT = np.diag([1.5, 2.0, 3.0, 1.0])


@pytest.mark.parametrize(
    "header, affine",
    [
        (metaimage("ElementSpacing = 1.5 2 3"), LPS @ STRAIGHT),
        (metaimage("ElementSize = 1.5 2 3"), LPS @ STRAIGHT),
        (metaimage("DistanceUnits = um", "ElementSpacing = 1500 2000 3000"), LPS @ STRAIGHT),
        (metaimage("DistanceUnits = cm", "ElementSpacing = .15 .2 .3", "Offset = 1 2 3"), LPS @ PLACE * 0),
        (nrrd("space: left-posterior-superior", *DIRECTIONS), LPS @ PLACE),
        (nrrd("space: LPS", *DIRECTIONS), LPS @ PLACE),
        (nrrd("space: right-anterior-superior", *DIRECTIONS), PLACE),
        (nrrd("space: RAS", *DIRECTIONS), PLACE),
        (nrrd("space: left-anterior-superior", *DIRECTIONS), np.diag([-1.0, 1, 1, 1]) @ PLACE),
        (nrrd("space: LAS", *DIRECTIONS), np.diag([-1.0, 1, 1, 1]) @ PLACE),
        (nrrd("space: RAS", 'space units: "mm" "mm" "mm"', *DIRECTIONS), PLACE),
        (nrrd("space: RAS", 'space units: "m" "m" "m"', *DIRECTIONS), scaled(1000, PLACE)),
        (nrrd("space: RAS", 'space units: "um" "um" "um"', *DIRECTIONS), scaled(0.001, PLACE)),
    ],
)
def test_place_of_metaimage_and_nrrd(tmp_path, hu, header, affine):
    if "Offset" in header:
        affine = LPS @ np.array([[1.5, 0, 0, 10], [0, 2, 0, 20], [0, 0, 3, 30], [0, 0, 0, 1]])
    path = write_text(tmp_path / ("ct.nrrd" if header.startswith("NRRD") else "ct.mha"), header, hu)
    assert_read(quietly(path, center_volume=False), hu, affine)


@pytest.mark.parametrize(
    "header, affine, field",
    [
        (nrrd("spacings: 1.5 2 3"), LPS @ STRAIGHT, "space: missing"),
        (nrrd("space dimension: 3", *DIRECTIONS), LPS @ PLACE, "space: missing"),
        (nrrd("space: scanner-xyz", *DIRECTIONS), LPS @ PLACE, "space: scanner-xyz"),
    ],
)
def test_nrrd_without_a_frame(tmp_path, hu, header, affine, field):
    path = write_text(tmp_path / "ct.nrrd", header, hu)
    with pytest.warns(UserWarning, match=rf"does not say how the patient lies in it \({field} in its header\)"):
        assert_read(read(path, center_volume=False), hu, affine)


@pytest.mark.parametrize(
    "header, message",
    [
        (metaimage(), "its header has no ElementSpacing"),
        (metaimage("ElementSpacing = 1.5 0 3"), "ElementSpacing, the size of its voxels, is '1.5 0 3'"),
        (metaimage("ElementSpacing = 1.5 nan 3"), "ElementSpacing, the size of its voxels, is '1.5 nan 3'"),
        (metaimage("ElementSpacing = 1.5 2"), "ElementSpacing, the size of its voxels, is '1.5 2'"),
        (metaimage("ElementSpacing = 1,5 2,0 3,0"), "ElementSpacing, the size of its voxels, is '1,5 2,0 3,0'"),
        (metaimage("DistanceUnits = ell", "ElementSpacing = 1 2 3"), "DistanceUnits is 'ell'"),
        (metaimage("ElementSpacing = 1 2 3").replace("= 3", "= 83"), "its header speaks of 83 axes"),
        (metaimage("ElementSpacing = 1 2 3").replace("12 11 10", "12 11"), "its header speaks of 3 axes with 12 11"),
        (metaimage("CompressedData = True", "ElementSpacing = 1 2 3"), "CompressedDataSize is ''"),
        (nrrd(), "its header has neither space directions nor spacings"),
        (nrrd("axis mins: 0 0 0", "axis maxs: 3 6 12"), "its header has neither space directions nor spacings"),
        (nrrd("spacings: 1.5 nan 3"), "spacings, the size of its voxels, is '1.5 nan 3'"),
        (nrrd("spacings: 1.5 0 3"), "spacings, the size of its voxels, is '1.5 0 3'"),
        (nrrd("space: RAS", "space directions: (1,0,0) (0,0,0) (0,0,1)"), "space directions, the size of its voxels"),
        (nrrd("space: RAS", "space directions: (1,0,0) (0,nan,0) (0,0,1)"), "space directions, the size of its voxels"),
        (nrrd("space: RAS", "space directions: none none none"), "space directions, the size of its voxels"),
        (nrrd("space: RAS", 'space units: "ell" "ell" "ell"', *DIRECTIONS), "space units is 'ell'"),
    ],
)
def test_missing_sizes_are_named(tmp_path, hu, header, message):
    path = write_text(tmp_path / ("ct.nrrd" if header.startswith("NRRD") else "ct.mha"), header, hu)
    with pytest.raises(ValueError, match=rf"volume '.*' cannot be read as an image: {message}"):
        read(path)


# Values


@pytest.mark.parametrize("padding", [-2000, -3024, -32768, 63536], ids=str)
@pytest.mark.parametrize("energy", [None, 60.0])
def test_padding_is_air(hu, padding, energy):
    voxels = hu.astype(np.int32)
    voxels[6:] = -1000
    padded = voxels.copy()
    padded[9:] = padding
    right = read(voxels, affine=AFFINE, energy=energy)
    if padding > 0:
        with pytest.warns(UserWarning, match="63536 in 25.0% of its voxels.*is -2000, stored without its sign"):
            subject = read(padded.astype(np.uint16) if (padded >= 0).all() else padded, affine=AFFINE, energy=energy)
    else:
        subject = quietly(padded, affine=AFFINE, energy=energy)
    assert torch.equal(subject.density.data, right.density.data)
    assert (subject.volume.data[0, 9:] <= -1000).all()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda hu: hu + 1024, "values from 24 to 2524, and none near -1000.*intercept may be lost.*values - 1024"),
        (lambda hu: np.clip(hu, 0, 255), "values from 0 to 255, and none near -1000"),
    ],
    ids=["intercept", "window"],
)
def test_values_that_may_be_no_hounsfield_units(hu, change, message):
    values = change(hu)
    with pytest.warns(UserWarning, match=message):
        read(values, affine=AFFINE, energy=60.0)
    quietly(values, affine=AFFINE)  # the density without unit has no scale to be wrong in


@pytest.mark.parametrize("low", [0.0, -1.0])
def test_scaled_values_have_no_attenuation(hu, low):
    values = low + (hu + 1000) / 2500.0 * (1 - low)
    with pytest.raises(ValueError, match=rf"volume holds values from {low:g} to 1, .*they were scaled"):
        read(values, affine=AFFINE, energy=60.0)
    quietly(values, affine=AFFINE)


@pytest.mark.parametrize("energy", [None, 60.0])
def test_zeros_around_the_patient_are_asked_about(hu, energy):
    cut = np.zeros_like(hu)
    cut[3:-3, 3:-3, :] = hu[3:-3, 3:-3, :]
    cut[5, 5, 5] = 0  # not of the cut
    with pytest.warns(UserWarning, match="exactly 0 in 77% of its voxels, connected with its border"):
        read(cut, affine=AFFINE, energy=energy)
    quietly(np.where(cut == 0, -1000, cut), affine=AFFINE, energy=energy)


@pytest.mark.parametrize("dtype", [np.int16, np.uint8, np.float32])
def test_labels_leave_air(hu, labels, dtype):
    voxels = np.abs(hu // 8).astype(dtype) if dtype is np.uint8 else hu.astype(dtype)
    subject = read(voxels, labels, labels=[1, 3], affine=AFFINE)
    kept = torch.as_tensor(np.isin(labels, [1, 3]))
    whole = read(voxels, labels, affine=AFFINE)
    assert (subject.volume.data[0][~kept] == -1000).all()
    assert torch.equal(subject.volume.data[0][kept].double(), torch.as_tensor(voxels)[kept].double())
    assert torch.equal(subject.density.data[0], whole.density.data[0] * kept)


# Label maps


@pytest.mark.parametrize("dtype", [bool, np.int8, np.uint8, ">i2", np.uint16, np.uint32, np.uint64, np.float32, float])
@pytest.mark.parametrize("kind", ["array", "tensor", "nifti"])
def test_types_of_labels(tmp_path, hu, labels, dtype, kind):
    given = labels.astype(dtype)
    right = given.astype(np.int64)
    if kind == "tensor":
        given = torch.as_tensor(given.astype(given.dtype.newbyteorder("=")))
    elif kind == "nifti":
        image = given.astype(np.uint8) if dtype is bool else given
        image = nib.Nifti1Image(image, AFFINE, dtype=image.dtype)
        nib.save(image, tmp_path / "labels.nii.gz")
        given = tmp_path / "labels.nii.gz"
    mask = quietly(hu, given, affine=AFFINE).mask.data[0]
    assert mask.dtype == torch.uint8 and np.array_equal(mask.numpy(), right)


def test_array_of_labels_on_other_voxels(hu, labels):
    with pytest.raises(ValueError, match=r"array of shape \(6, 5, 5\), but the volume, whose affine it has, has shape"):
        read(hu, labels[::2, 1::2, ::2], affine=AFFINE)
    with pytest.raises(ValueError, match=r"reverse order: labels.transpose\(2, 1, 0\)"):
        read(hu, labels.T, affine=AFFINE)
    coarse = torchio.LabelMap(tensor=labels[None, ::2, ::2, ::2].copy(), affine=AFFINE)
    with pytest.warns(UserWarning, match=r"has the affine of the volume, but another shape \(\(6, 6, 5\), not"):
        read(hu, coarse, affine=AFFINE)
    coarse.affine = AFFINE @ np.diag([2.0, 2, 2, 1])
    placed = quietly(hu, coarse, affine=AFFINE).mask.data[0, ::2, ::2, ::2]
    assert np.array_equal(placed.numpy(), labels[::2, ::2, ::2])


def test_labels_of_another_grid_on_a_sheared_volume(hu, labels):
    "The label of each voxel is that at its place, in whole steps of the label map's own grid."
    mask = quietly(hu, torchio.LabelMap(tensor=labels[None], affine=AFFINE), affine=SHEARED).mask.data[0]
    voxels = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1)
    there = np.linalg.inv(AFFINE) @ SHEARED @ np.insert(voxels, 3, 1, axis=-1)[..., None]
    places = np.rint(there[..., :3, 0]).astype(int)
    inside = ((places >= 0) & (places < SHAPE)).all(axis=-1)
    right = np.where(inside, labels[tuple(np.clip(places, 0, np.array(SHAPE) - 1).transpose(3, 0, 1, 2))], 0)
    assert np.array_equal(mask.numpy(), right)


@pytest.mark.parametrize("form", ["file", "image"])
def test_labels_beside_the_volume(tmp_path, hu, labels, form):
    def placed(affine: np.ndarray) -> Path | torchio.LabelMap:
        nib.save(nib.Nifti1Image(labels, affine), tmp_path / "labels.nii")
        return tmp_path / "labels.nii" if form == "file" else torchio.LabelMap(tensor=labels[None], affine=affine)

    with pytest.raises(ValueError, match=r"no labelled voxel within.*z from 5.5 to 35.5 mm.*z from 505.5 to 535.5 mm"):
        read(hu, placed(moved(500.0)), affine=AFFINE)
    with pytest.warns(UserWarning, match=r"lies in the volume with (39|40|41)% of its labelled voxels only"):
        read(hu, placed(moved(18.0)), affine=AFFINE)
    assert quietly(hu, placed(moved(6.0)), affine=AFFINE).mask.data[0, ..., :2].sum() == 0


SEGMENTS = [("Left lung", 0, 1), ("tumour", 1, 1), ("heart ü", 0, 2)]  # name, layer, label in the layer


def segmentation(path: Path, layers: np.ndarray, segments: list[tuple[str, int, int]]) -> Path:
    "Write a segmentation as 3D Slicer does."
    image = sitk.GetImageFromArray(np.moveaxis(layers, 0, -1).transpose(2, 1, 0, 3).copy(), isVector=True)
    if len(layers) == 1:
        image = sitk.GetImageFromArray(layers[0].T.copy())
    lps = LPS @ AFFINE
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image.SetSpacing(spacing)
    image.SetOrigin(lps[:3, 3])
    image.SetDirection((lps[:3, :3] / spacing).ravel())
    for i, (name, layer, label) in enumerate(segments):
        fields = {"ID": f"Segment_{i}", "Name": name, "Layer": layer, "LabelValue": label, "Extent": "0 1 0 1 0 1"}
        for field, value in fields.items():
            image.SetMetaData(f"Segment{i}_{field}", str(value))
    sitk.WriteImage(image, str(path), True)
    return path


def test_segmentation_of_slicer(tmp_path, hu, labels):
    layers = np.stack([labels % 3, np.where(labels == 3, 1, 0)]).astype(np.uint8)
    path = segmentation(tmp_path / "a.seg.nrrd", layers, SEGMENTS)
    assert sitk.ReadImage(str(path)).GetNumberOfComponentsPerPixel() == 2
    for image in (path, sitk.ReadImage(str(path))):
        subject = quietly(hu, image, affine=AFFINE)
        assert subject.structures.to_dict("list") == {"structure": ["Left lung", "tumour", "heart ü"], "id": [1, 2, 3]}
        right = np.select([labels == 1, labels == 2, labels == 3], [1, 3, 2])
        assert np.array_equal(subject.mask.data[0].numpy(), right)
    with pytest.raises(
        ValueError, match="volume .* is a segmentation of 3D Slicer, not a CT; give the CT, and this as"
    ):
        read(path, path)
    layers[1, labels == 1] = 1
    with pytest.warns(UserWarning, match=rf"overlap.*'tumour' takes {(labels == 1).sum()} of 'Left lung'"):
        assert (read(hu, segmentation(path, layers, SEGMENTS), affine=AFFINE).mask.data == 1).sum() == 0


def test_segmentation_of_one_layer_keeps_its_labels(tmp_path, hu, labels):
    segments = [("bone", 0, 3), ("lung", 0, 1), ("heart", 0, 2)]
    subject = quietly(hu, segmentation(tmp_path / "a.seg.nrrd", labels[None], segments), affine=AFFINE)
    assert np.array_equal(subject.mask.data[0].numpy(), labels)
    assert dict(zip(subject.structures.structure, subject.structures.id)) == {"bone": 3, "lung": 1, "heart": 2}
    own = subject.structures.assign(structure="mine")
    path = tmp_path / "a.seg.nrrd"
    assert quietly(hu, path, affine=AFFINE, structures=own).structures.structure.tolist() == ["mine"] * 3
    assert len(quietly(hu, path, affine=moved(3.0)).structures) == 3  # names survive resampling


# What users hold in their hands


class MetaTensor(torch.Tensor):
    "As MONAI's: a tensor with `affine` and `meta`."


def meta_tensor(array: np.ndarray, affine: np.ndarray, space: str | None = "RAS") -> MetaTensor:
    tensor = torch.as_tensor(array).as_subclass(MetaTensor)
    tensor.affine, tensor.meta = torch.as_tensor(affine), {"space": space}
    return tensor


def hold(kind: str, path: Path) -> object:
    "Load a NIfTI file with a library."
    image = nib.load(path)
    array, affine = np.asarray(image.dataobj), image.affine
    return {
        "nibabel": lambda: image,
        "nibabel in memory": lambda: nib.Nifti1Image(array, affine),
        "SimpleITK": lambda: sitk.ReadImage(str(path)),
        "torchio": lambda: torchio.ScalarImage(path),
        "torchio loaded": lambda: torchio.ScalarImage(tensor=array[None], affine=affine),
        "MONAI": lambda: meta_tensor(array, affine),
        "MONAI channel": lambda: meta_tensor(array[None], affine),
        "MONAI LPS": lambda: meta_tensor(array, LPS @ affine, "LPS"),
    }[kind]()


KINDS = [
    "nibabel",
    "nibabel in memory",
    "SimpleITK",
    "torchio",
    "torchio loaded",
    "MONAI",
    "MONAI channel",
    "MONAI LPS",
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_users_hold(tmp_path, hu, labels, kind):
    ct, seg = write_nifti(tmp_path / "ct.nii.gz", hu, AFFINE, AFFINE), tmp_path / "labels.nii.gz"
    write_nifti(seg, labels, AFFINE, AFFINE)
    right, subject = quietly(ct, seg), quietly(hold(kind, ct), hold(kind, seg))
    for name in ("volume", "mask", "density"):
        assert torch.equal(subject[name].data, right[name].data)
        assert np.allclose(subject[name].affine, right[name].affine, atol=1e-5)
    assert type(subject.volume.data) is torch.Tensor


def test_units_and_warnings_of_images_in_memory(tmp_path, hu):
    path = write_nifti(tmp_path / "ct.nii", hu, scaled(1e-3, SHEARED), scaled(1e-3, AFFINE), (2, 1), "meter")
    for image in (nib.load(path), torchio.ScalarImage(path)):
        with pytest.warns(UserWarning, match="8.1 mm apart"):
            assert_read(read(image, center_volume=False), hu, SHEARED)
    path = write_nifti(path, hu)
    with pytest.warns(UserWarning, match="says nothing about its orientation"):
        assert_read(read(nib.load(path), center_volume=False), hu, np.diag([1.5, 2.0, 3.0, 1.0]))
    with pytest.warns(UserWarning, match="identity as its affine"):
        read(meta_tensor(hu, np.eye(4)))


def test_other_formats_of_nibabel(tmp_path, hu):
    nib.save(nib.MGHImage(hu.astype(np.int32), AFFINE.astype(np.float32)), tmp_path / "ct.mgz")
    for image in (tmp_path / "ct.mgz", nib.load(tmp_path / "ct.mgz")):
        assert_read(quietly(image, center_volume=False), hu, AFFINE)


def write_afni(path: Path, voxels: np.ndarray, factor: float) -> None:
    "Write what AFNI writes: axes that run to the left, to the back and to the head, and a factor for each volume."
    step, origin = (-2, -2.5, 3), (20, 15, -7)  # mm, in the frame of the header, x to the left and y to the back
    attributes = {
        "DATASET_RANK": (3, 1, 0, 0, 0, 0, 0, 0),
        "DATASET_DIMENSIONS": (*voxels.shape, 0, 0),
        "BRICK_TYPES": (1,),
        "BRICK_FLOAT_FACS": (factor,),
        "ORIENT_SPECIFIC": (1, 4, 4),
        "DELTA": step,
        "ORIGIN": origin,
        "IJK_TO_DICOM_REAL": np.column_stack([np.diag(step), origin]).ravel(),
    }
    text = "type = string-attribute\nname = BYTEORDER_STRING\ncount = 10\n'LSB_FIRST~\n\n"
    for name, values in attributes.items():
        kind = "float" if any(float(value) % 1 for value in values) or name == "BRICK_FLOAT_FACS" else "integer"
        text += f"type = {kind}-attribute\nname = {name}\ncount = {len(values)}\n {' '.join(map(str, values))}\n\n"
    path.with_suffix(".HEAD").write_text(text.rstrip())
    path.with_suffix(".BRIK").write_bytes(voxels.astype("<i2").tobytes(order="F"))


@pytest.mark.parametrize("factor, right", [(0.0, 1.0), (0.5, 0.5)])  # 0 means no factor
def test_afni_scales_in_its_own_way(tmp_path, hu, factor, right):
    write_afni(tmp_path / "ct+orig", hu, factor)
    affine = np.array([[2.0, 0, 0, -20], [0, 2.5, 0, -15], [0, 0, 3, -7], [0, 0, 0, 1]])
    for image in (tmp_path / "ct+orig.HEAD", tmp_path / "ct+orig.BRIK", nib.load(tmp_path / "ct+orig.HEAD")):
        assert_read(quietly(image, center_volume=False), hu * right, affine)


def test_minc_of_version_1(tmp_path, capfd, hu):
    with netcdf_file(tmp_path / "ct.mnc", "w") as file:
        for name, n, start, step in zip(("zspace", "yspace", "xspace"), SHAPE[::-1], (7, -20, 30), (3, 1.5, 2)):
            file.createDimension(name, n)
            axis = file.createVariable(name, "i4", ())
            axis.start, axis.step, axis.spacing = float(start), float(step), b"regular__"
        image = file.createVariable("image", "i2", ("zspace", "yspace", "xspace"))
        image[:], image.valid_range, image.signtype = hu.T, np.array([-32768.0, 32767]), b"signed__"
        for name, value in (("image-max", 32767.0), ("image-min", -32768.0)):
            file.createVariable(name, "f8", ())[...] = value
    affine = np.array([[2.0, 0, 0, 30], [0, 1.5, 0, -20], [0, 0, 3, 7], [0, 0, 0, 1]])
    found = quietly(tmp_path / "ct.mnc", center_volume=False).volume
    turn = nib.orientations.io_orientation(np.linalg.inv(affine) @ found.affine)  # MINC counts z, y and x
    assert np.allclose(nib.orientations.apply_orientation(found.numpy()[0], turn), hu, atol=1e-3)
    assert np.allclose(found.affine @ nib.orientations.inv_ornt_aff(turn, found.spatial_shape), affine)


def test_what_is_no_image(hu):
    own = torchio.Subject(ct=torchio.ScalarImage(tensor=hu[None], affine=AFFINE), age=50)
    with pytest.raises(
        TypeError, match=r"is a Subject with the images \['ct'\]; give one of them: read\(subject\['ct'"
    ):
        read(own)
    with pytest.raises(ValueError, match="volume is a tensor, so its affine must be given"):
        read(hu)
    with pytest.raises(ValueError, match="volume has its own place, which counts"):
        read(own.ct, affine=np.eye(4))
    with pytest.raises(ValueError, match="it holds complex64, not numbers"):
        read(hu.astype(np.complex64), affine=AFFINE)
    quietly(own.ct, affine=AFFINE)


ORIENTATIONS = [
    (order, flips) for order in itertools.permutations(range(3)) for flips in itertools.product((1, -1), repeat=3)
]


@pytest.mark.parametrize("library", ["nibabel", "SimpleITK"])
def test_48_orders_of_axes_give_one_picture(tmp_path, hu, library):
    right = picture(quietly(hu, affine=AFFINE))
    for order, flips in ORIENTATIONS:
        step = np.zeros((4, 4))  # voxel from turned voxel
        step[3, 3] = 1
        for new, (old, flip) in enumerate(zip(order, flips, strict=True)):
            step[old, new] = flip
            step[old, 3] = 0 if flip > 0 else SHAPE[old] - 1
        turned = hu.transpose(order)[tuple(slice(None, None, flip) for flip in flips)]
        affine, path = AFFINE @ step, tmp_path / ("ct.nii" if library == "nibabel" else "ct.nrrd")
        if library == "nibabel":
            nib.save(nib.Nifti1Image(turned, affine), path)
        else:
            lps = LPS @ affine
            spacing = np.linalg.norm(lps[:3, :3], axis=0)
            image = sitk.GetImageFromArray(turned.T)
            image.SetSpacing(spacing)
            image.SetOrigin(lps[:3, 3])
            image.SetDirection((lps[:3, :3] / spacing).ravel())
            sitk.WriteImage(image, str(path))
        assert (picture(quietly(path)) - right).abs().max() < 1e-6 * right.max(), (order, flips)
