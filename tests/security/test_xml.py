"""XML from a peer or a file: no entities, and bounded in depth, length and what it costs."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import pytest

from gadgets.chain import chain_from_script, node_properties, noise_dependency_request
from gadgets.meta import read_meta
from gadgets.node import node_request
from gadgets.wire import codec
from gadgets.wire.events import ConfigScript, HeaderText, Problem
from gadgets.wire.framing import FrameParser
from gadgets.wire.header import parse_header
from gadgets.wire.limits import Limits
from recon_core.errors import ReconError
from tests.gadgets.serving import HEADER

READERS: dict[str, tuple[Callable[[str], object], str]] = {
    "header": (parse_header, "ismrmrdHeader"),
    "configuration": (chain_from_script, "configuration"),
    "node": (node_properties, "configuration"),
    "node-request": (node_request, "configuration"),
    "noise": (noise_dependency_request, "gadgetronStreamConfiguration"),
    "attributes": (read_meta, "ismrmrdMeta"),
}
"""Everything that reads XML, and the root element that it wants."""

LAUGHS = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 12))
DTDS = {
    "empty": "<!DOCTYPE r>",
    "laughs": f'<!DOCTYPE r [<!ENTITY l0 "lol">{LAUGHS}]>',
    "quadratic": '<!DOCTYPE r [<!ENTITY a "' + "x" * 50_000 + '">]>',
    "file": '<!DOCTYPE r [<!ENTITY a SYSTEM "file:///etc/passwd">]>',
    "network": '<!DOCTYPE r [<!ENTITY a SYSTEM "http://127.0.0.1:1/x">]>',
    "parameter": '<!DOCTYPE r [<!ENTITY % a SYSTEM "file:///etc/passwd"> %a;]>',
    "external": '<!DOCTYPE r SYSTEM "http://127.0.0.1:1/x.dtd">',
}

every_reader = pytest.mark.parametrize("reader", READERS)


def document(reader: str, inside: str, before: str = "") -> str:
    _, root = READERS[reader]
    marker = "NoiseSummaryGadget" if reader == "noise" else ""  # only such documents are looked at
    return f'<?xml version="1.0"?>{before}<{root}>{marker}{inside}</{root}>'


@every_reader
@pytest.mark.parametrize("dtd", DTDS)
def test_no_document_types_and_no_entities(reader: str, dtd: str) -> None:
    reference = "&l11;" if dtd == "laughs" else "&a;" * 1000
    read, _ = READERS[reader]
    for inside in (reference, "<a/>"):
        with pytest.raises(ReconError):
            read(document(reader, inside, DTDS[dtd]))


@every_reader
def test_undefined_entities(reader: str) -> None:
    with pytest.raises(ReconError):
        READERS[reader][0](document(reader, "&unknown;"))


@every_reader
@pytest.mark.parametrize(
    "inside",
    [
        "<a>" * 100_000 + "</a>" * 100_000,
        "<a/>" * 150_000,
        "<a " + " ".join(f'a{i}="x"' for i in range(50_000)) + "/>",
        "<a>" + "x" * 600_000 + "</a>",
        "<a><![CDATA[" + "]]" * 300_000 + "]]></a>",
        "<!--" + "x" * 600_000 + "-->",
        "&#x41;" * 100_000,
        "<" + "n" * 300_000 + "/>",
        "<a xmlns:b='" + "u" * 300_000 + "'><b:c/></a>",
    ],
    ids=["deep", "wide", "attributes", "long", "cdata", "comment", "references", "name", "namespace"],
)
def test_what_a_document_may_cost(reader: str, inside: str) -> None:
    """As large as its message may be: an answer (or a refusal) in bounded memory, and never a recursion without end."""
    text = document(reader, inside)
    assert len(text) <= Limits().config_script
    tracemalloc.start()
    try:
        READERS[reader][0](text)
    except ReconError as error:
        assert len(str(error)) <= 4000 and str(error).isprintable()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 120 << 20


@pytest.mark.parametrize("length", [Limits().header + 1, (1 << 32) - 1])
def test_announced_lengths_are_refused_before_anything_is_kept(length: int) -> None:
    for number in (2, 3):
        parser = FrameParser()
        tracemalloc.start()
        start = codec.config_file("fourier") if number == 3 else b""
        found = parser.feed(start + number.to_bytes(2, "little") + length.to_bytes(4, "little") + b"<")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert isinstance(found[-1], Problem) and parser.lost and peak < 1 << 20


def test_texts_below_the_limit_arrive() -> None:
    found = FrameParser().feed(codec.config_script("x" * Limits().config_script) + codec.header(HEADER))
    assert [type(event) for event in found] == [ConfigScript, HeaderText]


@every_reader
@pytest.mark.parametrize("encoding", ["utf-7", "utf-16", "idna", "zlib_codec", "rot13", "unicode_escape", "x" * 5000])
def test_declared_encodings_change_nothing(reader: str, encoding: str) -> None:
    read, root = READERS[reader]
    marker = "NoiseSummaryGadget" if reader == "noise" else ""
    text = f'<?xml version="1.0" encoding="{encoding}"?><{root}>{marker}+ADw-/{root}>'
    try:
        read(text)
    except ReconError:
        return
    assert reader == "noise"
