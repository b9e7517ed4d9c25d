"""Data sets of synthetic X-rays: the same bytes whoever made them, and whatever died meanwhile.

Those marked slow start workers, and kill them."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import children, end, start, wait_for

pytest.importorskip("pyarrow", reason="pyarrow comes with the extra [data]")

from diffdrr import synthesis
from diffdrr.bodies import screw
from diffdrr.geometry import pose_from_view, write_landmarks
from diffdrr.synthesis import (
    Augmentation,
    Cameras,
    CTs,
    Insert,
    Output,
    Physics,
    PoseList,
    Recipe,
    RecipeError,
    Views,
    XRayShards,
    run,
    synthesize,
)
from diffdrr.volumes import load_example_ct

SMALL = dict(shape=(32, 32, 32), spacing=(11.2, 11.2, 11.2))
CAMERA = Cameras(height=32, delx=12.6, sdd=(1000, 1060))
HEART = Output(structures=("heart", "aorta"), masks=True, boxes=True)


@pytest.fixture(scope="module")
def cts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Two CTs with label maps and landmarks, as files."
    folder = tmp_path_factory.mktemp("cts")
    subject = load_example_ct(**SMALL)
    for name in ("one", "two"):
        subject.volume.save(folder / f"{name}.nii.gz")
        subject.mask.save(folder / f"{name}_labels.nii.gz")
        write_landmarks(folder / f"{name}.mrk.json", torch.tensor([[0.0, 0, 0], [900.0, 0, 0]]), ["middle", "far away"])
        subject.volume.set_data(subject.volume.data.roll(2, dims=1))
    return folder


def recipe_of(folder: Path, **changes) -> Recipe:
    "A recipe of two CTs."
    entry = CTs(
        volume="[ot]*[!s].nii.gz",
        labels="{name}_labels.nii.gz",
        names="totalsegmentator",
        landmarks="{folder}/{name}.mrk.json",
    )
    made = Recipe(ct=(entry,), camera=CAMERA, output=HEART, pictures=4, shard=2, folder=str(folder))
    return replace(made, **changes)


def digest(folder: Path) -> str:
    "Digest the names and bytes of all files."
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


@pytest.fixture(scope="module")
def finished(cts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "What one process makes of the recipe."
    return synthesize(recipe_of(cts), tmp_path_factory.mktemp("finished") / "set", verbose=False)


def test_order_of_cts(cts: Path, finished: Path, tmp_path: Path):
    first, second = (
        CTs(volume=f"{name}.nii.gz", labels=f"{name}_labels.nii.gz", names="totalsegmentator")
        for name in ("one", "two")
    )
    there, back = (
        synthesize(recipe_of(cts, ct=entries), tmp_path / str(i), verbose=False)
        for i, entries in enumerate([(first, second), (second, first)])
    )
    assert digest(there) == digest(back)
    assert [digest(path / "shards") for path in (there, back)] == [digest(finished / "shards")] * 2


def test_a_full_disk_in_between(cts: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole_file, written = synthesis.shards.whole_file, []

    def fails_at_the_third(path, *args):
        written.append(path)
        if len(written) == 3:
            raise OSError(28, "No space left on device", str(path))
        return whole_file(path, *args)

    monkeypatch.setattr(synthesis.shards, "whole_file", fails_at_the_third)
    with pytest.raises(OSError, match="No space left"):
        synthesize(recipe_of(cts), tmp_path / "set", verbose=False)
    monkeypatch.undo()
    assert len(list((tmp_path / "set" / "shards").glob("*.tar"))) == 1
    with pytest.warns(UserWarning, match="holds 2 of 8 pictures; call synthesize again"):
        assert len(XRayShards(tmp_path / "set")) == 2
    assert digest(synthesize(recipe_of(cts), tmp_path / "set", verbose=False)) == digest(finished)


def test_a_finished_recipe_renders_nothing(cts: Path, finished: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(run, "make_shard", lambda *what: pytest.fail("a shard is made"))
    before = digest(finished)
    assert digest(synthesize(recipe_of(cts), finished, verbose=False)) == before


def test_a_file_that_changed_is_refused(cts: Path, tmp_path: Path):
    for name in ("one.nii.gz", "one_labels.nii.gz"):
        (tmp_path / name).write_bytes((cts / name).read_bytes())
    entry = CTs(volume="one.nii.gz", labels="one_labels.nii.gz", names="totalsegmentator")
    recipe = Recipe(ct=(entry,), camera=CAMERA, pictures=1, folder=str(tmp_path))
    synthesize(recipe, tmp_path / "set", verbose=False)
    (tmp_path / "one.nii.gz").write_bytes((cts / "two.nii.gz").read_bytes())
    with pytest.raises(FileExistsError, match=r"another recipe: files.one.nii.gz was .* choose another folder"):
        synthesize(recipe, tmp_path / "set", verbose=False)


def test_landmarks_and_poses_in_the_frame_of_the_file(cts: Path, tmp_path: Path):
    recipe = recipe_of(cts, output=Output(landmarks=True, picture="npy"), pictures=2)
    for sample in XRayShards(synthesize(recipe, tmp_path / "set", verbose=False)):
        known = sample["geometry"]
        marks = known["landmarks"]
        assert marks["middle"]["inside"] and not marks["far away"]["inside"]
        K, extrinsic = (np.array(known["opencv"][name]) for name in ("intrinsic", "camera_from_scanner"))
        x, y, depth = K @ extrinsic[:3, 3]  # the point (0, 0, 0) of the file
        np.testing.assert_allclose([x / depth + 0.5, y / depth + 0.5], marks["middle"]["pixel"], atol=2e-3)
        assert depth == pytest.approx(marks["middle"]["depth"], abs=1e-2)


def test_poses_of_a_data_set_can_be_used_again(cts: Path, tmp_path: Path):
    first = XRayShards(synthesize(recipe_of(cts, pictures=2), tmp_path / "first", verbose=False))
    poses = [first[i]["geometry"]["pose"] for i in range(2)]
    np.save(tmp_path / "poses.npy", poses)
    (tmp_path / "poses.json").write_text(json.dumps(poses))
    for name in ("poses.npy", "poses.json"):
        recipe = recipe_of(cts, poses=PoseList(file=str(tmp_path / name)), pictures=2)
        again = XRayShards(synthesize(recipe, tmp_path / name.replace(".", "_"), verbose=False))
        assert torch.equal(again[0]["picture"], first[0]["picture"])
        assert torch.equal(again[1]["masks"], first[1]["masks"])


def test_an_implant_has_a_mask_a_pose_and_a_shadow(cts: Path, tmp_path: Path):
    trimesh = pytest.importorskip("trimesh", reason="trimesh comes with the extra [mesh]")
    pytest.importorskip("xraydb", reason="xraydb comes with the extra [physics]")
    mesh = screw(length=90.0, radius=12.0, depth=1.0, pitch=12.0, n=12)
    trimesh.Trimesh(mesh.vertices.numpy(), mesh.faces.numpy()).export(tmp_path / "screw.stl")
    insert = Insert(
        name="screw", mesh=str(tmp_path / "screw.stl"), offsets=(20, 20, 20), turns=(90, 90, 90), probability=0.7
    )
    physics = Physics(kvp=(70, 90))
    recipe = recipe_of(
        cts, insert=(insert,), physics=physics, output=replace(HEART, thickness=True, picture="npy"), pictures=6
    )
    with_screw = XRayShards(synthesize(recipe, tmp_path / "with", verbose=False))
    without = XRayShards(synthesize(replace(recipe, insert=()), tmp_path / "without", verbose=False))
    shown = [("screw" in item["geometry"]["world_from_body"]) for item in with_screw]
    assert 0 < sum(shown) < len(shown)
    for here, item, plain in zip(shown, with_screw, without):
        assert item["geometry"]["channels"] == ["heart", "aorta", "screw"]
        assert bool(item["masks"][2].any()) == here
        assert torch.equal(item["masks"][:2], plain["masks"])
        change = item["picture"] - plain["picture"]
        assert (change[0][~item["masks"][2]] == 0).all()
        if here:
            assert change[0][item["thickness"][2] > 10].min() > 0.5  # titanium instead of tissue


MISTAKES = {
    "an unknown key": ("[camera]\nheight = 32\nsodd = 3\n", "line 3, [camera]: sodd is no key"),
    "a missing file": ("[[ct]]\nvolume = 'no.nii'\n", "line 2, [ct]: volume 'no.nii' does not exist"),
    "a pattern without files": ("[[ct]]\nvolume = 'no*.nii'\n", "line 2, [ct]: volume 'no*.nii' finds no file"),
    "a missing label map": (
        "[[ct]]\nvolume = 'one.nii.gz'\nlabels = '{name}.seg.nrrd'\n",
        "line 3, [ct]: labels 'one.seg.nrrd' does not exist",
    ),
    "an unknown structure": (
        "[[ct]]\nvolume = 'one.nii.gz'\nlabels = 'one_labels.nii.gz'\nnames = 'totalsegmentator'\n"
        "[output]\nmasks = true\nstructures = ['heart', 'brain']\n",
        "line 7, [output]: structures holds 'brain', which none of 1 CTs has",
    ),
    "poses that see nothing": (
        "[[ct]]\nvolume = 'one.nii.gz'\n[poses]\nsod = 5000\n",
        "line 4, [poses]: sod",
    ),
    "a missing mesh": (
        "[physics]\n[[insert]]\nname = 'a'\nmesh = 'a.stl'\n[[insert]]\nname = 'b'\nmesh = 'b.stl'\n",
        "line 4, [insert]: mesh 'a.stl' does not exist",
    ),
    "a list of poses that is missing": (
        "[poses]\nkind = 'list'\nfile = 'poses.npy'\n",
        "line 3, [poses]: file 'poses.npy'",
    ),
    "landmarks without a file": ("[output]\nlandmarks = true\n", "[ct]: landmarks are missing for 'example', but"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_before_any_work(cts: Path, tmp_path: Path, mistake: str):
    text, reason = MISTAKES[mistake]
    path = cts / "recipe.toml"
    path.write_text(text if "[[ct]]" in text else f"{text}[[ct]]\nvolume = 'example'\nspacing = 11.2\n")
    with pytest.raises(RecipeError) as found:
        synthesize(path, tmp_path / "set", verbose=False)
    assert reason in str(found.value)
    assert not (tmp_path / "set").exists()


def test_black_pictures_are_counted(cts: Path, tmp_path: Path):
    frontal = pose_from_view("AP", 750.0).matrix[0]
    far = frontal.clone()
    far[:3, 3] *= 10
    recipe = recipe_of(cts, poses=PoseList(file=str(tmp_path / "poses.json")))
    (tmp_path / "poses.json").write_text(json.dumps([far.tolist()]))
    with pytest.raises(RecipeError, match="no picture shows the CT: the detector is in front of the volume"):
        synthesize(recipe, tmp_path / "set", verbose=False)
    (tmp_path / "poses.json").write_text(json.dumps([pose.tolist() for pose in (frontal, far, frontal)]))
    with pytest.warns(UserWarning, match="2 of 8 pictures show nothing"):
        folder = synthesize(recipe, tmp_path / "set", verbose=False)
    assert XRayShards(folder).manifest["black"].tolist() == [False, True, False, False] * 2


def test_a_source_inside_the_patient_is_doubted(cts: Path, tmp_path: Path):
    recipe = recipe_of(cts, poses=Views(sod=100.0), pictures=1)
    with pytest.warns(UserWarning, match="the source is inside the volume"):
        synthesize(recipe, tmp_path / "set", verbose=False)


def test_augmentations_leave_the_geometry_alone(cts: Path, tmp_path: Path):
    changes = Augmentation(gamma=(0.5, 2), contrast=(0.5, 1), brightness=(-0.1, 0.1), invert=0.5, erase=2)
    plain = XRayShards(synthesize(recipe_of(cts), tmp_path / "plain", verbose=False))
    other = XRayShards(synthesize(recipe_of(cts, augmentation=changes), tmp_path / "other", verbose=False))
    for a, b in zip(plain, other):
        assert torch.equal(a["masks"], b["masks"]) and a["geometry"]["pose"] == b["geometry"]["pose"]
        assert not torch.equal(a["picture"], b["picture"])


def test_every_picture_is_another_one(cts: Path, finished: Path):
    dataset = XRayShards(finished)
    pictures = torch.stack([item["picture"] for item in dataset]).flatten(1)
    assert torch.cdist(pictures, pictures).fill_diagonal_(torch.inf).min() > 1
    assert sorted(set(dataset.manifest["ct"])) == ["one.nii.gz", "two.nii.gz"]
    assert sorted({item["geometry"]["camera"]["sdd"] for item in dataset})[0] >= 1000


LONG = dict(pictures=120, shard=4, camera=replace(CAMERA, height=64, width=64, delx=6.3))
PROGRAM = """
import pickle, sys
from diffdrr.synthesis import synthesize
if __name__ == "__main__":
    synthesize(pickle.load(open(sys.argv[1], "rb")), sys.argv[2], workers=int(sys.argv[3]), verbose=False)
