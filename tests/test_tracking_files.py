"""Files of other programs for motion in X-rays: what is written is read again, conventions hold against a model of
the program, and spoilt files are refused by name."""

from __future__ import annotations

import gc
import string
import tempfile
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion
from scipy.spatial.transform import Rotation

from diffdrr.bodies import Scene
from diffdrr.geometry import Camera, Detector, RigidTransform, read_mayacam, write_mayacam
from diffdrr.tracking import (
    AutoscoperTrial,
    AutoscoperVolume,
    Moments,
    read_autoscoper,
    read_case,
    read_intcalib,
    read_jts,
    read_poses,
    read_stack,
    read_tra,
    write_autoscoper,
    write_jts,
    write_poses,
    write_tra,
)
from diffdrr.xrays import XRay, make_dataset

quick = settings(deadline=None, max_examples=40, suppress_health_check=list(HealthCheck))
EYE = RigidTransform(torch.eye(4))


def number(low: float, high: float):
    return st.floats(low, high, allow_nan=False, width=32)


@st.composite
def rotations(draw) -> np.ndarray:
    "Any rotation, those by half a turn and none included."
    angles = [draw(st.one_of(number(-180, 180), st.sampled_from([0, 90, -90, 180]))) for _ in range(3)]
    return Rotation.from_euler("ZYX", angles, degrees=True).as_matrix()


@st.composite
def matrices(draw, reach: float = 1000.0) -> np.ndarray:
    matrix = np.eye(4)
    matrix[:3, :3] = draw(rotations())
    matrix[:3, 3] = [draw(number(-reach, reach)) for _ in range(3)]
    return matrix


@st.composite
def tracks(draw) -> tuple[list[int], dict[str, RigidTransform]]:
    "Frames, and poses of some bodies, of which some are missing."
    frames = sorted(draw(st.sets(st.integers(0, 12), min_size=1, max_size=5)))
    names = draw(
        st.lists(st.text(string.ascii_letters + ' ,"é', min_size=1), min_size=1, max_size=3, unique_by=str.strip)
    )
    names = [name.strip() or "body" for name in names]
    poses = {}
    for name in names:
        rows = np.stack([draw(matrices()) for _ in frames])
        for i in range(len(frames)):
            if draw(st.booleans()) and len(frames) > 1 and i:
                rows[i] = np.nan
        poses[name] = RigidTransform(torch.from_numpy(rows).float())
    return frames, poses


def rigid(matrix: np.ndarray) -> RigidTransform:
    "A single pose."
    return RigidTransform(torch.from_numpy(matrix)[None].float())


def same(found: RigidTransform, expected: RigidTransform, places: list[int], tolerance: float = 1e-3) -> None:
    "Compare poses at some rows, and make sure that the other rows hold none."
    rest = [i for i in range(len(found)) if i not in places]
    assert found.matrix[rest].isnan().all()
    assert torch.allclose(found.matrix[places].double(), expected.matrix.double(), atol=tolerance, equal_nan=True)


@quick
@given(tracks())
def test_a_csv_is_read_again(track):
    frames, poses = track
    with tempfile.TemporaryDirectory() as folder:
        write_poses(Path(folder) / "a.csv", frames, poses)
        table = read_poses(Path(folder) / "a.csv")
    known = torch.stack([pose.matrix.isfinite().all(dim=(1, 2)) for pose in poses.values()]).any(dim=0)
    assert table.frames == torch.tensor(frames)[known].tolist() and list(table.poses) == list(poses)
    for name, pose in poses.items():
        same(table.poses[name], RigidTransform(pose.matrix[known]), list(range(len(table.frames))), 0)


@quick
@given(tracks(), st.sampled_from(["matrix", "xyzypr"]), st.sampled_from([",", " ", "\t", ", "]))
def test_a_track_of_autoscoper_is_read_again(track, layout, separator):
    frames, poses = track
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tra"
        write_tra(path, frames, poses, layout)
        path.write_text(path.read_text().replace(",", separator))
        table = read_tra(path, list(poses))
    assert table.frames == list(range(frames[-1] + 1))
    for name, pose in poses.items():
        same(table.poses[name], pose, frames)


