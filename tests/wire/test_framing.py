"""The frame parser: any chunking, round trips, caps, refusals, truncation."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_array_equal

from gadgets import errors
from gadgets.wire import codec, events
from gadgets.wire.dtypes import DATA_TYPES, READOUT_RECORD, Flag, any_flag
from gadgets.wire.framing import FrameParser, Limits
from tests.wire import streams
from tests.wire.compressed import compressed_acquisitions
from tests.wire.hostile import boundaries
from tests.wire.streams import flatten, parse

SESSIONS = {nul: streams.session(nul) for nul in (False, True)}
WHOLE = {nul: flatten(parse(data, [])[0]) for nul, data in SESSIONS.items()}


def one(data: bytes, role: str = "server", limits: Limits | None = None) -> events.Event:
    (only,) = FrameParser(limits, role).feed(data)  # type: ignore[arg-type]
    return only


def problem(data: bytes, role: str = "server", limits: Limits | None = None) -> errors.WireError:
    event = one(data, role, limits)
    assert isinstance(event, events.Problem)
    return event.error


def acquisitions(flags: int = 0, n: int = 1) -> bytes:
    headers, samples, _ = streams.readouts(n, 2, 4)
    data = codec.acquisitions(headers, samples)
    for i in range(n):
        struct.pack_into("<Q", data, i * (len(data) // n) + 4, flags)
    return bytes(data)


@given(st.booleans(), st.lists(st.integers(0, len(SESSIONS[False])), max_size=40))
@settings(max_examples=150, deadline=None)
def test_chunking_does_not_matter(nul: bool, cuts: list[int]) -> None:
    data = SESSIONS[nul]
    found, parser = parse(data, sorted(min(c, len(data)) for c in cuts))
    assert flatten(found) == WHOLE[nul]
    assert parser.closed


@pytest.mark.parametrize("size", [1, 2, 341, 342, 343])
def test_fixed_chunks(size: int) -> None:
    data = SESSIONS[False]
    assert flatten(parse(data, list(range(size, len(data), size)))[0]) == WHOLE[False]


def test_captures_in_chunks(capture: Callable[[str], bytes]) -> None:
    rng = np.random.default_rng(0)
    for name, role in (
        ("client_compressed_precision.bin", "server"),
        ("gadgetron_answer_default.bin", "client"),
        ("gadgetron_node_bucket.bin", "node"),
        ("gadgetron_node_recondata.bin", "node"),
    ):
        data = capture(name)
        cuts = sorted(rng.integers(0, len(data), 200).tolist())
        assert flatten(parse(data, cuts, role)[0]) == flatten(parse(data, [], role)[0])


def test_runs_of_changing_shapes_are_framed_in_order() -> None:
    """The vectorised path must stop exactly where the shape changes, wherever that is inside its blocks."""
    rng = np.random.default_rng(1)
    parts, shapes = [], []
    for i in range(60):
        n, channels, samples = int(rng.choice([1, 2, 3, 63, 64, 65, 200])), int(rng.integers(1, 3)), int(rng.integers(1, 4))
        headers, values, _ = streams.readouts(n, channels, samples, seed=i)
        headers["user_int"][:, 0] = i
        parts.append(codec.acquisitions(headers, values))
        shapes += [(i, k, channels, samples) for k in range(n)]
    found, _ = parse(b"".join(parts), [])
    (event,) = found
    assert isinstance(event, events.Readouts)
    got = event.headers
    assert shapes == list(
        zip(
            got["user_int"][:, 0].tolist(),
            got["scan_counter"].tolist(),
            got["active_channels"].tolist(),
            got["number_of_samples"].tolist(),
            strict=True,
        )
    )
    assert_array_equal(np.diff(event.offsets), event.payload_bytes[:-1] + READOUT_RECORD.itemsize)


def test_readouts_are_announced_when_their_bytes_are_complete() -> None:
    data = acquisitions(n=3)
    parser = FrameParser()
    assert parser.feed(data[:-1])[0].offsets.tolist() == [0, len(data) // 3]  # type: ignore[attr-defined]
    (last,) = parser.feed(data[-1:])
    assert last.offset == 2 * len(data) // 3


def test_round_trip_of_texts() -> None:
    script = "<configuration>ÄÖÜ</configuration>"
    for nul in (False, True):
        assert one(codec.config_script(script, nul)) == events.ConfigScript(0, script)
        assert one(codec.header("x", nul)) == events.HeaderText(0, "x")
    assert one(codec.config_file("Ünïcode.xml")) == events.ConfigFile(0, "Ünïcode.xml")
    assert one(codec.text("")) == events.Text(0, "")
    assert one(codec.query("a", 3)) == events.Query(0, 3, "a")
    assert one(codec.error("e")) == events.ErrorText(0, "e")
    assert one(codec.response(9, "r"), "client") == events.Response(0, 9, "r")
    assert one(codec.dependency("<m/>"), "client") == events.Dependency(0, "<m/>")


def test_config_name_ignores_what_follows_its_nul() -> None:
    assert one(struct.pack("<H1024s", 1, b"a.xml\0garbage\xff")) == events.ConfigFile(0, "a.xml")


@pytest.mark.parametrize("code", sorted(DATA_TYPES))
def test_round_trip_of_images(code: int) -> None:
    event = one(streams.image((2, 3, 4, 5), DATA_TYPES[code].str), "client")
    assert isinstance(event, events.Image)
    assert event.header["data_type"] == code
    assert event.header["matrix_size"].tolist() == [5, 4, 3]
    assert event.header["attribute_string_len"] == len(event.attributes) == 14
    assert_array_equal(event.data, np.arange(120).reshape(2, 3, 4, 5).astype(DATA_TYPES[code]))


def test_gadgetrons_nul_in_attributes() -> None:
    raw = bytearray(streams.image())
    at = 2 + 198
    raw[at : at + 8] = struct.pack("<Q", 15)
    raw[at + 8 + 14 : at + 8 + 14] = b"\0"
    event = one(bytes(raw), "client")
    assert isinstance(event, events.Image)
    assert event.attributes == "<ismrmrdMeta/>"


def test_round_trip_of_waveforms() -> None:
    header, data = streams.waveform(5)
    event = one(codec.waveform(header, data))
    assert isinstance(event, events.Waveform)
    assert event.header["scan_counter"] == 5
    assert event.header["sample_time_us"] == 2500.0
    assert_array_equal(event.data, data)


@given(st.integers(0, len(SESSIONS[False])))
@settings(max_examples=300, deadline=None)
def test_truncation_is_named(cut: int) -> None:
    data = SESSIONS[False]
    found, parser = parse(data[:cut], [cut // 2])
    assert flatten(found) == WHOLE[False][: len(flatten(found))]
    starts = {*boundaries(data), len(data)}
    if cut in starts:
        parser.finish()
    else:
        with pytest.raises(errors.Disconnected) as info:
            parser.finish()
        begin = max(s for s in starts if s <= cut)
        assert info.value.got == f"{cut - begin} bytes of the message"
        assert int(str(info.value.expected).split()[0]) > cut - begin


def test_truncation_at_every_position_of_a_short_session() -> None:
    data = codec.config_script("c") + codec.header("h") + acquisitions() + codec.close()
    ends = np.cumsum([0, len(codec.config_script("c")), len(codec.header("h")), len(acquisitions()), 2]).tolist()
    for cut in range(len(data) + 1):
        _, parser = parse(data[:cut], [])
        if cut in ends:
            parser.finish()
        else:
            with pytest.raises(errors.Disconnected):
                parser.finish()


def test_disconnected_names_message_got_and_expected() -> None:
    parser = FrameParser()
    parser.feed(acquisitions()[:100])
    with pytest.raises(errors.Disconnected, match=r"1008 \(ACQUISITION\).*100 bytes of the message; expected 342 bytes"):
        parser.finish()
    parser = FrameParser()
    parser.feed(codec.text("hello")[:8])
    with pytest.raises(errors.Disconnected, match=r"5 \(TEXT\).*8 bytes of the message; expected 11 bytes"):
        parser.finish()


CAPS = [
    (struct.pack("<HI", 2, (1 << 20) + 1), "server"),
    (struct.pack("<HI", 3, (16 << 20) + 1), "server"),
    (struct.pack("<HI", 5, 0xFFFFFFFF), "server"),
    (struct.pack("<HQQQ", 6, 0, 0, (64 << 10) + 1), "server"),
    (struct.pack("<HQ", 8, 1 << 63), "server"),
    (struct.pack("<HQQ", 7, 0, 1 << 40), "client"),
    (struct.pack("<HQ", 1019, 1 << 40), "client"),
    (struct.pack("<HQ", 1023, 1) + struct.pack("<QQQ", 2, 1 << 32, 1 << 32), "node"),
    (struct.pack("<HQ", 1023, 1) + struct.pack("<QQQ", 2, 0, 1 << 63), "node"),
    (struct.pack("<HQQ", 1023, 1, 1000), "node"),
    (struct.pack("<H13Q", 1050, *[1 << 60] * 13), "node"),
]


@pytest.mark.parametrize(("data", "role"), CAPS)
def test_length_caps(data: bytes, role: str) -> None:
    tracemalloc.start()
    error = problem(data, role)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert isinstance(error, errors.Oversized)
    assert peak < 1 << 20


@pytest.mark.parametrize("field", [36, 40, 178])
def test_readout_cap(field: int) -> None:
    headers, samples, points = streams.readouts(1, 300, 300, dims=3)
    data = codec.acquisitions(headers, samples, points)
    struct.pack_into("<H", data, field, 0xFFFF)
    assert isinstance(problem(bytes(data)), errors.Oversized)


def test_readout_cap_in_a_run() -> None:
    data = acquisitions(n=20)
    limits = Limits(readout=63)  # each has 64 bytes of samples
    assert isinstance(problem(data, limits=limits), errors.Oversized)
    assert len(one(data, limits=Limits(readout=64))) == 20  # type: ignore[arg-type]


def test_compressed_readout_cap() -> None:
    headers, samples, _ = streams.readouts(1, 1, 1)
    data = compressed_acquisitions(headers, samples, bits=8)
    struct.pack_into("<I", data, 342, 0xFFFFFFFF)
    assert isinstance(problem(bytes(data)), errors.Oversized)


def test_waveform_and_image_caps() -> None:
    wave = bytearray(codec.waveform(*streams.waveform()))
    struct.pack_into("<HH", wave, 2 + 28, 0xFFFF, 0xFFFF)
    assert isinstance(problem(bytes(wave)), errors.Oversized)
    meta = bytearray(streams.image())
    struct.pack_into("<Q", meta, 200, 1 << 30)
    assert isinstance(problem(bytes(meta)), errors.Oversized)
    big = bytearray(streams.image())
    struct.pack_into("<3H", big, 2 + 16 + 0, 0xFFFF, 0xFFFF, 2)
    struct.pack_into("<3H", big, 2 + 16, 0xFFFF, 0xFFFF, 2)
    assert isinstance(problem(bytes(big)), errors.Oversized)
    assert isinstance(problem(bytes(big), "client"), errors.Oversized)
    assert isinstance(problem(streams.image((1, 1, 8, 8)), limits=Limits(input_image=255, image_meta=14)), errors.Oversized)


def test_text_flood_is_capped() -> None:
    parser = FrameParser(Limits(texts=5))
    found = parser.feed(codec.text("") * 50)
    assert [type(e) for e in found] == [events.Text] * 5 + [events.Problem]
    assert parser.lost


def test_nothing_is_framed_after_being_lost() -> None:
    parser = FrameParser()
    good, bad = acquisitions(), struct.pack("<H", 4711)
    found = parser.feed(good + bad + good)
    assert [type(e) for e in found] == [events.Readouts, events.Problem]
    error = found[1].error  # type: ignore[attr-defined]
    assert isinstance(error, errors.UnknownMessage)
    assert (error.got, found[1].offset) == (4711, len(good))
    assert parser.lost
    assert parser.feed(good) == []
    parser.finish()


@pytest.mark.parametrize(
    ("number", "role"),
    [(7, "server"), (1019, "server"), (1023, "server"), (1050, "server"), (0, "server"), (1008, "client"), (1026, "client")],
)
def test_roles(number: int, role: str) -> None:
    assert isinstance(problem(struct.pack("<H", number), role), errors.UnknownMessage)


@pytest.mark.parametrize("number", [1012, 1018])
def test_dicom_is_refused_by_name(number: int) -> None:
    with pytest.raises(errors.UnknownMessage, match=r"DICOM.*MRD images instead of DICOM"):
        raise problem(struct.pack("<H", number), "client")


def test_unknown_image_type() -> None:
    raw = bytearray(streams.image())
    struct.pack_into("<H", raw, 4, 9)
    parser = FrameParser()
    (event,) = parser.feed(raw)
    assert isinstance(event, events.Problem)
    assert isinstance(event.error, errors.MalformedMessage)
    assert parser.lost


def test_zfp_is_refused_once_by_name_and_framing_goes_on() -> None:
    headers, samples, points = streams.readouts(3, 2, 4, dims=2)
    packed = compressed_acquisitions(headers, samples, points, bits=9)
    size = len(packed) // 3
    for i in range(3):
        struct.pack_into("<Q", packed, i * size + 4, Flag.ACQ_COMPRESSION1.bit)
    found, parser = parse(acquisitions(n=4) + packed + acquisitions(n=2) + codec.close(), [500])
    assert [e[0] for e in flatten(found)][:5] == ["readout"] * 4 + ["problem"]
    (refused,) = (e for e in found if isinstance(e, events.Problem))
    assert isinstance(refused.error, errors.UnsupportedCompression)
    assert "ZFP" in str(refused.error)
    assert "-Z" in str(refused.error)
    assert refused.offset == len(acquisitions(n=4))
    kept = [e.headers for e in found if isinstance(e, events.Readouts)]
    assert sum(len(h) for h in kept) == 6
    assert not any(any_flag(h, Flag.ACQ_COMPRESSION1).any() for h in kept)
    assert parser.closed and not parser.lost


@pytest.mark.parametrize(
    "bad",
    [
        struct.pack("<H1024s", 1, b"\xff.xml"),
        struct.pack("<H", 1) + b"a" * 1024,
        struct.pack("<HI", 2, 2) + b"\xc3\x28",
        struct.pack("<HI", 3, 1) + b"\x80",
        struct.pack("<HI", 3, 4) + b"<\x80\0>",
        struct.pack("<HI", 5, 1) + b"\xff",
        struct.pack("<HQQQ", 6, 0, 0, 1) + b"\xff",
    ],
)
def test_malformed_texts_keep_the_frame(bad: bytes) -> None:
    found, parser = parse(bad + codec.text("next"), [3])
    assert isinstance(found[0], events.Problem)
    assert isinstance(found[0].error, errors.MalformedText)
    assert found[1] == events.Text(len(bad), "next")
    assert not parser.lost


def test_words_of_a_server_are_always_readable() -> None:
    assert one(struct.pack("<HI", 5, 2) + b"a\xff", "client") == events.Text(0, "a\ufffd")
    assert one(struct.pack("<HQQ", 7, 1, 1) + b"\xff", "client") == events.Response(0, 1, "\ufffd")
    assert one(struct.pack("<HQ", 8, 1) + b"\xff", "node") == events.ErrorText(0, "\ufffd")


def test_bytes_behind_close_are_ignored() -> None:
    parser = FrameParser()
    assert parser.feed(codec.close() * 1000) == [events.Close(0)]
    assert parser.closed
    assert parser.feed(b"junk") == []
    parser.finish()


def test_empty_stream() -> None:
    parser = FrameParser()
    assert parser.feed(b"") == []
    parser.finish()
