"""Signals, coils, encoding and whole scans, against known truth."""

import numpy as np
import pytest
from scipy.optimize import curve_fit

from recon_core.errors import DataError, SettingError
from recon_core.simulation import coils, schedule, signal
from recon_core.simulation.encoding import correlated_noise, encode, harmonic_field, pixel_mean, to_image
from recon_core.simulation.options import settings_for
from recon_core.simulation.phantoms import Grid, centred_axis
from recon_core.simulation.scan import simulate_scan

GRID = Grid(np.array([0.0]), centred_axis(96, 0.34), centred_axis(96, 0.34))
SMALL = {"matrix_x": 64, "matrix_y": 64, "coils": 5}


def combine(scan) -> np.ndarray:
    """Inverse FFT of complete k-space and the true maps: (slice, state, z, y, x)."""
    s = scan.settings
    images = to_image(scan.clean, (-3, -2, -1) if s.is_3d else (-2, -1))
    n = images.shape[-1]
    images = images[..., n // 2 - s.matrix_x // 2 : n // 2 + s.matrix_x // 2]
    return (images * scan.truth.coil_maps[:, None].conj()).sum(axis=2)


@pytest.mark.parametrize(
    ("kind", "values", "limit"),
    [
        ("cine", {"matrix_x": 192, "matrix_y": 192, "states": 2}, 0.01),
        ("molli", {"scheme": "3"}, 0.01),
        ("satrec", {"delays": "8", "slices": 2}, 0.01),
        ("mgre", {"matrix_x": 64, "matrix_y": 64, "partitions": 8, "states": 2}, 0.02),  # 3.6 mm: more Gibbs times maps
    ],
)
def test_full_sampling_and_true_maps_give_the_truth(kind: str, values: dict, limit: float) -> None:
    scan = simulate_scan(kind, settings_for(kind, {"coils": 6, **values}))
    truth = scan.truth.images
    assert np.linalg.norm(combine(scan) - truth) / np.linalg.norm(truth) < limit
    assert 0.1 < np.abs(truth).max() < 10


def test_encoding_is_the_fourier_integral_of_the_object() -> None:
    # a Gaussian has a known spectrum, on any grid; off centre, so that signs and centres are tested, too
    y, x = centred_axis(128, 0.2), centred_axis(160, 0.3)
    sigma, y0, x0 = 0.012, 0.013, -0.021
    image = np.exp(-((y[:, None] - y0) ** 2 + (x[None] - x0) ** 2) / (2 * sigma**2)).astype(np.complex64)
    kspace = encode(image[None], (1, 64, 80), 2, three_d=False)[0]
    ky, kx = (np.arange(64) - 32) / 0.2, (np.arange(160) - 80) / 0.6
    k2 = ky[:, None] ** 2 + kx[None] ** 2
    exact = 2 * np.pi * sigma**2 * np.exp(-2 * np.pi**2 * sigma**2 * k2 - 2j * np.pi * (ky[:, None] * y0 + kx[None] * x0))
    exact = exact * np.sqrt(64 * 160) / (0.2 * 0.6)
    np.testing.assert_allclose(kspace, exact, atol=2e-5 * np.abs(exact).max())


def test_encoding_truncates_so_that_edges_ring() -> None:
    box = np.zeros((1, 1, 128), np.complex64)
    box[..., 40:90] = 1
    image = np.abs(to_image(encode(box, (1, 1, 64), 1, three_d=False), (-1,)))
    assert 1.05 < image.max() < 1.15  # Gibbs


def test_pixel_mean_is_centred() -> None:
    ramp = np.broadcast_to(np.arange(16.0), (1, 16, 16))
    np.testing.assert_allclose(pixel_mean(ramp, False)[0, 1, 1:], np.arange(2, 16, 2))


def test_noise_has_the_covariance_it_was_asked_for() -> None:
    covariance = coils.random_noise_covariance(6, np.random.default_rng(0))
    noise = correlated_noise(covariance, (400, 256), np.random.default_rng(1))
    flat = noise.transpose(1, 0, 2).reshape(6, -1)
    np.testing.assert_allclose(flat @ flat.conj().T / flat.shape[1], covariance, atol=0.02)
    assert np.abs(covariance - np.diag(np.diag(covariance))).max() > 0.1
    assert np.trace(covariance).real == pytest.approx(6)


@pytest.mark.parametrize("n_coils", [1, 2, 3, 4, 16, 33])
def test_noise_covariance_is_positive_definite(n_coils: int) -> None:
    assert np.linalg.eigvalsh(coils.random_noise_covariance(n_coils, np.random.default_rng(4))).min() > 0.05


def test_snr_setting_is_met() -> None:
    scan = simulate_scan("cine", settings_for("cine", {**SMALL, "states": 1, "snr": 20}))
    noisy = scan.samples(0, len(scan.plan), np.random.default_rng(0))
    p = scan.plan
    noise = noisy - scan.clean[p.slice, p.state, :, p.k2, p.k1]
    truth = scan.truth
    signal_level = np.abs(truth.images)[np.broadcast_to(truth.tissue[:, None], truth.images.shape)].mean()
    assert signal_level / np.sqrt((np.abs(noise) ** 2).mean()) == pytest.approx(20, rel=0.02)


def test_wire_loops_are_smooth_different_and_normalised() -> None:
    maps, shading = coils.biot_savart_maps(GRID, 8, np.random.default_rng(0))
    np.testing.assert_allclose((np.abs(maps) ** 2).sum(0), 1, atol=1e-5)
    body = ellipse_mask()
    for axis in (-1, -2):
        step = np.abs(np.diff(maps, axis=axis))[:, 0][:, : body.shape[0] - 1, : body.shape[1] - 1][:, body[:-1, :-1]]
        assert step.max() < 0.15
    spectrum = np.linalg.svd(maps[:, 0][:, body], compute_uv=False)
    assert spectrum[-1] / spectrum[0] > 0.02  # eight coils that see eight things
    peak = [np.unravel_index(np.abs(m[0] * body).argmax(), body.shape) for m in maps]
    assert len(set(peak)) == 8
    assert shading.min() > 0 and shading.mean() == pytest.approx(1, rel=1e-3)


def ellipse_mask() -> np.ndarray:
    return (GRID.x[None] / 0.155) ** 2 + (GRID.y[:, None] / 0.115) ** 2 < 1


def test_field_of_a_loop_on_its_axis() -> None:
    # B = R^2 / (2 (R^2 + d^2)^(3/2)) on the axis, up to one constant
    distances = np.array([0.1, 0.2, 0.3])
    points = np.stack([np.zeros(3), np.zeros(3), distances], axis=-1)
    field = coils._loop_field(points, np.zeros(3), np.array([0.0, 0.0, 1.0]), 0.06)
    exact = 1 / (0.06**2 + 0.03**2 + distances**2) ** 1.5  # the wire's thickness adds to the distance
    np.testing.assert_allclose(field[:, 2] / field[0, 2], exact / exact[0], rtol=0.01)
    np.testing.assert_allclose(field[:, :2], 0, atol=1e-9 * abs(field[0, 2]))


def test_donor_maps_recover_known_sensitivities(tmp_path) -> None:
    fine = Grid(np.array([0.0]), centred_axis(128, 0.34), centred_axis(128, 0.34))
    true, _ = coils.biot_savart_maps(fine, 4, np.random.default_rng(2), radii=(0.26, 0.24))
    rng = np.random.default_rng(0)
    body = (fine.x[None] / 0.13) ** 2 + (fine.y[:, None] / 0.11) ** 2 < 1
    anatomy = body * (0.6 + 0.2 * np.sin(fine.x[None] * 90) * np.cos(fine.y[:, None] * 70))
    images = true[:, 0] * anatomy + 0.002 * rng.standard_normal((4, 128, 128))
    np.savez(tmp_path / "donor.npz", image=images.astype(np.complex64))
    maps, shading = coils.donor_maps(tmp_path / "donor.npz", GRID, 4)
    np.testing.assert_allclose((np.abs(maps) ** 2).sum(0), 1, atol=1e-5)
    assert (shading == 1).all()
    reference = coils.biot_savart_maps(GRID, 4, np.random.default_rng(2), radii=(0.26, 0.24))[0]
    inner = (GRID.x[None] / 0.11) ** 2 + (GRID.y[:, None] / 0.09) ** 2 < 1
    # the common phase cannot be known: compare up to one phase per pixel
    overlap = np.abs((maps * reference.conj()).sum(0)[0][inner])
    assert overlap.min() > 0.97 and overlap.mean() > 0.995


def test_donors_that_are_none(tmp_path) -> None:
    np.savez(tmp_path / "other.npz", something=np.zeros(3))
    with pytest.raises(DataError, match="not a coil donor"):
        coils.donor_maps(tmp_path / "other.npz", GRID, 4)
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "other.npz").read_bytes()[:100])
    np.save(tmp_path / "bare.npy", np.zeros((4, 8, 8), np.complex64))
    for name in ("text.npz", "cut.npz", "bare.npy"):
        with pytest.raises(DataError, match="not a coil donor"):
            coils.donor_maps(tmp_path / name, GRID, 4)
    np.savez(tmp_path / "two.npz", image=np.ones((2, 32, 32), np.complex64))
    with pytest.raises(SettingError, match="fewer coils"):
        coils.donor_maps(tmp_path / "two.npz", GRID, 4)
    with pytest.raises(SettingError, match="no such donor"):
        coils.donor_maps(tmp_path / "none.npz", GRID, 4)