@quick
@given(tracks())
def test_matrices_by_columns_are_noticed(track):
    frames, poses = track
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.tra"
        write_tra(path, frames, poses)
        rows = np.loadtxt(path, delimiter=",", ndmin=2).reshape(frames[-1] + 1, len(poses), 4, 4)
        np.savetxt(path, rows.swapaxes(2, 3).reshape(len(rows), -1))
        table = read_tra(path, list(poses))
    for name, pose in poses.items():
        if (torch.nan_to_num(pose.translation).abs().sum(dim=1) > 0).any():
            same(table.poses[name], pose, frames)


@quick
@given(tracks(), matrices())
def test_kinematics_of_jointtrack_are_read_again(track, camera):
    (frames, poses), pose = track, rigid(camera)
    name, body = next(iter(poses.items()))
    with tempfile.TemporaryDirectory() as folder:
        write_jts(Path(folder) / "a.jts", frames, body, pose)
        table = read_jts(Path(folder) / "a.jts", pose, name)
    assert table.frames == list(range(frames[-1] + 1))
    same(table.poses[name], body, frames, 2e-3)


@st.composite
def calibrations(draw) -> tuple[Camera, RigidTransform]:
    height, width = draw(st.integers(2, 3000)), draw(st.integers(2, 3000))
    K = np.array([[draw(number(900, 9000)), 0, draw(number(0, width))], [0, draw(number(900, 9000)), 0], [0, 0, 1]])
    K[1, 2] = draw(number(0, height))
    matrix = draw(matrices())
    matrix[:3, 3] += 1500
    return Camera.from_opencv(torch.from_numpy(K), height, width, draw(number(500, 3000))), rigid(matrix)


@quick
@given(calibrations())
def test_mayacam_is_read_again(calibration):
    camera, pose = calibration
    with tempfile.TemporaryDirectory() as folder:
        write_mayacam(Path(folder) / "cam.txt", camera, pose)
        again, place = read_mayacam(Path(folder) / "cam.txt", sdd=camera.sdd)
    assert (again.height, again.width) == (camera.height, camera.width)
    for name in ("delx", "dely", "x0", "y0"):
        assert getattr(again, name) == pytest.approx(getattr(camera, name), abs=1e-3)
    assert torch.allclose(place.matrix, pose.matrix, atol=5e-3)


def version_1_of(K: np.ndarray, extrinsic: np.ndarray, height: int, width: int) -> str:
    """Write MayaCam 1 as XMALab does: it turns x and z of the camera round, counts the principal point from the bottom
    and from 1, and takes angles about x, y and z of the inverse."""
    turned = np.diag([-1.0, 1.0, -1.0])
    R, t = turned @ extrinsic[:3, :3], turned @ extrinsic[:3, 3]
    inverse = R.T
    x, y, z = -inverse @ t
    roll = np.arctan2(-inverse[2, 1], inverse[2, 2])
    pitch = np.arctan2(inverse[2, 0], np.hypot(inverse[2, 1], inverse[2, 2]))
    yaw = np.arctan2(-inverse[1, 0], -inverse[0, 0])
    u, v = K[0, 2] + 1, (height - 1) - K[1, 2] + 1
    rows = [(x, y, z), np.degrees([roll, pitch, yaw]), (0, 0, 0), (u, v, -K[0, 0]), (0.1, width, height)]
    return "\n".join(",".join(f"{value:.12g}" for value in row) for row in rows) + "\n"


@quick
@given(calibrations())
def test_both_versions_of_mayacam_are_one_camera(calibration):
    camera, pose = calibration
    camera = camera.replace(dely=camera.delx)  # version 1 has one focal length
    K = camera.to_opencv().double().numpy()
    extrinsic = np.diag([-1.0, -1, 1, 1]) @ np.linalg.inv(pose.matrix[0].double().numpy())
    assume(np.hypot(*extrinsic[1:3, 2]) > 1e-3)  # where the angles can be told apart
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cam.csv"
        path.write_text(version_1_of(K, extrinsic, camera.height, camera.width))
        again, place = read_mayacam(path, sdd=camera.sdd)
    for name in ("delx", "dely", "x0", "y0"):
        assert getattr(again, name) == pytest.approx(getattr(camera, name), abs=1e-2)
    assert torch.allclose(place.matrix, pose.matrix, atol=5e-3)


