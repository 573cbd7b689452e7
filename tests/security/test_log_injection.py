"""Words of peers and files in the log, on the console and in sidecars: one printable line each, whatever they were."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gadgets.chain import chain_from_script, load_chain
from gadgets.log_lines import LOG_FORMAT, OneLine
from gadgets.meta import read_meta, write_meta
from gadgets.wire import codec
from recon_core.errors import MAX_CHARACTERS, ReconError, plain
from tests.gadgets.serving import HEADER, data, serving, still_works
from tests.strict_client import Answer

FORGED = "x\n2026-01-01 00:00:00.000Z level=INFO logger=gadgets event=forged"
NASTY = [
    FORGED,
    "a\rb",
    "\x1b[2J\x1b[31mred",
    "\x1b]0;title\x07",
    "\x9b31m",
    "bell\x07\x08\x7f",
    "line\u2028separator\u0085",
    "right\u202eto left",
    "zero\u200bwidth",
    "%s%n{0}{x}",
    "[red]rich markup[/red]",
    "A" * 100_000,
]


@given(st.text(max_size=300), st.integers(10, 200))
def test_plain_is_one_printable_line(text: str, most: int) -> None:
    found = plain(text, most)
    assert found.isprintable() and len(found) <= most
    assert found == text or not text.isprintable() or len(text) > most


@pytest.mark.parametrize("words", NASTY)
def test_errors(words: str) -> None:
    error = ReconError("no such chain" + words, where=words, got=words, expected=words, remedy=words)
    assert str(error).isprintable() and len(str(error)) <= MAX_CHARACTERS


@contextmanager
def log() -> Iterator[io.StringIO]:
    """What the real command would write."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(OneLine(LOG_FORMAT))
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield stream
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def test_the_formatter_keeps_one_record_on_one_line() -> None:
    with log() as stream:
        for words in NASTY:
            logging.getLogger("test").warning("event=%s got=%r", words, words)
    lines = stream.getvalue().splitlines()
    assert len(lines) == len(NASTY) and all(line.isprintable() for line in lines)
    assert "level=WARNING logger=test" in lines[0] and max(map(len, lines)) < 10_000


def hostile_sessions(words: str) -> list[bytes]:
    """The same words wherever a peer may put some."""
    name = words.encode("utf-8", "replace")[:1000].decode("utf-8", "ignore").replace("\0", "")
    start = codec.config_file("fourier") + codec.header(HEADER)
    escaped = words.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    script = f'<configuration><version>2</version><stream><external><execute name="{escaped}"/></external></stream></configuration>'
    header = HEADER.replace(
        "<encoding>", f"<measurementInformation><protocolName>{words}</protocolName></measurementInformation><encoding>"
    )
    parameters = codec.text(json.dumps({"parameters": {"config": words, words: words}}))
    return [
        codec.config_file(name) + codec.header(HEADER) + data() + codec.close(),
        codec.config_script(words) + codec.header(HEADER) + data() + codec.close(),
        codec.config_script(script) + codec.header(HEADER) + data() + codec.close(),
        codec.config_file("fourier") + codec.header(header) + data() + codec.close(),
        codec.config_file("fourier") + codec.header(words) + data() + codec.close(),
        start + codec.text(words) + data() + codec.close(),
        start + parameters + data() + codec.close(),
        start + codec.error(words) + data() + codec.close(),
        codec.query(words) + codec.close(),
        codec.config_script(f"NoiseSummaryGadget {words}") + codec.close(),
    ]


def printable(answer: Answer) -> None:
    for text in answer.texts:
        assert text.endswith("\n") and text[:-1].isprintable() and len(text) < 3000


def test_words_of_a_peer(tmp_path: Path) -> None:
    with log() as stream, serving(tmp_path) as served:
        for words in NASTY:
            for session in hostile_sessions(words):
                answer = served.client().send(session, dependency=b"NoiseSummary" in session)
                printable(answer)
                for _, text in answer.responses:
                    assert text == "Unknown query"
        still_works(served)
        captures = served.captures()
    lines = stream.getvalue().splitlines()
    assert all(line.isprintable() for line in lines)
    assert not any(line.startswith("2026-01-01 00:00:00.000Z") for line in lines)
    assert not any("level=ERROR" in line for line in lines), "no hostile word is an internal error"
    for _, info in captures:
        assert str(info["note"]).isprintable() and str(info["chain"]).isprintable()


def test_half_of_a_character_pair(tmp_path: Path) -> None:
    """JSON may hold half of a surrogate pair; no encoding of a text takes it."""
    with serving(tmp_path) as served:
        start = codec.config_file("fourier") + codec.header(HEADER)
        for value in ('"\\ud800"', '"\\udfff\\ud800"'):
            answer = served.client().send(
                start + codec.text('{"parameters": {"config": ' + value + "}}") + data() + codec.close()
            )
            assert len(answer.texts) == 1 and "UnknownChain" in answer.texts[0]
        still_works(served)


@pytest.mark.parametrize("words", NASTY)
def test_settings_of_the_real_chains(words: str) -> None:
    for ask in (
        lambda: load_chain(words),
        lambda: chain_from_script(words),
        lambda: load_chain("fourier", {words: "1"}),
        lambda: load_chain("fourier", {"pixel_type": words}),
        lambda: load_chain("cg_sense", {"iterations": words}),
    ):
        with pytest.raises(ReconError) as caught:
            ask()
        assert str(caught.value).isprintable() and len(str(caught.value)) <= MAX_CHARACTERS


@pytest.mark.parametrize("words", NASTY)
def test_image_comments(words: str) -> None:
    """Elements stay elements: a value ends where it ends, whatever is in it."""
    found = read_meta(write_meta({"ImageComments": words, "Other": words + "</value></meta><meta><name>Forged</name>"}))
    assert set(found) == {"ImageComments", "Other"}
