"""The pages in a real Chromium, of a spool made for it: charts, both widths and both schemes, hostile words, the log-in."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from playwright.sync_api import Browser

from gadgets.journal import JobRow
from gadgets.monitor.files import TOLD_FILE, folder_of
from gadgets.monitor.web import MAX_STREAMS
from gadgets.pacs import Attempt, Destination
from gadgets.pacs_backlog import key_of
from gadgets.pacs_queue import Pauses, Queue
from tests.monitor import spools
from tests.monitor.browser import (
    DESKTOP,
    PHONE,
    browsing,
    page,
    pictures_loaded,
    require_accessible,
    require_fits,
    screenshot,
)
from tests.monitor.site import TOKEN, Site, monitoring
from tests.monitor.spools import FAILED, GOOD, HOSTILE
from tests.waiting import PATIENCE, until

COLOUR = "element => getComputedStyle(element).color"

pytestmark = pytest.mark.timeout(900)  # only where the machine has much else to do


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as running:
        yield running


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pages") / "spool"
    hostile = JobRow(
        FAILED, chain=HOSTILE, state="failed", why=HOSTILE, received=1.0, finished=2.0, warnings=(HOSTILE, 300 * "long"),
        settings={HOSTILE: HOSTILE, "method": {HOSTILE: HOSTILE}}, versions={"recon-gadgets": HOSTILE},
    )  # fmt: skip
    spools.journal(root, spools.row(GOOD, warnings=("thin coils",)), hostile)
    spools.put_images(root, GOOD)
    spools.put_curves(root, GOOD)
    spools.put_log(root, GOOD, "10:15:00.250 INFO event=scan_started connection=c00001\n")
    spools.put_log(root, FAILED, f"10:10:00.000 ERROR event=failed text={HOSTILE}\n")
    spools.put_status(root, age=-3600)
    return root


@pytest.fixture(scope="module")
def site(spool: Path) -> Iterator[Site]:
    with monitoring(spool.parent, spool) as running:
        yield running


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_lists_and_jobs_are_readable(
    scheme: str, size: dict[str, int], site: Site, browser: Browser, tmp_path: Path
) -> None:
    with page(browser, size=size, scheme=scheme) as shown:
        for path in ("/", f"/jobs/{GOOD}"):
            shown.goto(site.url + path)
            pictures_loaded(shown)
            picture = screenshot(shown, tmp_path / "shot.png")
            ground = picture[4, 4].mean()
            assert ground > 0.85 if scheme == "light" else ground < 0.2
            require_fits(shown)
            if (scheme, size) == ("light", DESKTOP):
                require_accessible(shown)


def test_a_job_shows_maps_with_colour_bars_charts_and_words(site: Site, browser: Browser, tmp_path: Path) -> None:
    with page(browser) as shown:
        shown.goto(f"{site.url}/jobs/{GOOD}")
        pictures_loaded(shown)
        captions = [text.strip() for text in shown.locator(".pictures figcaption").all_inner_texts()]
        assert captions == ["moe T1: T1 in ms, window 0 to 2000 ms", "moe, window 0 to 3000"]
        # the colour bar stands at the right of the map: the whole of viridis from bottom to top
        shown.locator(".pictures img").first.screenshot(path=tmp_path / "map.png")
        picture = screenshot_of(tmp_path / "map.png")
        right = picture[:, int(0.7 * picture.shape[1]) :].reshape(-1, 3)
        for colour in ((68, 1, 84), (33, 145, 140), (253, 231, 37)):
            assert (abs(right - [c / 255 for c in colour]).max(axis=1) < 0.04).sum() > 5
        charts = [svg.get_attribute("aria-label") or "" for svg in shown.locator("svg").all()]
        assert charts[0] == "Error of held-out samples: held-out error 0.5 to 0.1"
        assert (
            charts[1].startswith("Loss: loss 1 to 0.001")
            and charts[2] == "Routing weights: 4 rows (expert), 9 columns (state)"
        )
        cells = shown.locator("svg").nth(2).locator("rect:has(title)")
        fills = [cells.nth(n).get_attribute("fill") for n in range(36)]
        assert [fills[4 * state + state % 4] for state in range(9)] == 9 * ["#fde725"] and fills.count("#440154") == 27
        text = shown.locator("main").inner_text()
        for words in ("thin coils", "stopped early", "event=scan_started", "experts", "recon-gadgets", "first image", "640"):
            assert words in text
        shown.locator("summary").first.press("Enter")
        assert not shown.locator("details").first.evaluate("element => element.open")


def screenshot_of(path: Path) -> np.ndarray[Any, Any]:
    return np.asarray(imread(path))[..., :3]


def test_hostile_words_do_nothing_but_stand_there(site: Site, browser: Browser) -> None:
    with page(browser) as shown:  # an alert, or a picture that is looked for, fails here
        for path in ("/", f"/jobs/{FAILED}"):
            shown.goto(site.url + path)
            assert HOSTILE in shown.locator("main").inner_text()
            assert shown.locator("main script").count() == 0 and shown.locator("img[src=x]").count() == 0
            require_fits(shown)


def test_the_form_lets_in_who_knows_the_token(spool: Path, browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(TOKEN)
    with monitoring(tmp_path, spool, "--token-file", str(tmp_path / "token")) as locked, page(browser) as shown:
        shown.goto(f"{locked.url}/jobs/{GOOD}")
        assert shown.url == f"{locked.url}/login"
        require_accessible(shown)
        shown.get_by_label("Token").fill("not the token at all")
        shown.keyboard.press("Enter")
        shown.get_by_role("alert").wait_for()
        shown.get_by_label("Token").fill(TOKEN)
        shown.get_by_role("button", name="Log in").click()
        shown.get_by_role("heading", name="Jobs").wait_for()
        assert shown.evaluate("document.cookie") == ""  # for the browser's eyes only
        pictures_loaded(shown)


def test_a_page_that_is_told_nothing_asks_for_itself(spool: Path, browser: Browser, tmp_path: Path) -> None:
    """All places of those who are told are taken; then the log-in is over."""
    (tmp_path / "token").write_text(TOKEN)
    context = browser.new_context()
    shown = context.new_page()
    shown.clock.install()
    with monitoring(tmp_path, spool, "--token-file", str(tmp_path / "token")) as site, contextlib.ExitStack() as listeners:
        for _ in range(MAX_STREAMS):
            listener = listeners.enter_context(socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE))
            listener.sendall(f"GET /events HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
            assert listener.recv(64).startswith(b"HTTP/1.1 200")
        shown.goto(f"{site.url}/login")
        shown.get_by_label("Token").fill(TOKEN)
        with shown.expect_response("**/events") as told:
            shown.keyboard.press("Enter")
        assert told.value.status == 503
        shown.get_by_role("heading", name="Jobs").wait_for()
        shown.evaluate("document.querySelector('h1').textContent = 'old'")
        shown.clock.run_for(5000)
        shown.get_by_role("heading", name="Jobs").wait_for()  # fetched anew
        assert shown.locator("#link").is_hidden()
        context.clear_cookies()
        until(lambda: shown.clock.run_for(5000) or "/login" in shown.url)
    context.close()


def test_pages_that_are_not_there_say_so(site: Site, browser: Browser) -> None:
    context = browser.new_context()
    shown = context.new_page()
    answer = shown.goto(f"{site.url}/jobs/20200101T000000.000000Z-00000000")
    assert answer is not None and answer.status == 404
    assert "no such page or job" in shown.locator("main").inner_text()
    context.close()


def test_the_line_about_archives_follows_the_queue(browser: Browser, tmp_path: Path) -> None:
    """Also while the page is open, and while no job changes."""
    root, image = tmp_path / "spool", tmp_path / "image.dcm"
    image.write_bytes(b"DICM")
    archive, queue = Destination("pacs.example", 104, "ARCHIVE"), Queue(tmp_path / "pacs", Pauses(attempts=1))
    spools.journal(root, spools.row(GOOD))
    spools.put_log(root, GOOD, "")
    (folder_of(root, GOOD) / TOLD_FILE).write_text(json.dumps({"words": ["llr: 6 images"]}))
    spools.put_status(root, age=-3600, archives=[key_of(archive)], archive_queue=str(tmp_path / "pacs"))
    with monitoring(tmp_path, root) as site, page(browser) as shown:
        shown.goto(site.url)
        line = shown.locator(".checks li", has_text="pacs")
        assert line.inner_text().split() == ["pacs", "ok:", "nothing", "waits"]
        jobs = [queue.put([image], archive) for _ in range(2)]
        shown.locator(".checks li.ok", has_text="2 transfers wait, the oldest").wait_for()
        queue.send_due(lambda files, *_: Attempt(left=files, problem="no association"), only=jobs[0].id)
        shown.locator(".checks li.failing", has_text="1 transfer failed (recon pacs queue), 1 transfer waits").wait_for()
        require_fits(shown)
        require_accessible(shown)
        assert "ARCHIVE" not in shown.content() and "example" not in shown.content()
        shown.goto(f"{site.url}/jobs/{GOOD}")
        require_accessible(shown)
        words, other = shown.locator(".told"), shown.locator("main")
        assert words.evaluate(COLOUR) != other.evaluate(COLOUR) and words.inner_text() == "llr: 6 images"


def test_without_scripts_the_page_is_all_there(site: Site, browser: Browser) -> None:
    context = browser.new_context(java_script_enabled=False)
    shown = context.new_page()
    shown.goto(site.url)
    assert shown.locator("tbody tr").count() == 2
    context.close()
