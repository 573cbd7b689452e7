"""PINQI as a method: units, order, errors and marks. Weights are saved and loaded for real; none claims a quality it cannot have."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recon_core.coils.estimate import CoilSettings
from recon_core.errors import CalibrationError, DataError, NumericalError, ReconError
from recon_core.fourier import fft_centred, ifft_centred
from recon_core.methods.pinqi.installed import FOLDERS, find_weights
from recon_core.methods.pinqi.model import PinqiSettings, Strengths
from recon_core.methods.pinqi.noise_rule import NoiseRule
from recon_core.methods.pinqi.reconstruction import (
    apply_network,
    longest_delay_calibration,
    reconstruct,
    reconstruct_with,
)
from recon_core.methods.pinqi.settings import Settings
from recon_core.methods.pinqi.weights import TrainedPinqi
from recon_core.reconstruct import Recipe
from recon_core.reconstruct import reconstruct as whole_reconstruction
from recon_core.training.checkpoint import WeightError
from recon_core.types import KSpace, Report, Result
from tests.recon_core.listener import Listener
from tests.recon_core.pinqi.saturation_scan import TIMES, SaturationScan, saturation_scan, save_network, saved_network


@pytest.fixture(scope="module")
def physics(tmp_path_factory: pytest.TempPathFactory) -> TrainedPinqi:
    return saved_network(tmp_path_factory.mktemp("weights"))


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> TrainedPinqi:
    """Both networks, at random, one iteration."""
    return saved_network(tmp_path_factory.mktemp("weights"), PinqiSettings(n_iterations=1))


def run(trained: TrainedPinqi, s: SaturationScan, kspace: KSpace | None = None, **settings: object) -> Result:
    return reconstruct_with(trained, kspace or s.kspace, s.scan, Settings(**settings), Report())  # type: ignore[arg-type]


def maps_of(result: Result) -> dict[str, np.ndarray]:
    return {m.name: m.data[0].numpy() for m in result.maps}


@pytest.mark.parametrize("shape", [(25, 22), (20, 27)])
@pytest.mark.parametrize("scale", [1.0, 3e-7, 2e6])
def test_the_true_maps_come_back_in_the_scans_units(physics: TrainedPinqi, shape: tuple[int, int], scale: float) -> None:
    s = saturation_scan(shape, scale=scale)
    result = run(physics, s)
    found = maps_of(result)
    valid = result.maps[0].valid[0].numpy()
    assert np.array_equal(valid, s.body)
    assert np.abs(found["T1"] - s.t1)[valid].max() < 0.01
    assert np.abs(found["M0"] - abs(s.m0))[valid].max() < 0.005 * scale
    assert np.abs(found["M0_phase"] - np.angle(s.m0))[valid].max() < 0.01
    assert all((m.data[~m.valid] == 0).all() and m.valid is result.maps[0].valid for m in result.maps)
    assert [m.unit for m in result.maps] == ["s", "s", "1", "rad"]
    images = result.images[0].data[:, 0].numpy()
    truth = np.stack([s.m0 * (1 - np.exp(-t / s.t1)) for t in TIMES])
    assert np.linalg.norm(images - truth) < 0.005 * np.linalg.norm(truth)
    assert result.quality["t1_valid"] == 1.0 and not result.notes


@pytest.mark.parametrize("amplitude", [0.6, 1.8])
@pytest.mark.parametrize("scale", [1.0, 3e-7])
def test_the_network_sees_the_amplitude_that_it_was_trained_on(
    physics: TrainedPinqi, amplitude: float, scale: float
) -> None:
    s = saturation_scan(scale=scale, noise=1e-3)
    applied = apply_network(replace(physics, amplitude=amplitude), s.kspace, torch.arange(4), "slice 0", Report())
    assert float(applied.found.images.abs().flatten().quantile(0.999)) == pytest.approx(amplitude, rel=0.2)
    assert applied.noise * applied.scale == pytest.approx(1e-3 * scale, rel=1e-4)


def test_the_lambdas_follow_noise_and_acceleration_of_the_scan(
    physics: TrainedPinqi, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def at(self: NoiseRule, noise: float, acceleration: float = 0.0) -> Strengths:
        seen.append((noise, acceleration))
        return Strengths()

    monkeypatch.setattr(NoiseRule, "at", at)
    s = saturation_scan(noise=1e-3, keep=0.2)
    applied = apply_network(physics, s.kspace, torch.arange(4), "slice 0", Report())
    assert seen == [(applied.noise, pytest.approx(s.kspace.mask.numel() / int(s.kspace.mask.sum())))] and seen[0][1] > 2
    apply_network(physics, s.kspace, torch.arange(4), "slice 0", Report(), "learned")
    assert len(seen) == 1


def test_undersampled_states_are_joined_by_the_signal_model(physics: TrainedPinqi) -> None:
    s = saturation_scan(keep=0.5)
    found = maps_of(run(physics, s))["T1"]
    assert np.median(np.abs(found - s.t1)[s.body]) < 0.05


def test_states_in_any_order_give_the_same_maps_and_come_back_in_their_order(physics: TrainedPinqi) -> None:
    s, order = saturation_scan(keep=0.6), [2, 0, 3, 1]
    k = s.kspace
    shuffled = replace(k, data=k.data[order], counts=k.counts[order])
    scan = replace(s.scan, saturation_times=tuple(TIMES[i] for i in order))
    a = run(physics, s)
    b = reconstruct_with(physics, shuffled, scan, Settings(), Report())
    assert torch.equal(a.images[0].data[order], b.images[0].data)
    assert torch.equal(a.maps[0].data, b.maps[0].data)


def test_states_that_are_turned_give_the_same_maps_and_come_back_turned(physics: TrainedPinqi) -> None:
    """A field that drifted: for the model with one phase for all states, the maps would not fit."""
    s, turns = saturation_scan(keep=0.6), torch.tensor([0.4, 0.0, -0.3, 0.2])
    factor = torch.polar(torch.ones(4), turns)
    k = replace(s.kspace, data=s.kspace.data * factor[:, None, None, None, None])
    a, b = run(physics, s), run(physics, s, k, quality_failure="error")
    np.testing.assert_allclose(maps_of(b)["T1"], maps_of(a)["T1"], atol=5e-3)
    expected = a.images[0].data * factor[:, None, None, None]
    assert float((b.images[0].data - expected).norm() / expected.norm()) < 1e-3
    assert any("taken out for the fit" in note for note in b.notes) and not a.notes


def test_a_reference_scan_of_another_gain_changes_nothing(physics: TrainedPinqi) -> None:
    """Calibration lines with another flip angle must not decide on the amplitude that the network sees."""
    s = saturation_scan(keep=0.6, noise=1e-3)
    assert s.kspace.acs_mask is not None and s.kspace.acs is not None
    hole = s.kspace.acs_mask.clone()
    hole[:, ::2] = False  # so no state has all of them
    counts = torch.where(hole, 0.0, s.kspace.counts)
    data = s.kspace.data * (counts > 0)[:, None, :, :, None]
    scales = []
    for gain in (1.0, 30.0, 0.05):
        k = replace(s.kspace, data=data, counts=counts, acs=gain * s.kspace.acs)
        scales.append(apply_network(physics, k, torch.arange(4), "slice 0", Report()).scale)
    np.testing.assert_allclose(scales, scales[0], rtol=1e-4)


def test_weights_that_know_the_states_in_another_order(tmp_path: Path) -> None:
    descending = saved_network(tmp_path, times=TIMES[::-1])
    s = saturation_scan()
    assert np.abs(maps_of(run(descending, s))["T1"] - s.t1)[s.body].max() < 0.01


def test_random_networks_run_on_any_matrix_and_leave_the_callers_arrays_alone(untrained: TrainedPinqi) -> None:
    s, listener = saturation_scan((35, 22), keep=0.4), Listener()
    k = s.kspace
    before = [t.clone() for t in (k.data, k.counts, k.acs, k.coil_maps) if t is not None]
    result = reconstruct_with(untrained, k, s.scan, Settings(), listener)
    assert all(
        torch.equal(a, b) for a, b in zip(before, [k.data, k.counts, k.acs, k.coil_maps], strict=True) if b is not None
    )
    assert result.images[0].data.shape == (4, 1, 35, 22) and result.images[0].data.dtype == torch.complex64
    assert all(m.data.shape == (1, 35, 22) and bool(m.data.isfinite().all()) for m in result.maps)
    assert listener.fractions == sorted(listener.fractions) and listener.fractions[-1] == 1.0
    assert all(isinstance(v, float) and np.isfinite(v) for v in result.quality.values())


def test_one_coil_and_unknown_noise(physics: TrainedPinqi) -> None:
    s = saturation_scan(n_coils=1, noise=1e-3)
    result = run(physics, s, replace(s.kspace, noise_std=None))
    valid = result.maps[0].valid[0].numpy()
    assert (valid & s.body).sum() > 0.98 * s.body.sum()
    assert np.abs(maps_of(result)["T1"] - s.t1)[valid & s.body].max() < 0.05


def test_nothing_but_zeros_gives_nothing_and_says_so(physics: TrainedPinqi) -> None:
    s = saturation_scan()
    assert s.kspace.acs is not None
    zero = replace(s.kspace, data=torch.zeros_like(s.kspace.data), acs=torch.zeros_like(s.kspace.acs))
    result = run(physics, s, zero)
    assert not result.maps[0].valid.any() and float(result.images[0].data.abs().max()) == 0
    assert "all samples are zero" in result.notes[0] and {m.name for m in result.maps} == {"T1", "T1_SD", "M0", "M0_phase"}


def test_data_that_contradict_the_model_are_marked_or_refused(physics: TrainedPinqi) -> None:
    s = saturation_scan(noise=1e-3)
    spoiled = s.kspace.data.clone()
    n = spoiled.shape[-2]
    spoiled[3] *= torch.exp(2j * torch.pi * 4 / n * (torch.arange(n) - n // 2))[:, None]  # moved by four pixels
    k = replace(s.kspace, data=spoiled)
    result = run(physics, s, k)
    assert "do not fit the measured data" in result.notes[0]
    assert all("do not fit" in m.comment for m in result.maps)
    assert result.quality["t1_valid"] < 0.5 and result.quality["residual_maps"] > 2
    with pytest.raises(NumericalError, match="do not belong together") as refused:
        run(physics, s, k, quality_failure="error")
    assert refused.value.remedy
    good = run(physics, s)
    assert not good.notes and "do not fit" not in good.maps[0].comment and good.quality["residual_maps"] < 1.2


def test_maps_that_leave_too_much_unexplained_are_refused(physics: TrainedPinqi) -> None:
    """What one place has wrong is nothing that all pixels share."""
    s = saturation_scan(noise=1e-3)
    spoiled = s.kspace.data.clone()
    spoiled[3, ..., 6:10] *= 0.3  # four columns of the longest delay
    with pytest.raises(NumericalError, match="do not fit the measured data") as refused:
        run(physics, s, replace(s.kspace, data=spoiled), quality_failure="error")
    assert refused.value.remedy


def test_pixels_at_a_bound_are_marked(physics: TrainedPinqi) -> None:
    s = saturation_scan(noise=1e-4)
    bright = s.kspace.data.clone()
    bright[:3] = bright[3] * 1.5  # the short delays are brighter than the long one: the rate runs to its bound
    result = run(physics, s, replace(s.kspace, data=bright), quality_noise=1000.0, quality_signal=1.0)
    assert not result.maps[0].valid[0].numpy()[s.body].any()


def test_standard_deviation_is_the_spread_under_noise(physics: TrainedPinqi) -> None:
    """Fully sampled, no networks: an unregularised fit. Each pixel's error over its claimed SD has an RMS of 1."""
    first = saturation_scan((20, 16), noise=0.02)
    inside = first.body
    ratios = []
    for repeat in range(6):
        found = maps_of(run(physics, saturation_scan((20, 16), noise=0.02, noise_seed=100 + repeat)))
        ratios.append(((found["T1"] - first.t1) / np.maximum(found["T1_SD"], 1e-9))[inside])
    assert np.sqrt(np.mean(np.square(ratios))) == pytest.approx(1.0, abs=0.15)


