"""T1 maps behind a reconstruction: which times, which noise, which sign; maps come last; what is refused and what is said."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from recon_core.errors import CalibrationError, DataError
from recon_core.maps.regrid import map_on_recon_matrix
from recon_core.maps.series import ImageNoise, image_noise
from recon_core.maps.series_t1 import recovery_times, t1_maps
from recon_core.maps.settings import MapSettings
from recon_core.methods import get_method
from recon_core.preprocess.oversampling import to_recon_matrix
from recon_core.problem import noise_scan_excess, noise_scan_lack
from recon_core.reconstruct import Recipe, finish, reconstruct
from recon_core.settings import parse_settings
from recon_core.state_images import StateImages
from recon_core.types import ImageSeries, KSpace, ParameterMap, Result, ScanInfo
from tests.recon_core.listener import Listener
from tests.recon_core.small_series import centred_fft, coil_maps

N = 48
TIMES = (0.12, 1.12, 2.12, 3.12, 4.12, 0.20, 1.20, 2.20)  # 5(3)3, as acquired: not in order
T1 = MapSettings(maps="t1")
FOV = (0.008, 0.3, 0.3)
SCAN = ScanInfo((1, N, N), FOV, (1, N, N), FOV, inversion_times=TIMES)


def object_t1(n: int = N) -> tuple[np.ndarray, np.ndarray]:
    """A disc of T1 = 1.2 s around one of 0.4 s: T1 ``(y, x)`` in s and the density."""
    y, x = np.meshgrid(*[(np.arange(n) - n // 2) / (n / 2)] * 2, indexing="ij")
    r = np.hypot(y, x)
    return np.where(r < 0.35, 0.4, 1.2), 1 / (1 + np.exp((r - 0.75) * n / 2))


def molli_images(n: int = N, phase: np.ndarray | None = None, shortening: float = 0.8) -> torch.Tensor:
    """complex128 ``(state, 1, y, x)``."""
    t1, density = object_t1(n)
    y, x = np.meshgrid(*[(np.arange(n) - n // 2) / (n / 2)] * 2, indexing="ij")
    ti = np.array(TIMES)[:, None, None]
    signal = shortening - (1 + shortening) * np.exp(-ti / (shortening * t1))
    own = np.exp(1j * (0.6 * x - 0.5 * y)) if phase is None else np.exp(1j * phase)
    return torch.from_numpy(density * signal * own)[:, None]


def molli_kspace(noise: float, keep: float = 1.0, n_coils: int = 4, n_acs: int = 12, seed: int = 0) -> KSpace:
    """Hybrid k-space of `molli_images` with true maps; every state keeps its own part of the lines."""
    rng = np.random.default_rng(seed)
    maps = coil_maps((1, N, N), n_coils, rng)
    full = centred_fft(molli_images().numpy()[:, None] * maps, (-3, -2))
    full = full + noise * (rng.standard_normal(full.shape) + 1j * rng.standard_normal(full.shape)) / np.sqrt(2)
    acs = np.zeros((1, N), bool)
    acs[0, N // 2 - n_acs // 2 : N // 2 + n_acs // 2] = True
    mask = (rng.random((len(TIMES), 1, N)) < keep) | acs
    data = torch.from_numpy((full * mask[:, None, :, :, None]).astype(np.complex64))
    lines = data[4] * torch.from_numpy(acs)[None, :, :, None]
    counts = torch.from_numpy(mask.astype(np.float32))
    true = torch.from_numpy(maps.astype(np.complex64))
    return KSpace(data, counts, lines, torch.from_numpy(acs), coil_maps=true, noise_std=noise)


def recipe(method: str, maps: MapSettings = T1, **settings: object) -> Recipe:
    return Recipe(method, parse_settings(get_method(method).Settings, settings), maps=maps)


def interior(n: int = N, margin: float = 4.0) -> np.ndarray:
    """Pixels that are not within ``margin`` pixels of an edge of the object."""
    y, x = np.meshgrid(*[np.arange(n) - n // 2] * 2, indexing="ij")
    r = np.hypot(y, x)
    return (r < 0.35 * n / 2 - margin) | ((r > 0.35 * n / 2 + margin) & (r < 0.75 * n / 2 - margin))


@pytest.mark.parametrize("method", ["cg_sense", "llr", "grasp_pro"])
def test_every_method_delivers_the_true_t1_from_undersampled_data(method: str) -> None:
    result = reconstruct(molli_kspace(0.01, keep=0.35), SCAN, recipe(method))
    assert [(m.name, m.unit) for m in result.maps] == [("T1", "s"), ("T1_SD", "s"), ("M0", "1"), ("T1_residual", "1")]
    truth, _ = object_t1()
    inside = interior()
    t1, valid = result.maps[0].data[0].numpy(), result.maps[0].valid[0].numpy()
    assert valid[inside].mean() > 0.99
    error = np.linalg.norm(t1[inside & valid] - truth[inside & valid]) / np.linalg.norm(truth[inside & valid])
    assert error < 0.05
    assert 0.9 < result.quality["t1_valid"] <= 1.0 and not result.notes


def test_magnitudes_of_fourier_give_the_same_map_by_their_zero_crossing() -> None:
    result = reconstruct(molli_kspace(0.003), SCAN, recipe("fourier"))
    assert "zero crossing" in result.maps[0].comment
    signed = reconstruct(molli_kspace(0.003), SCAN, recipe("cg_sense"))
    assert "sign from phase" in signed.maps[0].comment
    inside = interior() & result.maps[0].valid[0].numpy() & signed.maps[0].valid[0].numpy()
    assert inside.sum() > 0.98 * interior().sum()
    np.testing.assert_allclose(result.maps[0].data[0].numpy()[inside], signed.maps[0].data[0].numpy()[inside], rtol=0.02)


def test_the_standard_deviation_is_the_spread_over_repeated_scans() -> None:
    """Fully sampled, noise known: the claimed SD equals the spread of T1 in repeated noise draws."""
    maps = [reconstruct(molli_kspace(0.03, seed=seed), SCAN, recipe("cg_sense")).maps for seed in range(12)]
    # the coils differ with the seed, too; unit-norm maps make that irrelevant
    t1, sd = (np.stack([m[i].data[0].numpy() for m in maps]) for i in (0, 1))
    inside = interior() & np.stack([m[0].valid[0].numpy() for m in maps]).all(0)
    spread = np.sqrt((t1[:, inside].var(0, ddof=1) / t1[:, inside].mean(0) ** 2).mean())
    claimed = np.sqrt((sd[:, inside] ** 2 / t1[:, inside] ** 2).mean())
    assert claimed == pytest.approx(spread, rel=0.25)
    assert "measured noise" in maps[0][1].comment


def test_the_standard_deviation_after_regularisation_is_not_below_the_error() -> None:
    result = reconstruct(molli_kspace(0.02, keep=0.2), SCAN, recipe("llr"))
    residual_only = t1_maps(result.images[0], SCAN, None, T1).maps
    truth, _ = object_t1()
    inside = interior() & result.maps[0].valid[0].numpy()
    error = float(np.sqrt(np.mean((result.maps[0].data[0].numpy() - truth)[inside] ** 2)))
    claimed, too_small = (float(np.sqrt(np.mean(m[1].data[0].numpy()[inside] ** 2))) for m in (result.maps, residual_only))
    assert too_small < 0.7 * error < claimed < 3 * error
    assert "lower limit" in residual_only[1].comment


def test_noise_of_an_image_follows_acceleration_averages_and_matrix() -> None:
    counts = torch.zeros(2, 1, N)
    counts[:, :, ::4] = 1
    assert image_noise(math.sqrt(2), counts, SCAN, measured=True).std == pytest.approx(2.0)
    assert image_noise(math.sqrt(2), 4 * counts, SCAN, measured=True).std == pytest.approx(1.0)
    half = replace(SCAN, recon_matrix=(1, N // 2, N // 2))
    assert image_noise(math.sqrt(2), counts, half, measured=True).std == pytest.approx(1.0)
    double = replace(SCAN, recon_matrix=(1, 2 * N, 2 * N))
    assert image_noise(math.sqrt(2), counts, double, measured=True).std == pytest.approx(2.0)
    assert image_noise(math.sqrt(2), counts, SCAN, measured=True, readout_shares=(0.64,)).std == pytest.approx(2.5)
    counts[:, :, ::8] = 4  # half of the lines as well as before: a quarter of their variance
    assert image_noise(math.sqrt(2), counts, SCAN, measured=True).std == pytest.approx(2 * math.sqrt(0.625))
    rng = np.random.default_rng(1)
    image = torch.from_numpy(rng.standard_normal((1, 64, 64)) + 1j * rng.standard_normal((1, 64, 64))).to(torch.complex64)
    for n, expected in ((32, 0.5), (128, 1.0)):
        moved = to_recon_matrix(image, (1, 64, 64), FOV, (1, n, n), FOV)
        assert float(moved.real.std()) == pytest.approx(expected, rel=0.05)


def test_maps_are_fitted_on_the_console_matrix_and_do_not_ring() -> None:
    """Zero-filling keeps the measured pixels, so every second pixel is what the encoded grid gives; interpolating the map is worse."""
    finer = replace(SCAN, recon_matrix=(1, 2 * N, 2 * N))
    result = reconstruct(molli_kspace(0.002), finer, recipe("cg_sense"))
    assert tuple(result.maps[0].data.shape) == (1, 2 * N, 2 * N) == tuple(result.images[0].data.shape[1:])
    coarse = reconstruct(molli_kspace(0.002), SCAN, recipe("cg_sense")).maps[0]
    even = (slice(None), slice(None, None, 2), slice(None, None, 2))
    both = coarse.valid & result.maps[0].valid[even]
    assert float((both == coarse.valid).float().mean()) > 0.99
    torch.testing.assert_close(result.maps[0].data[even][both], coarse.data[both], rtol=5e-3, atol=0)
    truth, _ = object_t1(2 * N)
    t1, valid = result.maps[0].data[0].numpy(), result.maps[0].valid[0].numpy()
    sinc = to_recon_matrix(coarse.data, SCAN.matrix, FOV, finer.recon_matrix, FOV)[0].numpy()
    inside = valid & (interior(2 * N, 2.0))
    fitted, interpolated = (float(np.abs(t - truth)[inside].mean()) for t in (t1, sinc))
    assert fitted < 0.8 * interpolated


def test_partial_fourier_is_completed_before_the_fit() -> None:
    k = molli_kspace(0.002)
    cut = k.counts.clone()
    cut[:, :, : N // 4] = 0
    partial = replace(k, data=k.data * (cut > 0)[:, None, :, :, None], counts=cut)
    filled = reconstruct(partial, SCAN, recipe("cg_sense")).maps[0]
    whole = reconstruct(k, SCAN, recipe("cg_sense")).maps[0]
    both = (filled.valid & whole.valid)[0].numpy() & interior(margin=3.0)
    assert both.sum() > 0.95 * interior(margin=3.0).sum()
    np.testing.assert_allclose(filled.data[0].numpy()[both], whole.data[0].numpy()[both], rtol=0.08)


def test_times_decide_before_anything_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    method = get_method("cg_sense")

    def never(*_: object) -> Result:
        raise AssertionError("reconstructed although no map can be made")

    monkeypatch.setattr(method, "reconstruct", never)
    for times, words in (
        ((), "no inversion times"),
        (TIMES[:5], "count of inversion times"),
        ((0.3,) * 8, "too few different inversion times"),
        ((0.1, 0.1, 0.1, 0.1, 0.5, 0.5, 0.5, 0.5), "too few different inversion times"),
    ):
        with pytest.raises(DataError, match=words):
            reconstruct(molli_kspace(0.01), replace(SCAN, inversion_times=times), recipe("cg_sense"))


def test_one_state_is_refused_or_sent_without_a_map() -> None:
    k = molli_kspace(0.01)
    one = replace(k, data=k.data[4:5], counts=k.counts[4:5])
    single = replace(SCAN, inversion_times=(4.12,))
    with pytest.raises(DataError, match="too few images for a T1 map"):
        reconstruct(one, single, recipe("cg_sense"))
    listener = Listener()
    result = reconstruct(one, single, recipe("cg_sense", replace(T1, map_failure="warn")), listener)
    assert len(result.images) == 1 and not result.maps
    assert listener.warnings == list(result.notes) and "no T1 map" in listener.warnings[0]


def test_three_times_need_known_noise() -> None:
    images, times = molli_images()[[0, 1, 3]].to(torch.complex64), (TIMES[0], TIMES[1], TIMES[3])
    scan = replace(SCAN, inversion_times=times)
    assert bool(t1_maps(ImageSeries("image", images), scan, ImageNoise(0.005, True), T1).maps[0].valid.any())
    with pytest.raises(DataError, match="too few different times"):
        t1_maps(ImageSeries("image", images), scan, None, T1)


def test_states_that_share_no_phase_fall_back_to_the_zero_crossing_and_say_so() -> None:
    images = molli_images()
    drift = torch.exp(1j * torch.linspace(0, 5, len(images), dtype=torch.float64))[:, None, None, None]
    drifting = ImageSeries("image", (images * drift).to(torch.complex64))
    found = t1_maps(drifting, SCAN, None, T1)
    assert "share no phase" in found.notes[0] and "zero crossing" in found.maps[0].comment
    truth, _ = object_t1()
    inside = interior() & found.maps[0].valid[0].numpy()
    assert inside.sum() > 0.95 * interior().sum()
    np.testing.assert_allclose(found.maps[0].data[0].numpy()[inside], truth[inside], rtol=0.02)
    with pytest.raises(DataError, match="only magnitudes"):
        t1_maps(ImageSeries("image", images.abs().float()), SCAN, None, replace(T1, map_sign="phase"))


def test_many_unbelievable_pixels_are_told() -> None:
    images = molli_images().to(torch.complex64)
    images[..., : N // 2] = images[:1, ..., : N // 2].abs()  # no recovery in the left half
    listener = Listener()
    found = t1_maps(ImageSeries("image", images), SCAN, None, replace(T1, map_sign="phase"))
    assert found.quality["t1_valid"] < 0.7 and "no believable T1" in found.notes[0]
    assert not listener.warnings
    t1 = found.maps[0]
    assert not bool(t1.data[~t1.valid].any())


def test_other_recoveries_and_limits_are_settings() -> None:
    t1, density = object_t1()
    tau = (0.5, 1.0, 1.5, 2.0, 8.0)
    images = torch.from_numpy(np.stack([density * (1 - np.exp(-t / t1)) for t in tau]))[:, None].to(torch.complex64)
    scan = replace(SCAN, inversion_times=(), saturation_times=tau)
    found = t1_maps(ImageSeries("image", images), scan, None, replace(T1, map_model="saturation_recovery"))
    inside = interior() & found.maps[0].valid[0].numpy()
    np.testing.assert_allclose(found.maps[0].data[0].numpy()[inside], t1[inside], rtol=0.02)
    turned = ImageSeries("image", images * np.exp(-0.7j))
    for noise in (None, ImageNoise(1e-4, True)):
        more = t1_maps(turned, scan, noise, replace(T1, map_model="saturation_recovery")).maps
        assert [(m.name, m.unit) for m in more[3:]] == [("T1_residual", "1"), ("M0_phase", "rad")]
        np.testing.assert_allclose(more[4].data[more[4].valid].numpy(), -0.7, atol=1e-3)
        assert torch.equal(more[4].valid, more[0].valid) and not bool(more[4].data[~more[4].valid].any())
    magnitudes = t1_maps(ImageSeries("image", images.abs()), scan, None, replace(T1, map_model="saturation_recovery"))
    assert "M0_phase" not in [m.name for m in magnitudes.maps]
    short = t1_maps(ImageSeries("image", images), scan, None, replace(T1, map_model="saturation_recovery", map_t1_max=1.0))
    assert float(short.maps[0].data.max()) <= 1.0
    with pytest.raises(DataError, match="no saturation times"):
        recovery_times(SCAN, 8, replace(T1, map_model="saturation_recovery"))


@pytest.mark.parametrize(("turn", "taken_out"), [(0.01, False), (0.35, True), (3.1, False)])
def test_a_turned_state_of_a_saturation_recovery(turn: float, taken_out: bool) -> None:
    """0.35 rad would make the state 6 % darker; 3.1 rad is a sign, which an inversion may have."""
    t1, density = object_t1()
    tau = (0.5, 1.0, 1.5, 2.0, 8.0)
    turns = np.exp(1j * turn * np.array([0, 0, 1, 0, 0]))
    images = torch.from_numpy(np.stack([density * (1 - np.exp(-t / t1)) * u for t, u in zip(tau, turns, strict=True)]))
    series = ImageSeries("image", images[:, None].to(torch.complex64))
    kept = series.data.clone()
    scan = replace(SCAN, inversion_times=(), saturation_times=tau)
    settings = replace(T1, map_model="saturation_recovery", map_delays="tell")
    found = t1_maps(series, scan, ImageNoise(0.004, True), settings)
    assert torch.equal(series.data, kept)
    assert any("the phase of the delay 1.5 s differs by 0.35 rad" in note for note in found.notes) == taken_out
    inside = interior() & found.maps[0].valid[0].numpy()
    right = inside.sum() > 0.95 * interior().sum() and np.allclose(
        found.maps[0].data[0].numpy()[inside], t1[inside], rtol=0.02
    )
    assert right == (turn < 1)


@pytest.mark.parametrize(("ramp", "told"), [(0.3, False), (1.2, True)])
@pytest.mark.parametrize("state", [1, 4])
def test_a_state_whose_phase_differs_from_place_to_place(state: int, ramp: float, told: bool) -> None:
    """Samples of one delay that were placed one too far: half the map would be empty, and T1 a tenth wrong in the rest."""
    t1, density = object_t1()
    tau = (0.5, 1.0, 1.5, 2.0, 8.0)
    images = np.stack([density * (1 - np.exp(-t / t1)) for t in tau]).astype(np.complex64)
    images[state] *= np.exp(1j * np.linspace(-ramp, ramp, N)).astype(np.complex64)
    series = ImageSeries("image", torch.from_numpy(images)[:, None])
    scan = replace(SCAN, inversion_times=(), saturation_times=tau)
    found = t1_maps(
        series, scan, ImageNoise(0.004, True), replace(T1, map_model="saturation_recovery", map_delays="require")
    )
    assert any("T1 is fitted to magnitudes" in note for note in found.notes) == told
    inside = interior() & found.maps[0].valid[0].numpy()
    assert inside.sum() > 0.95 * interior().sum()
    np.testing.assert_allclose(found.maps[0].data[0].numpy()[inside], t1[inside], rtol=0.02)


@pytest.mark.parametrize("unit", [1e-3, 1e3])
def test_times_in_s_or_us_are_refused_before_anything_is_computed(unit: float) -> None:
    scan = replace(SCAN, inversion_times=tuple(unit * t for t in TIMES))
    with pytest.raises(DataError, match=r"not inversion times.*expected some between 20 and 60000 ms.*are in ms"):
        recovery_times(scan, len(TIMES), T1)


def test_a_methods_own_maps_stay_and_are_moved_without_ringing() -> None:
    valid = torch.ones(1, 8, 8, dtype=torch.bool)
    valid[:, :, 4:] = False
    data = torch.where(valid, 1.0, 0.0)
    data[:, 4:] *= 2
    scan = ScanInfo((1, 8, 8), (0.008, 0.2, 0.2), (1, 16, 16), (0.008, 0.2, 0.2))
    moved = map_on_recon_matrix(ParameterMap("T1", data, "s", valid), scan)
    assert tuple(moved.data.shape) == (1, 16, 16)
    inside = moved.data[moved.valid]
    assert (
        float(inside.min()) == 1.0 and float(inside.max()) == 2.0
    )  # between the two, never beyond; empty pixels do not bleed
    assert not bool(moved.data[~moved.valid].any()) and not bool(moved.valid[..., 9:].any())
    assert float(moved.data[0, 8, 0]) == 2.0 and float(moved.data[0, 6, 0]) == 1.0  # pixel i goes to 2 i
    cropped = map_on_recon_matrix(
        ParameterMap("T1", data, "s", valid), ScanInfo((1, 8, 8), (0.008, 0.2, 0.2), (1, 4, 4), (0.008, 0.1, 0.1))
    )
    assert torch.equal(cropped.data, data[:, 2:6, 2:6]) and torch.equal(cropped.valid, valid[:, 2:6, 2:6])
    wrapped = torch.tensor([[[3.0, -3.0, 3.0, -3.0]]])
    phase = map_on_recon_matrix(
        ParameterMap("p", wrapped, "rad", torch.ones(1, 1, 4, dtype=torch.bool)),
        ScanInfo((1, 1, 4), (0.008, 0.1, 0.1), (1, 1, 8), (0.008, 0.1, 0.1)),
    )
    assert set(phase.data[phase.valid].tolist()) == {3.0, -3.0}


@pytest.mark.parametrize(("asked", "expected"), [("t1", ["T1"]), ("none", []), ("r2star", ["R2star", "R2star_SD", "S0"])])
def test_a_methods_own_maps_are_sent_where_they_are_asked_for(asked: str, expected: list[str]) -> None:
    """What makes T1 wrong is looked for where T1 is asked for; "maps = none sends the images alone", as is said of such scans."""
    times = torch.tensor((0.004, 0.009, 0.014, 0.019)).reshape(-1, 1, 1, 1)
    images = torch.exp(-25 * times) * torch.ones(4, 1, 8, 8, dtype=torch.complex64)
    own = ParameterMap("T1", torch.ones(1, 8, 8), "s", torch.ones(1, 8, 8, dtype=torch.bool))
    made = StateImages(Result((ImageSeries("image", images),), (own,)), ImageNoise(1e-3, True))
    scan = ScanInfo((1, 8, 8), FOV, (1, 8, 8), FOV, echo_times=tuple(times.flatten().tolist()))
    assert [one.name for one in finish(made, scan, MapSettings(maps=asked)).maps] == expected


def test_images_that_are_not_finite_are_refused() -> None:
    images = molli_images().to(torch.complex64)
    images[2, 0, 5, 5] = math.nan
    with pytest.raises(DataError, match="not finite"):
        t1_maps(ImageSeries("image", images), SCAN, None, T1)


# ---------------------------------------------------------------------------------------- what a reconstruction cannot be given


def mixed_calibration(kspace: KSpace, n_shifts: int) -> KSpace:
    """No state has all calibration lines: state q was measured at lines q, q + n_shifts, ..., and the mean over states is all there is."""
    line = torch.arange(N)
    measured = torch.stack([line % n_shifts == q % n_shifts for q in range(len(TIMES))])[:, None]
    data = kspace.data * measured[:, None, :, :, None]
    assert kspace.acs_mask is not None
    acs = data.sum(0) / measured.sum(0)[None, ..., None] * kspace.acs_mask[None, ..., None]
    states = measured & kspace.acs_mask
    return replace(kspace, data=data, counts=measured.float(), acs=acs, acs_states=states, coil_maps=None)


def test_coil_maps_of_unlike_contrast_make_no_t1_map() -> None:
    k = mixed_calibration(molli_kspace(0.003), 4)
    with pytest.raises(CalibrationError, match="differ in contrast") as refused:
        reconstruct(k, SCAN, recipe("cg_sense"))
    assert refused.value.remedy
    warned = reconstruct(k, SCAN, recipe("cg_sense", maps=replace(T1, map_failure="warn")))
    assert not warned.maps and len(warned.images[0].data) == len(TIMES)
    assert any("no T1 map" in note and "differ in contrast" in note for note in warned.notes)
    assert reconstruct(k, SCAN, recipe("cg_sense", maps=MapSettings())).images


def test_calibration_lines_of_several_states_serve_where_their_contrast_is_alike() -> None:
    """At 2x the even and the odd states of 5(3)3 are as bright on average."""
    found = reconstruct(mixed_calibration(molli_kspace(0.003), 2), SCAN, recipe("cg_sense")).maps[0]
    truth, _ = object_t1()
    inside = interior() & found.valid[0].numpy()
    assert inside.sum() > 0.9 * interior().sum()
    assert np.median(np.abs(found.data[0].numpy() / truth - 1)[inside]) < 0.05


@pytest.mark.parametrize(
    ("louder", "maps", "told"),
    [
        (1.0, T1, False),
        (3.0, T1, True),
        (3.0, MapSettings(), False),
        (10.0, MapSettings(), True),
        (math.inf, MapSettings(), True),
    ],
)
def test_a_noise_measurement_louder_than_outer_kspace_is_told_and_not_used(
    louder: float, maps: MapSettings, told: bool
) -> None:
    k = molli_kspace(0.02)
    report = Listener()
    result = reconstruct(replace(k, noise_std=louder * 0.02), SCAN, recipe("cg_sense", maps), report)
    assert any("noise measurement is" in note for note in result.notes) == told
    assert any("noise measurement is" in text for text in report.warnings) == told
    for found in result.maps:
        assert found.name != "T1_SD" or ("noise of outer k-space" in found.comment) == told


@pytest.mark.parametrize("maps", [T1, MapSettings()])
@pytest.mark.parametrize(("quieter", "told"), [(1.0, False), (4.0, True), (1000.0, True)])
def test_a_noise_measurement_quieter_than_the_noise_of_outer_kspace_is_told_and_not_used(
    quieter: float, told: bool, maps: MapSettings
) -> None:
    k = molli_kspace(0.02)
    report = Listener()
    result = reconstruct(replace(k, noise_std=0.02 / quieter), SCAN, recipe("cg_sense", maps), report)
    assert any("times quieter than the noise" in note for note in result.notes) == told
    assert any("times quieter than the noise" in text for text in report.warnings) == told
    for found in result.maps:
        assert found.name != "T1_SD" or ("noise of outer k-space" in found.comment) == told


def test_signal_in_outer_kspace_is_not_taken_for_a_quiet_noise_measurement() -> None:
    """Without air and with little noise the samples of outer k-space are signal, which neighbouring coils share."""
    k = molli_kspace(1e-5)
    inside = replace(k, data=k.data[..., N // 3 : -N // 3])
    assert noise_scan_excess(inside) < 0.3
    assert noise_scan_lack(inside) == 0
    assert noise_scan_lack(replace(k, noise_std=1e-6)) == pytest.approx(10, rel=0.1)


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_samples_that_are_none_say_nothing_of_the_noise(value: float) -> None:
    k = molli_kspace(0.02)
    assert noise_scan_lack(replace(k, data=torch.full_like(k.data, value))) == 0
    assert noise_scan_lack(replace(k, counts=torch.zeros_like(k.counts))) == 0


@pytest.mark.parametrize("model", ["molli", "inversion_recovery"])
def test_a_saturation_is_not_fitted_as_an_inversion_whose_sign_was_lost(model: str) -> None:
    t1, density = object_t1()
    tau = (0.5, 1.0, 1.5, 2.0, 8.0)
    images = np.stack([density * (1 - np.exp(-t / t1)) for t in tau])[:, None]
    rng = np.random.default_rng(3)
    images = images + 0.01 * (rng.standard_normal(images.shape) + 1j * rng.standard_normal(images.shape))
    series = ImageSeries("image", torch.from_numpy(images).to(torch.complex64))
    scan, noise = replace(SCAN, inversion_times=tau), ImageNoise(0.01, True)
    settings = replace(T1, map_model=model, map_sign="magnitude")
    with pytest.raises(DataError, match=r"this is no inversion recovery.*saturation fits") as refused:
        t1_maps(series, scan, noise, settings)
    assert "map_model = saturation_recovery" in (refused.value.remedy or "")
    (told,) = [n for n in t1_maps(series, scan, noise, replace(settings, map_delays="tell")).notes if "likely" in n]
    assert "no inversion" in told


@pytest.mark.parametrize("sign", ["phase", "magnitude"])
def test_an_inversion_is_not_taken_for_a_saturation(sign: str) -> None:
    images = molli_images().to(torch.complex64)
    rng = torch.Generator().manual_seed(2)
    images = images + 0.05 * torch.randn(images.shape, generator=rng, dtype=torch.complex64)
    assert not t1_maps(ImageSeries("image", images), SCAN, ImageNoise(0.05, True), replace(T1, map_sign=sign)).notes
