"""From MRD images to a real archive (Orthanc) and back: exactly what was sent, over plain and encrypted connections."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pydicom
import pytest
import typer
from matplotlib.image import imread
from pynetdicom import AE
from typer.testing import CliRunner

from gadgets import pacs
from gadgets.dicom import Conversion, convert
from gadgets.dicom_cli import dicom, pacs_app
from gadgets.geometry import pixel_to_patient
from gadgets.pacs import Destination, PacsError, Tls, echo, read_address, store
from gadgets.pacs_queue import Pauses, Queue, QueueBusy
from gadgets.wire.events import Image
from tests.e2e.orthanc import AET, Orthanc, orthanc
from tests.gadgets.dicom_scan import PATIENT, PATIENT_ID, Scan, scan
from tests.ports import free_ports
from tests.waiting import PATIENCE


@pytest.fixture(scope="module")
def known() -> Scan:
    return scan(maps=("T1", "chi"))


@pytest.fixture(scope="module")
def made(known: Scan, tmp_path_factory: pytest.TempPathFactory) -> Conversion:
    folder = tmp_path_factory.mktemp("dicom")
    return convert(known.write(folder / "images.h5"), folder / "out", header=known.header, parametric_maps=True)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    with orthanc(tmp_path_factory.mktemp("orthanc")) as running:
        yield running


def at(running: Orthanc, aet: str = AET, tls: Tls | None = None) -> Destination:
    return Destination("127.0.0.1", running.dicom_port, aet, tls=tls)


def sent_uids(files: list[Path]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in files:
        dataset = pydicom.dcmread(path, stop_before_pixels=True)
        found.setdefault(str(dataset.SeriesInstanceUID), set()).add(str(dataset.SOPInstanceUID))
    return found


def test_the_archive_holds_exactly_what_was_sent(archive: Orthanc, known: Scan, made: Conversion, tmp_path: Path) -> None:
    echo(at(archive))
    queue = Queue(tmp_path / "queue")
    job = queue.put(made.files, at(archive))
    (done,) = queue.send_due()
    assert (done.id, done.left, done.attempts) == (job.id, 0, 1) and not queue.jobs()
    assert archive.uids() == sent_uids(list(made.files))
    assert len(archive.json("/studies")) == len(archive.json("/patients")) == 1

    originals = {str(d.SOPInstanceUID): d for d in map(pydicom.dcmread, made.files)}
    truth = {"QSM": known.maps["chi"], "T1": 1e3 * known.maps["T1"]}
    sent = {(int(e.header["image_series_index"]), int(e.header["image_index"])): e for e in known.events}
    checked = placed = 0
    for identifier in archive.json("/instances"):
        back = pydicom.dcmread(io.BytesIO(archive.get(f"/instances/{identifier}/file")))
        original = originals[back.SOPInstanceUID]
        assert back.PixelData == original.PixelData and back.PatientName == PATIENT
        role = back.ImageType[-1]
        if "ImagePositionPatient" in back:
            require_place(back, sent[int(back.SeriesNumber) - 300, int(back.InstanceNumber)])
            placed += 1
        if back.SeriesDescription.split()[0] == "llr_t1":
            mapping = back.RealWorldValueMappingSequence[0]
            values = back.pixel_array * mapping.RealWorldValueSlope + mapping.RealWorldValueIntercept
            expected = np.abs(known.images).reshape(-1, 24, 40)[int(back.InstanceNumber) - 1]
            assert np.abs(values - expected).max() <= 0.5001 * mapping.RealWorldValueSlope
            checked += 1
        if "RescaleSlope" in back and role in truth:
            expected = truth[role][int(back.InstanceNumber) - 1, 0]
            mapping = back.RealWorldValueMappingSequence[0]
            values = back.pixel_array * mapping.RealWorldValueSlope + mapping.RealWorldValueIntercept
            assert np.abs(values - expected)[expected != 0].max() <= 0.5001 * mapping.RealWorldValueSlope
            checked += 1
    assert checked == 4 + 4 and placed == len(sent)


def require_place(dataset: pydicom.Dataset, image: Image) -> None:
    """Corners and middle lie where the MRD header says, to 1e-4 mm (DICOM PS3.3 equation C.7.6.2.1-1)."""
    pixels = np.array([(0, 0), (39, 0), (0, 23), (39, 23), (19.5, 11.5)])
    row, column = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)
    dy, dx = (float(v) for v in dataset.PixelSpacing)
    found = np.array(dataset.ImagePositionPatient, float) + pixels[:, :1] * dx * row + pixels[:, 1:] * dy * column
    assert np.abs(found - pixel_to_patient(image.header, [(x, y, 0) for x, y in pixels])).max() < 1e-4
    assert np.abs(found[-1] - image.header["position"]).max() < 1e-4  # without any function of ours


def test_previews_show_the_images(archive: Orthanc, known: Scan, made: Conversion) -> None:
    if not archive.uids():  # when this test runs alone
        store(made.files, at(archive))
    shown = os.environ.get("DICOM_PREVIEWS")
    seen = set()
    for instance in archive.json("/instances?expand"):
        tags = archive.json(f"/instances/{instance['ID']}/simplified-tags")
        frames = archive.json(f"/instances/{instance['ID']}/frames")
        png = archive.get(f"/instances/{instance['ID']}/frames/{frames[0]}/preview")
        picture = imread(io.BytesIO(png))
        picture = picture[..., 0] if picture.ndim == 3 else picture
        assert picture.shape == (24, 40)
        label = tags["SeriesDescription"].split(" cine")[0]
        seen.add(label)
        if shown:
            (Path(shown) / f"{label.replace(' ', '_')}_{tags['InstanceNumber']}.png").write_bytes(png)
        if label == "llr_t1":
            truth = np.abs(known.images).reshape(-1, 24, 40)[int(tags["InstanceNumber"]) - 1]
            assert np.corrcoef(picture.ravel(), truth.ravel())[0, 1] > 0.97
        if label.startswith("llr_t1_T1"):
            slices = known.maps["T1"][:, 0]  # the frames of a parametric map are in another order
            assert max(np.corrcoef(picture.ravel(), truth.ravel())[0, 1] for truth in slices) > 0.99
        if label == "llr_t1_T1":  # in its window, 800 to 2400 ms
            rendered = imread(io.BytesIO(archive.get(f"/instances/{instance['ID']}/rendered")))
            truth = np.clip((1e3 * known.maps["T1"][int(tags["InstanceNumber"]) - 1, 0] - 800) / 1600, 0, 1)
            assert np.abs((rendered[..., 0] if rendered.ndim == 3 else rendered) - truth).max() < 0.01
    assert {"llr_t1", "llr_t1_phase", "llr_t1_T1", "llr_t1_QSM", "llr_t1_T1 parametric map"} <= seen


def test_what_goes_wrong_is_said(archive: Orthanc, made: Conversion, tmp_path: Path) -> None:
    with pytest.raises(PacsError, match=r"rejected: .*[Cc]alled AE.*Check both AE titles"):
        echo(at(archive, "WRONG"))
    with pytest.raises(PacsError, match="no association"):
        echo(Destination("127.0.0.1", free_ports(1)[0], AET))
    with pytest.raises(PacsError, match="not an AE title"):
        Destination("127.0.0.1", 104, "A" * 17)
    (tmp_path / "text.dcm").write_text("no DICOM")
    (tmp_path / "half.dcm").write_bytes(made.files[1].read_bytes()[:-500])
    bad = [tmp_path / "text.dcm", tmp_path / "half.dcm"]
    before = archive.uids()
    for files in (bad, [*bad, made.files[0]]):
        attempt = store(files, at(archive))
        assert attempt.left == bad and attempt.stored == files[2:]
        assert "no DICOM file, or a broken one" in attempt.problem
    assert set(archive.uids()) == set(before) | set(sent_uids([made.files[0]]))


def test_a_queue_waits_for_the_archive_with_growing_pauses(made: Conversion, tmp_path: Path) -> None:
    """The archive is down, comes up, and then has everything; the clock is ours."""
    clock = [1e9]
    queue = Queue(tmp_path / "queue", Pauses(first=10, longest=60, attempts=6), now=lambda: clock[0])
    ports = free_ports(2)
    queue.put(made.files[:5], Destination("127.0.0.1", ports[1], AET))
    pauses = []
    for _ in range(5):
        (job,) = queue.send_due()
        assert (job.left, job.state) == (5, "waiting") and "no association" in job.problem
        pauses.append(job.next_try - clock[0])
        assert queue.send_due() == []  # not due
        clock[0] = job.next_try
    assert pauses == [10, 20, 40, 60, 60]
    (job,) = queue.send_due()
    assert job.state == "failed" and queue.send_due() == []
    assert [(one.id, one.state, one.left) for one in Queue(tmp_path / "queue").jobs()] == [(job.id, "failed", 5)]
    with orthanc(tmp_path / "orthanc", ports) as late:
        queue.retry(job.id)
        (job,) = queue.send_due()
        assert job.left == 0 and late.uids() == sent_uids(list(made.files[:5]))
    assert not list((tmp_path / "queue" / "waiting").iterdir()) and not list((tmp_path / "queue" / "failed").iterdir())


DIES = """
import os, sys
from pathlib import Path
from gadgets.pacs import store
from gadgets.pacs_queue import Queue

