"""`diffdrr track` and `diffdrr place`, from a case to the files that they write; the tracking itself is a stand-in."""

from __future__ import annotations

import csv
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import diffdrr.show
import diffdrr.tracking
from diffdrr import cli
from diffdrr.bodies import MeshBody, Scene, ball, screw
from diffdrr.compare import Response
from diffdrr.geometry import Camera, RigidTransform, make_matrix, pose_from_view, read_transform, write_mayacam
from diffdrr.tracking import Band, Track, read_case, read_jts, read_poses, read_tra, write_poses

CAMERA = Camera(1000.0, 60, 80, 2.5)
F = 5


def path_of(name: str) -> RigidTransform:  # (F)
    "Say where a body is from frame to frame."
    steps = torch.arange(F)[:, None] * torch.tensor([[4.0, -2.0, 1.0]])
    return RigidTransform(make_matrix(torch.eye(3).expand(F, 3, 3), steps if name == "pin" else 30 - steps))


@pytest.fixture
def case(tmp_path: Path) -> Path:
    "Write bodies, two cameras and what they see, and the poses of the second frame."
    import trimesh

    meshes = {"pin": screw(60.0, 6.0, 1.5, 4.0), "bead": ball(9.0)}
    for name, mesh in meshes.items():
        trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False).export(tmp_path / f"{name}.stl")
    bodies, lines = {name: MeshBody(mesh) for name, mesh in meshes.items()}, ["bright_bones = true"]
    for i, view in enumerate(("AP", "left lateral")):
        pose = pose_from_view(view, 800.0, None)
        write_mayacam(tmp_path / f"cam{i}.txt", CAMERA, pose)
        (tmp_path / f"cam{i}").mkdir()
        for frame in range(F):
            places = {name: RigidTransform(path_of(name).matrix[[frame]]) for name in bodies}
            image = Scene(bodies, CAMERA, None)(pose, places)[0, 0].numpy()
            np.save(tmp_path / f"cam{i}" / f"{frame}.npy", image)
        lines += ["[[cameras]]", f'calibration = "cam{i}.txt"', f'pictures = "cam{i}"']
    for name in bodies:
        lines += [f"[bodies.{name}]", f'mesh = "{name}.stl"', 'pose = "first.csv"']
    write_poses(tmp_path / "first.csv", [0], {name: RigidTransform(path_of(name).matrix[:1]) for name in bodies})
    (tmp_path / "case.toml").write_text("\n".join(lines))
    return tmp_path / "case.toml"


class Tracker:
    "Stands in for `tracking.track`: knows the truth, and doubts some frames."

    def __init__(self, first: int = 0, doubted: dict[str, list[int]] | None = None):
        self.first, self.doubted, self.options = first, doubted or {}, {}

    def __call__(self, bodies, moments, init, spread, smoothing, path, known, responses) -> Track:
        self.options = dict(spread=spread, smoothing=smoothing, path=path)
        assert list(init) == list(bodies) == ["pin", "bead"]
        assert all(len(xrays) == 2 and all(xray.image.any() for xray in xrays) for xrays in moments)
        n, places = len(moments), {name: path_of(name).matrix[self.first :].double() for name in bodies}
        for name, pose in init.items():
            torch.testing.assert_close(pose.matrix[0].double(), places[name][0])
        return Track(
            frames=torch.arange(n),
            poses={name: RigidTransform(matrix) for name, matrix in places.items()},
            centres={name: body.corners.double().mean(dim=0) for name, body in bodies.items()},
            covariance={name: torch.eye(6).double().repeat(n, 1, 1) / 100 for name in bodies},
            similarity={name: torch.ones(n).double() for name in bodies},
            reasons={
                name: ["it is hidden" if i in self.doubted.get(name, []) else None for i in range(n)] for name in bodies
            },
        )


@pytest.fixture
def tracker(monkeypatch: pytest.MonkeyPatch):
    def put(**how) -> Tracker:
        tracker = Tracker(**how)
        monkeypatch.setattr(diffdrr.tracking, "track", tracker, raising=False)
        return tracker

    return put


