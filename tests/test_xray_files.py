"""X-rays as makers write them: each file here has an oddity that real ones have, and a right answer that is known."""

from __future__ import annotations

import base64
import json
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataelem import RawDataElement
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.tag import Tag
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from diffdrr.geometry import pose_from_view
from diffdrr.rendering import DRR
from diffdrr.volumes import load_example_ct
from diffdrr.xrays import find_field, prepare, read_xray, to_line_integrals

HERE = Path(__file__).parent
REAL = HERE.parents[1] / "shared" / "data"
CLASS = {"CR": "1", "DX": "1.1", "MG": "1.2", "IO": "1.3", "XA": "12.1", "RF": "12.2", "RTIMAGE": "481.1"}
VALUES = np.arange(48, dtype=np.uint16).reshape(6, 8) * 10 + 100
HOW = dict(sdd=1000.0, delx=0.5)


def dataset_of(modality: str = "XA", values: np.ndarray = VALUES, end: str | None = None, **tags) -> pydicom.Dataset:
    "Make a file as the standard wants it, but for some tags; those that are None are left out."
    dataset = pydicom.Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = UID(f"1.2.840.10008.5.1.4.1.1.{end or CLASS[modality]}")
    dataset.SOPInstanceUID = generate_uid()
    dataset.Modality, dataset.ImageType = modality, ["ORIGINAL", "PRIMARY"]
    dataset.Rows, dataset.Columns = values.shape[-2:]
    if values.ndim == 3:
        dataset.NumberOfFrames = len(values)
    bits = 8 * values.dtype.itemsize
    dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = bits, bits, bits - 1
    dataset.PixelRepresentation = int(values.dtype.kind == "i")
    dataset.SamplesPerPixel, dataset.PhotometricInterpretation = 1, "MONOCHROME2"
    dataset.PixelData = values.tobytes()
    dataset["PixelData"].VR = "OW"
    dataset.DistanceSourceToDetector, dataset.DistanceSourceToPatient = 1000, 700
    dataset.ImagerPixelSpacing = [0.25, 0.5]
    for name, value in tags.items():
        if value is None:
            dataset.pop(name, None)
        elif isinstance(value, bytes) and name != "PixelData":  # as it would stand in a file
            tag = Tag(name)
            dataset[tag] = RawDataElement(tag, "DS", len(value), value, 0, False, True)
        else:
            setattr(dataset, name, value)
    return dataset


def save(folder: Path, dataset: pydicom.Dataset) -> Path:
    path = folder / f"{generate_uid()}.dcm"
    dataset.save_as(path, enforce_file_format=True)
    return path


def write(folder: Path, modality: str = "XA", values: np.ndarray = VALUES, **tags) -> Path:
    return save(folder, dataset_of(modality, values, **tags))


def stored(path: Path, **how) -> np.ndarray:
    return read_xray(path, **how).image[0, 0].numpy()


# Kinds (PS3.3 C.7.3.1, C.7.6.1)


@pytest.mark.parametrize(
    ("end", "modality", "image_type", "words"),
    [
        ("2", "CT", ["ORIGINAL", "PRIMARY", "AXIAL"], r"a slice of a CT .*diffdrr.read reads CTs"),
        ("2", "CT", ["ORIGINAL", "PRIMARY", "LOCALIZER"], "the scout of a CT: a fan across the body and parallel"),
        ("4", "MR", ["ORIGINAL", "PRIMARY"], "a slice of an MRI"),
        ("12.1", "CT", ["DERIVED", "SECONDARY", "MPR"], "a slice of a CT"),
        ("13.1.1", "XA", ["DERIVED", "PRIMARY"], "a volume that X-rays were reconstructed to"),
        ("13.1.3", "MG", ["DERIVED", "PRIMARY"], "slices that were reconstructed from X-rays"),
        ("1.2", "MG", ["DERIVED", "PRIMARY", "TOMOSYNTHESIS", "GENERATED_2D"], "a picture computed from slices"),
        ("7", "CR", ["DERIVED", "SECONDARY"], "a capture of a screen or a film.*give read_xray the array"),
        ("7.2", "OT", ["DERIVED", "SECONDARY"], "a capture of a screen or a film"),
        ("6.1", "US", ["ORIGINAL", "PRIMARY"], "an ultrasound picture"),
        ("481.2", "RTDOSE", [], "a dose"),
        ("481.3", "RTSTRUCT", [], "structures of radiotherapy"),
        ("11.1", "PR", [], "a presentation state"),
        ("88.33", "SR", [], "a report"),
        ("481.1", "RTIMAGE", ["DERIVED", "SECONDARY", "FLUENCE"], "a fluence of radiotherapy"),
    ],
)
def test_what_is_no_xray_is_refused(tmp_path: Path, end: str, modality: str, image_type: list[str], words: str):
    path = write(tmp_path, end=end, Modality=modality, ImageType=image_type)
    with pytest.raises(ValueError, match=f"(?s)holds {words}"):
        read_xray(path)


@pytest.mark.parametrize("modality", ["CR", "DX", "IO", "XA", "RF"])
def test_xrays_of_all_machines_are_read(tmp_path: Path, modality: str):
    found = read_xray(write(tmp_path, modality))
    np.testing.assert_array_equal(found.image[0, 0], VALUES)
    assert (found.camera.sdd, found.camera.delx, found.camera.dely, found.sod) == (1000, 0.5, 0.25, 700)


