"""The built package: what the archives hold, that the wheel works in an environment of its own, and what an import
costs."""

from __future__ import annotations

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffdrr.checks import SOURCE

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffdrr"
IMPORT_NAMES = {
    "imageio-ffmpeg": "imageio_ffmpeg",
    "lightning-fabric": "lightning_fabric",
    "opencv-python-headless": "cv2",
    "pillow": "PIL",
    "scikit-image": "skimage",
    "vtk": "vtkmodules",
}
HEAVY = [
    "torch",
    "torchio",
    "SimpleITK",
    "pandas",
    "scipy",
    "matplotlib",
    "pyvista",
    "timm",
    "xraydb",
    "h5py",
    "skimage",
    "cv2",
    "panel",
    "fastcore",
    "roma",
]
NOT_SOURCES = [
    ".git",
    ".venv",
    ".venv-pose",
    ".cache",
    "_docs",
    "_proc",
    "build",
    "dist",
    "*.egg-info",
    "__pycache__",
    "nbs",
    "tests",
]


def run(*command: str | Path, **kwargs) -> str:
    "Run a command away from the sources, and return what it prints."
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **kwargs)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def settings() -> configparser.SectionProxy:
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "Build the source archive, and the wheel from it; return their folder."
    folder = tmp_path_factory.mktemp("package")
    shutil.copytree(ROOT, folder / "source", ignore=shutil.ignore_patterns(*NOT_SOURCES))
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist", folder / "source")
    return folder / "dist"


@pytest.fixture(scope="module")
def wheel(archives: Path) -> Path:
    (path,) = archives.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into a new environment, which borrows the dependencies from this one; return its scripts'
    folder."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    scheme = {"base": str(folder), "platbase": str(folder)}
    site_packages = Path(sysconfig.get_path("purelib", scheme="venv", vars=scheme))
    (site_packages / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    scripts = Path(sysconfig.get_path("scripts", scheme="venv", vars=scheme))
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        scripts / "python",
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
    )
    return scripts


def test_wheel_holds_the_package(wheel: Path):
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert "diffdrr/py.typed" in sources
    assert {name for name in names if name.startswith("diffdrr/")} == sources
    assert {name.split("/")[0] for name in names - sources} == {f"{'-'.join(wheel.name.split('-')[:2])}.dist-info"}


def test_source_archive_can_be_built(archives: Path):
    (path,) = archives.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"settings.ini", "setup.py", "pyproject.toml", "README.md", "LICENSE", "diffdrr/py.typed"} <= names