def test_everything_is_written(case: Path, tracker, capsys: pytest.CaptureFixture):
    tracker()
    folder = case.parent / "result"
    cli.main(["track", str(case), "-o", str(folder), "--export", "tra,jts,tfm", "--film", "gif"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["body", "frames", "trusted"] and lines[1].split()[:3] == ["pin", "5", "5"]
    assert lines[-1] == str(folder)
    truth = path_of("bead").matrix
    assert torch.allclose(Track.load(folder / "track.json").poses["bead"].matrix.float(), truth)
    rows = list(csv.DictReader((folder / "track.csv").open()))
    assert len(rows) == 2 * F and rows[3]["body"] == "bead" and float(rows[3]["x"]) == pytest.approx(26.0)
    torch.testing.assert_close(read_tra(folder / "bead.tra", ["bead"]).poses["bead"].matrix, truth)
    view = pose_from_view("AP", 800.0, None)
    torch.testing.assert_close(read_jts(folder / "bead.jts", view, "b").poses["b"].matrix, truth, atol=1e-3, rtol=0)
    torch.testing.assert_close(read_transform(folder / "bead" / "000003.tfm").matrix[0], truth[3])
    with Image.open(folder / "film.gif") as film:
        assert film.n_frames == F


def test_doubted_frames_are_listed_and_the_status_is_1(case: Path, tracker, capsys: pytest.CaptureFixture):
    tracker(doubted={"bead": [1, 2, 4]})
    with pytest.raises(SystemExit, match="3 of 10 poses in '.*' should not be trusted"):
        cli.main(["track", str(case), "-o", str(case.parent / "result"), "--export", "tfm"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:3] == ["bead", "5", "2"]
    assert lines[3:5] == ["bead, frame 1 to 2: it is hidden", "bead, frame 4: it is hidden"]
    assert sorted(path.name for path in (case.parent / "result" / "bead").iterdir()) == ["000000.tfm", "000003.tfm"]


@pytest.mark.slow
def test_a_finished_track_is_written_in_other_formats(case: Path, capsys: pytest.CaptureFixture):
    "By the tracker itself, which has nothing to do the second time. A millimetre is half a pixel."
    folder = case.parent / "result"
    cli.main(["track", str(case), "-o", str(folder), "--raw"])
    first, told = Track.load(folder / "track.json"), capsys.readouterr()
    for name in ("pin", "bead"):
        off = (first.centre(name) - path_of(name).matrix.double()[:, :3, 3]).norm(dim=1)
        assert off.max() < 1.0 and all(reason is None for reason in first.reasons[name])
    (folder / "track.json").unlink()
    cli.main(["track", str(case), "-o", str(folder), "--raw", "--export", "tra", "--film", "webp"])
    assert capsys.readouterr().out == told.out and (folder / "film.webp").exists() and (folder / "pin.tra").exists()
    again = Track.load(folder / "track.json")
    assert all(torch.equal(again.poses[name].matrix, pose.matrix) for name, pose in first.poses.items())


def test_poses_from_a_file(case: Path, tracker, tmp_path: Path, capsys: pytest.CaptureFixture):
    write_poses(
        tmp_path / "third.csv", [2], {name: RigidTransform(path_of(name).matrix[[2]]) for name in ("pin", "bead")}
    )
    found, given = tracker(first=2), ["--init", str(tmp_path / "third.csv"), "--spread", "8,25", "--raw"]
    cli.main(["track", str(case), "-o", str(tmp_path / "result"), *given])
    assert found.options == dict(spread=[8, 25], smoothing=False, path=tmp_path / "result" / "so_far.json")
    assert Track.load(tmp_path / "result" / "track.json").frames.tolist() == [2, 3, 4]
    assert "warning: frames before 2, where the initial poses belong, are left out" in capsys.readouterr().err


def test_mistakes(case: Path, tracker, tmp_path: Path):
    tracker()
    one = tmp_path / "one.csv"
    write_poses(one, [0], {"pin": RigidTransform(torch.eye(4)[None])})
    late = tmp_path / "late.csv"
    write_poses(late, [99], {name: RigidTransform(torch.eye(4)[None]) for name in ("pin", "bead")})
    behind = tmp_path / "behind.csv"
    write_poses(behind, [0], {name: pose_from_view("PA", 2000.0, None) for name in ("pin", "bead")})
    (tmp_path / "other").mkdir()
    for arguments, message in (
        (["nowhere.toml"], "CASE 'nowhere.toml' does not exist"),
        ([str(case), "--export", "csv"], "--export must be some of 'tra', 'jts', 'tfm', not 'csv'"),
        ([str(case), "--film", "avi"], "--film must be one of 'none', 'gif', 'webp', 'mp4', not 'avi'"),
        ([str(case), "-o", str(tmp_path / "x"), "--spread", "5"], "--spread must be 2 numbers separated by commas"),
        ([str(case), "--init", "no.csv"], "--init 'no.csv' does not exist"),
        (
            [str(case), "--init", str(one)],
            "CASE has no pose of bead to begin with; place bodies by hand, as by diffdrr p",
        ),
        ([str(case), "--init", str(late)], "has no frame of the case at which pin, bead have a pose each"),
        ([str(case), "--init", str(behind)], "behind.csv': pin "),
        ([str(case), "-o", str(tmp_path / "other")], "exists, and is not this track; choose another name"),
        ([str(case), "-o", str(tmp_path / "no" / "result")], "in a folder that does not exist"),
    ):
        with pytest.raises(SystemExit) as error:
            cli.main(["track", *(["-o", str(tmp_path / "result")] if "-o" not in arguments else []), *arguments])
        assert message in error.value.code, error.value.code
    assert not (tmp_path / "result").exists()


def test_what_was_placed_is_where_a_track_begins(case: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made = []
    monkeypatch.setattr(diffdrr.show, "serve_placer", lambda make, port, show: made.append((make(), port, show)))
    cli.main(["place", str(case), "-o", str(tmp_path / "placed.csv"), "--frame", "3", "--port", "0", "--no-browser"])
    ((placer, port, show),) = made
    assert (port, show) == (0, False) and list(placer.poses) == ["pin", "bead"]
    placer.handles.shift[2].value = 7.0  # away from the source of the first view, which is in front
    placer.actions["Save"]()
    assert str(tmp_path / "placed.csv") in placer.message.object
    table = read_poses(tmp_path / "placed.csv")
    assert table.frames == [3]
    moved = table.poses["pin"].matrix[0, :3, 3] - path_of("pin").matrix[0, :3, 3]
    assert moved.norm() == pytest.approx(7.0, abs=1e-3) and moved[1].abs() == pytest.approx(7.0, abs=1e-3)
    with pytest.raises(SystemExit, match="--frame must be one of 0, 1, 2, 3, 4, not 9"):
        cli.main(["place", str(case), "--frame", "9"])


def test_refine_registers_and_tells_its_doubts(case: Path, monkeypatch: pytest.MonkeyPatch):
    "From 5 mm off, by the registration itself; and what it says of a body that cannot be trusted."
    from diffdrr.cli.place import refine

    read = read_case(case)
    start = {name: RigidTransform(pose.matrix.clone()) for name, pose in read.init.items()}
    start["bead"].matrix[0, :3, 3] += 5 / 3**0.5
    found = refine(read.bodies, read.moments[0], start)
    assert (found["bead"].matrix[0, :3, 3] - path_of("bead").matrix[0, :3, 3]).norm() < 1.0  # half a pixel
    doubted = SimpleNamespace(poses=found, reasons={"pin": "it is hidden", "bead": None})
    monkeypatch.setattr(diffdrr.tracking, "register_bodies", lambda *given, **told: doubted)
    with pytest.warns(UserWarning, match="pin should not be trusted: it is hidden"):
        refine(read.bodies, read.moments[0], start)


@pytest.mark.slow
def test_a_case_with_a_joint_is_tracked_as_in_python(case: Path):
    "A band that pulls, and a detector that clips: the command finds the poses of the call, and not those without."
    words = """
[[bands]]
first = "pin"
second = "bead"
points = [[0, 0, 0], [0, 0, 0]]
limits = [0, 10]
mm = 0.1
"""
    clipped = 'pictures = "cam1"\nresponse = {window = [0.0, 0.5]}'
    text = "frames = [0, 1, 1]\n" + case.read_text().replace('pictures = "cam1"', clipped) + words
    case.write_text(text)
    folder = case.parent / "result"
    cli.main(["track", str(case), "-o", str(folder), "--spread", "1,1"])
    read, band = read_case(case), Band("pin", "bead", torch.zeros(2, 3), (0, 10), mm=0.1)
    responses = [Response(), Response(window=(0.0, 0.5))]
    given = read.bodies, read.moments, read.init, (1.0, 1.0)
    told, bare = (
        diffdrr.tracking.track(*given, verbose=False, **how) for how in ({"known": [band], "responses": responses}, {})
    )
    found = Track.load(folder / "track.json")
    for name in read.bodies:
        torch.testing.assert_close(found.poses[name].matrix, told.poses[name].matrix)
    free, tied = ((x.poses["pin"].translation - x.poses["bead"].translation).norm() for x in (bare, found))
    assert tied < free - 1, (free, tied)