left = [3]

def dying(files, destination, stored):
    def confirmed(path):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), 9)  # the archive has it, the queue does not know yet
        stored(path)
    return store(files, destination, confirmed)

Queue(sys.argv[1]).send_due(dying)
"""


def test_a_sender_that_is_killed_loses_nothing(archive: Orthanc, tmp_path: Path) -> None:
    known = scan(maps=("T1",), seed=5)
    files = convert(known.write(tmp_path / "images.h5"), tmp_path / "out", header=known.header).files
    before = archive.uids()
    queue = Queue(tmp_path / "queue")
    queue.put(files, at(archive))
    done = subprocess.run([sys.executable, "-c", DIES, str(tmp_path / "queue")], check=False, timeout=120)
    assert done.returncode == -9
    (job,) = queue.jobs()
    assert job.left == len(files) - 2
    (job,) = queue.send_due()
    assert job.left == 0
    assert archive.uids() == {**before, **sent_uids(list(files))}


def test_a_dead_archive_does_not_slow_a_living_one(
    archive: Orthanc, made: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One archive takes the connection and then says nothing, as behind a firewall that drops packets."""
    usual = pacs._entity
    queue = Queue(tmp_path / "queue")
    with socket.create_server(("127.0.0.1", 0), backlog=16) as listener:
        dead = Destination("127.0.0.1", listener.getsockname()[1], AET)

        def entity(destination: Destination) -> AE:
            """The living one may take its time on a busy machine."""
            asked = usual(destination)
            asked.connection_timeout = asked.acse_timeout = 1.0 if destination == dead else PATIENCE
            return asked

        monkeypatch.setattr(pacs, "_entity", entity)
        for _ in range(3):
            queue.put(made.files[:1], dead)
        for file in made.files[:2]:
            queue.put([file], at(archive))
        done = queue.send_due()
        listener.setblocking(False)
        connections = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                listener.accept()[0].close()
                connections += 1
    assert connections == 1 and sorted(job.left for job in done) == [0, 0, 1]
    assert sorted(job.attempts for job in queue.jobs()) == [0, 0, 1]


