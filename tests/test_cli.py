"""The command line as a process, and what it hands to the library."""

from __future__ import annotations

import subprocess
import sys
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import diffdrr.volumes
from diffdrr import cli
from diffdrr.rendering import DRR
from diffdrr.volumes import load_example_ct
from diffdrr.xrays import read_xray

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


@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_a_picture_is_an_xray_if_it_is_said_how_it_was_taken(tmp_path: Path, suffix: str):
    if "bright_bones" not in signature(read_xray).parameters:
        pytest.skip("read_xray takes DICOM files only")
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
