"""What the monitor makes of the files: jobs, health and metrics, of whole spools, of odd ones and of none."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from gadgets.journal import FILE_NAME
from gadgets.monitor import health
from gadgets.monitor.files import STATUS_FILE, TOLD_FILE, folder_of
from gadgets.monitor.folder import Folder
from gadgets.monitor.metrics import exposition
from gadgets.monitor.tallies import BUCKETS, Tallies
from gadgets.monitor.web import progress_words
from gadgets.pacs import Attempt, Destination
from gadgets.pacs_backlog import key_of
from gadgets.pacs_queue import Pauses, Queue
from tests.monitor import spools
from tests.monitor.spools import FAILED, GOOD, RECEIVED, RETRY

LIVE = "20261120T102000.000000Z-feedf00d"
ARCHIVE = Destination("pacs.example", 104, "ARCHIVE")


def levels(folder: Folder) -> dict[str, str]:
    return {check.name: check.level for check in health.checks(folder)}


def active(**values: object) -> dict[str, object]:
    return {
        "id": LIVE, "chain": "llr", "state": "reconstructing", "started": time.time(), "readouts": 512, "bytes": 4_000_000, "images": 3,
        "fraction": 0.43, "left": "25 s", "warnings": 1, "seconds": 7.5, **values,
    }  # fmt: skip


def samples(root: Path) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found = text_string_to_metric_families(exposition(Folder(root)).decode())
    return {(s.name, frozenset(s.labels.items())): s.value for family in found for s in family.samples}


def test_jobs_of_journal_and_server_are_one_list(tmp_path: Path) -> None:
    asked = RECEIVED + 3600
    again = spools.row(RETRY, received=asked, finished=asked + 12.5)
    spools.journal(tmp_path, spools.row(GOOD), again, spools.row(FAILED, state="failed", why="no memory"))
    spools.put_status(tmp_path, active=[active()])
    jobs = Folder(tmp_path).jobs()
    assert [job.id for job in jobs] == [RETRY, LIVE, GOOD, FAILED]
    retry, running, good, failed = jobs
    assert (running.state, running.fraction, running.left, running.n_readouts) == ("reconstructing", 0.43, "25 s", 512)
    assert (good.state, good.fraction, good.n_images) == ("sent", 1.0, 9)
    assert good.seconds == pytest.approx(13.5, abs=0.01)  # from the first byte, one second before the journal's time
    assert (retry.started, retry.seconds) == (asked, 12.5)  # a retry begins when it is asked for
    assert (failed.state, failed.why) == ("failed", "no memory")


def test_what_is_over_is_the_journals_word(tmp_path: Path) -> None:
    spools.journal(tmp_path, spools.row(LIVE, state="failed", why="the client left", n_images=1))
    spools.put_status(tmp_path, active=[active(state="reconstructing")])
    (job,) = Folder(tmp_path).jobs()
    assert (job.state, job.why, job.n_images, job.left) == ("failed", "the client left", 1, "")


def test_a_dead_servers_scans_are_not_live(tmp_path: Path) -> None:
    spools.journal(tmp_path, spools.row(LIVE, state="reconstructing", finished=None))
    spools.put_status(tmp_path, active=[active()], pid=spools.gone_process())
    (job,) = Folder(tmp_path).jobs()
    assert (job.state, job.fraction) == ("reconstructing", 0.0) and "no server" in progress_words(job)
    spools.put_status(tmp_path, active=[active()])
    assert progress_words(Folder(tmp_path).jobs()[0]) == "43 %, about 25 s left"


def test_everything_about_a_job(tmp_path: Path) -> None:
    spools.journal(tmp_path, spools.row(GOOD, warnings=("thin coils",)))
    spools.put_curves(tmp_path, GOOD)
    spools.put_log(tmp_path, GOOD, "one line\n")
    details = Folder(tmp_path).job(GOOD)
    assert details is not None and details.row is not None
    assert details.warnings == ("thin coils",) and details.log == "one line\n" and details.timings["last_image"] == 12.5
    (part,) = details.quality
    assert part.notes == ("stopped early",) and part.quality["residual"] == 1.02
    assert set(part.curves) == {"loss", "held_out", "routing_weights"}
    assert part.curves["held_out"][-1] == [199.0, pytest.approx(0.1)] and len(part.curves["routing_weights"]) == 9
    assert Folder(tmp_path).job(FAILED) is None and Folder(tmp_path).job("../../etc") is None


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"\xff\xfe", b'{"active": 5, "server": [], "tallies": "x", "pid": "y", "time": null}']
)
def test_files_that_are_none_cost_nothing(content: bytes, tmp_path: Path) -> None:
    spools.journal(tmp_path, spools.row(GOOD))
    spools.put_curves(tmp_path, GOOD)
    for path in (tmp_path / STATUS_FILE, folder_of(tmp_path, GOOD) / TOLD_FILE, folder_of(tmp_path, GOOD) / "quality.json"):
        path.write_bytes(content)
    (folder_of(tmp_path, GOOD) / "slice-0000_loss.csv").write_bytes(content)
    folder = Folder(tmp_path)
    assert [job.id for job in folder.jobs()] == [GOOD] and folder.job(GOOD) is not None
    assert levels(folder)["server"] == "failing"
    assert samples(tmp_path)["recon_up", frozenset()] == 0


def test_a_journal_that_cannot_be_read_is_none(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"no database" * 100)
    folder = Folder(tmp_path)
    assert folder.jobs() == [] and folder.counts() == {} and folder.job(GOOD) is None
    (tmp_path / FILE_NAME).unlink()
    spools.journal(tmp_path, spools.row(GOOD))
    assert [job.id for job in folder.jobs()] == [GOOD]  # and is looked for again


def test_health_of_a_server_that_works(tmp_path: Path) -> None:
    spools.journal(tmp_path, spools.row(GOOD))
    spools.put_status(tmp_path)
    assert set(levels(Folder(tmp_path)).values()) == {"ok"}
    assert health.worst(health.checks(Folder(tmp_path))) == "ok"


def test_health_says_what_is_wrong(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "spool")
    failing = {name for name, level in levels(folder).items() if level == "failing"}
    assert failing - {"gpu"} == {"server", "workers", "spool"}
    root = tmp_path / "spool"
    spools.put_status(root, age=60.0)
    assert "hangs" in health.checks(folder)[0].words
    spools.put_status(root, pid=spools.gone_process())
    assert "ended" in health.checks(folder)[0].words
    spools.put_status(root, listening=False)
    assert levels(folder)["server"] == "failing"
    childless = subprocess.Popen(["sleep", "60"])
    try:
        spools.put_status(root, pid=childless.pid, workers=2)
        assert levels(folder)["workers"] == "failing"
    finally:
        childless.kill()
        childless.wait()
    spools.put_status(root, min_free_bytes=1 << 60)
    assert levels(folder)["spool"] == "failing"
    spools.put_status(root, queued=1000)
    assert levels(folder)["queue"] == "warning"
    spools.put_status(root, queued=1, stalled=119.0)
    assert levels(folder)["queue"] == "ok"
    spools.put_status(root, queued=1, stalled=600.0)
    assert levels(folder)["queue"] == "failing" and "none has begun for 10 min" in health.checks(folder)[3].words
    spools.put_status(root, device="cuda")
    assert levels(folder)["gpu"] in ("failing", "ok")  # as this machine has one or not
    spools.journal(root, spools.row(FAILED, state="failed"))
    assert levels(folder)["last"] == "warning"
    spools.journal(root, spools.row(GOOD, fallback="llr"))
    last = health.checks(folder)[4]
    assert last.level == "warning" and "llr" in last.words


def test_a_cluster_that_shrinks_or_goes_is_seen(tmp_path: Path) -> None:
    def cluster() -> tuple[str, str]:
        return next((check.level, check.words) for check in health.checks(Folder(tmp_path)) if check.name == "cluster")

    spools.put_status(tmp_path)
    assert cluster() == ("ok", "none; slices are computed on this machine")
    assert ("recon_cluster_capacity", frozenset()) not in samples(tmp_path)
    for present, level in ((4, "ok"), (3, "warning"), (0, "failing")):
        spools.put_status(tmp_path, cluster=present, cluster_wanted=4)
        assert cluster()[0] == level
        found = samples(tmp_path)
        assert found["recon_cluster_capacity", frozenset()] == present
        assert found["recon_cluster_capacity_wanted", frozenset()] == 4
        assert found["recon_healthy", frozenset()] == (present > 0)
    spools.put_status(tmp_path, cluster=0, cluster_wanted=0)  # none has ever come
    assert cluster()[0] == "failing" and "has been seen yet" in cluster()[1]
    spools.put_status(tmp_path, cluster=4, cluster_wanted=4, pid=spools.gone_process())
    assert cluster()[0] == "failing"


def queue_of(root: Path) -> Queue:
    """Beside the spool, as ``recon serve`` has it."""
    return Queue(root.parent / "pacs", Pauses(attempts=1))


def waiting_since(root: Path, seconds: float, to: Destination = ARCHIVE) -> str:
    image = root.parent / "image.dcm"
    image.write_bytes(b"DICM")
    then = time.time() - seconds
    return Queue(root.parent / "pacs", now=lambda: then).put([image], to).id


def pacs(root: Path) -> health.Check:
    return next(check for check in health.checks(Folder(root)) if check.name == "pacs")


def test_an_archive_that_takes_nothing_is_seen(tmp_path: Path) -> None:
    root = tmp_path / "spool"
    spools.put_status(root)
    assert (pacs(root).level, pacs(root).words) == ("ok", "no archive")
    spools.put_status(root, archives=[key_of(ARCHIVE)], archive_queue=str(tmp_path / "pacs"))
    assert (pacs(root).level, pacs(root).words) == ("ok", "nothing waits")
    waiting_since(root, 600)
    assert (pacs(root).level, pacs(root).words) == ("ok", "1 transfer waits, the oldest 10 min")
    late = waiting_since(root, 3 * 3600)
    assert (pacs(root).level, pacs(root).words) == ("warning", "2 transfers wait, the oldest 3 h")
    queue_of(root).send_due(lambda files, *_: Attempt(left=files), only=late)
    assert (pacs(root).level, pacs(root).words) == (
        "failing", "1 transfer failed (recon pacs queue), 1 transfer waits, the oldest 10 min",
    )  # fmt: skip
    found = samples(root)
    assert [found[f"recon_pacs_{name}", frozenset({("archive", "1")})] for name in ("waiting", "failed")] == [1, 1]
    assert 600 <= found["recon_pacs_oldest_seconds", frozenset({("archive", "1")})] < 3600
    assert found["recon_healthy", frozenset()] == 0
    queue_of(root).remove(late)
    assert pacs(root).level == "ok"


def test_archives_are_told_apart_and_not_named(tmp_path: Path) -> None:
    root = tmp_path / "spool"
    second, foreign = Destination("pacs2.example", 104, "SECOND"), Destination("elsewhere.example", 104, "FOREIGN")
    spools.put_status(root, archives=[key_of(ARCHIVE), key_of(second)], archive_queue=str(tmp_path / "pacs"))
    waiting_since(root, 7200, second)
    waiting_since(root, 3 * 3600, foreign)
    assert (
        pacs(root).words == "archive 2: 1 transfer waits, the oldest 2 h; other archives: 1 transfer waits, the oldest 3 h"
    )
    found = samples(root)
    of = {label: found["recon_pacs_waiting", frozenset({("archive", label)})] for label in ("1", "2", "other")}
    assert of == {"1": 0, "2": 1, "other": 1}
    told = exposition(Folder(root)).decode() + repr(health.checks(Folder(root)))
    for word in ("ARCHIVE", "SECOND", "FOREIGN", "example"):
        assert word not in told


def test_what_waits_is_seen_without_a_server_and_under_one_without_archives(tmp_path: Path) -> None:
    """Nobody sends then, and nobody else would say so."""
    root = tmp_path / "spool"
    root.mkdir()
    waiting_since(root, 7200)
    assert pacs(root).level == "warning"
    spools.put_status(root, archives=[], archive_queue="")
    assert pacs(root).level == "warning"


def test_metrics_are_prometheus_text_with_the_right_numbers(tmp_path: Path) -> None:
    tallies = Tallies()
    for seconds in (0.07, 0.2, 0.2, 7000.0):
        tallies.seconds("first_image", "llr", seconds)
    tallies.scan("llr", "sent")
    tallies.scan("llr", "sent")
    tallies.scan("cg_sense", "failed")
    tallies.add("readouts", 640)
    tallies.add("bytes", 10**7)
    tallies.event("fallback")
    spools.journal(tmp_path, spools.row(GOOD, weights=64 * "a", chain="pinqi_t1"), spools.row(FAILED, state="failed"))
    evicted = [["size", "failed", 3], ["age", "unknown", 2]]
    spools.put_status(tmp_path, tallies=tallies, active=[active()], deaths=1, evicted=evicted)
    found = samples(tmp_path)

    def value(name: str, **labels: str) -> float:
        return found[name, frozenset(labels.items())]

    assert value("recon_up") == 1 and value("recon_scans_total", chain="llr", state="sent") == 2
    assert value("recon_scans_total", chain="cg_sense", state="failed") == 1
    assert value("recon_readouts_total") == 640 and value("recon_bytes_total") == 1e7
    assert value("recon_worker_restarts_total") == value("recon_fallbacks_total") == 1
    assert value("recon_queue_length") == 2 and value("recon_active_scans") == 1
    assert value("recon_jobs", state="sent") == value("recon_jobs", state="failed") == 1
    assert value("recon_memory_bytes", process="server") > 10e6  # this very process
    assert value("recon_spool_free_bytes") > 0
    assert value("recon_captures_evicted_total", reason="size", status="failed") == 3
    assert value("recon_captures_evicted_total", reason="age", status="unknown") == 2
    assert value("recon_captures_evicted_total", reason="disk", status="complete") == 0  # there before the first one
    assert value("recon_weights_info", chain="pinqi_t1", sha256=64 * "a") == 1
    assert value("recon_info", recon_gadgets="0.1.0", torch="2.13.0") == 1
    stage = {"stage": "first_image", "chain": "llr"}
    buckets = [value("recon_stage_seconds_bucket", le=str(edge), **stage) for edge in BUCKETS]
    assert buckets == [0, 1, 3, *[3] * (len(BUCKETS) - 3)]
    assert value("recon_stage_seconds_bucket", le="+Inf", **stage) == value("recon_stage_seconds_count", **stage) == 4
    assert value("recon_stage_seconds_sum", **stage) == pytest.approx(7000.47)


@pytest.mark.parametrize("queue", ["\0", 5, "/nonexistent", "/dev/null", "", None])
def test_a_queue_that_is_none_holds_nothing(queue: object, tmp_path: Path) -> None:
    spools.put_status(tmp_path / "spool", archives=[1, "x", "x"], archive_queue=queue)
    assert [backlog.archive for backlog in Folder(tmp_path / "spool").backlog()] == ["1"]


def test_the_first_byte_is_in_the_name() -> None:
    from gadgets.monitor.files import begun, is_job_id

    assert begun(GOOD) == pytest.approx(RECEIVED - 1.0) and begun("20269999T999999.000000Z-00c0ffee") == 0.0
    assert is_job_id(RETRY) and not is_job_id(RETRY + "\n") and not is_job_id("." + GOOD)


def test_reading_needs_no_more_than_reading(tmp_path: Path) -> None:
    spools.journal(tmp_path, spools.row(GOOD))
    spools.put_curves(tmp_path, GOOD)
    spools.put_status(tmp_path)
    before = sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if "sqlite" not in p.name)
    folder = Folder(tmp_path)
    folder.jobs(), folder.job(GOOD), exposition(folder), health.checks(folder)
    folder.close()
    assert sorted((str(p), p.stat().st_mtime_ns) for p in tmp_path.rglob("*") if "sqlite" not in p.name) == before
    assert os.getpid() == folder.status().pid
