"""The queue to archives without any archive: whose turn it is, and how long what nobody took is kept."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import Result
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid
from typer.testing import CliRunner

from gadgets.dicom_cli import pacs_app
from gadgets.journal import JobRow, Journal
from gadgets.pacs import Attempt, Destination, PacsError, Tls
from gadgets.pacs_backlog import OTHER, Backlog, QueueWatch, has_work, key_of
from gadgets.pacs_queue import FAILED_SECONDS, Job, Pauses, Queue, QueueBusy
from gadgets.pacs_receipts import NOT_TAKEN, Passage, Receipts
from tests.ports import free_ports
from tests.waiting import until

DEAD, LIVING = Destination("192.0.2.1", 104, "DEAD"), Destination("192.0.2.2", 104, "LIVING")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.dcm"
    path.write_bytes(b"DICM")
    return path


class Archives:
    """Stands for the network: ``DEAD`` does not answer, the others take everything. Notes who was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.dead = True

    def __call__(self, files: list[Path], destination: Destination, stored: Callable[[Path], None]) -> Attempt:
        self.asked.append(destination.aet)
        if destination == DEAD and self.dead:
            return Attempt(left=list(files), problem="no association", silent=True)
        for path in files:
            stored(path)
        return Attempt(stored=list(files))


def filled(root: Path, image: Path, *destinations: Destination, clock: list[float]) -> tuple[Queue, list[Job]]:
    """A job a second, in this order."""
    queue, jobs = Queue(root, now=lambda: clock[0]), []
    for destination in destinations:
        jobs.append(queue.put([image], destination))
        clock[0] += 1
    return queue, jobs


def test_an_archive_that_does_not_answer_is_asked_once(image: Path, tmp_path: Path) -> None:
    archives = Archives()
    queue, jobs = filled(tmp_path / "queue", image, DEAD, DEAD, LIVING, DEAD, LIVING, clock=[1e9])
    done = queue.send_due(archives)
    assert archives.asked == ["DEAD", "LIVING", "LIVING"]
    assert [(job.id, job.left) for job in done] == [(jobs[0].id, 1), (jobs[2].id, 0), (jobs[4].id, 0)]
    assert {job.id: job.attempts for job in queue.jobs()} == {jobs[0].id: 1, jobs[1].id: 0, jobs[3].id: 0}


def test_those_that_answered_come_first_the_next_time(image: Path, tmp_path: Path) -> None:
    archives = Archives()
    queue, _ = filled(tmp_path / "queue", image, DEAD, DEAD, DEAD, clock=[1e9])
    queue.send_due(archives)
    queue.put([image], LIVING)
    archives.asked.clear()
    queue.send_due(archives)
    assert archives.asked == ["LIVING", "DEAD"]
    archives.dead = False  # it is asked in every call, so that it is noticed
    archives.asked.clear()
    assert [job.left for job in queue.send_due(archives)] == [0] and archives.asked == ["DEAD"]


def test_a_refusal_is_an_answer(image: Path, tmp_path: Path) -> None:
    """One object that an archive does not take must not keep the others from it."""
    asked = []

    def refuse(files: list[Path], destination: Destination, stored: Callable[[Path], None]) -> Attempt:
        asked.append(destination)
        return Attempt(left=list(files), problem="1 refused: status 0xA700")

    queue, _ = filled(tmp_path / "queue", image, LIVING, LIVING, clock=[1e9])
    queue.send_due(refuse)
    assert asked == [LIVING, LIVING]


def given_up(root: Path, image: Path, *, days: float = 0.0, n: int = 2) -> Job:
    """A job of ``n`` files that failed so long ago."""
    queue = Queue(root, Pauses(attempts=1))
    job = queue.put(n * [image], DEAD)
    queue.send_due(Archives(), only=job.id)
    record = root / "failed" / job.id / "job.json"
    long_ago = time.time() - days * 86400
    os.utime(record, (long_ago, long_ago))
    return job


def files_left(root: Path) -> dict[str, int]:
    return {folder.name: len(list(folder.glob("*.dcm"))) for folder in (root / "failed").iterdir()}


def test_a_clock_that_is_put_back_does_not_stop_the_queue(image: Path, tmp_path: Path) -> None:
    clock = [1e9]
    queue, archives = Queue(tmp_path, now=lambda: clock[0]), Archives()
    queue.put([image], DEAD)
    queue.send_due(archives)
    assert queue.send_due(archives) == [], "the pause holds"
    clock[0] -= 12 * 3600  # it was wrong until the time server answered
    assert len(queue.send_due(archives)) == 1
    assert queue.send_due(archives) == [], "and so does the next one"


