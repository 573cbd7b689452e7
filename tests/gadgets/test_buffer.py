"""The Cartesian buffer on known truth: flags, counters, centres, calibration, and measured scans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gadgets.buffer import AcquisitionSettings, Kind, ReadoutIndex, assemble, readout_geometry, sort_readouts
from gadgets.calibration import sampled_centre
from gadgets.errors import SortError
from gadgets.sorted_scan import echo_times
from gadgets.wire.dtypes import ACQUISITION_HEADER
from gadgets.wire.header import Encoding, Limit, MrdHeader, parse_header
from recon_core.errors import DataError
from recon_core.settings import parse_settings
from tests.gadgets.scan_factory import flag, mrd_header, numbered_rows, readout_headers

DATA = Path(__file__).parents[1] / "data"
DEFAULT = AcquisitionSettings()


def lines(n: int, **counters: int) -> list[dict[str, int]]:
    return [{"k1": k, **counters} for k in range(n)]


def centred_ifft(k: NDArray, axis: int) -> NDArray:
    return np.fft.fftshift(np.fft.ifft(np.fft.ifftshift(k, axes=axis), axis=axis, norm="ortho"), axes=axis)


def transform_readouts(samples: list[NDArray], headers: NDArray, header: MrdHeader) -> NDArray:
    """Slow and plain: the per-readout stage as the geometry describes it."""
    g = readout_geometry(headers, header, DEFAULT)
    crop = g.n_encoded // 2 - g.n_x // 2
    rows = np.zeros((len(headers), samples[0].shape[0], g.n_x), np.complex64)
    for i in np.flatnonzero(g.is_image):
        kept = samples[i][:, g.first[i] : g.last[i]]
        kept = kept[:, ::-1] if g.reverse[i] else kept
        grid = np.zeros((kept.shape[0], g.n_encoded), np.complex64)
        grid[:, g.k0_start[i] : g.k0_start[i] + kept.shape[1]] = kept
        rows[i] = centred_ifft(grid, 1)[:, crop : crop + g.n_x]
    return rows


def read_file(path: Path) -> tuple[MrdHeader, NDArray, list[NDArray]]:
    with h5py.File(path) as file:
        data = file["dataset"]["data"][:]
        header = parse_header(file["dataset"]["xml"][0].decode())
    headers = np.zeros(len(data), ACQUISITION_HEADER)
    for name in ACQUISITION_HEADER.names or ():
        headers[name] = data["head"][name]
    samples = [
        np.asarray(d).view(np.complex64).reshape(h["active_channels"], -1)
        for d, h in zip(data["data"], headers, strict=True)
    ]
    return header, headers, samples


# measured and reference scans


def test_shepp_logan_equals_the_real_gadgetron() -> None:
    header, headers, samples = read_file(DATA / "gadgetron-reference" / "shepp_logan_raw.h5")
    with h5py.File(DATA / "gadgetron-reference" / "gadgetron_default_images.h5") as file:
        group = next(iter(file.values()))
        expected = np.asarray(next(iter(group.values()))["data"]).squeeze()
    scan = sort_readouts(headers, header)
    assert scan.states == tuple({"repetition": r, "set": 0, "contrast": 0, "phase": 0} for r in (0, 1))
    kspace = assemble(scan, 0, transform_readouts(samples, headers, header))
    assert kspace.data.shape == (2, 8, 1, 128, 128)
    image = np.sqrt((np.abs(centred_ifft(kspace.data.numpy(), 3)) ** 2).sum(axis=1))[:, 0]
    assert np.linalg.norm(image - expected) < 1e-5 * np.linalg.norm(expected)
    assert scan.scan_info(0).matrix == (1, 128, 128)
    assert scan.scan_info(0).fov == pytest.approx((0.006, 0.3, 0.3))


def test_measured_phantom_reconstructs() -> None:
    header, headers, samples = read_file(DATA / "gre-2coil-raw" / "gre_phantom_raw.h5")
    scan = sort_readouts(headers, header)
    kspace = assemble(scan, 0, transform_readouts(samples, headers, header))
    assert kspace.data.shape == (1, 2, 1, 160, 160)
    assert bool((kspace.counts == 1).all())
    assert set(kspace.readout_extents) == {(0, 160)}
    assert scan.echo_times == pytest.approx((0.003,))
    image = np.sqrt((np.abs(centred_ifft(kspace.data.numpy(), 3)) ** 2).sum(axis=(0, 1)))[0]
    # an independent 2D transform of the raw samples
    raw = np.stack(samples, axis=1)
    full = np.sqrt((np.abs(centred_ifft(centred_ifft(raw, 1), 2)) ** 2).sum(axis=0))[:, 80:240]
    assert np.allclose(image, full, atol=1e-5 * full.max())
    # the phantom lies in the middle and the corners are air
    assert image[40:120, 40:120].mean() > 5 * image[:16, :16].mean()


@pytest.mark.parametrize("kind", ["monopolar", "bipolar"])
def test_reversed_echo_of_a_measured_scan_has_its_centre_where_the_others_have(kind: str) -> None:
    with np.load(DATA / "multi-echo-gre-centre" / "gre_3echo_centre_lines.npz") as file:
        headers, samples = file[f"{kind}_headers"], file[f"{kind}_samples"]
        reference_headers, reference = file["monopolar_headers"], file["monopolar_samples"]
        header = parse_header(str(file[f"{kind}_xml"]))
    g = readout_geometry(headers, header, DEFAULT)
    assert (g.k0_start == 0).all()
    echo = headers["idx"]["contrast"]
    assert (g.reverse == ((echo == 1) & (kind == "bipolar"))).all()

    def profile(of: NDArray, flip: bool) -> NDArray:
        p = np.abs(of[..., ::-1] if flip else of).sum(axis=(0, 1))[118:138]
        return p / np.linalg.norm(p)

    for e in range(3):
        here = profile(samples[echo == e], bool(g.reverse[echo == e][0]))
        there = profile(reference[reference_headers["idx"]["contrast"] == e], False)
        shifts = {s: float(here[4:-4] @ there[4 + s : len(there) - 4 + s]) for s in (-2, -1, 0, 1, 2)}
        assert max(shifts, key=lambda s: shifts[s]) == 0, (e, shifts)


# the readout direction


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (0, 16, 0)),  # symmetric and complete
        ({"center_sample": 0}, (0, 16, 0)),  # centre not set
        ({"center_sample": 7}, (0, 16, 0)),  # the other convention
        ({"number_of_samples": 12, "center_sample": 4}, (0, 12, 4)),  # asymmetric echo
        ({"number_of_samples": 12, "center_sample": 6}, (0, 12, 2)),  # symmetric, zero-filled
        ({"number_of_samples": 12, "center_sample": 0}, (0, 12, 2)),
        ({"number_of_samples": 20, "center_sample": 10, "discard_pre": 2, "discard_post": 2}, (2, 18, 0)),
        ({"number_of_samples": 20, "center_sample": 0, "discard_pre": 4}, (4, 20, 0)),  # the kept ones fill the grid
        ({"discard_pre": 3}, (3, 16, 3)),
        ({"discard_post": 3}, (0, 13, 0)),
        ({"center_sample": 7, "discard_pre": 2}, (2, 16, 2)),  # literally 3, which would leave the grid
        ({"discard_pre": 3, "flags": flag(22)}, (3, 16, 0)),  # first acquired = last on the grid
        ({"discard_post": 3, "flags": flag(22)}, (0, 13, 3)),
        ({"number_of_samples": 12, "center_sample": 4, "flags": flag(22)}, (0, 12, 4)),  # centre counts after the flip
    ],
)
def test_readout_placement(fields: dict[str, int], expected: tuple[int, int, int]) -> None:
    g = readout_geometry(readout_headers([{"k1": 0, **fields}]), mrd_header(16), DEFAULT)
    assert (int(g.first[0]), int(g.last[0]), int(g.k0_start[0])) == expected
    assert bool(g.reverse[0]) == ("flags" in fields)


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"number_of_samples": 20}, "beyond the readout grid"),
        ({"number_of_samples": 12, "center_sample": 11}, "beyond the readout grid"),
        ({"number_of_samples": 0}, "no samples left"),
        ({"discard_pre": 10, "discard_post": 6}, "no samples left"),
        ({"encoding_space_ref": 1}, "encoding_space_ref is out of range"),
    ],
)
def test_impossible_readouts_are_refused_by_name(fields: dict[str, int], what: str) -> None:
    headers = readout_headers([{"k1": 0}, {"k1": 1, "scan_counter": 77, **fields}])
    with pytest.raises(SortError, match=what) as caught:
        readout_geometry(headers, mrd_header(16), DEFAULT, first_index=100)
    assert caught.value.where == "readout 101 (scan counter 77)"


def test_oversampling_that_only_the_header_has_is_refused() -> None:
    """16 samples about the centre for an image of 16 pixels, on a grid of 32: taken by the header, the object would be twice as large."""
    header = mrd_header(32, 4, recon_x=16)
    headers = readout_headers([{"k1": k, "center_sample": 8} for k in range(4)], n_samples=16)
    with pytest.raises(
        SortError, match=r"oversampling is in the header alone.*got 16; expected 32 samples.*encodedSpace"
    ) as caught:
        readout_geometry(headers, header, DEFAULT)
    assert caught.value.where == "readout 0 (scan counter 0)"
    # separate calibration lines may be short, and an asymmetric echo of that length is one
    short = readout_headers([{"k1": k, "center_sample": 8, "flags": flag(20)} for k in range(4)], n_samples=16)
    assert readout_geometry(short, header, DEFAULT).k0_start.tolist() == [8] * 4
    partial = readout_headers([{"k1": 0, "center_sample": 4}], n_samples=16)
    assert readout_geometry(partial, header, DEFAULT).k0_start.tolist() == [12]


def test_noise_and_skipped_readouts_may_have_any_length() -> None:
    headers = readout_headers(
        [{"flags": flag(19), "number_of_samples": 999, "center_sample": 0}, {"flags": flag(24), "number_of_samples": 99}]
    )
    g = readout_geometry(headers, mrd_header(16), DEFAULT)
    assert g.kind.tolist() == [Kind.NOISE, Kind.SKIPPED]
    assert g.last[0] == 999


def test_asymmetric_echo_range_on_the_cropped_grid() -> None:
    header = mrd_header(32, 4, recon_x=16)
    headers = readout_headers([{"k1": k, "center_sample": 8} for k in range(4)], n_samples=24)
    scan = sort_readouts(headers, header)
    assert scan.n_x == 16
    # measured 8..31 of 32, k0 from -8 to 15; twice the spacing: -4 to 7
    assert assemble(scan, 0, numbered_rows(4, 2, 16)).readout_ranges == ((4, 16),)


def test_readout_that_ends_early_on_the_cropped_grid() -> None:
    header = mrd_header(32, 4, recon_x=16)
    headers = readout_headers([{"k1": k, "center_sample": 16} for k in range(4)], n_samples=25)
    # measured 0..24 of 32, k0 to 8, which is 4 after the crop
    assert assemble(sort_readouts(headers, header), 0, numbered_rows(4, 2, 16)).readout_ranges == ((0, 13),)


def test_every_echo_has_its_own_readout_range() -> None:
    whole = [{"k1": k, "contrast": 0, "center_sample": 16, "number_of_samples": 32} for k in range(4)]
    short = [{"k1": k, "contrast": 1, "center_sample": 8, "number_of_samples": 24} for k in range(4)]
    # read backwards, the samples that come last are the first on the grid
    other_side = [
        {"k1": k, "contrast": 2, "center_sample": 16, "number_of_samples": 24, "flags": flag(22)} for k in range(4)
    ]
    headers = readout_headers([*other_side, *short, *whole])
    kspace = assemble(sort_readouts(headers, mrd_header(32, 4)), 0, numbered_rows(12, 2, 32))
    assert kspace.readout_ranges == ((0, 32), (8, 32), (0, 24))
    assert kspace.common_readout == (8, 24)
    assert kspace.readout_shares == (1.0, 0.75, 0.75)
    assert kspace.part(1, 3).readout_ranges == ((8, 32), (0, 24))
    assert kspace.in_order(torch.tensor([2, 0, 1])).readout_ranges == ((0, 24), (0, 32), (8, 32))


# flags and counters


def test_repetitions_are_images_of_their_own_or_averaged() -> None:
    counters = [{"k1": k, "contrast": q, "repetition": r} for r in range(3) for q in range(2) for k in range(8)]
    headers, rows = readout_headers(counters), numbered_rows(48, 2, 16)
    header = mrd_header(limits={"repetition": Limit(0, 2, 0), "contrast": Limit(0, 1, 0)}, echo_times=(0.004, 0.009))
    apart = sort_readouts(headers, header)
    assert apart.n_states == 6 and not apart.notes
    together = sort_readouts(headers, header, AcquisitionSettings(repetitions="average"))
    assert together.echo_times == (0.004, 0.009)
    assert together.notes == ("3 repetitions are averaged, as the setting repetitions asks",)
    kspace = assemble(together, 0, rows)
    assert bool((kspace.counts == 3).all())
    expected = torch.from_numpy(rows.reshape(3, 2, 8, 2, 16).mean(0).swapaxes(1, 2))
    torch.testing.assert_close(kspace.data[:, :, 0], expected)


def test_every_flag_of_the_skip_set_is_left_out_and_counted() -> None:
    reasons = {
        23: "navigation",
        24: "phase correction",
        26: "HP feedback",
        27: "dummy scan",
        28: "RT feedback",
        29: "surface coil correction",
        30: "phase stabilisation reference",
        31: "phase stabilisation",
    }
    extra = [{"k1": 3, "flags": flag(b)} for b in reasons]
    extra += [{"k1": 3, "flags": flag(23, 28)}, {"k1": 3, "flags": flag(21, 24)}, {"flags": flag(19, 27)}]
    headers = readout_headers([*extra, *lines(8)])
    scan = sort_readouts(headers, mrd_header())
    expected = {r: 1 for r in reasons.values()}
    expected["navigation"] = expected["phase correction"] = 2
    assert scan.skipped == expected
    assert scan.noise_rows.tolist() == [10]
    assert scan.imaging.rows.tolist() == list(range(11, 19))


def test_calibration_kinds() -> None:
    counters = lines(8, repetition=0) + lines(8, repetition=1)
    for i, bits in {3: 21, 4: 21, 5: 20, 12: 21, 13: 20}.items():
        counters[i]["flags"] = flag(bits)
    rows = numbered_rows(16, 2, 16)
    rows.flags.writeable = False
    headers = readout_headers(counters)
    headers.flags.writeable = False
    kspace = assemble(sort_readouts(headers, mrd_header()), 0, rows)
    assert kspace.mask[0, 0].tolist() == [True] * 5 + [False] + [True] * 2
    assert kspace.acs is not None and kspace.acs_mask is not None
    assert kspace.acs_mask[0].nonzero().flatten().tolist() == [3, 4, 5]
    expected = {3: rows[3], 4: (rows[4] + rows[12]) / 2, 5: (rows[5] + rows[13]) / 2}
    for k1, value in expected.items():
        assert np.array_equal(kspace.acs[:, 0, k1].numpy(), value)
    both = assemble(sort_readouts(headers, mrd_header(), AcquisitionSettings(calibration_in_image=True)), 0, rows)
    assert bool(both.mask.all())


def test_a_separate_calibration_is_not_averaged_with_the_images_own_lines() -> None:
    """A scan of its own may have another scale. Lines that complete those of the image calibrate with them."""
    of_image = [{"k1": k, **({"flags": flag(21)} if 3 <= k <= 5 else {})} for k in range(8)]
    separate = [{"k1": k, "flags": flag(20)} for k in range(2, 7)]
    rows = numbered_rows(13, 2, 16)
    acs = assemble(sort_readouts(readout_headers(separate + of_image), mrd_header()), 0, rows).acs
    assert acs is not None and np.array_equal(acs[:, 0, 2:7].numpy().swapaxes(0, 1), rows[:5])
    between = [line for line in of_image if line["k1"] % 2] + [{"k1": k, "flags": flag(20)} for k in range(2, 7, 2)]
    kspace = assemble(sort_readouts(readout_headers(between), mrd_header()), 0, numbered_rows(7, 2, 16))
    assert kspace.acs_mask is not None and kspace.acs_mask[0].nonzero().flatten().tolist() == [2, 3, 4, 5, 6]


def test_unflagged_calibration_is_the_sampled_centre_of_the_union() -> None:
    # DC is line 8 of 16; the union samples 5..11, line 4 is missing in both states
    first, second = [0, 5, 7, 8, 9, 11], [2, 6, 8, 10, 13]
    counters = [{"k1": k, "phase": 0} for k in first] + [{"k1": k, "phase": 1} for k in second]
    rows = numbered_rows(len(counters), 2, 16)
    kspace = assemble(sort_readouts(readout_headers(counters), mrd_header(16, 16)), 0, rows)
    assert kspace.acs is not None and kspace.acs_mask is not None
    assert kspace.acs_mask[0].nonzero().flatten().tolist() == [5, 6, 7, 8, 9, 10, 11]
    assert np.array_equal(kspace.acs[:, 0, 8].numpy(), (rows[3] + rows[8]) / 2)
    assert np.array_equal(kspace.acs[:, 0, 6].numpy(), rows[7])
    assert not kspace.acs[:, 0, 4].any()


def test_calibration_lines_of_unlike_contrast_are_told() -> None:
    """Each of the delays has a few lines about the centre, and only together they calibrate: coil maps may be wrong, and T1 with them."""
    counters = [{"k1": k, "set": q} for q, own in enumerate(([0, 7, 8, 9], [2, 6, 8, 10], [5, 8, 11])) for k in own]
    mixed, shared = readout_headers(counters), readout_headers([{"k1": k, "set": q} for q in range(3) for k in range(4, 12)])
    recovery = mrd_header(16, 16, inversion_times=(0.5, 1.0, 8.0))

    def told(headers: np.ndarray, header: MrdHeader) -> bool:
        return any("different contrast" in n for n in sort_readouts(headers, header).notes)

    assert told(mixed, recovery)
    states = assemble(sort_readouts(mixed, recovery), 0, numbered_rows(len(mixed), 2, 16)).acs_states
    assert states is not None
    assert [own[0].nonzero().flatten().tolist() for own in states] == [[7, 8, 9], [6, 8, 10], [5, 8, 11]]
    assert assemble(sort_readouts(shared, recovery), 0, numbered_rows(len(shared), 2, 16)).acs_states is None
    assert not told(mixed, mrd_header(16, 16)) and not told(shared, recovery)


def test_images_whose_centre_is_flagged_for_calibration_alone_are_told() -> None:
    counters = lines(8, set=0) + lines(8, set=1)
    for i in (3, 4, 5, 11, 12, 13):
        counters[i]["flags"] = flag(20)
    headers = readout_headers(counters)
    notes = sort_readouts(headers, mrd_header()).notes
    assert any("2 images lack the centre of k-space" in n and "calibration_in_image" in n for n in notes)
    used = sort_readouts(headers, mrd_header(), AcquisitionSettings(calibration_in_image=True)).notes
    separate = readout_headers([{"k1": k, "flags": flag(20)} for k in range(2, 7)] + lines(8))
    assert not any("lack the centre" in n for n in (*used, *sort_readouts(separate, mrd_header()).notes))


def test_sampled_centre_in_three_dimensions() -> None:
    sampled = np.zeros((8, 9), bool)
    sampled[2:6, 3:8] = True  # DC is at (4, 4)
    sampled[6, [3, 5, 6, 7]] = sampled[1, 4:8] = True  # rows that are not complete
    assert sampled_centre(sampled, 48) == ((2, 6), (3, 8))
    assert sampled_centre(sampled, 4) == ((2, 6), (3, 7))
    sampled[4, 4] = False
    assert sampled_centre(sampled, 48) is None


def test_no_calibration_where_the_centre_is_not_sampled() -> None:
    scan = sort_readouts(readout_headers([{"k1": k} for k in range(0, 16, 2)]), mrd_header(16, 16))
    assert assemble(scan, 0, numbered_rows(8, 2, 16)).acs is None
    assert any("no calibration lines" in n for n in scan.notes)


def test_strongest_state_for_calibration() -> None:
    rows = numbered_rows(16, 2, 16)
    rows[8:] *= -4  # an inversion-recovery pair: the mean nearly cancels elsewhere
    headers = readout_headers(lines(8, set=0) + lines(8, set=1))
    scan = sort_readouts(headers, mrd_header(), AcquisitionSettings(calibration="strongest"))
    acs = assemble(scan, 0, rows).acs
    assert acs is not None and np.array_equal(acs[:, 0].numpy(), rows[8:].transpose(1, 0, 2))


def test_principal_component_of_an_inversion_recovery_keeps_the_signal() -> None:
    rng = np.random.default_rng(3)
    signal = (rng.standard_normal((8, 2, 16)) + 1j * rng.standard_normal((8, 2, 16))).astype(np.complex64)
    rows = np.concatenate([signal, -signal, 0.1 * signal])  # the mean of the three nearly cancels
    headers = readout_headers(lines(8, set=0) + lines(8, set=1) + lines(8, set=2))
    acs = assemble(sort_readouts(headers, mrd_header()), 0, rows).acs
    assert acs is not None
    ratio = acs[:, 0].numpy() / signal.transpose(1, 0, 2)
    assert np.allclose(ratio, ratio[0, 0, 0], rtol=1e-4)
    assert np.isclose(abs(ratio[0, 0, 0]), np.sqrt(2.01), rtol=1e-4)


def test_a_centre_that_all_states_share_is_preferred_to_a_wider_mixed_one() -> None:
    centre = list(range(10, 22))  # 12 lines around DC of 32
    counters = [{"k1": k, "phase": 0} for k in [8, 9, *centre]] + [{"k1": k, "phase": 1} for k in [*centre, 22, 23]]
    rows = numbered_rows(len(counters), 2, 16)
    kspace = assemble(sort_readouts(readout_headers(counters), mrd_header(16, 32)), 0, rows)
    assert kspace.acs_mask is not None and kspace.acs_mask[0].nonzero().flatten().tolist() == centre


def test_averages_segments_and_repeats() -> None:
    counters = lines(8, average=0) + lines(8, average=1, segment=3) + lines(2, average=1, segment=3)
    rows = numbered_rows(18, 2, 16)
    scan = sort_readouts(readout_headers(counters), mrd_header())
    kspace = assemble(scan, 0, rows)
    assert scan.n_states == 1
    assert kspace.counts[0, 0].tolist() == [3, 3, 2, 2, 2, 2, 2, 2]
    for k in range(8):
        expected = np.mean([rows[i] for i in (k, k + 8, k + 16) if i < 18], axis=0)
        assert np.allclose(kspace.data[0, :, 0, k].numpy(), expected, rtol=1e-6)
    assert any("2 readouts repeat" in n for n in scan.notes)


def test_states_of_different_sampling_in_documented_order() -> None:
    counters = [
        {"k1": (q + 2 * j) % 8, "repetition": r, "set": s, "contrast": c, "phase": p}
        for q, (r, s, c, p) in enumerate(np.ndindex(2, 2, 2, 2))
        for j in range(2 + q % 3)
    ]
    order = np.random.default_rng(5).permutation(len(counters))
    rows = numbered_rows(len(counters), 1, 16)
    scan = sort_readouts(readout_headers([counters[i] for i in order]), mrd_header())
    kspace = assemble(scan, 0, rows[order])
    assert [tuple(s.values()) for s in scan.states] == list(np.ndindex(2, 2, 2, 2))
    for q, state in enumerate(scan.states):
        own = [i for i, c in enumerate(counters) if all(c[n] == v for n, v in state.items())]
        assert kspace.mask[q, 0].nonzero().flatten().tolist() == sorted(counters[i]["k1"] for i in own)
        for i in own:
            assert np.array_equal(kspace.data[q, :, 0, counters[i]["k1"]].numpy(), rows[i])


def test_counters_that_only_go_together_are_one_axis() -> None:
    """A sequence may count the delay as set and, the other way round, as repetition: no product, of which most would be empty."""
    counters = [{"k1": k, "slice": z, "set": q, "repetition": 4 - q} for z in range(2) for q in range(3) for k in range(8)]
    scan = sort_readouts(readout_headers(counters), mrd_header(inversion_times=(0.1, 0.2, 0.3)))
    assert [(s["repetition"], s["set"]) for s in scan.states] == [(2, 2), (3, 1), (4, 0)]
    assert scan.inversion_times == ((0.3, 0.2, 0.1),) * 2  # by the set, which MRD writers use for preparations
    assert any("repetition and set go together: 3 states" in n for n in scan.notes)
    rows = numbered_rows(len(counters), 2, 16)
    kspace = assemble(scan, 1, rows)
    assert np.array_equal(kspace.data[0, :, 0].numpy(), rows[40:48].transpose(1, 0, 2))
    one_short = [c for c in counters if (c["slice"], c["set"]) != (0, 1)]
    with pytest.raises(SortError, match="0 of 8 lines"):
        sort_readouts(readout_headers(one_short), mrd_header())


def test_named_state_axis_refuses_to_merge_silently() -> None:
    headers = readout_headers([c for r in range(2) for p in range(3) for c in lines(8, repetition=r, phase=p)])
    with pytest.raises(SortError, match="other counters than phase vary"):
        sort_readouts(headers, mrd_header(), AcquisitionSettings(state="phase"))
    assert sort_readouts(headers, mrd_header()).n_states == 6
    single = sort_readouts(headers, mrd_header(), AcquisitionSettings(state="single"))
    assert single.n_states == 1 and any("averaged into one image over repetition, phase" in n for n in single.notes)
    assert assemble(single, 0, numbered_rows(48, 2, 16)).counts.unique().tolist() == [6]


def test_slices_keep_their_counters_and_their_own_data() -> None:
    counters = [{"k1": k, "slice": s, "position": (0, 0, s)} for k in range(8) for s in (5, 2)]
    rows = numbered_rows(16, 2, 16)
    scan = sort_readouts(readout_headers(counters), mrd_header())
    assert scan.slices == (2, 5)
    for index, s in enumerate(scan.slices):
        kspace = assemble(scan, index, rows)
        own = [i for i, c in enumerate(counters) if c["slice"] == s]
        assert np.array_equal(kspace.data[0, :, 0].numpy(), rows[own].transpose(1, 0, 2))
        assert scan.geometry[index].position == (0, 0, s)
        assert scan.scan_info(index).slice_index == s


def test_three_dimensions() -> None:
    limits = {"kspace_encode_step_1": Limit(0, 5, 2), "kspace_encode_step_2": Limit(0, 3, 2)}
    counters = [{"k1": k1, "k2": k2} for k2 in range(4) for k1 in range(6)]
    rows = numbered_rows(24, 2, 16)
    scan = sort_readouts(readout_headers(counters), mrd_header(16, 8, 4, limits=limits))
    kspace = assemble(scan, 0, rows)
    assert kspace.is_3d and kspace.data.shape == (1, 2, 4, 8, 16)
    # partial Fourier: counter 2 is DC, so counters 0..5 are lines 2..7
    assert kspace.mask[0].sum(0).tolist() == [0, 0, 4, 4, 4, 4, 4, 4]
    assert np.array_equal(kspace.data[0, :, 3, 7].numpy(), rows[3 * 6 + 5])


# the k-space centre and limits


@pytest.mark.parametrize("limits", [{}, {"kspace_encode_step_2": Limit(0, 0, 0)}])
def test_slices_that_a_header_counts_as_partitions_are_not_made_a_slab_each(limits: dict[str, Limit]) -> None:
    headers = readout_headers([{"k1": k, "slice": s} for s in range(4) for k in range(8)])
    with pytest.raises(SortError, match=r"one partition of a 3D matrix.*expected several of 4 partitions"):
        sort_readouts(headers, mrd_header(n2=4, limits=limits))


def test_centre_from_limits_and_its_cross_check() -> None:
    limits = {"kspace_encode_step_1": Limit(0, 5, 2)}
    user = [{"k1": k, "user": (0, 0, 0, 0, 0, 3, 0, 0)} for k in range(6)]
    scan = sort_readouts(readout_headers(user), mrd_header(limits=limits))
    assert scan.imaging.k1.tolist() == [2, 3, 4, 5, 6, 7]  # the header is believed: it fits
    assert any("2 by the header and 3 by the readouts" in n for n in scan.notes)
    forced = sort_readouts(readout_headers(user), mrd_header(limits=limits), AcquisitionSettings(centre_source="readouts"))
    assert forced.imaging.k1.tolist() == [1, 2, 3, 4, 5, 6]
    wrong = {"kspace_encode_step_1": Limit(0, 5, 0)}  # would put line 4 and 5 outside
    rescued = sort_readouts(readout_headers(user), mrd_header(limits=wrong))
    assert rescued.imaging.k1.tolist() == [1, 2, 3, 4, 5, 6]
    with pytest.raises(SortError, match="outside the encoded matrix"):
        sort_readouts(readout_headers(user), mrd_header(limits=wrong), AcquisitionSettings(centre_source="header"))


def test_no_limits_means_the_middle_of_the_matrix() -> None:
    scan = sort_readouts(readout_headers(lines(8)), mrd_header())
    assert scan.imaging.k1.tolist() == list(range(8))
    with pytest.raises(SortError, match="1 of 9 imaging readouts lie outside the encoded matrix"):
        sort_readouts(readout_headers(lines(9)), mrd_header())


def test_counter_beyond_the_limits_is_refused() -> None:
    with pytest.raises(SortError, match=r"kspace_encode_step_1 is outside.*got 7; expected 0 to 6"):
        sort_readouts(readout_headers(lines(8)), mrd_header(limits={"kspace_encode_step_1": Limit(0, 6, 4)}))


def test_a_matrix_one_line_short_drops_that_line_and_says_so() -> None:
    limits = {"kspace_encode_step_1": Limit(0, 15, 8)}
    scan = sort_readouts(readout_headers(lines(16)), mrd_header(16, 15, limits=limits))
    assert scan.skipped == {"outside the encoded matrix": 1}
    assert len(scan.imaging) == 15


# channels, encodings, completeness


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"active_channels": 1}, "number of channels changes"),
        ({"active_channels": 0}, "no active channels"),
        ({"available_channels": 1}, "more active than available"),
        ({"channel_mask": (7, *[0] * 15)}, "channel_mask does not fit"),
    ],
)
def test_channel_inconsistencies(fields: dict[str, int], what: str) -> None:
    counters = lines(8)
    counters[4].update(fields)
    with pytest.raises(SortError, match=what) as caught:
        sort_readouts(readout_headers(counters), mrd_header())
    assert caught.value.where == "readout 4 (scan counter 4)"


def test_a_set_channel_mask_that_fits() -> None:
    counters = [{**c, "channel_mask": (1, 1 << 63, *[0] * 14)} for c in lines(8)]
    assert sort_readouts(readout_headers(counters), mrd_header()).n_channels == 2


def test_other_encoding_space_is_skipped_and_can_be_chosen() -> None:
    other = Encoding("cartesian", (1, 4, 8), (0.008, 0.2, 0.2), (1, 4, 8), (0.008, 0.2, 0.2))
    header = mrd_header(more_encodings=(other,))
    small = [{**c, "encoding_space_ref": 1, "number_of_samples": 8, "center_sample": 4} for c in lines(4)]
    headers = readout_headers([*lines(8), *small])
    assert sort_readouts(headers, header).skipped == {"other encoding space": 4}
    chosen = sort_readouts(headers, header, AcquisitionSettings(encoding_space=1))
    assert chosen.imaging.rows.tolist() == [8, 9, 10, 11] and chosen.grid == (1, 4) and chosen.n_x == 8
    with pytest.raises(SortError, match="no such encoding space"):
        sort_readouts(headers, header, AcquisitionSettings(encoding_space=2))


@pytest.mark.parametrize(("trajectory", "got"), [("radial", "radial"), ("", "none")])
def test_not_cartesian_is_refused(trajectory: str, got: str) -> None:
    encoding = Encoding(trajectory, (1, 8, 16), (0.1, 0.1, 0.1), (1, 8, 16), (0.1, 0.1, 0.1))
    with pytest.raises(SortError, match=f"got {got}; expected cartesian"):
        sort_readouts(readout_headers(lines(8)), MrdHeader(encodings=(encoding,)))


@pytest.mark.parametrize("n_last", [0, 1])
def test_incomplete_state_is_an_error_that_names_it_or_is_dropped(n_last: int) -> None:
    counters = [{"k1": k, "slice": s, "phase": p} for s in range(2) for p in range(3) for k in range(16)]
    counters = [c for c in counters if (c["slice"], c["phase"]) != (1, 2) or c["k1"] < n_last]
    headers = readout_headers(counters)
    with pytest.raises(SortError, match=rf"slice 1 phase 2: {n_last} of 16 lines"):
        sort_readouts(headers, mrd_header(16, 16))
    scan = sort_readouts(headers, mrd_header(16, 16), AcquisitionSettings(incomplete="drop"))
    assert [s["phase"] for s in scan.states] == [0, 1] and scan.slices == (0, 1)
    assert scan.skipped == {"incomplete slice or state": 16 + n_last}
    kspace = assemble(scan, 1, numbered_rows(len(headers), 2, 16))
    assert bool(kspace.mask.all()) and kspace.n_states == 2
    own = [i for i, c in enumerate(counters) if c["slice"] == 1 and c["phase"] == 1]
    assert np.array_equal(kspace.data[1, :, 0].numpy(), numbered_rows(len(headers), 2, 16)[own].transpose(1, 0, 2))


def test_announced_but_missing() -> None:
    headers = readout_headers(lines(8, slice=0) + lines(8, slice=2))
    header = mrd_header(limits={"slice": Limit(0, 2, 0), "repetition": Limit(0, 9, 0)})
    with pytest.raises(SortError, match="slice 1: 1 of 3 announced slices never came"):
        sort_readouts(headers, header)
    scan = sort_readouts(headers, header, AcquisitionSettings(incomplete="drop"))
    assert scan.slices == (0, 2)
    assert "9 of 10 announced repetitions never came, the first: 1" in scan.notes


@pytest.mark.parametrize("counter", ["slice", "contrast", "set", "repetition"])
@pytest.mark.parametrize(("first", "of_limits"), [(1, 0), (0, 1)])
def test_readouts_and_header_may_count_from_another_number(counter: str, first: int, of_limits: int) -> None:
    """As many values as were announced, each one higher or one lower: nothing is missing. (One that is missing is, still.)"""
    times = (0.002, 0.005, 0.008)
    listed = {"echo_times": times} if counter == "contrast" else {"inversion_times": times} if counter == "set" else {}
    header = mrd_header(limits={counter: Limit(of_limits, of_limits + 2, of_limits)}, **listed)
    headers = readout_headers([c for n in range(3) for c in lines(8, **{counter: first + n})])
    scan = sort_readouts(headers, header)
    assert (scan.n_slices, scan.n_states) == ((3, 1) if counter == "slice" else (1, 3))
    assert listed == {} or times in (scan.echo_times, scan.inversion_times[0])
    assert f"the readouts count {counter} from {first}, the header from {of_limits}: the same ones" in scan.notes
    assert not any("never came" in note for note in scan.notes)
    one_less = sort_readouts(headers[:16], header, AcquisitionSettings(incomplete="drop"))
    assert any("never came" in note for note in one_less.notes) and not any(
        "the same ones" in note for note in one_less.notes
    )


def test_fewer_lines_than_promised_is_noted() -> None:
    limits = {"kspace_encode_step_1": Limit(0, 15, 8)}
    headers = readout_headers([{"k1": k} for k in range(0, 16, 2)])
    few = sort_readouts(headers, mrd_header(16, 16, limits=limits))
    assert any("8 of 16 lines" in n for n in few.notes)
    accelerated = sort_readouts(headers, mrd_header(16, 16, limits=limits, acceleration=(2, 1)))
    assert not any("lines than expected" in n for n in accelerated.notes)


def test_counters_that_multiply_to_more_images_than_readouts_are_refused_at_once() -> None:
    counters = [{"k1": i % 8, "phase": i, "contrast": i, "set": i, "repetition": i} for i in range(4000)]
    with pytest.raises(SortError, match="slices and states without lines"):
        sort_readouts(readout_headers(counters), mrd_header())


def test_a_header_that_asks_for_too_much_memory_is_refused() -> None:
    headers = readout_headers(lines(8), n_samples=16)
    with pytest.raises(SortError, match="k-space of one slice is too large"):
        sort_readouts(headers, mrd_header(16, 60000, 60000, limits={"kspace_encode_step_2": Limit(0, 0, 0)}))


def test_nothing_to_reconstruct() -> None:
    for headers in (readout_headers([]), readout_headers([{"flags": flag(19)}] * 3)):
        with pytest.raises(SortError, match="no imaging readouts"):
            sort_readouts(headers, mrd_header())


# assembling


@pytest.mark.parametrize("bad", [np.nan, np.inf, complex(0, np.nan), complex(1, -np.inf)])
def test_samples_that_are_not_finite_are_refused_by_place(bad: complex) -> None:
    headers = readout_headers(lines(8, slice=1) + lines(8, slice=1, phase=4))
    rows = numbered_rows(16, 2, 16)
    rows[11, 1, 3] = bad
    with pytest.raises(DataError, match="slice 1 phase 4: samples are NaN or infinite; got 1 of 32 samples of readout 11"):
        assemble(sort_readouts(headers, mrd_header()), 0, rows)


def test_large_samples_are_not_mistaken_for_infinite_ones() -> None:
    rows = np.full((8, 2, 16), 3e38, np.complex64)
    assert torch.isfinite(assemble(sort_readouts(readout_headers(lines(8)), mrd_header()), 0, rows).data).all()


def test_not_finite_noise_or_skipped_rows_do_not_matter() -> None:
    rows = numbered_rows(9, 2, 16)
    rows[0] = np.nan
    scan = sort_readouts(readout_headers([{"flags": flag(27)}, *lines(8)]), mrd_header())
    assert torch.isfinite(assemble(scan, 0, rows).data).all()


@pytest.mark.parametrize("shape", [(7, 2, 16), (8, 2, 15), (8, 0, 16), (8, 16)])
def test_rows_of_the_wrong_shape(shape: tuple[int, ...]) -> None:
    scan = sort_readouts(readout_headers(lines(8)), mrd_header())
    with pytest.raises(DataError, match="rows have the wrong shape"):
        assemble(scan, 0, np.zeros(shape, np.complex64))


def test_rows_may_be_a_memory_map_with_fewer_coils(tmp_path: Path) -> None:
    rows = numbered_rows(8, 1, 16)
    rows.tofile(tmp_path / "rows")
    mapped = np.memmap(tmp_path / "rows", np.complex64, "r", shape=rows.shape)
    scan = sort_readouts(readout_headers(lines(8)), mrd_header())
    kspace = assemble(scan, 0, mapped, noise_std=1.0)
    assert np.array_equal(kspace.data[0, :, 0].numpy(), rows.transpose(1, 0, 2))
    assert kspace.noise_std == 1.0 and kspace.data.dtype == torch.complex64 and kspace.counts.dtype == torch.float32


# times and geometry


def test_times_per_state() -> None:
    headers = readout_headers([c for s in range(3) for e in range(2) for c in lines(8, set=s, contrast=e)])
    header = mrd_header(
        echo_times=(0.002, 0.005),
        inversion_times=(0.1, 0.2, 0.9),
        user_double={f"SaturationTime_ms_{i}": 100.0 * (i + 1) for i in range(3)},
        repetition_times=(0.01, 0.02),
        flip_angles=(0.1, 0.1),
        field_strength=2.89,
    )
    info = sort_readouts(headers, header).scan_info(0)
    assert info.echo_times == (0.002, 0.005) * 3
    assert info.inversion_times == (0.1, 0.1, 0.2, 0.2, 0.9, 0.9)
    assert info.saturation_times == pytest.approx((0.1, 0.1, 0.2, 0.2, 0.3, 0.3))
    assert info.repetition_time is None and info.flip_angle == 0.1 and info.field_strength == 2.89
    unfit = sort_readouts(headers, mrd_header(echo_times=(0.001,), inversion_times=(1.0, 2.0, 3.0, 4.0))).scan_info(0)
    assert unfit.echo_times == () and unfit.inversion_times == ()


@pytest.mark.parametrize(
    ("first", "times", "limit", "expected"),
    [
        (0, (1, 2, 3, 4), None, (1, 2, 3)),  # converters list more than were acquired
        (1, (1, 2, 3), None, (1, 2, 3)),  # counted from 1
        (1, (1, 2, 3), Limit(1, 3, 0), (1, 2, 3)),
        (1, (1, 2, 3, 4), Limit(1, 3, 0), ()),  # the first is of which echo?
        (1, (1, 2, 3, 4), None, ()),
        (1, (0, 2, 3, 4), None, (2, 3, 4)),  # 0 is no echo time
        (1, (1, 2, 3, 4), Limit(0, 3, 0), (2, 3, 4)),  # echo 0 was announced and is missing
    ],
)
def test_echo_times_of_a_counter_that_does_not_begin_at_zero(
    first: int, times: tuple[int, ...], limit: Limit | None, expected: tuple[int, ...]
) -> None:
    """One place too far, R2* and susceptibility would be a quarter too low."""
    states = tuple({"contrast": first + e} for e in range(3))
    assert echo_times(mrd_header(echo_times=times), states, limit) == expected


@pytest.mark.parametrize(
    ("counter", "times", "taken"), [("set", (2, 5, 8), True), ("set", (2, 5), False), ("repetition", (2, 5, 8), False)]
)
def test_echoes_that_a_converter_counted_as_sets(counter: str, times: tuple[int, ...], taken: bool) -> None:
    headers = readout_headers([c for e in range(3) for c in lines(8, **{counter: e})])
    ordered = sort_readouts(headers, mrd_header(echo_times=times))
    assert ordered.echo_times == (times if taken else (2, 2, 2))
    assert any("the sets are taken for echoes" in note for note in ordered.notes) == taken


@pytest.mark.parametrize(("dwell", "told"), [((4.0, 4.0), False), ((4.0, 8.0), True), ((4.0, 0.0), False)])
def test_echoes_of_other_bandwidths_are_told(dwell: tuple[float, float], told: bool) -> None:
    headers = readout_headers([c for e in range(2) for c in lines(8, contrast=e, sample_time_us=dwell[e])])
    notes = [n for n in sort_readouts(headers, mrd_header(echo_times=(0.002, 0.005))).notes if "different bandwidths" in n]
    assert len(notes) == told and all("8 us of slice 0 contrast 1" in note for note in notes)


def test_lines_read_in_either_direction_within_one_image_are_told() -> None:
    """An echo-planar train that a converter calls Cartesian has ghosts; a bipolar multi-echo scan has one direction for each image."""

    def told(reverse: Callable[[int, int], bool]) -> list[str]:
        counters = [{"k1": k, "contrast": q, "flags": flag(22) * reverse(q, k)} for q in range(3) for k in range(8)]
        navigators = [{"flags": flag(24)}] * 3
        notes = sort_readouts(readout_headers([*navigators, *counters]), mrd_header()).notes
        return [note for note in notes if "either direction" in note]

    (note,) = told(lambda q, k: q > 0 and k % 2 == 1)
    assert note.startswith("2 of 3 images") and "slice 0 contrast 1;" in note and "3 phase correction readouts" in note
    assert not told(lambda q, k: q == 1)


def test_ti_list_of_a_saturation_preparation() -> None:
    headers = readout_headers([c for s in range(3) for c in lines(8, set=s)])
    header = mrd_header(inversion_times=(0.1, 0.2, 0.9), user_string={"MagnetizationPreparation": "saturation"})
    info = sort_readouts(headers, header).scan_info(0)
    assert info.saturation_times == (0.1, 0.2, 0.9) and info.inversion_times == ()


@pytest.mark.parametrize("said", [None, "saturation", "inversion", " T2 "])
@pytest.mark.parametrize("preparation", ["inversion", "saturation"])
def test_a_ti_list_that_the_header_does_not_explain_is_what_the_chain_says(said: str | None, preparation: str) -> None:
    headers = readout_headers([c for s in range(3) for c in lines(8, set=s)])
    user = {} if said is None else {"MagnetizationPreparation": said}
    header = mrd_header(inversion_times=(0.1, 0.2, 0.9), user_string=user)
    info = sort_readouts(headers, header, AcquisitionSettings(preparation=preparation)).scan_info(0)
    saturated = (said or preparation) == "saturation"
    assert (info.saturation_times, info.inversion_times) == (((0.1, 0.2, 0.9), ())[:: 1 if saturated else -1])


def test_source_header_is_the_earliest_nearest_to_the_centre() -> None:
    counters = [
        {"k1": k, "phase": p, "acquisition_time_stamp": 100 * a + 10 * p + k, "average": a}
        for a in range(2)
        for p in range(2)
        for k in range(8)
    ]
    scan = sort_readouts(readout_headers(counters), mrd_header())
    assert scan.source_headers["acquisition_time_stamp"].tolist() == [[4, 14]]


def test_missing_directions_and_moving_slices_are_noted() -> None:
    counters = [{"k1": k, "position": (0, 0, k), "read_dir": (0, 0, 0), "phase_dir": (0, 0, 0)} for k in range(8)]
    notes = sort_readouts(readout_headers(counters), mrd_header()).notes
    assert any("directions are missing" in n for n in notes)
    assert any("change their position" in n for n in notes)
    table = [{"k1": k, "repetition": r, "patient_table_position": (0, 0, 40 * r)} for r in range(2) for k in range(8)]
    assert any("or the table's" in n for n in sort_readouts(readout_headers(table), mrd_header()).notes)


@pytest.mark.parametrize("counter", ["set", "repetition", "contrast"])
def test_slabs_at_different_places_are_not_sent_to_one(counter: str) -> None:
    """They are told apart by the slice counter; a slab that follows a motion, and a 2D slice that follows the breath, stay."""

    def positions(away: float) -> np.ndarray:
        return readout_headers(
            {"k1": k, "k2": j, counter: q, "position": (0, 0, away * q)}
            for q in range(2)
            for j in range(4)
            for k in range(8)
        )

    slab = mrd_header(n2=4)
    with pytest.raises(
        SortError, match=f"slice 0 {counter} 1: slabs at different places .*got 60 mm from slice 0 {counter} 0"
    ):
        sort_readouts(positions(60.0), slab)
    assert sort_readouts(positions(4.0), slab).n_states == 2
    flat = readout_headers({"k1": k, counter: q, "position": (0, 0, 25.0 * q)} for q in range(2) for k in range(8))
    assert sort_readouts(flat, mrd_header()).n_states == 2


@pytest.mark.parametrize("counter", ["set", "repetition", "contrast", "average"])
def test_orientations_that_share_a_slice_are_not_sent_as_one(counter: str) -> None:
    """A localiser whose three planes are counted as sets, phase encoding the other way round, and a slice that follows the head."""

    def told(*second: tuple[float, float, float]) -> tuple[str, ...]:
        of_second = dict(zip(("read_dir", "phase_dir", "slice_dir"), second, strict=True))
        first = {"read_dir": (1, 0, 0), "phase_dir": (0, 1, 0), "slice_dir": (0, 0, 1)}
        counters = [{"k1": k, counter: q, **(of_second if q else first)} for q in range(2) for k in range(8)]
        return sort_readouts(readout_headers(counters), mrd_header()).notes  # type: ignore[arg-type]

    for coronal_or_back in (((1, 0, 0), (0, 0, -1), (0, 1, 0)), ((1, 0, 0), (0, -1, 0), (0, 0, 1))):
        with pytest.raises(SortError, match=r"different orientations share a slice counter.*turned by (90|180) degrees"):
            told(*coronal_or_back)
    cosine, sine = np.cos(np.radians(3)), np.sin(np.radians(3))
    assert any("change by up to 3 degrees" in note for note in told((cosine, sine, 0), (-sine, cosine, 0), (0, 0, 1)))
    assert not told((1, 1e-4, 0), (0, 1, 0), (0, 0, 1)) and not told((0, 0, 0), (np.nan, 0, 0), (0, 0, 0))


# the index and the settings


def test_index_grows_and_old_views_stay() -> None:
    index = ReadoutIndex(capacity=2)
    headers = readout_headers(lines(8) * 5)
    index.append(headers[:2], np.arange(2), np.arange(2) * 10)
    early = index.headers
    for start in range(2, 40, 7):
        part = np.arange(start, min(start + 7, 40))
        index.append(headers[part], part, part * 10)
    assert len(index) == 40 and len(early) == 2
    assert np.array_equal(index.headers, headers) and np.array_equal(early, headers[:2])
    assert np.array_equal(index.offsets, np.arange(40)) and np.array_equal(index.payload_bytes, 10 * np.arange(40))
    with pytest.raises(ValueError, match="read-only"):
        index.offsets[0] = 1
    with pytest.raises(ValueError, match="payload sizes"):
        index.append(headers[:2], np.arange(2), np.arange(3))


def test_a_stream_of_readouts_without_end_is_refused_before_its_headers_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gadgets.readouts.MAX_READOUTS", 10)
    index, headers = ReadoutIndex(capacity=2), readout_headers(lines(8))
    index.append(headers, np.arange(8), np.arange(8))
    with pytest.raises(SortError, match="too many readouts; got at least 16; expected at most 10"):
        index.append(headers, np.arange(8), np.arange(8))
    assert len(index) == 8 and len(index._headers) <= 10


def test_settings_parse_from_text() -> None:
    parsed = parse_settings(AcquisitionSettings, {"state": "phase", "cardiac_phases": "25", "arrhythmia_rejection": "20"})
    assert parsed == AcquisitionSettings(state="phase", cardiac_phases=25, arrhythmia_rejection=20.0)
