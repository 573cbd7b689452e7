"""Who may connect: networks that are let in, and how many connections each address and all of them together may have open.

MRD has neither names nor passwords. What can be judged of a peer before its first byte is its address, so that is judged first.
"""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from recon_core.errors import SettingError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_NETWORKS = 256


class AllowList:
    """Networks whose peers may connect; an empty list lets in everyone who can reach the port.

    Parameters
    ----------
    networks
        Addresses or networks: ``10.1.2.0/24``, ``192.168.0.7``, ``::1``.

    Raises
    ------
    SettingError
        One of them is neither, has bits behind its mask, or there are too many.

    Notes
    -----
    Nothing is let in besides what is listed, not even loopback. An IPv4 peer of an IPv6 socket (``::ffff:10.1.2.3``) counts as
    the IPv4 address it is.
    """

    def __init__(self, networks: Iterable[str] = ()) -> None:
        texts = [text.strip() for text in networks]
        if len(texts) > MAX_NETWORKS:
            raise SettingError("too many networks", where="allow", got=len(texts), expected=f"at most {MAX_NETWORKS}")
        self.networks: tuple[Network, ...] = tuple(_network(text) for text in texts)

    def __bool__(self) -> bool:
        return bool(self.networks)

    def allows(self, address: str) -> bool:
        """Whether a peer of this numeric address may connect. What is no address may not."""
        if not self.networks:
            return True
        found = _address(address)
        return found is not None and any(found.version == net.version and found in net for net in self.networks)


def require_guarded(host: str, allow: AllowList, *, allow_any: bool) -> None:
    """Refuse to open an unguarded port to the network.

    Parameters
    ----------
    host
        Where the server is to listen.
    allow
        The peers' networks.
    allow_any
        The administrator says that every peer may connect: something else guards the port.

    Raises
    ------
    SettingError
        ``host`` is not loopback, and nothing says who may connect.
    """
    if is_loopback(host) or allow or allow_any:
        return
    raise SettingError(
        "this address is open to the network, and nothing says who may connect",
        where="host",
        got=host or "(every address)",
        expected="127.0.0.1, or an allow-list of the scanners' addresses",
        remedy="--allow 10.1.2.0/24 lets in one network; --allow-any everyone who can reach the port",
    )


def is_loopback(host: str) -> bool:
    """Whether listening on ``host`` can only be reached from this machine. Names count when all their addresses are loopback."""
    found = _address(host)
    if found is not None:
        return found.is_loopback
    try:
        known = {_address(str(info[4][0])) for info in socket.getaddrinfo(host, None)} if host else set()
    except (OSError, UnicodeError):
        return False
    return bool(known) and all(address is not None and address.is_loopback for address in known)


@dataclass(frozen=True)
class Quota:
    """Connections at once. ``refusals`` are connections above the others that are still told why they are not served."""

    total: int = 32
    per_address: int = 24
    refusals: int = 32
    refusals_per_address: int = 8


class Places:
    """Counts open connections by address. Connections that are refused politely have places of their own: they must not take
    those of scanners."""

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self._lock = threading.Lock()
        self._served: Counter[str] = Counter()
        self._refused: Counter[str] = Counter()

    def take(self, address: str) -> Place | None:
        """A place for one connection; ``None`` when there is not even one for a refusal. `Place.leave` gives it back."""
        quota = self.quota
        with self._lock:
            total, own = self._served.total(), self._served[address]
            reason = None
            if total >= quota.total:
                reason = f"the server is busy with {total} connections"
            elif own >= quota.per_address:
                reason = f"the server is busy with {own} connections of this peer"
            if reason is None:
                self._served[address] += 1
                return Place(self, address, None)
            if self._refused.total() >= quota.refusals or self._refused[address] >= quota.refusals_per_address:
                return None
            self._refused[address] += 1
            return Place(self, address, reason)

    def _leave(self, place: Place) -> None:
        counts = self._served if place.refusal is None else self._refused
        with self._lock:
            counts[place.address] -= 1
            if not counts[place.address]:
                del counts[place.address]  # addresses come and go; the table must not grow with them

    def __len__(self) -> int:
        with self._lock:
            return self._served.total() + self._refused.total()


class Place:
    """One connection's place. ``refusal`` says why it is not served, ``None`` when it is."""

    def __init__(self, places: Places, address: str, refusal: str | None) -> None:
        self._places, self._left = places, False
        self.address, self.refusal = address, refusal

    def leave(self) -> None:
        """Give it back; once is enough."""
        if not self._left:
            self._left = True
            self._places._leave(self)


def _network(text: str) -> Network:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        raise SettingError(
            "neither an address nor a network",
            where="allow",
            got=repr(text[:64]),
            expected="as 10.1.2.0/24, 10.1.2.3 or ::1",
        ) from None


def _address(text: str) -> Address | None:
    """A numeric address without its zone; IPv4 inside IPv6 as IPv4."""
    try:
        found = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found
