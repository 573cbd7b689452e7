"""Who may look: the token, the cookie that stands for it, and what every answer says to a browser.

On loopback no token is needed; then only requests addressed to this machine are answered, so that no web page elsewhere can read
the monitor through a name of its own that points here. With a token (needed on any other address) everything but the log-in form
and the bare health code asks for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import logging
import os
import secrets
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from urllib.parse import parse_qs

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gadgets.admission import is_loopback
from recon_core.errors import SettingError

logger = logging.getLogger(__name__)

COOKIE = "recon_monitor"
COOKIE_SECONDS = 12 * 3600
MIN_TOKEN, MAX_TOKEN = 16, 512
MAX_FORM = 4096  # bytes of a log-in
OPEN_PATHS = ("/login", "/healthz", "/static/monitor.css", "/static/icon.svg")

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; "
        "base-uri 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}


def read_token(path: Path) -> str:
    """The token in a file: its first line.

    Raises
    ------
    SettingError
        The file cannot be read, or what is in it is too short, too long or no plain text.
    """
    try:
        text = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError) as error:
        got = getattr(error, "strerror", None) or "not ASCII"
        raise SettingError("cannot read the token", where=str(path), got=got) from None
    if not MIN_TOKEN <= len(text) <= MAX_TOKEN or any(c.isspace() or not c.isprintable() for c in text):
        raise SettingError(
            "not a token",
            where=str(path),
            got=f"{len(text)} characters",
            expected=f"{MIN_TOKEN} to {MAX_TOKEN} printable characters without blanks",
            remedy="Make one with: openssl rand -hex 24",
        )
    if os.name == "posix" and path.stat().st_mode & 0o077:
        logger.warning("event=token_readable_by_others file=%s", path.name)
    return text


def require_token(host: str, token: str | None) -> None:
    """Nobody opens the monitor to the network without a token.

    Raises
    ------
    SettingError
        ``host`` is not loopback and there is none.
    """
    if token is None and not is_loopback(host):
        raise SettingError(
            "the monitor would be open to the network",
            where="monitor",
            got=host,
            expected="127.0.0.1, or a token",
            remedy="Name a file with a token: --token-file, of recon serve --monitor-token-file",
        )


class Access:
    """ASGI middleware around the whole application.

    Parameters
    ----------
    app
        What is guarded.
    host
        Where it is listened on: without a token, its name and those of loopback are answered.
    token
        ``None`` lets everybody in who can reach a loopback address.
    """

    def __init__(self, app: ASGIApp, *, host: str, token: str | None) -> None:
        self._app, self._token = app, token
        self._names = {"localhost", "127.0.0.1", "::1", host.lower()}
        self._cookie = hmac.new(secrets.token_bytes(32), (token or "").encode(), hashlib.sha256).hexdigest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        refusal = await self._refusal(scope, receive)
        await (refusal or self._app)(scope, receive, send_guarded)

    async def _refusal(self, scope: Scope, receive: Receive) -> Response | None:
        """What is answered instead of the page; ``None`` for a request that may go on."""
        path, method, headers = scope["path"], scope["method"], Headers(scope=scope)
        if self._token is None and _host_name(headers.get("host", "")) not in self._names:
            return PlainTextResponse("this monitor answers on this machine only\n", 421)
        if method == "POST" and path == "/login" and self._token is not None:
            return await self._log_in(scope, receive)
        if method not in ("GET", "HEAD"):
            return PlainTextResponse("this monitor can only be read\n", 405, {"Allow": "GET, HEAD"})
        known = self._knows(headers)
        scope["recon.known"] = known
        if known or path in OPEN_PATHS:
            return None
        if "text/html" in headers.get("accept", ""):
            return RedirectResponse("/login", 303)
        return PlainTextResponse("a token is needed\n", 401, {"WWW-Authenticate": 'Bearer realm="recon-gadgets"'})

    def _knows(self, headers: Headers) -> bool:
        if self._token is None:
            return True
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and _same(given.strip(), self._token):
            return True
        return _same(_cookie(headers.get("cookie", "")), self._cookie)

    async def _log_in(self, scope: Scope, receive: Receive) -> Response:
        request, body = Request(scope, receive), b""
        async for piece in request.stream():
            body += piece
            if len(body) > MAX_FORM:
                return PlainTextResponse("too long\n", 413)
        given = ""
        with contextlib.suppress(ValueError):  # a form of many fields is not ours
            given = parse_qs(body.decode("ascii", errors="replace"), max_num_fields=4).get("token", [""])[0]
        if not _same(given, self._token or ""):
            logger.warning("event=monitor_login_refused")
            return RedirectResponse("/login?again=1", 303)
        answer = RedirectResponse("/", 303)
        answer.set_cookie(
            COOKIE,
            self._cookie,
            max_age=COOKIE_SECONDS,
            httponly=True,
            samesite="strict",
            secure=scope.get("scheme") == "https",
            path="/",
        )
        return answer


def _same(given: str, wanted: str) -> bool:
    """Compared in a time that says nothing about either: both are hashed first, so their lengths do not show."""
    digests = [hashlib.sha256(text.encode("utf-8", errors="surrogateescape")).digest() for text in (given, wanted)]
    return hmac.compare_digest(*digests)


def _cookie(header: str) -> str:
    try:
        found = SimpleCookie(header[:8192]).get(COOKIE)
    except CookieError:
        return ""
    return "" if found is None else found.value


def _host_name(header: str) -> str:
    """The name in a Host header, without port and brackets."""
    name = header.strip().lower()
    if name.startswith("["):
        return name[1:].partition("]")[0]
    return name.partition(":")[0]
