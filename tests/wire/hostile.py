"""Hostile streams, made from good ones; the same seed always gives the same bytes."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from gadgets.wire import events
from gadgets.wire.framing import FrameParser

_HUGE = (0, 1, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FFFFFFFFFFFFFFF, 0xFFFFFFFFFFFFFFFF, 1 << 20, (1 << 24) + 1, 1 << 32)
_IDS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1008, 1012, 1018, 1019, 1022, 1023, 1024, 1026, 1030, 1050, 1051, 0xFFFF)


@dataclass(frozen=True)
class Hostile:
    """One bad stream: ``kind`` says what was done to the good one."""

    seed: int
    kind: str
    data: bytes


def boundaries(good: bytes) -> list[int]:
    """Offsets of all messages of a well-formed client stream, and its length."""
    found: list[int] = []
    for event in FrameParser(role="server").feed(good):
        found += event.offsets.tolist() if isinstance(event, events.Readouts) else [event.offset]
    return [*found, len(good)]


def _mutated(good: bytes, marks: list[int], rng: random.Random) -> bytes:
    data = bytearray(good)
    # mostly where it hurts: ids, lengths and headers lie at the beginning of a message
    for _ in range(rng.choice((1, 2, 8, 64))):
        at = rng.choice(marks[:-1]) + rng.randrange(64) if rng.random() < 0.7 else rng.randrange(len(data))
        data[min(at, len(data) - 1)] = rng.randrange(256)
    return bytes(data)


def _truncated(good: bytes, marks: list[int], rng: random.Random) -> bytes:
    at = rng.choice(marks) + rng.randrange(-3, 4) if rng.random() < 0.5 else rng.randrange(len(good))
    return good[: max(at, 0)]


def _oversized(good: bytes, marks: list[int], rng: random.Random) -> bytes:
    data, at, huge = bytearray(good), rng.choice(marks[:-1]), rng.choice(_HUGE)
    number = int.from_bytes(data[at : at + 2], "little")
    if number == 1008:
        field, width = rng.choice(((36, 2), (40, 2), (178, 2), (4, 8)))  # samples, channels, trajectory dimensions, flags
        value = 0xFFFF if width == 2 else rng.getrandbits(64)
    elif number == 1026:
        field, width, value = rng.choice((30, 32)), 2, 0xFFFF
    elif number == 6:
        field, width, value = 18, 8, huge
    else:
        field, width, value = 2, 4, huge
    data[at + field : at + field + width] = (value % (1 << (8 * width))).to_bytes(width, "little")
    return bytes(data[: max(len(good), at)])


def _wrong_id(good: bytes, marks: list[int], rng: random.Random) -> bytes:
    data, at = bytearray(good), rng.choice(marks[:-1])
    data[at : at + 2] = struct.pack("<H", rng.choice(_IDS) if rng.random() < 0.7 else rng.randrange(1 << 16))
    return bytes(data)


def _pieces(good: bytes, marks: list[int]) -> list[bytes]:
    return [good[a:b] for a, b in pairwise(marks)]


def _shuffled(good: bytes, marks: list[int], rng: random.Random) -> bytes:
    pieces = _pieces(good, marks)
    if rng.random() < 0.5:
        rng.shuffle(pieces)
    else:
        for _ in range(3):
            i, j = rng.randrange(len(pieces)), rng.randrange(min(4, len(pieces)))
            pieces[i], pieces[j] = pieces[j], pieces[i]
    return b"".join(pieces)


def _repeated(good: bytes, marks: list[int], rng: random.Random) -> bytes:
    pieces = _pieces(good, marks)
    at = rng.randrange(len(pieces))
    return b"".join([*pieces[:at], *[pieces[at]] * rng.choice((2, 3, 50)), *pieces[at:]])


def _dropped(good: bytes, marks: list[int], rng: random.Random) -> bytes:
    pieces = _pieces(good, marks)
    del pieces[rng.randrange(len(pieces))]
    return b"".join(pieces)


def _inserted(good: bytes, marks: list[int], rng: random.Random) -> bytes:
    at = rng.choice(marks) if rng.random() < 0.5 else rng.randrange(len(good))
    return good[:at] + rng.randbytes(rng.choice((1, 2, 7, 300))) + good[at:]


def _bad_text(good: bytes, marks: list[int], rng: random.Random) -> bytes:
    texts = (
        b"\xff\xfe\xfa",
        b"../../etc/passwd",
        b"<?xml version='1.0'?><!DOCTYPE a [<!ENTITY b 'x'>]><a>&b;</a>",
        b"<configuration><version>2</version><stream><gadget><dll>evil</dll></gadget></stream></configuration>",
        b'{"version": "1.1.0", "parameters": ' + b"[" * 5000,
        b"<a>" * 3000,
        b"",
        b"A" * 5000,
    )
    raw, number = rng.choice(texts), rng.choice((1, 2, 3, 5))
    bad = struct.pack("<H1024s", 1, raw) if number == 1 else struct.pack("<HI", number, len(raw)) + raw
    pieces = _pieces(good, marks)
    at = rng.randrange(min(3, len(pieces)))
    pieces[at : at + rng.randrange(2)] = [bad]
    return b"".join(pieces)


def _noise(good: bytes, marks: list[int], rng: random.Random) -> bytes:
    return rng.randbytes(rng.choice((0, 1, 2, 100, 10_000)))


def _flood(good: bytes, marks: list[int], rng: random.Random) -> bytes:
    small = rng.choice((struct.pack("<HI", 5, 0), struct.pack("<HI", 5, 1) + b"\xff", struct.pack("<HQQQ", 6, 0, 0, 0)))
    at = marks[min(rng.randrange(4), len(marks) - 1)]
    return good[:at] + small * rng.choice((100, 20_000)) + good[at:]


KINDS: dict[str, Callable[[bytes, list[int], random.Random], bytes]] = {
    "mutated": _mutated,
    "truncated": _truncated,
    "oversized": _oversized,
    "wrong id": _wrong_id,
    "shuffled": _shuffled,
    "repeated": _repeated,
    "dropped": _dropped,
    "inserted": _inserted,
    "bad text": _bad_text,
    "noise": _noise,
    "flood": _flood,
}


def hostile(good: bytes, seed: int, marks: list[int] | None = None) -> Hostile:
    """One hostile variant of a well-formed client stream.

    Parameters
    ----------
    good
        What a client sends, from its configuration to CLOSE.
    seed
        Chooses the kind and all details.
    marks
        ``boundaries(good)``, when it is at hand.
    """
    rng = random.Random(seed)
    kind = rng.choice(tuple(KINDS))
    return Hostile(seed, kind, KINDS[kind](good, marks or boundaries(good), rng))


def hostile_streams(goods: Sequence[bytes], seeds: Iterable[int]) -> Iterator[Hostile]:
    """One hostile stream per seed, from the good ones in turn."""
    prepared = [(good, boundaries(good)) for good in goods]
    for seed in seeds:
        good, marks = prepared[seed % len(prepared)]
        yield hostile(good, seed, marks)
