"""Tables of X-rays: one row is one result, whoever registered it, and whatever died meanwhile.

Those marked slow start workers, and kill them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from processes import children, end, start, wait_for

from diffdrr.geometry import RigidTransform, pose_from_columns, pose_from_view
from diffdrr.registration import RegistrationResult
from diffdrr.rendering import DRR
from diffdrr.studies import register_table, run
from diffdrr.volumes import load_example_ct
from diffdrr.xrays import XRay, write_xray, xray_of_rendering

POSE = [f"init_{name}" for name in ("x", "y", "z", "qw", "qx", "qy", "qz")]
VIEWS = ("AP", "LAO 30", "left lateral")
QUICK = dict(n_starts=1, attempts=1, spread=(3.0, 5.0), pixels=32, verbose=False)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Two CTs, and an X-ray of each from three sides."
    folder = tmp_path_factory.mktemp("studies")
    subject = load_example_ct(shape=(32, 32, 32), spacing=(11.2, 11.2, 11.2), orientation="PA")
    drr = DRR(subject, sdd=1020.0, height=32, delx=11.0)
    for ct in ("one", "two"):
        subject.volume.save(folder / f"{ct}.nii.gz")
        for view in VIEWS:
            pose = pose_from_view(view, 750.0, "PA")
            with torch.no_grad():
                write_xray(folder / f"{ct} {view}.dcm", xray_of_rendering(drr(pose), drr.detector, pose))
    return folder


def table_of(folder: Path) -> pd.DataFrame:
    "A row for each X-ray; CTs take turns."
    rows = [(f"{folder}/{ct}.nii.gz", f"{folder}/{ct} {view}.dcm", view) for view in VIEWS for ct in ("one", "two")]
    return pd.DataFrame(rows, columns=["ct", "xray", "init"])


def without_seconds(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.drop(columns="seconds")


def canned(xray: XRay, init: RigidTransform, mask: torch.Tensor, **options) -> RegistrationResult:
    "Take the initial pose for the result."
    return RegistrationResult(init, init, 1.0, torch.eye(6), [{}], None, pd.DataFrame(), 0.0)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    "Register at once, and list the CTs that are read."
    read, read_ct = [], run.read_ct
    monkeypatch.setattr(run, "Registrar", lambda subject, labels, refine: canned)
    monkeypatch.setattr(run, "read_ct", lambda case: read.append(Path(case.ct).name) or read_ct(case))
    monkeypatch.setattr(run, "READ", run.Recent(2))
    return read


def test_a_ct_is_read_once(files: Path, tmp_path: Path, at_once: list[str]):
    found = register_table(table_of(files), tmp_path / "results.csv", verbose=False)
    assert at_once == ["one.nii.gz", "two.nii.gz"]
    assert found["xray"].tolist() == table_of(files)["xray"].tolist() and found["trusted"].all()
    expected = torch.cat([pose_from_view(view, 750.0, "PA").matrix for view in VIEWS for _ in range(2)])
    torch.testing.assert_close(pose_from_columns(found).matrix.float(), expected, atol=1e-2, rtol=0)


def test_all_formats_hold_the_same(files: Path, tmp_path: Path, at_once: list[str]):
    pytest.importorskip("pyarrow", reason="pyarrow comes with the extra [data]")
    table = table_of(files).assign(patient=list("abcdef"))
    table.to_csv(tmp_path / "studies.csv", index=False)
    table.to_parquet(tmp_path / "studies.parquet", index=False)
    found = [
        register_table(given, tmp_path / f"{i}.parquet", verbose=False)
        for i, given in enumerate((table, tmp_path / "studies.csv", tmp_path / "studies.parquet"))
    ]
    for one in found[1:]:
        pd.testing.assert_frame_equal(without_seconds(one), without_seconds(found[0]), check_dtype=False)
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "2.parquet"), found[2])


def test_rows_of_a_filtered_table_keep_their_results(files: Path, tmp_path: Path, at_once: list[str]):
    pytest.importorskip("pyarrow", reason="pyarrow comes with the extra [data]")
    table = table_of(files)[::-2]
    table.to_parquet(tmp_path / "studies.parquet")
    assert pd.read_parquet(tmp_path / "studies.parquet").index.tolist() == [5, 3, 1]
    expected = torch.cat([pose_from_view(view, 750.0, "PA").matrix for view in reversed(VIEWS)])
    for i, given in enumerate((table, tmp_path / "studies.parquet")):
        found = register_table(given, tmp_path / f"{i}.csv", verbose=False)
        assert found["xray"].tolist() == table["xray"].tolist()
        torch.testing.assert_close(pose_from_columns(found).matrix.float(), expected, atol=1e-2, rtol=0)


def test_a_table_of_results_is_where_another_begins(files: Path, tmp_path: Path, at_once: list[str]):
    table = table_of(files)
    first = register_table(table, tmp_path / "first.csv", verbose=False)
    poses = first[[name.removeprefix("init_") for name in POSE]].add_prefix("init_")
    again = register_table(table.drop(columns="init").join(poses), tmp_path / "again.csv", verbose=False)
    torch.testing.assert_close(pose_from_columns(again).matrix, pose_from_columns(first).matrix, atol=1e-3, rtol=0)


def test_a_run_goes_on_where_it_stopped(files: Path, tmp_path: Path, at_once: list[str], monkeypatch):
    done = []

    def stops_at_the_third(xray: XRay, init: RigidTransform, mask: torch.Tensor, **options):
        done.append(init)
        if len(done) == 3:
            raise KeyboardInterrupt
        return canned(xray, init, mask)

    monkeypatch.setattr(run, "Registrar", lambda subject, labels, refine: stops_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        register_table(table_of(files), tmp_path / "results.csv", verbose=False)
    assert not (tmp_path / "results.csv").exists()
    assert len((tmp_path / "results.csv.jsonl").read_text().splitlines()) == 2
    register_table(table_of(files), tmp_path / "results.csv", verbose=False)
    assert len(done) == 3 + 4
    before = (tmp_path / "results.csv").read_bytes()
    register_table(table_of(files), tmp_path / "results.csv", verbose=False)
    assert len(done) == 3 + 4 and (tmp_path / "results.csv").read_bytes() == before


def test_what_a_result_depends_on_is_registered_again(files: Path, tmp_path: Path, at_once: list[str], monkeypatch):
    done = []

    def registered(*what, **options):
        done.append(options)
        return canned(*what)

    monkeypatch.setattr(run, "Registrar", lambda subject, labels, refine: registered)
    table = table_of(files)
    register_table(table[:3], tmp_path / "results.csv", verbose=False)
    register_table(table, tmp_path / "results.csv", verbose=False)
    assert len(done) == 6
    register_table(table, tmp_path / "results.csv", seed=1, verbose=False)
    assert len(done) == 12 and done[-1]["seed"] == 1
    os.utime(files / "one AP.dcm")
    register_table(table, tmp_path / "results.csv", verbose=False)
    assert len(done) == 13


def test_the_progress_bar_is_right(files: Path, tmp_path: Path, at_once: list[str], monkeypatch):
    bars, tqdm = [], run.tqdm
    monkeypatch.setattr(run, "tqdm", lambda **how: bars.append(tqdm(**how)) or bars[-1])
    register_table(table_of(files)[:2], tmp_path / "results.csv")
    register_table(table_of(files), tmp_path / "results.csv")
    assert [(bar.initial, bar.n, bar.total) for bar in bars] == [(0, 2, 2), (2, 6, 6)]


def test_what_is_wrong_stays_in_its_row(files: Path, tmp_path: Path):
    (tmp_path / "damaged.dcm").write_bytes((files / "one AP.dcm").read_bytes()[:700])
    (tmp_path / "no ct.nii.gz").write_bytes(b"nothing")
    good = table_of(files).iloc[0].to_dict()
    wrong = {
        "does not exist": good | {"ct": "missing.nii.gz"},
        "no ct.nii.gz": good | {"ct": str(tmp_path / "no ct.nii.gz")},
        "missing.dcm' does not exist": good | {"xray": "missing.dcm"},
        "damaged.dcm": good | {"xray": str(tmp_path / "damaged.dcm")},
        "view must be one of": good | {"init": "from above"},
        "sod must hold numbers, not 'far'": good | {"sod": "far"},
        "must be a quaternion": {**good, "init": "", **dict.fromkeys(POSE, "0")},
        "ct is empty": good | {"ct": ""},
        "subset needs the label map": good | {"subset": "heart"},
        "in front of the volume": {**good, "init": "", **dict(zip(POSE, ("0", "-5000", "0", "1", "0", "0", "0")))},
    }
    table = pd.DataFrame([good, *wrong.values(), good])
    with pytest.warns(UserWarning, match=f"{len(wrong)} of {len(wrong) + 2} rows have an error.* the first is row 2: "):
        found = register_table(table, tmp_path / "results.csv", **QUICK)
    assert found["error"].isna().tolist() == [True, *[False] * len(wrong), True]
    for message, error in zip(wrong, found["error"][1:]):
        assert message in error
    columns = ["x", "qw", "sd_x", "similarity"]
    assert found[columns].notna().all(axis=1).tolist() == found["error"].isna().tolist()
    written = pd.read_csv(tmp_path / "results.csv")
    assert written["error"].isna().tolist() == found["error"].isna().tolist()


def test_structures_of_a_row_reach_the_registrar(files: Path, tmp_path: Path, at_once: list[str], monkeypatch):
    asked = []
    monkeypatch.setattr(run, "Registrar", lambda subject, labels, refine: asked.append(labels) or canned)
    load_example_ct(shape=(32, 32, 32), spacing=(11.2, 11.2, 11.2)).mask.save(tmp_path / "labels.nii.gz")
    table = table_of(files)[:3].assign(labels=str(tmp_path / "labels.nii.gz"), names="totalsegmentator")
    register_table(table.assign(structures=["heart,5", "5", ""]), tmp_path / "results.csv", verbose=False)
    assert [51, 5] in asked and [5] in asked and None in asked


def test_what_is_said_of_a_ct_is_in_all_its_rows(files: Path, tmp_path: Path, at_once: list[str]):
    quiet = register_table(table_of(files)[:2], tmp_path / "quiet.csv", verbose=False)
    assert quiet["warnings"].isna().all()
    empty = load_example_ct(shape=(32, 32, 32), spacing=(11.2, 11.2, 11.2)).volume
    empty.data[:] = 0
    empty.save(tmp_path / "empty.nii.gz")
    table = table_of(files)[:2].assign(ct=str(tmp_path / "empty.nii.gz"))
    found = register_table(table, tmp_path / "results.csv", verbose=False)
    assert at_once[2:] == ["empty.nii.gz"]
    assert found["warnings"].notna().all() and found["warnings"].nunique() == 1


PROGRAM = """
import json, sys
from diffdrr.studies import register_table
if __name__ == "__main__":
    table, output, workers, options = sys.argv[1:]
    register_table(table, output, int(workers), **json.loads(options))
