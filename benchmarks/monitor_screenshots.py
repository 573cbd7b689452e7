"""Pictures of the monitor's page for the documentation: a real server, four simulated scans, a headless Chromium.

    python -m benchmarks.monitor_screenshots [--out docs/images] [--size 160]

Needs the extras ``monitor`` and ``dev`` and Debian's ``chromium``. Takes a few minutes: one of the scans is fitted by MoE-dqINR.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from playwright.sync_api import Page, ViewportSize, sync_playwright

from gadgets.errors import ReplayFailed
from gadgets.replay import replay
from gadgets.simulate import simulate

DESKTOP: ViewportSize = {"width": 1280, "height": 720}
TALLER: ViewportSize = {"width": 1280, "height": 780}
PHONE: ViewportSize = {"width": 390, "height": 844}
MAX_BYTES = 190_000
COLOURS = (256, 128, 64)  # tried in turn
SECONDS = 1800.0  # until something counts as hung


def main() -> None:
    """Run the scans, take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--size", type=int, default=160, help="matrix of the simulated scans")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        n = {"matrix_x": options.size, "matrix_y": options.size, "coils": 8}
        simulate("molli", folder / "molli.h5", {**n, "mask": "golden", "acceleration": 3.0, "acs": 16})
        simulate("cine", folder / "cine.h5", {**n, "mask": "vista", "acceleration": 4.0})
        simulate("cine", folder / "slices.h5", {**n, "mask": "vista", "acceleration": 4.0, "slices": 4})
        with serving(folder) as (port, url), sync_playwright() as driver:
            chains = [("molli", "llr_t1"), ("molli", "moe_dqinr_t1"), ("cine", "grasp_pro")]
            for source, chain in chains:
                print(f"{chain} ...", flush=True)
                replay(folder / f"{source}.h5", port=port, config=chain)
            browser = driver.chromium.launch(executable_path=shutil.which("chromium"), args=arguments())
            threading.Thread(target=play, args=(folder / "slices.h5", port), daemon=True).start()
            wide = browser.new_page(viewport=DESKTOP)
            shoot_running(wide, url, options.out)
            shoot_jobs(wide, url, options.out)
            dark = browser.new_page(viewport=PHONE, color_scheme="dark")
            dark.goto(url)
            settle(dark)
            save(dark, options.out / "monitor_phone.png")
            browser.close()


def play(source: Path, port: int) -> None:
    """A scan that takes its time; the pictures are taken before it ends."""
    with contextlib.suppress(ReplayFailed):
        replay(source, port=port, config="llr", parameters={"iterations": "600"})


def shoot_running(shown: Page, url: str, out: Path) -> None:
    """The list and the page of a job while it runs."""
    shown.goto(url)
    wait(lambda: value(shown) > 0.28)  # the first slice of four is there
    settle(shown)
    save(shown, out / "monitor_jobs.png")
    shown.locator("tr:has(progress) a").first.click()
    wait(lambda: shown.locator(".pictures img").count() > 0)
    settle(shown)
    if shown.locator("h1 .state").inner_text() != "reconstructing":
        raise SystemExit("the job was over before its picture was taken")
    save(shown, out / "monitor_running.png")


def shoot_jobs(shown: Page, url: str, out: Path) -> None:
    """Jobs that are over: the T1 map, and what MoE-dqINR tells."""
    shown.set_viewport_size(TALLER)
    for chain, place, name in (
        ("llr_t1", "header", "monitor_t1_map.png"),
        ("moe_dqinr_t1", "#method-title", "monitor_moe_routing.png"),
    ):
        shown.goto(url)
        shown.get_by_role("link", name=chain, exact=True).click()
        shown.locator("#back").wait_for()
        settle(shown)
        shown.locator(place).evaluate(
            "element => window.scrollTo(0, element.getBoundingClientRect().top + window.scrollY - 16)"
        )
        save(shown, out / name)


def value(shown: Page) -> float:
    return float(shown.evaluate("(document.querySelector('tr progress[value]') || {value: 0}).value"))


def settle(shown: Page) -> None:
    """Every picture is there."""
    for place in range(shown.locator("img").count()):
        shown.locator("img").nth(place).scroll_into_view_if_needed()
    wait(lambda: shown.evaluate("[...document.images].every(image => image.complete && image.naturalWidth > 0)"))
    shown.evaluate("window.scrollTo(0, 0)")


def save(shown: Page, path: Path) -> None:
    """The window as a PNG, of few colours where it would be large."""
    with tempfile.TemporaryDirectory() as folder:
        shown.screenshot(path=Path(folder) / "shot.png", animations="disabled")
        with Image.open(Path(folder) / "shot.png") as picture:
            flat = picture.convert("RGB")
            if np.asarray(flat).std() < 8:
                raise SystemExit(f"{path.name}: the page is blank")
            flat.save(path, optimize=True)
            for n_colours in COLOURS:
                if path.stat().st_size > MAX_BYTES:
                    flat.quantize(n_colours, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    print(f"{path}  {size / 1000:.0f} kB", flush=True)
    if size > MAX_BYTES:
        raise SystemExit(f"{path.name}: {size} bytes, at most {MAX_BYTES} are wanted")


def wait(look: Callable[[], Any]) -> None:
    deadline = time.monotonic() + SECONDS
    while not look():
        if time.monotonic() > deadline:
            raise SystemExit("the page does not show what it should")
        time.sleep(0.1)


def arguments() -> list[str]:
    return ["--no-sandbox"] if os.geteuid() == 0 else []  # root gets no sandbox


@contextmanager
def serving(folder: Path) -> Iterator[tuple[int, str]]:
    """``recon serve --monitor`` on free ports; its port, and the page's address."""
    command = [sys.executable, "-m", "gadgets.cli", "serve", "--port", "0", "--monitor", "127.0.0.1:0"]
    environment = {**os.environ, "XDG_STATE_HOME": str(folder / "state")}
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
        try:
            assert server.stdout is not None
            words = server.stdout.readline() + server.stdout.readline()
            port, url = re.search(r"listening on \S+:(\d+)", words), re.search(r"http://\S+", words)
            if port is None or url is None:
                raise SystemExit(f"the server did not start: {words}{(folder / 'server.log').read_text()}")
            yield int(port[1]), url[0]
        finally:
            server.terminate()
            server.wait(60)


if __name__ == "__main__":
    main()
