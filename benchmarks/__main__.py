"The command line: `python -m benchmarks` and `python -m benchmarks sweep`."

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

import torch

from . import machine, parity, peers, ratios, report, scene, sweep, table

RESULTS = Path(__file__).parent / "results"


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure diffdrr beside other packages.")
    parser.add_argument(
        "command",
        nargs="?",
        choices=("table", "sweep"),
        default="table",
        help="all contestants on one picture (default), or sizes and threads",
    )
    parser.add_argument(
        "--ct",
        type=Path,
        default=scene.CT if scene.CT.exists() else None,
        help="the CT to photograph (default: the real chest CT if it is at hand, else the built-in example)",
    )
    parser.add_argument(
        "--contestants",
        nargs="+",
        default=["ours", *peers.PEERS],
        choices=["ours", *peers.PEERS],
        metavar="NAME",
        help="who takes part: %(choices)s",
    )
    parser.add_argument(
        "--environments",
        type=Path,
        default=peers.FOLDER,
        help="where the environments of the others are made (default: %(default)s)",
    )
    parser.add_argument(
        "--results", type=Path, default=RESULTS, help="where the results are written (default: %(default)s)"
    )
    parser.add_argument("--name", help="of this machine, in the names of the files (default: made from its processor)")
    parser.add_argument(
        "--height", type=int, default=200, help="rows and columns of the picture (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=7, help="how often everyone has a turn (default: %(default)s)")
    parser.add_argument(
        "--slow",
        type=float,
        default=3.0,
        metavar="SECONDS",
        help="what takes longer has fewer turns (default: %(default)s)",
    )
    parser.add_argument("--slow-rounds", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument(
        "--limit", type=float, help="seconds after which a task is ended and left out (default: 120; in a sweep 30)"
    )
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of every contestant (default: %(default)s)"
    )
    parser.add_argument(
        "--reference-rays",
        type=int,
        default=2000,
        help="pixels, drawn at random, that are compared with the reference (default: %(default)s)",
    )
    parser.add_argument(
        "--no-extras", action="store_true", help="leave out threads, batches, large pictures and fresh processes"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that workers and scratch files go, too
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    torch.set_num_threads(arguments.threads)
    disagreements = [fault for device in devices for fault in parity.faults(device)]
    if disagreements:
        sys.exit("Nothing is timed, because a backend disagrees with the reference:\n" + "\n".join(disagreements))
    about = machine.describe()
    path = arguments.results / (arguments.name or machine.slug(about))
    if arguments.command == "sweep":
        sweep.run(arguments, about, devices, path.with_name(path.name + "-sweep.csv"))
        return
    options = table.Options(
        contestants=arguments.contestants,
        environments=arguments.environments,
        ct=arguments.ct,
        camera=scene.Camera().resized(arguments.height),
        rounds=arguments.rounds,
        slow=arguments.slow,
        slow_rounds=arguments.slow_rounds,
        limit=arguments.limit or 120.0,
        threads=arguments.threads,
        reference_rays=arguments.reference_rays,
        devices=devices,
        extras=not arguments.no_extras,
    )
    results = table.compare(options)
    measured = table.frame(results)
    measures = ratios.frame(results)
    text = report.as_markdown(options, about, results, measured, measures)
    print("\n" + text)
    for suffix, contents in ((".md", text), (".json", report.as_json(options, about, results, measured, measures))):
        machine.write(path.with_name(path.name + suffix), contents)
        print(f"written to {path.with_name(path.name + suffix)}")


if __name__ == "__main__":
    main()