@pytest.mark.parametrize("modality", ["OT", ""])
def test_a_class_of_xrays_makes_up_for_the_modality(tmp_path: Path, modality: str):
    np.testing.assert_array_equal(stored(write(tmp_path, Modality=modality)), VALUES)
    with pytest.raises(ValueError, match="not an X-ray"):
        read_xray(write(tmp_path, Modality=modality, SOPClassUID=UID("1.3.6.1.4.1.99")))


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian])
def test_files_without_preamble_or_header_are_read(tmp_path: Path, syntax: UID):
    values = VALUES.astype(">u2" if syntax is ExplicitVRBigEndian else "<u2")
    dataset = dataset_of("CR", values)
    del dataset.file_meta
    path = tmp_path / "bare.dcm"
    pydicom.dcmwrite(
        path, dataset, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian, force_encoding=True
    )
    assert path.read_bytes()[128:132] != b"DICM"
    np.testing.assert_array_equal(stored(path), VALUES)


@pytest.mark.parametrize("content", [b"", b"not a picture at all", bytes(1000), b"\x89PNG\r\n\x1a\n" + bytes(50)])
def test_what_is_no_file_of_a_kind_is_refused(tmp_path: Path, content: bytes):
    (tmp_path / "x.dcm").write_bytes(content)
    with pytest.raises(ValueError, match="x.dcm' (is not in DICOM format, nor a picture|cannot be read)"):
        read_xray(tmp_path / "x.dcm")


@pytest.mark.parametrize("part", [0.3, 0.6, 0.9, 0.99])
def test_files_that_are_cut_short_are_refused(tmp_path: Path, part: float):
    path = write(tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=r"\.dcm' (cannot be read|holds|is not in DICOM)|of the file '.*' must hold"):
        read_xray(path)


# Geometry


def test_radiotherapy(tmp_path: Path):
    how = dict(
        DistanceSourceToDetector=None,
        ImagerPixelSpacing=None,
        DistanceSourceToPatient=None,
        RTImageSID=1500,
        RadiationMachineSAD=1000,
        ImagePlanePixelSpacing=[0.8, 0.4],
        RTImagePosition=[-1.0, 3.0],
        GantryAngle=270,
        BeamLimitingDeviceAngle=45,
        PatientSupportAngle=0,
        PatientPosition="HFS",
    )
    found = read_xray(write(tmp_path, "RTIMAGE", **how))
    assert (found.camera.sdd, found.camera.delx, found.camera.dely, found.sod) == (1500, 0.4, 0.8, 1000)
    assert (found.primary_angle, found.secondary_angle) == (90, 0)  # the source on the patient's right
    # the axis of the beam is 1 mm right of the first pixel's centre, and 3 mm below it
    centre = found.camera.pixel_from_camera.double() @ torch.tensor([0.0, 0, 1500], dtype=torch.float64)
    torch.testing.assert_close(centre[:2] / centre[2], torch.tensor([3.0, 4.25], dtype=torch.float64))
    for keyword, value, words in (
        ("PatientSupportAngle", 30, r"PatientSupportAngle \(300A,0122\) of the file '.*' is 30 degrees"),
        ("TableTopRollAngle", 2.0, r"TableTopRollAngle \(300A,0144\)"),
        ("XRayImageReceptorAngle", 90, r"XRayImageReceptorAngle \(3002,000E\) of the file '.*' is 90 degrees"),
        ("RTImagePlane", "NON_NORMAL", r"RTImagePlane \(3002,000C\) of the file '.*' is 'NON_NORMAL'"),
        ("RTImageOrientation", [0, 1, 0, 1, 0, 0], r"RTImageOrientation \(3002,0010\)"),
        ("PatientPosition", "FFP", r"PatientPosition \(0018,5100\) of the file '.*' is 'FFP'"),
        (
            "RTImageSID",
            None,
            r"RTImageSID \(3002,0026\) of the file '.*' must hold a positive number, not nothing.*; "
            "give it as the argument sdd, in mm",
        ),
    ):
        with pytest.raises(ValueError, match=words):
            read_xray(write(tmp_path, "RTIMAGE", **{**how, keyword: value}))
    turned = read_xray(
        write(tmp_path, "RTIMAGE", **{**how, "PatientSupportAngle": 30}), primary_angle=80.0, secondary_angle=5.0
    )
    assert (turned.primary_angle, turned.secondary_angle) == (80, 5)
    with pytest.warns(UserWarning, match=r"the file '.*' has no PatientPosition \(0018,5100\)"):
        read_xray(write(tmp_path, "RTIMAGE", **{**how, "PatientPosition": ""}))
    with pytest.warns(
        UserWarning, match=r"the file '.*' has no RTImagePosition \(3002,0012\): the beam is taken to meet"
    ):
        assert read_xray(write(tmp_path, "RTIMAGE", **{**how, "RTImagePosition": []})).camera.x0 == 0


def item(**tags) -> pydicom.Dataset:
    dataset = pydicom.Dataset()
    for name, value in tags.items():
        setattr(dataset, name, value)
    return dataset


