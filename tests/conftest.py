"""Random numbers that are the same in each run, and a browser for the tests of pages: Chromium, driven by
Playwright."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

NAMES = ("chromium", "chromium-browser", "google-chrome")
SWITCHES = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


# pytest tests/test_fuzz.py --hypothesis-profile long
settings.register_profile("long", max_examples=8000, print_blob=True)


@pytest.fixture(autouse=True)
def seeded() -> None:
    "Begin each test with the same random numbers."
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def chromium() -> str:
    "Find a browser, or skip the test."
    found = next(filter(None, map(shutil.which, NAMES)), None)
    return found or pytest.skip("no chromium is installed: pages are not tested in a browser")


@pytest.fixture(scope="module")
def browser(chromium: str) -> Iterator:
    "Start a browser without a window."
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(
            executable_path=chromium, args=SWITCHES, ignore_default_args=["--hide-scrollbars"]
        )
        yield started
        started.close()


@pytest.fixture(scope="session")
def dask() -> None:
    "Skip a test that starts workers where they are not installed."
    pytest.importorskip("distributed", reason="distributed comes with the extra [cluster]")
