"""Run notebooks again in place and keep their outputs.

Cells with `#| eval: false` or with a test flag of settings.ini, such as `#| slow`, are not run and keep the outputs
they have. A notebook that fails stays as it was.

Usage: python -m tools.nbrun [--flags FLAGS] NOTEBOOK...
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from pathlib import Path

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import nbdev_clean
from nbdev.config import get_config
from nbdev.process import NBProcessor


def is_skipped(
    cell,  # processed cell
    flags: set[str],  # test flags whose cells are not run
) -> bool:
    "Tell whether a cell is not to be run."
    directives = getattr(cell, "directives_", None) or {}
    never = directives.get("eval:", [""])[0].lower() == "false"
    return cell.cell_type != "code" or "nbdev_export(" in cell.source or never or bool(flags & directives.keys())


def run(
    path: Path,  # notebook
    flags: set[str],  # test flags whose cells are not run
) -> dict[str, list]:  # outputs of each cell that was run, by its id
    "Run a notebook from its own folder."
    notebook = NBProcessor(path, process=True).nb
    for cell in notebook.cells:
        if not is_skipped(cell, flags):
            cell.outputs = []  # a cell that prints nothing any more would keep what it printed before
    shell = CaptureShell(path)
    with contextlib.chdir(path.parent):
        try:
            shell.run_all(notebook, exc_stop=True, preproc=lambda cell: is_skipped(cell, flags))
        except Exception:
            sys.exit(f"{path.name} fails and stays as it was:\n{shell.prettytb(fname=path)}")
    return {cell.id: cell.outputs for cell in notebook.cells if not is_skipped(cell, flags)}


def store(path: Path, outputs: dict[str, list]) -> None:
    "Write outputs into a notebook, and clean it."
    notebook = read_nb(path)
    for cell in notebook.cells:
        if cell.id in outputs:
            cell.outputs = outputs[cell.id]
    partial = path.with_suffix(".partial")
    write_nb(notebook, partial)
    partial.replace(path)
    nbdev_clean(path)


def main() -> None:
    config = get_config()
    parser = argparse.ArgumentParser(description="Run notebooks again in place and keep their outputs.")
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--flags", default="", help="run cells with these flags, too, such as 'slow cuda'")
    arguments = parser.parse_args()
    os.environ.setdefault("MPLBACKEND", "agg")
    sys.path.insert(0, str(config.config_path))
    skipped = set(config.tst_flags.split()) - set(arguments.flags.split())
    for path in arguments.notebooks:
        start = time.perf_counter()
        store(path, run(path.absolute(), skipped))
        print(f"{path}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
