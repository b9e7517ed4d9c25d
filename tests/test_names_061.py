"""What programs written for diffdrr 0.6.1 lean on: its names where they were, with their signatures, and its pickles.

`fixtures/interface_061.json` holds facts about the real package: each name that a module of 0.6.1 had, its
parameters with their defaults, and whether `__all__` listed it. Names that a module had only because it imported
them are "borrowed".
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import pickle
from pathlib import Path

import pytest
import torch

from diffdrr import pose as pose_module

FIXTURES = Path(__file__).parent / "fixtures"
INTERFACE: dict[str, dict[str, dict]] = json.loads((FIXTURES / "interface_061.json").read_text(encoding="utf-8"))
STARS = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}

# Differences on purpose, each with its reason.
EXCUSED = {
    ("registration", "DRR"): "the front door of a room offers names of its own",
    ("registration", "RigidTransform"): "the front door of a room offers names of its own",
    ("registration", "convert"): "the front door of a room offers names of its own",
}
NAMES = [(module, name) for module, names in INTERFACE.items() for name in names if (module, name) not in EXCUSED]
CALLED = [(module, name) for module, name in NAMES if "parameters" in INTERFACE[module][name]]


def find(module: str, name: str) -> object:
    return getattr(importlib.import_module(f"diffdrr.{module}"), name)


def parameters_of(function: object) -> dict[str, str | None]:
    """Return the parameters of a function with the text of their defaults, None without one; names of stars with their
    stars."""
    parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "self"]
    return {STARS.get(p.kind, "") + p.name: None if p.default is p.empty else repr(p.default) for p in parameters}


def differences(theirs: list[list[str]], ours: dict[str, str | None], name: str) -> list[str]:
    "Say which calls that were right for 0.6.1 are not understood alike now."
    found = []
    names = list(ours)
    positional = [parameter for parameter, *_ in theirs if not parameter.startswith("*")]
    if names[: len(positional)] != positional and "*args" not in names:
        found.append(f"{name} takes {', '.join(names)} and not first {', '.join(positional)}")
    for parameter, *default in theirs:
        if parameter.startswith("*"):
            continue
        if parameter not in ours:
            if "**kwargs" not in ours:
                found.append(f"{name} has no parameter {parameter}")
        elif [ours[parameter]] != (default or [None]) and not (not default and ours[parameter] is not None):
            found.append(
                f"{name} has {parameter}={ours[parameter]}, and had "
                f"{parameter}={default[0] if default else '(required)'}"
            )
    new = [
        parameter
        for parameter, default in ours.items()
        if default is None and not parameter.startswith("*") and parameter not in [p for p, *_ in theirs]
    ]
    return found + [f"{name} asks for {parameter}, which 0.6.1 had not" for parameter in new]


def test_differences_are_found():
    theirs = [["a"], ["b", "1"], ["c", "None"]]
    assert differences(theirs, {"a": None, "b": "1", "c": "None", "d": "2"}, "f") == []
    assert differences(theirs, {"a": None, "c": "None", "b": "1"}, "f") == ["f takes a, c, b and not first a, b, c"]
    assert differences(theirs, {"a": None, "b": "2", "c": "None"}, "f") == ["f has b=2, and had b=1"]
    assert differences(theirs, {"a": None, "b": "1", "c": "None", "d": None}, "f") == [
        "f asks for d, which 0.6.1 had not"
    ]
    assert "f has no parameter c" in differences(theirs, {"a": None, "b": "1"}, "f")


@pytest.mark.parametrize("module", INTERFACE)
def test_modules_list_what_they_listed(module: str):
    listed = {name for name, facts in INTERFACE[module].items() if facts.get("listed")}
    assert listed <= set(importlib.import_module(f"diffdrr.{module}").__all__)


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_name_is_where_it_was(module: str, name: str):
    facts, ours = INTERFACE[module][name], find(module, name)
    if facts["kind"] == "value":
        theirs = ast.literal_eval(facts["value"])
        assert ours == theirs or list(ours) == theirs, ours
    elif facts["kind"] == "class":
        assert inspect.isclass(ours)
    elif facts["kind"] == "function":
        assert callable(ours)


@pytest.mark.parametrize(("module", "name"), CALLED)
def test_calls_are_understood_as_they_were(module: str, name: str):
    facts, ours = INTERFACE[module][name], find(module, name)
    wrong = differences(facts["parameters"], parameters_of(ours.__init__ if inspect.isclass(ours) else ours), name)
    for method, theirs in facts.get("methods", {}).items():
        if not hasattr(ours, method):
            wrong.append(f"{name} has no method {method}")
        else:
            wrong += differences(theirs, parameters_of(getattr(ours, method)), f"{name}.{method}")
    wrong += [
        f"{name} has no attribute {attribute}"
        for attribute in facts.get("properties", [])
        if not hasattr(ours, attribute)
    ]
    assert not wrong, "\n".join(wrong)


def read_pickle(name: str) -> object:
    return pickle.loads((FIXTURES / name).read_bytes())


def test_a_pose_that_061_wrote():
    pose = read_pickle("pose_061.pkl")
    expected = pose_module.convert(
        torch.tensor([[0.1, 0.2, -0.1]]),
        torch.tensor([[1.0, 60.0, -2.0]]),
        parameterization="euler_angles",
        convention="ZXY",
    )
    assert isinstance(pose, pose_module.RigidTransform)
    torch.testing.assert_close(pose.matrix, expected.matrix)
    torch.testing.assert_close(pose.compose(pose.inverse()).matrix, torch.eye(4)[None], atol=1e-4, rtol=0)


def test_a_drr_that_061_wrote():
    written = read_pickle("drr_061.pkl")
    drr, pose = written["drr"], read_pickle("pose_061.pkl")
    torch.testing.assert_close(drr(pose), written["picture"], atol=1e-4, rtol=1e-4)
    assert (drr.detector.sdd, drr.detector.delx, drr.detector.x0) == (120.0, 2.0, 0.5)
