"""The buffer against a slow dictionary that is obviously right: readouts in any order, duplicated, missing, interleaved."""

from __future__ import annotations

from collections import defaultdict
from itertools import product
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from gadgets.buffer import AcquisitionSettings, assemble, readout_geometry, sort_readouts
from gadgets.errors import SortError
from gadgets.sorting import FEWEST_TOGETHER
from gadgets.wire.dtypes import ACQUISITION_HEADER
from gadgets.wire.header import Limit
from recon_core.errors import ReconError
from tests.gadgets.scan_factory import flag, mrd_header, numbered_rows, readout_headers

STATE_NAMES = ("repetition", "set", "contrast", "phase")
SKIPPED = {23: "navigation", 24: "phase correction", 27: "dummy scan", 31: "phase stabilisation"}
KINDS = (0, 0, 0, 0, 0, 0, 20, 21, 19, 23, 24, 27, 31)
LENIENT = AcquisitionSettings(min_line_fraction=0.0, calibration="mean")


@st.composite
def scans(draw: st.DrawFn) -> tuple[dict[str, Any], list[dict[str, int]]]:
    """A grid with its limits, and readouts drawn from a full scan: shuffled, some twice, some never."""
    n1, n2 = draw(st.integers(1, 7)), draw(st.sampled_from([1, 1, 2, 3]))
    extent1, extent2 = draw(st.integers(1, n1)), draw(st.integers(1, n2))
    # partial Fourier: the counters start at 0, DC is where it keeps all of them in the matrix
    centre1 = n1 // 2 - draw(st.integers(0, min(n1 // 2, n1 - extent1)))
    centre2 = n2 // 2 - draw(st.integers(0, min(n2 // 2, n2 - extent2)))
    sizes = {name: draw(st.integers(1, 2)) for name in (*STATE_NAMES, "slice", "average", "segment")}
    grid = {"n1": n1, "n2": n2, "extents": (extent2, extent1), "centres": (centre2, centre1)}
    axes = [range(extent2), range(extent1), *(range(n) for n in sizes.values())]
    full = [
        dict(zip(("k2", "k1", *sizes), index, strict=True))
        for index in np.ndindex(*(len(a) for a in axes))
        # all segments together visit each line once
        if index[-1] == index[1] % sizes["segment"]
    ]
    chosen = draw(st.lists(st.integers(0, len(full) - 1), min_size=1, max_size=60))
    if draw(st.booleans()) and len(full) <= 120:
        chosen = [*draw(st.permutations(range(len(full)))), *chosen]  # complete, and some twice
    kinds = draw(st.lists(st.sampled_from(KINDS), min_size=len(chosen), max_size=len(chosen)))
    return grid, [{**full[i], "flags": flag(kind) if kind else 0} for i, kind in zip(chosen, kinds, strict=True)]


def dictionary(readouts: list[dict[str, int]], rows: np.ndarray, bits: set[int]) -> dict[tuple[int, ...], list[np.ndarray]]:
    """(slice, state counters, k2, k1) -> rows, for the readouts whose flag is in ``bits``."""
    found: dict[tuple[int, ...], list[np.ndarray]] = defaultdict(list)
    for readout, row in zip(readouts, rows, strict=True):
        if readout["flags"].bit_length() in bits:
            key = (readout["slice"], *(readout[n] for n in STATE_NAMES), readout["k2"], readout["k1"])
            found[key].append(row)
    return found


def states_of(imaging: dict[tuple[int, ...], list[np.ndarray]], values: list[list[int]]) -> list[tuple[int, ...]]:
    """The product of all values; a counter that only repeats what an earlier one says follows that one."""
    n_readouts = sum(map(len, imaging.values()))
    follows: dict[int, tuple[int, dict[int, int]]] = {}
    for i in range(4):
        for leader in set(range(i)) - set(follows):
            pairs = {(key[1 + leader], key[1 + i]) for key in imaging}
            n = len(pairs)
            if n == len(values[i]) == len(values[leader]) and 2 <= n <= n_readouts // FEWEST_TOGETHER:
                follows.setdefault(i, (leader, dict(pairs)))
    found = []
    for chosen in product(*([0] if i in follows else values[i] for i in range(4))):
        found.append(tuple(follows[i][1][chosen[follows[i][0]]] if i in follows else chosen[i] for i in range(4)))
    return found