def test_averages_lower_the_standard_deviation(physics: TrainedPinqi) -> None:
    """Data with four averages everywhere, of the same noise per readout: half the spread."""
    s = saturation_scan((20, 16), noise=0.02)
    four = replace(s.kspace, counts=4 * s.kspace.counts)
    once, averaged = (run(physics, s, k, quality_signal=1.0).maps[1].data[0].numpy()[s.body] for k in (s.kspace, four))
    # the same data are noisier than claimed, and the residual says so: by two, but for the three of eight numbers that are fitted
    assert np.median(averaged / once) == pytest.approx(np.sqrt(5 / 8), abs=0.1)
    quiet = saturation_scan((20, 16), noise=0.01)
    really = run(physics, quiet, replace(quiet.kspace, counts=4 * quiet.kspace.counts, noise_std=0.02))
    assert np.median(really.maps[1].data[0].numpy()[s.body] / once) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize(("left", "said"), [(0.0, ""), (0.07, "too short"), (-0.07, "too long")])
def test_an_incomplete_saturation_is_said_with_every_map(physics: TrainedPinqi, left: float, said: str) -> None:
    """Though M0 and T1 take up nearly all of it."""
    result = run(physics, saturation_scan(left=left))
    told = [note for note in result.notes if "of M0" in note]
    assert len(told) == bool(said)
    assert all(said in note and all(note in m.comment for m in result.maps) for note in told)