class AutoscoperModel:
    """What Autoscoper computes for one voxel, step by step: the cropped texture in a unit box, the volume's scale and
    offset, the pose, a camera with y up that looks along -z, and the picture on its plane."""

    def __init__(self, stack: np.ndarray, spacing: np.ndarray):
        filled = np.argwhere(stack)[:, ::-1]  # columns, rows, slices
        self.low, self.size = filled.min(axis=0), np.ptp(filled, axis=0) + 1
        below = stack.shape[1] - (self.low[1] + self.size[1])  # rows that are cut off at the bottom
        self.scale = 1 / (spacing * self.size)
        self.offset = np.array([-self.low[0], -below, self.low[2]]) / self.size

    def place(self, voxel: np.ndarray) -> np.ndarray:
        "Find a voxel in the frame of the volume: its texture coordinates are x, 1 - y and -z of the box."
        x, y, z = (voxel - self.low + 0.5) / self.size
        return (np.array([x, 1 - y, -z]) - self.offset) / self.scale

    def picture(self, place: np.ndarray, pose: np.ndarray, K: np.ndarray, extrinsic: np.ndarray, size) -> np.ndarray:
        "Find where a place in the volume is drawn, in pixels from the corner of the picture."
        x, y, z = np.diag([1.0, -1, -1]) @ (extrinsic @ pose @ [*place, 1])[:3]
        u, v = -2 * x / z, -2 * y / z
        width, height = size
        row = (height - 1) - K[1, 2]
        s = (u + (2 * K[0, 2] - width) / K[0, 0]) / (2 * width / K[0, 0]) + 0.5
        t = 0.5 - (v + (2 * row - height) / K[1, 1]) / (2 * height / K[1, 1])
        return np.array([s * width, t * height])


@quick
@given(st.data())
def test_a_stack_is_where_autoscoper_draws_it(data):
    shape = [data.draw(st.integers(2, 9)) for _ in range(3)]  # slices, rows, columns
    stack, spacing = np.zeros(shape, np.uint16), np.array([data.draw(number(0.125, 2.0)) for _ in range(3)])
    ends = [sorted((data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, n - 1)))) for n in shape]
    stack[tuple(slice(a, b + 1) for a, b in ends)] = 1000
    voxel = np.array([data.draw(st.integers(a, b)) for a, b in ends])[::-1]
    flip = [data.draw(st.booleans()) for _ in range(3)]
    stored = np.flip(stack, [2 - axis for axis in range(3) if flip[axis]])
    camera, pose = data.draw(calibrations())
    body = data.draw(matrices(20.0))
    body[:3, 3] += (pose.matrix[0].double().numpy() @ [3, -4, 800, 1])[:3]
    with tempfile.TemporaryDirectory() as folder:
        first, *rest = [Image.fromarray(page) for page in stored]
        first.save(Path(folder) / "a.tif", save_all=True, append_images=rest)
        grid = read_stack(Path(folder) / "a.tif", spacing.tolist(), flip).grid
    model = AutoscoperModel(stack, spacing)
    place = model.place(voxel)
    local = grid.affine.numpy() @ [*(voxel - model.low), 1]
    assert np.allclose(local[:3], place, atol=1e-6)
    K = camera.to_opencv().double().numpy()
    extrinsic = np.diag([-1.0, -1, 1, 1]) @ np.linalg.inv(pose.matrix[0].double().numpy())
    drawn = model.picture(place, body, K, extrinsic, (camera.width, camera.height))
    room = torch.from_numpy((body @ local)[None, None, :3])
    double = RigidTransform(pose.matrix.double())
    seen = Detector.from_camera(camera, torch.eye(4)).double().project(double, room)[0, 0].numpy()
    assert np.allclose(drawn - seen, [-0.5, 0.5], atol=0.02)  # half a pixel, see the notebook of mayacam


@quick
@given(st.data())
def test_a_trial_is_read_again(data):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        n, m = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        names = [f"bone {i} é.tif" for i in range(m)]
        for name in [*names, *(f"cam {i}.txt" for i in range(n))]:
            (folder / name).touch()
        spacing = st.tuples(*[number(0.125, 2)] * 3)
        volumes = [
            AutoscoperVolume(folder / name, data.draw(spacing), data.draw(st.tuples(*[st.booleans()] * 3)))
            for name in names
        ]
        cameras = tuple(folder / f"cam {i}.txt" for i in range(n))
        trial = AutoscoperTrial(cameras, (folder,) * n, tuple(volumes), offsets=(0.5,) * 6, tracking="Tracks")
        write_autoscoper(folder / "a.cfg", trial)
        again = read_autoscoper(folder / "a.cfg")
    assert again.calibrations == cameras and again.offsets == trial.offsets and again.tracking == "Tracks"
    assert [volume.flip for volume in again.volumes] == [volume.flip for volume in volumes]
    for volume, other in zip(volumes, again.volumes, strict=True):
        assert other.name == volume.name and other.spacing == pytest.approx(volume.spacing)


