"""A browser that tests can drive: Chromium or Chrome, where one is installed."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
CONFINED = "/snap/"  # such a browser cannot read the files of a test
SIZE = {"width": 1300, "height": 900}


def path() -> str:
    """The browser's program; skips the test where there is none."""
    there = [where for name in NAMES if (where := shutil.which(name))]
    found = next((w for w in there if not w.startswith(CONFINED)), None)
    if found is None:
        pytest.skip(f"there is no browser on the PATH: {', '.join(NAMES)}")
    if importlib.util.find_spec("playwright") is None:
        pytest.skip("playwright is not installed: run scripts/env")
    return found


@contextlib.contextmanager
def opened() -> Iterator[Any]:
    """A browser without a window."""
    program = path()
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        browser = playwright.chromium.launch(executable_path=program, env=own)
        try:
            yield browser
        finally:
            browser.close()


class Page:
    """A page that was opened from a file, with all that it said and asked for."""

    def __init__(self, browser: Any, file: Path, scheme: str = "light") -> None:
        self.tab = browser.new_page(viewport=SIZE, color_scheme=scheme)
        self.said: list[str] = []
        self.asked: list[str] = []
        self.tab.on("console", lambda message: self.said.append(message.text))
        self.tab.on("pageerror", lambda error: self.said.append(str(error)))
        self.tab.on("dialog", self._dismiss)
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.goto(file.as_uri())

    def _dismiss(self, dialog: Any) -> None:
        self.said.append(dialog.message)
        dialog.dismiss()

    def rows(self, host: str) -> list[list[str]]:
        """The texts of the rows of a table that are in the document."""
        found: list[list[str]] = self.tab.eval_on_selector_all(
            f"#{host} tbody tr:not(.space)",
            "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))",
        )
        return found

    def count(self, host: str) -> int:
        """How many rows a table has, in the document or not."""
        return int(self.tab.get_attribute(f"#{host} table", "aria-rowcount")) - 1