def test_functional_groups_of_enhanced_angiographies(tmp_path: Path):
    shared = item(
        FramePixelDataPropertiesSequence=[
            item(ImagerPixelSpacing=[0.2, 0.3], PixelIntensityRelationship="LOG", PixelIntensityRelationshipSign=-1)
        ],
        XRayGeometrySequence=[item(DistanceSourceToDetector=1200, DistanceSourceToIsocenter=800.0)],
    )
    frames = [
        item(PositionerPositionSequence=[item(PositionerPrimaryAngle=10 * i, PositionerSecondaryAngle=-i)])
        for i in range(3)
    ]
    frames[2].XRayGeometrySequence = [item(DistanceSourceToDetector=1100, DistanceSourceToIsocenter=750.0)]
    path = write(
        tmp_path,
        values=np.stack([VALUES + 1000 * i for i in range(3)]),
        end="12.1.1",
        DistanceSourceToDetector=None,
        DistanceSourceToPatient=None,
        ImagerPixelSpacing=None,
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=frames,
    )
    first, last = (read_xray(path, frame=i) for i in (1, 2))
    assert (first.camera.sdd, first.sod, first.camera.delx, first.camera.dely) == (1200, 800, 0.3, 0.2)
    assert (first.primary_angle, first.secondary_angle) == (10, -1)
    assert (last.camera.sdd, last.sod, last.primary_angle, last.secondary_angle) == (1100, 750, 20, -2)
    assert (first.bright_bones, first.logarithmic) == (True, True)
    np.testing.assert_array_equal(last.image[0, 0], VALUES + 2000)


def test_spacing_at_the_patient_is_not_that_of_the_detector(tmp_path: Path):
    both = dict(PixelSpacing=[0.1, 0.1], PixelSpacingCalibrationType="GEOMETRY")
    assert read_xray(write(tmp_path, "DX", **both)).camera.delx == 0.5
    with pytest.raises(ValueError, match=r"give it as the argument delx, in mm; PixelSpacing \(0028,0030\) is \[0.1"):
        read_xray(write(tmp_path, "DX", ImagerPixelSpacing=None, **both))


def test_the_distance_to_the_patient(tmp_path: Path):
    def sod(**tags) -> float | None:
        return read_xray(write(tmp_path, "DX", **tags)).sod

    assert sod(DistanceSourceToPatient=0) is None  # what is written where it is not known
    assert sod(DistanceSourceToPatient=None, EstimatedRadiographicMagnificationFactor=1.25) == 800
    with pytest.raises(
        ValueError, match=r"DistanceSourceToPatient \(0018,1111\) of the file '.*' must hold a positive number, not '-5"
    ):
        sod(DistanceSourceToPatient=-5)
    with pytest.warns(UserWarning, match="the patient at 1200 mm, behind it; give sdd or sod in mm"):
        sod(DistanceSourceToPatient=1200)
    with pytest.warns(UserWarning, match="4 mm wide, at 1 mm from the source: are sdd and delx in mm"):
        sod(DistanceSourceToDetector=1, DistanceSourceToPatient=None)


@pytest.mark.parametrize(
    ("keyword", "content", "words"),
    [
        (
            "ImagerPixelSpacing",
            b"0,143\\0,143 ",
            r"\(0018,1164\).*decimal point, not '0,143\\0,143'; give it as the argument delx",
        ),
        ("ImagerPixelSpacing", b"0.143\\0.143\\1", r"must hold 2 positive numbers, not '0.143\\0.143\\1'"),
        ("ImagerPixelSpacing", b"0\\0 ", r"not '0\\0'"),
        ("ImagerPixelSpacing", b"0.143\\ ", r"\(0018,1164\).*must hold 2 positive"),
        ("DistanceSourceToDetector", b"1000\\1100 ", r"\(0018,1110\).*hold a positive.*; give it as the argument sdd"),
        ("DistanceSourceToDetector", b"1 m ", r"not '1 m'"),
        ("DistanceSourceToDetector", b"NaN ", r"not 'NaN'"),
        ("DistanceSourceToDetector", b"-1000 ", r"not '-1000'"),
        ("DistanceSourceToDetector", b"0 ", r"not '0'"),
        ("DistanceSourceToPatient", b"700,5 ", r"\(0018,1111\).*decimal point.*; give it as the argument sod"),
        (
            "PositionerPrimaryAngle",
            b"30,5",
            r"\(0018,1510\).*'30,5'; give it as the argument primary_angle, in degrees",
        ),
        ("PositionerSecondaryAngle", b"CRA ", r"\(0018,1511\).*'CRA'; give it as the argument secondary_angle"),
        ("RescaleSlope", b"1,0 ", r"RescaleSlope \(0028,1053\).*'1,0'; correct it in the file"),
        (
            "RescaleSlope",
            b"0 ",
            r"RescaleSlope \(0028,1053\) of the file '.*' must hold a number other than 0, not '0'",
        ),
    ],
)
def test_numbers_that_are_wrong_are_shown(tmp_path: Path, keyword: str, content: bytes, words: str):
    with pytest.raises(ValueError, match=words):
        read_xray(write(tmp_path, **{keyword: content}))


def test_what_is_given_need_not_be_right_in_the_file(tmp_path: Path):
    wrong = dict(
        ImagerPixelSpacing=b"0,1\\0,1 ",
        DistanceSourceToDetector=b"far ",
        DistanceSourceToPatient=b"? ",
        PositionerPrimaryAngle=b"1,5 ",
        PositionerSecondaryAngle=b"- ",
        WindowCenter=b"a,b ",
    )
    path = write(tmp_path, **wrong)
    found = read_xray(path, sdd=900.0, sod=500.0, delx=0.3, primary_angle=1.5, secondary_angle=0.0)
    assert (found.camera.sdd, found.sod, found.camera.dely, found.primary_angle) == (900, 500, 0.3, 1.5)
    with pytest.raises(ValueError, match="primary_angle must be a number, not 'left'; give degrees"):
        read_xray(path, primary_angle="left")


