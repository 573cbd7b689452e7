"""The legal order of messages, and FIRE's parameters."""

from __future__ import annotations

import json

import numpy as np
import pytest

from gadgets.errors import IllegalOrder, MalformedText
from gadgets.wire import events
from gadgets.wire.dtypes import ACQUISITION_HEADER
from gadgets.wire.session import CLOSED, NEXT, Session, fire_parameters

CONFIG, SCRIPT, HEADER = events.ConfigFile(0, "a"), events.ConfigScript(0, "a"), events.HeaderText(0, "h")
CLOSE, TEXT, QUERY = events.Close(0), events.Text(0, "t"), events.Query(0, 1, "q")
DATA = events.Readouts(0, np.zeros(1, ACQUISITION_HEADER), np.zeros(1, np.int64), np.zeros(1, np.int64))


@pytest.mark.parametrize(
    "order",
    [
        [CLOSE],
        [QUERY, CLOSE],
        [CONFIG, CLOSE],
        [SCRIPT, CLOSE],
        [CONFIG, HEADER, CLOSE],
        [QUERY, CONFIG, QUERY, HEADER, QUERY, DATA, QUERY, DATA, CLOSE],
        [SCRIPT, HEADER, TEXT, DATA, CLOSE],
    ],
)
def test_legal(order: list[events.Event]) -> None:
    session = Session()
    for event in order:
        assert session.state != CLOSED
        session.accept(event)
    assert session.state == CLOSED


@pytest.mark.parametrize(
    "order",
    [
        [HEADER],
        [DATA],
        [TEXT],
        [CONFIG, DATA],
        [CONFIG, TEXT],
        [CONFIG, CONFIG],
        [CONFIG, SCRIPT],
        [CONFIG, HEADER, HEADER],
        [CONFIG, HEADER, SCRIPT],
        [CONFIG, HEADER, DATA, HEADER],
        [CONFIG, HEADER, DATA, CONFIG],
        [CLOSE, CLOSE],
        [QUERY, CLOSE, QUERY],
    ],
)
def test_illegal(order: list[events.Event]) -> None:
    session = Session()
    for event in order[:-1]:
        session.accept(event)
    state = session.state
    with pytest.raises(IllegalOrder, match=type(order[-1]).__name__):
        session.accept(order[-1])
    assert session.state == state
    if state != "closed":
        session.accept(CLOSE)


def test_every_open_state_takes_close_and_query() -> None:
    states = {state for state, _ in NEXT} | set(NEXT.values())
    for state in states - {"closed"}:
        assert NEXT[state, events.Close] == "closed"
        assert NEXT[state, events.Query] == state


def test_problems_are_raised() -> None:
    error = MalformedText("x")
    with pytest.raises(MalformedText) as info:
        Session().accept(events.Problem(0, error))
    assert info.value is error


def test_fire_parameters() -> None:
    text = json.dumps({"version": "1.1.0", "parameters": {"config": "llr", "a": True, "b": 8, "c": 0.5, "d": "False"}})
    assert fire_parameters(" " + text) == {"config": "llr", "a": "True", "b": "8", "c": "0.5", "d": "False"}
    assert fire_parameters('{"version": "1", "parameters": {}}') == {}


@pytest.mark.parametrize("text", ["", "hello", "{", "[1]", "{}", '{"version": "1"}', "{" + '"a":[' * 50_00, '"x"', "{1:2}"])
def test_ordinary_texts(text: str) -> None:
    assert fire_parameters(text) is None


@pytest.mark.parametrize(
    "parameters", [[1], "x", {"a": None}, {"a": {"b": 1}}, {"a": [1]}, {str(i): i for i in range(300)}, {"a": "x" * 70_000}]
)
def test_bad_parameters(parameters: object) -> None:
    with pytest.raises(MalformedText):
        fire_parameters(json.dumps({"version": "1", "parameters": parameters}))
