"""A scanner that exists as a program: plays a Pulseq ``.seq`` on a phantom with MRzeroCore and writes MRD raw data.

    python -m tests.prospective.scanner scan.seq phantom.json raw.h5 --matrix 20 28 32 --noise 0.01

MRzeroCore (AGPL) is used here alone, in a process of its own, and nothing of the product is: neither the mask nor the header
that was written with the sequence is read. What is played, and under which labels, comes from the ``.seq``. As on real scanners,
the header of the raw data knows nothing of the sequence's matrix.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import ismrmrd
import ismrmrd.xsd as xsd
import numpy as np
import pypulseq as pp
import torch
from numpy.typing import NDArray

from tests.prospective import phantom as ph

NOISE_BANDWIDTH = 0.793
STATES, LEAST = 100, 0.003
"""Of the phase graph: configurations that are followed, and the least weight of one that is simulated. Spoiling leaves few."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seq", type=Path)
    parser.add_argument("phantom", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--matrix", type=int, nargs=3, required=True, help="simulated voxels along z, y and x")
    parser.add_argument(
        "--noise", type=float, default=0.0, help="SD of each real number, over the RMS of the largest readout"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--trajectory", type=Path, help="also write what was played: .npz")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    played = pp.Sequence(pp.Opts(rf_ringdown_time=30e-6, rf_dead_time=100e-6, adc_dead_time=10e-6))
    played.read(str(options.seq), detect_rf_use=False)
    object_ = ph.Phantom.load(options.phantom)
    signal, trajectory = simulate(options.seq, played, object_, tuple(options.matrix))
    if options.trajectory is not None:
        np.savez(options.trajectory, **trajectory)
    write_raw(options.out, played, object_, signal, options.noise, options.seed)


def simulate(
    seq: Path, played: pp.Sequence, phantom: ph.Phantom, matrix: tuple[int, int, int]
) -> tuple[NDArray[np.complex64], dict[str, Any]]:
    """Signal ``(sample, coil)`` of everything after the first pulse, and the trajectory that made it."""
    import MRzeroCore as mr0

    sequence = mr0.Sequence.import_file(str(seq))
    fov = tuple(float(v) for v in np.atleast_1d(played.definitions["FOV"])[::-1])
    data = _object(mr0, phantom, matrix, fov)
    graph = mr0.compute_graph(sequence, data, STATES, 1e-3)
    signal = mr0.execute_graph(graph, sequence, data, LEAST, LEAST, print_progress=False)
    k = sequence.get_kspace().numpy()  # 1/m and, in the last column, s since the pulse
    shots = np.concatenate([np.full(int((rep.adc_usage > 0).sum()), i) for i, rep in enumerate(sequence)])
    angles = np.array([float(rep.pulse.angle) for rep in sequence])
    phases = np.array([float(rep.pulse.phase) for rep in sequence])
    spacing = np.array([float(rep.event_time.sum()) for rep in sequence])
    found = {"k": k[:, :3], "time": k[:, 3], "shot": shots, "flip_angle": angles, "rf_phase": phases, "tr": spacing}
    return signal.numpy().astype(np.complex64), found


def _object(mr0: Any, phantom: ph.Phantom, matrix: tuple[int, int, int], fov: tuple[float, ...]) -> Any:
    """MRzero's data, axes ``(x, y, z)``.

    Its signal is ``sum m exp(-2 pi i (k r + f t))``, as spins precess: an inverse FFT puts everything where it is, and a higher frequency
    makes the phase of the images go down.
    """
    fraction, frequency, rate = ph.voxel_means(phantom, matrix, fov)  # type: ignore[arg-type]
    place = ph.grid(matrix, fov)  # type: ignore[arg-type]
    coils = ph.coil_maps(phantom, place)

    def turned(values: NDArray[Any], dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(np.moveaxis(values, (-3, -2, -1), (-1, -2, -3)))).to(dtype)

    ones = np.ones(matrix)
    voxel_mm = [1e3 * length / n for length, n in zip(fov[::-1], matrix[::-1], strict=True)]
    built = mr0.VoxelGridPhantom(
        PD=turned(fraction), T1=turned(phantom.t1 * ones), T2=turned(ones / ph.R2), T2dash=turned(1.0 / (rate - ph.R2)),
        D=turned(0.0 * ones), B0=turned(frequency), B1=turned(ones[None]), coil_sens=turned(coils, torch.complex64),
        affine=torch.diag(torch.tensor([*voxel_mm, 1.0]))[:3],
    ).build(PD_threshold=1e-3)  # fmt: skip
    built.D = torch.zeros(1)  # nothing diffuses: one value for all voxels, which halves the time
    return built


def write_raw(
    out: Path, played: pp.Sequence, phantom: ph.Phantom, signal: NDArray[np.complex64], noise: float, seed: int
) -> None:
    """Readouts in the order of the ``.seq`` under its labels. Those labelled NOISE have noise alone."""
    labels = played.evaluate_labels(evolution="adc")
    adcs = [(n, played.get_block(n).adc) for n in played.block_events if played.block_events[n][5]]
    times = np.cumsum([0.0, *(played.block_durations[n] for n in played.block_events)])
    rng = np.random.default_rng(seed)
    n_coils = signal.shape[1]
    level = noise * np.sqrt((np.abs(signal) ** 2).mean(axis=1).max())
    out.unlink(missing_ok=True)
    dataset = ismrmrd.Dataset(str(out), "dataset")
    dataset.write_xml_header(_wrong_header(phantom, n_coils))
    at = 0
    for number, (block, adc) in enumerate(adcs):
        n = int(adc.num_samples)
        is_noise = bool(labels["NOISE"][number]) if "NOISE" in labels else False
        samples = np.zeros((n_coils, n), np.complex64)
        if not is_noise:
            samples += signal[at : at + n].T
            at += n
        samples += level * (rng.normal(size=samples.shape) + 1j * rng.normal(size=samples.shape)).astype(np.complex64)
        readout = ismrmrd.Acquisition.from_array(samples)
        readout.sample_time_us, readout.center_sample = adc.dwell * 1e6, n // 2
        readout.scan_counter = number + 1
        readout.acquisition_time_stamp = round(times[block - 1] / 2.5e-3)
        readout.read_dir[:], readout.phase_dir[:], readout.slice_dir[:] = (1, 0, 0), (0, 1, 0), (0, 0, 1)
        readout.available_channels = n_coils
        if is_noise:
            readout.setFlag(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
        else:
            readout.idx.kspace_encode_step_1 = int(labels["LIN"][number])
            readout.idx.kspace_encode_step_2 = int(labels["PAR"][number])
            readout.idx.contrast = int(labels["ECO"][number])
        dataset.append_acquisition(readout)
    dataset.close()
    if at != len(signal):
        raise SystemExit(f"{len(signal)} samples simulated, {at} expected by the sequence file")


def _wrong_header(phantom: ph.Phantom, n_coils: int) -> str:
    """What a converter makes of a protocol that knows nothing of the sequence: a 2D matrix of the wrong size, one echo time."""
    space = xsd.encodingSpaceType(
        matrixSize=xsd.matrixSizeType(x=128, y=256, z=2), fieldOfView_mm=xsd.fieldOfViewMm(x=300, y=300, z=5)
    )
    none = {name: xsd.limitType(minimum=0, maximum=0, center=0) for name in ("slice", "contrast", "average", "repetition")}
    limits = xsd.encodingLimitsType(kspace_encoding_step_1=xsd.limitType(minimum=0, maximum=127, center=64), **none)
    header = xsd.ismrmrdHeader(
        measurementInformation=xsd.measurementInformationType(
            measurementID="prospective_1", patientPosition=xsd.patientPositionType.HFS, protocolName="pulseq"
        ),
        acquisitionSystemInformation=xsd.acquisitionSystemInformationType(
            systemVendor="simulated", systemFieldStrength_T=phantom.field_strength, receiverChannels=n_coils,
            relativeReceiverNoiseBandwidth=NOISE_BANDWIDTH,
        ),
        experimentalConditions=xsd.experimentalConditionsType(H1resonanceFrequency_Hz=round(ph.GAMMA * phantom.field_strength)),
        encoding=[xsd.encodingType(encodedSpace=space, reconSpace=space, encodingLimits=limits, trajectory=xsd.trajectoryType.OTHER)],
        sequenceParameters=xsd.sequenceParametersType(TR=[10.0], TE=[5.0]),
    )  # fmt: skip
    return str(xsd.ToXML(header))


if __name__ == "__main__":
    main()
