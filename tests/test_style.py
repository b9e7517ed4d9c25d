"""The rules of the house hold (see tools/house.py)."""

from __future__ import annotations

import ast
import json
import subprocess
import sys

import pytest

from tools import house

HOUSE = house.House(house.ROOT)


def test_rules():
    broken = {rule: lines for rule, lines in house.broken_rules(HOUSE).items() if lines}
    assert not broken, "\n".join(f"{rule}:\n  " + "\n  ".join(lines) for rule, lines in broken.items())


def test_excuses_are_needed():
    assert not house.stale_excuses(HOUSE)


@pytest.mark.parametrize(
    ("line", "long"),
    [("x = 1  # " + "a" * 130, False), ("x = [" + "1, " * 60 + "]", True), ('url = "' + "a" * 130 + '"', False)],
)
def test_a_comment_may_reach_further(line: str, long: bool):
    assert house.too_long_a_line(line) == long


def test_measures_are_numbers():
    assert all(isinstance(value, int) for value in house.measures(HOUSE).values())


def test_classes_in_annotations_are_imported():
    "A notebook may import a class for its tests only; its module, which has no tests, needs it too."
    texts = {path: path.read_text(encoding="utf-8") for path in (house.ROOT / "diffdrr").rglob("*.py")}
    classes = {node.name for text in texts.values() for node in ast.parse(text).body if isinstance(node, ast.ClassDef)}
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821", "--output-format", "json"]
    found = subprocess.run([*command, "diffdrr"], cwd=house.ROOT, capture_output=True, text=True)
    undefined = {(one["filename"], one["message"].split("`")[1]) for one in json.loads(found.stdout)}  # also shapes
    assert not [(path, name) for path, name in undefined if name in classes]
