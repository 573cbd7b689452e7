"""Simulated MRD files: what other readers see, flags, counters, limits, geometry, noise, and the way back to the truth."""

import itertools
import json
from dataclasses import replace

import h5py
import ismrmrd
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gadgets.simulate import (
    NOISE_DWELL,
    Stream,
    dwell_time,
    read_truth,
    simulate,
    simulate_kind,
    simulate_stream,
    write_scan,
)
from gadgets.simulate_header import NOISE_BANDWIDTH, Geometry
from gadgets.wire.dtypes import Flag
from recon_core.errors import DataError, SettingError
from recon_core.simulation.encoding import to_image
from recon_core.simulation.options import settings_for

SMALL = {"matrix_x": 48, "matrix_y": 48, "coils": 4, "noise_readouts": 32}
VOLUME = {**SMALL, "matrix_x": 32, "matrix_y": 32, "partitions": 8, "states": 3, "acs": 8, "acs_partitions": 4}


def bit(headers: np.ndarray, flag: Flag) -> np.ndarray:
    return (headers["flags"] >> np.uint64(flag - 1)) & np.uint64(1) == 1


def joined(stream: Stream) -> tuple[np.ndarray, np.ndarray]:
    """Headers and samples of everything but the noise."""
    rest = [b for b in stream.batches if not bit(b[0], Flag.ACQ_IS_NOISE_MEASUREMENT).any()]
    return np.concatenate([h for h, _ in rest]), np.concatenate([d for _, d in rest])


def limits(stream: Stream):
    return ismrmrd.xsd.CreateFromDocument(stream.header_text).encoding[0].encodingLimits


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("cine", {**SMALL, "mask": "vista", "acceleration": "3", "acs": "4", "slices": 2, "states": 4}),
        ("molli", {**SMALL, "orientation": "oblique"}),
        ("satrec", {**SMALL, "calibration": "separate", "mask": "random", "acceleration": 4.0}),
        ("mgre", VOLUME),
    ],
)
def test_the_ismrmrd_package_reads_the_file(tmp_path, kind: str, values: dict) -> None:
    summary = simulate(kind, tmp_path / "scan.h5", values)
    stream = simulate_stream(kind, values)
    expected_h = np.concatenate([h for h, _ in stream.batches])
    expected_d = [row for _, samples in stream.batches for row in samples]
    dataset = ismrmrd.Dataset(str(summary.path), mode="r")
    assert dataset.read_xml_header().decode() == stream.header_text
    assert dataset.number_of_acquisitions() == summary.n_readouts == len(expected_h)
    for i in (0, 31, 32, len(expected_h) - 1):
        acquisition = dataset.read_acquisition(i)
        assert bytes(acquisition.getHead()) == expected_h[i].tobytes()
        np.testing.assert_array_equal(acquisition.data, expected_d[i])
    if stream.waveforms:
        assert dataset.number_of_waveforms() == summary.n_waveforms == len(stream.waveforms)
        waveform = dataset.read_waveform(0)
        np.testing.assert_array_equal(waveform.data, stream.waveforms[0][1])
        assert bytes(waveform.getHead())[:38] == stream.waveforms[0][0].tobytes()[:38]  # the rest is padding
    dataset.close()
    with ismrmrd.File(str(summary.path), "r") as file:
        assert len(file["dataset"].acquisitions) == summary.n_readouts
    truth = read_truth(summary.truth_path)
    np.testing.assert_array_equal(truth.images, stream.truth.images)
    assert truth.states == stream.truth.states and set(truth.maps) == set(stream.truth.maps)
    assert summary.acceleration == pytest.approx(truth.mask.size / truth.mask.sum())


