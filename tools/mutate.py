"""Break lines of the kernels and of the geometry, one at a time, and see that a test of `make test` fails.

The lines are those whose sign or index matters most. Each is broken in a copy of the project, in the notebook and in
the module that it makes, so that the working tree stays as it is. A mutant that no test catches needs one.

Usage: python -m tools.mutate [--only WORD]"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+)", re.MULTILINE)
TRUTH, KERNELS, MESHES = "tests/test_truth.py", "tests/test_kernels.py", "tests/test_meshes.py"
GEOMETRY, OWN = "tests/test_geometry.py", "the notebook itself"


@dataclass(frozen=True)
class Mutant:
    "A line that is broken."

    notebook: str  # below nbs/api
    old: str  # stands once in the notebook
    new: str
    where: tuple[str, ...]  # to look for a test that fails; the first ends the run

    @property
    def path(self) -> Path:
        return Path("nbs", "api", f"{self.notebook}.ipynb")

    @property
    def tests(self) -> tuple[str, ...]:
        return tuple(str(self.path) if place == OWN else place for place in self.where)


MUTANTS = (
    # where a ray enters and crosses
    Mutant("kernels/cpu/412_march", "below, above = -0.5 -", "below, above = 0.5 -", (TRUTH,)),
    Mutant(
        "kernels/cpu/412_march", "start = float(s[axis]) - su * slope", "start = float(s[axis]) + su * slope", (TRUTH,)
    ),
    Mutant(
        "kernels/cpu/412_march", "(plane - axis.start) * axis.inverse", "(plane + axis.start) * axis.inverse", (TRUTH,)
    ),
    Mutant("kernels/cpu/412_march", "whole(w * ray.w.step)", "whole(w * ray.v.step)", (TRUTH,)),
    # Siddon: picture, slopes, adjoint
    Mutant(
        "kernels/cpu/415_siddon",
        "kind.whole(index - axis.step), index",
        "kind.whole(index + axis.step), index",
        (TRUTH,),
    ),
    Mutant("kernels/cpu/415_siddon", "left_of_source -= from_source", "left_of_source += from_source", (KERNELS,)),
    Mutant(
        "kernels/cpu/415_siddon", "slopes.ends[b, 3 + axis, n] = length", "slopes.ends[b, axis, n] = length", (KERNELS,)
    ),
    Mutant(
        "kernels/cpu/415_siddon",
        "add_to_voxel(voxels, pictures, where, listed.index[m] - v.step",
        "add_to_voxel(voxels, pictures, where, listed.index[m] + v.step",
        (KERNELS,),
    ),
    # trilinear: picture, slopes, adjoint
    Mutant(
        "kernels/cpu/416_field",
        "lower = v[0] * (w[0] * x[0] + w[1] * x[1])",
        "lower = v[0] * (w[1] * x[0] + w[0] * x[1])",
        (TRUTH, KERNELS),
    ),
    Mutant("kernels/cpu/417_trilinear", "length * (plain - moment)", "length * (plain + moment)", (KERNELS,)),
    Mutant(
        "kernels/cpu/417_trilinear",
        "weight[m], weight[m + CHUNK] = a * c * e + g * i * k, a * c * f + g * i * o",
        "weight[m], weight[m + CHUNK] = a * c * f + g * i * o, a * c * e + g * i * k",
        (KERNELS,),
    ),
    # meshes, and the specification
    Mutant(
        "kernels/cpu/419_mesh", "sign if view.along > 0.0 else -sign", "-sign if view.along > 0.0 else sign", (MESHES,)
    ),
    Mutant("kernels/403_reference", "weights = (1 - upper, upper)", "weights = (upper, 1 - upper)", (OWN,)),
    Mutant("kernels/403_reference", "(points.detach() + 0.5).floor()", "(points.detach() - 0.5).floor()", (OWN,)),
    # rotations and poses
    Mutant("geometry/102_so3", "[o, -z, y, z, o, -x, -y, x, o]", "[o, z, -y, -z, o, x, y, -x, o]", (OWN,)),
    Mutant("geometry/103_se3", "+ b * w + c * matmul(w, w)", "- b * w + c * matmul(w, w)", (OWN,)),
    Mutant(
        "geometry/104_pose",
        "make_matrix(R, -matmul(R, self.translation",
        "make_matrix(R, matmul(R, self.translation",
        (OWN,),
    ),
    Mutant("geometry/104_pose", "(matmul(T.matrix, self.matrix))", "(matmul(self.matrix, T.matrix))", (OWN,)),
    # cameras, views, grids
    Mutant("geometry/105_camera", "dely * (row - height / 2)", "dely * (height / 2 - row)", (GEOMETRY,)),
    Mutant(
        "geometry/105_camera",
        "[-1.0 if reverse_x_axis else 1.0, -1.0, 1.0, 1.0]",
        "[-1.0 if reverse_x_axis else 1.0, 1.0, 1.0, 1.0]",
        (GEOMETRY,),
    ),
    Mutant(
        "geometry/106_detector",
        "world_from_unit = matmul(world_from_camera, calibration.matrix)",
        "world_from_unit = matmul(calibration.matrix, world_from_camera)",
        (GEOMETRY,),
    ),
    Mutant("geometry/107_opencv", "signs[:, None] * rotation", "signs * rotation", (OWN, GEOMETRY)),
    Mutant("geometry/108_views", "isocentre - sod * world_from_rest", "isocentre + sod * world_from_rest", (OWN,)),
    Mutant(
        "volumes/201_grid",
        "centre[i] - spacing[i] * (shape[i] - 1) / 2",
        "centre[i] - spacing[i] * shape[i] / 2",
        (OWN,),
    ),
)


def module_of(notebook: dict) -> Path:
    "Find the module that a notebook makes."
    (name,) = (
        line.split()[-1]
        for cell in notebook["cells"]
        for line in "".join(cell["source"]).splitlines()
        if line.startswith("#| default_exp")
    )
    path = Path("diffdrr", *name.split("."))
    return path.with_suffix(".py")


def exported(notebook: dict) -> list[dict]:
    "List the cells that become a module."
    return [cell for cell in notebook["cells"] if "".join(cell["source"]).startswith("#| export")]


def broken(mutant: Mutant, project: Path = ROOT) -> dict[Path, str]:
    """Return the texts of notebook and module with the line broken, by their paths in the project.

    Raises a `ValueError` unless the line stands once in each."""
    notebook = json.loads((project / mutant.path).read_text(encoding="utf-8"))
    module = module_of(notebook)
    text = (project / module).read_text(encoding="utf-8")
    cells = [cell for cell in exported(notebook) if mutant.old in "".join(cell["source"])]
    if len(cells) != 1 or text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.old!r} must stand once in {mutant.path} and in {module}; has it been rewritten?")
    cells[0]["source"] = "".join(cells[0]["source"]).replace(mutant.old, mutant.new).splitlines(keepends=True)
    return {mutant.path: json.dumps(notebook), module: text.replace(mutant.old, mutant.new)}


def run_tests(project: Path, tests: tuple[str, ...]) -> str | None:
    "Run tests in a copy of the project; return the first that fails, or the signal that ended them, or None."
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", "--tb=no", "-rfE", *tests]
    environment = os.environ | {"PYTHONPATH": str(project), "XDG_CACHE_HOME": str(project / ".cache")}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return None
    if done.returncode < 0:  # a kernel that writes beside its arrays
        return f"{' '.join(tests)}, ended by {signal.Signals(-done.returncode).name}"
    found = FAILED.search(done.stdout)
    if not found:
        raise RuntimeError(f"{' '.join(command)} broke:\n{done.stdout}{done.stderr}")
    return found[1]


def copy_project(folder: Path) -> None:
    "Copy what git tracks."
    names = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name, follow_symlinks=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="only mutants of notebooks whose path has this word")
    chosen = [mutant for mutant in MUTANTS if parser.parse_args().only in mutant.notebook]
    survivors = 0
    with tempfile.TemporaryDirectory() as scratch:
        project = Path(scratch)
        copy_project(project)
        if whole := run_tests(project, tuple(dict.fromkeys(test for mutant in chosen for test in mutant.tests))):
            sys.exit(f"FAILED: {whole}, although nothing was broken")
        print("| notebook | line | broken | caught by |\n| --- | --- | --- | --- |", flush=True)
        for mutant in chosen:
            texts = broken(mutant)
            for path, text in texts.items():
                (project / path).write_text(text, encoding="utf-8")
            caught = run_tests(project, mutant.tests)
            for path in texts:
                shutil.copy(ROOT / path, project / path)
            survivors += caught is None
            print(f"| {mutant.notebook} | `{mutant.old}` | `{mutant.new}` | {caught or 'NOTHING'} |", flush=True)
    if survivors:
        sys.exit(f"FAILED: no test caught {survivors} of {len(chosen)}")


if __name__ == "__main__":
    main()
