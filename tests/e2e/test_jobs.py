"""Jobs on a real server: journal, retries, a disk without room, and images that find their way to a real archive by themselves."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from pydicom import Dataset, dcmread
from pydicom.uid import MRImageStorage, ParametricMapStorage
from typer.testing import CliRunner

from gadgets.cli import app
from gadgets.dicom_identity import DicomError
from gadgets.errors import CaptureGone, ImageFileError, MissingExtra, RetryFailed
from gadgets.fair_queue import HOUSEKEEPING, REPLAY, SCAN
from gadgets.image_file import read_images
from gadgets.jobs_cli import archives
from gadgets.journal import JobRow, Journal, UnknownJob
from gadgets.monitor.folder import Folder, Status
from gadgets.pacs import Destination, PacsError
from gadgets.pacs_queue import Queue
from gadgets.pacs_sender import Sender
from gadgets.replay import replay
from gadgets.results import Archives
from gadgets.retry import retry
from gadgets.service import Service, ServiceOptions, reconstruct_row
from gadgets.wire import codec
from recon_core.errors import SettingError
from tests.e2e.orthanc import AET, orthanc
from tests.e2e.scans import SimulatedScan, ask, complaints, in_memory, stack
from tests.gadgets.certificates import authority
from tests.ports import free_ports
from tests.strict_client import Answer
from tests.waiting import PATIENCE, until

PATIENT = "Zuzana^Nowak"


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    return in_memory("cine", matrix_x=32, matrix_y=32, coils=4, states=2, slices=2, calibration="separate", acs=16)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A server that runs unattended."""
    folder = tmp_path_factory.mktemp("site")
    options = ServiceOptions(
        port=0,
        workers=1,
        threads=1,
        spool=folder / "spool",
        noise=folder / "noise",
        min_free_bytes=0,
        keep_images=True,
        rehearse=False,
    )
    with Service(options) as running:
        yield running


def spool_of(service: Service) -> Path:
    assert service.spool.root is not None
    return service.spool.root


def newest(service: Service) -> JobRow:
    """The row of the newest scan, when it is over and written."""

    def look() -> JobRow | None:
        assert service.unattended.books.settle(PATIENCE)
        rows = [row for row in service.unattended.books.journal().rows() if ".r" not in row.id]
        captures = service.spool.captures()
        return rows[0] if rows and rows[0].is_over and rows[0].id == captures[-1].stem else None

    row: JobRow = until(look)
    return row


def file_stack(path: Path) -> np.ndarray:
    return stack(list(read_images(path)), 2)


def asked(service: Service, scan: SimulatedScan, chain: str = "cg_sense", **overrides: object) -> tuple[Answer, JobRow]:
    answer = ask(service, chain, scan, **overrides)
    return answer, newest(service)


def no_server(row: JobRow) -> JobRow:
    raise AssertionError("a server runs: it is the one to do it")


# -- rows and retries ------------------------------------------------------------------------------------------------------------


def test_a_scan_has_its_row_and_its_images(site: Service, scan: SimulatedScan) -> None:
    answer, row = asked(site, scan, iterations=7)
    assert (row.state, row.chain, row.n_images, row.fallback, row.warnings) == ("sent", "cg_sense", 4, "", ())
    assert row.n_readouts == sum(len(headers) for headers, _ in scan.stream.batches)
    assert row.settings["method"]["iterations"] == 7 and row.settings["name"] == "cg_sense"
    assert row.settings["preprocess"]["virtual_coils"]
    images = until(lambda: row.images(spool_of(site)))
    np.testing.assert_array_equal(file_stack(images), stack(answer.images, 2))


def test_a_retry_by_the_server_gives_the_same_images(site: Service, scan: SimulatedScan, tmp_path: Path) -> None:
    answer, row = asked(site, scan, iterations=7)
    again, images = retry(spool_of(site), row.id, here=no_server)
    assert again.origin == f"retry of {row.id}" and again.settings == row.settings
    np.testing.assert_array_equal(file_stack(images), stack(answer.images, 2))
    other, images = retry(spool_of(site), row.id, config="fourier", output=tmp_path / "o.h5", here=no_server)
    assert images == tmp_path / "o.h5" and other.chain == "fourier" and other.settings["name"] == "fourier"
    straight = ask(site, "fourier", scan)
    np.testing.assert_array_equal(file_stack(images), stack(straight.images, 2))
    with pytest.raises(ImageFileError, match="exists"):
        retry(spool_of(site), row.id, output=tmp_path / "o.h5", here=no_server)


