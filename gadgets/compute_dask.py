"""Slices on a Dask cluster: several GPUs, several machines. The scheduler restarts, retries and balances; this module ships and watches.

A slice leaves with its prepared readouts, so that workers need none of the server's files; twice a second the workers are asked for
what their tasks have said. Everything else of a scan stays on the server's own workers, where its files are. When the cluster is
gone, has no worker, or cannot be reached (also when the server starts: no scan must be missed for it), slices are computed here, the
log says so, and the scheduler is looked for.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
import uuid
from collections.abc import Coroutine
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gadgets.compute_pool import Events, Task
from gadgets.device_errors import device_failure
from gadgets.errors import SchedulerError
from gadgets.scheduler_options import SchedulerOptions, local_workers
from recon_core.errors import ReconError

log = logging.getLogger(__name__)

BUSY, IDLE = 0.5, 2.0
"""s between two looks at the workers, while they compute for us and while they do not."""

AHEAD = 2  # tasks sent for each one that is computed: the next one has to be there when a worker is free
PATIENCE = 10.0  # s for an answer of the scheduler
CONNECT = 10.0  # s to reach it
AGAIN = 5.0  # s between attempts to reach a scheduler that was lost, or was not there yet
READY = 120.0  # s for the workers to be made ready: imports, and every method run once
ATTEMPTS, PAUSE = 3, 1.0  # to make the workers ready where the connection ends meanwhile, and s between two of them
DESERTED = 20.0  # s without any worker after which what was sent is computed here
SPEECHLESS = 60.0  # s that a task of an abandoned scan may be silent before its worker is ended

SETTINGS = {
    # its loggers write lines of their own shape to stderr; what matters is in this server's log
    "logging.distributed": "critical",
    "distributed.admin.large-graph-warning-threshold": "8GB",
    # looks at every thread's stack 100 times a second, for a page that nobody opens
    "distributed.worker.profile.enabled": False,
    # how long a worker of our own cluster may take to come back once its process has ended; then Dask gives it up for ever. Its 15 s
    # are less than a new process needs on a busy machine
    "distributed.deploy.lost-worker-timeout": "1h",
}

NOBODY = "nobody answers"


class _Away(ConnectionError):
    """The scheduler is of no use yet, and may be later: nobody answers, or it has answered and the connection ends after that.

    Whoever answers and is none, or refuses us, is something else.
    """


@dataclass(eq=False)
class _Sent:
    """A task on its way: its future once it was submitted, and the worker on which it was last seen."""

    task: Task
    future: Any = None
    worker: str | None = None


class DaskPool:
    """The workers of a Dask cluster.

    Parameters
    ----------
    options
        Which scheduler, and how to reach it.
    threads
        Compute threads of each worker.
    device
        Which device a worker takes: ``auto``, ``cpu`` or ``cuda``.
    events
        Hears what becomes of the tasks.

    Raises
    ------
    SchedulerError
        The extra is not installed, the scheduler refuses us, or a worker has other versions. One that does not answer is no error.
    """

    def __init__(
        self, options: SchedulerOptions, threads: int, device: str, events: Events, *, rehearse: bool = True
    ) -> None:
        self._options, self._threads, self._device, self._events, self._rehearse = options, threads, device, events, rehearse
        self._lock = threading.Lock()
        self._sent: dict[str, _Sent] = {}
        self._abandoned: dict[str, float] = {}
        self._capacity = 0
        self._wanted = local_workers(options.address) or 0
        self._empty_since = time.monotonic()
        self._cluster: Any = None
        self._client: Any = None
        self._problem = ""  # why there is no client, as the log has it
        self._closed = threading.Event()
        self._look_now = threading.Event()
        self._senders = ThreadPoolExecutor(2, thread_name_prefix="ship")
        self._distributed = _import()
        try:
            self._connect()
            self._look()
        except OSError as error:  # after a power cut everything starts at once
            self._lost(error)
        except BaseException:
            self.close()
            raise
        self._watcher = threading.Thread(target=self._watch, name="cluster", daemon=True)
        self._watcher.start()

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def wanted(self) -> int:
        """The most that there have been at a time: whoever started the cluster has told nobody how large it should be."""
        return self._wanted

    def free(self) -> bool:
        with self._lock:
            return len(self._sent) < AHEAD * self._capacity

    def grow(self) -> None:
        pass  # whoever started the cluster decides its size

    def warm(self) -> None:
        """Workers were made ready when they joined."""
        if self._client is not None:
            log.info("event=cluster_ready tasks=%d threads=%d", self.capacity, self._threads)

    def start(self, task: Task) -> None:
        key = uuid.uuid4().hex
        with self._lock:
            self._sent[key] = _Sent(task)
        try:
            self._senders.submit(self._send, key)
        except Exception:  # no thread can be had
            self._forget(key)
            raise

    def stop(self, task: Task) -> None:
        with self._lock:
            found = [(key, sent) for key, sent in self._sent.items() if sent.task is task]
        for key, sent in found:
            self._senders.submit(self._end, key, sent)

    def close(self) -> None:
        self._closed.set()
        self._look_now.set()
        with self._lock:
            left, self._sent = list(self._sent.values()), {}
        for sent in left:
            self._events.died(sent.task, ConnectionError("closed"))
        with contextlib.suppress(Exception):
            self._run(self._give_up([sent.future for sent in left if sent.future is not None]), 2.0)
        self._senders.shutdown(wait=False, cancel_futures=True)
        self._disconnect()
        if self._cluster is not None:
            with contextlib.suppress(Exception):
                self._cluster.close(timeout=PATIENCE)

    # ---- the connection ------------------------------------------------------------------------------------------------

    def _connect(self) -> None:
        """A client, and every worker made ready.

        Raises
        ------
        _Away
            Nobody answers, or a scheduler does and its workers cannot be made ready yet.
        SchedulerError
            Who answers is of no use.
        """
        try:
            target, security = self._target()
            self._knock(target, security)
            self._join(target, security)
        except (_Away, ReconError):
            self._disconnect()
            raise
        except Exception as error:
            self._disconnect()
            remedy = "Is it a Dask scheduler of this version, and are the certificates of its authority?"
            raise SchedulerError(
                "the Dask scheduler cannot be used", where=self._options.address, got=_kind(error), remedy=remedy
            ) from error

    def _target(self) -> tuple[str, Any]:
        """The scheduler's address and how to trust it; a cluster of our own is started first, once."""
        options, address = self._options, self._options.address
        n_local = local_workers(address)
        if n_local is not None and self._cluster is None:
            self._cluster = self._distributed.LocalCluster(
                n_workers=n_local, threads_per_worker=1, processes=True, host="127.0.0.1", dashboard_address="127.0.0.1:0",
                memory_limit=0,
            )  # fmt: skip
        security = None
        if address.startswith("tls://"):
            security = self._distributed.Security(
                tls_ca_file=str(options.ca), tls_client_cert=str(options.cert), tls_client_key=str(options.key),
                require_encryption=True,
            )  # fmt: skip
        return address if self._cluster is None else self._cluster.scheduler_address, security

    def _join(self, target: str, security: Any) -> None:
        """A client of a scheduler that has answered, and every worker made ready.

        It has taken our certificate, so that a connection that ends is no refusal. A scheduler ends it also when that to one of its
        workers ends: the worker's process died meanwhile. The others, and whoever takes its place, can be made ready.

        Raises
        ------
        _Away
            The connection ended each time, or there was no answer in time.
        Exception
            A worker is of no use.
        """
        from distributed.comm.core import CommClosedError

        from gadgets.compute_worker import Prepare, versions

        if self._closed.is_set():
            raise _Away("not wanted any more")
        try:
            self._client = self._distributed.Client(
                target, security=security, timeout=CONNECT, set_as_default=False, name="recon-gadgets"
            )
            for left in reversed(range(ATTEMPTS)):
                try:
                    self._run(self._make_ready(Prepare(versions(), self._threads, rehearse=self._rehearse)), READY)
                    return
                except TimeoutError as error:  # one that hangs keeps the answer of all
                    raise _Away(f"its workers are not ready after {READY:g} s{self._silent_workers()}") from error
                except CommClosedError:
                    if not left or self._closed.wait(PAUSE):
                        raise
        except _Away:
            raise
        except OSError as error:
            raise _Away(f"its workers cannot be made ready: {_kind(error)}") from error

    async def _make_ready(self, plugin: Any) -> None:
        await self._client.register_plugin(plugin)

    def _silent_workers(self) -> str:
        """Which workers the scheduler has not heard of while all were made ready: they hold the others up."""
        with contextlib.suppress(Exception):
            known = self._run(self._client.scheduler.identity(n_workers=-1))["workers"]
            heard = max(worker["last_seen"] for worker in known.values())
            silent = [address for address, worker in known.items() if heard - worker["last_seen"] > READY / 2]
            return f"; silent: {', '.join(silent)}" if silent else ""
        return ""

    def _knock(self, target: str, security: Any) -> None:
        """Whether anybody answers there, within `CONNECT`: a client waits for ever for one that takes the connection and is silent.

        Raises
        ------
        _Away
            Nobody does.
        Exception
            Who answers does not trust us, is not to be trusted, or speaks something else.
        """
        from distributed.comm.core import CommClosedError, connect

        arguments = (security or self._distributed.Security()).get_connection_args("client")

        async def knock() -> None:
            comm = await connect(target, timeout=CONNECT, **arguments)
            await comm.close()

        async def in_time() -> None:
            await asyncio.wait_for(knock(), 2 * CONNECT)

        try:
            asyncio.run(in_time())
        except CommClosedError:  # is an OSError, too
            raise
        except OSError as error:
            raise _Away(NOBODY) from error

    def _disconnect(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with contextlib.suppress(Exception):
                client.close(timeout=2.0)

    def _run(self, coroutine: Coroutine[Any, Any, Any], seconds: float = PATIENCE) -> Any:
        """The result of a coroutine on the client's loop.

        Raises
        ------
        ConnectionError
            There is no client.
        TimeoutError, OSError
            No answer.
        """
        client = self._client
        if client is None:
            coroutine.close()
            raise ConnectionError("not connected")
        running = asyncio.run_coroutine_threadsafe(asyncio.wait_for(coroutine, seconds), client.loop.asyncio_loop)
        return running.result(seconds + 5.0)

    # ---- tasks ---------------------------------------------------------------------------------------------------------

    def _send(self, key: str) -> None:
        """Read a slice's readouts and hand them to the scheduler; on a thread of its own, because both take time."""
        from gadgets.compute_worker import run_packed

        with self._lock:
            sent = self._sent.get(key)
        if sent is None:
            return
        task = sent.task
        try:
            packed = task.args[0].packed(self._device)
        except Exception as error:  # no memory, or the scan's files are gone
            self._forget(key)
            self._events.failed(task, error, "")
            return
        seconds = None if task.budget is None else max(0.0, task.budget.left(time.monotonic()))
        client = self._client
        if client is None:  # the scheduler was lost in this moment; whoever noticed says so
            if self._forget(key) is not None:
                self._events.lost(task)
            return
        try:
            future = client.submit(
                run_packed,
                key,
                task.function,
                packed,
                seconds,
                key=f"recon-{key}",
                pure=False,
                priority=-task.owner.priority,
            )
        except Exception as error:
            log.warning("event=not_sent task=%s error=%s", task.name, _kind(error))
            if self._forget(key) is not None:
                self._events.lost(task)
            return
        sent.future = future
        future.add_done_callback(lambda done: self._done(key, done))
        with self._lock:
            unwanted = key not in self._sent
        if unwanted:  # stopped, or done, meanwhile
            future.cancel()
        self._look_now.set()

    def _done(self, key: str, future: Any) -> None:
        """From a thread of the client."""
        sent = self._forget(key)
        if sent is None:
            return
        task = sent.task
        try:
            if future.status == "finished":
                self._report(key, task, future.result())
            elif future.status == "error":
                error = future.exception()
                if type(error).__name__ == "KilledWorker":
                    self._events.died(task, error)
                else:
                    self._events.failed(task, error, "")
            elif task.stopped is not None or task.owner.abandoned:
                self._events.died(task, ConnectionError("cancelled"))
            else:  # the scheduler went, and everything it knew
                self._events.lost(task)
        except Exception as error:  # the result cannot be fetched any more
            log.warning("event=result_lost task=%s error=%s", task.name, _kind(error))
            self._events.lost(task)
        finally:
            with contextlib.suppress(Exception):
                future.release()

    def _report(self, key: str, task: Task, outcome: Any) -> None:
        _write_words(Path(task.args[0].report_folder), outcome.words)
        tag = getattr(task.args[0], "tag", task.name)
        log.info("event=done_by_cluster task=%s by=%s failed=%s", tag, outcome.by, outcome.error is not None)
        if outcome.error is None:
            self._events.succeeded(task, outcome.result)
        elif device_failure(outcome.error) is None:
            self._events.failed(task, outcome.error, outcome.places)
        else:
            self._senders.submit(self._leave_worker, key, task, outcome)

    def _leave_worker(self, key: str, task: Task, outcome: Any) -> None:
        """A task's GPU failed: its process is ended before anybody hears of it, or the next attempt would begin there."""
        self._end_worker(key, None)
        self._events.failed(task, outcome.error, outcome.places)

    def _forget(self, key: str) -> _Sent | None:
        with self._lock:
            sent = self._sent.pop(key, None)
        if sent is not None:
            self._events.changed()
        return sent

    def _end(self, key: str, sent: _Sent) -> None:
        """Give a task up, and end the process that computes it. In this order: the scheduler would start it elsewhere."""
        if sent.future is not None:
            with contextlib.suppress(Exception):
                self._run(self._give_up([sent.future]))
        self._end_worker(key, sent.worker)
        if self._forget(key) is not None:
            self._events.died(sent.task, ConnectionError("ended"))

    def _end_worker(self, key: str, worker: str | None) -> None:
        from gadgets.compute_worker import end

        where = None if worker is None else [worker]
        try:
            answers = self._run(self._client.run(end, key, workers=where, on_error="ignore", asynchronous=True))
            log.warning("event=worker_ended processes=%d", sum(bool(answer) for answer in answers.values()))
        except Exception as error:
            log.warning("event=worker_not_ended error=%s", _kind(error))

    async def _give_up(self, futures: list[Any]) -> None:
        await self._client.cancel(futures, asynchronous=True, force=True)

    # ---- watching ------------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._closed.is_set():
            self._look_now.wait(BUSY if self._sent or self._abandoned else IDLE)
            self._look_now.clear()
            if self._closed.is_set():
                return
            try:
                if self._client is None:
                    self._connect()
                    log.warning("event=scheduler_back address=%s", self._options.address)
                    self._problem = ""
                self._look()
            except Exception as error:
                if not self._closed.is_set():
                    self._lost(error)
                    self._closed.wait(AGAIN)

    def _lost(self, error: BaseException) -> None:
        """No scheduler: what it had is computed here. Said once, until there is something else to say."""
        problem = str(error) if isinstance(error, ReconError | _Away) else _kind(error)
        if self._client is not None:
            log.error("event=scheduler_lost error=%s action=local", _kind(error))
            problem = NOBODY  # that it stays away is no news
        elif problem == self._problem:
            pass
        elif isinstance(error, _Away):
            log.warning("event=scheduler_away address=%s text=%r action=local", self._options.address, problem)
        else:
            log.error("event=scheduler_refused text=%r action=local", problem)
        self._problem = problem
        self._disconnect()
        self._capacity = 0
        with self._lock:
            left, self._sent = list(self._sent.values()), {}
            self._abandoned.clear()
        for sent in left:
            self._events.lost(sent.task)
        self._events.changed()

    def _look(self) -> None:
        """Ask who is there and what the tasks say."""
        self._give_up_abandoned()
        found = self._run(self._ask(list(self._abandoned)))
        before, self._capacity = self._capacity, found[0]
        self._wanted = max(self._wanted, self._capacity)
        if before != self._capacity:
            log.info("event=cluster_size tasks=%d before=%d", self._capacity, before)
            self._events.changed()
        self._empty_since = time.monotonic() if self._capacity else self._empty_since
        if time.monotonic() - self._empty_since > DESERTED:
            self._take_back()
        for worker, running in found[1].items():
            for key, said in running.items():
                self._hear(key, worker, said)

    def _take_back(self) -> None:
        """Nobody is there to compute what was sent, and nobody came for a while: it is computed here."""
        with self._lock:
            left, self._sent = list(self._sent.values()), {}
        if not left:
            return
        log.error("event=cluster_deserted tasks=%d action=local", len(left))
        self._run(self._give_up([sent.future for sent in left if sent.future is not None]))
        for sent in left:
            self._events.lost(sent.task)

    async def _ask(self, abandoned: list[str]) -> tuple[int, dict[str, Any]]:
        from gadgets.compute_worker import news

        known = (await self._client.scheduler.identity(n_workers=-1))["workers"]
        capacity = sum(int(worker["nthreads"]) for worker in known.values())
        if not (self._sent or abandoned):
            return capacity, {}
        # each worker for itself: one that holds its interpreter's lock must not keep the others' words back
        answers = await asyncio.gather(
            *(
                asyncio.wait_for(
                    self._client.run(news, abandoned, workers=[address], on_error="ignore", asynchronous=True), PATIENCE / 2
                )
                for address in known
            ),
            return_exceptions=True,
        )
        words: dict[str, Any] = {}
        for answer in answers:
            if isinstance(answer, dict):
                words.update({address: said for address, said in answer.items() if isinstance(said, dict)})
        return capacity, words

    def _hear(self, key: str, worker: str, said: Any) -> None:
        with self._lock:
            sent = self._sent.get(key)
        if sent is None:
            return
        if sent.worker is None:
            self._events.began(sent.task)
        elif sent.worker != worker:
            log.warning("event=worker_died task=%s action=retry by=scheduler", sent.task.name)
        sent.worker = worker
        _write_words(Path(sent.task.args[0].report_folder), said.words)

    def _give_up_abandoned(self) -> None:
        """Tasks of scans that were given up: drop them, and end those that do not notice."""
        with self._lock:
            gone = [(key, sent) for key, sent in self._sent.items() if sent.task.owner.abandoned and sent.future is not None]
            silent = [key for key, since in self._abandoned.items() if time.monotonic() - since > SPEECHLESS]
            for key in silent:
                del self._abandoned[key]
        for key in silent:
            self._end_worker(key, None)
        if gone:
            with self._lock:
                self._abandoned.update({key: time.monotonic() for key, _ in gone})
            self._run(self._give_up([sent.future for _, sent in gone]))
            for key, sent in gone:
                if self._forget(key) is not None:
                    self._events.died(sent.task, ConnectionError("given up"))


def _write_words(folder: Path, words: Any) -> None:
    """What a task wrote elsewhere, as if it had written it here; nothing when the scan is over."""
    for name, content in words.items():
        if "/" in name or name.startswith("."):
            continue
        part = folder / f"{name}.part"
        with contextlib.suppress(OSError):
            part.write_bytes(content)
            os.replace(part, folder / name)


def _kind(error: BaseException) -> str:
    return type(error).__name__


def _import() -> Any:
    try:
        import dask

        dask.config.set(SETTINGS)
        import distributed

        logging.getLogger("distributed").setLevel(logging.CRITICAL)
    except ImportError as error:
        raise SchedulerError(
            "Dask is not installed", where="scheduler", remedy="pip install 'recon-gadgets[dask]'"
        ) from error
    return distributed