@pytest.mark.parametrize(
    ("modality", "tags", "words"),
    [
        ("MG", {}, "the source of a mammography stands above the chest wall, not above the middle"),
        ("PX", {}, "the source of a panoramic X-ray moves"),
        (
            "XA",
            dict(PositionOfIsocenterProjection=[9.0, 9.0]),
            r"\(0018,9430\), but no .*\(0018,7030\) or .*\(0018,7022\)",
        ),
        (
            "XA",
            dict(PositionerIsocenterDetectorRotationAngle=15.0),
            r"RotationAngle \(0018,9465\) of the file '.*' is 15 deg",
        ),
    ],
)
def test_what_a_camera_cannot_know_is_told(tmp_path: Path, modality: str, tags: dict, words: str):
    with pytest.warns(UserWarning, match=words):
        read_xray(write(tmp_path, Modality=modality, PixelIntensityRelationshipSign=None, **tags))


def test_empty_angles_are_none(tmp_path: Path):
    found = read_xray(write(tmp_path, PositionerPrimaryAngle=b"", PositionerSecondaryAngle=b""))
    assert (found.primary_angle, found.secondary_angle) == (None, None)
    with pytest.warns(UserWarning, match="mammography"):  # where it is another angle
        assert read_xray(write(tmp_path, "MG", PositionerPrimaryAngle=45)).primary_angle is None


# Compressed pixels (PS3.5 A.4). The streams were made by GDCM 3.2, that with 12 bits by libjpeg-turbo 3.

STREAMS = {
    uid: base64.b64decode(text)
    for uid, text in json.loads((HERE / "fixtures/compressed_xrays.json").read_text()).items()
}
HTJ2K = "1.2.840.10008.1.2.4.201"


def waves() -> np.ndarray:
    "Compute the picture that was compressed, with 12 bits."
    row, column = np.indices((40, 48))
    return np.round(2048 + 1900 * np.sin(column / 9) * np.cos(row / 7)).astype(np.uint16)


def compressed(folder: Path, uid: str, stream: bytes, **tags) -> Path:
    values = waves() if uid != "1.2.840.10008.1.2.4.50" else (waves() >> 4).astype(np.uint8)
    bits = dict(BitsStored=12, HighBit=11) if values.itemsize == 2 else {}
    dataset = dataset_of(values=values, **bits, **tags)
    dataset.file_meta.TransferSyntaxUID = UID(uid)
    dataset.PixelData = encapsulate([stream])
    dataset["PixelData"].VR, dataset["PixelData"].is_undefined_length = "OB", True
    return save(folder, dataset)


@pytest.mark.parametrize(
    ("end", "off"),  # by how much a pixel may be off: nothing, what the encoder was told, or rounding of its cosines
    [(50, 2), (51, 3), (57, 0), (70, 0), (80, 0), (81, 3), (90, 0), (91, 3)],
)
def test_compressed_pixels(tmp_path: Path, end: int, off: int):
    uid = f"1.2.840.10008.1.2.4.{end}"
    right = waves() >> (4 if end == 50 else 0)
    found = stored(compressed(tmp_path, uid, STREAMS[uid], RescaleSlope=2, RescaleIntercept=-7))
    assert np.abs(found - (2.0 * right - 7)).max() <= 2 * off


@pytest.mark.parametrize("syntax", [RLELossless, DeflatedExplicitVRLittleEndian])
def test_pixels_that_pydicom_decompresses(tmp_path: Path, syntax: UID):
    dataset = dataset_of(values=waves())
    if syntax is RLELossless:
        dataset.compress(syntax)
    dataset.file_meta.TransferSyntaxUID = syntax
    np.testing.assert_array_equal(stored(save(tmp_path, dataset)), waves())


@pytest.mark.parametrize("name", ["MR_small_jpeg_ls_lossless", "MR_small_jp2klossless", "MR_small_RLE"])
def test_signed_pixels_are_those_of_the_twin(tmp_path: Path, name: str):
    "These files come with pydicom."
    pictures = []
    for file in (name, "MR_small"):
        dataset = pydicom.dcmread(pydicom.data.get_testdata_file(f"{file}.dcm", download=False))
        dataset.Modality, dataset.SOPClassUID = "XA", "1.2.840.10008.5.1.4.1.1.12.1"
        pictures.append(stored(save(tmp_path, dataset), **HOW))
    np.testing.assert_array_equal(*pictures)


def test_frames_are_decompressed_one_by_one(tmp_path: Path):
    uid = "1.2.840.10008.1.2.4.70"
    path = compressed(tmp_path, uid, STREAMS[uid], NumberOfFrames=2)
    dataset = pydicom.dcmread(path)
    dataset.PixelData = encapsulate([STREAMS[uid], STREAMS[uid]])
    dataset.save_as(path)
    np.testing.assert_array_equal(stored(path, frame=1), waves())


def test_a_missing_decoder_is_named(tmp_path: Path):
    if pydicom.pixels.get_decoder(HTJ2K).is_available:
        pytest.skip("pylibjpeg is installed")
    with pytest.raises(
        ModuleNotFoundError,
        match=r"is compressed as High-Throughput JPEG 2000 .*201\), which needs pylibjpeg: pip install pylibjpeg",
    ):
        read_xray(compressed(tmp_path, HTJ2K, STREAMS[HTJ2K]))