def without_calibration(scan: SimulatedScan, slices: tuple[int, ...] = (0, 1)) -> Iterator[bytes]:
    """The calibration lines are zero: coil maps cannot be had."""
    for headers, samples in scan.stream.batches:
        calibration = (headers["flags"] & np.uint64(1 << 19)) != 0
        calibration &= np.isin(headers["idx"]["slice"], slices)
        yield bytes(codec.acquisitions(headers, np.where(calibration[:, None, None], 0, samples)))


def test_a_fallback_is_in_the_row(site: Service, scan: SimulatedScan) -> None:
    answer = ask(site, "cg_sense", scan, messages=without_calibration(scan))
    row = newest(site)
    assert (row.state, row.fallback, row.n_images) == ("sent", "fourier", 4)
    assert [f"WRN {warning}" for warning in row.warnings] == [text.strip() for text in complaints(answer)]


def test_retries_that_cannot_be(site: Service, scan: SimulatedScan) -> None:
    _, row = asked(site, scan, "fourier")
    root = spool_of(site)
    with pytest.raises(UnknownJob):
        retry(root, "nonsense", here=no_server)
    with pytest.raises(RetryFailed, match="no such chain"):
        retry(root, row.id, config="../../etc/passwd", here=no_server)
    with pytest.raises(RetryFailed, match="no_such_setting"):
        retry(root, row.id, config="fourier", settings={"no_such_setting": "1"}, here=no_server)
    (root / row.capture).unlink()
    with pytest.raises(CaptureGone, match="removed"):
        retry(root, row.id, here=no_server)


def test_images_of_a_client_that_left_are_made_anyway(site: Service, scan: SimulatedScan) -> None:
    expected = ask(site, "cg_sense", scan)
    before = newest(site)
    known = captures(site)
    session = codec.config_file("cg_sense") + codec.header(scan.header) + b"".join(scan.messages) + codec.close()
    with socket.create_connection((site.host, site.port)) as connection:
        connection.sendall(session)
        until(lambda: any(path.stat().st_size == len(session) for path in captures(site) - known))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    row = until(lambda: next((r for r in [newest(site)] if r.id != before.id), None))
    assert row.state == "sent"
    images = until(lambda: row.images(spool_of(site)))
    np.testing.assert_array_equal(file_stack(images), stack(expected.images, 2))


def captures(service: Service) -> set[Path]:
    """Also of scans that are still coming."""
    return set(spool_of(service).glob("*.mrd"))


def test_without_a_server_a_retry_runs_here(site: Service, scan: SimulatedScan, tmp_path: Path) -> None:
    answer, row = asked(site, scan, "fourier")
    root = tmp_path / "spool"
    root.mkdir()
    for name in (row.capture, f"{row.id}.json"):
        (root / name).write_bytes((spool_of(site) / name).read_bytes())
    journal = Journal(root)
    journal.put(row)
    journal.close()
    options = ServiceOptions(
        port=0, workers=0, threads=1, spool=root, noise=tmp_path / "noise", min_free_bytes=0, rehearse=False
    )
    again, images = retry(root, row.id[:20], here=lambda waiting: reconstruct_row(options, waiting))
    assert again.state == "sent" and again.attempts == 1
    np.testing.assert_array_equal(file_stack(images), stack(answer.images, 2))
    assert not list(root.glob(".owner*"))