@pytest.mark.parametrize("kind", ["cine", "molli", "satrec", "mgre"])
def test_header_is_valid_and_in_mrd_units(kind: str) -> None:
    values = {**(VOLUME if kind == "mgre" else SMALL), "mask": "random", "acceleration": 3, "acs": 4}
    stream = simulate_stream(kind, values)
    header = ismrmrd.xsd.CreateFromDocument(stream.header_text)
    assert "<version>" not in stream.header_text and header.subjectInformation is None
    s, encoding, sequence = settings_for(kind, values), header.encoding[0], header.sequenceParameters
    assert (encoding.encodedSpace.matrixSize.x, encoding.reconSpace.matrixSize.x) == (2 * s.matrix_x, s.matrix_x)
    assert encoding.encodedSpace.fieldOfView_mm.x == pytest.approx(2e3 * s.fov_x)
    assert encoding.reconSpace.fieldOfView_mm.z == pytest.approx(1e3 * s.slice_thickness * s.partitions)
    assert encoding.parallelImaging.accelerationFactor.kspace_encoding_step_1 == 3
    assert encoding.parallelImaging.calibrationMode.value == "embedded"
    assert header.measurementInformation.measurementID == f"simulated_{kind}_0"
    assert header.acquisitionSystemInformation.relativeReceiverNoiseBandwidth == pytest.approx(NOISE_BANDWIDTH)
    assert sequence.TR[0] == pytest.approx(1e3 * s.repetition_time)
    in_ms = 1e3 * np.array(stream.truth.states)
    if kind == "mgre":
        np.testing.assert_allclose(sequence.TE, in_ms)
    if kind in ("molli", "satrec"):
        np.testing.assert_allclose(sequence.TI, in_ms)
        assert header.userParameters.userParameterString[0].name == "MagnetizationPreparation"


