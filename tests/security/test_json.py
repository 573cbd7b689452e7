"""JSON from a console: numbers that are none, missing and odd fields, depth, and names that are no settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gadgets.chain import load_chain
from gadgets.errors import WireError
from gadgets.wire import codec
from gadgets.wire.session import fire_parameters
from recon_core.errors import ReconError, SettingError
from tests.gadgets.serving import HEADER, data, serving, still_works


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        '{"parameters"',
        '{"parameters": null}',
        '{"version": "1.1.0"}',
        "{" * 60_000,
        '{"parameters": ' + "[" * 30_000,
        '{"a": NaN, "parameters"}',
        '{"parameters": {"a": 1}} trailing',
        "\ufeff{}",
    ],
)
def test_what_holds_no_parameters(text: str) -> None:
    assert fire_parameters(text) is None


@pytest.mark.parametrize(
    "text",
    [
        '{"parameters": []}',
        '{"parameters": "x"}',
        '{"parameters": 3}',
        '{"parameters": {"a": null}}',
        '{"parameters": {"a": {}}}',
        '{"parameters": {"a": [1]}}',
        json.dumps({"parameters": {f"a{i}": 1 for i in range(300)}}),
        json.dumps({"parameters": {"a": "x" * 70_000}}),
    ],
)
def test_what_is_refused(text: str) -> None:
    with pytest.raises(WireError):
        fire_parameters(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=10,
)


@given(JSON)
@settings(max_examples=200, deadline=None)
def test_any_document(document: object) -> None:
    for value in (document, {"parameters": document}, {"parameters": {"a": document}}):
        try:
            found = fire_parameters(json.dumps(value))
        except WireError:
            continue
        assert found is None or all(isinstance(entry, str) for pair in found.items() for entry in pair)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "1" * 400, "-1", "0x10", " ", "True"])
def test_numbers_that_are_none(value: str) -> None:
    """JSON's reader takes NaN; a setting does not."""
    try:
        parameters = fire_parameters('{"parameters": {"regularisation": %s}}' % value) or {}  # noqa: UP031
    except WireError:
        parameters = {}
    for text in {value, *parameters.values()}:
        for chain, name in (("llr", "iterations"), ("llr", "regularisation"), ("cg_sense", "tolerance")):
            with pytest.raises(SettingError):
                load_chain(chain, {name: text})


@given(st.text(max_size=30), st.text(max_size=30))
@settings(max_examples=100, deadline=None)
def test_any_setting_is_known_or_refused(name: str, value: str) -> None:
    try:
        load_chain("fourier", {name: value})
    except ReconError as error:
        assert str(error).isprintable()


def test_a_server_that_gets_such_things_lives_on(tmp_path: Path) -> None:
    start = codec.config_file("fourier") + codec.header(HEADER)
    with serving(tmp_path) as served:
        for text in (
            '{"parameters": [',
            '{"parameters": []}',
            "{" * 60_000,
            '{"parameters": {"a": NaN}}',
            '{"parameters": {"a": null}}',
        ):
            answer = served.client().send(start + codec.text(text) + data() + codec.close())
            assert all("internal error" not in said for said in answer.texts)
        still_works(served)