def test_bssfp_on_resonance_is_the_textbook_value() -> None:
    one = np.ones(1, np.float32)
    flip, tr = np.deg2rad(50), 0.0036
    s = signal.bssfp(one, one / 1.0, one / 0.05, 0 * one, flip_angle=flip, repetition_time=tr, echo_time=tr / 2)
    e1, e2 = np.exp(-tr), np.exp(-tr / 0.05)
    ernst = np.sin(flip) * (1 - e1) / (1 - (e1 - e2) * np.cos(flip) - e1 * e2)  # on resonance
    assert abs(s[0]) == pytest.approx(ernst * np.sqrt(e2), rel=1e-4)
    one = np.ones(1)  # 1 - exp(-TR R1) cancels in single precision
    short = signal.bssfp(one, one, one / 0.05, 0 * one, flip_angle=flip, repetition_time=1e-5, echo_time=0.0)
    assert abs(short[0]) == pytest.approx(np.sin(flip) / ((20 + 1) - np.cos(flip) * (20 - 1)), rel=1e-3)
    null = signal.bssfp(one, one, one / 0.05, one * 0.5 / tr, flip_angle=flip, repetition_time=tr, echo_time=tr / 2)
    assert abs(null[0]) < 0.2 * abs(s[0])  # the dark band


