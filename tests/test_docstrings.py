"""What parameters mean is in the docstrings of front-door names, so that `help()` shows it, and the website draws
tables from it."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields

import pytest
from fastcore.docments import docments

import diffdrr
from diffdrr.cli import COMMANDS
from tools.docs_renderer import TableRenderer, split_docstring

NAMES = sorted({name for rooms in diffdrr.NAMES.values() for names in rooms.values() for name in names})


def project(points, camera=None, *args, **options):
    """Project points.

    More prose.

    Args:
        points: world coordinates,
            mm
        camera: the one to use: `None` for any
        **options: others

    Returns:
        pixels, from
        the upper left
    """


def test_sections_are_read():
    prose, meanings = split_docstring(project)
    assert prose == "Project points.\n\nMore prose."
    assert meanings == {
        "points": "world coordinates, mm",
        "camera": "the one to use: `None` for any",
        "options": "others",
        "return": "pixels, from the upper left",
    }


def test_the_website_draws_a_table():
    page = TableRenderer(project)._repr_markdown_()
    assert "| `points` |" in page and "world coordinates, mm" in page and "Args:" not in page


def functions_of(name: str) -> list[tuple[str, object]]:
    "List a front-door function, or a class and its public methods."
    value = getattr(diffdrr, name)
    if not inspect.isclass(value):
        return [(name, value)] if inspect.isroutine(value) else []
    methods = [
        (f"{name}.{key}", member)
        for key, member in vars(value).items()
        if not key.startswith("_") and inspect.isfunction(member)
    ]
    return [(name, value), *methods]


def explains_itself(parameter: inspect.Parameter) -> bool:
    """Say whether name and annotation say all: one object of the package, a tensor with its shape, or a number of
    things."""
    annotation = str(parameter.annotation)
    return (
        re.fullmatch(r"[A-Z]\w+", annotation) is not None or "Tensor," in annotation or parameter.name.startswith("n_")
    )


@pytest.mark.parametrize("name", NAMES)
def test_help_says_what_each_parameter_is(name: str):
    missing = []
    for label, function in functions_of(name):
        if inspect.isclass(function) and "__init__" not in vars(function):
            continue  # its parameters are those of another class
        parameters = [p for p in inspect.signature(function).parameters.values() if p.name not in ("self", "cls")]
        meanings = split_docstring(function)[1]
        missing += [f"{label}({p.name})" for p in parameters if p.name not in meanings and not explains_itself(p)]
    assert not missing, f"no meaning in the docstring of {', '.join(missing)}"


@pytest.mark.parametrize("command", COMMANDS)
def test_options_of_a_command_have_help(command: str):
    "It is the comment beside each option, on its line."
    _, options = COMMANDS[command]
    missing = [field.name for field in fields(options) if not docments(options)[field.name]]
    assert not missing, f"no help for {', '.join(missing)}"