def test_tls(made: Conversion, tmp_path: Path) -> None:
    def certificate(name: str) -> tuple[str, str]:
        key, pem = tmp_path / f"{name}.key", tmp_path / f"{name}.pem"
        command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
        names = ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:archive,IP:127.0.0.1"]
        subprocess.run([*command, "-keyout", str(key), "-out", str(pem), *names], check=True, capture_output=True)
        return str(pem), str(key)

    archive_pem, archive_key = certificate("archive")
    our_pem, our_key = certificate("us")
    settings = {
        "DicomTlsEnabled": True, "DicomTlsCertificate": archive_pem, "DicomTlsPrivateKey": archive_key,
        "DicomTlsTrustedCertificates": our_pem,
    }  # fmt: skip
    with orthanc(tmp_path / "orthanc", **settings) as running:
        good = Tls(archive_pem, our_pem, our_key)
        assert store(made.files[:2], at(running, tls=good)).left == []
        assert running.uids() == sent_uids(list(made.files[:2]))
        for bad in (
            None,  # unencrypted
            Tls(our_pem, our_pem, our_key),  # an archive that we do not know
            Tls(archive_pem, our_pem, our_key, server_name="elsewhere"),  # a certificate for another name
            Tls(archive_pem),  # a client that the archive does not know
        ):
            attempt = store(made.files[2:3], at(running, tls=bad))
            assert attempt.left == list(made.files[2:3]) and attempt.problem
        echo(at(running, tls=Tls(archive_pem, our_pem, our_key, server_name="archive")))
        assert running.uids() == sent_uids(list(made.files[:2]))
    with pytest.raises(PacsError, match="cannot use the TLS files"):
        Tls(str(tmp_path / "missing.pem")).context()


