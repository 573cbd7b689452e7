"""Scans that a console really runs: partial Fourier, averages, reversed echoes, calibration scans, oblique and odd matrices."""

from __future__ import annotations

import re

import numpy as np
import pytest
from numpy.typing import NDArray

from gadgets.service import Service
from gadgets.simulate_header import Geometry
from recon_core.simulation.options import settings_for
from tests.e2e.scans import Batches, SimulatedScan, ask, complaints, encoded, error, in_memory, is_noise, stack


@pytest.fixture(scope="module", params=["lines", "echo"])
def partial(request: pytest.FixtureRequest) -> SimulatedScan:
    """Three quarters of the phase-encoding lines, or of each readout."""
    what = {"partial_fourier": 0.75} if request.param == "lines" else {"asymmetric_echo": 0.75}
    return in_memory("cine", matrix_x=96, matrix_y=96, coils=4, states=2, snr=200.0, **what)


@pytest.mark.parametrize("chain", ["fourier", "cg_sense"])
def test_completing_k_space_is_three_times_better_than_zeros(chain: str, service: Service, partial: SimulatedScan) -> None:
    def of(how: str) -> float:
        answer = ask(service, chain, partial, partial_fourier=how)
        assert not complaints(answer)
        return error(stack(answer.images, 2), partial.truth, partial.tissue)

    zeros = of("zero_fill")
    assert zeros > 0.05  # there is something to gain
    assert of("pocs") < zeros / 3
    assert of("homodyne") < zeros / 3


def test_partial_fourier_together_with_undersampling(service: Service) -> None:
    scan = in_memory(
        "cine",
        matrix_x=96,
        matrix_y=96,
        coils=6,
        states=2,
        snr=200.0,
        partial_fourier=0.75,
        mask="uniform",
        acceleration=2.0,
    )

    def of(how: str) -> float:
        return error(stack(ask(service, "cg_sense", scan, partial_fourier=how).images, 2), scan.truth, scan.tissue)

    assert of("pocs") < of("zero_fill") / 3


@pytest.mark.parametrize("chain", ["fourier", "cg_sense"])
def test_one_of_two_images_is_completed_by_itself(chain: str, service: Service) -> None:
    """Partial Fourier of one echo beside a complete one: it does not stay blurred, and the other keeps all its lines."""
    scan = in_memory("cine", matrix_x=96, matrix_y=96, coils=4, states=2, snr=200.0)

    def kept(headers: NDArray[np.void]) -> NDArray[np.bool_]:
        counters = headers["idx"]
        return is_noise(headers) | (counters["phase"] == 0) | (counters["kspace_encode_step_1"] >= 24)

    batches = [(headers[kept(headers)], samples[kept(headers)]) for headers, samples in scan.stream.batches]
    whole, part = (
        stack(ask(service, chain, scan, messages=messages).images, 2) for messages in (scan.messages, encoded(batches))
    )
    np.testing.assert_allclose(part[:, :1], whole[:, :1], atol=0.01 * whole.max())
    assert error(part[:, 1:], scan.truth[:, 1:], scan.tissue) < 0.02  # with zeros 0.07


def scatter(images: NDArray[np.floating], reference: NDArray[np.floating], where: NDArray[np.bool_]) -> float:
    """RMS difference inside ``where``."""
    return float(np.sqrt(((images - reference)[np.broadcast_to(where[:, None], images.shape)] ** 2).mean()))


def test_averages_reduce_noise_by_their_square_root(service: Service) -> None:
    quiet = in_memory("cine", matrix_x=64, matrix_y=64, coils=4, states=2, snr=1e5)
    level = []
    for averages in (1, 2, 4):
        scan = in_memory("cine", matrix_x=64, matrix_y=64, coils=4, states=2, snr=30.0, averages=averages)
        answer = ask(service, "cg_sense", scan)
        assert len(answer.images) == 2 and not complaints(answer)
        images, truth = stack(answer.images, 2), np.sqrt(2) * scan.truth
        level.append(scatter(images, truth, scan.tissue))
    assert error(stack(ask(service, "cg_sense", quiet).images, 2), quiet.truth, quiet.tissue) < 0.01
    assert level[0] == pytest.approx(1.0, rel=0.1)  # magnitudes of whitened data
    assert level[0] / level[1] == pytest.approx(np.sqrt(2), rel=0.1)
    assert level[0] / level[2] == pytest.approx(2.0, rel=0.15)


def test_segments_are_merged(service: Service) -> None:
    scan = in_memory("cine", matrix_x=64, matrix_y=64, coils=4, states=2, segments=16)
    assert max(int(headers["idx"]["segment"].max()) for headers, _ in scan.stream.batches) == 15
    answer = ask(service, "fourier", scan)
    assert len(answer.images) == 2 and not complaints(answer)
    assert error(stack(answer.images, 2), scan.truth, scan.tissue) < 0.03


def test_repetitions_become_images_of_their_own(service: Service) -> None:
    scan = in_memory("cine", matrix_x=64, matrix_y=64, coils=4, states=2, repetitions=3)
    answer = ask(service, "cg_sense", scan)
    assert [(int(i.header["repetition"]), int(i.header["phase"])) for i in answer.images] == [
        (repetition, phase) for repetition in range(3) for phase in range(2)
    ]
    images = stack(answer.images, 6)
    assert error(images, np.tile(scan.truth, (1, 3, 1, 1, 1)), scan.tissue) < 0.03


def test_echoes_that_are_read_backwards(service: Service) -> None:
    settings = {"matrix_x": 48, "matrix_y": 48, "partitions": 8, "coils": 4, "states": 3, "snr": 100.0}
    found = {}
    for bipolar in (False, True):
        scan = in_memory("mgre", bipolar=bipolar, **settings)
        answer = ask(service, "cg_sense", scan)
        found[bipolar] = error(stack(answer.images, 3), scan.truth, scan.tissue)
    assert found[True] < 1.1 * found[False] < 0.05