def test_files_that_failed_go_by_age_and_it_is_said(image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old, fresh = given_up(tmp_path, image, days=31), given_up(tmp_path, image, days=29)
    queue = Queue(tmp_path)
    waiting = queue.put([image], DEAD)
    os.utime(tmp_path / "waiting" / waiting.id / "job.json", (0, 0))
    queue.prune(FAILED_SECONDS)
    assert files_left(tmp_path) == {old.id: 0, fresh.id: 2}
    left = {job.id: (job.state, job.left) for job in queue.jobs()}
    assert left == {old.id: ("failed", 0), fresh.id: ("failed", 2), waiting.id: ("waiting", 1)}, (
        "what waits is never removed"
    )
    record = next(job for job in queue.jobs() if job.id == old.id)
    assert record.problem == "2 objects removed unsent after 30 days; no association" and record.n_files == 2
    (said,) = [line for line in caplog.records if "reason=age" in line.message]
    assert said.levelno == logging.ERROR and f"job={old.id} left=2" in said.message
    again = r"its files have been removed.*recon dicom SPOOL/ID\.job/images\.h5 -o DIR; recon pacs send DIR "
    with pytest.raises(PacsError, match=again + "--host 192.0.2.1 --port 104 --aet DEAD"):
        queue.retry(old.id)
    assert not queue.send_due(Archives(), only=old.id)
    caplog.clear()
    queue.prune(FAILED_SECONDS)
    assert not caplog.records, "once is enough"


def test_a_retry_while_the_last_object_is_confirmed_meets_a_busy_queue(image: Path, tmp_path: Path) -> None:
    queue = Queue(tmp_path)
    job = queue.put([image], LIVING)

    def confirmed(files: list[Path], destination: Destination, stored: Callable[[Path], None]) -> Attempt:
        stored(files[0])
        with pytest.raises(QueueBusy):
            Queue(tmp_path).retry(job.id)
        return Attempt(stored=files)

    assert [done.left for done in queue.send_due(confirmed)] == [0]


def test_a_record_that_cannot_be_read_keeps_no_patient_data_for_ever(image: Path, tmp_path: Path) -> None:
    job = given_up(tmp_path, image)
    record = tmp_path / "failed" / job.id / "job.json"
    record.write_text("{")
    os.utime(record, (0, 0))
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "000000.dcm").write_bytes(b"another patient")
    (tmp_path / "failed" / "link").symlink_to(secret)
    Queue(tmp_path).prune(FAILED_SECONDS)
    assert files_left(tmp_path) == {job.id: 0, "link": 1} and (secret / "000000.dcm").exists()
    for name in (job.id, "link"):
        Queue(tmp_path).remove(name)
    assert files_left(tmp_path) == {} and (secret / "000000.dcm").exists()


