"""Ports for servers that cannot take a free one by themselves, and for clients that are to find nobody."""

from __future__ import annotations

import socket

_claimed: list[socket.socket] = []


def free_ports(n: int) -> list[int]:
    """Ports of loopback where nobody listens, and that no other program is given.

    They stay bound, without listening, until this process ends. Who sets ``SO_REUSEADDR``, as servers do, can listen on them.
    """
    ports = []
    for _ in range(n):
        held = socket.socket()
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        _claimed.append(held)
        ports.append(int(held.getsockname()[1]))
    return ports
