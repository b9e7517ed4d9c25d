"""The command line as a process, and what it hands to the library."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffdrr.volumes
from diffdrr import cli
from diffdrr.rendering import DRR
from diffdrr.volumes import load_example_ct

SMALL = dict(shape=(32, 32, 17), spacing=(11.2, 11.2, 20.0))
CAMERA = ["--height", "16", "--delx", "25"]


@pytest.fixture(scope="module")
def ct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "The example with few voxels, as a file."
    path = tmp_path_factory.mktemp("ct") / "ct.nii.gz"
    load_example_ct(**SMALL).volume.save(path)
    return path


def run(*arguments: object) -> subprocess.CompletedProcess:
    "Run the command line in a process of its own."
    command = [sys.executable, "-m", "diffdrr.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_what_goes_well_is_silent(ct: Path, tmp_path: Path):
    done = run("render", ct, "-o", tmp_path / "drr.npy", *CAMERA)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.startswith("16 x 16 pixels")


def test_what_goes_wrong_is_one_line_and_a_status(ct: Path, tmp_path: Path):
    done = run("render", ct, "-o", tmp_path / "drr.png", *CAMERA, "--sdd", "500")
    assert done.returncode == 1 and done.stdout == "" and list(tmp_path.iterdir()) == []
    assert done.stderr.startswith("diffdrr render: the picture would be black") and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "options, reason",
    [
        (["--sdd", "500"], "the detector is in front of the volume"),
        (["--xyz", "0,-850,0"], "the volume is behind the source"),
        (["--xyz", "850,0,0"], "the volume is beside the field of view"),
        (["--xyz", "0,1e9,0"], "the detector is in front of the volume"),
        (["--rot", "nan,0,0"], "--rot must be 3 numbers separated by commas"),
        (["--view", "AP", "--sod", "nan"], "--sod must be a positive number"),
    ],
    ids=["sdd", "behind", "axis", "far", "NaN", "NaN sod"],
)
def test_a_black_picture_is_not_written(ct: Path, tmp_path: Path, options: list[str], reason: str):
    with pytest.raises(SystemExit, match=reason):
        cli.main(["render", str(ct), "-o", str(tmp_path / "drr.png"), *CAMERA, *options])
    assert list(tmp_path.iterdir()) == []


def test_metres_are_doubted(ct: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    metres = ["--sdd", "1.02", "--sod", "0.85", "--delx", "0.002"]
    cli.main(["render", str(ct), "-o", str(tmp_path / "drr.png"), *metres])
    assert capsys.readouterr().err.startswith("diffdrr render: warning: the source is inside the volume")


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, ct: Path, tmp_path: Path):
    monkeypatch.setenv("DIFFDRR_CACHE", str(ct / "below a file"))
    with pytest.raises(SystemExit, match="set the environment variable DIFFDRR_CACHE to a folder that can be written"):
        cli.main(["render", "-o", str(tmp_path / "drr.png")])


def test_doctor_says_why_a_backend_fails_and_goes_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    forward = DRR.forward

    def without_compiler(drr: DRR, pose: object):
        if drr.renderer.backend == "numba":
            raise OSError("no compiler")
        return forward(drr, pose)

    monkeypatch.setattr(DRR, "forward", without_compiler)
    monkeypatch.setattr(diffdrr.volumes, "load_example_ct", lambda: load_example_ct(**SMALL))
    cli.main(["doctor"])
    said = dict(line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines() if line[:4] == "cpu ")
    assert said["torch"].startswith("first picture ") and said["triton"].startswith("backend 'triton' cannot serve")
    assert said["numba"] == "failed with OSError: no compiler"


@pytest.mark.parametrize("command", ["render", "register", "view"])
def test_a_series_is_chosen(monkeypatch: pytest.MonkeyPatch, ct: Path, tmp_path: Path, command: str):
    def read(volume: str, *args: object, **options: object):
        raise ValueError(f"series={options['series']}, phase={options['phase']}, {options['slice_spacing']}")

    monkeypatch.setattr(diffdrr.volumes, "read", read)
    monkeypatch.setattr("diffdrr.studies.case.read", read)
    chosen = ["--series", "1.2", "--phase", "30", "--slice-spacing", "1.5"]
    example = load_example_ct(orientation="PA", **SMALL)
    arguments = [command, str(ct), *(["-o", str(tmp_path / "drr.png")] if command == "render" else ["--port", "0"])]
    if command == "register":
        arguments = ["register", str(ct), str(write_frontal(example, tmp_path)), "-o", str(tmp_path / "result")]
    with pytest.raises(SystemExit, match="--series 1.2, --phase 30, 1.5"):
        cli.main([*arguments, *chosen])


def write_frontal(subject: object, folder: Path) -> Path:
    "Render a DICOM file with the angles of the C-arm."
    from diffdrr.geometry import pose_from_view
    from diffdrr.xrays import write_xray, xray_of_rendering

    drr, pose = DRR(subject, 1020.0, 32, 12.0), pose_from_view("PA", 850.0, "PA")
    write_xray(folder / "xray.dcm", xray_of_rendering(drr(pose).detach(), drr.detector, pose))
    return folder / "xray.dcm"


@pytest.mark.parametrize("suffix", [".png", pytest.param(".npy", marks=pytest.mark.slow)])
def test_a_picture_is_an_xray_if_it_is_said_how_it_was_taken(tmp_path: Path, suffix: str):
    load_example_ct(shape=(128, 128, 66), spacing=(2.8, 2.8, 5.0), orientation="PA").volume.save(tmp_path / "ct.nii.gz")
    ct, xray = str(tmp_path / "ct.nii.gz"), tmp_path / f"xray{suffix}"
    render = ["render", ct, "--orientation", "PA", "--view=8,3", "--sod", "750", "--height", "128", "--delx", "2.5"]
    cli.main([*render, "-o", str(tmp_path / "xray.npy")])
    if suffix == ".png":
        picture = np.load(tmp_path / "xray.npy")
        Image.fromarray((picture / picture.max() * 255).astype(np.uint8)).save(xray)
    register = ["register", ct, str(xray), "-o", str(tmp_path / "result"), "--init", "PA"]
    said = ["--sdd", "1020", "--sod", "750", "--delx", "2.5", "--bright-bones", "true"]
    with pytest.raises(SystemExit, match="bright_bones|--bright-bones"):
        cli.main([*register, *said[:-2]])
    cli.main([*register, *said])
    assert (tmp_path / "result" / "overlay.png").exists()


@pytest.fixture(scope="module")
def in_air(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A CT of air, with a corner of water, off the origin of its file; and the mesh of a ball."
    import trimesh
    from torchio import ScalarImage

    from diffdrr.bodies import ball

    folder, hu = tmp_path_factory.mktemp("air"), np.full((1, 20, 20, 20), -1000.0, dtype=np.float32)
    hu[:, :3, :3, :3] = 0
    affine = np.diag([5.0, 5, 5, 1])
    affine[:3, 3] = 100, -200, 300
    ScalarImage(tensor=hu, affine=affine).save(folder / "air.nii.gz")
    mesh = ball(10.0)
    trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy(), process=False).export(folder / "ball.stl")
    return folder


def rendered(folder: Path, path: Path, *arguments: str) -> np.ndarray:
    "Render the CT of air."
    cli.main(["render", str(folder / "air.nii.gz"), "-o", str(path), "--height", "51", "--delx", "2", *arguments])
    return np.load(path)


def test_a_body_lies_where_the_file_of_the_ct_says(in_air: Path, tmp_path: Path):
    "The middle of the CT is at (147.5, -152.5, 347.5) in its file, and in the middle of the picture."
    from diffdrr.geometry import RigidTransform, write_transform
    from diffdrr.physics import attenuation

    ball = ["--body", str(in_air / "ball.stl")]
    found = rendered(in_air, tmp_path / "a.npy", *ball, "--at=147.5,-152.5,347.5,30,40,50")
    assert found[25, 25] == pytest.approx(20 * attenuation("titanium", 70.0).item(), rel=3e-3)  # its facets lie inside
    assert found[25, 25] == found.max()
    moved = rendered(in_air, tmp_path / "b.npy", *ball, "--at=137.5,-152.5,347.5", "--attenuation", "0.1")
    row, column = np.unravel_index(moved.argmax(), moved.shape)
    assert row == 25 and 25 - column == pytest.approx(
        -10 * 1020 / 800 / 2, abs=0.51
    )  # the patient's left is on the right
    place = RigidTransform(torch.eye(4))
    place.matrix[0, :3, 3] = torch.tensor([137.5, -152.5, 347.5])
    write_transform(tmp_path / "place.tfm", place)
    again = rendered(in_air, tmp_path / "c.npy", *ball, f"--at={tmp_path / 'place.tfm'}", "--attenuation", "0.1")
    np.testing.assert_allclose(again, moved, atol=1e-4)
    both = rendered(in_air, tmp_path / "d.npy", *ball * 2, "--at=137.5,-152.5,347.5", "--at=167.5,-152.5,347.5")
    assert (
        both[25, column] == pytest.approx(both.max(), rel=0.02) and (both[25] > 0).sum() > 1.9 * (moved[25] > 0).sum()
    )


def test_an_open_mesh_is_repaired_if_asked(in_air: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    import trimesh

    whole = trimesh.load_mesh(in_air / "ball.stl")
    whole.update_faces(np.arange(len(whole.faces)) != 70)
    whole.export(tmp_path / "open.stl")
    given = ["--body", str(tmp_path / "open.stl"), "--at=147.5,-152.5,347.5"]
    with pytest.raises(SystemExit, match=r"--body '.*open.stl' cannot be rendered: .* 3 of .* so does --repair"):
        rendered(in_air, tmp_path / "a.npy", *given)
    rendered(in_air, tmp_path / "a.npy", *given, "--repair")
    assert "warning: the mesh was repaired: closed holes of 3 edges" in capsys.readouterr().err


def test_metal_does_not_darken_the_patient(ct: Path, in_air: Path, tmp_path: Path):
    "In a picture to look at, that is: other formats hold what there is."
    ball = ["--body", str(in_air / "ball.stl"), "--material", "lead"]
    for name, given in (("without.png", ["--energy", "70"]), ("with.png", ball), ("with.npy", ball)):
        cli.main(["render", str(ct), "-o", str(tmp_path / name), "--height", "64", "--delx", "6", *given])
    without, with_ball = (
        np.asarray(Image.open(tmp_path / f"{name}.png").convert("L"), int) for name in ("without", "with")
    )
    differ = without != with_ball
    assert 0 < differ.mean() < 0.01 and (with_ball[differ] == 255).any()
    assert np.load(tmp_path / "with.npy").max() > 30
