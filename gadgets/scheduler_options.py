"""Which Dask scheduler, and whether it may be used: a scheduler runs whatever code it is sent, so who can reach it owns the workers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from gadgets.admission import is_loopback
from gadgets.errors import SchedulerError

EXPECTED = "tls://HOST:PORT, tcp://127.0.0.1:PORT or local:N"
MOST_LOCAL = 256


@dataclass(frozen=True)
class SchedulerOptions:
    """Address of the scheduler and the certificates to show it. Valid once constructed.

    Attributes
    ----------
    address
        ``tls://host:port``; ``tcp://host:port`` on loopback; ``local:N`` starts a scheduler and N workers on this machine.
    ca, cert, key
        PEM files: the cluster's own authority, and this server's certificate and key of it. Needed for ``tls``.
    insecure
        Allow ``tcp`` beyond loopback: on a network of which every machine may run code on the workers.

    Raises
    ------
    SchedulerError
        Not such an address, an open network without ``insecure``, or certificates that are missing.
    """

    address: str
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    insecure: bool = False

    def __post_init__(self) -> None:
        given = {"ca": self.ca, "cert": self.cert, "key": self.key}
        if local_workers(self.address) is not None:
            return
        scheme, host = _parts(self.address)
        if scheme == "tls":
            missing = [name for name, path in given.items() if path is None]
            if missing:
                options = ", ".join(f"--scheduler-{name}" for name in missing)
                raise SchedulerError(
                    "TLS without certificates", where="scheduler", got=f"no {', '.join(missing)}", remedy=f"Give {options}"
                )
            for name, path in given.items():
                if path is not None and not path.is_file():
                    raise SchedulerError("no such file", where=f"--scheduler-{name}", got=str(path))
        elif not is_loopback(host) and not self.insecure:
            raise SchedulerError(
                "a Dask scheduler without TLS beyond loopback: everyone on that network could run code on the workers",
                where="scheduler",
                got=self.address,
                expected=EXPECTED,
                remedy="Use tls:// with certificates, or --scheduler-insecure on a network of its own",
            )


def local_workers(address: str) -> int | None:
    """N of ``local:N``; ``None`` for any other address."""
    found = re.fullmatch(r"local:(\d{1,4})", address)
    if found is None:
        return None
    n = int(found[1])
    if not 1 <= n <= MOST_LOCAL:
        raise SchedulerError(
            "no such number of workers", where="scheduler", got=address, expected=f"local:1 to local:{MOST_LOCAL}"
        )
    return n


def _parts(address: str) -> tuple[str, str]:
    try:
        split = urlsplit(address)
        port, host = split.port, split.hostname
    except ValueError:
        port = host = None
        split = urlsplit("")
    if split.scheme not in ("tcp", "tls") or not host or port is None or split.path or split.query or split.username:
        raise SchedulerError("not a scheduler's address", where="scheduler", got=repr(address[:80]), expected=EXPECTED)
    return split.scheme, host
