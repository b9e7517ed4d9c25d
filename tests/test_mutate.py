"""The lines that `python -m tools.mutate` breaks are still there."""

from __future__ import annotations

import ast
import json

import pytest

from tools.mutate import MUTANTS, ROOT, Mutant, broken, run_tests


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.notebook}-{mutant.old}")
def test_a_line_is_broken_in_the_notebook_and_in_the_module(mutant: Mutant):
    texts = broken(mutant)
    module = next(path for path in texts if path.suffix == ".py")
    ast.parse(texts[module])
    sources = "".join(text for cell in json.loads(texts[mutant.path])["cells"] for text in cell["source"])
    for path, text in ((module, texts[module]), (mutant.path, sources)):
        assert mutant.new in text and mutant.old not in text, path
    assert all((ROOT / place).exists() for place in mutant.tests)


def test_a_line_that_was_rewritten_is_named():
    with pytest.raises(ValueError, match="must stand once in .*412_march.ipynb .*has it been rewritten"):
        broken(Mutant("kernels/cpu/412_march", "no such line", "", ()))


def test_a_crash_is_caught(tmp_path):
    (tmp_path / "test_it.py").write_text("import os\n\ndef test_it():\n    os.abort()\n")
    assert run_tests(tmp_path, ("test_it.py",)) == "test_it.py, ended by SIGABRT"
