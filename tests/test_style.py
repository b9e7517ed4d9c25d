"""The rules of the house hold (see tools/house.py)."""

from __future__ import annotations

import pytest

from tools import house

HOUSE = house.House(house.ROOT)
BROKEN = house.broken_rules(HOUSE)


@pytest.mark.parametrize("rule", BROKEN)
def test_rule(rule: str):
    assert not BROKEN[rule], f"{rule}:\n  " + "\n  ".join(BROKEN[rule])


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