def make_files(folder: Path) -> dict[str, object]:
    "Write one right file of each format, and say how it is read."
    camera, place = Camera(1000.0, 6, 8, 1.0), torch.eye(4)[None]
    place[0, 2, 3] = -700.0
    frames, pose = [0, 1, 2], RigidTransform(torch.eye(4).repeat(3, 1, 1))
    write_mayacam(folder / "cam.txt", camera, RigidTransform(place))
    (folder / "cam.csv").write_text("0,-1000,0\n90,0,0\n0,0,0\n4,3,-1000\n0.1,8,6\n")
    write_tra(folder / "a.tra", frames, {"bone": pose})
    write_jts(folder / "a.jts", frames, pose, EYE)
    write_poses(folder / "a.csv", frames, {"bone": pose})
    (folder / "calibration.txt").write_text("JT_INTCALIB\n1200\n4\n-2\n0.4\n")
    (folder / "cam").mkdir(exist_ok=True)
    pages = [Image.fromarray(np.full((6, 8), 100 + i, np.uint16)) for i in range(3)]
    pages[0].save(folder / "bone.tif", save_all=True, append_images=pages[1:])
    for i, page in enumerate(pages):
        page.save(folder / "cam" / f"{i}.tif")
    volume = AutoscoperVolume(folder / "bone.tif", (1.0, 1.0, 2.0))
    write_autoscoper(folder / "a.cfg", AutoscoperTrial((folder / "cam.txt",), (folder / "cam",), (volume,)))
    (folder / "a.toml").write_text(
        'frames = [0, 3, 1]\n[[cameras]]\ncalibration = "cam.txt"\npictures = "cam"\n'
        '[bodies.bone]\nvolume = "bone.tif"\nvoxel_size = [1, 1, 2]\npose = "a.tra"\n'
    )
    return {
        "cam.txt": read_mayacam,
        "cam.csv": read_mayacam,
        "a.tra": lambda path: read_tra(path, ["bone"]),
        "a.jts": lambda path: read_jts(path, EYE),
        "a.csv": read_poses,
        "calibration.txt": lambda path: read_intcalib(path, 6, 8),
        "a.cfg": read_autoscoper,
        "a.toml": read_case,
    }


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("files")
    return folder, make_files(folder)


def test_right_files_are_read(files):
    folder, readers = files
    for name, reader in readers.items():
        reader(folder / name)


WORDS = ["", "nan", "inf", "-1", "0", "1e9", "x", ",", "NOT_OPTIMIZED", "rotation", "é", "\x00", "1 2", "'", "[", "="]


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.data())
@pytest.mark.filterwarnings("ignore")
def test_spoilt_files_are_read_or_refused_by_name(files, data):
    folder, readers = files
    name = data.draw(st.sampled_from(sorted(readers)))
    lines = (folder / name).read_text().splitlines()
    for _ in range(data.draw(st.integers(1, 2))):
        i = data.draw(st.integers(0, len(lines) - 1))
        kind = data.draw(st.sampled_from(["drop", "twice", "word", "cut", "end"]))
        if kind == "word":
            words = lines[i].split(",")
            words[data.draw(st.integers(0, len(words) - 1))] = data.draw(st.sampled_from(WORDS))
            lines[i] = ",".join(words)
        elif kind == "cut":
            lines[i] = lines[i][: data.draw(st.integers(0, len(lines[i])))]
        else:
            lines = lines[:i] + [lines[i]] * (2 * (kind == "twice")) + lines[i + 1 :] * (kind != "end")
        lines = lines or [""]
    wrong = folder / f"wrong.{name.split('.')[1]}"
    wrong.write_text("\n".join(lines) + "\n")
    try:
        readers[name](wrong)
    except (ValueError, FileNotFoundError) as error:
        assert wrong.name in str(error), str(error)


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n\x00\x01", b"\xff\xfe1\x002\x00", b"\n\n\n", b"{}", b"1"])
@pytest.mark.filterwarnings("ignore")
def test_files_of_another_kind_are_refused_by_name(files, content):
    folder, readers = files
    for name, reader in readers.items():
        wrong = folder / f"wrong.{name.split('.')[1]}"
        wrong.write_bytes(content)
        with pytest.raises(ValueError, match=f"wrong.{name.split('.')[1]}"):
            reader(wrong)
        with pytest.raises(FileNotFoundError, match="none"):
            reader(folder / f"none.{name.split('.')[1]}")