"""


@pytest.fixture(scope="module")
def many(dask: None, cts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    "A longer recipe as a program takes it, and the digest of what one process makes of it."
    folder, recipe = tmp_path_factory.mktemp("many"), recipe_of(cts, **LONG)
    (folder / "recipe.pickle").write_bytes(pickle.dumps(recipe))
    (folder / "program.py").write_text(PROGRAM)
    return folder, digest(synthesize(recipe, folder / "set", verbose=False))


def start_run(folder: Path, out: Path, workers: int) -> subprocess.Popen:
    "Start a run in a session of its own."
    return start(folder / "program.py", folder / "recipe.pickle", out, workers)


def shards_in(out: Path) -> list[Path]:
    return list((out / "shards").glob("*.tar"))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_bytes_do_not_depend_on_the_workers(many: tuple[Path, str], tmp_path: Path, workers: int):
    folder, expected = many
    end(start_run(folder, tmp_path / "set", workers))
    assert digest(tmp_path / "set") == expected


@pytest.mark.slow
def test_a_scheduler_that_is_there(many: tuple[Path, str], tmp_path: Path):
    import distributed

    folder, expected = many
    recipe = pickle.loads((folder / "recipe.pickle").read_bytes())
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, dashboard_address=":0", silence_logs=50
    ) as cluster:
        synthesize(recipe, tmp_path / "set", scheduler=cluster.scheduler_address, verbose=False)
    assert digest(tmp_path / "set") == expected


@pytest.mark.slow
def test_a_worker_is_killed(many: tuple[Path, str], tmp_path: Path):
    folder, expected = many
    run = start_run(folder, tmp_path / "set", 2)
    wait_for(lambda: len(shards_in(tmp_path / "set")), 5, run)
    os.kill(children(run.pid)[0], signal.SIGKILL)
    end(run)
    assert digest(tmp_path / "set") == expected


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_run_is_killed(many: tuple[Path, str], tmp_path: Path, workers: int):
    folder, expected = many
    run = start_run(folder, tmp_path / "set", workers)
    wait_for(lambda: len(shards_in(tmp_path / "set")), 5, run)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    there = {path.name: path.stat().st_mtime_ns for path in shards_in(tmp_path / "set")}
    assert 5 <= len(there) < 60
    end(start_run(folder, tmp_path / "set", 0))
    assert digest(tmp_path / "set") == expected
    after = {path.name: path.stat().st_mtime_ns for path in shards_in(tmp_path / "set")}
    assert there.items() <= after.items()
