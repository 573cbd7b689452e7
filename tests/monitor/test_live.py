"""A real server with real scans, looked at in a real Chromium; and what happens to one when the other dies."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Browser

from gadgets.replay import ReplayResult, replay
from tests.e2e.scans import SimulatedScan, simulated
from tests.monitor.browser import browsing, page, pictures_loaded, require_accessible, require_fits, screenshot
from tests.monitor.site import Watched, monitoring, watched
from tests.strict_client import StrictClient
from tests.waiting import PATIENCE, until

pytestmark = pytest.mark.timeout(1200)  # only where the machine has much else to do
PATIENT = {"patientName": "Zwickelhuber^Anastasia", "patientID": "PID-771204-X", "patientBirthdate": "1931-07-09"}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with browsing() as running:
        yield running


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    with watched(tmp_path_factory.mktemp("live")) as running:
        yield running


@pytest.fixture(scope="module")
def cine(tmp_path_factory: pytest.TempPathFactory) -> SimulatedScan:
    """With 1000 iterations some five seconds of work on a machine that has nothing else to do."""
    folder = tmp_path_factory.mktemp("cine")
    return simulated(
        "cine", folder / "cine.h5", matrix_x=96, matrix_y=96, coils=4, states=4, slices=2, mask="vista", acceleration=2.0
    )


@pytest.fixture(scope="module")
def molli(tmp_path_factory: pytest.TempPathFactory) -> SimulatedScan:
    folder = tmp_path_factory.mktemp("molli")
    return simulated(
        "molli", folder / "molli.h5", matrix_x=64, matrix_y=64, coils=4, mask="golden", acceleration=2.0, acs=12
    )


def begin(site: Watched, scan: SimulatedScan, chain: str, **settings: str) -> Future[ReplayResult]:
    """Play a scan to the server, beside the test."""
    pool = ThreadPoolExecutor(1)
    running = pool.submit(replay, scan.path, port=site.server_port, config=chain, parameters=settings)
    pool.shutdown(wait=False)
    return running


def test_a_running_job_moves_and_ends_without_a_reload(
    site: Watched, browser: Browser, cine: SimulatedScan, tmp_path: Path
) -> None:
    with page(browser) as shown:
        shown.goto(site.url)
        assert "No scan has been received yet" in shown.locator("main").inner_text()
        shown.evaluate("window.same = true")
        running = begin(site, cine, "llr", iterations="1000")

        def bar() -> float:
            return float(shown.evaluate("(document.querySelector('progress[value]') || {value: 0}).value"))

        until(lambda: bar() > 0.02)
        first = bar()
        until(lambda: bar() > first)
        until(lambda: "left" in shown.locator("tr .words").inner_text())  # the remaining time
        screenshot(shown, tmp_path / "running.png")
        assert shown.evaluate("window.same") is True
        shown.locator("tbody a").press("Enter")
        shown.locator("#back").wait_for()
        shown.evaluate("window.same = true")
        second = bar()
        until(lambda: bar() > second)
        require_accessible(shown)
        assert running.result(timeout=PATIENCE).n_images == 8
        until(lambda: shown.locator("h1 .state").inner_text() == "sent")
        until(lambda: shown.locator(".pictures img").count() == 1)
        pictures_loaded(shown)
        assert shown.evaluate("window.same") is True
        # the log may come a moment after the state
        words = ("8 images in", "event=scan_started", "event=closed", "iterations", "1000", "first image")
        until(lambda: all(word in shown.locator("main").inner_text() for word in words))


def test_a_t1_scan_shows_its_maps_and_nobodys_name(
    site: Watched, browser: Browser, molli: SimulatedScan, tmp_path: Path
) -> None:
    subject = "".join(f"<{name}>{value}</{name}>" for name, value in PATIENT.items())
    header = molli.header.replace(
        "<experimentalConditions>", f"<subjectInformation>{subject}</subjectInformation><experimentalConditions>"
    )
    assert PATIENT["patientName"] in header
    answer = StrictClient("127.0.0.1", site.server_port, timeout=PATIENCE).scan(
        "llr_t1", header=header, messages=molli.messages
    )
    assert answer.images
    with page(browser) as shown:
        shown.goto(site.url)
        until(lambda: shown.locator("tbody tr").first.locator(".state").inner_text() == "sent")
        require_accessible(shown)
        shown.get_by_role("link", name="llr_t1").click()
        shown.locator("#back").wait_for()
        pictures_loaded(shown)
        captions = shown.locator(".pictures figcaption").all_inner_texts()
        assert any("T1 in ms, window" in text for text in captions) and len(captions) >= 4
        screenshot(shown, tmp_path / "maps.png")
        require_fits(shown)
        job = shown.url.rpartition("/")[2]
        pages = [site.get(path).body for path in ("/", f"/jobs/{job}", "/metrics", "/healthz")]
    kept = [
        path.read_bytes()
        for path in site.spool.rglob("*")
        if (path.is_file() and path.suffix != ".mrd") or "image-" in path.name
    ]
    assert len(kept) > 10
    for value in PATIENT.values():
        assert not [True for content in (*pages, *kept, site.log.read_bytes()) if value.encode() in content]


def test_metrics_and_health_of_what_has_run(site: Watched) -> None:
    health = until(lambda: health if (health := site.get("/healthz")).code == 200 else None)
    assert health is not None and health.json["checks"]["workers"]["text"] == "1 of 1 alive"
    expected = (
        'recon_scans_total{chain="llr",state="sent"} 1.0', 'recon_scans_total{chain="llr_t1",state="sent"} 1.0',
        'recon_jobs{state="sent"} 2.0',
        'recon_stage_seconds_count{chain="llr",stage="first_image"} 1.0', "recon_workers 1.0", "recon_up 1.0",
    )  # fmt: skip

    def missing() -> list[str]:
        text = site.get("/metrics").text
        return [words for words in expected if words not in text]

    until(lambda: not missing(), lambda: f"missing: {missing()}")  # the counters may follow the state


def test_neither_can_take_the_other_with_it(site: Watched, cine: SimulatedScan, tmp_path: Path) -> None:
    server = psutil.Process(site.process.pid)
    (child,) = [process for process in server.children() if "gadgets.monitor" in process.cmdline()]
    os.kill(child.pid, signal.SIGSTOP)  # a monitor that hangs
    assert begin(site, cine, "fourier").result(timeout=PATIENCE).n_images == 8
    os.kill(child.pid, signal.SIGKILL)  # and one that dies
    assert begin(site, cine, "fourier").result(timeout=PATIENCE).n_images == 8
    until(lambda: "event=monitor_ended code=-9" in site.log.read_text())
    until(lambda: [process for process in server.children() if "gadgets.monitor" in process.cmdline()])
    (child,) = [process for process in server.children() if "gadgets.monitor" in process.cmdline()]
    with monitoring(tmp_path, site.spool) as beside:  # one that does not belong to the server outlives it
        until(lambda: beside.get("/healthz").code == 200)
        server.kill()
        server.wait(PATIENCE)
        until(lambda: beside.get("/healthz").code == 503)
        said = beside.get("/healthz").json
        assert said["status"] == "failing" and any("the server's process ended" in reason for reason in said["reasons"])
        assert beside.get("/").code == 200 and "recon_up 0.0" in beside.get("/metrics").text
    until(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)  # the server's own goes with it
