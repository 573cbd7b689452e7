"""What the sorter knows about a scan: the place of every readout, slices, states, times and notes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gadgets.buffer_settings import AcquisitionSettings
from gadgets.geometry import Geometry
from gadgets.readouts import Headers, ReadoutGeometry, flag_mask
from gadgets.wire.dtypes import Flag
from gadgets.wire.header import Encoding, Limit, MrdHeader
from recon_core.types import ScanInfo

STATE_COUNTERS = ("repetition", "set", "contrast", "phase")
"""Order of the state axis, slowest first: the phases of one cine are neighbours."""

REVERSE = flag_mask(Flag.ACQ_IS_REVERSE)

SATURATION_PREFIX = "SaturationTime_ms_"
"""``userParameterDouble`` or ``userParameterLong`` ``SaturationTime_ms_0``, ``_1``, ...: saturation times in ms. MRD has no
field of its own for them."""

PREPARATION = "MagnetizationPreparation"
"""``userParameterString``; with the value ``saturation`` the header's TI list holds saturation times, with another one inversion times."""


@dataclass(frozen=True)
class Placement:
    """Where readouts go; parallel int32 arrays in arrival order.

    ``rows`` counts all readouts of the scan as they arrived; ``slice`` and ``state`` are positions in ``SortedScan.slices``
    and ``.states`` (a calibration readout that belongs to no state has -1); ``k2`` and ``k1`` are grid indices, DC at
    ``n // 2``.
    """

    rows: NDArray[np.int32]
    slice: NDArray[np.int32]
    state: NDArray[np.int32]
    k2: NDArray[np.int32]
    k1: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, chosen: NDArray) -> Placement:
        """Those that a boolean mask or an index array selects."""
        return Placement(self.rows[chosen], self.slice[chosen], self.state[chosen], self.k2[chosen], self.k1[chosen])


@dataclass(frozen=True)
class SortedScan:
    """A scan whose readouts all have their place. Made by `gadgets.sorting.sort_readouts`.

    Attributes
    ----------
    header, settings, encoding
        What it was sorted by.
    n_readouts
        All readouts that arrived.
    n_channels
        Receiver channels as acquired (before any compression).
    grid
        ``(k2, k1)`` sizes of the encoded matrix.
    slices
        Slice counters present, ascending.
    states
        Encoding counters of each state, in the order of `STATE_COUNTERS`; counters that were merged are left out.
    imaging, calibration
        Placements; a calibration-and-imaging readout is in both.
    noise_rows
        int32, arrival numbers of the noise readouts.
    skipped
        Reason -> number of readouts that are not used.
    notes
        Sentences for the operator and the log.
    readouts
        Geometry of the readout direction.
    geometry
        One per slice, from the readout nearest to the k-space centre.
    source_headers
        ``(slice, state)``: the acquisition header of the readout nearest to the k-space centre, with its time stamps
        (ticks as sent).
    echo_times, saturation_times
        One per state in s, or empty.
    inversion_times
        For each slice one per state in s, or empty: heartbeats may differ from slice to slice.
    """

    header: MrdHeader
    settings: AcquisitionSettings
    encoding: Encoding
    n_readouts: int
    n_channels: int
    grid: tuple[int, int]
    slices: tuple[int, ...]
    states: tuple[Mapping[str, int], ...]
    imaging: Placement
    calibration: Placement
    noise_rows: NDArray[np.int32]
    skipped: Mapping[str, int]
    notes: tuple[str, ...]
    readouts: ReadoutGeometry
    geometry: tuple[Geometry, ...]
    source_headers: Headers
    echo_times: tuple[float, ...]
    inversion_times: tuple[tuple[float, ...], ...]
    saturation_times: tuple[float, ...]

    @property
    def n_slices(self) -> int:
        return len(self.slices)

    @property
    def n_states(self) -> int:
        return len(self.states)

    @property
    def n_x(self) -> int:
        """Readout pixels after the crop."""
        return self.readouts.n_x

    def name(self, slice_index: int, state: int | None = None) -> str:
        """``"slice 3 phase 7"``: the counters that vary, for notes and errors."""
        if state is None:
            return f"slice {self.slices[slice_index]}"
        return place_name(self.slices[slice_index], self.states, state)

    def scan_info(self, slice_index: int) -> ScanInfo:
        """What a method may know, for the slice at position ``slice_index``. SI units, after the readout crop.

        Repetition time and flip angle are given only where the header has one value (or several equal ones).
        """
        n2, n1 = self.grid
        fov_z, fov_y, fov_x = self.encoding.encoded_fov
        return ScanInfo(
            matrix=(n2, n1, self.n_x),
            fov=(fov_z, fov_y, fov_x * self.n_x / self.encoding.encoded_matrix[2]),
            recon_matrix=self.encoding.recon_matrix,
            recon_fov=self.encoding.recon_fov,
            echo_times=self.echo_times,
            inversion_times=self.inversion_times[slice_index],
            saturation_times=self.saturation_times,
            repetition_time=_only(self.header.repetition_times),
            flip_angle=_only(self.header.flip_angles),
            field_strength=self.header.field_strength,
            larmor_frequency=self.header.h1_frequency,
            b0_direction=self.geometry[slice_index].b0_direction,
            reversed_readouts=tuple(((self.source_headers[slice_index]["flags"] & REVERSE) != 0).tolist()),
            state_counters=self.states,
            slice_index=self.slices[slice_index],
        )


