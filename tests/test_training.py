"""Training: the same weights for one process and two, after SIGKILL, from shards, and for many CTs."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from diffdrr.geometry import pose_from_view
from diffdrr.registration import register
from diffdrr.rendering import DRR
from diffdrr.studies import register_table
from diffdrr.synthesis import Cameras, CTs, Output, Recipe, RecipeError, Views, synthesize
from diffdrr.training import Loss, Optimizer, PoseModel, Training, Validation, train
from diffdrr.volumes import load_example_ct
from diffdrr.xrays import prepare, read_xray, write_xray, xray_of_rendering

pytest.importorskip("lightning_fabric", reason="lightning-fabric comes with the extra [train]")

ROOT = Path(__file__).parents[1]
RECIPE = Recipe(
    ct=[CTs(spacing=16.0)],
    poses=Views(views=("AP", "LAO 30")),
    camera=Cameras(height=32, delx=12.5, renderer="trilinear"),
)
TRAINING = Training(
    recipe=RECIPE,
    loss=Loss(pixels=16),
    optimizer=Optimizer(steps=6, batch=4, warmup=2),
    validation=Validation(pictures=4, every=2),
)
PROGRAM = """
import pickle, sys
from pathlib import Path
import torch
from diffdrr.training import train
from diffdrr.training.loop import Run, make_fabric

if __name__ == "__main__":
    training, out = pickle.load(open(sys.argv[1], "rb")), Path(sys.argv[2])
    if sys.argv[3] == "gradient":
        run = Run(training, out / "gradient", make_fabric("cpu"))
        sys.stdout.write(f"processes {run.fabric.world_size}\\n")  # one call: lines of processes may not mix
        run.backward()
        if run.fabric.is_global_zero:
            torch.save([p.grad for p in run.network.module.parameters()], out / "gradient.pt")
        run.fabric.barrier()
        assert not [name for name, _ in run.network.module.named_buffers() if name != "middle"]
    train(training, out / "model", accelerator="cpu", verbose=False)
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A program that trains, and what it trains."
    folder = tmp_path_factory.mktemp("program")
    (folder / "training.pickle").write_bytes(pickle.dumps(TRAINING))
    (folder / "program.py").write_text(PROGRAM)
    return folder


def command(program: Path, out: Path, what: str, n: int = 1) -> list[str]:
    "Say how the program is started in some processes."
    out.mkdir()
    arguments = [program / "program.py", program / "training.pickle", out, what]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n] if n > 1 else []
    return list(map(str, [sys.executable, *launch, *arguments]))


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def weights_of(model: Path) -> dict[str, torch.Tensor]:
    return torch.load(model / "checkpoint.pt", weights_only=True)["network"]


