"""The monitor as strangers meet it: who gets in, what is refused, and what every answer tells a browser."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gadgets.cli import app
from gadgets.errors import MissingExtra, SpoolError
from gadgets.journal import JobRow
from gadgets.monitor.access import read_token, require_token
from gadgets.monitor.child import monitor_beside
from gadgets.monitor.command import parse_address
from gadgets.monitor.files import TOLD_FILE, folder_of
from gadgets.monitor.web import MAX_STREAMS
from recon_core.errors import SettingError
from tests.monitor import spools
from tests.monitor.site import RECON, TOKEN, Site, environment, monitoring
from tests.monitor.spools import FAILED, GOOD, HOSTILE, RETRY
from tests.waiting import PATIENCE, until


@pytest.fixture(scope="module")
def spool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("access") / "spool"
    hostile = JobRow(
        FAILED, chain=HOSTILE, state="failed", why=HOSTILE, received=1.0, finished=2.0, warnings=(HOSTILE,), fallback=HOSTILE,
        settings={HOSTILE: {HOSTILE: HOSTILE}}, versions={HOSTILE: HOSTILE}, weights=HOSTILE, origin=HOSTILE, peer="192.0.2.77",
    )  # fmt: skip
    spools.journal(root, spools.row(GOOD), spools.row(RETRY, origin=f"retry of {GOOD}"), hostile)
    spools.put_images(root, GOOD)
    spools.put_curves(root, GOOD)
    (folder_of(root, GOOD) / TOLD_FILE).write_text('{"series": [[1, 100], [2, 1]]}')
    spools.put_log(root, FAILED, f"10:10:00.000 ERROR event=failed text={HOSTILE}\n")
    (root / f"{GOOD}.mrd").write_bytes(b"raw data that nobody may fetch")
    spools.put_status(root, age=-3600)  # fresh for as long as the tests take
    return root


@pytest.fixture(scope="module")
def site(spool: Path) -> Iterator[Site]:
    with monitoring(spool.parent, spool) as running:
        yield running


@pytest.fixture(scope="module")
def locked(spool: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    folder = tmp_path_factory.mktemp("locked")
    (folder / "token").write_text(TOKEN + "\n")
    with monitoring(folder, spool, "--token-file", str(folder / "token")) as running:
        yield running


def test_pages_answer(site: Site) -> None:
    assert site.get("/").code == site.get(f"/jobs/{GOOD}").code == site.get(f"/jobs/{RETRY}").code == 200
    assert site.get("/healthz").json["status"] == "ok"
    assert "recon_up 1.0" in site.get("/metrics").text
    assert (
        site.get(f"/jobs/{GOOD}").text.count("3 of 100 images") == 2
    )  # three are kept for the page: caption and alternative text


@pytest.mark.parametrize("path", ["/", f"/jobs/{FAILED}"])
def test_hostile_words_stay_words(site: Site, path: str) -> None:
    text = site.get(path).text
    assert "<script>alert" not in text and "<img src=x" not in text and "onerror=alert(2)>" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text and "{{7*7}}" in text


@pytest.mark.parametrize(
    "job",
    [
        "..", "%2e%2e", "..%2f..%2fetc%2fpasswd", f"{GOOD}%2f..%2f{GOOD}", f"{GOOD}.mrd", f"{GOOD}%00", f"{GOOD}.job", f"{GOOD}.r1%2f..",
        "20261120T101500.250000Z-00C0FFEE", "server.status", f"{GOOD}%0a", "20261120T101500.250000Z-00c0ffe%D9%A1",
    ],
)  # fmt: skip
def test_what_is_no_job_is_not_looked_for(site: Site, job: str) -> None:
    for place in ("", "/thumbnail.png", "/pictures/1.png", "/events"):
        answer = site.get(f"/jobs/{job}{place}")
        assert answer.code == 404
        assert b"raw data" not in answer.body


@pytest.mark.parametrize(
    "path", ["/static/../web.py", "/static/..%2fweb.py", "/static/%2e%2e/%2e%2e/journal.py", "/static//etc/passwd"]
)
def test_only_static_files_are_static(site: Site, path: str) -> None:
    assert site.get(path).code == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_everything_only_reads(site: Site, locked: Site, method: str) -> None:
    for path in ("/", "/healthz", f"/jobs/{GOOD}", "/login", "/nowhere"):
        assert site.get(path, method=method).code == 405
        if (method, path) != ("POST", "/login"):
            assert locked.get(path, method=method, Authorization=f"Bearer {TOKEN}").code == 405


@pytest.mark.parametrize("path", ["/", "/healthz", "/metrics", "/events", f"/jobs/{GOOD}", f"/jobs/{GOOD}/events"])
def test_heads_have_no_body_and_no_end_to_wait_for(site: Site, path: str) -> None:
    answer = site.get(path, method="HEAD")
    assert answer.code == 200 and answer.body == b""


def listening(site: Site) -> socket.socket:
    """Somebody who waits for news."""
    listener = socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE)
    listener.sendall(f"GET /events HTTP/1.1\r\nHost: 127.0.0.1:{site.port}\r\n\r\n".encode())
    return listener


def test_news_are_events_and_too_many_listeners_are_told(site: Site) -> None:
    listeners = [listening(site) for _ in range(MAX_STREAMS)]
    for listener in listeners:
        said = b""
        while b"\n\n" not in said.partition(b"\r\n\r\n")[2]:
            said += listener.recv(4096)
        assert b"200 OK" in said and b"text/event-stream" in said and b'data: {"version": "' in said
    assert site.get("/events").code == 503
    assert site.get("/").code == 200  # pages are still served
    for listener in listeners:
        listener.close()

    def taken() -> bool:
        with listening(site) as one:
            return one.recv(64).startswith(b"HTTP/1.1 200")

    until(taken)  # the places are free again


@pytest.mark.parametrize(
    "path", ["/", "/healthz", "/metrics", f"/jobs/{GOOD}", "/jobs/none", "/static/monitor.js", "/login"]
)
def test_every_answer_guards_itself(site: Site, locked: Site, path: str) -> None:
    for headers in (site.get(path).headers, locked.get(path).headers):
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "script-src 'self'" in policy and "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
        assert headers["x-frame-options"] == "DENY" and headers["cache-control"] == "no-store"
        assert "server" not in headers


def test_pages_need_nothing_from_elsewhere(site: Site) -> None:
    for path in ("/", f"/jobs/{GOOD}", "/static/monitor.css", "/static/monitor.js"):
        text = site.get(path).text.replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text and "https:" not in text and "//cdn" not in text
        assert " style=" not in text and "<script>" not in text and " onclick=" not in text


def test_other_names_for_this_machine_are_refused_without_a_token(site: Site) -> None:
    assert site.get("/", Host="attacker.example").code == 421
    assert site.get("/metrics", Host=f"attacker.example:{site.port}").code == 421
    for host in (f"localhost:{site.port}", f"127.0.0.1:{site.port}", f"[::1]:{site.port}"):
        assert site.get("/", Host=host).code == 200


def test_the_token_is_asked_for(locked: Site) -> None:
    for path in ("/", "/metrics", "/events", f"/jobs/{GOOD}", f"/jobs/{GOOD}/pictures/1.png", f"/jobs/{GOOD}/thumbnail.png"):
        assert locked.get(path).code == 401
        assert locked.get(path, Authorization="Bearer wrong").code == 401
        assert locked.get(path, Authorization=f"Basic {TOKEN}").code == 401
        assert locked.get(path, Cookie="recon_monitor=" + 64 * "0").code == 401
        assert locked.get(path, Cookie=f"recon_monitor={TOKEN}").code == 401
    assert locked.get("/metrics", Authorization=f"Bearer {TOKEN}").code == 200
    page = locked.get("/", Accept="text/html,*/*")
    assert page.code == 303 and page.headers["location"] == "/login"


def test_strangers_learn_only_whether_it_works(locked: Site) -> None:
    assert locked.get("/healthz").json == {"status": "ok"}
    assert "checks" in locked.get("/healthz", Authorization=f"Bearer {TOKEN}").json


def test_the_form_gives_a_cookie_that_is_not_the_token(locked: Site) -> None:
    form = {"Content_Type": "application/x-www-form-urlencoded"}
    refused = locked.get("/login", method="POST", body="token=wrong", **form)
    assert refused.code == 303 and "again" in refused.headers["location"] and "set-cookie" not in refused.headers
    assert "not the token" in locked.get(refused.headers["location"]).text
    taken = locked.get("/login", method="POST", body=f"token={TOKEN}", **form)
    cookie = taken.headers["set-cookie"]
    assert taken.code == 303 and taken.headers["location"] == "/"
    assert "HttpOnly" in cookie and "samesite=strict" in cookie.lower() and TOKEN not in cookie
    assert locked.get("/", Cookie=cookie.partition(";")[0]).code == 200
    assert locked.get("/login", method="POST", body="token=" + 5000 * "x", **form).code == 413
    for body in ("\xff%ff&token", "token=a" + 9 * "&b=c"):
        assert locked.get("/login", method="POST", body=body, **form).code == 303


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"\x00\xff\x16\x03\x01\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n" + b"X: " + 100_000 * b"y" + b"\r\n\r\n",
        b"GET /" + 70_000 * b"a",
    ],
)
def test_a_request_that_is_none_costs_nothing(site: Site, request_bytes: bytes) -> None:
    with socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE) as peer:
        said = b""
        with contextlib.suppress(OSError):  # it may have answered and gone before everything was sent
            peer.sendall(request_bytes)
            peer.shutdown(socket.SHUT_WR)
        with contextlib.suppress(ConnectionResetError):
            while piece := peer.recv(65536):
                said += piece
    assert not said or said.startswith(b"HTTP/1.1 4")
    assert site.get("/").code == 200


def test_the_peer_address_is_not_shown(site: Site) -> None:
    assert "192.0.2.77" not in site.get(f"/jobs/{FAILED}").text + site.get("/").text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.invalid"])
def test_nobody_opens_it_to_the_network_without_a_token(host: str, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="open to the network"):
        require_token(host, None)
    require_token(host, TOKEN)


@pytest.mark.parametrize("command", ["monitor --spool . --listen 0.0.0.0:0", "serve --port 0 --monitor 0.0.0.0:0"])
def test_the_commands_say_so(command: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [RECON, *command.split()], capture_output=True, text=True, timeout=PATIENCE, env=environment(tmp_path), check=False
    )
    assert done.returncode == 1 and "open to the network" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(("spool", "said"), [("none", "does not exist"), ("file", "no folder")])
def test_a_spool_that_shows_nothing_is_refused(
    spool: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr("gadgets.monitor.command.serve", lambda *_: None)  # else it would answer for ever
    done = CliRunner().invoke(app, ["monitor", "--spool", str(tmp_path / spool), "--listen", "127.0.0.1:0"])
    assert isinstance(done.exception, SpoolError) and said in str(done.exception)


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("gadgets.monitor.command.PACKAGES", ("no_such_package_anywhere",))
    with pytest.raises(MissingExtra, match=r"no_such_package_anywhere.*recon-gadgets\[monitor\]"):
        monitor_beside(tmp_path, "127.0.0.1:0", None)
    assert monitor_beside(tmp_path, None, None) is not None  # nothing is asked of who wants none
    with pytest.raises(SettingError, match="nothing to monitor"):
        monitor_beside(None, "127.0.0.1:0", None)


@pytest.mark.parametrize("text", ["short", "", "a token with blanks in it", 600 * "x", "t\u00f6ken-that-is-not-ascii"])
def test_bad_tokens_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(text)
    with pytest.raises(SettingError):
        read_token(tmp_path / "token")
    with pytest.raises(SettingError):
        read_token(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("127.0.0.1:9100", ("127.0.0.1", 9100)),
        (":0", ("127.0.0.1", 0)),
        ("[::1]:80", ("::1", 80)),
        ("localhost:1", ("localhost", 1)),
    ],
)
def test_addresses(text: str, wanted: tuple[str, int]) -> None:
    assert parse_address(text) == wanted


@pytest.mark.parametrize("text", ["", "9100", "host", "host:", "host:x", "host:65536", "a b:1", "host:-1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(SettingError):
        parse_address(text)
