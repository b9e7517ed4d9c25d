"""Check that everything generated agrees with the notebooks, and that the website builds and is sound.

Usage: python -m tools.check"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path


def run(*command: str) -> str:
    "Run a command and return what it prints; stop with that if it fails."
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    if result.returncode:
        sys.exit(f"FAILED: {' '.join(command)}\n{result.stdout}")
    return result.stdout.strip()


def fingerprint() -> dict[str, str]:
    "Return a digest of each file that git tracks or would track."
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
    paths = [Path(name) for name in names if name]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths if path.is_file()}


def unchanged_by(what: str, *command: str) -> None:
    "Run a command that must leave every file as it is."
    before = fingerprint()
    run(*command)
    after = fingerprint()
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        sys.exit(f"FAILED: {what} changes {', '.join(changed)}; look at the change and commit it")
    print(f"ok: {what} changes no file", flush=True)


def main() -> None:
    python = sys.executable
    for command in ("nbdev_export", "nbdev_clean"):
        unchanged_by(command, str(Path(python).with_name(command)))
    ruff = str(Path(python).with_name("ruff"))
    run(ruff, "check", ".")
    run(ruff, "format", "--check", ".")
    print("ok: ruff has nothing to say", flush=True)
    run(python, "-m", "tools.house")
    print("ok: the rules of the house hold", flush=True)
    run(python, "-m", "tools.map", "--check")
    print("ok: the map of the house is that of tools/rooms.py", flush=True)
    run(python, "-m", "tools.readme", "--check")
    print("ok: README.md is what the index notebook makes", flush=True)
    print("ok:", run(python, "-m", "tools.docs"), flush=True)
    print("ok:", run(python, "-m", "tools.check_site", "_docs"), flush=True)


if __name__ == "__main__":
    main()
