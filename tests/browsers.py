"""A real browser for tests of pages: it opens them from files, and hears every complaint."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update"),
)


class Open(Protocol):
    """Opens a page from a file; the test fails if it says, throws or asks for anything."""

    def __call__(
        self, html: str, *, init: str = "", may_complain: bool = False, **how: Any
    ) -> Page:
        """``init`` runs first, ``how`` are options of a browser's context."""
        ...


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="no playwright to drive a browser")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is on the path")
    with api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path, args=list(QUIET))
        yield browser
        browser.close()


@pytest.fixture
def view(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    contexts, complaints, allowed = [], [], []

    def open_page(html: str, *, init: str = "", may_complain: bool = False, **how: Any) -> Page:
        file = tmp_path / "page.html"
        file.write_text(html, "utf-8")
        context = browser.new_context(**how)
        contexts.append(context)
        if init:
            context.add_init_script(init)
        shown = context.new_page()
        allowed.append(file.as_uri())
        if not may_complain:
            shown.on("console", lambda message: complaints.append(message.text))
            shown.on("request", lambda request: complaints.append(request.url))
        shown.on("pageerror", lambda error: complaints.append(str(error)))
        shown.on("dialog", lambda dialog: complaints.append(dialog.message))
        shown.goto(file.as_uri())
        return shown

    yield open_page
    for context in contexts:
        context.close()
    # Images of data are no requests to anybody.
    heard = [said for said in complaints if not said.startswith("data:")]
    assert [said for said in heard if said.split("#")[0] not in allowed] == []