def place_name(slice_counter: int, states: tuple[Mapping[str, int], ...], state: int) -> str:
    """``"slice 3 phase 7"``: the slice, and the counters that distinguish the states."""
    varying = [n for n in STATE_COUNTERS if n in states[state] and len({s[n] for s in states}) > 1]
    return " ".join([f"slice {slice_counter}", *(f"{n} {states[state][n]}" for n in varying)])


def echo_times(header: MrdHeader, states: tuple[Mapping[str, int], ...], limit: Limit | None = None) -> tuple[float, ...]:
    """TE of each state in s: by the contrast counter, or the only one there is; empty when the list does not fit.

    A counter that begins above 0 says nothing about the list's first TE, unless ``limit`` (of the contrast) announces an echo 0 that is
    missing or that TE is none: then the list has to have one TE for each value of the counter. Where the contrast never changes, echoes may
    be counted as sets (`echoes_are_sets`).
    """
    times = header.echo_times
    contrasts = [s.get("contrast") for s in states]
    if echoes_are_sets(header, states):
        order = sorted(s["set"] for s in states)
        return tuple(times[order.index(s["set"])] for s in states)
    if len(times) == 1 and len(set(contrasts)) == 1:
        return times * len(states)
    known = [c for c in contrasts if c is not None]
    if not times or len(known) != len(states):
        return ()
    values = sorted(set(known))
    announced = limit is not None and limit.minimum == 0
    if values[0] > 0 and not announced and times[0] > 0:
        return tuple(times[values.index(c)] for c in known) if len(values) == len(times) else ()
    return tuple(times[c] for c in known) if values[-1] < len(times) else ()


def echoes_are_sets(header: MrdHeader, states: tuple[Mapping[str, int], ...]) -> bool:
    """Whether a converter counted the echoes as sets: as many of them as the header has different TE, and nothing else changes."""
    n = len(states)
    if n < 2 or len(set(header.echo_times)) != n or len(header.echo_times) != n:
        return False
    return all(len({s.get(name) for s in states}) == (n if name == "set" else 1) for name in STATE_COUNTERS)


def times_by_counter(
    times: tuple[float, ...], states: tuple[Mapping[str, int], ...], limits: Mapping[str, Limit] | None = None
) -> tuple[float, ...]:
    """One of ``times`` per state: by the counter that has as many different values as there are times.

    When several counters have, the first of contrast, set, repetition, phase counts. One time holds for all states. Where images are
    missing, the header's ``limits`` tell which counter was to have as many values, and its value which time an image has. Empty when
    nothing fits.
    """
    if len(times) == 1:
        return times * len(states)
    for name in ("contrast", "set", "repetition", "phase"):
        values = sorted({s[name] for s in states if name in s})
        if times and len(values) == len(times) and all(name in s for s in states):
            return tuple(times[values.index(s[name])] for s in states)
    # all times, one for each state: a state axis made of several counters
    if len(times) == len(states):
        return times
    for name in ("contrast", "set", "repetition", "phase"):
        limit = (limits or {}).get(name)
        if times and limit is not None and limit.maximum - limit.minimum + 1 == len(times):
            places = [s.get(name, -1) - limit.minimum for s in states]
            if all(0 <= place < len(times) for place in places):
                return tuple(times[place] for place in places)
    return ()


def saturation_list(header: MrdHeader, settings: AcquisitionSettings) -> tuple[float, ...]:
    """Saturation times in s: user parameters ``SaturationTime_ms_0``, ``_1``, ... up to the first gap, or else the TI list.

    The TI list only where `is_saturation_prepared`.
    """
    times = numbered_times(header, SATURATION_PREFIX)
    return times if times or not is_saturation_prepared(header, settings) else header.inversion_times


def numbered_times(header: MrdHeader, prefix: str) -> tuple[float, ...]:
    """User parameters ``<prefix>0``, ``<prefix>1``, ... in ms up to the first gap, as s; where there is no ``0`` they begin at ``1``."""

    def value(number: int) -> float | int | None:
        name = f"{prefix}{number}"
        return header.user_double.get(name, header.user_long.get(name))

    times = []
    number = 0 if value(0) is not None else 1
    while (found := value(number)) is not None:
        times.append(float(found) * 1e-3)
        number += 1
    return tuple(times)


def is_saturation_prepared(header: MrdHeader, settings: AcquisitionSettings) -> bool:
    """Whether the TI list belongs to a saturation preparation: the header says so, or says nothing and the chain does."""
    stated = header.user_string.get(PREPARATION, "").strip().lower()
    return (stated or settings.preparation) == "saturation"


def _only(values: tuple[float, ...]) -> float | None:
    return values[0] if values and len(set(values)) == 1 else None
