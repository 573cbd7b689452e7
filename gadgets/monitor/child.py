"""The monitor as a child process of the server: started beside it, started again when it ends, never waited for."""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import threading
from pathlib import Path
from types import TracebackType

from gadgets.monitor.command import parse_address, require_packages
from gadgets.orphans import module_process
from recon_core.errors import SettingError

logger = logging.getLogger(__name__)

FIRST_PAUSE, LONGEST_PAUSE = 1.0, 60.0
"""Seconds before a monitor that ended is started again; twice as long each time."""

STOP_SECONDS = 5.0


def monitor_beside(
    spool: Path | None, listen: str | None, token_file: Path | None
) -> contextlib.AbstractContextManager[object]:
    """The monitor of a server that keeps its raw data in ``spool``; nothing when no address is named.

    Raises
    ------
    SettingError, MissingExtra
        As ``MonitorChild``; or there is no spool to look into, or a token for no page.
    """
    if listen is None and token_file is not None:
        raise SettingError(
            "a token, but no page", where="--monitor-token-file", remedy="Name its address: --monitor HOST:PORT"
        )
    if listen is None:
        return contextlib.nullcontext()
    if spool is None:
        raise SettingError("there is nothing to monitor", where="--monitor", expected="raw data that are kept (--keep-raw)")
    return MonitorChild(spool.expanduser(), listen, token_file)


class MonitorChild:
    """Keeps a monitor running while the server runs; a context manager.

    Parameters
    ----------
    spool, listen, token_file
        Of the command ``recon monitor``.

    Raises
    ------
    SettingError
        No address, one that is open to the network without a token, or no token in the file.
    MissingExtra
        The packages of the extra ``monitor`` are not installed.
    """

    def __init__(self, spool: Path, listen: str, token_file: Path | None) -> None:
        require_packages()
        from gadgets.monitor.access import read_token, require_token

        # a typing error ends the command now; later nothing about the monitor may
        require_token(parse_address(listen)[0], None if token_file is None else read_token(token_file))
        self._arguments = ["--spool", str(spool), "--listen", listen]
        self._arguments += [] if token_file is None else ["--token-file", str(token_file)]
        self._stop = threading.Event()
        self._child: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._keep, name="monitor", daemon=True)

    def __enter__(self) -> MonitorChild:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        with self._lock:
            child = self._child
        if child is not None:
            child.terminate()
            try:
                child.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()  # whatever it hangs in
        self._thread.join(STOP_SECONDS)

    def _keep(self) -> None:
        pause = FIRST_PAUSE
        while not self._stop.is_set():
            code = self._once()
            if self._stop.is_set():
                return
            logger.error("event=monitor_ended code=%s again_in=%.0f", code, pause)
            self._stop.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _once(self) -> int | None:
        command, environment = module_process("gadgets.monitor", *self._arguments, "--with-parent", str(os.getpid()))
        try:
            with self._lock:
                if self._stop.is_set():
                    return None
                # a session of its own: Ctrl-C is the server's to hear
                self._child = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, start_new_session=True)
            return self._child.wait()
        except OSError as error:
            logger.error("event=monitor_not_started error=%s", error.strerror)
            return None
        finally:
            with contextlib.suppress(Exception), self._lock:
                self._child = None
