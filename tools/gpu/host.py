"""The host's side of every launch, for real: Triton binds, specialises, compiles and caches; only the GPU is missing.

Usage: python -m tools.gpu.host [--arch 90] [--triton 3.4.0 newest]

With `--triton`, each version is installed into a folder of its own outside of the repository and used from there."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDER = Path.home() / ".cache" / "diffdrr" / "triton"
OLDEST = "3.4.0"  # what `diffdrr.kernels.gpu.launch` asks for


def try_calls(arch: int, only: str) -> dict[str, str]:  # what went wrong, by call; "" for nothing
    "Make calls for an architecture."
    from .driver import Launch, install

    launches: list[Launch] = []
    install(launches.append, arch)
    from .calls import calls

    found = {}
    for name, call in calls().items():
        if only in name:
            launches.clear()
            try:
                call()
                found[name] = "" if launches else "nothing was launched"
            except Exception as error:  # whatever it is, the other calls are of interest
                said = str(error).strip().splitlines() or [""]  # a compiler says the reason last
                found[name] = f"{type(error).__name__}: {said[-1]}"
    return found


def folder_of(version: str) -> Path:
    "Install a version of Triton into a folder of its own, unless it is there."
    folder = FOLDER / version
    if not folder.exists() or version == "newest":
        wanted = "triton" if version == "newest" else f"triton=={version}"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        subprocess.run([*pip, "--upgrade", "--target", str(folder), wanted], check=True)
    return folder


def try_version(version: str, arch: int, only: str) -> int:  # exit status
    "Make all calls with another version of Triton."
    path = os.pathsep.join([str(folder_of(version)), str(ROOT)])
    environment = os.environ | {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(FOLDER / "cache" / version)}
    command = [sys.executable, "-m", "tools.gpu.host", "--arch", str(arch), "--only", only]
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu.host", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", type=int, default=90, help="compute capability times ten (default: %(default)s)")
    parser.add_argument("--only", default="", help="only calls whose name has this text")
    parser.add_argument("--triton", nargs="+", default=[], metavar="VERSION", help=f"such as {OLDEST}, or newest")
    chosen = parser.parse_args()
    if chosen.triton:
        sys.exit(max(try_version(version, chosen.arch, chosen.only) for version in chosen.triton))
    start = time.perf_counter()
    found = try_calls(chosen.arch, chosen.only)
    import triton

    faults = [f"{name}: {fault}" for name, fault in found.items() if fault]
    about = f"Triton {triton.__version__}, sm_{chosen.arch}, {time.perf_counter() - start:.0f} s"
    print(f"{about}: {len(faults)} faults in {len(found)} calls")
    sys.exit("\n".join(faults) or 0)


if __name__ == "__main__":
    main()
