"""A plugin of pytest: the GPU kernels are executed on compiled PTX (see `emulator.py`) instead of Triton's interpreter.

Usage: python -m pytest -p tools.gpu.on_ptx tests/test_triton.py"""

from __future__ import annotations

import os

import pytest

from .driver import install
from .emulator import Emulator

EMULATOR = Emulator()
install(EMULATOR)


@pytest.hookimpl(trylast=True)  # after conftest.py, whose hook verifies shapes
def pytest_configure() -> None:
    "Import the kernels while nothing asks for the interpreter."
    os.environ["TRITON_INTERPRET"] = "0"
    from diffdrr.kernels.gpu import frames, siddon, trilinear  # noqa: F401


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    "Say what was executed."
    terminalreporter.write_line(str(EMULATOR))