def test_metadata(wheel: Path, settings: configparser.SectionProxy):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(name).decode()
    lines = metadata.splitlines()
    assert f"Version: {settings['version']}" in lines
    assert f"Requires-Python: >={settings['min_python']}" in lines
    assert {line.split(": ")[1] for line in lines if line.startswith("Provides-Extra")} == {
        "viz",
        "pose",
        "physics",
        "datasets",
        "xray",
        "view",
        "mesh",
        "data",
        "cluster",
        "train",
        "dev",
        "all",
    }
    plain = [line for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert len(plain) == len(settings["requirements"].split())
    assert not any("==" in line for line in plain), "the package pins what it needs"


def test_versions_agree(settings: configparser.SectionProxy):
    assert f'__version__ = "{settings["version"]}"' in (PACKAGE / "__init__.py").read_text()
    assert f"version: {settings['version']}\n" in (ROOT / "CITATION.cff").read_text()
    assert settings["version"] in (ROOT / "CHANGELOG.md").read_text()


def test_installed_package_is_the_wheel(environment: Path, tmp_path: Path):
    where = run(environment / "python", "-c", "import diffdrr; print(diffdrr.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(environment.parent)


def test_command_line(environment: Path, tmp_path: Path):
    assert "render" in run(environment / "diffdrr", "--help", cwd=tmp_path)


def loaded_by(statement: str, environment: Path, folder: Path) -> set[str]:
    "Return which heavy libraries a statement loads in a new process."
    code = f"import json, sys\n{statement}\nprint(json.dumps([name for name in {HEAVY} if name in sys.modules]))"
    return set(json.loads(run(environment / "python", "-c", code, cwd=folder).splitlines()[-1]))


def test_import_loads_nothing_heavy(environment: Path, tmp_path: Path):
    assert loaded_by("import diffdrr", environment, tmp_path) == set()


def test_rendering_loads_only_what_it_needs(environment: Path, tmp_path: Path):
    loaded = loaded_by("from diffdrr.drr import DRR", environment, tmp_path)
    assert "torch" in loaded
    assert not loaded & {"torchio", "SimpleITK", "pandas", "matplotlib", "pyvista", "timm", "xraydb"}


def test_visualization_and_data_load_no_extras(environment: Path, tmp_path: Path):
    loaded = loaded_by(
        "import diffdrr.visualization, diffdrr.data, diffdrr.xrays.datasets, diffdrr.registration.pipeline, "
        "diffdrr.show.explorer, diffdrr.cli",
        environment,
        tmp_path,
    )
    assert not loaded & {"pyvista", "timm", "xraydb", "h5py", "skimage", "cv2"}


def required_names(settings: configparser.SectionProxy) -> set[str]:
    "Return the names in all requirements, without versions, the extras' included but those of development not."
    fields = [
        "requirements",
        *(name for name in settings if name.endswith("_requirements") and name != "dev_requirements"),
    ]
    requirements = " ".join(settings[field] for field in fields).split()
    names = {requirement.translate(str.maketrans("<>=!~", "     ")).split()[0] for requirement in requirements}
    return {IMPORT_NAMES.get(name, name) for name in names}


def test_imports_are_required(settings: configparser.SectionProxy):
    imported = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.split(".")[0])
            elif (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) == "need"
                and isinstance(node.args[0], ast.Constant)
            ):
                imported.add(node.args[0].value.split(".")[0])
    brought = {"triton", "dask", "tornado"}  # by torch for CUDA, and by distributed
    third_party = imported - set(sys.stdlib_module_names) - {"diffdrr"} - brought
    assert third_party <= required_names(settings), "settings.ini does not name all that the package imports"


BY_HAND = re.compile(r"pip install\b[^\n]*?[\s'\"]diffdrr\b(?!==)|['\"]diffdrr\[|pip install ['\"]?\.\[")


def written_lines() -> Iterator[tuple[str, str]]:
    "List the lines of pages, messages, tools and workflows, with the names of their files."
    for path in (ROOT / "nbs").rglob("*.ipynb"):
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            yield from ((path.name, line) for line in "".join(cell["source"]).splitlines())
    places = ("diffdrr/**/*.py", "tools/*.py", "benchmarks/**/*.py", ".github/**/*.yml", "*.md", "Makefile")
    for path in (path for place in places for path in ROOT.glob(place)):
        yield from ((path.name, line) for line in path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize(
    "line",
    ["pip install diffdrr", "pip install -U 'diffdrr[viz]'", "see 'diffdrr[viz]'", "pip install '.[viz]'"],
)
def test_an_install_line_by_hand_is_found(line: str):
    assert BY_HAND.search(line)


def test_install_lines_come_from_one_place():
    made = {"README.md"}  # from the index page, which prints them
    allowed = {"010_checks.ipynb", "checks.py", *made}  # say what it is, and test it
    by_hand = [f"{name}: {line}" for name, line in written_lines() if name not in allowed and BY_HAND.search(line)]
    assert not by_hand, by_hand
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert {line for line in readme.splitlines() if BY_HAND.search(line)} == {f"pip install '{SOURCE}[physics,xray]'"}
    assert f"\npip install {SOURCE}\n" in readme


def test_the_page_lists_the_extras(settings: configparser.SectionProxy):
    there = {name.removesuffix("_requirements") for name in settings if name.endswith("_requirements")}
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (listed,) = (line for line in readme.splitlines() if line.startswith("Extras bring"))
    assert set(re.findall(r"`\[(\w+)\]`", listed)) == there - {"dev"} | {"all"}


def test_compiled_code_does_not_outlive_the_package():
    "Files beside it would stay when it is uninstalled, in a folder that Python takes for the package."
    from diffdrr.kernels import compiled_folder

    assert not compiled_folder().is_relative_to(PACKAGE)
