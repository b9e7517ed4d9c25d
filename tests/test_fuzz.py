"""Files with spoilt tags, headers and lengths: each is read as it says, or refused by an error of ours.

`pytest tests/test_fuzz.py --hypothesis-profile long` tries many more.
"""

from __future__ import annotations

import re
import shutil
import struct
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from dicom_files import random_pixels, slice_dataset, straight
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import ImplicitVRLittleEndian, XRayAngiographicImageStorage

import diffdrr
from diffdrr.volumes import read
from diffdrr.xrays import read_xray

quick = settings(deadline=None, suppress_health_check=list(HealthCheck))
PACKAGE = str(Path(diffdrr.__file__).parent)
OURS = (ValueError, TypeError, FileNotFoundError)

NUMBERS = [
    *("", "0", "-1", "1", "1e9", "-300", "0,5", "abc", "nan", "inf", "1\\2\\3", "0.5\\0.5", "0\\0", "0.8\\-0.7"),
    *("0.8", "2\\2", "1e-12\\1e-12", "0.8\\0.7\\2.5", "\\", "1.25\\", "-40\\15", "-40\\15\\-297.5", "0\\0\\0"),
    *(
        "1\\0\\0\\0\\1\\0",
        "0\\1\\0\\1\\0\\0",
        "1\\0\\0\\1\\0\\0",
        "0\\0\\0\\0\\0\\0",
        "2\\0\\0\\0\\2\\0",
        "1 0 0 0 1 0",
    ),
    *("1\\0\\0\\0\\0.9563\\0.2924", "0.5", "1024", "-1024", "1000", "65535", "3.0E+02", " 12 "),
]
WORDS = ["", "CT", "MR", "OT", "LOCALIZER", "DERIVED\\SECONDARY", "ORIGINAL\\PRIMARY\\LOCALIZER", "1.2.3", "LOG", "LIN"]
COUNTS = [0, 1, 2, 5, 6, 7, 8, 12, 15, 16, 32, 64, 65535]


def spoil_text(keyword: str, text: str) -> Callable[[Dataset], None]:
    "Replace the content of a tag by any text: files without types of values (implicit VR) hold it as it is."

    def spoil(dataset: Dataset) -> None:
        dataset[keyword] = pydicom.DataElement(keyword, "LO", text)

    return spoil


def spoil_count(keyword: str, count: int) -> Callable[[Dataset], None]:
    "Replace a whole number of 16 bits."

    def spoil(dataset: Dataset) -> None:
        dataset[keyword] = pydicom.DataElement(keyword, "US", count)

    return spoil


def remove(keyword: str) -> Callable[[Dataset], None]:
    "Remove a tag."

    def spoil(dataset: Dataset) -> None:
        dataset.pop(keyword, None)

    return spoil


def spoilt(texts: list[str], words: list[str], counts: list[str]) -> st.SearchStrategy:
    "Draw what happens to the tags of a file."
    return st.one_of(
        st.builds(spoil_text, st.sampled_from(texts), st.sampled_from(NUMBERS)),
        st.builds(spoil_text, st.sampled_from(words), st.sampled_from(WORDS)),
        st.builds(spoil_count, st.sampled_from(counts), st.sampled_from(COUNTS)),
        st.builds(remove, st.sampled_from(texts + words + counts)),
    )


def cut(at: float) -> Callable[[bytes], bytes]:
    "Cut a file short."
    return lambda content: content[: int(at * len(content))]


def change(at: float, value: int) -> Callable[[bytes], bytes]:
    "Change a byte."
    return lambda content: (lambda i: content[:i] + bytes([value]) + content[i + 1 :])(int(at * (len(content) - 1)))


spoilt_bytes = st.one_of(
    st.builds(cut, st.floats(0, 1)), st.builds(change, st.floats(0, 1), st.integers(0, 255)), st.just(bytes)
)


