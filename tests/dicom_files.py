"""Small CT series as scanners and other programs write them, regular and odd, whose geometry is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, EnhancedCTImageStorage, ExplicitVRLittleEndian, generate_uid

AXIAL = (1.0, 0, 0, 0, 1, 0)
SPACING = (0.8, 0.7)  # of rows and of columns, mm
SERIES = "1.2.826.0.1.3680043.1"


def straight(
    count: int,  # of slices
    step: float | Sequence[float] = 2.5,  # between slices, mm; along z, or a vector
    start: Sequence[float] = (-40.0, 15.0, -300.0),  # of the first, mm
) -> np.ndarray:  # (count, 3)
    "Place slices at equal distances."
    step = np.array([0, 0, step] if np.isscalar(step) else step, dtype=float)
    return np.asarray(start) + np.arange(count)[:, None] * step


def random_pixels(count: int, rows: int = 6, columns: int = 5) -> np.ndarray:  # (count, rows, columns)
    "Draw stored values of which no two slices agree: 0 to 3000, for -1024 to 1976 HU."
    return np.random.default_rng(0).integers(0, 3000, (count, rows, columns)).astype(np.uint16)


def slice_dataset(pixels: np.ndarray, position: Sequence[float], number: int = 1, **tags: Any) -> Dataset:
    """Describe a slice as the standard asks of a CT image (PS3.3 A.3).

    Tags given replace others by keyword, and remove them where they are None."""
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    series = tags.get("SeriesInstanceUID") or SERIES
    signed = pixels.dtype.kind == "i"
    bits = 8 * pixels.dtype.itemsize
    given = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": f"{series}.{number}",
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "Modality": "CT",
        "PatientName": "Test",
        "PatientID": "1",
        "StudyInstanceUID": "1.2.3",
        "SeriesInstanceUID": series,
        "FrameOfReferenceUID": "1.2.3.9",
        "SeriesDescription": "Chest",
        "InstanceNumber": number,
        "ImagePositionPatient": [float(f"{x:.6f}") for x in position],
        "ImageOrientationPatient": list(AXIAL),
        "PixelSpacing": list(SPACING),
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "Rows": pixels.shape[-2],
        "Columns": pixels.shape[-1],
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": int(signed),
        "RescaleSlope": 1,
        "RescaleIntercept": -1024,
        "PixelData": pixels.tobytes(),
    }
    for keyword, value in {**given, **tags}.items():
        if value is not None:
            setattr(dataset, keyword, value)
    return dataset


def save(dataset: Dataset, path: Path) -> Path:
    "Write a file, and return its path."
    path.parent.mkdir(parents=True, exist_ok=True)
    pydicom.dcmwrite(path, dataset, enforce_file_format=True)
    return path


def write_series(
    folder: Path,
    positions: np.ndarray,  # (count, 3), of the first voxel of each slice, mm, LPS
    pixels: np.ndarray | None = None,  # (count, rows, columns), stored values
    edit: Callable[[Dataset, int], None] | None = None,  # changes a slice before it is written
    prefix: str = "",  # of the files' names
    **tags: Any,  # of every slice
) -> np.ndarray:  # (count, rows, columns), stored values
    "Write a series, one file a slice."
    pixels = random_pixels(len(positions)) if pixels is None else pixels
    for k, position in enumerate(positions):
        instance = generate_uid(entropy_srcs=[str(tags.get("SeriesInstanceUID")), prefix, str(k)])
        dataset = slice_dataset(pixels[k], position, k + 1, **{"SOPInstanceUID": instance, **tags})
        if edit:
            edit(dataset, k)
        save(dataset, folder / f"{prefix}{k:04}.dcm")
    return pixels


def item(**tags: Any) -> Sequence[Dataset]:
    "Make a sequence of one item."
    dataset = Dataset()
    for keyword, value in tags.items():
        setattr(dataset, keyword, value)
    return [dataset]


def frame_groups(position: Sequence[float], number: int, slope: float = 1, intercept: float = -1024) -> Dataset:
    "Describe a frame of an enhanced CT (PS3.3 A.38): where it lies, and what its values mean."
    (groups,) = item(
        PlanePositionSequence=item(ImagePositionPatient=[float(x) for x in position]),
        FrameContentSequence=item(StackID="1", InStackPositionNumber=number),
        PixelValueTransformationSequence=item(RescaleSlope=slope, RescaleIntercept=intercept, RescaleType="HU"),
    )
    return groups


def enhanced_dataset(positions: np.ndarray, pixels: np.ndarray, **tags: Any) -> Dataset:
    "Put all slices into one object, whose geometry stands in functional groups."
    (shared,) = item(
        PlaneOrientationSequence=item(ImageOrientationPatient=list(AXIAL)),
        PixelMeasuresSequence=item(PixelSpacing=list(SPACING), SliceThickness=2.5),
        CTImageFrameTypeSequence=item(FrameType=["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]),
    )
    nowhere = dict.fromkeys(
        ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "RescaleSlope", "RescaleIntercept")
    )
    groups = {
        "SOPClassUID": EnhancedCTImageStorage,
        "ImageType": ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"],
        "NumberOfFrames": len(positions),
        "SharedFunctionalGroupsSequence": [shared],
        "PerFrameFunctionalGroupsSequence": [frame_groups(p, k + 1) for k, p in enumerate(positions)],
    }
    return slice_dataset(pixels, positions[0], **{**nowhere, **groups, **tags})
