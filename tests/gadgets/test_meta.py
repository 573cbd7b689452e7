"""Attributes against an outside reader (ismrmrd-python), and what must never leave the house."""

import ismrmrd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gadgets.errors import MalformedText
from gadgets.meta import BOTH_FAMILIES, both_families, direction_texts, read_meta, write_meta
from recon_core.errors import DataError

KEYS = st.from_regex(r"[A-Za-z_][A-Za-z0-9_]{0,20}", fullmatch=True)
TEXTS = st.text(max_size=30)


def test_written_attributes_are_what_ismrmrd_reads() -> None:
    text = write_meta({"WindowWidth": 300, "ImageComments": ['a <b> & "c"', "χ in ppb"], "RescaleSlope": 0.1, "Flag": True})
    meta = ismrmrd.Meta.deserialize(text)
    assert meta["WindowWidth"] == "300"
    assert meta["ImageComments"] == ['a <b> & "c"', "χ in ppb"]
    assert float(meta["RescaleSlope"]) == 0.1
    assert meta["Flag"] == "1"


def test_keys_are_sorted_and_the_text_is_ascii() -> None:
    text = write_meta({"b": "Überlagerung", "a": 1, "C": 2.5})
    assert text.isascii()
    assert list(read_meta(text)) == ["C", "a", "b"]
    assert read_meta(text)["b"] == ("Überlagerung",)


@pytest.mark.parametrize("empty", ["", "   ", "\0\0", [], [""], ("", " ")])
def test_an_empty_value_is_left_out_with_its_key(empty: object) -> None:
    assert "gone" not in write_meta({"gone": empty, "kept": 1})  # type: ignore[dict-item]
    assert write_meta({"gone": empty}) == ""  # type: ignore[dict-item]


@given(st.dictionaries(KEYS, st.lists(TEXTS, min_size=1, max_size=3), max_size=5))
def test_any_text_survives_without_a_forbidden_character(entries: dict[str, list[str]]) -> None:
    text = write_meta(entries)
    assert "\0" not in text and text.isascii()
    for key, values in read_meta(text).items():
        assert all(value.strip() for value in values)
        ordinary = {v.strip() for v in entries[key] if v.isprintable() and v.strip()}
        assert ordinary <= set(values)
    if text:
        outside = ismrmrd.Meta.deserialize(text)
        assert None not in [v for value in outside.values() for v in (value if isinstance(value, list) else [value])]


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_read_back_exactly(value: float) -> None:
    assert float(read_meta(write_meta({"x": value}))["x"][0]) == value


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_is_refused(bad: float) -> None:
    with pytest.raises(DataError, match="WindowCenter"):
        write_meta({"WindowCenter": bad})


def test_a_key_that_is_no_name_is_refused() -> None:
    with pytest.raises(DataError):
        write_meta({"a<b": 1})


@pytest.mark.parametrize(
    "text",
    [
        "no xml",
        "<ismrmrdMeta>",
        "<other/>",
        "<ismrmrdMeta><meta><value>1</value></meta></ismrmrdMeta>",
        '<!DOCTYPE a [<!ENTITY b "c">]><ismrmrdMeta><meta><name>x</name><value>&b;</value></meta></ismrmrdMeta>',
    ],
)
def test_what_is_no_meta_document_is_refused_by_type(text: str) -> None:
    with pytest.raises(MalformedText):
        read_meta(text)


def test_other_writers_documents_are_read() -> None:
    assert read_meta("") == {} == read_meta("\0")
    theirs = ismrmrd.Meta({"a": ["1", "2"], "b": "x & y"}).serialize() + "\0"
    assert read_meta(theirs) == {"a": ("1", "2"), "b": ("x & y",)}
    twice = (
        "<ismrmrdMeta><meta><name>a</name><value>1</value></meta><meta><name>a</name><value>2</value></meta></ismrmrdMeta>"
    )
    assert read_meta(twice) == {"a": ("1", "2")}


def test_every_standard_key_gets_its_twin_and_a_given_twin_wins() -> None:
    entries = {key: 1 for key in BOTH_FAMILIES}
    assert set(both_families(entries)) == set(BOTH_FAMILIES) | set(BOTH_FAMILIES.values())
    chosen = both_families({"WindowCenter": 1300, "GADGETRON_WindowCenter": 13000})
    assert chosen["GADGETRON_WindowCenter"] == 13000 and chosen["WindowCenter"] == 1300


def test_directions_have_18_digits() -> None:
    assert direction_texts((1.0, -0.5, 0.1)) == ("1.000000000000000000", "-0.500000000000000000", "0.100000000000000006")
