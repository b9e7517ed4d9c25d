"""The arrows between the modules, read from their imports, and the origin of each module in a notebook."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffdrr"
ANYTHING = None

# What each module may import of the package. A kernel imports only what its backend shares; operators load compiled kernels by name, when they are used.
ARROWS: dict[str, set[str] | None] = {
    "files": set(),
    "precision": set(),
    "so3": {"precision"},
    "se3": {"precision", "so3"},
    "pose": {"precision", "so3", "se3"},
    "camera": {"precision"},
    "detector": {"precision", "pose", "camera"},
    "views": {"precision", "pose", "camera", "detector"},
    "xray": {"files", "pose", "camera", "detector", "views"},
    "volume": set(),
    "phantom": set(),
    "data": {"files", "pose", "camera", "volume", "phantom"},
    "kernels.reference": set(),
    "threads": set(),
    "kernels.numba_march": {"threads"},
    "kernels.numba_siddon": {"kernels.numba_march"},
    "kernels.numba_trilinear": {"kernels.numba_march"},
    "kernels.triton_common": set(),
    "kernels.triton_siddon": {"kernels.triton_common"},
    "kernels.triton_trilinear": {"kernels.triton_common"},
    "kernels.operators": {"kernels.reference"},
    "kernels.dispatch": {"kernels.reference", "kernels.operators"},
    "renderers": {"kernels.dispatch"},
    "drr": {"precision", "pose", "camera", "detector", "volume", "threads", "renderers"},
    "metrics": {"pose", "so3"},
    "alignment": {"precision", "so3", "se3", "pose", "detector", "renderers", "drr", "metrics"},
    "registration": {"precision", "files", "se3", "pose", "xray", "threads", "drr", "alignment"},
    "datasets": {"pose", "camera", "detector", "data"},
    "utils": {"precision", "pose", "camera", "detector", "drr"},
    "reconstruction": {"files", "se3", "pose", "views", "threads", "drr"},
    "physics": {"precision", "camera", "data"},
    "anatomy": {"files", "pose", "renderers", "drr"},
    "scene_page": {"files"},
    "visualization": ANYTHING,
    "explorer": {"pose", "drr", "views", "visualization", "data"},
    "cli": ANYTHING,
}

# Who may import what others must not need.
COMPILED = {"numba": {"kernels.numba_march", "kernels.numba_siddon", "kernels.numba_trilinear"}, "triton": {"kernels.triton_common", "scene_page"}}
OWNERS = {"torchio": {"data"}, "xraydb": {"data"}, "pyvista": {"scene_page"}, "h5py": {"datasets"}, "cv2": {"views"}, "pydicom": {"xray"}, "skimage": {"xray"}, "panel": {"explorer"}, "imageio_ffmpeg": {"visualization"}, **COMPILED}


def path_of(module: str) -> Path:
    return PACKAGE / f"{module.replace('.', '/')}.py"


def modules() -> list[str]:
    "Name the modules of the package, as in `kernels.dispatch`."
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in sorted(PACKAGE.rglob("*.py")))
    return [".".join(path.parts) for path in paths if path.name not in ("__init__", "_modidx")]


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


def imported_names(source: str, module: str) -> set[str]:
    "Return the absolute names that the source of a module imports."
    return {name for node in imports(ast.parse(source)) for name in absolute_names(node, module)}


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
if TYPE_CHECKING:
    from torchio import Subject
"""
    names = imported_names(source, "kernels.dispatch")
    assert {"torch.nn", "diffdrr.kernels.reference", "diffdrr.pose", "xraydb", "diffdrr.camera"} <= names
    assert not any(name.startswith("torchio") for name in names)
    known = ["kernels.reference", "pose", "camera", "so3"]
    assert imported_modules(source, "kernels.dispatch", known) == {"kernels.reference", "pose", "camera"}


def test_every_module_has_its_arrows():
    assert set(modules()) == set(ARROWS), "a module is new or gone: ARROWS in this file says what each may import"


@pytest.mark.parametrize("module", modules())
def test_arrows(module: str):
    allowed = ARROWS[module]
    found = imported_modules(path_of(module).read_text(encoding="utf-8"), module, modules())
    if allowed is ANYTHING:
        allowed = set(modules())
    assert found <= allowed, f"{module} must not import {', '.join(sorted(found - allowed))}"


def test_only_what_is_shown_imports_visualization():
    importers = {module for module in modules() if "visualization" in imported_modules(path_of(module).read_text(encoding="utf-8"), module, modules())}
    assert importers <= {"cli", "explorer"}


@pytest.mark.parametrize("library", OWNERS)
def test_libraries_have_owners(library: str):
    def uses(module: str) -> bool:
        names = imported_names(path_of(module).read_text(encoding="utf-8"), module)
        return any(name.split(".")[0] == library for name in names)

    assert {module for module in modules() if uses(module)} <= OWNERS[library]


@pytest.mark.parametrize("module", modules())
def test_module_comes_from_a_notebook(module: str):
    header = re.search(r"File to edit: (\S+\.ipynb)", path_of(module).read_text(encoding="utf-8"))
    assert header, f"{module} is not exported from a notebook"
    notebook = (path_of(module).parent / header[1]).resolve()
    assert notebook.is_file() and notebook.is_relative_to(ROOT / "nbs" / "api"), header[1]