def attempt(function: Callable, *args, **options):
    "Call a reader: return what it gives and its warnings, or None for an error of ours. Other errors fail the test."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return function(*args, **options), [str(w.message) for w in caught]
        except OURS as error:
            place = traceback.extract_tb(error.__traceback__)[-1].filename
            assert place.startswith(PACKAGE), f"{type(error).__name__} from {place}: {error}"
            assert "Exception thrown in" not in str(error), f"the words of a library: {error}"
            return None


def numbers_in(dataset: Dataset, keyword: str, count: int) -> np.ndarray | None:
    "Read the numbers of a tag from its bytes, as the standard spells them (PS3.5 6.2, DS), or None."
    element = dataset.get_item(keyword)
    if element is None:
        return None
    value = element.value
    text = value.decode("latin1") if isinstance(value, bytes) else str(value)
    parts = [part.strip(" \0") for part in text.split("\\")]
    decimal = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
    if len(parts) != count or not all(decimal.fullmatch(part) for part in parts):
        return None
    return np.array([float(part) for part in parts])


def to_bytes(dataset: Dataset, path: Path) -> bytes:
    "Encode a file without types of values."
    dataset.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian
    dataset["PixelData"].VR = "OW"  # as the standard has it, whatever is spoilt
    pydicom.dcmwrite(path, dataset, implicit_vr=True, little_endian=True)
    return path.read_bytes()


@pytest.fixture(autouse=True, scope="module")
def tolerant_writer():
    "Let pydicom write what the standard forbids."
    before = pydicom.config.settings.writing_validation_mode
    pydicom.config.settings.writing_validation_mode = pydicom.config.IGNORE
    yield
    pydicom.config.settings.writing_validation_mode = before


# A CT series


def of_cts(files: list[Dataset]) -> list[Dataset]:
    "Keep the series in which a slice says that it is of a CT: beside it, others are left out without a word."
    words = [str(dataset.get("ImageType", "")).upper() for dataset in files]
    cts = {
        str(dataset.get("SeriesInstanceUID"))
        for dataset, word in zip(files, words, strict=True)
        if dataset.get("Modality") == "CT" and "LOCALIZER" not in word
    }
    return [dataset for dataset in files if str(dataset.get("SeriesInstanceUID")) in cts] or files


def series_agrees(folder: Path, subject, messages: list[str]) -> None:
    "Hold every voxel of every file against the volume: the place by its tags, the value by its bytes."
    volume, affine = subject.volume.data[0].numpy(), np.diag([-1, -1, 1, 1]) @ subject.volume.affine
    files = of_cts([pydicom.dcmread(path, force=True) for path in sorted(folder.iterdir())])
    assert len(files) == volume.shape[2] or messages, f"{len(files)} files became {volume.shape[2]} slices"
    for dataset in files:
        start, axes = numbers_in(dataset, "ImagePositionPatient", 3), numbers_in(dataset, "ImageOrientationPatient", 6)
        spacing = numbers_in(dataset, "PixelSpacing", 2)
        scout = "LOCALIZER" in str(dataset.get("ImageType", "")).upper()
        if messages and (scout or start is None or axes is None or spacing is None):
            continue  # left out, with a warning
        assert start is not None and axes is not None and spacing is not None, "a file without geometry was read"
        rows, columns = np.mgrid[: dataset.Rows, : dataset.Columns]
        places = start + columns[..., None] * spacing[1] * axes[:3] + rows[..., None] * spacing[0] * axes[3:]
        voxels = (places - affine[:3, 3]) @ np.linalg.inv(affine[:3, :3]).T
        inside = (np.rint(voxels) >= 0).all(-1) & (np.rint(voxels) < volume.shape).all(-1)
        if messages and not inside.any():
            continue
        assert inside.all() and np.abs(voxels - np.rint(voxels)).max() < 0.02, f"{start} is not where the volume is"
        slope, intercept = (numbers_in(dataset, f"Rescale{x}", 1) for x in ("Slope", "Intercept"))
        stored = np.frombuffer(dataset.PixelData, np.uint16)[: rows.size].reshape(rows.shape)
        bits = dataset.get("BitsStored", 16)
        low = dataset.get("HighBit", bits - 1) + 1 - bits if bits < 16 else 0
        stored = (stored >> low).astype(np.float64) % 2**bits
        if dataset.get("PixelRepresentation"):
            stored -= 2**bits * (stored >= 2 ** (bits - 1))
        found = volume[tuple(np.rint(voxels).astype(int).transpose(2, 0, 1))]
        right = stored * (1 if slope is None else slope) + (0 if intercept is None else intercept)
        assert np.allclose(np.maximum(found, -1024), np.maximum(right, -1024), rtol=1e-5) or messages, "values differ"


