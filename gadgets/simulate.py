"""``recon simulate``: a simulated scan as MRD raw data, with the truth beside it.

The file is what a scanner's converter would have written: noise readouts first, then calibration and imaging readouts in the
order of acquisition, every counter, flag and time stamp filled in, waveforms, and a header without ``<version>``.

FIRST/LAST flags: of a slice within its repetition; of a state (phase, set or contrast), an average and a segment
within their
slice and repetition; of ENCODE_STEP2 within one state, average and slice; of ENCODE_STEP1 additionally within one partition.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from gadgets.outputs import require_room
from gadgets.simulate_header import BASE_TICKS, NOISE_BANDWIDTH, Geometry, counter_of, header_text, matrix_of
from gadgets.wire.dtypes import ACQUISITION_HEADER, WAVEFORM_HEADER, Flag
from recon_core.errors import DataError
from recon_core.simulation.encoding import correlated_noise
from recon_core.simulation.options import ScanSettings, settings_for
from recon_core.simulation.scan import Scan, Truth, simulate_scan
from recon_core.simulation.schedule import CALIBRATION, CALIBRATION_AND_IMAGING

TICK = 0.0025  # s, of acquisition and physiology time stamps
NOISE_DWELL = 5e-6  # s; differs from the imaging dwell time on purpose
NOISE_SAMPLES = 256
BATCH = 512  # readouts made at a time
ECG_BLOCK = 100  # samples per waveform message

Batch = tuple[NDArray[np.void], NDArray[np.complex64]]


@dataclass(frozen=True)
class Stream:
    """A scan in memory, in the order of the wire.

    Attributes
    ----------
    header_text
        The MRD header.
    batches
        Consecutive readouts of equal shape: headers ``(n,)`` of ``ACQUISITION_HEADER`` and samples complex64 ``(n,
        coil, k0)``.
    waveforms
        Headers of ``WAVEFORM_HEADER`` and uint32 ``(channel, sample)``; their time stamps say where they belong.
    truth
        What the reconstruction should give.
    """

    header_text: str
    batches: list[Batch]
    waveforms: list[tuple[np.void, NDArray[np.uint32]]]
    truth: Truth


@dataclass(frozen=True)
class Summary:
    """What was written, for the command line."""

    kind: str
    path: Path
    truth_path: Path
    n_readouts: int
    n_noise_readouts: int
    n_waveforms: int
    n_coils: int
    matrix: tuple[int, int, int]  # z, y, x
    n_slices: int
    n_states: int
    acceleration: float  # full grid over sampled positions
    duration: float  # s that the scan would take
    n_bytes: int


def simulate(kind: str, out: str | Path, settings: ScanSettings | Mapping[str, Any] | None = None) -> Summary:
    """Write ``out`` (MRD, HDF5) and its truth (``NAME.truth.h5``).

    Parameters
    ----------
    kind
        ``cine``, ``molli``, ``satrec`` or ``mgre``.
    settings
        Complete settings, or values (typed or text) on top of the kind's defaults.

    Raises
    ------
    SettingError
        Unknown, out of range or contradictory settings.
    """
    return write_scan(out, simulate_kind(kind, settings))


def write_scan(out: str | Path, scan: Scan) -> Summary:
    """`simulate` of a scan that exists as arrays: with another seed in its settings the same scan with other noise."""
    path = Path(out)
    text, geometry = _head(scan)
    rng = _noise_rng(scan)
    n_readouts = n_noise = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    require_room(None, path, 0)
    with h5py.File(path, "w") as file:
        group = file.create_group("dataset")
        group.create_dataset("xml", data=np.array([text.encode()], dtype=object), dtype=h5py.special_dtype(vlen=bytes))
        total = len(scan.plan) + scan.settings.noise_readouts
        data = group.create_dataset("data", (total,), maxshape=(None,), dtype=_file_dtype(ACQUISITION_HEADER, "f4", True))
        for headers, samples in _batches(scan, geometry, rng):
            rows = np.empty(len(headers), dtype=data.dtype)
            rows["head"] = headers
            empty = np.zeros(0, dtype=np.float32)
            for i in range(len(headers)):
                rows["traj"][i] = empty
                rows["data"][i] = samples[i].reshape(-1).view(np.float32)
            require_room(file, path, samples.nbytes + rows.nbytes)
            data[n_readouts : n_readouts + len(rows)] = rows
            n_readouts += len(rows)
            n_noise += int(np.sum(_has(headers, Flag.ACQ_IS_NOISE_MEASUREMENT)))
        waveforms = _ecg(scan) if scan.settings.waveforms else []
        if waveforms:
            stored = np.empty(len(waveforms), dtype=_file_dtype(WAVEFORM_HEADER, "u4", False))
            for i, (head, block) in enumerate(waveforms):
                stored["head"][i] = head
                stored["data"][i] = block.reshape(-1)
            group.create_dataset("waveforms", data=stored, maxshape=(None,))
    # of the ending alone: r4.1.h5 and r4.2.h5 have a truth of their own each
    truth_path = Path(f"{path.with_suffix('') if path.suffix == '.h5' else path}.truth.h5")
    write_truth(truth_path, scan)
    truth = scan.truth
    return Summary(
        kind=scan.kind,
        path=path,
        truth_path=truth_path,
        n_readouts=n_readouts,
        n_noise_readouts=n_noise,
        n_waveforms=len(waveforms),
        n_coils=scan.settings.coils,
        matrix=matrix_of(scan.settings),
        n_slices=len(truth.images),
        n_states=truth.images.shape[1],
        acceleration=truth.mask.size / int(truth.mask.sum()),
        duration=float(scan.plan.time[-1]),
        n_bytes=path.stat().st_size,
    )


def simulate_stream(kind: str, settings: ScanSettings | Mapping[str, Any] | None = None) -> Stream:
    """The same scan in memory, for tests and benchmarks.

    Raises
    ------
    SettingError
        As :func:`simulate`.
    """
    return stream_of(simulate_kind(kind, settings))


def stream_of(scan: Scan) -> Stream:
    """A scan that exists as arrays (simulated, or semi-measured: another object's k-space in its place) as readouts."""
    text, geometry = _head(scan)
    batches = list(_batches(scan, geometry, _noise_rng(scan)))
    return Stream(text, batches, _ecg(scan) if scan.settings.waveforms else [], scan.truth)


def simulate_kind(kind: str, settings: ScanSettings | Mapping[str, Any] | None) -> Scan:
    """The scan as arrays, with B0 along the patient's axis whatever the orientation of the image."""
    complete = settings if isinstance(settings, ScanSettings) else settings_for(kind, settings)
    g = Geometry.of(complete)
    b0 = (float(g.slice_dir[2]), float(g.phase_dir[2]), float(g.read_dir[2]))
    return simulate_scan(kind, complete, b0)


def _head(scan: Scan) -> tuple[str, Geometry]:
    return header_text(scan), Geometry.of(scan.settings)


def _noise_rng(scan: Scan) -> np.random.Generator:
    return np.random.default_rng([scan.settings.seed, 77])


def dwell_time(s: ScanSettings) -> float:
    """Of one (oversampled) imaging sample, s."""
    return 1.0 / (s.readout_bandwidth * s.matrix_x * s.oversampling)


def _has(headers: NDArray[np.void], flag: Flag) -> NDArray[np.bool_]:
    return np.asarray(headers["flags"] >> np.uint64(flag - 1) & np.uint64(1), dtype=bool)


def _batches(scan: Scan, geometry: Geometry, rng: np.random.Generator) -> Iterator[Batch]:
    s = scan.settings
    if s.noise_readouts:
        yield _noise_scan(scan, geometry, rng)
    headers = _headers(scan, geometry)
    backwards = _has(headers, Flag.ACQ_IS_REVERSE)
    for start in range(0, len(headers), BATCH):
        stop = min(start + BATCH, len(headers))
        samples = scan.samples(start, stop, rng)
        turned = backwards[start:stop]
        if turned.any():
            samples[turned] = samples[turned][..., ::-1]
        yield headers[start:stop], samples


def _empty_headers(n: int, scan: Scan, geometry: Geometry) -> NDArray[np.void]:
    s = scan.settings
    headers = np.zeros(n, dtype=ACQUISITION_HEADER)
    headers["version"] = 1
    headers["measurement_uid"] = s.seed + 1
    headers["available_channels"] = headers["active_channels"] = s.coils
    for coil in range(s.coils):
        headers["channel_mask"][:, coil // 64] |= np.uint64(1 << (coil % 64))
    for name in ("read_dir", "phase_dir", "slice_dir"):
        headers[name] = getattr(geometry, name)
    headers["position"] = geometry.position
    return headers


def _noise_scan(scan: Scan, geometry: Geometry, rng: np.random.Generator) -> Batch:
    """Readouts without excitation. Their variance differs from the imaging lines' by dwell time and the receiver's
    bandwidth."""
    s = scan.settings
    headers = _empty_headers(s.noise_readouts, scan, geometry)
    headers["flags"] = 1 << (Flag.ACQ_IS_NOISE_MEASUREMENT - 1)
    headers["number_of_samples"] = NOISE_SAMPLES
    headers["center_sample"] = NOISE_SAMPLES // 2
    headers["sample_time_us"] = NOISE_DWELL * 1e6
    headers["scan_counter"] = 1 + np.arange(s.noise_readouts)
    headers["acquisition_time_stamp"] = BASE_TICKS - s.noise_readouts + np.arange(s.noise_readouts)
    scale = dwell_time(s) * NOISE_BANDWIDTH / NOISE_DWELL
    covariance = scan.truth.noise_covariance * scale
    return headers, correlated_noise(covariance, (s.noise_readouts, NOISE_SAMPLES), rng)


def _headers(scan: Scan, geometry: Geometry) -> NDArray[np.void]:
    s, p = scan.settings, scan.plan
    n_samples = s.matrix_x * s.oversampling - scan.first_sample
    headers = _empty_headers(len(p), scan, geometry)
    headers["number_of_samples"] = n_samples
    # for reversed readouts too: the centre after the samples are put in order, as scanners write it
    headers["center_sample"] = s.matrix_x * s.oversampling // 2 - scan.first_sample
    headers["sample_time_us"] = dwell_time(s) * 1e6
    headers["scan_counter"] = s.noise_readouts + 1 + np.arange(len(p))
    headers["acquisition_time_stamp"] = BASE_TICKS + np.round(p.time / TICK).astype(np.int64)
    if scan.kind in ("cine", "molli"):
        headers["physiology_time_stamp"][:, 0] = np.floor(p.since_trigger / TICK + 1e-6).astype(np.int64)
    headers["position"] = geometry.position + np.outer(np.array(scan.slice_positions)[p.slice] * 1e3, geometry.slice_dir)
    idx = headers["idx"]
    idx["kspace_encode_step_1"] = p.k1 - scan.first_line
    idx["kspace_encode_step_2"] = p.k2
    for name in ("average", "slice", "repetition", "segment"):
        idx[name] = getattr(p, name)
    idx[counter_of(scan)] = p.state
    idx["user"][:, 5] = s.matrix_y // 2 - scan.first_line
    idx["user"][:, 6] = s.partitions // 2
    headers["flags"] = _flags(scan)
    return headers


def _flags(scan: Scan) -> NDArray[np.uint64]:
    s, p = scan.settings, scan.plan
    flags = np.zeros(len(p), dtype=np.uint64)

    def mark(rows: NDArray[np.int64] | NDArray[np.bool_], flag: Flag) -> None:
        flags[rows] |= np.uint64(1 << (flag - 1))

    mark(p.calibration == CALIBRATION, Flag.ACQ_IS_PARALLEL_CALIBRATION)
    mark(p.calibration == CALIBRATION_AND_IMAGING, Flag.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING)
    if s.bipolar:
        mark((p.state % 2 == 1) & (p.calibration != CALIBRATION), Flag.ACQ_IS_REVERSE)
    imaging = np.flatnonzero(p.calibration != CALIBRATION)
    within = {
        "ENCODE_STEP1": (p.slice, p.repetition, p.average, p.segment, p.state, p.k2),
        "ENCODE_STEP2": (p.slice, p.repetition, p.average, p.state),
        "AVERAGE": (p.slice, p.repetition, p.average),
        "SEGMENT": (p.slice, p.repetition, p.segment),
        "SLICE": (p.repetition, p.slice),
        "REPETITION": (p.repetition,),
        counter_of(scan).upper(): (p.slice, p.repetition, p.state),
    }
    for name, columns in within.items():
        key = np.stack([c[imaging] for c in columns], axis=1)
        first = np.unique(key, axis=0, return_index=True)[1]
        last = len(key) - 1 - np.unique(key[::-1], axis=0, return_index=True)[1]
        mark(imaging[first], Flag[f"ACQ_FIRST_IN_{name}"])
        mark(imaging[last], Flag[f"ACQ_LAST_IN_{name}"])
    mark(imaging[-1:], Flag.ACQ_LAST_IN_MEASUREMENT)
    return flags


def _ecg(scan: Scan) -> list[tuple[np.void, NDArray[np.uint32]]]:
    """Four leads and, last, the trigger: waveform id 0 at 400 Hz, in blocks."""
    p = scan.plan
    n = int(np.ceil((p.time[-1] + 0.05) / TICK / ECG_BLOCK)) * ECG_BLOCK
    time = np.arange(n) * TICK
    beat = np.clip(np.searchsorted(p.r_waves, time, side="right") - 1, 0, None)
    rr = np.diff(np.append(p.r_waves, p.r_waves[-1] + np.diff(p.r_waves)[-1]))[beat]
    since, until = time - p.r_waves[beat], p.r_waves[beat] + rr - time
    waves = [(0.15, until - 0.16, 0.022), (-0.12, until - 0.03, 0.010), (0.30, since - 0.30 * np.sqrt(rr), 0.045)]
    complexes = [np.exp(-0.5 * (np.minimum(since, until) / 0.010) ** 2), -0.2 * np.exp(-0.5 * ((since - 0.03) / 0.012) ** 2)]
    lead = sum((height * np.exp(-0.5 * (at / width) ** 2) for height, at, width in waves), start=sum(complexes))
    rng = np.random.default_rng([scan.settings.seed, 78])
    leads = 2048 + 900 * np.outer([1.0, 0.7, -0.5, 0.3], lead) + rng.normal(0, 6, (4, n))
    trigger = np.zeros(n)
    trigger[np.unique(np.round(p.r_waves[p.r_waves < time[-1]] / TICK).astype(int))] = 16384
    samples = np.round(np.concatenate([leads, trigger[None]])).astype(np.uint32)
    blocks: list[tuple[np.void, NDArray[np.uint32]]] = []
    for number, start in enumerate(range(0, n, ECG_BLOCK)):
        head = np.zeros(1, dtype=WAVEFORM_HEADER)[0]
        head["version"] = 1
        head["measurement_uid"] = scan.settings.seed + 1
        head["scan_counter"] = number + 1
        head["time_stamp"] = BASE_TICKS + start
        head["number_of_samples"], head["channels"] = ECG_BLOCK, len(samples)
        head["sample_time_us"] = TICK * 1e6
        blocks.append((head, np.ascontiguousarray(samples[:, start : start + ECG_BLOCK])))
    return blocks


def _file_dtype(head: np.dtype[np.void], sample: str, trajectory: bool) -> np.dtype[np.void]:
    """The HDF5 record of ISMRMRD: header, (trajectory,) and interleaved real and imaginary parts of any length."""
    lengthless = h5py.special_dtype(vlen=np.dtype(sample))
    middle = [("traj", h5py.special_dtype(vlen=np.dtype("f4")))] if trajectory else []
    return np.dtype([("head", head), *middle, ("data", lengthless)])


TRUTH_ARRAYS = ("images", "coil_maps", "tissue", "interior", "labels", "mask", "acs_mask", "noise_covariance")
UNITS = {"t1": "s", "t2": "s", "r2star": "1/s", "pd": "", "field": "Hz", "chi": "ppm", "m0": ""}


def write_truth(path: Path, scan: Scan) -> None:
    """The truth of a scan as plain HDF5: one dataset per field of ``Truth``, maps in a group with their units."""
    truth = scan.truth
    with h5py.File(path, "w") as file:
        file.attrs["kind"] = scan.kind
        file.attrs["settings"] = json.dumps(asdict(scan.settings) | {"donor": bool(scan.settings.donor)})
        file.attrs["label_names"] = json.dumps(dict(truth.label_names))
        arrays = {name: getattr(truth, name) for name in TRUTH_ARRAYS}
        require_room(file, path, sum(array.nbytes for array in (*arrays.values(), *truth.maps.values())))
        for name, array in arrays.items():
            file[name] = array
        file["states"] = np.array(truth.states)
        for name, values in truth.maps.items():
            file[f"maps/{name}"] = values
            file[f"maps/{name}"].attrs["unit"] = UNITS[name]


def read_truth(path: str | Path) -> Truth:
    """What :func:`write_truth` wrote.

    Raises
    ------
    DataError
        The file is no truth file.
    """
    try:
        with h5py.File(path, "r") as file:
            arrays = {name: file[name][()] for name in TRUTH_ARRAYS}
            maps = {name: dataset[()] for name, dataset in file["maps"].items()}
            names = {str(k): int(v) for k, v in json.loads(file.attrs["label_names"]).items()}
            states = tuple(float(v) for v in file["states"][()])
    except (OSError, KeyError, ValueError) as error:
        raise DataError("not a truth file", where=Path(path).name, got=type(error).__name__) from None
    return Truth(maps=maps, label_names=names, states=states, **arrays)
