"""What GitHub runs and asks: workflows that call what there is, and an issue template that asks for the right
command."""

from __future__ import annotations

import configparser
import re
from pathlib import Path

import pytest
import yaml

from diffdrr.cli import COMMANDS

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def load(path: Path) -> dict:
    "Read a YAML file; the key `on` is a truth value in YAML."
    read = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {"on" if key is True else key: value for key, value in read.items()}


def steps(workflow: dict) -> list[dict]:
    "List the steps of all jobs."
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_run_targets_that_there_are(path: Path):
    workflow = load(path)
    assert workflow["on"] and workflow["permissions"] == {"contents": "read"}
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    called = {step["run"].split()[1] for step in steps(workflow) if step.get("run", "").startswith("make ")}
    assert called <= targets, called - targets


def test_tests_run_on_each_python_from_the_oldest():
    config = configparser.ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    (job,) = (job for job in load(ROOT / ".github/workflows/test.yml")["jobs"].values() if "strategy" in job)
    assert job["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13"]
    assert job["strategy"]["matrix"]["python"][0] == config["DEFAULT"]["min_python"]
    assert "make test PYTHON=python" in [step.get("run") for step in job["steps"]]


def test_continuous_integration_runs_all_that_ci_run_does():
    wanted = set(re.findall(r"^make (\w+)", (ROOT / ".ci/run").read_text(encoding="utf-8"), re.MULTILINE))
    called = {step.get("run", "") for step in steps(load(ROOT / ".github/workflows/test.yml"))}
    assert wanted and wanted <= {command.split()[1] for command in called if command.startswith("make ")}


def test_a_release_is_published_without_a_password():
    publish = load(ROOT / ".github/workflows/release.yml")["jobs"]["publish"]
    assert publish["permissions"] == {"id-token": "write"} and publish["environment"]["name"] == "pypi"
    assert "secrets." not in (ROOT / ".github/workflows/release.yml").read_text(encoding="utf-8")
    version = re.search(r"^version = (\S+)$", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.MULTILINE)
    assert version, "the workflow compares this line with the tag"


def test_reports_of_errors_hold_what_doctor_prints():
    fields = load(ROOT / ".github/ISSUE_TEMPLATE/bug.yml")["body"]
    (asked,) = (field for field in fields if "diffdrr doctor" in field["attributes"].get("label", ""))
    assert asked["validations"]["required"] and "doctor" in COMMANDS


def test_demo_says_what_to_do_next():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    said = re.search(r"^define WHAT_NEXT\n(.*?)^endef", makefile, re.DOTALL | re.MULTILINE)[1]
    commands = re.findall(r"diffdrr (\w+)", said)
    assert "drr.png" in said and len(commands) >= 4 and set(commands) <= set(COMMANDS)
    assert re.search(r"^demo:.*\n(\t.*\n)*\t.*WHAT_NEXT", makefile, re.MULTILINE)