CT_TAGS = spoilt(
    [
        *("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept"),
        *("SpacingBetweenSlices", "SliceThickness", "InstanceNumber", "SliceLocation", "GantryDetectorTilt"),
        *("PixelPaddingValue", "AcquisitionNumber", "TriggerTime", "TemporalPositionIdentifier", "NumberOfFrames"),
    ],
    ["Modality", "ImageType", "SeriesInstanceUID", "SOPInstanceUID", "FrameOfReferenceUID", "SOPClassUID"],
    ["Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"],
)


@pytest.mark.filterwarnings("ignore")
@quick
@given(
    spoils=st.lists(st.tuples(st.sampled_from([0, 1, 2, 3, 4, None]), CT_TAGS), max_size=3),
    bytes_of=st.tuples(st.integers(0, 4), spoilt_bytes),
    missing=st.sets(st.integers(0, 4), max_size=2),
    twice=st.sets(st.integers(0, 4), max_size=1),
)
@example(  # a localizer between slices that are evenly spaced without it
    spoils=[(3, spoil_text("ImageType", "LOCALIZER"))], bytes_of=(0, bytes), missing={1}, twice=set()
)
def test_a_series_is_read_as_its_slices_say(spoils, bytes_of, missing, twice):
    folder = Path(tempfile.mkdtemp())
    try:
        pixels = random_pixels(5)
        for k, position in enumerate(straight(5)):
            dataset = slice_dataset(pixels[k], position, k + 1)
            for which, spoil in spoils:
                if which in (k, None):
                    spoil(dataset)
            path = folder / f"{k}.dcm"
            content = to_bytes(dataset, path)
            content = bytes_of[1](content) if k == bytes_of[0] else content
            path.write_bytes(content)
            if k in twice:
                (folder / f"{k}-again.dcm").write_bytes(content)
            if k in missing:
                path.unlink()
        result = attempt(read, folder, center_volume=False)
        untouched = bytes_of[1] is bytes or (bytes_of[0] in missing and bytes_of[0] not in twice)
        if result and untouched:  # a changed byte may change what a tag means: then it need only not crash
            series_agrees(folder, *result)
    finally:
        shutil.rmtree(folder)


# An X-ray


def xray_dataset() -> Dataset:
    "Describe an angiogram with all of its geometry."
    pixels = np.random.default_rng(0).integers(0, 4096, (8, 6)).astype(np.uint16)
    dataset = slice_dataset(pixels, (0, 0, 0), SOPClassUID=XRayAngiographicImageStorage, Modality="XA")
    for keyword in ("ImagePositionPatient", "ImageOrientationPatient", "RescaleSlope", "RescaleIntercept"):
        del dataset[keyword]
    dataset.BitsStored, dataset.HighBit, dataset.ImageType = 12, 11, ["ORIGINAL", "PRIMARY", "SINGLE PLANE"]
    dataset.DistanceSourceToDetector, dataset.DistanceSourceToPatient = 1000, 700
    dataset.ImagerPixelSpacing = [0.3, 0.4]
    dataset.PositionerPrimaryAngle, dataset.PositionerSecondaryAngle = 10, -20
    dataset.PixelIntensityRelationship, dataset.PixelIntensityRelationshipSign = "LIN", 1
    return dataset