def reconstruct(stream: Stream, counter: str, s) -> np.ndarray:
    """Sort by counters and header limits alone, as a receiver would; average repeated lines; combine with the true maps."""
    headers, samples = joined(stream)
    keep = ~bit(headers, Flag.ACQ_IS_PARALLEL_CALIBRATION)
    headers, samples = headers[keep], samples[keep]
    reverse = bit(headers, Flag.ACQ_IS_REVERSE)
    samples = np.where(reverse[:, None, None], samples[..., ::-1], samples)
    step_1, step_2 = limits(stream).kspace_encoding_step_1, limits(stream).kspace_encoding_step_2
    idx = headers["idx"]
    k1 = idx["kspace_encode_step_1"] + s.matrix_y // 2 - step_1.center
    k2 = idx["kspace_encode_step_2"] + s.partitions // 2 - step_2.center
    n_states = stream.truth.images.shape[1]
    n_slices = len(stream.truth.images)
    kspace = np.zeros((n_slices, n_states, s.partitions, s.matrix_y, s.coils, 2 * s.matrix_x), np.complex64)
    counts = np.zeros(kspace.shape[:4], int)
    start = s.matrix_x - int(headers["center_sample"][0])
    where = (idx["slice"], idx[counter], k2, k1)
    np.add.at(counts, where, 1)
    np.add.at(kspace[..., start:], where, samples)
    kspace /= np.maximum(counts, 1)[..., None, None]
    kspace = np.moveaxis(kspace, -2, 2)
    images = to_image(kspace, (-3, -2, -1) if s.is_3d else (-2, -1))[..., s.matrix_x // 2 : s.matrix_x // 2 + s.matrix_x]
    return (images * stream.truth.coil_maps[:, None].conj()).sum(2)


@pytest.mark.parametrize(
    ("kind", "counter", "values"),
    [
        ("cine", "phase", {**SMALL, "slices": 3, "averages": 2, "segments": 4, "states": 4}),
        ("molli", "set", {**SMALL, "calibration": "separate"}),
        ("satrec", "contrast", {**SMALL, "state_counter": "contrast", "repetitions": 2}),
        ("mgre", "contrast", {**VOLUME, "bipolar": True}),
    ],
)
def test_counters_and_limits_lead_back_to_the_truth(kind: str, counter: str, values: dict) -> None:
    values = {**values, "snr": 0}
    stream, s = simulate_stream(kind, values), settings_for(kind, values)
    images, truth = reconstruct(stream, counter, s), stream.truth.images
    # 7 mm pixels: ringing at the body's edge times the slope of the maps is what remains; a line out of place makes 0.2 and more
    assert np.linalg.norm(images - truth) / np.linalg.norm(truth) < 0.05


def test_partial_fourier_and_asymmetric_echo_are_described_by_the_limits() -> None:
    values = {**SMALL, "partial_fourier": 0.75, "asymmetric_echo": 0.75, "states": 2, "snr": 0, "acs": 8}
    stream, complete = (simulate_stream("cine", v) for v in (values, {**values, "partial_fourier": 1, "asymmetric_echo": 1}))
    headers, samples = joined(stream)
    assert samples.shape == (2 * 36, 4, 72) and (headers["center_sample"] == 24).all()
    step_0, step_1 = limits(stream).kspace_encoding_step_0, limits(stream).kspace_encoding_step_1
    assert (step_0.maximum, step_0.center) == (71, 24)
    assert (step_1.minimum, step_1.maximum, step_1.center) == (0, 35, 12)
    assert (headers["idx"]["user"][:, 5] == 12).all()
    all_headers, all_samples = joined(complete)
    for phase in range(2):
        got = samples[(headers["idx"]["phase"] == phase) & (headers["idx"]["kspace_encode_step_1"] == 12)][0]
        expected = all_samples[(all_headers["idx"]["phase"] == phase) & (all_headers["idx"]["kspace_encode_step_1"] == 24)][
            0
        ]
        np.testing.assert_allclose(got, expected[:, 24:], atol=2e-4 * np.abs(expected).max())
        assert np.abs(got).sum(0).argmax() in (23, 24, 25)  # the centre of k-space is where the header says


def test_noise_scan_gives_the_covariance_after_the_bandwidth_correction() -> None:
    values = {**SMALL, "noise_readouts": 400, "states": 1}
    stream, s = simulate_stream("cine", values), settings_for("cine", values)
    headers, samples = stream.batches[0]
    assert bit(headers, Flag.ACQ_IS_NOISE_MEASUREMENT).all()
    assert headers["sample_time_us"][0] == pytest.approx(NOISE_DWELL * 1e6)
    flat = samples.transpose(1, 0, 2).reshape(s.coils, -1)
    covariance = flat @ flat.conj().T / (flat.shape[1] - 1)
    corrected = covariance * (NOISE_DWELL / (dwell_time(s) * NOISE_BANDWIDTH))
    truth = stream.truth.noise_covariance
    assert np.linalg.norm(corrected - truth) / np.linalg.norm(truth) < 0.02
    # and that is what lies on the imaging lines
    silent = simulate_stream("cine", {**values, "snr": 0})
    noise = (joined(stream)[1] - joined(silent)[1]).transpose(1, 0, 2).reshape(s.coils, -1)
    measured = noise @ noise.conj().T / noise.shape[1]
    assert np.linalg.norm(measured - truth) / np.linalg.norm(truth) < 0.10


def test_flags_mark_first_and_last() -> None:
    values = {
        **SMALL,
        "slices": 3,
        "states": 4,
        "averages": 2,
        "segments": 5,
        "repetitions": 2,
        "mask": "vista",
        "acceleration": 2,
    }
    headers, _ = joined(simulate_stream("cine", {**values, "acs": 6}))
    idx = headers["idx"]
    for name, keys in {
        "SLICE": ("repetition", "slice"),
        "PHASE": ("repetition", "slice", "phase"),
        "AVERAGE": ("repetition", "slice", "average"),
        "SEGMENT": ("repetition", "slice", "segment"),
        "REPETITION": ("repetition",),
        "ENCODE_STEP1": ("repetition", "slice", "average", "segment", "phase"),
    }.items():
        for end, pick in (("FIRST", 0), ("LAST", -1)):
            marked = np.flatnonzero(bit(headers, Flag[f"ACQ_{end}_IN_{name}"]))
            groups = {tuple(int(idx[k][i]) for k in keys): [] for i in range(len(headers))}
            for i in range(len(headers)):
                groups[tuple(int(idx[k][i]) for k in keys)].append(i)
            assert sorted(marked) == sorted(rows[pick] for rows in groups.values()), (name, end)
    assert np.flatnonzero(bit(headers, Flag.ACQ_LAST_IN_MEASUREMENT)).tolist() == [len(headers) - 1]
    embedded = bit(headers, Flag.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)
    np.testing.assert_array_equal(embedded, np.isin(idx["kspace_encode_step_1"], range(21, 27)))
    assert embedded.sum() == 6 * 4 * 3 * 2 * 2


def test_separate_calibration_lines_are_marked_and_come_first() -> None:
    headers, _ = joined(
        simulate_stream(
            "cine", {**SMALL, "calibration": "separate", "acs": 10, "states": 2, "mask": "uniform", "acceleration": 3}
        )
    )
    only = bit(headers, Flag.ACQ_IS_PARALLEL_CALIBRATION)
    assert only[:10].all() and not only[10:].any()
    assert not bit(headers, Flag.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING).any()
    assert not bit(headers, Flag.ACQ_FIRST_IN_SLICE)[:10].any() and bit(headers, Flag.ACQ_FIRST_IN_SLICE)[10]


def test_time_stamps_waveforms_and_triggers_agree() -> None:
    stream = simulate_stream("cine", {**SMALL, "retro_gated": True, "states": 8})
    headers, _ = joined(stream)
    stamps = headers["acquisition_time_stamp"].astype(int)
    assert (np.diff(stamps) >= 0).all() and (np.diff(headers["scan_counter"].astype(int)) == 1).all()
    start = int(stream.waveforms[0][0]["time_stamp"])
    ecg = np.concatenate([data for _, data in stream.waveforms], axis=1)
    assert ecg.shape[0] == 5 and all(int(h["waveform_id"]) == 0 for h, _ in stream.waveforms)
    r_waves = np.flatnonzero(ecg[-1]) + start
    last = r_waves[np.searchsorted(r_waves, stamps, side="right") - 1]
    since = headers["physiology_time_stamp"][:, 0].astype(int)
    assert np.abs(stamps - last - since).max() <= 1
    peaks = ecg[0][np.flatnonzero(ecg[-1])]
    assert peaks.min() > np.percentile(ecg[0], 95)  # the trigger sits on the R-wave
    highest = [headers["idx"]["phase"][headers["idx"]["segment"] == g].max() for g in np.unique(headers["idx"]["segment"])]
    assert max(highest) == limits(stream).phase.maximum


@pytest.mark.parametrize("orientation", ["axial", "sagittal", "coronal", "oblique"])
def test_geometry_is_orthonormal_and_slices_step_along_the_normal(orientation: str) -> None:
    values = {**SMALL, "orientation": orientation, "slices": 3, "states": 1, "offset_read": 0.02, "offset_slice": -0.03}
    headers, _ = joined(simulate_stream("cine", values))
    read, phase, normal = (headers[name][0].astype(float) for name in ("read_dir", "phase_dir", "slice_dir"))
    axes = np.stack([read, phase, normal])
    np.testing.assert_allclose(axes @ axes.T, np.eye(3), atol=1e-6)
    assert np.linalg.det(axes) == pytest.approx(1.0, abs=1e-6)
    centre = 20 * read - 30 * normal
    for number in range(3):
        position = headers["position"][headers["idx"]["slice"] == number][0]
        np.testing.assert_allclose(position, centre + (number - 1) * 10.0 * normal, atol=1e-4)
    assert Geometry.of(settings_for("cine", values)).position == pytest.approx(centre, abs=1e-4)


def test_reversed_readouts_are_stored_as_acquired() -> None:
    forward, bipolar = (simulate_stream("mgre", {**VOLUME, "snr": 0, "bipolar": b}) for b in (False, True))
    headers, samples = joined(bipolar)
    reverse = bit(headers, Flag.ACQ_IS_REVERSE)
    np.testing.assert_array_equal(reverse, headers["idx"]["contrast"] % 2 == 1)
    reference = joined(forward)[1]
    scale = np.abs(reference).max()
    np.testing.assert_allclose(samples[reverse], reference[reverse][..., ::-1], atol=1e-4 * scale)
    assert (headers["center_sample"] == VOLUME["matrix_x"]).all()


def test_donor_coils_and_many_channels(tmp_path) -> None:
    y, x = np.meshgrid(np.linspace(-1, 1, 48), np.linspace(-1, 1, 48), indexing="ij")
    donors = np.stack(
        [np.exp(-((x - a) ** 2) - (y - b) ** 2 + 1j * (a * y + b * x)) for a, b in itertools.product((-1, 0, 1), (-1, 1))]
    )
    np.savez(tmp_path / "donor.npz", image=donors.astype(np.complex64))
    stream = simulate_stream("satrec", {**SMALL, "coils": 6, "donor": str(tmp_path / "donor.npz"), "delays": "1,8"})
    assert joined(stream)[1].shape[1] == 6
    assert str(tmp_path) not in stream.header_text
    headers, _ = joined(simulate_stream("cine", {**SMALL, "coils": 70, "states": 1}))
    assert [int(v) for v in headers["channel_mask"][0][:3]] == [2**64 - 1, 2**6 - 1, 0]


def test_a_scan_written_with_another_seed_differs_by_its_noise_alone(tmp_path) -> None:
    scan = simulate_kind("satrec", {"matrix_x": 32, "matrix_y": 32, "coils": 2, "snr": 20.0})
    headers, samples = [], []
    for seed in (1, 1, 2):
        path = tmp_path / "scan.h5"
        write_scan(path, replace(scan, settings=replace(scan.settings, seed=seed)))
        with h5py.File(path) as file:
            rows = file["dataset/data"][:]
        headers.append(rows["head"])
        samples.append(np.concatenate(rows["data"][scan.settings.noise_readouts :]))
    assert np.array_equal(headers[0]["idx"], headers[2]["idx"]) and np.array_equal(samples[0], samples[1])
    difference = samples[0] - samples[2]
    assert 0 < difference.std() < samples[0].std()
    correlation = np.corrcoef(difference[1:], difference[:-1])[0, 1]
    assert abs(correlation) < 0.1 and abs(difference.mean()) < 0.1 * difference.std()


def test_files_are_reproducible_and_seeds_differ() -> None:
    first, again, other = (simulate_stream("molli", {**SMALL, "scheme": "2", "seed": seed}) for seed in (1, 1, 2))
    for (h1, d1), (h2, d2) in zip(first.batches, again.batches, strict=True):
        np.testing.assert_array_equal(h1, h2)
        np.testing.assert_array_equal(d1, d2)
    assert np.abs(first.batches[1][1] - other.batches[1][1]).max() > 0.1


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(
    mask=st.sampled_from(["full", "uniform", "random", "golden", "vista"]),
    calibration=st.sampled_from(["embedded", "separate", "none"]),
    fourier=st.sampled_from([1.0, 0.875, 0.7]),
    slices=st.integers(1, 3),
    averages=st.integers(1, 2),
    oversampling=st.integers(1, 2),
)
def test_every_counter_stays_within_its_limits(mask, calibration, fourier, slices, averages, oversampling) -> None:
    values = {
        "matrix_x": 32,
        "matrix_y": 32,
        "coils": 2,
        "states": 3,
        "mask": mask,
        "acceleration": 1 if mask == "full" else 2,
        "calibration": calibration,
        "acs": 6,
        "partial_fourier": fourier,
        "slices": slices,
        "averages": averages,
        "oversampling": oversampling,
        "noise_readouts": 2,
    }
    stream = simulate_stream("cine", values)
    headers, samples = joined(stream)
    assert (headers["number_of_samples"] == samples.shape[-1]).all() and np.isfinite(samples).all()
    xml = {"kspace_encode_step_1": "kspace_encoding_step_1", "kspace_encode_step_2": "kspace_encoding_step_2"}
    for name in headers["idx"].dtype.names[:-1]:
        limit = getattr(limits(stream), xml.get(name, name))
        assert limit.minimum == 0 and headers["idx"][name].max() <= limit.maximum
    imaging = ~bit(headers, Flag.ACQ_IS_PARALLEL_CALIBRATION)
    assert imaging.sum() == stream.truth.mask.sum() * slices * averages


def test_each_scan_has_a_truth_of_its_own(tmp_path) -> None:
    values = {"matrix_x": 16, "matrix_y": 16, "coils": 1, "delays": "1"}
    names = ("r4.1.h5", "r4.2.h5", "r4.truth.h5")
    made = [simulate("satrec", tmp_path / name, {**values, "seed": seed}) for seed, name in enumerate(names)]
    assert len({path for one in made for path in (one.path, one.truth_path)}) == 6
    for seed, one in enumerate(made):  # no file was written over another
        with h5py.File(one.path) as raw, h5py.File(one.truth_path) as truth:
            assert raw["dataset/data"]["head"]["measurement_uid"][0] == seed + 1
            assert json.loads(truth.attrs["settings"])["seed"] == seed


def test_bad_settings_and_bad_truth_files(tmp_path) -> None:
    with pytest.raises(SettingError, match="unknown setting"):
        simulate("cine", tmp_path / "a.h5", {"frames": 3})
    assert not (tmp_path / "a.h5").exists()
    (tmp_path / "x.truth.h5").write_bytes(b"not HDF5")
    with pytest.raises(DataError, match="not a truth file"):
        read_truth(tmp_path / "x.truth.h5")
