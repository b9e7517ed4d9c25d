"""The benchmark times nothing that computes something else than the reference."""

from __future__ import annotations

import pytest

from benchmarks import parity
from diffdrr.kernels.cpu import siddon as numba_siddon
from diffdrr.kernels.cpu import trilinear as numba_trilinear


def test_backends_pass():
    assert parity.faults("cpu") == []


@pytest.mark.parametrize("kernel", [numba_siddon, numba_trilinear])
@pytest.mark.parametrize("what", ["render_with_slopes", "backproject"])
def test_a_backend_that_is_off_is_found(kernel, what, monkeypatch):
    right = getattr(kernel, what)

    def wrong(*args, **options):
        result = right(*args, **options)
        return (result[0], result[1] * 1.001) if isinstance(result, tuple) else result * 1.001

    monkeypatch.setattr(kernel, what, wrong)
    assert any("off by" in fault for fault in parity.faults("cpu"))
