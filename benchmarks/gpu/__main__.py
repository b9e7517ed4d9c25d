"""One command on one card: the checks that need a GPU, then times beside what the model says, in under ten minutes.

It needs torch and Triton, and pytest for one of the checks. Without a card it does the same on tiny sizes, in Triton's
interpreter."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton

from diffdrr.kernels import dispatch  # noqa: E402

from .. import machine  # noqa: E402
from . import checks, peers, report, table  # noqa: E402

SECTIONS = (*checks.CHECKS, "table", "peers")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, metavar="SECTION", help="%(choices)s")
    parser.add_argument("--minutes", type=float, default=9.5, help="for all of it (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parents[1] / "results", help="where to write")
    parser.add_argument("--no-report", action="store_true", help="write no file")
    return parser.parse_args()


def main() -> None:
    chosen, start = parse(), time.monotonic()
    if DEVICE == "cpu":
        dispatch.DEVICES["triton"] = "cpu"
    about = machine.describe()
    found = dict(machine=about, versions=report.versions(), checks=[], rows=[], left_out=0, peers=[], missing={})
    for name in checks.CHECKS:
        if name in chosen.only:
            found["checks"].append(checks.make(name, DEVICE))
            print("{check}: {outcome}, {seconds:.0f} s: {text}".format(**found["checks"][-1]), flush=True)
    if "peers" in chosen.only:
        found["peers"], found["missing"] = peers.run(DEVICE)
    if "table" in chosen.only:
        until = start + 60 * chosen.minutes
        found["rows"], found["left_out"] = table.run(DEVICE, DEVICE == "cpu", until)
    found["seconds"] = time.monotonic() - start
    text = report.as_markdown(found)
    print("\n" + text)
    if not chosen.no_report:
        path = chosen.results / f"{machine.slug(about)}-gpu.md"
        machine.write(path, text)
        machine.write(path.with_suffix(".json"), report.as_json(found))
    faults = [row for row in found["rows"] if row["fault"]]
    sys.exit(any(check["outcome"] == "FAILED" for check in found["checks"]) or bool(faults))


if __name__ == "__main__":
    main()
