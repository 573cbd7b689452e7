"""Inversion times from the setting, the header and the readouts, and none where none fits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from gadgets.buffer import AcquisitionSettings, sort_readouts
from gadgets.inversion_times import inversion_times
from gadgets.sorted_scan import SortedScan
from gadgets.wire.header import Limit, MrdHeader
from recon_core.errors import SettingError
from tests.gadgets.scan_factory import mrd_header, readout_headers

SCHEME = ((0, 120, (0, 400, 800, 1200, 1600)), (1, 200, (0, 400, 800)))  # inversion, first time in ms, ticks of 2.5 ms
EXPECTED = (0.12, 1.12, 2.12, 3.12, 4.12, 0.2, 1.2, 2.2)


def molli_readouts(n_slices: int = 1, rr_factor: float = 1.0, lines: int = 4) -> np.ndarray:
    """5(3)3 with the state in ``set``; user_int 4 and 5 and time stamps as a scanner sends them."""
    counters: list[Mapping[str, Any]] = []
    for slice_ in range(n_slices):
        state, clock = 0, 1000 * slice_
        for inversion, first, ticks in SCHEME:
            start = clock
            for tick in ticks:
                stamp = start + round(tick * (rr_factor if slice_ else 1.0))
                for line in range(lines):
                    counters.append({"slice": slice_, "set": state, "k1": line, "acquisition_time_stamp": stamp + line})
                    counters[-1] = {**counters[-1], "user_int": (0, 0, 0, 0, first, inversion, 0, 0)}
                state += 1
            clock = start + 10000
    return readout_headers(counters)


def sort(header: MrdHeader, headers: np.ndarray, **settings: Any) -> SortedScan:
    return sort_readouts(headers, header, AcquisitionSettings(**settings))


def times(scan: SortedScan, slice_index: int = 0) -> tuple[float, ...]:
    return scan.scan_info(slice_index).inversion_times


def header(**fields: Any) -> MrdHeader:
    return mrd_header(n1=4, **fields)


def test_the_headers_list_counts_when_it_fits_the_images() -> None:
    listed = tuple(0.1 * (i + 1) for i in range(8))
    scan = sort(header(inversion_times=listed), molli_readouts())
    assert times(scan) == pytest.approx(listed) and not any("inversion times" in note for note in scan.notes)


@pytest.mark.parametrize("present", [(0, 1, 2, 3, 4), (1, 2, 6), (7,)])
def test_where_images_are_missing_the_limits_tell_whose_times_those_are(present: tuple[int, ...]) -> None:
    listed = tuple(0.1 * (i + 1) for i in range(8))
    headers = molli_readouts()
    headers = headers[np.isin(headers["idx"]["set"], present)]
    announced = header(inversion_times=listed, limits={"set": Limit(0, 7, 0)})
    scan = sort(announced, headers, incomplete="drop", inversion_time_source="header")
    assert times(scan) == pytest.approx([listed[number] for number in present])
    # without a word of the header about it nobody guesses
    for other in ({}, {"set": Limit(0, 6, 0)}, {"set": Limit(1, 8, 1)} if 0 in present else {}):
        scan = sort(header(inversion_times=listed, limits=other), headers, incomplete="drop", inversion_time_source="header")
        assert times(scan) == ()


@pytest.mark.parametrize(
    ("beat", "scheme", "told"),
    [
        (1.0, 0, ""),
        (0.98, 0, ""),
        (0.9, 0, "3.60 s apart by their inversion times and 4.00 s"),
        (1.1, 0, "4.40 s"),
        (1.0, 10000, ""),
    ],
)
def test_times_of_nominal_heartbeats_are_told_where_time_stamps_say_others(beat: float, scheme: int, told: str) -> None:
    """Stamps of one inversion have the distances of its images. ``scheme``: ticks between images that have an inversion each."""
    listed = tuple(t + beat * i for t, n in ((0.12, 5), (0.2, 3)) for i in range(n))
    headers = molli_readouts(n_slices=2)
    if scheme:
        headers["acquisition_time_stamp"] = headers["idx"]["set"] * scheme
    found = [
        note for note in sort(header(inversion_times=listed), headers).notes if "apart by their inversion times" in note
    ]
    assert len(found) == bool(told) and all(told in note for note in found)
    stated = ",".join(f"{1e3 * t:g}" for t in listed)
    assert any("apart" in note for note in sort(header(), headers, inversion_times=stated).notes) == bool(told)
    saturated = header(inversion_times=listed, user_string={"MagnetizationPreparation": "saturation"})
    assert not any("apart" in note for note in sort(saturated, headers).notes)


def test_numbered_user_parameters_come_before_the_list() -> None:
    numbered: dict[str, float] = {f"InversionTime_ms_{i}": 100.0 + i for i in range(8)}
    scan = sort(header(inversion_times=(0.5,), user_double=numbered), molli_readouts())
    assert times(scan) == pytest.approx([0.1 + 0.001 * i for i in range(8)])


def test_readouts_count_when_the_header_knows_only_the_first_time() -> None:
    for listed in ((0.12,), (0.12, 0.2)):
        scan = sort(header(inversion_times=listed), molli_readouts())
        assert times(scan) == pytest.approx(EXPECTED)
        assert any("time stamps" in note and "120, 1120" in note for note in scan.notes)
    scan = sort(header(), molli_readouts(), inversion_time_source="readouts")
    assert times(scan) == pytest.approx(EXPECTED)


def test_heartbeats_may_differ_from_slice_to_slice() -> None:
    scan = sort(header(inversion_times=(0.12,)), molli_readouts(n_slices=2, rr_factor=0.8))
    assert times(scan, 0) == pytest.approx(EXPECTED)
    assert times(scan, 1) == pytest.approx([0.12, 0.92, 1.72, 2.52, 3.32, 0.2, 1.0, 1.8])


def test_nothing_is_taken_from_readouts_that_may_mean_something_else() -> None:
    silent = molli_readouts()
    silent["user_int"] = 0
    one_inversion = molli_readouts()
    one_inversion["user_int"][:, 4], one_inversion["user_int"][:, 5] = 120, 0
    contradictory = molli_readouts()
    contradictory["user_int"][:, 4] = np.arange(len(contradictory)) + 1
    late = molli_readouts()
    late["acquisition_time_stamp"] *= 1000
    for headers in (silent, one_inversion, contradictory, late):
        assert times(sort(header(inversion_times=(0.1, 0.2)), headers)) == ()
    assert times(sort(header(), molli_readouts())) == ()  # no inversion in the header: not asked for, not taken
    scan = sort(header(), silent, inversion_time_source="readouts")
    assert times(scan) == () and any("no inversion times" in note for note in scan.notes)
    assert times(sort(header(inversion_times=(0.12,)), molli_readouts(), inversion_time_source="header")) == (0.12,) * 8


def test_a_saturation_preparations_list_is_no_list_of_inversions() -> None:
    fields = {"inversion_times": (0.5,) * 8, "user_string": {"MagnetizationPreparation": "saturation"}}
    assert times(sort(header(**fields), molli_readouts())) == ()


def numbered(prefix: str, values: tuple[float, ...], first: int = 0) -> dict[str, float]:
    return {f"{prefix}{first + i}": value for i, value in enumerate(values)}


@pytest.mark.parametrize(("kind", "prefix"), [("saturation", "SaturationTime_ms_"), ("inversion", "InversionTime_ms_")])
@pytest.mark.parametrize(("factor", "told"), [(1.0, False), (2.0, True)])
def test_two_lists_that_contradict_each_other_are_told(kind: str, prefix: str, factor: float, told: bool) -> None:
    """T1 would be wrong by the same factor, and nothing in the images shows it."""
    listed = tuple(0.1 * (i + 1) for i in range(8))
    scan = sort(
        header(
            inversion_times=listed,
            user_double=numbered(prefix, tuple(1e3 * factor * t for t in listed)),
            user_string={"MagnetizationPreparation": kind},
        ),
        molli_readouts(),
    )
    info = scan.scan_info(0)
    assert (info.saturation_times or info.inversion_times) == pytest.approx([factor * t for t in listed])
    said = [note for note in scan.notes if "differ" in note]
    assert len(said) == told and all(f"two lists of {kind} times" in note and "TI 100, 200" in note for note in said)


def test_numbers_may_begin_at_one() -> None:
    values = tuple(100.0 * (i + 1) for i in range(8))
    scan = sort(header(user_double=numbered("SaturationTime_ms_", values, first=1)), molli_readouts())
    assert scan.saturation_times == pytest.approx([1e-3 * v for v in values])


@pytest.mark.parametrize("n", [7, 9])
def test_saturation_times_that_are_too_many_or_too_few_are_counted(n: int) -> None:
    scan = sort(header(inversion_times=(0.5,) * n), molli_readouts(), preparation="saturation")
    assert scan.saturation_times == () and any(f"{n} saturation times for 8 images" in note for note in scan.notes)


def test_the_setting_overrides_everything_and_is_checked() -> None:
    text = "120, 1120, 2120, 3120, 4120, 200, 1200, 2200"
    scan = sort(header(inversion_times=(0.5,) * 8), molli_readouts(), inversion_times=text)
    assert times(scan) == pytest.approx(EXPECTED)
    fields = {"inversion_times": (0.5,) * 8, "user_string": {"MagnetizationPreparation": "saturation"}}
    saturated = sort(header(**fields), molli_readouts(), inversion_times=text).scan_info(0)
    assert saturated.saturation_times == pytest.approx(EXPECTED) and saturated.inversion_times == ()
    for wrong, words in (("120,200", "count"), ("a,b", "not a list"), (text.replace("120,", "-1,", 1), "not an inversion")):
        with pytest.raises(SettingError, match=words):
            sort(header(), molli_readouts(), inversion_times=wrong)


def test_the_callers_headers_stay() -> None:
    headers = molli_readouts()
    scan = sort(header(inversion_times=(0.12,)), headers)
    source = scan.source_headers.copy()
    source.flags.writeable = False
    found, _ = inversion_times(scan.header, scan.states, source, scan.settings)
    assert found[0] == pytest.approx(EXPECTED)