@settings(max_examples=250, deadline=None)
@given(scans())
def test_any_readouts_give_the_dictionarys_kspace_or_a_typed_error(scan_and_readouts: Any) -> None:
    grid, readouts = scan_and_readouts
    limits = {f"kspace_encode_step_{2 - i}": Limit(0, grid["extents"][i] - 1, grid["centres"][i]) for i in (0, 1)}
    header = mrd_header(4, grid["n1"], grid["n2"], limits=limits)
    headers = readout_headers(readouts, n_samples=4)
    rows = numbered_rows(len(readouts), 2, 4)
    headers.flags.writeable = rows.flags.writeable = False
    imaging = dictionary(readouts, rows, {0, 21})
    slices = sorted({key[0] for key in imaging})
    values = [sorted({key[1 + i] for key in imaging}) for i in range(4)]
    expected_states = states_of(imaging, values)
    wanted = {(s, *q) for s in slices for q in expected_states}
    present = {key[:5] for key in imaging}
    one_partition = grid["n2"] > 1 and len({key[5] for key in imaging}) == 1
    try:
        scan = sort_readouts(headers, header, LENIENT)
    except SortError as error:
        # only right when there is nothing, when an image has no line at all, or a slab one partition
        assert not imaging or wanted != present or one_partition, error
        return
    assert imaging and wanted == present and not one_partition

    assert scan.slices == tuple(slices)
    assert [tuple(state.values()) for state in scan.states] == expected_states
    bits = [r["flags"].bit_length() for r in readouts]
    assert {k: v for k, v in scan.skipped.items() if k in SKIPPED.values()} == {
        name: bits.count(b) for b, name in SKIPPED.items() if b in bits
    }
    assert scan.noise_rows.tolist() == [i for i, b in enumerate(bits) if b == 19]

    separate, embedded = (dictionary(readouts, rows, {bit}) for bit in (20, 21))
    shift = [n // 2 - c for n, c in zip((grid["n2"], grid["n1"]), grid["centres"], strict=True)]
    for index, s in enumerate(slices):
        kspace = assemble(scan, index, rows)
        data = np.zeros(kspace.data.shape, np.complex64)
        counts = np.zeros(kspace.counts.shape, np.float32)
        for key, found in imaging.items():
            if key[0] == s:
                q, k2, k1 = expected_states.index(key[1:5]), key[5] + shift[0], key[6] + shift[1]
                data[q, :, k2, k1] = np.mean(found, axis=0)
                counts[q, k2, k1] = len(found)
        assert np.array_equal(kspace.counts.numpy(), counts)
        assert np.allclose(kspace.data.numpy(), data, rtol=1e-6, atol=1e-6 * np.abs(data).max())
        lines: dict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
        alone, inside = ({key for key in of_kind if key[0] == s} for of_kind in (separate, embedded))
        # a scan of its own that has all positions, and some of the same image again, is not mixed with the images' lines
        is_own = bool(alone & inside) and {key[5:] for key in inside} <= {key[5:] for key in alone}
        for key, found in (*separate.items(), *(() if is_own else embedded.items())):
            if key[0] == s:
                lines[key[5] + shift[0], key[6] + shift[1]] += found
        if lines:
            assert kspace.acs is not None and kspace.acs_mask is not None
            acs = np.zeros(kspace.acs.shape, np.complex64)
            for (k2, k1), found in lines.items():
                acs[:, k2, k1] = np.mean(found, axis=0)
            assert np.allclose(kspace.acs.numpy(), acs, rtol=1e-6, atol=1e-6 * np.abs(acs).max())
            assert {(int(z), int(y)) for z, y in kspace.acs_mask.nonzero()} == set(lines)
        elif kspace.acs is not None:
            check_unflagged(kspace.acs.numpy(), kspace.acs_mask, data, counts)


def check_unflagged(acs: np.ndarray, mask: Any, data: np.ndarray, counts: np.ndarray) -> None:
    """The sampled centre: a full block around DC of the count-weighted mean over states."""
    filled = np.argwhere(mask.numpy())
    lo, hi = filled.min(0), filled.max(0) + 1
    block = (slice(lo[0], hi[0]), slice(lo[1], hi[1]))
    assert mask.numpy()[block].all() and len(filled) == np.prod(hi - lo)
    assert (lo <= np.array(mask.shape) // 2).all() and (hi > np.array(mask.shape) // 2).all()
    total = counts.sum(0)
    assert (total[block] > 0).all()
    mean = (data * counts[:, None, :, :, None]).sum(0) / np.maximum(total, 1)[None, :, :, None]
    assert np.allclose(acs[:, block[0], block[1]], mean[:, block[0], block[1]], rtol=1e-5, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 3))
def test_order_of_arrival_does_not_matter(data: st.DataObject, n_slices: int, n_states: int) -> None:
    readouts = [
        {"slice": s, "phase": p, "k1": k, "average": a}
        for s in range(n_slices)
        for p in range(n_states)
        for k in range(5)
        for a in range(2)
    ]
    order = np.array(data.draw(st.permutations(range(len(readouts)))))
    header, rows = mrd_header(4, 5), numbered_rows(len(readouts), 2, 4)
    headers = readout_headers(readouts, n_samples=4)
    straight, shuffled = (
        sort_readouts(headers, header, AcquisitionSettings(calibration="mean")),
        sort_readouts(headers[order], header),
    )
    assert straight.states == shuffled.states and straight.slices == shuffled.slices
    for s in range(n_slices):
        a, b = assemble(straight, s, rows), assemble(shuffled, s, rows[order])
        assert np.array_equal(a.data.numpy(), b.data.numpy())
        assert np.array_equal(a.counts.numpy(), b.counts.numpy())


@settings(max_examples=300, deadline=None)
@given(
    n=st.integers(1, 20),
    n_samples=st.integers(0, 30),
    centre=st.integers(0, 30),
    pre=st.integers(0, 12),
    post=st.integers(0, 12),
    reverse=st.booleans(),
)
def test_samples_stay_on_the_grid(n: int, n_samples: int, centre: int, pre: int, post: int, reverse: bool) -> None:
    fields = {"number_of_samples": n_samples, "center_sample": centre, "discard_pre": pre, "discard_post": post}
    headers = readout_headers([{**fields, "flags": flag(22) if reverse else 0}])
    kept = n_samples - pre - post
    literal = n // 2 - (centre or n_samples // 2) + (post if reverse else pre)  # 0: not set
    try:
        g = readout_geometry(headers, mrd_header(n), AcquisitionSettings())
    except SortError:
        assert kept < 1 or kept > n or literal < 0 or literal + kept > n
        return
    assert 0 <= g.k0_start[0] <= g.k0_start[0] + kept <= n
    assert (g.first[0], g.last[0], g.reverse[0]) == (pre, n_samples - post, reverse)
    if literal >= 0 and literal + kept <= n:
        assert g.k0_start[0] == (0 if kept == n else literal)


@settings(max_examples=150, deadline=None)
@given(st.binary(min_size=340, max_size=340 * 6), st.booleans())
def test_headers_of_random_bytes_end_in_a_typed_error_or_a_kspace(raw: bytes, plausible: bool) -> None:
    n = len(raw) // ACQUISITION_HEADER.itemsize
    headers = np.frombuffer(raw[: n * ACQUISITION_HEADER.itemsize], ACQUISITION_HEADER).copy()
    if plausible:  # get past the first checks
        headers["encoding_space_ref"] = headers["flags"] = headers["discard_pre"] = headers["discard_post"] = 0
        headers["number_of_samples"], headers["active_channels"], headers["channel_mask"] = 4, 2, 0
        headers["idx"]["kspace_encode_step_1"] %= 5
        headers["idx"]["kspace_encode_step_2"] = 0
    try:
        scan = sort_readouts(headers, mrd_header(4, 5))
        kspace = assemble(scan, 0, numbered_rows(n, 2, 4))
    except ReconError:
        return
    assert bool((kspace.counts.sum(dim=(1, 2)) > 0).all())