@pytest.mark.parametrize("end", [51, 70, 80, 90])
def test_streams_that_are_cut_short_are_refused(tmp_path: Path, end: int):
    uid = f"1.2.840.10008.1.2.4.{end}"
    path = compressed(tmp_path, uid, STREAMS[uid][: len(STREAMS[uid]) // 2])
    with pytest.raises(ValueError, match=r"holds pixels \(JPEG.* that cannot be decoded: the picture is cut short"):
        read_xray(path)


@pytest.mark.parametrize(("at", "value"), [(6, 27), (8, 41), (10, 40), (11, 3)])  # bits, rows, columns, channels
def test_streams_with_a_damaged_header_are_refused(tmp_path: Path, at: int, value: int):
    "GDCM crashed at 27 bits, and Python with it."
    uid = "1.2.840.10008.1.2.4.70"
    stream = bytearray(STREAMS[uid])
    stream[at] = value
    with pytest.raises(ValueError, match="its rows, columns, channels and bits are .*, but those of the file"):
        read_xray(compressed(tmp_path, uid, bytes(stream)))


# Bits (PS3.5 8.1.1)


@pytest.mark.parametrize("signed", [False, True])
def test_only_bits_that_are_stored_count(tmp_path: Path, signed: bool):
    values = VALUES.astype(np.int64) - 300 * signed
    overlay = (np.arange(48).reshape(6, 8) % 3 == 0) << 13
    container = ((values & 0x0FFF) | overlay).astype(np.uint16)
    bits = dict(BitsStored=12, HighBit=11, PixelRepresentation=int(signed))
    dataset = dataset_of(values=container, **bits)
    with pytest.warns(UserWarning, match=r"16 of 48 pixels have bits set beside the 12 that BitsStored \(0028,0101\)"):
        np.testing.assert_array_equal(stored(save(tmp_path, dataset)), values)
    dataset.add_new((0x6000, 0x0102), "US", 13)  # an overlay, which explains them
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        np.testing.assert_array_equal(stored(save(tmp_path, dataset)), values)
        extended = dataset_of(values=values.astype(np.int16 if signed else np.uint16), **bits)
        np.testing.assert_array_equal(stored(save(tmp_path, extended)), values)


def test_bits_at_the_upper_end(tmp_path: Path):
    path = write(tmp_path, values=VALUES << 4, BitsStored=12, HighBit=15)
    np.testing.assert_array_equal(stored(path), VALUES)
    with pytest.raises(
        ValueError, match=r"HighBit \(0028,0102\) of the file '.*' must hold a number from 11 to 15, as 12 of 16 bits"
    ):
        read_xray(write(tmp_path, BitsStored=12, HighBit=3))


# What values mean


def table(first: int, entries: list[int] | np.ndarray, bits: int = 16, count: int | None = None) -> pydicom.Dataset:
    "Make a look-up table as it stands in a file, whatever it says of itself."
    found = pydicom.Dataset()
    found.add_new("LUTDescriptor", "US", [count or len(entries), first % 65536, bits])
    found.add_new("LUTData", "OW", np.asarray(entries).tobytes())
    return found


FALLING = table(0, np.arange(1000, 0, -1, dtype=np.uint16))


@pytest.mark.parametrize(
    ("modality", "tags", "bright_bones"),
    [
        ("DX", dict(PhotometricInterpretation="MONOCHROME2"), True),
        ("DX", dict(PhotometricInterpretation="MONOCHROME1"), False),
        ("DX", dict(PhotometricInterpretation="MONOCHROME1", PresentationLUTShape="INVERSE"), False),  # said twice
        ("DX", dict(PresentationLUTShape="INVERSE"), False),
        ("DX", dict(VOILUTSequence=[FALLING]), False),
        ("DX", dict(PhotometricInterpretation="MONOCHROME1", VOILUTSequence=[FALLING]), True),
        ("DX", dict(VOILUTSequence=[table(0, [1], count=9)]), True),  # broken, but only for the eye
        ("DX", dict(PixelIntensityRelationshipSign=-1), True),
        ("DX", dict(PixelIntensityRelationshipSign=1, PhotometricInterpretation="MONOCHROME1"), False),
        ("DX", dict(PixelIntensityRelationshipSign=1, RescaleSlope=-1, RescaleIntercept=4095), True),
        ("DX", dict(PixelIntensityRelationshipSign=-1, RescaleSlope=-1, PresentationLUTShape="INVERSE"), False),
        ("DX", dict(PixelIntensityRelationshipSign=1, ModalityLUTSequence=[FALLING]), True),
        ("XA", dict(PhotometricInterpretation="MONOCHROME2"), False),
        ("XA", dict(PixelIntensityRelationshipSign=1, RescaleSlope=-1, RescaleIntercept=4095), True),
        ("XA", dict(PixelIntensityRelationshipSign=-1, ModalityLUTSequence=[FALLING]), False),
    ],
)
def test_the_sign_is_that_of_stored_values(tmp_path: Path, modality: str, tags: dict, bright_bones: bool):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_xray(write(tmp_path, modality, **tags)).bright_bones is bright_bones


def test_a_file_that_contradicts_itself_is_told(tmp_path: Path):
    with pytest.warns(
        UserWarning,
        match=r"by PixelIntensityRelationshipSign \(0028,1041\) of the file '.*' bones are dark, but as it is shown "
        r"\(PhotometricInterpretation \(0028,0004\)\) they are bright; .* bright_bones=True, or use "
        "diffdrr.xrays.invert",
    ):
        assert read_xray(write(tmp_path, "DX", PixelIntensityRelationshipSign=1)).bright_bones is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = read_xray(write(tmp_path, "DX", PixelIntensityRelationshipSign=1), bright_bones=True, logarithmic=False)
    assert (found.bright_bones, found.logarithmic) == (True, False)


@pytest.fixture(scope="module")
def chest() -> np.ndarray:
    "Take a chest X-ray: intensities with noise, and air at its rim."
    subject = load_example_ct(shape=(128, 128, 66), spacing=(2.8, 2.8, 5.0), orientation="PA")
    with torch.no_grad():
        attenuation = DRR(subject, sdd=1020.0, height=256, delx=0.5)(pose_from_view("PA", 800, "PA"))[0, 0].numpy()
    return np.random.default_rng(0).poisson(4000 * np.exp(-0.02 * attenuation)).astype(np.uint16)


def real_pictures() -> list[Path]:
    return sorted(REAL.glob("wrist/cam*.tif")) + sorted(REAL.glob("knee/cam*/*.png"))[::24]


def knee_or_wrist(name: str) -> np.ndarray:
    path = REAL / name
    if not path.is_file():
        pytest.skip("the data are not here")
    return np.asarray(Image.open(path)).astype(np.uint16)


@pytest.mark.parametrize("name", ["chest", "wrist/cam2_0099.tif", "knee/cam1/045.png"])
def test_a_picture_that_contradicts_its_file_is_told(request: pytest.FixtureRequest, tmp_path: Path, name: str):
    intensity = request.getfixturevalue("chest") if name == "chest" else knee_or_wrist(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read_xray(write(tmp_path, "XA", intensity), **HOW)
        read_xray(write(tmp_path, "DX", 65535 - intensity, PixelIntensityRelationshipSign=-1), **HOW)
        read_xray(write(tmp_path, "DX", intensity, PhotometricInterpretation="MONOCHROME1"), **HOW)
    for modality, values, tags in (
        ("XA", 65535 - intensity, {}),
        ("XA", intensity, dict(PixelIntensityRelationshipSign=-1)),
        ("DX", intensity, {}),
        ("DX", intensity, dict(PixelIntensityRelationshipSign=-1, RescaleSlope=-1, RescaleIntercept=0)),
    ):
        with pytest.warns(
            UserWarning, match="of the file '.*' bones are .*, but in the picture they seem to be .*invert"
        ):
            read_xray(write(tmp_path, modality, values, **tags), **HOW)


@pytest.mark.parametrize("path", real_pictures(), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_picture_is_silent_when_the_file_is_right(tmp_path: Path, path: Path):
    intensity = np.asarray(Image.open(path)).astype(np.uint16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for values, tags in ((intensity, {}), (255 - intensity, dict(PixelIntensityRelationshipSign=-1))):
            read_xray(write(tmp_path, "XA", values, **tags), **HOW)


@pytest.mark.parametrize("view", ["AP", "LATERAL", "LAO 30", "RAO 45 CRA 20", "RAO 30 CAU 20"])
def test_the_picture_is_silent_about_renderings(tmp_path: Path, view: str):
    subject = load_example_ct(shape=(96, 96, 66), spacing=(3.7, 3.7, 5.0), orientation="PA")
    for pixel in (0.6, 1.2, 2.0, 3.0):
        with torch.no_grad():
            attenuation = DRR(subject, sdd=1020.0, height=160, delx=1.6 * pixel)(pose_from_view(view, 800, "PA"))
        intensity = (60000 * torch.exp(-0.02 * attenuation))[0, 0].numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            read_xray(write(tmp_path, "XA", intensity.astype(np.uint16)), **HOW)
            read_xray(
                write(
                    tmp_path,
                    "XA",
                    (100 * attenuation)[0, 0].numpy().astype(np.uint16),
                    PixelIntensityRelationshipSign=-1,
                ),
                **HOW,
            )


RISING = np.arange(48, dtype=np.uint16) * 3 + 7  # for stored values 0 ... 47


@pytest.mark.parametrize(
    ("first", "described"),
    [
        (0, table(0, RISING)),
        (0, table(0, RISING, bits=8)),  # but 16 bits an entry
        (0, table(0, RISING, bits=12)),
        (0, table(0, RISING.astype(np.uint8), bits=16)),  # but bytes
        (0, table(0, RISING.astype(np.uint8), bits=8)),
        (-500, table(-500, RISING)),  # stored as 65036
        (40000, table(40000, RISING)),  # read by some as -25536
    ],
)
def test_tables_that_lie_about_themselves(tmp_path: Path, first: int, described: pydicom.Dataset):
    values = np.arange(48).reshape(6, 8) + first
    path = write(tmp_path, values=values.astype(np.int16 if first < 0 else np.uint16), ModalityLUTSequence=[described])
    np.testing.assert_array_equal(stored(path), (values - first) * 3 + 7)


@pytest.mark.parametrize(
    ("described", "words"),
    [
        (
            table(0, RISING, count=200),
            r"LUTDescriptor \(0028,3002\).* bytes of LUTData \(0028,3006\), 96, not '200\\0\\16'",
        ),
        (
            table(1000, RISING),
            r"LUTDescriptor \(0028,3002\).*entries for pixels from 100 to 570, not '48\\1000\\16'",
        ),
    ],
)
def test_tables_that_cannot_be_right_are_refused(tmp_path: Path, described: pydicom.Dataset, words: str):
    with pytest.raises(ValueError, match=words):
        read_xray(write(tmp_path, ModalityLUTSequence=[described]))


# Padding (PS3.3 C.7.5.1.1.2)


@pytest.mark.parametrize(
    ("kind", "padding", "tags"),
    [
        (np.uint16, 0, {}),
        (np.uint16, 65535, {}),
        (np.int16, -2000, {}),  # written as 63536
        (np.uint16, 3001, dict(PixelPaddingRangeLimit=3100)),
        (np.uint16, 3001, dict(PixelPaddingRangeLimit=2900)),
    ],
)
@pytest.mark.parametrize("sign", [-1, 1])
def test_padding_is_no_part_of_the_picture(tmp_path: Path, kind: type, padding: int, tags: dict, sign: int):
    row, column = np.indices((80, 100))
    patient = 500 + 1500 * np.exp(-((row - 40) ** 2 + (column - 50) ** 2) / 400)
    padded = (column < 20) | (row > 70)
    values = np.where(padded, padding, patient if sign < 0 else 2500 - patient).astype(kind)
    dataset = dataset_of("DX", values, PixelIntensityRelationshipSign=sign, PixelIntensityRelationship="LOG", **tags)
    if sign > 0:
        dataset.PhotometricInterpretation = "MONOCHROME1"
    dataset.add_new("PixelPaddingValue", "US", padding % 65536)
    found = read_xray(save(tmp_path, dataset))
    np.testing.assert_array_equal(found.mask[0, 0].numpy() == 0, padded)
    inside = found.image[found.mask > 0]
    assert (found.image.min(), found.image.max()) == (inside.min(), inside.max())
    integrals = to_line_integrals(found).image[0, 0].numpy()[~padded]
    np.testing.assert_allclose(integrals, (patient - patient[~padded].min())[~padded], atol=1.01)
    assert not (find_field(found).mask[0, 0].numpy() > 0)[padded].any()
    assert min(prepare(found).image.shape[2:]) >= 68  # of 71 rows and 80 columns; a rim is left out


def test_a_picture_that_is_all_padding_is_refused(tmp_path: Path):
    with pytest.raises(
        ValueError, match=r"PixelPaddingValue \(0028,0120\).*a value that leaves pixels of the picture, not '0'"
    ):
        read_xray(write(tmp_path, values=VALUES * 0, PixelPaddingValue=0))


# Pictures and arrays

GREY = (np.arange(48).reshape(6, 8) * 5).astype(np.uint8)
PICTURE = dict(sdd=1000.0, delx=0.5, bright_bones=True)


def picture(folder: Path, values: np.ndarray, name: str, mode: str | None = None, **options) -> Path:
    path = folder / name
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(path, **options)
    return path


@pytest.mark.parametrize(
    ("name", "values", "mode", "options"),
    [
        ("x.png", GREY, None, {}),
        ("x.png", VALUES * 100, None, {}),
        ("x.png", GREY, "RGB", {}),
        ("x.png", GREY, "RGBA", {}),
        ("x.png", GREY, "LA", {}),
        ("x.png", GREY, "P", {}),
        ("x.bmp", GREY, None, {}),
        ("x.tif", GREY, None, {}),
        ("x.tif", VALUES * 100, None, {}),
        ("x.tif", VALUES * 100, None, dict(compression="tiff_lzw")),
        ("x.tif", VALUES.astype(np.float32) / 7, None, {}),
        ("x.tif", VALUES.astype(np.int32) - 300, None, {}),
        ("x.tif", GREY, "RGB", dict(compression="tiff_deflate")),
    ],
)
def test_pictures_are_read_as_they_are(tmp_path: Path, name: str, values: np.ndarray, mode: str | None, options: dict):
    found = read_xray(picture(tmp_path, values, name, mode, dpi=(72, 72), **options), **PICTURE)
    np.testing.assert_array_equal(found.image[0, 0], values.astype(np.float32))
    assert (found.camera.delx, found.camera.dely, found.camera.sdd) == (0.5, 0.5, 1000)  # and not 25.4 / 72
    assert (found.mask == 1).all() and (found.bright_bones, found.logarithmic) == (True, True)


@pytest.mark.parametrize(
    "array", [VALUES, VALUES.astype(np.float64), torch.tensor(VALUES.astype(np.int32))[None, None], VALUES[..., None]]
)
def test_arrays_are_taken(tmp_path: Path, array: np.ndarray | torch.Tensor):
    found = read_xray(array, sdd=900.0, delx=0.2, dely=0.3, sod=600.0, primary_angle=10.0, bright_bones=False)
    np.testing.assert_array_equal(found.image[0, 0], VALUES)
    assert (found.camera.dely, found.sod, found.primary_angle, found.logarithmic) == (0.3, 600, 10, False)
    np.save(tmp_path / "x.npy", np.asarray(array))
    np.testing.assert_array_equal(stored(tmp_path / "x.npy", **PICTURE), VALUES)


def test_one_of_several_pictures(tmp_path: Path):
    stack = np.stack([VALUES, VALUES + 1, VALUES + 2])
    pages = [Image.fromarray(page) for page in stack]
    pages[0].save(tmp_path / "x.tif", save_all=True, append_images=pages[1:])
    np.save(tmp_path / "x.npy", stack)
    for source in (tmp_path / "x.tif", tmp_path / "x.npy", stack):
        np.testing.assert_array_equal(stored(source, frame=2, **PICTURE), VALUES + 2)
        with pytest.raises(ValueError, match="holds 3 frames; choose one"):
            read_xray(source, **PICTURE)


@pytest.mark.parametrize("values", [GREY, VALUES])
def test_a_tiff_whose_zero_is_white_is_inverted(tmp_path: Path, values: np.ndarray):
    "Pillow inverts 8 bits, and leaves 16 as they are."
    path = picture(tmp_path, values, "x.tif")
    data = bytearray(path.read_bytes())
    with Image.open(path) as image:
        assert image.tag_v2[262] == 1
    at = data.find(bytes([6, 1, 3, 0, 1, 0, 0, 0, 1, 0]))  # PhotometricInterpretation, SHORT, one value: BlackIsZero
    data[at + 8] = 0
    path.write_bytes(data)
    np.testing.assert_array_equal(stored(path, **PICTURE), np.iinfo(values.dtype).max - values.astype(int))


def test_transparent_pixels_are_no_part_of_the_picture(tmp_path: Path):
    seen = GREY > 50
    path = picture(tmp_path, np.dstack([GREY, GREY, GREY, 255 * seen.astype(np.uint8)]), "x.png")
    np.testing.assert_array_equal(read_xray(path, **PICTURE).mask[0, 0].numpy() > 0, seen)


def test_grey_that_jpeg_has_coloured_a_little(tmp_path: Path):
    path = picture(tmp_path, np.kron(GREY, np.ones((16, 16), np.uint8)), "x.jpg", "RGB", quality=95)
    assert np.abs(stored(path, **PICTURE) - np.kron(GREY, np.ones((16, 16)))).mean() < 2


@pytest.mark.parametrize(
    ("values", "how", "words"),
    [
        (
            GREY,
            dict(delx=0.5, bright_bones=True),
            "x.png' is a picture, which does not say how it was taken; give sdd=the",
        ),
        (GREY, dict(sdd=1000.0, bright_bones=True), "give delx=the width of a pixel on the detector in mm$"),
        (GREY, dict(sdd=1000.0, delx=0.5), "give bright_bones=True or False$"),
        (GREY, dict(sdd=-1, delx=0.5, bright_bones=True), "sdd must be a positive number, not -1"),
        (
            GREY,
            dict(sdd=1000.0, delx=0.5, bright_bones="yes"),
            "bright_bones must be one of True, False, None, not 'yes'",
        ),
        (GREY, {**PICTURE, "frame": 1}, "frame must be from 0 to 0, not 1"),
        (GREY > 50, PICTURE, "is black and white, without grey"),
        (np.dstack([GREY, GREY, GREY + 10]), PICTURE, "is coloured: red, green and blue differ by up to 10"),
    ],
)
def test_pictures_that_say_too_little_are_refused(tmp_path: Path, values: np.ndarray, how: dict, words: str):
    with pytest.raises(ValueError, match=words):
        read_xray(picture(tmp_path, values, "x.png"), **how)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.full((6, 8), np.nan), "the array must be finite, but 48 of 48 pixels are NaN"),
        (VALUES > 300, "the array must hold real numbers, not bool"),
        (VALUES * 1j, "the array must hold real numbers, not complex128"),
        (np.array(["a", "b"]), "the array must hold real numbers"),
        (np.zeros(48), r"the array must hold one picture of shape \(H, W\), not \(48,\)"),
        (np.zeros((2, 3, 6, 8)), r"the array must hold one picture of shape \(H, W\), not \(2, 3, 6, 8\)"),
    ],
)
def test_arrays_that_are_no_picture_are_refused(array: np.ndarray, words: str):
    with pytest.raises(ValueError, match=words):
        read_xray(array, **PICTURE)


def test_colours_with_16_bits_are_refused(tmp_path: Path):
    import cv2

    cv2.imwrite(str(tmp_path / "x.png"), np.dstack([VALUES] * 3))
    with pytest.raises(
        ValueError, match="has colours with 16 bits, of which 8 would be lost; save it as a grey picture"
    ):
        read_xray(tmp_path / "x.png", **PICTURE)


def test_pictures_that_are_cut_short_are_refused(tmp_path: Path):
    path = picture(tmp_path, np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8), "x.png")
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ValueError, match="x.png' cannot be read as a picture: .*; copy the file again"):
        read_xray(path, **PICTURE)


# Anything


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("damaged")


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_damaged_files_are_read_or_refused(folder: Path, data: st.DataObject):
    "Whatever bytes are changed, an error is one of ours, and lengths that come back are positive."
    uid = data.draw(st.sampled_from([None, "1.2.840.10008.1.2.4.70", "1.2.840.10008.1.2.4.90"]))
    path = write(folder, "DX") if uid is None else compressed(folder, uid, STREAMS[uid])
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[132 + int(data.draw(st.floats(0, 0.999)) * (len(content) - 132))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found = read_xray(path)
        except (ValueError, ModuleNotFoundError) as error:
            assert type(error) in (ValueError, ModuleNotFoundError) and len(str(error)) > 20
        else:
            assert found.camera.sdd > 0 and found.camera.delx > 0 and found.image.isfinite().all()
    path.unlink()
