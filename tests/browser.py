"""A real browser for the tests of pages: Debian's chromium, driven by playwright; tests are skipped without them."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE = 300_000  # ms; a machine may be busy


@contextmanager
def launched() -> Iterator[Any]:
    """Open a browser; skip the test where there is none."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="no browser can be driven: pip install 'tokdyn[browser]'"
    )
    if CHROMIUM is None:
        pytest.skip("no browser is installed: install chromium, such as with apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=PATIENCE)
        yield browser
        browser.close()