"""


@pytest.fixture(scope="module")
def many(dask: None, files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    "A longer table as a program takes it, and what one process makes of it."
    folder = tmp_path_factory.mktemp("many")
    table = pd.concat([table_of(files)] * 2, ignore_index=True)
    table["init"] = [view if i % 5 else "nowhere" for i, view in enumerate(table["init"])]
    table["sod"] = [750 + i for i in range(len(table))]
    table.to_csv(folder / "studies.csv", index=False)
    (folder / "program.py").write_text(PROGRAM)
    with pytest.warns(UserWarning, match="3 of 12 rows have an error"):
        register_table(folder / "studies.csv", folder / "results.csv", **QUICK)
    return folder, result_in(folder)


def start_run(folder: Path, out: Path, workers: int) -> subprocess.Popen:
    return start(folder / "program.py", folder / "studies.csv", out / "results.csv", workers, json.dumps(QUICK))


def result_in(folder: Path) -> pd.DataFrame:
    return without_seconds(pd.read_csv(folder / "results.csv"))


def rows_in(out: Path) -> int:
    path = out / "results.csv.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_results_do_not_depend_on_the_workers(many: tuple[Path, pd.DataFrame], tmp_path: Path, workers: int):
    folder, expected = many
    end(start_run(folder, tmp_path, workers))
    pd.testing.assert_frame_equal(result_in(tmp_path), expected, check_exact=True)


@pytest.mark.slow
def test_a_worker_is_killed(many: tuple[Path, pd.DataFrame], tmp_path: Path):
    folder, expected = many
    program = start_run(folder, tmp_path, 2)
    wait_for(lambda: rows_in(tmp_path), 3, program)
    os.kill(children(program.pid)[0], signal.SIGKILL)
    end(program)
    pd.testing.assert_frame_equal(result_in(tmp_path), expected, check_exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_the_run_is_killed(many: tuple[Path, pd.DataFrame], tmp_path: Path, workers: int):
    folder, expected = many
    program = start_run(folder, tmp_path, workers)
    wait_for(lambda: rows_in(tmp_path), 3, program)
    os.killpg(program.pid, signal.SIGKILL)
    program.wait()
    kept = (tmp_path / "results.csv.jsonl").read_text()
    assert 3 <= rows_in(tmp_path) < 9 and not (tmp_path / "results.csv").exists()
    end(start_run(folder, tmp_path, 0))
    assert (tmp_path / "results.csv.jsonl").read_text().startswith(kept.rpartition("\n")[0])
    pd.testing.assert_frame_equal(result_in(tmp_path), expected, check_exact=True)


KILLER = """
import os, signal, sys, time
from diffdrr.workers import results

def do(task):
    time.sleep(0.2)
    if task == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task * task

if __name__ == "__main__":
    found = dict(results(do, range(8), int(sys.argv[1]), lost=lambda task: "lost"))
    print([found[task] for task in range(8)])
"""


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_only_the_task_that_kills_is_lost(dask: None, tmp_path: Path, workers: int):
    (tmp_path / "program.py").write_text(KILLER)
    impatient = os.environ | {"DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "1"}  # instead of 3, which take longer
    command = [sys.executable, tmp_path / "program.py", str(workers)]
    said = subprocess.run(command, capture_output=True, text=True, timeout=400, env=impatient)
    assert said.stdout.strip() == "[0, 1, 4, 'lost', 16, 25, 36, 49]", said.stderr
