"""A real headless Chromium, and what is asked of every page in it."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imread
from playwright.sync_api import Browser, Dialog, Page, sync_playwright

from tests.waiting import PATIENCE, until

DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 390, "height": 844}
MILLISECONDS = 1e3 * PATIENCE


def chromium() -> str:
    """Debian's."""
    found = shutil.which("chromium")
    assert found is not None, "apt-get install chromium (see .ci/run)"
    return found


@contextmanager
def browsing() -> Iterator[Browser]:
    # root, as continuous integration is, gets no sandbox from Chromium; the pages are our own
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium(), args=[*options, "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@contextmanager
def page(browser: Browser, *, size: Any = DESKTOP, scheme: Any = "light", **options: Any) -> Iterator[Page]:
    """A page in which nothing may go wrong: an error in its console fails the test."""
    context = browser.new_context(viewport=size, color_scheme=scheme, **options)
    context.set_default_timeout(MILLISECONDS)
    made, wrong = context.new_page(), list[str]()
    made.on("pageerror", lambda error: wrong.append(str(error)))
    made.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)

    def refuse(dialog: Dialog) -> None:
        wrong.append(f"dialog {dialog.message}")
        dialog.dismiss()

    made.on("dialog", refuse)
    yield made
    context.close()
    assert wrong == []


def pictures_loaded(shown: Page) -> None:
    """Wait for every picture; scrolls past them, since they are loaded when they are seen."""
    for place in range(shown.locator("img").count()):
        shown.locator("img").nth(place).scroll_into_view_if_needed()
    # asked again and again from here: the page's own policy lets nothing be evaluated in it for long
    until(lambda: shown.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)"))


def screenshot(shown: Page, path: Path, *, full: bool = True) -> np.ndarray[Any, Any]:
    """The page as a picture ``(y, x, rgb)`` in 0 to 1, which is not blank."""
    shown.screenshot(path=path, full_page=full, animations="disabled")
    picture = np.asarray(imread(path))[..., :3]
    assert picture.std() > 0.03 and len(np.unique((picture * 31).astype(int).reshape(-1, 3), axis=0)) > 30
    return picture


def require_accessible(shown: Page) -> None:
    """What a screen reader and a keyboard need."""
    assert shown.evaluate("document.documentElement.lang") == "en"
    assert shown.locator("h1").count() == 1 and shown.locator("main").count() == 1
    assert shown.evaluate("[...document.images].every(image => image.alt.trim() !== '')")
    assert shown.evaluate(
        "[...document.querySelectorAll('svg')].every(s => s.getAttribute('role') === 'img' && s.getAttribute('aria-label'))"
    )
    assert shown.evaluate("[...document.querySelectorAll('progress')].every(bar => bar.getAttribute('aria-label'))")
    levels = shown.evaluate("[...document.querySelectorAll('h1,h2,h3')].map(h => Number(h.tagName[1]))")
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    ids = shown.evaluate("[...document.querySelectorAll('[id]')].map(element => element.id)")
    assert len(ids) == len(set(ids))
    # every link is reached by the tabulator key, in the order of the page
    links = shown.evaluate("[...document.querySelectorAll('a')].map(a => a.getAttribute('href'))")
    reached = []
    shown.evaluate("document.activeElement.blur(); window.scrollTo(0, 0)")
    for _ in range(len(links) + 40):
        shown.keyboard.press("Tab")
        href = shown.evaluate("document.activeElement && document.activeElement.getAttribute('href')")
        if href:
            reached.append(href)
        if len(reached) == len(links):
            break
    assert reached == links


def require_fits(shown: Page) -> None:
    """Nothing is wider than the window."""
    assert shown.evaluate("document.documentElement.scrollWidth - window.innerWidth") <= 0
