"""Prometheus' text format of what a server counts and of what the monitor can see."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from gadgets.monitor.folder import Folder, Status, number
from gadgets.monitor.health import checks, queue_length, worst
from gadgets.monitor.processes import memory_of
from gadgets.pacs_backlog import Backlog

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def exposition(folder: Folder) -> bytes:
    """All metrics of one server.

    Counters begin at zero with the server's process (Prometheus' ``rate`` expects that); ``recon_jobs`` counts the journal.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(folder))
    return generate_latest(registry)


class _Collector(Collector):
    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def describe(self) -> list[Metric]:
        return []  # nothing is registered twice: the registry is made anew for each answer

    def collect(self) -> Iterator[Metric]:
        status = self._folder.status()
        found = checks(self._folder, status)
        yield _gauge("recon_up", "1 if the server runs and does not hang.", int(status.alive))
        yield _gauge("recon_healthy", "1 if no check of /healthz fails.", int(worst(found) != "failing"))
        yield from self._machine(status)
        yield from _archives(self._folder.backlog(status))
        yield from _counted(status.tallies)
        jobs = GaugeMetricFamily("recon_jobs", "Jobs in the journal by state.", labels=["state"])
        for state, n in sorted(self._folder.counts().items()):
            jobs.add_metric([state], n)
        yield jobs
        versions = status.server.get("versions")
        if isinstance(versions, dict):
            labels = {str(name).replace("-", "_"): str(value) for name, value in versions.items()}
            info = GaugeMetricFamily("recon_info", "Versions of the running server.", labels=list(labels))
            info.add_metric(list(labels.values()), 1)
            yield info
        weights = GaugeMetricFamily("recon_weights_info", "Trained weights of the last jobs.", labels=["chain", "sha256"])
        for chain, digest in sorted(self._folder.weights()):
            weights.add_metric([chain, digest], 1)
        yield weights

    def _machine(self, status: Status) -> Iterator[Metric]:
        said, workers = status.server, status.workers()
        yield _gauge("recon_spool_free_bytes", "Free on the spool's disk.", max(0, self._folder.free_bytes()))
        yield _gauge("recon_spool_min_free_bytes", "Below this, raw data are not kept.", number(said.get("min_free_bytes")))
        yield _evicted(said.get("evicted"))
        yield _gauge("recon_queue_length", "Tasks (slices, files) that wait for a worker.", queue_length(status))
        yield _gauge("recon_active_scans", "Scans being received or reconstructed.", len(status.active))
        yield _gauge("recon_connections", "Open connections.", number(said.get("connections")) if status.alive else 0)
        yield _gauge("recon_workers", "Compute processes that live on this machine.", len(workers))
        yield _gauge("recon_workers_wanted", "Compute processes that there should be.", number(said.get("workers")))
        if said.get("cluster_wanted") is not None:
            there = number(said.get("cluster")) if status.alive else 0
            yield _gauge("recon_cluster_capacity", "Tasks at a time on the Dask cluster.", there)
            yield _gauge(
                "recon_cluster_capacity_wanted", "The most that there have been.", number(said.get("cluster_wanted"))
            )
        deaths = number(said.get("deaths"))
        yield CounterMetricFamily("recon_worker_restarts", "Compute processes that died and were replaced.", value=deaths)
        yield _gauge("recon_start_time_seconds", "When the server started.", number(status.said.get("started")))
        memory = GaugeMetricFamily("recon_memory_bytes", "Resident memory.", labels=["process"])
        memory.add_metric(["server"], memory_of(status.pid) if status.exists else 0)
        memory.add_metric(["workers"], sum(process.memory for process in workers))
        yield memory


def _archives(backlogs: Iterable[Backlog]) -> Iterator[Metric]:
    waiting = GaugeMetricFamily("recon_pacs_waiting", "Transfers that wait for an archive.", labels=["archive"])
    failed = GaugeMetricFamily("recon_pacs_failed", "Transfers that were given up.", labels=["archive"])
    oldest = GaugeMetricFamily("recon_pacs_oldest_seconds", "How long the oldest one has waited.", labels=["archive"])
    for backlog in backlogs:
        waiting.add_metric([backlog.archive], backlog.waiting)
        failed.add_metric([backlog.archive], backlog.failed)
        oldest.add_metric([backlog.archive], backlog.oldest)
    yield from (waiting, failed, oldest)


def _evicted(rows: Any) -> Metric:
    found = CounterMetricFamily(
        "recon_captures_evicted",
        "Raw data that were removed, by why and how their scan had ended.",
        labels=["reason", "status"],
    )
    counted = {(reason, status): 0.0 for reason in ("age", "disk", "size") for status in ("complete", "failed", "truncated")}
    counted |= {(str(reason), str(status)): number(n) for reason, status, n in _rows(rows, 3)}
    for labels, n in sorted(counted.items()):
        found.add_metric(labels, n)
    return found


def _counted(tallies: Any) -> Iterator[Metric]:
    scans = CounterMetricFamily("recon_scans", "Scans that have ended, by chain and how.", labels=["chain", "state"])
    for chain, state, n in _rows(tallies.get("scans"), 3):
        scans.add_metric([str(chain), str(state)], number(n))
    yield scans
    counts = tallies.get("counts") if isinstance(tallies.get("counts"), dict) else {}
    for name, words in (("readouts", "Readouts received."), ("bytes", "Bytes received."), ("images", "Images sent.")):
        yield CounterMetricFamily(f"recon_{name}", words, value=number(counts.get(name)))
    events = tallies.get("events") if isinstance(tallies.get("events"), dict) else {}
    yield CounterMetricFamily(
        "recon_fallbacks", "Slices that another chain stood in for.", value=number(events.get("fallback"))
    )
    warnings = CounterMetricFamily("recon_log_events", "Warnings and errors in the log, by event.", labels=["event"])
    for name, n in sorted(events.items()):
        warnings.add_metric([str(name)], number(n))
    yield warnings
    stages = HistogramMetricFamily("recon_stage_seconds", "What scans took, by stage and chain.", labels=["stage", "chain"])
    edges = [floatToGoString(number(edge)) for edge in tallies.get("buckets") or ()]
    for stage, chain, counted, total in _rows(tallies.get("stages"), 4):
        if isinstance(counted, list) and len(counted) == len(edges) + 1:
            below, buckets = 0.0, []
            for edge, n in zip([*edges, "+Inf"], counted, strict=True):
                below += number(n)
                buckets.append((edge, below))
            stages.add_metric([str(stage), str(chain)], buckets, sum_value=number(total))
    yield stages


def _rows(value: Any, n: int) -> list[list[Any]]:
    return [row for row in value if isinstance(row, list) and len(row) == n] if isinstance(value, list) else []


def _gauge(name: str, words: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, words, value=value)