def test_commands(archive: Orthanc, known: Scan, tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(dicom)
    app.add_typer(pacs_app, name="pacs")
    run = CliRunner()
    source = known.write(tmp_path / "images.h5")
    (tmp_path / "header.xml").write_text(known.header, encoding="utf-8")
    done = run.invoke(app, ["dicom", str(source), "-o", str(tmp_path / "out"), "--header", str(tmp_path / "header.xml")])
    assert done.exit_code == 0 and "0304_llr_t1_QSM" in done.output, done.output
    queue = ["--queue", str(tmp_path / "queue")]
    target = ["--host", "127.0.0.1", "--aet", AET, "--port"]
    done = run.invoke(app, ["pacs", "send", str(tmp_path / "out"), *queue, *target, str(archive.dicom_port)])
    assert done.exit_code == 0 and "objects stored in TESTARCHIVE@127.0.0.1" in done.output, done.output
    done = run.invoke(app, ["pacs", "send", str(tmp_path / "out"), *queue, *target, str(free_ports(1)[0])])
    assert done.exit_code == 1 and "stay queued" in done.output, done.output
    done = run.invoke(app, ["pacs", "queue", *queue], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and "waiting" in done.output
    assert run.invoke(app, ["pacs", "echo", *target, str(archive.dicom_port)]).exit_code == 0


def test_one_process_sends_and_the_queue_keeps_its_secrets(
    archive: Orthanc, made: Conversion, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    queue = Queue(tmp_path / "queue")
    job = queue.put(made.files[:1], at(archive))
    folder = tmp_path / "queue" / "waiting" / job.id
    assert (tmp_path / "queue").stat().st_mode & 0o077 == folder.stat().st_mode & 0o077 == 0
    told = (folder / "job.json").read_text() + job.id

    def meanwhile(*_: object) -> object:
        with pytest.raises(QueueBusy):
            Queue(tmp_path / "queue").send_due()
        raise PacsError("for the test")

    queue.send_due(meanwhile)  # type: ignore[arg-type]
    (job,) = queue.jobs()
    assert job.problem == "for the test" and job.attempts == 1
    broken = queue.put(made.files[:1], at(archive))
    (tmp_path / "queue" / "waiting" / broken.id / "job.json").write_text("{")
    assert queue.send_due(only=job.id)[0].left == 0
    assert queue.send_due() == [] and (tmp_path / "queue" / "failed" / broken.id).is_dir()
    told += caplog.text
    for secret in (PATIENT, PATIENT_ID, "Zuzana"):
        assert secret not in told
    assert "event=pacs_sent" in caplog.text


def test_the_worker_sends_what_others_put_in(archive: Orthanc, made: Conversion, tmp_path: Path) -> None:
    queue, stop = Queue(tmp_path / "queue"), threading.Event()
    seen: list[int] = []

    def counted(files: list[Path], destination: Destination, stored: object) -> object:
        attempt = store(files, destination, stored)  # type: ignore[arg-type]
        seen.append(len(attempt.stored))
        stop.set()
        return attempt

    worker = threading.Thread(target=queue.work, args=(stop, counted))
    queue.put(made.files[:2], at(archive))
    worker.start()
    worker.join(PATIENCE)
    assert seen == [2] and not queue.jobs() and not worker.is_alive()


def test_addresses_of_archives() -> None:
    assert read_address("ARCHIVE@10.0.0.5:104") == ("ARCHIVE", "10.0.0.5", 104)
    assert read_address("A B@[fd00::5]:11112") == ("A B", "fd00::5", 11112)
    for bad in (
        "",
        "ARCHIVE",
        "ARCHIVE@host",
        "@host:104",
        "ARCHIVE@:104",
        "ARCHIVE@host:",
        "ARCHIVE@host:dicom",
        "A@h:\u0661",
    ):
        with pytest.raises(PacsError, match="AET@HOST:PORT"):
            read_address(bad)