def test_molli_curves_give_t1_back() -> None:
    scan = simulate_scan("molli", settings_for("molli", {"coils": 1, "snr": 0}))
    times = np.array(scan.truth.states)
    assert times == pytest.approx([0.1, 1.1, 2.1, 3.1, 4.1, 0.18, 1.18, 2.18])
    interior = np.argwhere(scan.truth.interior[0, 0])
    errors = []
    for y, x in interior[:: max(1, len(interior) // 40)]:
        curve = scan.truth.images[0, :, 0, y, x]
        curve = (curve * np.exp(-1j * np.angle(curve[np.argmax(times)]))).real
        guess = (abs(curve).max(), 2 * abs(curve).max(), 1.0)
        (a, b, t1_star), _ = curve_fit(lambda t, a, b, s: a - b * np.exp(-t / s), times, curve, p0=guess, maxfev=4000)
        errors.append(t1_star * (b / a - 1) / scan.truth.maps["t1"][0, 0, y, x] - 1)
    assert np.median(np.abs(errors)) < 0.02 and abs(np.median(errors)) < 0.01


def test_saturation_recovery_gives_t1_back() -> None:
    s = settings_for("satrec", {**SMALL, "matrix_x": 128, "matrix_y": 128, "coils": 1, "delays": "0.5,100"})
    truth = simulate_scan("satrec", s).truth
    ratio = (truth.images[0, 0] / truth.images[0, 1])[truth.interior[0]].real
    t1 = -0.5 / np.log(1 - ratio)
    assert np.median(np.abs(t1 / truth.maps["t1"][0][truth.interior[0]] - 1)) < 0.02


def test_multi_echo_gives_decay_and_field_back() -> None:
    values = {"matrix_x": 128, "matrix_y": 128, "partitions": 1, "states": 3, "coils": 1, "slice_thickness": 0.003}
    truth = simulate_scan("mgre", settings_for("mgre", values)).truth
    echo = truth.states[1] - truth.states[0]
    for tissue in ("white", "pallidum"):
        inside = truth.interior[0] & (truth.labels[0, 0] == truth.label_names[tissue])
        first, second = truth.images[0, 0][inside], truth.images[0, 1][inside]
        # Gibbs ringing scatters single pixels; the tissue's median is unbiased
        r2star = np.log(np.abs(first / second)) / echo
        assert np.median(r2star) == pytest.approx(np.median(truth.maps["r2star"][0][inside]), rel=0.03)
        field = np.angle(second * first.conj()) / (2 * np.pi * echo)
        assert np.median(np.abs(field - truth.maps["field"][0][inside])) < 1.0 < np.ptp(truth.maps["field"][0][inside])


def test_what_the_magnet_leaves_is_harmonic() -> None:
    """Sources outside the object make it: nothing of it may look like susceptibility inside. Cubic: second differences are exact."""
    axes = [centred_axis(n, n * side) for n, side in ((20, 0.004), (32, 0.003), (24, 0.0025))]
    field = harmonic_field(Grid(*axes), np.random.default_rng(3), 40.0).astype(np.float64)
    assert np.abs(field).max() == pytest.approx(40.0, rel=1e-5) and abs(field.mean()) < 1e-4
    inner = (slice(1, -1),) * 3
    curvature = [
        ((np.roll(field, 1, i) + np.roll(field, -1, i) - 2 * field) / (a[1] - a[0]) ** 2)[inner] for i, a in enumerate(axes)
    ]
    assert np.linalg.norm(sum(curvature)) < 0.01 * np.linalg.norm(curvature[0])


def test_dipole_field_of_a_sphere() -> None:
    n, radius, voxel = 64, 8, 0.001
    z, y, x = np.meshgrid(*[np.arange(n) - n // 2] * 3, indexing="ij")
    r = np.sqrt(x**2 + y**2 + z**2)
    field = signal.dipole_field((r <= radius).astype(np.float32), (voxel,) * 3, (1.0, 0.0, 0.0), 3.0)
    volume_radius = (3 * (r <= radius).sum() / (4 * np.pi)) ** (1 / 3)
    scale = 1e-6 * signal.GYROMAGNETIC_RATIO * 3.0
    for at, cosine in (((n // 2 + 14, n // 2, n // 2), 1.0), ((n // 2, n // 2 + 14, n // 2), 0.0)):
        exact = scale / 3 * (volume_radius / 14) ** 3 * (3 * cosine**2 - 1)
        assert field[at] == pytest.approx(exact, rel=0.08)
    assert abs(field[n // 2, n // 2, n // 2]) < 0.02 * scale  # inside a sphere nothing remains


def test_gated_cine_keeps_its_lines_inside_the_phase() -> None:
    scan = simulate_scan("cine", settings_for("cine", {**SMALL, "coils": 1, "states": 8, "slices": 3, "averages": 2}))
    p, s = scan.plan, scan.settings
    assert len(p) == 8 * 64 * 3 * 2
    np.testing.assert_array_equal(np.floor(p.cardiac_phase * 8 + 1e-9), p.state)
    assert (np.diff(p.time) > 0).all() and p.since_trigger.max() < s.rr
    assert list(dict.fromkeys(p.slice)) == [0, 2, 1]
    with pytest.raises(SettingError, match="does not fit into a cardiac phase"):
        simulate_scan("cine", settings_for("cine", {**SMALL, "coils": 1, "states": 20, "segments": 1}))


def test_molli_images_come_when_their_inversion_times_say() -> None:
    values = {"matrix_x": 32, "matrix_y": 64, "coils": 1, "scheme": "3,2", "rr": 0.5, "repetition_time": 0.007}
    scan = simulate_scan("molli", settings_for("molli", values))  # 0.45 s an image: it ends in the next heartbeat
    first = np.array([scan.plan.time[scan.plan.state == state].min() for state in range(5)])
    np.testing.assert_allclose(np.diff(first)[[0, 1, 3]], np.diff(scan.truth.states)[[0, 1, 3]])
    assert (np.diff(scan.plan.time) > 0).all()
    with pytest.raises(SettingError, match=r"longer than a heartbeat; got 0\.512 s"):
        simulate_scan("molli", settings_for("molli", {**values, "repetition_time": 0.008}))


def test_retro_gated_phases_vary_with_the_beat() -> None:
    values = {**SMALL, "coils": 2, "retro_gated": True, "arrhythmia": True, "snr": 0, "lines_per_segment": 4}
    scan = simulate_scan("cine", settings_for("cine", values))
    p = scan.plan
    highest = [p.state[p.segment == segment].max() for segment in np.unique(p.segment)]
    assert len(set(highest)) >= 3
    rr = np.diff(p.r_waves)
    assert rr.min() < 0.65 * 0.9 and (p.cardiac_phase < 1).all()
    # a readout's contrast belongs to its time: it equals the rendered frames around it
    at = int(np.argmin(np.abs(p.cardiac_phase - 10.5 / 48)))
    got = scan.samples(at, at + 1, np.random.default_rng(0))[0]
    low, high = (scan.clean[0, f, :, 0, p.k1[at]] for f in (10, 11))
    share = p.cardiac_phase[at] * 48 - 10
    np.testing.assert_allclose(got, (1 - share) * low + share * high, atol=1e-5 * np.abs(low).max())


def test_plans_follow_masks_calibration_and_averages() -> None:
    values = {**SMALL, "coils": 1, "mask": "random", "acceleration": 4, "acs": 8, "calibration": "separate", "averages": 2}
    scan = simulate_scan("satrec", settings_for("satrec", values))
    p = scan.plan
    calibration = p.calibration == schedule.CALIBRATION
    assert sorted(p.k1[calibration]) == list(range(28, 36)) and (p.state[calibration] == 4).all()
    got = np.zeros_like(scan.truth.mask, dtype=int)
    np.add.at(got, (p.state[~calibration], p.k2[~calibration], p.k1[~calibration]), 1)
    np.testing.assert_array_equal(got, 2 * scan.truth.mask)
    assert (scan.truth.mask.sum(axis=(1, 2)) == 16).all()
    assert (np.diff(p.time) > 0).all()


def test_echo_trains_read_every_echo_after_each_excitation() -> None:
    values = {"matrix_x": 32, "matrix_y": 32, "partitions": 8, "coils": 1, "states": 3, "mask": "poisson"}
    scan = simulate_scan("mgre", settings_for("mgre", {**values, "acceleration": 4, "acs": 6, "acs_partitions": 4}))
    p = scan.plan
    assert list(p.state[:6]) == [0, 1, 2, 0, 1, 2]
    assert len(p) == 3 * 8 * 32 // 4
    np.testing.assert_allclose(np.diff(p.time[:3]), scan.settings.echo_spacing)
    assert (scan.truth.mask[0] != scan.truth.mask[1]).any()


def test_the_same_seed_gives_the_same_scan() -> None:
    first, again, other = (
        simulate_scan("molli", settings_for("molli", {**SMALL, "scheme": "2", "seed": seed})) for seed in (3, 3, 4)
    )
    np.testing.assert_array_equal(first.clean, again.clean)
    assert np.linalg.norm(first.clean - other.clean) > 0.3 * np.linalg.norm(first.clean)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("ct", {}),
        ("cine", {"frames": 3}),
        ("cine", {"partitions": 8}),
        ("molli", {"scheme": "five"}),
        ("molli", {"retro_gated": True}),
        ("satrec", {"delays": "0.5,-1"}),
        ("satrec", {"delays": "soon"}),
        ("satrec", {"delays": "0.5,nan"}),
        ("satrec", {"delays": "500,1000,8000"}),  # ms
        ("satrec", {"states": 3}),  # of a scan that counts its delays, it would do nothing
        ("mgre", {"delays": "1,2"}),
        ("mgre", {"partitions": 1, "elliptical": True}),
        ("molli", {"interleaved": True}),
        ("mgre", {"bipolar": True, "asymmetric_echo": 0.8}),
        ("mgre", {"repetition_time": 0.01}),
        ("cine", {"mask": "full", "acceleration": 4}),
        ("cine", {"arrhythmia": True}),
        ("cine", {"matrix_x": 65}),
        ("cine", {"mask": "spiral"}),
    ],
)
def test_contradictory_settings_are_refused(kind: str, values: dict) -> None:
    with pytest.raises(SettingError):
        settings_for(kind, values)


def test_masks_for_the_other_dimension_are_refused() -> None:
    with pytest.raises(SettingError, match="3D mask"):
        simulate_scan("cine", settings_for("cine", {**SMALL, "states": 1, "mask": "poisson", "acceleration": 4}))


def test_readout_pulses_pull_the_magnetisation_to_their_steady_state_one_by_one() -> None:
    m0, t1 = np.ones(3, np.complex64), np.array([0.3, 1.0, 4.0], np.float32)
    flip_angle, repetition_time = np.deg2rad(9.0), 0.006
    expected = signal.saturation_recovery(m0, t1, 0.5).astype(complex)
    start = expected.astype(np.complex64)
    for n in range(41):
        found = signal.after_pulses(start, m0, t1, n, flip_angle=flip_angle, repetition_time=repetition_time)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        expected = 1 - (1 - np.cos(flip_angle) * expected) * np.exp(-repetition_time / t1)  # a pulse, then relaxation


def test_look_locker_correction_is_exact() -> None:
    times = np.array(signal.molli_inversion_times((5, 3), rr=0.8))
    t1 = np.array([0.25, 1.0, 1.6])
    curves = np.stack([signal.look_locker(np.ones(3, np.complex64), t1, t, b_over_a=1.85) for t in times]).real.T
    for value, curve in zip(t1, curves, strict=True):
        (a, b, t1_star), _ = curve_fit(lambda t, a, b, s: a - b * np.exp(-t / s), times, curve, p0=(1, 2, 1))
        assert t1_star * (b / a - 1) == pytest.approx(value, rel=1e-4)
