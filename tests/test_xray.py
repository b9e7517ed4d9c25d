"""X-rays in DICOM files: what tags mean, what is missing, and what comes back."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pydicom
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydicom.uid import ComputedRadiographyImageStorage, generate_uid
from scipy.ndimage import gaussian_filter

from diffdrr.geometry import Camera, convert, pose_from_positioner_angles
from diffdrr.rendering import DRR
from diffdrr.volumes import load_example_ct, read
from diffdrr.xrays import (
    XRay,
    find_field,
    make_dataset,
    prepare,
    quantize,
    read_xray,
    to_line_integrals,
    write_xray,
    xray_of_rendering,
)

VALUES = torch.arange(48.0).reshape(1, 1, 6, 8) * 10 + 100


@pytest.fixture
def xray() -> XRay:
    return XRay(
        VALUES,
        torch.ones_like(VALUES),
        Camera(1000.0, 6, 8, 0.5, 0.25),
        sod=700.0,
        primary_angle=10.0,
        secondary_angle=-5.0,
    )


def of(image: torch.Tensor, **meaning) -> XRay:
    "Make an X-ray with pixels of 1 mm."
    return XRay(image, torch.ones_like(image), Camera(1000.0, *image.shape[-2:], 1.0), **meaning)


def save(dataset: pydicom.Dataset, folder: Path) -> Path:
    path = folder / f"{generate_uid()}.dcm"
    dataset.save_as(path, enforce_file_format=True)
    return path


def changed(xray: XRay, folder: Path, remove: tuple[str, ...] = (), **tags) -> Path:
    "Write an X-ray with other tags."
    dataset = make_dataset(xray, "test")
    for name in remove:
        del dataset[name]
    for name, value in tags.items():
        setattr(dataset, name, value)
    return save(dataset, folder)


def frames(xray: XRay, folder: Path, values: np.ndarray, **tags) -> Path:
    "Write 16-bit frames, as they are."
    return changed(
        xray,
        folder,
        remove=("RescaleSlope", "RescaleIntercept", "RescaleType"),
        NumberOfFrames=len(values),
        PixelData=values.astype(np.uint16).tobytes(),
        **tags,
    )


def test_round_trip(xray: XRay, tmp_path: Path):
    write_xray(tmp_path / "x.dcm", xray)
    back = read_xray(tmp_path / "x.dcm")
    step = (VALUES.max() - VALUES.min()).item() / 65535
    torch.testing.assert_close(back.image, xray.image, rtol=1e-6, atol=0.51 * step)
    assert vars(back.camera) == vars(xray.camera)
    same = ("sod", "primary_angle", "secondary_angle", "bright_bones", "logarithmic")
    assert {name: getattr(back, name) for name in same} == {name: getattr(xray, name) for name in same}
    assert [path.name for path in tmp_path.iterdir()] == ["x.dcm"]


@settings(deadline=None, max_examples=300)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=20))
@example([795940.5, -172033.28125, -846185.9375])  # 0.502 steps off when float32 did the arithmetic
def test_quantization_is_within_half_a_step(values: list[float]):
    image = np.array([values], dtype=np.float32)
    stored, slope, intercept = quantize(image)
    assert np.abs(stored * slope + intercept - image).max() <= 0.5001 * slope


def test_files_are_as_the_standard_wants_them(xray: XRay, tmp_path: Path):
    write_xray(tmp_path / "x.dcm", xray, name="Test^Patient")
    dataset = pydicom.dcmread(tmp_path / "x.dcm")  # without force: it has the preamble and the meta information
    assert dataset.SOPClassUID == "1.2.840.10008.5.1.4.1.1.12.1"
    # PS3.3 A.14 with modules C.7.1.1, C.7.2.1, C.7.3.1, C.7.6.3, C.8.7.1, C.8.7.2, C.8.7.5, C.12.1: types 1 (with a
    # value) and 2 (may be empty)
    with_value = (
        "SOPInstanceUID StudyInstanceUID SeriesInstanceUID Modality ImageType PixelIntensityRelationship "
        "RadiationSetting Rows Columns BitsAllocated BitsStored HighBit PixelRepresentation SamplesPerPixel "
        "PhotometricInterpretation PixelData"
    )
    perhaps_empty = (
        "PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber "
        "ReferringPhysicianName SeriesNumber InstanceNumber Manufacturer KVP PositionerPrimaryAngle "
        "PositionerSecondaryAngle"
    )
    assert all(dataset.get(name) not in (None, "") for name in with_value.split())
    assert all(name in dataset for name in perhaps_empty.split())
    assert (dataset.PatientName, dataset.HighBit, len(dataset.PixelData)) == (
        "Test^Patient",
        dataset.BitsStored - 1,
        2 * 6 * 8,
    )


def test_frames_of_a_rotation(xray: XRay, tmp_path: Path):
    values = np.stack([VALUES[0, 0].numpy() + 1000 * i for i in range(3)])
    path = frames(
        xray,
        tmp_path,
        values,
        PositionerPrimaryAngleIncrement=[0, 1.5, 3],
        PositionerSecondaryAngleIncrement=[0, 0, -2],
    )
    with pytest.raises(ValueError, match="holds 3 frames; choose one"):
        read_xray(path)
    with pytest.raises(ValueError, match="frame must be from 0 to 2, not 3"):
        read_xray(path, frame=3)
    last = read_xray(path, frame=2)
    assert (last.primary_angle, last.secondary_angle) == (13.0, -7.0)
    np.testing.assert_array_equal(last.image[0, 0], values[2])


def test_one_increment_is_that_from_frame_to_frame(xray: XRay, tmp_path: Path):
    values = np.stack([VALUES[0, 0].numpy()] * 3)
    path = frames(xray, tmp_path, values, PositionerPrimaryAngleIncrement=1.5, PositionerSecondaryAngleIncrement=[-2])
    assert [(one.primary_angle, one.secondary_angle) for one in (read_xray(path, frame=i) for i in range(3))] == [
        (10, -5),
        (11.5, -7),
        (13, -9),
    ]
    only = changed(xray, tmp_path, PositionerPrimaryAngleIncrement=1.5)  # the first frame has the angle of the file
    assert read_xray(only).primary_angle == 10
    with pytest.raises(
        ValueError,
        match=(
            r"PositionerPrimaryAngleIncrement \(0018,1520\) of the file '.*' must hold one number, or 3, one for each "
            r"frame, not '0.0\\1.5'; correct it, or remove it"
        ),
    ):
        read_xray(frames(xray, tmp_path, values, PositionerPrimaryAngleIncrement=[0, 1.5]), frame=1)


def test_values_are_rescaled(xray: XRay, tmp_path: Path):
    path = changed(
        xray, tmp_path, RescaleSlope=2, RescaleIntercept=-50, PixelData=VALUES.numpy().astype(np.uint16).tobytes()
    )
    torch.testing.assert_close(read_xray(path).image, 2 * VALUES - 50, rtol=0, atol=0)


def test_windows_are_for_the_eye(xray: XRay, tmp_path: Path):
    plain, windowed = (
        read_xray(changed(xray, tmp_path, **tags)).image for tags in ({}, dict(WindowCenter=200, WindowWidth=10))
    )
    torch.testing.assert_close(windowed, plain, rtol=0, atol=0)


def test_tables_lead_from_logarithms_to_intensities(xray: XRay, tmp_path: Path):
    table = pydicom.Dataset()
    entries = np.round(40000 * np.exp(-np.arange(600) / 100)).astype(np.uint16)
    table.LUTDescriptor, table.ModalityLUTType, table.LUTData = [600, 0, 16], "US", entries.tobytes()
    table["LUTData"].VR = "OW"
    stored = VALUES.numpy().astype(np.uint16)
    found = read_xray(
        changed(
            xray,
            tmp_path,
            remove=("RescaleSlope", "RescaleIntercept", "RescaleType"),
            PixelData=stored.tobytes(),
            PixelIntensityRelationshipSign=-1,
            PixelIntensityRelationship="LOG",
            ModalityLUTSequence=[table],
        )
    )
    assert (found.bright_bones, found.logarithmic) == (False, False)
    integrals = to_line_integrals(found).image
    torch.testing.assert_close(integrals, (VALUES - VALUES.min()) / 100, rtol=0, atol=5e-3)  # entries are rounded


@pytest.mark.parametrize(
    ("tags", "bright_bones", "logarithmic"),
    [
        (dict(Modality="XA", PixelIntensityRelationship="LIN"), False, False),
        (dict(Modality="RF", PixelIntensityRelationship="LOG"), False, True),
        (dict(Modality="XA", PhotometricInterpretation="MONOCHROME1"), True, False),
        (dict(Modality="DX", PixelIntensityRelationship="LOG"), True, True),
        (dict(Modality="DX", PhotometricInterpretation="MONOCHROME1", PixelIntensityRelationship="LOG"), False, True),
        (
            dict(
                Modality="DX",
                PhotometricInterpretation="MONOCHROME1",
                PixelIntensityRelationship="LIN",
                PixelIntensityRelationshipSign=1,
            ),
            False,
            False,
        ),
        (dict(Modality="XA", PixelIntensityRelationship="DISP", PixelIntensityRelationshipSign=-1), True, True),
    ],
)
def test_meaning_of_values(xray: XRay, tmp_path: Path, tags: dict, bright_bones: bool, logarithmic: bool):
    found = read_xray(
        changed(
            xray,
            tmp_path,
            remove=() if "PixelIntensityRelationshipSign" in tags else ("PixelIntensityRelationshipSign",),
            **tags,
        )
    )
    assert (found.bright_bones, found.logarithmic) == (bright_bones, logarithmic)


@pytest.mark.parametrize(("tag", "argument"), [("DistanceSourceToDetector", "sdd"), ("ImagerPixelSpacing", "delx")])
def test_missing_geometry_is_asked_for(xray: XRay, tmp_path: Path, tag: str, argument: str):
    path = changed(xray, tmp_path, remove=(tag,), PixelSpacing=[0.3, 0.3])
    with pytest.raises(ValueError, match=f"give it as the argument {argument}, in mm"):
        read_xray(path)
    found = read_xray(path, **{argument: 0.7})
    assert getattr(found.camera, argument) == 0.7
    if argument == "delx":
        assert found.camera.dely == 0.7


def test_one_pixel_spacing_is_not_two(xray: XRay, tmp_path: Path):
    path = changed(xray, tmp_path, ImagerPixelSpacing=[0.3])
    with pytest.raises(
        ValueError, match=r"ImagerPixelSpacing \(0018,1164\) of the file .*; give it as the argument delx, in mm"
    ):
        read_xray(path)
    found = read_xray(path, delx=0.3)
    assert (found.camera.delx, found.camera.dely) == (0.3, 0.3)


def test_what_cannot_be_written_is_refused(xray: XRay, tmp_path: Path):
    image = VALUES.clone()
    image[..., 0, :2] = torch.tensor([torch.nan, torch.inf])
    with pytest.raises(
        ValueError, match="xray.image must be finite, but 2 of 48 pixels are NaN or infinite; replace them"
    ):
        write_xray(tmp_path / "x.dcm", replace(xray, image=image))
    with pytest.raises(FileNotFoundError, match="missing/x.dcm' is in a folder that does not exist; make it first"):
        write_xray(tmp_path / "missing" / "x.dcm", xray)
    assert not list(tmp_path.iterdir())


def test_wrong_arguments_are_refused(xray: XRay, tmp_path: Path):
    path = changed(xray, tmp_path)
    with pytest.raises(ValueError, match="sdd must be a positive number, not -3"):
        read_xray(path, sdd=-3)


def test_a_radiograph_without_a_c_arm(xray: XRay, tmp_path: Path):
    missing = (
        "DistanceSourceToPatient",
        "PositionerPrimaryAngle",
        "PositionerSecondaryAngle",
        "PixelIntensityRelationship",
        "PixelIntensityRelationshipSign",
    )
    found = read_xray(
        changed(xray, tmp_path, remove=missing, Modality="CR", SOPClassUID=ComputedRadiographyImageStorage)
    )
    assert (found.sod, found.primary_angle, found.secondary_angle) == (None, None, None)
    with pytest.raises(ValueError, match="has no primary_angle, secondary_angle, sod"):
        found.initial_pose("PA")


def test_other_files_are_refused(xray: XRay, tmp_path: Path):
    (tmp_path / "text.dcm").write_text("not a picture")
    with pytest.raises(ValueError, match="is not in DICOM format"):
        read_xray(tmp_path / "text.dcm")
    with pytest.raises(ValueError, match="holds no picture"):
        read_xray(changed(xray, tmp_path, remove=("PixelData",)))
    with pytest.raises(ValueError, match="holds a coloured picture"):
        read_xray(
            changed(xray, tmp_path, SamplesPerPixel=3, PhotometricInterpretation="RGB", PixelData=bytes(2 * 6 * 8 * 3))
        )


def test_saturation_is_reported():
    image = VALUES.clone()
    image[..., :4] = image.max()
    xray = of(image)
    with pytest.warns(UserWarning, match="52% of the field have the same value, 570: the X-ray is saturated"):
        to_line_integrals(xray)
    with pytest.raises(ValueError, match="must have different values in its field"):
        to_line_integrals(replace(xray, image=torch.ones_like(image)))
    for constant in (torch.zeros_like(image), torch.ones_like(image)):
        with pytest.raises(ValueError, match="its picture is constant: all values are [01];"):
            find_field(replace(xray, image=constant))
    speck = torch.zeros_like(image)
    speck[..., 3, 3] = 1
    with pytest.raises(ValueError, match="must have an exposed field"):
        find_field(replace(xray, image=speck))


def test_line_integrals_follow_beer_and_lambert():
    integrals = torch.linspace(0, 6, 48).reshape(1, 1, 6, 8)
    intensity = of(5e4 * torch.exp(-integrals))
    torch.testing.assert_close(to_line_integrals(intensity).image, integrals, rtol=0, atol=1e-5)
    for logarithmic in (
        replace(intensity, image=7 - integrals, logarithmic=True),
        replace(intensity, image=7 + integrals, logarithmic=True, bright_bones=True),
    ):
        torch.testing.assert_close(to_line_integrals(logarithmic).image, integrals, rtol=0, atol=1e-5)


@settings(deadline=None, max_examples=30)
@given(st.floats(-6, 6))
@example(0.0)  # transmission, which a clamp at one count made all zero
@example(1.0)  # up to 10, of which it lost the dark half
def test_the_unit_of_intensities_does_not_matter(exponent: float):
    integrals = torch.linspace(0, 6, 48).reshape(1, 1, 6, 8)
    intensity = of(10**exponent * torch.exp(-integrals))
    torch.testing.assert_close(to_line_integrals(intensity).image, integrals, rtol=0, atol=1e-5)


def test_where_nothing_arrived_line_integrals_are_finite():
    counts = torch.tensor([[[[0.0, 1.0, 100.0, 4000.0]]]])
    xray = of(counts)
    torch.testing.assert_close(
        to_line_integrals(xray).image, torch.log(4000 / counts.clamp(min=1))
    )  # no count is like one
    faint = to_line_integrals(replace(xray, image=torch.tensor([[[[-3.0, 1e-30, 0.5, 1.0]]]]))).image
    assert faint.max().item() == pytest.approx(np.log(1e4), abs=1e-4)
    with pytest.raises(ValueError, match="must have positive intensities in its field, not -1 at most"):
        to_line_integrals(replace(xray, image=-1 - counts))


@pytest.fixture(scope="module")
def boxes():
    "Three boxes in air, which look different from every side."
    hu = torch.full((40, 40, 40), -1000.0)
    hu[5:15, 8:30, 10:20], hu[20:34, 12:20, 22:36], hu[18:24, 25:35, 4:12] = 200.0, 600.0, 400.0
    return read(hu, affine=np.diag([4.0, 4.0, 4.0, 1.0]), orientation="PA")


@settings(deadline=None, max_examples=15)
@given(st.tuples(*[st.integers(0, 9)] * 4), st.booleans(), st.floats(-20, 20), st.floats(-20, 20))
def test_crops_are_rendered_alike(boxes, cut: tuple[int, int, int, int], reverse: bool, x0: float, y0: float):
    drr = DRR(boxes, sdd=900.0, height=30, width=24, delx=8.0, dely=7.0, x0=x0, y0=y0, reverse_x_axis=reverse)
    pose = pose_from_positioner_angles(20, -10, 600, "PA")
    with torch.no_grad():
        xray = xray_of_rendering(drr(pose), drr.detector, pose).crop(*cut)
        again = DRR(boxes, **vars(xray.camera))(pose)
    torch.testing.assert_close(again, xray.image, rtol=0, atol=2e-2)  # of some 200 mm; float32 positions
    assert xray.sod == pytest.approx(600, abs=1e-2)


def test_poses_that_angles_cannot_say_are_reported(boxes):
    drr = DRR(boxes, sdd=900.0, height=30, delx=8.0)
    image = torch.zeros(1, 1, 30, 30)
    rolled = convert(
        torch.tensor([[0.2, -0.1, 0.6]]),
        torch.tensor([[40.0, -850.0, 0.0]]),
        parameterization="euler_angles",
        convention="ZXY",
    )
    with pytest.warns(
        UserWarning,
        match=r"turned by 34.\d degrees, and its source 40.\d mm away; its pose is right, but a file does not hold it",
    ):
        xray_of_rendering(image, drr.detector, rolled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for angles in ((0, 0), (-150, 35), (90, 10)):
            xray_of_rendering(image, drr.detector, pose_from_positioner_angles(*angles, 600, "PA"))
    straight = xray_of_rendering(image, drr.detector, pose_from_positioner_angles(0, 0, 600, "PA"))
    assert (str(straight.primary_angle), str(straight.secondary_angle)) == ("0.0", "0.0")  # without a minus


@settings(deadline=None, max_examples=15)
@given(st.integers(8, 40))
def test_points_stay_where_they_are_when_resized(boxes, pixels: int):
    drr = DRR(boxes, sdd=900.0, height=40, width=31, delx=4.0, dely=5.0)
    pose = pose_from_positioner_angles(0, 0, 600, "PA")
    with torch.no_grad():
        small = xray_of_rendering(drr(pose), drr.detector, pose).resize(pixels)
    points = torch.tensor([[[30.0, -20.0, 15.0], [0.0, 0.0, 0.0]]])
    scale = torch.tensor([small.image.shape[-1] / 31, small.image.shape[-2] / 40])
    seen = DRR(boxes, **vars(small.camera)).perspective_projection(pose, points)
    torch.testing.assert_close(seen, drr.perspective_projection(pose, points) * scale, rtol=0, atol=1e-3)


def test_round_fields_are_found():
    row, column = np.indices((200, 160))
    inside = (row - 90) ** 2 + (column - 85) ** 2 < 60**2
    patient = np.exp(-4 * ((row - 90) ** 2 < 20**2)) * inside  # a dense band across the field
    image = torch.from_numpy(np.random.default_rng(0).poisson(2000 * patient + 10).astype(np.float32))[None, None]
    found = find_field(of(image)).mask[0, 0].numpy() > 0
    assert not (found & ~inside).any()
    assert found.sum() > 0.85 * inside.sum()  # a rim of two pixels is left out


@pytest.mark.parametrize("bright_bones", [False, True])
def test_hidden_pixels_of_a_field_may_be_anything(bright_bones: bool):
    "Rows that are not finite are looked at if they count only."
    row, column = np.indices((200, 160))
    inside = (row - 90) ** 2 + (column - 85) ** 2 < 60**2
    counts = np.random.default_rng(0).poisson(2000 * inside).astype(np.float32)
    xray = of(torch.from_numpy(-np.log(counts + 1) if bright_bones else counts)[None, None])
    xray = replace(xray, bright_bones=bright_bones, logarithmic=bright_bones)
    hidden = replace(xray, image=xray.image.clone(), mask=xray.mask.clone())
    hidden.image[..., :5, :], hidden.image[..., 5:9, :], hidden.mask[..., :9, :] = torch.nan, torch.inf, 0
    assert torch.equal(find_field(hidden).mask, find_field(xray).mask)
    with pytest.raises(ValueError, match="xray has 1440 pixels that are NaN or infinite; hide them in its mask"):
        find_field(replace(hidden, mask=torch.ones_like(hidden.mask)))


def stored(counts: np.ndarray) -> dict[str, XRay]:
    "Store a picture as detectors and consoles do."
    image = torch.from_numpy(counts.clip(min=1).astype(np.float32))[None, None]
    bits = ((image / image.max()) ** 0.4 * 255).round()
    return {
        "counts": of(image),
        "logarithms": of(-image.log(), bright_bones=True, logarithmic=True),
        "gamma": of(bits, logarithmic=True),
    }


def trunk() -> np.ndarray:  # transmission
    "Make a picture of two lungs beside a straight spine, between the arms."
    row, column = np.indices((200, 160))
    spine = 2.0 * (abs(column - 80) < 14)
    lungs = 1.5 * np.exp(-(((abs(column - 80) - 36) / 24.0) ** 2) - ((row - 90) / 70.0) ** 2)
    return np.exp(-3.5 - spine + lungs)


def detected(transmission: np.ndarray) -> np.ndarray:  # counts
    "Add as much scatter as primary radiation, and noise."
    scatter = gaussian_filter(transmission, 40, mode="constant")
    return np.random.default_rng(0).poisson(20000 * (transmission + scatter))


@pytest.mark.parametrize("sides", [(60, 140, 40, 125), (0, 140, 40, 160), (0, 200, 30, 120)], ids=str)
def test_shutters_are_found_where_scatter_shines_behind_them(sides: tuple[int, int, int, int]):
    top, bottom, left, right = sides
    inside = np.zeros((200, 160), dtype=bool)
    inside[top:bottom, left:right] = True
    counts = detected(trunk() * inside)
    assert counts[~inside].max() > counts[inside].min()  # no threshold separates them
    for kind, xray in stored(counts).items():
        found = find_field(xray).mask[0, 0].numpy() > 0
        assert not (found & ~inside).any(), kind
        assert found.sum() > 0.85 * inside.sum(), kind  # a rim of two pixels is left out


def test_shutters_are_found_in_large_pictures():
    inside = np.zeros((200, 160), dtype=bool)
    inside[60:140, 40:125] = True
    large = np.ones((3, 3))
    counts, inside = np.kron(detected(trunk() * inside), large), np.kron(inside, large) > 0
    found = find_field(stored(counts)["counts"]).mask[0, 0].numpy() > 0
    assert not (found & ~inside).any() and found.sum() > 0.85 * inside.sum()


def test_other_straight_edges_are_no_shutters():
    table, plate, rail = trunk(), trunk(), trunk()
    table[:, 110:] *= 0.5
    plate[50:120, 60:130] *= 0.02
    rail[:, 50:] *= 0.5
    rail[:, 120:124] *= 0.3
    for transmission in (trunk(), table, plate, rail):
        for kind, xray in stored(detected(transmission)).items():
            assert (find_field(xray).mask == 1).all(), kind


def test_black_bars_are_no_field():
    inside = np.zeros((200, 160), dtype=bool)
    inside[25:170] = True
    for kind, xray in stored(detected(trunk()) * inside).items():
        found = find_field(xray).mask[0, 0].numpy() > 0
        assert not (found & ~inside).any(), kind
        assert found.sum() > 0.95 * inside.sum(), kind


def test_prepared_xrays_keep_their_edges(xray: XRay):
    open_field = prepare(replace(xray, image=VALUES + 400))
    assert open_field.image.shape == VALUES.shape and (open_field.mask == 1).all()
    assert vars(open_field.camera) == vars(xray.camera)


@pytest.mark.parametrize("orientation", ["AP", "PA"])
def test_the_initial_pose_has_the_orientation_of_the_subject(orientation: str):
    """Whatever the subject was read with, its X-ray leads back to the pose, and a wrong orientation does not pass for
    the right one."""
    subject = load_example_ct(orientation=orientation, shape=(16, 16, 16), spacing=(20.0, 20, 20))
    drr = DRR(subject, sdd=900.0, height=12, delx=20.0)
    pose = pose_from_positioner_angles(20, -10, 600, orientation)
    with torch.no_grad():
        xray = xray_of_rendering(drr(pose), drr.detector, pose)
    for given_as in (subject, orientation):
        torch.testing.assert_close(xray.initial_pose(given_as).matrix, pose.matrix, rtol=0, atol=1e-3)
    torch.testing.assert_close(xray.pose.matrix, pose.matrix)
    other = {"AP": "PA", "PA": "AP"}[orientation]
    assert not torch.allclose(xray.initial_pose(other).matrix, pose.matrix, atol=1e-1)
    with pytest.raises(TypeError, match="subject"):
        xray.initial_pose()


def test_a_picture_that_does_not_fit_its_camera_is_refused(xray: XRay):
    with pytest.raises(ValueError, match=r"image must have shape \(1, 1, H, W\) with H = 6, W = 8, not \(1, 1, 6, 7\)"):
        replace(xray, image=VALUES[..., 1:])
    with pytest.raises(ValueError, match="landmarks must have shape"):
        replace(xray, landmarks=torch.zeros(3, 2))


def test_what_is_hidden_stays_hidden(xray: XRay):
    hidden = replace(xray, mask=(VALUES > 105).to(VALUES))
    assert hidden.bin(2).mask.flatten().tolist() == [0.0] + 11 * [1.0]
    assert hidden.bin(3).image.shape == hidden.bin(3).mask.shape == (1, 1, 2, 2)  # the last two columns are cut off
