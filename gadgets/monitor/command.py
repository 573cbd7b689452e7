"""The command ``recon monitor``: the web page, health and metrics of a server's spool, in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from gadgets.errors import MissingExtra, SpoolError, WireError
from gadgets.log_lines import log_to_stderr
from gadgets.orphans import end_with
from recon_core.errors import ReconError, SettingError

NICENESS = 5
"""Looking yields to reading, and comes before computing: a page that answers late is no use."""

MAX_CONNECTIONS = 100
PACKAGES = ("starlette", "uvicorn", "jinja2", "prometheus_client")


def require_packages() -> None:
    """Raise before anything is started.

    Raises
    ------
    MissingExtra
        One of the packages of the extra ``monitor`` is not installed.
    """
    for name in PACKAGES:
        if importlib.util.find_spec(name) is None:
            remedy = "pip install 'recon-gadgets[monitor]'"
            raise MissingExtra("package is not installed", where="monitor", got=name, remedy=remedy)


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of ``127.0.0.1:9100``, ``[::1]:9100`` or ``:9100`` (loopback).

    Raises
    ------
    SettingError
        It is neither.
    """
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]") or "127.0.0.1"
    if not colon or not port.isdecimal() or int(port) > 65535 or any(c.isspace() for c in host):
        raise SettingError("not an address", where="monitor", got=repr(text[:80]), expected="HOST:PORT, as 127.0.0.1:9100")
    return host, int(port)


def require_spool(spool: Path) -> None:
    """Raise where nothing would ever be seen. A folder that goes while the monitor looks is a failed check, no end.

    Raises
    ------
    SpoolError
        No folder.
    """
    if not spool.is_dir():
        got = "no folder" if spool.exists() else "does not exist"
        raise SpoolError(
            "nothing to monitor", where=str(spool), got=got, expected="a server's folder of raw data",
            remedy="Correct --spool; a folder that is not there yet is made by the server: start that first",
        )  # fmt: skip


def monitor(
    spool: Annotated[Path, typer.Option(help="The server's folder of raw data.")],
    listen: Annotated[str, typer.Option(help="HOST:PORT; port 0 takes a free one.")] = "127.0.0.1:9100",
    token_file: Annotated[
        Path | None, typer.Option(help="File whose first line one has to know. Needed on any address but loopback.")
    ] = None,
    with_parent: Annotated[int | None, typer.Option(hidden=True, help="End with this process.")] = None,
) -> None:
    """Show a server's health, metrics and jobs to a browser; reads the same folders, and outlives the server."""
    require_packages()
    from gadgets.monitor.access import read_token, require_token

    spool = spool.expanduser()
    require_spool(spool)
    host, port = parse_address(listen)
    token = None if token_file is None else read_token(token_file)
    require_token(host, token)
    with contextlib.suppress(OSError):
        os.nice(NICENESS)
    if with_parent is not None:
        end_with(with_parent, look_every=0.5)  # the next server's monitor will need the port
    with _bound(host, port) as listener:
        serve(listener, host, spool, token)


def serve(listener: socket.socket, host: str, spool: Path, token: str | None) -> None:
    """Answer until the process is told to end."""
    import uvicorn

    from gadgets.monitor.folder import Folder
    from gadgets.monitor.pictures import Gallery
    from gadgets.monitor.web import application

    folder, gallery = Folder(spool), Gallery(spool)
    config = uvicorn.Config(
        application(folder, gallery, host=host, token=token),
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        http="h11",
        loop="asyncio",
        lifespan="off",
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=10,
        timeout_graceful_shutdown=1,
    )
    try:
        shown = f"[{host}]" if ":" in host else host
        print(f"monitor on http://{shown}:{listener.getsockname()[1]}/", flush=True)
        uvicorn.Server(config).run(sockets=[listener])
    finally:
        gallery.close()
        folder.close()


@contextlib.contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=64)
    except (OSError, UnicodeError) as error:
        got = getattr(error, "strerror", None) or type(error).__name__
        raise WireError("cannot listen", where=f"{host}:{port}", got=got, remedy="Is another monitor running?") from error
    with listener:
        yield listener


def main() -> None:
    """Entry point of the process that the server starts: failures are one line on stderr."""
    log_to_stderr("WARNING")
    try:
        typer.run(monitor)
    except ReconError as error:
        print(f"recon monitor: {type(error).__name__}: {error}", file=sys.stderr)
        raise SystemExit(1) from None
