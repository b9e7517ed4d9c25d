"""Collect the notebooks under nbs/ as tests: each runs as `nbdev_test` runs it, on its own definitions."""

from __future__ import annotations

import atexit
import contextlib
import gc
import io
import locale
import os
import sys
from collections.abc import Iterable
from pathlib import Path

# Before a notebook imports them: figures without a window, threads for the cores there are.
os.environ.setdefault("MPLBACKEND", "agg")
os.environ.setdefault("OMP_NUM_THREADS", str(min(4, os.cpu_count() or 1)))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the GPU kernels run in Triton's interpreter

import nbdev.test
import pytest
import pyviz_comms  # noqa: F401  panel's, which asks once, when it is imported, whether there is an IPython shell
from IPython.core.interactiveshell import InteractiveShell
from nbdev.config import get_config
from nbdev.test import test_nb as run_notebook

from tools import shapes

ROOT = Path(__file__).parent
NOTEBOOKS = ROOT / "nbs"
LOCALE = locale.setlocale(locale.LC_ALL)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--nb-flags", default="", help="run notebook cells with these flags, too, such as 'slow cuda'")
    parser.addoption("--no-shapes", action="store_true", help="do not verify the shapes in annotations")


def pytest_configure(config: pytest.Config) -> None:
    """Share the cores among the workers of pytest-xdist (`-n`), and have the shapes in annotations verified, in the
    package and in what notebooks define."""
    config.addinivalue_line("markers", "slow: runs where --nb-flags has the word slow")
    workers = config.getoption("numprocesses", None)  # known to the process that starts them: they inherit what it sets
    if workers:
        share = max(1, (os.cpu_count() or 1) // workers)
        os.environ["OMP_NUM_THREADS"] = str(min(share, int(os.environ["OMP_NUM_THREADS"])))
    if not config.getoption("--no-shapes"):
        shapes.install()
        nbdev.test.CaptureShell = shapes.verifying_shell(nbdev.test.CaptureShell)


def pytest_collect_file(parent: pytest.Collector, file_path: Path) -> pytest.File | None:
    "Collect a notebook, unless it lies in a hidden or a generated folder."
    if file_path.suffix != ".ipynb" or not file_path.is_relative_to(ROOT):
        return None
    if any(part.startswith((".", "_")) for part in file_path.relative_to(ROOT).parts):
        return None
    return NotebookFile.from_parent(parent, path=file_path)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip slow tests that are not asked for: by a flag, or a page by its name. The notebook of a module leaves out its
    slow cells, and runs."""
    if "slow" in config.getoption("--nb-flags").split():
        return
    named = {Path(config.invocation_params.dir, argument.partition("::")[0]).resolve() for argument in config.args}
    for item in items:
        runs = isinstance(item, NotebookItem) and (is_module(item.path) or item.path in named)
        if item.get_closest_marker("slow") and not runs:
            item.add_marker(pytest.mark.skip(reason="slow: make slow, or pytest --nb-flags slow"))


def is_module(path: Path) -> bool:
    "Tell the notebook of a module, or the one that the README is made from, from a page to read."
    return path.is_relative_to(NOTEBOOKS / "api") or path == NOTEBOOKS / "index.ipynb"


def pytest_collection_finish() -> None:
    """Leave what the tests have imported, which stays, out of the searches for garbage: these took a fifth of the
    time."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # so that Python, which ends, frees everything


def pytest_runtest_teardown() -> None:
    """Put the locale back: SimpleITK leaves that of C behind when it writes DICOM files, in which other libraries
    cannot read their own files, if they are imported for the first time."""
    locale.setlocale(locale.LC_ALL, LOCALE)


class NotebookError(Exception):
    "A notebook failed; the message is its traceback."


class NotebookFile(pytest.File):
    def collect(self) -> Iterable[pytest.Item]:
        item = NotebookItem.from_parent(self, name=self.path.stem)
        if not is_module(self.path) or '"#| slow' in self.path.read_text(encoding="utf-8"):
            item.add_marker("slow")
        yield item


class NotebookItem(pytest.Item):
    "The run of a notebook, without the cells whose flags are in `tst_flags` of settings.ini."

    def runtest(self) -> None:
        config = get_config(path=ROOT)
        wanted = self.config.getoption("--nb-flags").split()
        errors = io.StringIO()
        torch.manual_seed(0)
        with contextlib.redirect_stderr(errors):
            passed, _ = run_notebook(self.path, skip_flags=config.tst_flags.split(), force_flags=wanted, basepath=ROOT)
        clean_up()
        if not passed:
            raise NotebookError(errors.getvalue())

    def repr_failure(self, excinfo: pytest.ExceptionInfo, style: str | None = None) -> str:
        "Show the notebook's traceback instead of the one that leads here."
        if isinstance(excinfo.value, NotebookError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Path, int, str]:
        return self.path, 0, f"notebook {self.path.relative_to(ROOT)}"


def clean_up() -> None:
    """Free what a notebook left: its figures and its names, and the shell, which IPython keeps until Python ends, and
    which the next shell would keep as the main module before it."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot:
        pyplot.close("all")
    shell, InteractiveShell._instance = InteractiveShell._instance, None
    atexit.unregister(shell.atexit_operations)
    shell.restore_sys_module_state()
    shell.user_ns.clear()  # what else refers to the shell may stay
    del shell
    gc.collect()
    gc.freeze()  # what it has imported stays