@pytest.fixture(scope="module")
def alone(program: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "What one process makes."
    out = tmp_path_factory.mktemp("alone") / "out"
    subprocess.run(command(program, out, "gradient"), check=True, env=environment(), timeout=600)
    return out


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_one_with_twice_the_batch(program: Path, alone: Path, tmp_path: Path):
    out = tmp_path / "out"
    done = subprocess.run(
        command(program, out, "gradient", n=2), env=environment(), timeout=600, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("processes 2") == 2
    one, two = (torch.load(path / "gradient.pt", weights_only=True) for path in (alone, out))
    largest = max(gradient.abs().max() for gradient in one)
    for a, b in zip(one, two, strict=True):
        assert (a - b).abs().max() <= 1e-6 * largest
    errors = [pd.read_csv(path / "model" / "log.csv")["mtre_mm"].iloc[-1] for path in (alone, out)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


@pytest.mark.slow
def test_a_run_that_is_killed_ends_with_the_same_bits(program: Path, alone: Path, tmp_path: Path):
    out = tmp_path / "out"
    run = subprocess.Popen(command(program, out, "train"), env=environment(), start_new_session=True)
    deadline = time.monotonic() + 300
    while not (out / "model" / "checkpoint.pt").exists():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGKILL)
    run.wait()
    kept = torch.load(out / "model" / "checkpoint.pt", weights_only=True)["progress"]
    assert kept["step"] < TRAINING.optimizer.steps
    train(TRAINING, out / "model", accelerator="cpu", verbose=False)
    one, other = weights_of(alone / "model"), weights_of(out / "model")
    assert all(torch.equal(one[name], other[name]) for name in one)
    logs = [pd.read_csv(path / "model" / "log.csv").drop(columns="seconds") for path in (alone, out)]
    assert logs[0].equals(logs[1])


@pytest.mark.slow
def test_the_ct_is_in_no_file(alone: Path):
    voxels = 358.4 * 358.4 * 332.5 / 16**3
    for name in ("weights.pt", "checkpoint.pt"):
        kept = torch.load(alone / "model" / name, weights_only=True)["network"]
        assert not any(tensor.numel() == round(voxels) for tensor in kept.values())
        assert set(kept) == set(weights_of(alone / "model"))
    assert sum(tensor.numel() for tensor in kept.values()) < 1e6


def test_shards_are_the_same_pictures(tmp_path: Path):
    pytest.importorskip("pyarrow", reason="pyarrow comes with the extra [data]")
    from diffdrr.training.pictures import Pictures

    recipe = replace(RECIPE, pictures=12, output=Output(picture="npy"))
    synthesize(recipe, tmp_path / "set", verbose=False)
    training = replace(TRAINING, recipe=recipe, shards=str(tmp_path / "set"))
    pictures = Pictures(training)
    seen = [pictures.examples([number]) for number in range(8)]
    assert len({example.pose.sum().item() for example in seen}) == 8
    assert torch.cdist(torch.cat([e.pose for e in seen]).flatten(1), pictures.validation.pose.flatten(1)).min() > 1e-3
    index = pictures.numbers.training(3)
    assert torch.equal(pictures.rendered[index]["picture"], seen[3].picture[0])
    train(training, tmp_path / "model", until=1, verbose=False)
    with pytest.raises(RecipeError, match="shards cannot be used: .* were made of another recipe"):
        Pictures(replace(training, recipe=replace(recipe, seed=1)))


def test_cts_take_turns(tmp_path: Path):
    from diffdrr.training.pictures import Pictures

    for name, size in (("one", 20), ("two", 24)):
        load_example_ct(shape=(size, size, size), spacing=(17.0, 17.0, 17.0)).volume.save(tmp_path / f"{name}.nii.gz")
    recipe = replace(RECIPE, ct=[CTs(volume="*.nii.gz")], folder=str(tmp_path))
    pictures = Pictures(replace(TRAINING, recipe=recipe))
    example = pictures.examples(range(4))
    assert example.cts == [0, 1, 0, 1]
    assert pictures.validation.cts == [0, 1, 0, 1]
    train(replace(TRAINING, recipe=recipe), tmp_path / "model", until=2, verbose=False)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "- `one.nii.gz` (SHA-256 " in card and "- `two.nii.gz` (SHA-256 " in card and str(tmp_path) not in card


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:2 of 3 rows have an error")
def test_a_table_begins_where_the_network_says(alone: Path, tmp_path: Path):
    subject = load_example_ct(shape=(24, 24, 24), spacing=(16.0, 16.0, 16.0))
    subject.volume.save(tmp_path / "ct.nii.gz")
    drr, pose = DRR(subject, sdd=1020.0, height=32, delx=12.5), pose_from_view("AP", 850.0)
    with torch.no_grad():
        write_xray(tmp_path / "xray.dcm", xray_of_rendering(drr(pose), drr.detector, pose))
    model, row = PoseModel(alone / "model"), {"ct": "ct.nii.gz", "xray": "xray.dcm", "orientation": "AP"}
    rows = [{"model": alone / "model"}, {"model": alone / "model", "init": "AP"}, {"model": "none"}]
    pd.DataFrame([row | each for each in rows]).to_csv(tmp_path / "table.csv", index=False)
    quick = dict(pixels=32, n_starts=1, attempts=1, verbose=False)
    found = register_table(tmp_path / "table.csv", tmp_path / "results.csv", **quick)
    assert found["error"].isna().tolist() == [True, False, False]
    assert "give it or init, not both" in found["error"][1] and "make a model with diffdrr train" in found["error"][2]
    image = prepare(read_xray(tmp_path / "xray.dcm"), 32).image
    begun = register(drr, image, model, n_starts=1, attempts=1, labels=[], verbose=False)  # the file has none
    assert found["similarity"][0] == pytest.approx(begun.similarity, abs=1e-3)


MISTAKES = {
    "an unknown key": ("[network]\nbackbon = 'small'\n", "line 3, [network]: backbon is no key of [network]"),
    "an unknown backbone": (
        "[network]\nbackbone = 'no such network'\n[validation]\npictures = 4\n",
        ", [network]: ",
    ),
    "too many pictures kept apart": (
        "[validation]\nevery = 3\npictures = 60\n",
        "line 4, [validation]: pictures must be at most half of the poses of a CT, which are 100, not 60",
    ),
    "shards that are not there": ("shards = 'set'\n", "line 2, recipe: shards cannot be used: "),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_found_before_any_work(tmp_path: Path, mistake: str):
    text, reason = MISTAKES[mistake]
    pictures = "[[ct]]\nvolume = 'example'\nspacing = 16\n[poses]\nkind = 'orbit'\n[camera]\nheight = 24\ndelx = 17\n"
    (tmp_path / "recipe.toml").write_text(pictures)
    (tmp_path / "train.toml").write_text(f"recipe = 'recipe.toml'\n{text}")
    with pytest.raises(RecipeError) as found:
        train(tmp_path / "train.toml", tmp_path / "model", accelerator="cpu", verbose=False)
    assert reason in str(found.value)
    assert not (tmp_path / "model").exists()
