"""The rooms of the package, and which of them each may import from: the one table that tests, CONTRIBUTING.md and the
website's map read.

The rest of this module reads from the sources what they import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffdrr"
NOTEBOOKS = ROOT / "nbs" / "api"

# Every room may import from these, and each of them from those before it.
BASE = ("checks", "files", "dicom", "workers")
# The other rooms in the order of their notebooks, and which of those before it each may import from.
ROOMS: dict[str, set[str]] = {
    "geometry": set(),
    "volumes": {"geometry"},
    "xrays": {"geometry", "volumes"},
    "kernels": set(),
    "rendering": {"geometry", "volumes", "kernels"},
    "bodies": {"geometry", "volumes", "kernels", "rendering"},
    "physics": {"geometry", "volumes"},
    "compare": {"geometry"},
    "registration": {"geometry", "volumes", "xrays", "kernels", "rendering", "compare"},
    "tracking": set("geometry volumes xrays kernels rendering bodies physics compare registration".split()),
    "reconstruction": {"geometry", "volumes", "kernels", "rendering"},
    "anatomy": {"geometry", "rendering"},
    "show": {"geometry", "volumes", "xrays", "rendering", "bodies", "anatomy"},
    "synthesis": set("geometry volumes xrays kernels rendering bodies physics anatomy show".split()),
    "training": set("geometry volumes xrays kernels rendering physics compare registration synthesis".split()),
    "studies": {"geometry", "volumes", "xrays", "rendering", "registration", "training"},
    "cli": set(
        "geometry volumes xrays kernels rendering bodies physics registration tracking show synthesis studies "
        "training".split()
    ),
}
# What a reader finds in each.
CONTENTS = {
    "checks": "what an argument must be",
    "files": "files that are whole",
    "dicom": "tags and pixels of DICOM files",
    "workers": "tasks of one process or many",
    "geometry": "rotations, poses, cameras, views",
    "volumes": "CTs on their grids",
    "xrays": "real X-rays and data sets",
    "kernels": "line integrals on CPU and GPU",
    "rendering": "renderers, DRR, Jacobian",
    "bodies": "bones, implants and tools",
    "physics": "beam, noise, scatter",
    "compare": "similarity of pictures and poses",
    "registration": "poses from X-rays",
    "tracking": "bodies found in X-rays",
    "reconstruction": "volumes from X-rays",
    "anatomy": "masks of structures",
    "show": "pictures, films, scenes",
    "synthesis": "data sets of synthetic X-rays",
    "training": "networks that tell poses",
    "studies": "X-rays registered by the thousand",
    "cli": "the command line",
}
# The modules of 0.6.1: they re-export names, and nothing imports them.
NAMES_OF_061 = {"data", "detector", "drr", "metrics", "pose", "renderers", "utils", "visualization", "so3", "se3"}

# Who may import what others must not need.
OWNERS = {
    "torchio": {"volumes"},
    "xraydb": {"volumes"},
    "pyvista": {"show"},
    "h5py": {"xrays"},
    "cv2": {"geometry"},
    "pydicom": {"dicom", "volumes", "xrays"},
    "skimage": {"xrays"},
    "panel": {"show"},
    "imageio_ffmpeg": {"show"},
    "numba": {"kernels"},
    "pyarrow": {"synthesis", "studies"},
    "distributed": {"workers"},
    "lightning_fabric": {"training"},
    "tensorboard": {"training"},
    "trimesh": {"bodies"},
    "triton": {"kernels", "show"},
}


def allowed(room: str) -> set[str]:
    "Return the rooms that a room may import from, itself included."
    return set(BASE[: BASE.index(room) + 1]) if room in BASE else {room, *BASE, *ROOMS[room]}


def path_of(module: str) -> Path:
    return PACKAGE / f"{module.replace('.', '/')}.py"


def modules() -> list[str]:
    "Name the modules of the package, as in `kernels.dispatch`, but those that re-export names."
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in sorted(PACKAGE.rglob("*.py")))
    names = (".".join(path.parts) for path in paths if path.name not in ("__init__", "_modidx"))
    return [name for name in names if name not in NAMES_OF_061]


def room_of(module: str) -> str:
    return module.split(".")[0]


def notebook_of(path: Path) -> Path:
    "Find the notebook that a file of the package comes from."
    header = re.search(r"File to edit: (\S+\.ipynb)", path.read_text(encoding="utf-8"))
    if not header:
        raise ValueError(f"{path} is not exported from a notebook")
    return (path.parent / header[1]).resolve()


def number_of(module: str) -> int:
    "Read the number of the notebook that a module comes from."
    return int(notebook_of(path_of(module)).name.split("_")[0])


def door_names(room: str) -> set[str]:
    "Read the names that a room offers from the table in its front door."
    tree = ast.parse((PACKAGE / room / "__init__.py").read_text(encoding="utf-8"))
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(target, ast.Name) and target.id == "NAMES":
            return {name for names in ast.literal_eval(node.value).values() for name in names}
    raise ValueError(f"diffdrr/{room}/__init__.py has no table NAMES")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def import_statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    "Yield the import statements below a node, those in functions, too, but not those for annotations only."
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        yield node
        return
    for child in node.orelse if is_type_checking(node) else ast.iter_child_nodes(node):
        yield from import_statements(child)


def origin_of(node: ast.ImportFrom, module: str) -> str:
    "Return the absolute name of what a `from` statement in a module imports from."
    if not node.level:
        return node.module or ""
    package = ".".join(["diffdrr", *module.split(".")][: -node.level])
    return f"{package}.{node.module}" if node.module else package


def absolute_names(node: ast.Import | ast.ImportFrom, module: str) -> list[str]:
    """List what an import statement may import, by absolute names: `from a import b` may import `a.b`, and surely
    imports `a`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    origin = origin_of(node, module)
    return [origin, *(f"{origin}.{alias.name}" for alias in node.names)]


def needed_libraries(tree: ast.AST) -> set[str]:
    "List the optional libraries that code imports through `checks.need`."
    calls = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "need"
    ]
    return {node.args[0].value for node in calls if node.args and isinstance(node.args[0], ast.Constant)}


def imported_names(source: str, module: str) -> set[str]:
    "Return the absolute names that the source of a module imports."
    tree = ast.parse(source)
    return {name for node in import_statements(tree) for name in absolute_names(node, module)} | needed_libraries(tree)


def past_the_door(source: str, module: str) -> list[str]:
    """List what the source of a module takes from inside other rooms, past their front doors, or without its being
    offered there."""
    found = []
    for node in import_statements(ast.parse(source)):
        taken = (
            [(alias.name, "") for alias in node.names]
            if isinstance(node, ast.Import)
            else [(origin_of(node, module), alias.name) for alias in node.names]
        )
        for origin, name in taken:
            _, _, inside = origin.partition("diffdrr.")
            if not origin.startswith("diffdrr.") or room_of(inside) in (room_of(module), *BASE):
                continue
            if "." in inside:
                found.append(f"{origin}.{name}" if name else origin)
            elif name and inside in ROOMS and (PACKAGE / inside).is_dir() and name not in door_names(inside):
                found.append(f"{origin}.{name}")
    return found