def test_what_failed_is_thrown_away_when_somebody_says_so(
    image: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    failed, queue = given_up(tmp_path, image), Queue(tmp_path)
    waiting = queue.put([image], DEAD)
    for name in (waiting.id, "../waiting/" + waiting.id, "..", "", "."):
        with pytest.raises(PacsError, match="no such failed job"):
            queue.remove(name)
    queue.remove(failed.id)
    assert [job.id for job in queue.jobs()] == [waiting.id]
    assert f"event=pacs_removed job={failed.id} left=2 reason=asked" in caplog.text


@pytest.mark.parametrize(
    "archive",
    [
        DEAD,
        Destination("::1", 11112, "A B", "US", Tls()),
        replace(DEAD, tls=Tls("/a b/ca.pem", "/c.pem", "/k.pem", "name")),
    ],
)
def test_an_archive_as_options_is_that_archive(
    archive: Destination, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tls, "context", lambda _: None)  # these files are not there
    monkeypatch.setattr(Queue, "send_due", lambda *_, **__: [])
    words = ["send", str(dicom_file(tmp_path / "a.dcm", PatientID="7")), "--queue", str(tmp_path / "queue")]
    done = CliRunner().invoke(pacs_app, [*words, *shlex.split(archive.options())])
    assert [job.destination for job in Queue(tmp_path / "queue").jobs()] == [archive], done.output


def dicom_file(path: Path, **patient: str) -> Path:
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.SOPInstanceUID = "1.2.840.10008.5.1.4.1.1.4", generate_uid()
    for keyword, value in patient.items():
        setattr(dataset, keyword, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def test_objects_without_a_patient_are_sent_only_when_somebody_says_so(tmp_path: Path, image: Path) -> None:
    """Nobody listens there: what is accepted stays in the queue."""
    run, queue = CliRunner(), tmp_path / "queue"
    [port] = free_ports(1)
    known = [dicom_file(tmp_path / "id.dcm", PatientID="7"), dicom_file(tmp_path / "name.dcm", PatientName="X^Y")]
    nameless = [
        dicom_file(tmp_path / "nobody.dcm"),
        dicom_file(tmp_path / "empty.dcm", PatientID="", PatientName=""),
        dicom_file(tmp_path / "blank.dcm", PatientID=" ", PatientName="^^"),
    ]

    def send(*files: Path, options: tuple[str, ...] = ()) -> Result:
        target = ["--host", "127.0.0.1", "--port", str(port), "--aet", "PACS", "--queue", str(queue)]
        return run.invoke(pacs_app, ["send", *map(str, files), *target, *options])

    for one in nameless:
        error = send(*known, one).exception
        assert isinstance(error, PacsError) and "objects without a patient" in str(error), one
        assert "1 of 3 files" in str(error) and "--header" in str(error) and "--without-patient" in str(error)
    assert not queue.exists()
    # what is no DICOM object is for the archive's side of the command to say
    assert "3 of 3 objects stay queued" in send(*known, image).output
    assert "1 of 1 objects stay queued" in send(nameless[0], options=("--without-patient",)).output


def test_the_command_throws_away_what_failed(image: Path, tmp_path: Path) -> None:
    job, run = given_up(tmp_path, image), CliRunner()
    done = run.invoke(pacs_app, ["queue", "--queue", str(tmp_path)], env={"COLUMNS": "200"})
    assert done.exit_code == 0 and job.id in done.output and "failed" in done.output, done.output
    done = run.invoke(pacs_app, ["queue", "--queue", str(tmp_path), "--remove", job.id])
    assert done.exit_code == 0 and job.id not in done.output and not files_left(tmp_path), done.output


def test_the_worker_removes_what_is_too_old(image: Path, tmp_path: Path) -> None:
    job, stop = given_up(tmp_path, image, days=2), threading.Event()
    worker = threading.Thread(target=Queue(tmp_path).work, args=(stop, Archives(), 86400.0))
    worker.start()
    try:
        until(lambda: files_left(tmp_path) == {job.id: 0})
    finally:
        stop.set()
        worker.join()


def test_the_sending_process_keeps_what_failed_for_as_long_as_its_server_says(image: Path, tmp_path: Path) -> None:
    fresh, old = given_up(tmp_path, image, days=2), given_up(tmp_path, image, days=31)
    command = [sys.executable, "-m", "gadgets.pacs_sender", str(tmp_path), str(os.getpid())]
    for options, left in (([], {fresh.id: 2, old.id: 0}), (["86400.0"], {fresh.id: 0, old.id: 0})):
        process = subprocess.Popen([*command, *options], stderr=subprocess.DEVNULL)
        try:
            until(lambda left=left: files_left(tmp_path) == left)
        finally:
            process.kill()
            process.wait()


def test_a_backlog_is_counted_by_archive_without_their_names(image: Path, tmp_path: Path) -> None:
    watch, archives = QueueWatch(), [key_of(LIVING), key_of(DEAD)]
    assert watch.look(tmp_path / "none") == () and not has_work(tmp_path / "none")
    assert watch.look(tmp_path / "none", archives) == (Backlog("1"), Backlog("2"))
    given_up(tmp_path, image)
    assert has_work(tmp_path)
    now = time.time()
    for age in (4000.0, 100.0):
        Queue(tmp_path, now=lambda age=age: now - age).put([image], DEAD)
    for _ in range(2):  # the second look is from memory
        living, dead = watch.look(tmp_path, archives)
        assert living == Backlog("1") and (dead.archive, dead.waiting, dead.failed) == ("2", 2, 1)
        assert 4000 <= dead.oldest < 4000 + (time.time() - now) + 1
    (only,) = watch.look(tmp_path)
    assert (only.archive, only.waiting, only.failed) == (OTHER, 2, 1)
    (tmp_path / "waiting" / "x").mkdir()
    for text in ("", "{", "[]", '{"destination": {"host": 1, "port": Infinity, "aet": []}}', "[" * 100_000):
        (tmp_path / "waiting" / "x" / "job.json").write_text(text)
        *_, other = QueueWatch().look(tmp_path, archives)
        assert (other.archive, other.waiting) == (OTHER, 1)


def test_nothing_is_remembered_of_what_is_gone(image: Path, tmp_path: Path) -> None:
    watch, archives = QueueWatch(), Archives()
    archives.dead = False
    queue = Queue(tmp_path)
    queue.put([image], DEAD)
    watch.look(tmp_path)
    queue.send_due(archives)
    assert watch.look(tmp_path) == () and not watch._known and not has_work(tmp_path)


def test_a_folder_that_is_no_queue_is_not_an_empty_one(tmp_path: Path) -> None:
    wrong = tmp_path / "misspelt"
    done = CliRunner().invoke(pacs_app, ["queue", "--queue", str(wrong)])
    assert isinstance(done.exception, PacsError) and not wrong.exists(), done.output
    assert str(done.exception).startswith(f"{wrong}: no queue; expected the folder 'pacs' beside the server's --spool")


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    missing, queue = tmp_path / "series", tmp_path / "queue"
    words = ["send", str(missing), "--host", "127.0.0.1", "--aet", "ARCHIVE", "--queue", str(queue)]
    done = CliRunner().invoke(pacs_app, words)
    assert str(done.exception) == f"{missing}: no such file; expected DICOM files, or folders of them", done.output
    assert not queue.exists()


def test_an_empty_queue_says_so(tmp_path: Path) -> None:
    with pytest.raises(PacsError, match="no such job; got 'x'; expected nothing: the queue is empty"):
        Queue(tmp_path).retry("x")


# -- what a scan's row says of it ------------------------------------------------------------------------------------------------


class Ways:
    """Scans on their way to archives, and what the journal says of them after each look of the server."""

    def __init__(self, folder: Path, image: Path) -> None:
        self.root, self.image = folder / "pacs", image
        self.queue = Queue(self.root, Pauses(first=0.0, attempts=2))
        self.network, self.receipts = Archives(), Receipts(self.root)
        (folder / "spool").mkdir()
        self.journal = Journal(folder / "spool")

    def put(self, scan: str, *archives: Destination, archive: str = "queued", of: int = 0) -> list[Job]:
        self.journal.put(JobRow(scan, state="sent", archive=archive, warnings=("thin coils",)))  # type: ignore[arg-type]
        return [self.queue.put([self.image], one, Passage(scan, str(one), of or len(archives))) for one in archives]

    def row(self, scan: str, *, send: bool = True) -> tuple[str, tuple[str, ...]]:
        if send:
            self.queue.send_due(self.network)
        self.receipts.note(self.journal)
        row = self.journal.row(scan)
        return row.archive, row.warnings

    @property
    def left(self) -> int:
        return len(list((self.root / "stored").iterdir()))


def test_a_row_is_stored_when_every_archive_has_confirmed_it(tmp_path: Path, image: Path) -> None:
    ways = Ways(tmp_path, image)
    ways.put("a", LIVING)
    ways.put("b", LIVING, DEAD)
    assert ways.row("a", send=False) == ("queued", ("thin coils",))
    assert ways.row("a") == ("stored", ("thin coils",)) and ways.left == 1
    assert ways.row("b") == ("failed", ("thin coils", NOT_TAKEN)), "the second attempt was the last one"
    (job,) = ways.queue.jobs()
    ways.network.dead = False
    ways.queue.retry(job.id)
    assert ways.row("b") == ("stored", ("thin coils",)) and ways.left == 0
    ways.queue.put([image], LIVING)
    assert ways.queue.send_due(ways.network)[0].left == 0 and ways.left == 0, "recon pacs send: of no scan"


def test_nothing_but_an_archives_word_makes_a_row_stored(tmp_path: Path, image: Path) -> None:
    ways = Ways(tmp_path, image)
    ways.put("twice", LIVING, LIVING, of=2)  # a worker died of the second archive, and the first one got all again
    assert ways.row("twice") == ("queued", ("thin coils",)) and ways.left == 2
    (job,) = ways.put("thrown away", DEAD)
    ways.queue.send_due(ways.network)
    assert ways.row("thrown away")[0] == "failed"
    ways.queue.remove(job.id)
    assert ways.row("thrown away") == ("failed", ("thin coils", NOT_TAKEN))
    ways.put("early", LIVING, archive="due")  # its row is still to be written
    assert ways.row("early")[0] == "due"
    ways.journal.update("early", archive="queued")
    assert ways.row("early")[0] == "stored"
    ways.queue.prune(3600.0)
    assert ways.left == 2, "just left"
    for receipt in (ways.root / "stored").iterdir():
        os.utime(receipt, (0.0, 0.0))
    ways.queue.prune(3600.0)
    assert ways.left == 0, "what nobody will ever note"
    for text in (
        "",
        "{",
        "[]",
        '{"scan": [], "archive": 1, "archives": "many"}',
        '{"scan": "gone", "archive": "A", "archives": 1}',
    ):
        (ways.root / "stored" / "x.json").write_text(text)
        assert ways.row("twice", send=False)[0] == "queued" and ways.left == 0
