"""The Chromium that tests of pages drive, and the screens that they are shown on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = os.environ.get("QLORA_TEST_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="needs a Chromium: apt-get install chromium-headless-shell, or QLORA_TEST_BROWSER=PROGRAM"
)
ALARM = "<script>window.broken = 1</script><img src=x onerror='window.broken = 1'>"
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@contextmanager
def launched() -> Iterator[Any]:
    """Yields the browser; skips the test without playwright."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'qlora[dev]'")
    with sync_api.sync_playwright() as playwright:
        # WebGL on the processor: the parallel axes are drawn with it.
        yield playwright.chromium.launch(executable_path=BROWSER, args=["--enable-unsafe-swiftshader"])


def open_page(browser: Any, url: str, size: dict[str, int], scheme: str = "light") -> tuple[Any, list[str]]:
    """Returns an opened page, and the list of its errors."""
    phone, errors = size is PHONE, list[str]()
    context = browser.new_context(viewport=size, color_scheme=scheme, has_touch=phone, is_mobile=phone)
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda said: said.type == "error" and errors.append(said.text))
    page.goto(url)
    return page, errors