def test_a_saturation_that_varies_in_space_is_said_with_every_map(physics: TrainedPinqi) -> None:
    """A uniform remainder explains nothing of it, and the residual is small."""
    even, slope = (run(physics, saturation_scan((40, 36), slope=slope)) for slope in (0.0, 0.13))
    assert not any("from place to place" in note for note in even.notes)
    told = [note for note in slope.notes if "from place to place" in note]
    assert told and all(told[0] in m.comment for m in slope.maps)


def brightened(s: SaturationScan, gain: float) -> KSpace:
    """The longest delay louder than the others."""
    data = s.kspace.data.clone()
    data[TIMES.index(max(TIMES))] *= 1 + gain
    return replace(s.kspace, data=data)


def test_a_delay_of_another_gain_is_said_with_every_map_and_once(physics: TrainedPinqi) -> None:
    s = saturation_scan()
    result = run(physics, s, brightened(s, 0.05))
    (told,) = [note for note in result.notes if "brighter" in note]
    assert "delay 8 s seem to be 5 % brighter" in told and "too long" in told
    assert all(told in m.comment and bool(m.valid.any()) for m in result.maps)
    assert not any("do not fit the measured data" in note for note in result.notes if note != told)


@pytest.mark.parametrize("failure", ["tell", "mark", "error"])
def test_a_gain_that_makes_t1_wrong_by_a_tenth_leaves_no_map_unless_asked_for(physics: TrainedPinqi, failure: str) -> None:
    s = saturation_scan()
    if failure == "error":
        with pytest.raises(NumericalError, match=r"T1 would be wrong.*delay 8 s.*1. % brighter"):
            run(physics, s, brightened(s, 0.1), quality_failure=failure)
    else:
        result = run(physics, s, brightened(s, 0.1), quality_failure=failure)
        assert all(bool(m.valid.any()) == (failure == "tell") for m in result.maps)
        assert bool((result.images[0].data != 0).any())
        assert any("delay 8 s" in note for note in result.notes)