def test_calibration_lines_that_were_acquired_separately(service: Service) -> None:
    scan = in_memory(
        "cine", matrix_x=64, matrix_y=64, coils=6, states=2, mask="uniform", acceleration=2.0, calibration="separate", acs=24
    )
    answer = ask(service, "cg_sense", scan)
    assert not complaints(answer)
    assert error(stack(answer.images, 2), scan.truth, scan.tissue) < 0.06
    # they are not part of the image: plain Fourier folds
    folded = stack(ask(service, "fourier", scan).images, 2)
    assert error(folded, scan.truth, scan.tissue) > 0.2


def test_geometry_of_an_oblique_stack(service: Service) -> None:
    where = {"orientation": "oblique", "offset_read": 0.02, "offset_phase": -0.03, "offset_slice": 0.05}
    scan = in_memory("cine", matrix_x=48, matrix_y=64, fov_x=0.30, fov_y=0.36, coils=4, states=1, slices=3, **where)
    expected = Geometry.of(settings_for("cine", where))
    answer = ask(service, "fourier", scan)
    assert sorted(int(i.header["slice"]) for i in answer.images) == [0, 1, 2]
    for image in answer.images:
        header = image.header
        for name in ("read_dir", "phase_dir", "slice_dir"):
            np.testing.assert_allclose(header[name], getattr(expected, name), atol=1e-6)
        shift = (int(header["slice"]) - 1) * 10.0  # mm: thickness and gap
        np.testing.assert_allclose(header["position"], expected.position + shift * expected.slice_dir, atol=1e-3)
        np.testing.assert_allclose(header["field_of_view"], [300.0, 360.0, 8.0], atol=1e-3)
        assert tuple(header["matrix_size"]) == (48, 64, 1)
    images = np.concatenate([stack([i], 1) for i in sorted(answer.images, key=lambda i: int(i.header["slice"]))])
    assert error(images, scan.truth, scan.tissue) < 0.05
    assert error(images[::-1], scan.truth, scan.tissue) > 0.1  # each slice where it belongs


def with_recon_space(header: str, matrix: tuple[int, int, int], fov: tuple[float, float, float]) -> str:
    """The header with another reconstructed matrix ``(x, y, z)`` and field of view in mm."""

    def axes(values: tuple[float, ...]) -> str:
        return "".join(f"<{name}>{value}</{name}>" for name, value in zip("xyz", values, strict=True))

    space = f"<reconSpace><matrixSize>{axes(matrix)}</matrixSize><fieldOfView_mm>{axes(fov)}</fieldOfView_mm></reconSpace>"
    return re.sub(r"<reconSpace>.*</reconSpace>", space, header)


@pytest.mark.parametrize("chain", ["fourier", "cg_sense"])
def test_phase_oversampling_is_cut_off(chain: str, service: Service, full_cine: SimulatedScan) -> None:
    whole = ask(service, chain, full_cine)
    header = with_recon_space(full_cine.header, (64, 48, 1), (340.0, 255.0, 8.0))
    cut = ask(service, chain, full_cine, header=header)
    assert tuple(cut.images[0].header["matrix_size"]) == (64, 48, 1)
    np.testing.assert_allclose(cut.images[0].header["field_of_view"], [340.0, 255.0, 8.0])
    np.testing.assert_allclose(stack(cut.images, 4), stack(whole.images, 4)[..., 8:56, :], rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("chain", ["fourier", "cg_sense"])
def test_interpolation_keeps_what_was_measured(chain: str, service: Service, full_cine: SimulatedScan) -> None:
    plain = stack(ask(service, chain, full_cine).images, 4)
    header = with_recon_space(full_cine.header, (128, 128, 1), (340.0, 340.0, 8.0))
    answer = ask(service, chain, full_cine, header=header)
    assert tuple(answer.images[0].header["matrix_size"]) == (128, 128, 1)
    fine = stack(answer.images, 4)
    # every second pixel lies where a pixel was, up to the Nyquist line, which interpolation splits
    assert error(fine[..., ::2, ::2], plain, full_cine.tissue) < 0.02
    assert np.linalg.norm(fine[..., ::2, ::2]) == pytest.approx(np.linalg.norm(plain), rel=0.02)


def with_short_readouts(scan: SimulatedScan, first_samples: dict[int, int]) -> list[bytes]:
    """The scan's messages, without so many samples at the beginning of each readout of some phases (asymmetric echo)."""
    cut: Batches = []
    for headers, samples in scan.stream.batches:
        lost = np.where(is_noise(headers), 0, [first_samples.get(int(phase), 0) for phase in headers["idx"]["phase"]])
        for n in np.unique(lost).tolist():
            part = headers[lost == n].copy()
            part["number_of_samples"] -= n
            part["center_sample"] -= n
            cut.append((part, np.ascontiguousarray(samples[lost == n][..., n:])))
    return encoded(cut)


@pytest.mark.parametrize("chain", ["fourier", "cg_sense"])
def test_one_asymmetric_echo_leaves_the_others_whole(chain: str, service: Service) -> None:
    scan = in_memory("cine", matrix_x=96, matrix_y=96, coils=4, states=2, snr=400.0)
    whole = stack(ask(service, chain, scan).images, 2)
    answer = ask(service, chain, scan, messages=with_short_readouts(scan, {0: 40}))
    assert not complaints(answer)
    images = stack(answer.images, 2)
    for state, least, most in ((0, 0.001, 0.03), (1, 0.0, 0.001)):
        assert least <= error(images[:, [state]], whole[:, [state]], scan.tissue) < most