@pytest.mark.filterwarnings("ignore")
def test_a_file_of_one_program_is_not_read_as_another(files):
    folder, readers = files
    alike = {("cam.txt", "cam.csv"), ("cam.csv", "cam.txt"), ("a.cfg", "a.toml")}  # one reader
    for name in readers:
        for other, reader in readers.items():
            if other == name or (name, other) in alike:
                continue
            with pytest.raises(ValueError, match=name):
                reader(folder / name)


def test_moments_are_forgotten(tmp_path):
    "Reading a thousand moments keeps none of them."
    for k in (1, 2):
        (tmp_path / f"cam{k}").mkdir()
        for i in range(20):
            Image.fromarray(np.full((6, 8), i, np.uint8)).save(tmp_path / f"cam{k}" / f"{i}.png")
    camera = Camera(1000.0, 6, 8, 1.0)
    moments = Moments([tmp_path / "cam1", tmp_path / "cam2"], [(camera, EYE)] * 2)
    kept = []
    for moment in moments:
        kept += [weakref.ref(xray.image) for xray in moment]
    del moment
    gc.collect()
    assert len(kept) == 40 and not any(image() is not None for image in kept)
    assert [int(moment[0].image.max()) for moment in moments[15:2:-6]] == [15, 9, 3]


def test_moments_of_a_dicom_film(tmp_path):
    "Frames of a DICOM file, with the camera of the calibration and not that of the file."
    values = torch.arange(4.0)[:, None, None] + torch.arange(48.0).reshape(6, 8)
    camera = Camera(1000.0, 6, 8, 0.5)
    xray = XRay(values[:1, None] * 10, torch.ones(1, 1, 6, 8), camera.replace(sdd=900.0), sod=500.0)
    dataset = make_dataset(xray, "film")
    pixels = np.stack([np.full((6, 8), 100 * (i + 1), np.uint16) for i in range(4)])
    dataset.NumberOfFrames, dataset.PixelData = 4, pixels.tobytes()
    dataset.save_as(tmp_path / "film.dcm", enforce_file_format=True)
    moments = Moments([tmp_path / "film.dcm"], [(camera, EYE)], bright_bones=False)
    assert len(moments) == 4
    slope = float(dataset.get("RescaleSlope", 1))
    found = [float(moment[0].image.mean()) for moment in moments]
    assert np.allclose(np.diff(found), 100 * slope) and moments[2][0].camera is camera and moments[2][0].sod is None


REAL = Path(__file__).parents[2] / "shared" / "data" / "knee"


@pytest.mark.skipif(not REAL.is_dir(), reason="the real knee is not here")
@pytest.mark.filterwarnings("ignore:the mesh was repaired")
def test_a_real_implant_lies_on_its_shadow(tmp_path):
    "The picture is darker inside the outline than around it, and nowhere as much as where the pose says."
    names = "".join(
        f'[[cameras]]\ncalibration = "{REAL / f"cam{k}.txt"}"\npictures = "{REAL / f"cam{k}"}"\n' for k in (1, 2)
    )
    text = f'[bodies.femur]\nmesh = "{REAL / "femur.stl"}"\nrepair = true\npose = "{REAL / "femur_poses.csv"}"\n'
    (tmp_path / "knee.toml").write_text("frames = [30, 31, 1]\n" + names + text)
    case = read_case(tmp_path / "knee.toml")
    for xray in case.moments[case.start]:
        scene = Scene(case.bodies, xray.camera.resize(512, 512), orientation=None)
        with torch.no_grad():
            inside = scene(xray.pose, case.init)[0, 0].numpy() > 0
        picture = xray.resize(512).image[0, 0].numpy()
        around = binary_dilation(inside, iterations=3) & ~inside
        within = inside & ~binary_erosion(inside, iterations=3)

        def contrast(shift: tuple[int, int]) -> float:
            moved = np.roll(picture, shift, axis=(0, 1))
            return moved[around].mean() - moved[within].mean()

        shifts = [(down, right) for down in (-2, 0, 2) for right in (-2, 0, 2)]
        assert max(shifts, key=contrast) == (0, 0)