def moved(s: SaturationScan, state: int, pixels: float) -> KSpace:
    """The object of one delay elsewhere along y."""
    data = s.kspace.data.clone()
    n = data.shape[-2]
    data[state] *= torch.exp(-2j * torch.pi * pixels * (torch.arange(n) - n // 2) / n)[:, None]
    return replace(s.kspace, data=data)


@pytest.mark.parametrize("state", [None, 0, 3])
def test_an_object_that_moved_in_one_delay_is_said_with_every_map(physics: TrainedPinqi, state: int | None) -> None:
    s = saturation_scan((56, 52), noise=0.003)
    result = run(physics, s, None if state is None else moved(s, state, 1.0), quality_failure="tell")
    told = [note for note in result.notes if "seems to have moved" in note]
    assert bool(told) == (state is not None)
    assert state is None or all(f"at {TIMES[state]:g} s" in told[0] and told[0] in m.comment for m in result.maps)


def test_maps_that_do_not_fit_for_motion_are_refused_with_its_reason(physics: TrainedPinqi) -> None:
    s = saturation_scan((56, 52), noise=0.003)
    with pytest.raises(NumericalError, match="moved at 8 s"):
        run(physics, s, moved(s, 3, 2.0), quality_failure="error")


@pytest.mark.parametrize("times", [1.0, 1.5, 3.0])
def test_a_noise_measurement_that_is_too_loud_is_told(physics: TrainedPinqi, times: float) -> None:
    """The residual is then less than noise, which made the quality check blind."""
    s = saturation_scan(noise=3e-3)
    result = run(physics, s, replace(s.kspace, noise_std=times * 3e-3))
    assert any("noise measurement is too loud" in note for note in result.notes) == (times > 1)


def test_an_asymmetric_echo_has_less_noise_and_is_no_loud_measurement(physics: TrainedPinqi) -> None:
    s = saturation_scan(noise=0.05)
    n = s.kspace.data.shape[-1]
    kept = torch.arange(n) >= n // 2 - 2
    data = ifft_centred(fft_centred(s.kspace.data, -1) * kept, -1)
    result = run(physics, s, replace(s.kspace, data=data, readout_ranges=((n // 2 - 2, n),) * len(data)))
    assert not any("too loud" in note for note in result.notes)
    assert 0.95 < result.quality["residual_maps"] < 1.3


def test_calibration_from_the_longest_delay() -> None:
    s = saturation_scan(keep=0.4)
    k = longest_delay_calibration(s.kspace, s.scan)
    assert k.acs is not None and k.acs_mask is not None
    assert torch.equal(k.acs[:, k.acs_mask], s.kspace.data[3][:, k.acs_mask])
    assert not k.acs[:, ~k.acs_mask].any()
    assert longest_delay_calibration(s.kspace, replace(s.scan, saturation_times=())) is s.kspace
    counts = s.kspace.counts.clone()
    counts[3, 0, 13] = 0  # the longest delay lacks a line: the mean of the states stays
    lacking = replace(s.kspace, counts=counts)
    assert longest_delay_calibration(lacking, s.scan) is lacking


def test_the_chains_reconstruction_takes_coil_maps_from_the_longest_delay_unless_told_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calibration lines that the chain has chosen hold noise alone."""
    save_network(tmp_path, "site")
    monkeypatch.setenv(FOLDERS, str(tmp_path))
    s = saturation_scan(keep=0.6, noise=1e-3)
    assert s.kspace.acs is not None and s.kspace.acs_mask is not None
    lines = torch.randn(s.kspace.acs.shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(3))
    kspace = replace(s.kspace, coil_maps=None, acs=lines * s.kspace.acs_mask[None, :, :, None])

    def unexplained(**choice: str) -> float:
        own = Settings(weights="site", quality_failure="tell", **choice)  # type: ignore[arg-type]
        recipe = Recipe("pinqi", own, coils=CoilSettings(method="walsh"))
        return whole_reconstruction(kspace, s.scan, recipe).quality["unexplained"]

    assert unexplained() < 0.12 and unexplained(coil_map_source="chain") > 0.3


# -------------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("times", "error", "why"),
    [
        ((), DataError, "no saturation times"),
        ((0.5, 1.0, 8.0), DataError, "count of saturation times"),
        ((0.5, 1.0, 2.5, 8.0), WeightError, "other delays"),
    ],
)
def test_missing_or_other_delays_are_refused(
    physics: TrainedPinqi, times: tuple[float, ...], error: type[ReconError], why: str
) -> None:
    s = saturation_scan()
    with pytest.raises(error, match=why) as refused:
        reconstruct_with(physics, s.kspace, replace(s.scan, saturation_times=times), Settings(), Report())
    assert refused.value.remedy


def test_another_number_of_states_and_slabs_are_refused(physics: TrainedPinqi) -> None:
    s = saturation_scan(times=(0.5, 1.0, 8.0))
    with pytest.raises(WeightError, match="3 states"):
        run(physics, s)
    k = saturation_scan().kspace
    slab = replace(k, data=k.data.expand(-1, -1, 2, -1, -1))
    with pytest.raises(DataError, match="single slices"):
        run(physics, s, slab)


def test_kspace_that_does_not_fit_together_is_refused(physics: TrainedPinqi) -> None:
    s = saturation_scan()
    k = s.kspace
    assert k.coil_maps is not None
    broken = k.data.clone()
    broken[1, 0, 0, 13, 3] = float("nan")
    for changed, error, why in (
        (replace(k, data=broken), DataError, "not finite"),
        (replace(k, counts=k.counts[:, :, :-1]), DataError, "counts"),
        (replace(k, counts=torch.zeros_like(k.counts), data=torch.zeros_like(k.data)), DataError, "nothing was sampled"),
        (replace(k, coil_maps=None), CalibrationError, "coil maps"),
        (replace(k, coil_maps=torch.zeros_like(k.coil_maps)), CalibrationError, "zero everywhere"),
        (replace(k, coil_maps=k.coil_maps[:-1]), DataError, "coil maps"),
    ):
        with pytest.raises(error, match=why):
            run(physics, s, changed)


def test_order_of_coils_does_not_matter_and_noise_gives_finite_maps(physics: TrainedPinqi) -> None:
    s, order = saturation_scan(keep=0.5, noise=1e-3), [2, 0, 3, 1]
    k = s.kspace
    assert k.coil_maps is not None
    a, b = run(physics, s), run(physics, s, replace(k, data=k.data[:, order], coil_maps=k.coil_maps[order], acs=None))
    first, second = a.images[0].data, b.images[0].data
    assert float((first - second).abs().square().sum().sqrt()) < 1e-3 * float(first.abs().square().sum().sqrt())
    g = torch.Generator().manual_seed(1)
    noise = torch.randn(k.data.shape, dtype=torch.complex64, generator=g) * k.mask[:, None, :, :, None]
    result = run(physics, s, replace(k, data=noise, acs=None, acs_mask=None, noise_std=1.0))
    assert all(bool(m.data.isfinite().all()) for m in result.maps) and result.quality["t1_valid"] < 0.5


def test_weights_are_found_by_name_in_the_named_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = saturation_scan()
    save_network(tmp_path / "a", "site")
    monkeypatch.setenv(FOLDERS, str(tmp_path / "a"))
    result = reconstruct(s.kspace, s.scan, Settings(weights="site"), Report())
    assert np.abs(maps_of(result)["T1"] - s.t1)[s.body].max() < 0.01
    save_network(tmp_path, "outside")
    for name in ("nowhere", "../outside", str(tmp_path / "outside"), ""):
        with pytest.raises(WeightError, match="weights"):
            find_weights(name)
    with pytest.raises(WeightError, match="site"):  # says what there is
        find_weights("nowhere")


def test_damaged_weights_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    s = saturation_scan()
    tensors = save_network(tmp_path, "site").with_suffix(".safetensors")
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(bytes(content))
    monkeypatch.setenv(FOLDERS, str(tmp_path))
    with pytest.raises(WeightError, match="sha256"):
        reconstruct(s.kspace, s.scan, Settings(weights="site"), Report())


def test_the_published_solver_is_a_setting_and_gives_the_same_maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped proportions: both networks as published, five iterations."""
    save_network(tmp_path, "site", PinqiSettings())
    monkeypatch.setenv(FOLDERS, str(tmp_path))
    s = saturation_scan((32, 30), keep=0.6, noise=0.01)
    lm, published = (
        reconstruct(
            s.kspace,
            s.scan,
            # what random networks say does not fit the data: it is shown all the same
            Settings(weights="site", nonlinear_solver=solver, max_relative_sd=10.0, quality_noise=1000.0),
            Report(),
        )
        for solver in ("lm", "lbfgs")
    )
    t1, other = maps_of(lm)["T1"], maps_of(published)["T1"]
    valid, also = (result.maps[0].valid[0].numpy() for result in (lm, published))
    both = valid & also
    assert not np.array_equal(t1, other)  # another solver, indeed
    assert valid.sum() > 200 and both.sum() > 0.98 * valid.sum()
    assert np.linalg.norm((t1 - other)[both]) < 2e-3 * np.linalg.norm(t1[both])


def test_what_was_learned_counts_less_where_there_is_less_noise(untrained: TrainedPinqi) -> None:
    s = saturation_scan(noise=1e-3, keep=0.6)
    truth = np.stack([s.m0 * (1 - np.exp(-t / s.t1)) for t in TIMES])

    def error(kspace: KSpace, how: str) -> float:
        images = run(untrained, s, kspace, regularisation=how).images[0].data[:, 0].numpy()
        return float(np.linalg.norm(images - truth) / np.linalg.norm(truth))

    # random networks know nothing: the less they count, the better
    assert error(s.kspace, "noise") < 0.6 * error(s.kspace, "learned")
    loud = replace(s.kspace, noise_std=0.1)
    assert error(loud, "noise") == error(loud, "learned")


def test_a_smooth_phase_of_the_coil_maps_changes_only_the_phase(untrained: TrainedPinqi) -> None:
    """Estimated maps have an arbitrary one: the networks must not see it."""
    s = saturation_scan((32, 30), noise=0.01)
    y, x = np.meshgrid(*[np.linspace(-1, 1, n) for n in (32, 30)], indexing="ij")
    turn = torch.from_numpy(np.exp(1j * (2.0 + 1.0 * x - 0.8 * y))).to(torch.complex64)
    assert s.kspace.coil_maps is not None
    plain = run(untrained, s)
    other = run(untrained, s, replace(s.kspace, coil_maps=s.kspace.coil_maps * turn))
    t1, images = plain.maps[0].data, plain.images[0].data
    body = torch.from_numpy(s.body)[None]
    assert float((other.maps[0].data - t1).abs()[body].median()) < 0.01
    back = other.images[0].data * turn
    assert float(torch.linalg.vector_norm(back - images)) < 0.05 * float(torch.linalg.vector_norm(images))


def test_two_scans_at_once_on_one_network_do_not_mix(untrained: TrainedPinqi) -> None:
    quiet, loud = (saturation_scan((40, 36), noise=noise, keep=0.6) for noise in (1e-3, 0.05))
    alone = [run(untrained, s).images[0].data for s in (quiet, loud)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda s: run(untrained, s).images[0].data, [quiet, loud] * 4))
    for i, images in enumerate(together):
        assert float((images - alone[i % 2]).abs().max()) < 1e-4