@pytest.mark.parametrize(("behind", "priority"), [(True, REPLAY), (False, SCAN)])
def test_a_replay_is_computed_behind_scanners_where_it_says_so(
    site: Service, scan: SimulatedScan, behind: bool, priority: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, row = asked(site, scan, "fourier")
    scope, seen = site.jobs.scope, list[int]()
    monkeypatch.setattr(site.jobs, "scope", lambda chosen=SCAN: seen.append(chosen) or scope(chosen))
    done = replay(spool_of(site) / row.capture, port=site.port, behind=behind)
    assert done.n_images == 4
    # the job before may still have its images to put away
    assert next(chosen for chosen in seen if chosen != HOUSEKEEPING) == priority


def test_commands(site: Service, scan: SimulatedScan, tmp_path: Path) -> None:
    _, row = asked(site, scan, "fourier")
    command, place = CliRunner(), ["--spool", str(spool_of(site))]
    until(lambda: not site.unattended.books.journal().rows(state="received"))  # of the tests before
    until(lambda: not site.unattended.books.journal().rows(state="reconstructing"))
    done = command.invoke(app, ["jobs", *place, "--limit", "0"], env={"COLUMNS": "250"})
    assert done.exit_code == 0 and row.id in done.output and "0 received, 0 reconstructing" in done.output
    done = command.invoke(app, ["jobs", *place, "--json", "--state", "sent", "--limit", "1"])
    [document] = json.loads(done.output)
    assert (document["id"], document["state"], document["raw_kept"]) == (row.id, "sent", True)
    assert document["settings"]["name"] == "fourier"
    done = command.invoke(app, ["jobs", *place, "--state", "lost"])
    assert done.exit_code == 2
    done = command.invoke(app, ["retry", row.id, *place, "-o", str(tmp_path / "o.h5"), "--set", "combine=adaptive"])
    assert done.exit_code == 0 and "4 images in" in done.output, done.output
    assert len(list(read_images(tmp_path / "o.h5"))) == 4
    assert isinstance(command.invoke(app, ["jobs", "--spool", str(tmp_path)]).exception, Exception)


# -- a disk without room -----------------------------------------------------------------------------------------------------------


def test_above_the_watermark_nothing_is_captured_but_scans_go_on(
    site: Service, scan: SimulatedScan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert site.unattended.books.settle(PATIENCE)
    before = {row.id for row in site.unattended.books.journal().rows(limit=None)}
    captures = site.spool.captures()
    state = os.statvfs(spool_of(site))
    monkeypatch.setattr(site.spool, "min_free_bytes", state.f_bavail * state.f_frsize + (1 << 40))
    with caplog.at_level(logging.ERROR):
        answer = ask(site, "fourier", scan)
        assert len(answer.images) == 4
        assert any("raw data of this scan are not kept" in text for text in complaints(answer))
        rows = site.unattended.books.journal().rows
        row = until(lambda: next((r for r in rows() if r.id not in before and r.is_over), None))
    assert "event=spool_full" in caplog.text
    assert (row.state, row.capture, row.n_images) == ("sent", "", 4)
    assert any("not kept" in warning for warning in row.warnings)
    assert site.spool.captures() == captures, "others' captures are not what fills this disk"
    assert not (spool_of(site) / row.folder).exists()
    with pytest.raises(CaptureGone, match="not kept"):
        retry(spool_of(site), row.id, here=no_server)


def test_captures_go_by_age_and_rows_stay(site: Service, scan: SimulatedScan, monkeypatch: pytest.MonkeyPatch) -> None:
    _, row = asked(site, scan, "fourier")
    root = spool_of(site)
    until(lambda: row.images(root))
    yesterday = time.time() - 1.1 * 86400
    os.utime(root / f"{row.id}.json", (yesterday, yesterday))
    monkeypatch.setattr(site.spool, "max_age", 86400.0)
    monkeypatch.setattr(site.spool, "_counted", float("-inf"))  # as it is a minute later
    site.spool.make_room()
    assert not (root / row.capture).exists() and not (root / row.folder).exists()
    assert site.unattended.books.journal().row(row.id) == row
    status = Status({"server": site._describe(), "pid": os.getpid()}, time.time())
    assert ("age", "complete", 1) in status.server["evicted"]


# -- to the archive ------------------------------------------------------------------------------------------------------------------


def named(scan: SimulatedScan) -> str:
    subject = f"<subjectInformation><patientName>{PATIENT}</patientName><patientID>4711</patientID></subjectInformation>"
    return scan.header.replace("<measurementInformation>", subject + "<measurementInformation>", 1)


@dataclass
class Archiving:
    """A server that sends images to an archive at ``ports``, where nobody listens yet."""

    service: Service
    ports: list[int]
    queue: Path

    def row(self, archive: str, known: set[str]) -> JobRow:
        """The new row that has come so far."""
        rows = self.service.unattended.books.journal().rows
        found: JobRow = until(lambda: next((r for r in rows() if r.archive == archive and r.id not in known), None))
        return found

    def known(self) -> set[str]:
        assert self.service.unattended.books.settle(PATIENCE)
        return {row.id for row in self.service.unattended.books.journal().rows()}


@pytest.fixture(scope="module")
def archiving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Archiving]:
    folder, ports = tmp_path_factory.mktemp("archiving"), free_ports(2)
    sent_to = Archives((Destination("127.0.0.1", ports[1], AET),), folder / "pacs")
    options = ServiceOptions(
        port=0, workers=0, threads=1, spool=folder / "spool", min_free_bytes=0, archives=sent_to, rehearse=False
    )
    with Service(options) as running:
        yield Archiving(running, ports, sent_to.queue)


def test_images_reach_the_archive_by_themselves(
    archiving: Archiving, scan: SimulatedScan, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service, header = archiving.service, named(scan)
    assert PATIENT in header
    with caplog.at_level(logging.INFO):
        # the archive is down: the console has its images all the same
        known = archiving.known()
        answer = ask(service, "fourier", scan, header=header)
        assert len(answer.images) == 4 and not complaints(answer)
        row = archiving.row("queued", known)
        assert row.state == "sent"
        with orthanc(tmp_path / "orthanc", archiving.ports) as archive:
            for job in Queue(archiving.queue).jobs():  # the pause after a vain attempt would be a matter of patience
                until(lambda job=job: retried(archiving.queue, job.id))
            until(lambda: sum(map(len, archive.uids().values())) == 4)
            assert archiving.row("stored", known).id == row.id
            assert archive.json("/patients?expand")[0]["MainDicomTags"]["PatientName"] == PATIENT
            # once more: the same series, not another one
            again, _ = retry(spool_of(service), row.id, here=no_server)
            assert again.archive == "" and sum(map(len, archive.uids().values())) == 4
            known = archiving.known()
            assert len(ask(service, "fourier", scan, header=header).images) == 4
            archiving.row("stored", known)
            assert not list((archiving.queue / "waiting").iterdir())
            assert sum(map(len, archive.uids().values())) == 4, "the same images are the same objects"
    assert PATIENT not in caplog.text and "Nowak" not in caplog.text


def retried(queue: Path, name: str) -> bool:
    """Make a job due; the sending process holds the queue while it tries."""
    from gadgets.pacs_queue import QueueBusy

    try:
        if any(job.id == name for job in Queue(queue).jobs()):
            Queue(queue).retry(name)
    except QueueBusy:
        return False
    return True


def test_images_that_were_due_when_a_server_died_are_queued_by_another(archiving: Archiving, scan: SimulatedScan) -> None:
    known = archiving.known()
    ask(archiving.service, "fourier", scan)
    row = archiving.row("queued", known)
    jobs = {job.id for job in Queue(archiving.queue).jobs()}
    archiving.service.unattended.books.journal().update(row.id, archive="due", owner="sdead")
    [job] = until(lambda: [job for job in Queue(archiving.queue).jobs() if job.id not in jobs])
    assert job.n_files == 4 and archiving.row("queued", known).id == row.id
    [backlog] = Folder(spool_of(archiving.service)).backlog(Status({"server": archiving.service._describe()}, time.time()))
    assert backlog.archive == "1" and backlog.waiting == len(jobs) + 1


def test_a_queue_that_cannot_be_used_fails_no_scan(archiving: Archiving, scan: SimulatedScan) -> None:
    aside = archiving.queue.with_name("aside")
    archiving.queue.rename(aside)
    archiving.queue.write_text("in the way")
    try:
        known = archiving.known()
        answer = ask(archiving.service, "fourier", scan)
        assert len(answer.images) == 4 and not complaints(answer)
        row = archiving.row("failed", known)
    finally:
        archiving.queue.unlink()
        aside.rename(archiving.queue)
    assert row.state == "sent" and any("not sent to the archive" in warning for warning in row.warnings)
    assert row.images(spool_of(archiving.service))


@pytest.mark.parametrize("told", ["scan", "recovered"])
def test_images_for_an_archive_wait_for_room_on_the_disk(
    told: str, archiving: Archiving, scan: SimulatedScan, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("gadgets.results.FIRST_PAUSE", 0.0)
    service, known = archiving.service, archiving.known()
    results, journal = service.unattended.results, service.unattended.books.journal()
    assert results is not None

    def full(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))

    with monkeypatch.context() as patched:
        patched.setattr("gadgets.pacs_queue.shutil.copyfile", full)
        ask(service, "fourier", scan)
        row = archiving.row("due", known)
        until(lambda: "event=images_later" in caplog.text)
        if told == "recovered":  # its server died before any of that
            journal.update(row.id, state="reconstructing", owner="sdead")
            service.unattended.wake()
            until(lambda: caplog.text.count("event=images_later") > 1)
            until(lambda: journal.row(row.id).state == "sent")
        assert "no room for DICOM files; got No space left on device" in caplog.text
    until(lambda: results.catch_up(journal) or journal.row(row.id).archive == "queued")
    assert not journal.row(row.id).warnings


def queued_by(archiving: Archiving, known: set[str]) -> list[Dataset]:
    """The objects of the one transfer that is not among ``known``, once it waits."""
    waiting = archiving.queue / "waiting"
    [name] = until(lambda: {job.id for job in Queue(archiving.queue).jobs()} - known)
    return [dcmread(path) for path in sorted((waiting / name).glob("*.dcm"))]


def test_images_of_a_stand_in_say_so_in_the_archive(archiving: Archiving, scan: SimulatedScan) -> None:
    known = {job.id for job in Queue(archiving.queue).jobs()}
    answer = ask(archiving.service, "cg_sense", scan, messages=without_calibration(scan, (1,)))
    assert len(answer.images) == 4 and "come from fourier" in complaints(answer)[0]
    objects = queued_by(archiving, known)
    series: dict[str, list[Dataset]] = {}
    for one in objects:
        series.setdefault(str(one.SeriesInstanceUID), []).append(one)
    asked, stood_in = sorted(series.values(), key=lambda images: "instead_of" in images[0].SeriesDescription)
    assert len(asked) == len(stood_in) == 2
    for one in asked:
        assert one.SeriesDescription.split()[0] == "cg_sense" and "failed" not in one.get("ImageComments", "")
    for one in stood_in:
        assert one.SeriesDescription.startswith("fourier_instead_of_cg_sense")
        assert "cg_sense failed: image from fourier instead" in one.ImageComments


@pytest.mark.parametrize("wanted", [True, False])
def test_maps_go_to_the_archive_also_as_parametric_maps_where_the_site_wants_it(tmp_path: Path, wanted: bool) -> None:
    head = in_memory("mgre", matrix_x=24, matrix_y=24, partitions=8, coils=4, states=4)
    ports = free_ports(2)
    sent_to = Archives((Destination("127.0.0.1", ports[1], AET),), tmp_path / "pacs", parametric_maps=wanted)
    options = ServiceOptions(
        port=0, workers=0, threads=1, spool=tmp_path / "spool", min_free_bytes=0, archives=sent_to, rehearse=False
    )
    with Service(options) as running:
        site = Archiving(running, ports, sent_to.queue)
        answer = ask(running, "fourier", head, maps="r2star", header=named(head))
        assert answer.images and not complaints(answer)
        row = site.row("queued", set())
        objects = queued_by(site, set())
        with orthanc(tmp_path / "orthanc", ports) as archive:
            until(lambda: retried(site.queue, Queue(site.queue).jobs()[0].id))
            until(lambda: not list((site.queue / "waiting").iterdir()))
            assert set().union(*archive.uids().values()) == {str(one.SOPInstanceUID) for one in objects}
    maps = [one for one in objects if one.SOPClassUID == ParametricMapStorage]
    classic = [one for one in objects if one.SOPClassUID == MRImageStorage and one.ImageType[0] == "DERIVED"]
    assert [one.ImageType[-1] for one in classic].count("R2STAR") == 8 and not row.warnings
    described = {str(one.SeriesDescription).split()[0] for one in classic}
    assert sorted(str(one.SeriesDescription) for one in maps) == sorted(f"{d} parametric map" for d in described if wanted)
    for one in maps:
        assert one.NumberOfFrames == 8 and one.StudyInstanceUID == classic[0].StudyInstanceUID
        assert one.PatientName == PATIENT
    assert bool(maps) is wanted


def test_maps_that_cannot_be_converted_keep_no_image_from_the_archive(
    archiving: Archiving, scan: SimulatedScan, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise DicomError("for the test", where="a map")

    monkeypatch.setattr("gadgets.dicom._add_parametric_maps", broken)
    monkeypatch.setattr(
        archiving.service.unattended.results, "_archives", replace(archives_of(archiving), parametric_maps=True)
    )
    known, before = archiving.known(), {job.id for job in Queue(archiving.queue).jobs()}
    assert len(ask(archiving.service, "fourier", scan).images) == 4
    row = archiving.row("queued", known)
    assert len(queued_by(archiving, before)) == 4
    assert row.warnings == ("not sent to the archive: Parametric Maps: DicomError: a map: for the test",)


def archives_of(archiving: Archiving) -> Archives:
    found = archiving.service.options.archives
    assert found is not None
    return found


def test_what_the_command_line_says_about_archives(tmp_path: Path) -> None:
    authority(tmp_path)
    assert archives(tmp_path / "spool", None, "RECONGADGETS", False, None, None, None) is None
    found = archives(tmp_path / "spool", ["A@127.0.0.1:104", "B@[::1]:105"], "US", False, tmp_path / "ca.pem", None, None)
    assert found is not None and found.queue == tmp_path / "pacs"
    assert [(d.aet, d.host, d.port, d.calling_aet) for d in found.destinations] == [
        ("A", "127.0.0.1", 104, "US"),
        ("B", "::1", 105, "US"),
    ]
    assert all(d.tls is not None and d.tls.ca == str(tmp_path / "ca.pem") for d in found.destinations)
    assert all(d.tls is not None and d.tls.server_name is None for d in found.destinations) and not found.parametric_maps
    found = archives(None, ["A@10.0.0.5:104"], "US", True, None, None, None, "pacs.example", parametric_maps=True)
    assert found is not None and found.parametric_maps
    assert found.destinations[0].tls is not None and found.destinations[0].tls.server_name == "pacs.example"
    with pytest.raises(PacsError, match="AET@HOST:PORT"):
        archives(None, ["nonsense"], "US", False, None, None, None)
    with pytest.raises(PacsError, match=r"none\.pem.*cannot use the TLS files.*No such file"):
        archives(None, ["A@127.0.0.1:104"], "US", False, tmp_path / "none.pem", None, None)


def test_what_belongs_to_an_archive_needs_one(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"no archive to send to.*--pacs-tls, --pacs-ca.*--pacs AET@host:port"):
        archives(tmp_path / "spool", None, "US", True, tmp_path / "ca.pem", None, None)
    with pytest.raises(SettingError, match="--pacs-parametric-maps"):
        archives(tmp_path / "spool", [], "US", False, None, None, None, parametric_maps=True)


def test_serve_hands_its_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[ServiceOptions] = []

    def service(options: ServiceOptions, hurry: object) -> None:
        seen.append(options)
        raise SettingError("far enough for the test")

    monkeypatch.setattr("gadgets.service.Service", service)
    place = ["--spool", str(tmp_path / "spool"), "--pacs", "A@127.0.0.1:104"]
    for chosen in ([], ["--pacs-parametric-maps", "--pacs-tls-name", "pacs.example"]):
        done = CliRunner().invoke(app, ["serve", *place, *chosen])
        assert isinstance(done.exception, SettingError)
    plain, other = (options.archives for options in seen)
    assert plain is not None and other is not None
    assert not plain.parametric_maps and plain.destinations[0].tls is None
    assert other.parametric_maps and other.destinations[0].tls is not None
    assert other.destinations[0].tls.server_name == "pacs.example"
    assert other.queue == plain.queue == tmp_path / "pacs"


def test_parametric_maps_need_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said when the server starts, and not after the first scan."""
    monkeypatch.setitem(sys.modules, "highdicom", None)
    with pytest.raises(MissingExtra, match=r"highdicom.*recon-gadgets\[dicom\]"):
        archives(tmp_path / "spool", ["A@127.0.0.1:104"], "US", False, None, None, None, parametric_maps=True)
    assert archives(tmp_path / "spool", ["A@127.0.0.1:104"], "US", False, None, None, None)


def test_the_sending_process_is_started_again_and_ends_with_its_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gadgets.pacs_sender.RESTART_SECONDS", 0.0)
    sender = Sender(tmp_path / "pacs")
    sender.poke()
    first = sender._process
    assert first is not None and first.poll() is None
    sender.poke()
    assert sender._process is first
    first.kill()
    first.wait(PATIENCE)
    sender.poke()
    second = sender._process
    assert second is not None and second is not first and second.poll() is None
    sender.close()
    assert second.poll() is not None
    sender.poke()
    assert sender._process is second, "nothing is started any more"
    command = [sys.executable, "-m", "gadgets.pacs_sender", str(tmp_path / "pacs"), "1"]
    assert subprocess.run(command, timeout=PATIENCE, check=False).returncode == 0, "its server is no more"


def test_an_archive_needs_raw_data_that_are_kept(tmp_path: Path) -> None:
    sent_to = Archives((Destination("127.0.0.1", 4242, AET),), tmp_path / "pacs")
    with pytest.raises(SettingError, match="raw data are kept"):
        Service(ServiceOptions(port=0, workers=0, archives=sent_to, rehearse=False))