XRAY_TAGS = spoilt(
    [
        *("DistanceSourceToDetector", "DistanceSourceToPatient", "ImagerPixelSpacing", "PositionerPrimaryAngle"),
        *("PositionerSecondaryAngle", "PositionerPrimaryAngleIncrement", "RescaleSlope", "RescaleIntercept"),
        *("PixelSpacing", "WindowCenter", "WindowWidth", "EstimatedRadiographicMagnificationFactor", "NumberOfFrames"),
    ],
    ["Modality", "ImageType", "PixelIntensityRelationship", "PhotometricInterpretation", "SOPClassUID"],
    ["Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "SamplesPerPixel"],
)


@pytest.mark.filterwarnings("ignore")
@quick
@given(spoils=st.lists(XRAY_TAGS, max_size=3), content=spoilt_bytes)
def test_an_xray_is_read_as_its_tags_say(spoils, content):
    dataset = xray_dataset()
    for spoil in spoils:
        spoil(dataset)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.dcm"
        path.write_bytes(content(to_bytes(dataset, path)))
        result = attempt(read_xray, path)
        if not result or content is not bytes:
            return
        xray = result[0]
        dataset = pydicom.dcmread(path, force=True)  # it has no preamble
        assert xray.image.shape[-2:] == (dataset.Rows, dataset.Columns)
        assert xray.camera.sdd == pytest.approx(numbers_in(dataset, "DistanceSourceToDetector", 1)[0])
        expected = numbers_in(dataset, "ImagerPixelSpacing", 2)
        assert [xray.camera.dely, xray.camera.delx] == pytest.approx(list(expected))
        for name, keyword in (("sod", "DistanceSourceToPatient"), ("primary_angle", "PositionerPrimaryAngle")):
            value = numbers_in(dataset, keyword, 1)
            value = None if name == "sod" and value == 0 else value  # what is written where it is not known
            assert getattr(xray, name) == (None if value is None else pytest.approx(value[0]))


# Volumes in one file


def nifti_affine(header: bytes) -> np.ndarray | None:
    "Work out world from voxel by the standard (nifti1.h): sform, then qform; None where neither is set."
    unit = {1: 1000.0, 2: 1.0, 3: 0.001}.get(header[123] & 7, 1.0)
    pixdim = struct.unpack("<8f", header[76:108])
    qform, sform = struct.unpack("<2h", header[252:256])
    matrix = np.eye(4)
    if sform > 0:
        matrix[:3] = np.array(struct.unpack("<12f", header[280:328])).reshape(3, 4)
    elif qform > 0:
        b, c, d, *offset = struct.unpack("<6f", header[256:280])
        a = np.sqrt(max(0.0, 1 - b * b - c * c - d * d))
        turn = np.array(
            [
                [a * a + b * b - c * c - d * d, 2 * b * c - 2 * a * d, 2 * b * d + 2 * a * c],
                [2 * b * c + 2 * a * d, a * a + c * c - b * b - d * d, 2 * c * d - 2 * a * b],
                [2 * b * d - 2 * a * c, 2 * c * d + 2 * a * b, a * a + d * d - b * b - c * c],
            ]
        )
        matrix[:3, :3] = turn * np.array([pixdim[1], pixdim[2], pixdim[3] * (-1 if pixdim[0] < 0 else 1)])
        matrix[:3, 3] = offset
    else:
        return None
    matrix[:3] *= unit
    return matrix


FIELDS = {  # offset, format and unusual values (nifti1.h)
    **{f"dim{k}": (40 + 2 * k, "<h", [-1, 0, 1, 2, 3, 4, 5, 6, 7, 300]) for k in range(6)},
    **{f"pixdim{k}": (76 + 4 * k, "<f", [0, -1, 1, 2.5, 1e-9, 1e9, float("nan")]) for k in range(4)},
    "datatype": (70, "<h", [0, 2, 4, 8, 16, 64, 128, 256, 512, 768, 1792]),
    "bitpix": (72, "<h", [0, 8, 16, 32]),
    "vox_offset": (108, "<f", [0, 100, 352, 368, 1e9]),
    "scl_slope": (112, "<f", [0, 1, -1, 2.0, float("nan"), float("inf")]),
    "scl_inter": (116, "<f", [0, -1024, float("nan")]),
    "xyzt_units": (123, "<b", [0, 1, 2, 3, 4, 7, 10]),
    "qform_code": (252, "<h", [-1, 0, 1, 2, 3, 9]),
    "sform_code": (254, "<h", [-1, 0, 1, 2, 3, 9]),
    **{f"quatern{k}": (256 + 4 * k, "<f", [0, 0.5, 1, -1, 3, float("nan")]) for k in range(3)},
    **{f"srow{k}": (280 + 4 * k, "<f", [0, 1, -2, 0.3, 1e6, float("nan")]) for k in range(12)},
}


def put(name: str, value: float) -> Callable[[bytes], bytes]:
    "Write a value into a field of a header."
    offset, kind, _ = FIELDS[name]
    packed = struct.pack(kind, value)
    return lambda content: content[:offset] + packed + content[offset + len(packed) :]


put_values = st.sampled_from(sorted(FIELDS)).flatmap(
    lambda name: st.builds(put, st.just(name), st.sampled_from(FIELDS[name][2]))
)


@pytest.mark.filterwarnings("ignore")
@quick
@given(puts=st.lists(put_values, max_size=3), content=spoilt_bytes, both=st.booleans())
def test_a_nifti_file_is_read_as_its_header_says(puts, content, both):
    affine = np.array([[-2.0, 0, 0, 30], [0, -2.5, 0, 40], [0, 0, 3.0, -100], [0, 0, 0, 1]])
    voxels = np.random.default_rng(0).integers(-1000, 1000, (4, 5, 6)).astype(np.int16)
    image = nibabel.Nifti1Image(voxels, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code=1)
    image.set_qform(affine if both else None, code=1 if both else 0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ct.nii"
        image.to_filename(path)
        spoilt_file = path.read_bytes()
        for change_header in puts:
            spoilt_file = change_header(spoilt_file)
        path.write_bytes(content(spoilt_file))
        result = attempt(read, path, center_volume=False)
        if not result or content is not bytes:
            return
        expected, (subject, messages) = nifti_affine(spoilt_file[:348]), result
        assert messages or expected is not None, "a file without a frame was read without a word"
        if expected is not None:
            shape = subject.volume.spatial_shape
            corners = np.array([[i, j, k, 1] for i in (0, shape[0]) for j in (0, shape[1]) for k in (0, shape[2])]).T
            away = np.abs(expected @ corners - subject.volume.affine @ corners).max()
            assert away < 1e-3 * max(1, np.abs(expected @ corners).max()), f"{away} mm off; {messages}"


LINES = ["", "0 0 0", "1 1", "-1 1 1", "1,5 1 1", "nan 1 1", "left-posterior-superior", "raw", "gzip", "short", "99"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("suffix", [".mha", ".nrrd"])
@quick
@given(line=st.integers(1, 12), text=st.sampled_from([*LINES, None]), content=spoilt_bytes)
def test_a_file_with_a_header_of_text_does_not_crash(suffix, line, text, content):
    import SimpleITK as sitk

    image = sitk.GetImageFromArray(np.random.default_rng(0).integers(-1000, 1000, (6, 5, 4)).astype(np.int16))
    image.SetSpacing((2.0, 2.5, 3.0))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"ct{suffix}"
        sitk.WriteImage(image, str(path))
        lines = path.read_bytes().split(b"\n", 14)
        name, separator, _ = lines[line].partition(b": " if suffix == ".nrrd" else b" = ")
        if text is None:
            del lines[line]
        elif separator:
            lines[line] = name + separator + text.encode()
        path.write_bytes(content(b"\n".join(lines)))
        result = attempt(read, path)
        assert not result or np.isfinite(result[0].volume.affine).all()
