"""Run commands for the pages of the command line, as a terminal shows them."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from pathlib import Path

from diffdrr.cli import main
from tools.rooms import ROOT

PROGRESS = re.compile(r"[^\r\n]*\d+%\|[^\r\n]*[\r\n]*")  # a bar of tqdm


def terminal(
    command: str,  # such as "diffdrr render -o drr.png"
    folder: Path,  # to run it in
) -> None:
    "Run a command, and print it with what it prints, without progress. Paths are shown as below a home folder."
    name, *arguments = shlex.split(command)
    if name != "diffdrr":
        raise ValueError(f"command must begin with diffdrr, not {name!r}")
    printed = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            main(arguments)
        except SystemExit as end:
            if isinstance(end.code, str):  # what Python itself would print
                printed.write(end.code)
    text = PROGRESS.sub("", printed.getvalue())
    for path, shown in ((folder.resolve(), "/home/you"), (ROOT, "/home/you/diffdrr"), (Path.home(), "/home/you")):
        text = text.replace(str(path), shown)
    print(f"$ {command}\n{text.strip()}")
