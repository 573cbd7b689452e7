"""Scans that broke off: kept and failed at first; a retry makes the images that can be made, or says what is missing."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gadgets.dicom import convert
from gadgets.errors import RetryFailed
from gadgets.image_file import read_images
from gadgets.journal import JobRow
from gadgets.meta import read_meta
from gadgets.retry import retry
from gadgets.service import Service, ServiceOptions
from gadgets.wire import codec
from gadgets.wire.dtypes import Flag
from gadgets.wire.events import Image
from tests.e2e.scans import Batches, SimulatedScan, ask, encoded, error, imaging_part, in_memory, noise_part, stack
from tests.e2e.test_jobs import no_server, spool_of
from tests.waiting import PATIENCE, until

Which = Callable[[NDArray[Any]], NDArray[np.bool_]]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("cut")
    options = ServiceOptions(port=0, workers=0, threads=1, spool=folder / "spool", min_free_bytes=0, rehearse=False)
    with Service(options) as running:
        yield running


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    """Three slices one after the other, two states."""
    made = in_memory("cine", matrix_x=48, matrix_y=48, coils=4, states=2, slices=3, calibration="separate", acs=16)
    headers, samples = joined(imaging_part(made))
    order = np.argsort(headers["idx"]["slice"], kind="stable")
    made.stream.batches[:] = [*noise_part(made), (headers[order], samples[order])]
    return made


def joined(batches: Batches) -> tuple[NDArray[Any], NDArray[np.complex64]]:
    return np.concatenate([h for h, _ in batches]), np.concatenate([s for _, s in batches])


def is_calibration(headers: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray((headers["flags"] >> np.uint64(Flag.ACQ_IS_PARALLEL_CALIBRATION - 1)) & np.uint64(1), bool)


def broke_off(site: Service, chain: str, scan: SimulatedScan, which: Which | None) -> JobRow:
    """The scanner goes away in the middle of a readout; ``which`` says what it has sent until then."""
    headers, samples = joined(imaging_part(scan))
    chosen = np.zeros(len(headers), bool) if which is None else which(headers)
    batches = [*noise_part(scan), *([(headers[chosen], samples[chosen])] if chosen.any() else [])]
    begun = bytes(codec.acquisitions(headers[-1:], samples[-1:]))[:-100]
    row = gone(site, codec.config_file(chain) + codec.header(scan.header) + b"".join(encoded(batches)) + begun)
    assert "in the middle of" in row.why
    return row


def gone(site: Service, session: bytes) -> JobRow:
    """The failed job of a peer that sent this and left."""
    rows = site.unattended.books.journal().rows
    assert site.unattended.books.settle(PATIENCE)
    known = {row.id for row in rows(limit=None)}
    with socket.create_connection((site.host, site.port), timeout=PATIENCE) as connection:
        connection.sendall(session)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(1 << 16):
            pass
    row: JobRow = until(lambda: next((r for r in rows(limit=None) if r.id not in known and r.is_over), None))
    assert row.state == "failed", row
    return row


def retried(site: Service, row: JobRow, **options: Any) -> tuple[JobRow, list[Image]]:
    again, path = retry(spool_of(site), row.id, here=no_server, **options)
    return again, list(read_images(path))


def refused(site: Service, row: JobRow, **options: Any) -> str:
    with pytest.raises(RetryFailed) as failure:
        retry(spool_of(site), row.id, here=no_server, **options)
    assert "IncompleteScan" in str(failure.value)
    return str(failure.value)


def comments(image: Image) -> str:
    return " | ".join(read_meta(image.attributes)["ImageComments"])


def late_in(number: int, line: int) -> Which:
    """Until this line of this slice; its calibration has come."""

    def which(headers: NDArray[Any]) -> NDArray[np.bool_]:
        idx = headers["idx"]
        before = (idx["slice"] < number) | ((idx["slice"] == number) & (idx["kspace_encode_step_1"] < line))
        return np.asarray(before | ((idx["slice"] == number) & is_calibration(headers)))

    return which


@pytest.mark.parametrize("chain", ["fourier", "cg_sense"])
def test_whole_slices_are_made_and_the_rest_is_named(site: Service, scan: SimulatedScan, chain: str) -> None:
    row = broke_off(site, chain, scan, late_in(2, 20))
    again, images = retried(site, row)
    assert (again.state, again.chain, again.n_images) == ("sent", chain, 4)
    assert sorted({int(image.header["slice"]) for image in images}) == [0, 1]
    assert error(stack(images, 2), scan.truth[:2], scan.tissue[:2]) < 0.1
    said = f"incomplete: the scan broke off after {again.n_readouts} readouts"
    assert again.warnings[0] == said
    assert any("left out as incomplete, the first: slice 2 phase 0" in warning for warning in again.warnings)
    for image in images:
        assert said in comments(image)
        assert read_meta(image.attributes)["SequenceDescriptionAdditional"] == (f"{chain}_INCOMPLETE",)
    whole = ask(site, chain, scan)
    assert not any("incomplete" in comments(image).lower() for image in whole.images)


def test_the_mark_reaches_dicom(site: Service, scan: SimulatedScan, tmp_path: Path) -> None:
    import pydicom

    row = broke_off(site, "cg_sense", scan, late_in(2, 20))
    retry(spool_of(site), row.id, here=no_server, output=tmp_path / "images.h5")
    files = convert(tmp_path / "images.h5", tmp_path / "dicom", header=scan.header).files
    assert len(files) == 4
    for file in map(pydicom.dcmread, files):
        assert "INCOMPLETE" in file.SeriesDescription and "incomplete: the scan broke off" in file.ImageComments


def test_slices_that_never_began_are_left_out(site: Service, scan: SimulatedScan) -> None:
    row = broke_off(site, "fourier", scan, lambda headers: headers["idx"]["slice"] < 2)
    again, images = retried(site, row)
    assert len(images) == 4 and any("1 of 3 announced slices never came, the first: 2" in w for w in again.warnings)


def test_without_the_centre_nothing_is_made(site: Service, scan: SimulatedScan) -> None:
    def which(headers: NDArray[Any]) -> NDArray[np.bool_]:
        return np.asarray((headers["idx"]["kspace_encode_step_1"] < 18) & ~is_calibration(headers))

    row = broke_off(site, "fourier", scan, which)
    assert "broke off before the centre of k-space" in refused(site, row)
    assert "got 18 of 48 lines" in refused(site, row, config="llr")


def test_holes_are_for_methods_that_unfold(site: Service, scan: SimulatedScan) -> None:
    """Even lines came first."""

    def which(headers: NDArray[Any]) -> NDArray[np.bool_]:
        return np.asarray((headers["idx"]["kspace_encode_step_1"] % 2 == 0) | is_calibration(headers))

    row = broke_off(site, "fourier", scan, which)
    told = refused(site, row)
    assert "are missing between others: the images would be aliased" in told and "--config" in told
    again, images = retried(site, row, config="cg_sense")
    assert len(images) == 6 and error(stack(images, 2), scan.truth, scan.tissue) < 0.15
    assert any("24 of 48 lines" in warning or "lines than expected" in warning for warning in again.warnings)


def test_outer_lines_that_are_missing_cost_resolution_only(site: Service, scan: SimulatedScan) -> None:
    row = broke_off(site, "fourier", scan, lambda headers: headers["idx"]["kspace_encode_step_1"] < 40)
    again, images = retried(site, row)
    assert len(images) == 6 and error(stack(images, 2), scan.truth, scan.tissue) < 0.15
    assert any("40 of 48 lines" in warning for warning in again.warnings)


def test_maps_come_from_the_images_that_are_there(site: Service) -> None:
    """Five of eight images after inversions, each with its own time."""
    molli = in_memory("molli", matrix_x=48, matrix_y=48, coils=4, snr=80.0)
    row = broke_off(site, "llr_t1", molli, lambda headers: headers["idx"]["set"] < 5)
    again, images = retried(site, row)
    assert again.fallback == "" and any("3 of 8 announced sets never came, the first: 5" in w for w in again.warnings)
    (t1,) = (image for image in images if read_meta(image.attributes).get("GADGETRON_DataRole") == ("T1",))
    meta = read_meta(t1.attributes)
    assert meta["SequenceDescriptionAdditional"] == ("llr_t1_T1_INCOMPLETE",)
    values = t1.data[0] * float(meta["RescaleSlope"][0])
    truth = 1e3 * molli.stream.truth.maps["t1"][0]
    inside = molli.stream.truth.interior[0] & (values > 0)
    assert inside.sum() > 0.9 * molli.stream.truth.interior[0].sum()
    assert np.median(np.abs(values - truth)[inside] / truth[inside]) < 0.05


def test_a_scan_that_was_stopped_in_order_is_retried_without_what_is_missing(site: Service, scan: SimulatedScan) -> None:
    headers, samples = joined(imaging_part(scan))
    chosen = headers["idx"]["slice"] < 2
    stream = encoded([*noise_part(scan), (headers[chosen], samples[chosen])])
    row = gone(site, codec.config_file("fourier") + codec.header(scan.header) + b"".join(stream) + codec.close())
    assert "1 of 3 announced slices never came" in row.why and "incomplete = drop" in row.why
    _, images = retried(site, row, settings={"incomplete": "drop"})
    assert len(images) == 4 and not any("incomplete: " in comments(image) for image in images)


def test_noise_alone_is_no_image_and_no_noise_scan(site: Service, scan: SimulatedScan) -> None:
    row = broke_off(site, "fourier", scan, None)
    assert "no imaging readouts" in refused(site, row)


def test_the_fallback_of_a_cut_scan_says_both(site: Service, scan: SimulatedScan) -> None:
    """Calibration without a signal: no coil maps, so the fallback answers."""
    headers, samples = joined(imaging_part(scan))
    keep = late_in(2, 20)(headers) & ~is_calibration(headers)
    silent = np.where(is_calibration(headers)[:, None, None], 0, samples)
    stream = [*noise_part(scan), (headers[keep | is_calibration(headers)], silent[keep | is_calibration(headers)])]
    row = gone(site, codec.config_file("cg_sense") + codec.header(scan.header) + b"".join(encoded(stream)))
    again, images = retried(site, row)
    assert again.fallback == "fourier" and len(images) == 4
    for image in images:
        assert "incomplete: " in comments(image) and "cg_sense failed: image from fourier instead" in comments(image)
