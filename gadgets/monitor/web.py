"""The pages and the two machine-readable answers, as a Starlette application. Everything only reads."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from gadgets.monitor import charts, health
from gadgets.monitor.access import Access
from gadgets.monitor.folder import Folder, Job, JobDetails, Slice
from gadgets.monitor.metrics import CONTENT_TYPE, exposition
from gadgets.monitor.pictures import Gallery

HERE = Path(__file__).parent
JOBS_SHOWN = 50
STREAM_SECONDS = 1.0
GLANCE_SECONDS = 0.8
KEEP_ALIVE_SECONDS = 15.0
MAX_STREAMS = 24
"""Open pages that are told news; further ones ask every few seconds instead."""

CHECKS = ("server", "workers", "spool", "queue", "last", "gpu", "pacs", "cluster")


class Pages:
    """The answers of one monitor.

    Parameters
    ----------
    folder, gallery
        What is shown.
    locked
        Whether there is a token, and so a log-in.
    """

    def __init__(self, folder: Folder, gallery: Gallery, *, locked: bool) -> None:
        self.folder, self.gallery, self.locked = folder, gallery, locked
        self._streams = 0
        self._lock = threading.Lock()
        self._glance: dict[str, Any] = {}
        self._looked = -math.inf
        self._templates = Environment(
            loader=FileSystemLoader(HERE / "templates"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
        )
        self._templates.filters |= {
            "words": progress_words,
            "size": health.size,
            "duration": health.duration,
            "clock": clock,
            "stamp": stamp,
        }

    def routes(self) -> list[Any]:
        """All that can be asked for."""
        return [
            Route("/", self.jobs),
            Route("/events", self.jobs_events),
            Route("/jobs/{job}", self.job),
            Route("/jobs/{job}/events", self.job_events),
            Route("/jobs/{job}/pictures/{series:int}.png", self.picture),
            Route("/jobs/{job}/thumbnail.png", self.thumbnail),
            Route("/healthz", self.healthz),
            Route("/metrics", self.metrics),
            Route("/login", self.login),
            Mount("/static", StaticFiles(directory=HERE / "static")),
        ]

    # Endpoints without ``async`` run in threads: files and the journal may be slow.

    def jobs(self, request: Request) -> Response:
        """The list of jobs."""
        status = self.folder.status()
        jobs = self.folder.jobs(JOBS_SHOWN, status)
        pictures = {job.id: self.gallery.best(job.id) for job in jobs}
        found = health.checks(self.folder, status, jobs)
        return self._page(
            "jobs.html",
            jobs=jobs,
            pictures=pictures,
            checks=found,
            worst=health.worst(found),
            version=_version(self._look()),
        )

    def job(self, request: Request) -> Response:
        """Everything about one job."""
        details = self._details(request)
        sent = dict(details.series)
        return self._page(
            "job.html",
            details=details,
            job=details.job,
            row=details.row,
            pictures=[replace(p, n_sent=sent.get(p.series, 0)) for p in self.gallery.of(details.job.id)],
            slices=[(part, _charts(part)) for part in details.quality],
            version=_version(self._one(details.job.id)),
        )

    def picture(self, request: Request) -> Response:
        """A montage of one series."""
        return self._png(request, request.path_params["series"], thumbnail=False)

    def thumbnail(self, request: Request) -> Response:
        """A small picture of the job."""
        best = self.gallery.best(request.path_params["job"])
        if best is None:
            raise HTTPException(404)
        return self._png(request, best.series, thumbnail=True)

    def healthz(self, request: Request) -> Response:
        """200 or 503, and why; to those without the token only which. ``?check=server`` looks at one thing."""
        found = health.checks(self.folder)
        chosen = request.query_params.getlist("check")
        if not set(chosen) <= set(CHECKS):
            return JSONResponse({"status": "unknown check", "checks": CHECKS}, 400)
        found = tuple(check for check in found if not chosen or check.name in chosen)
        level = health.worst(found)
        said: dict[str, Any] = {"status": level}
        if request.scope["recon.known"]:
            status = self.folder.status()
            said |= {
                "reasons": [f"{check.name}: {check.words}" for check in found if check.level != "ok"],
                "checks": {check.name: {"status": check.level, "text": check.words} for check in found},
                "free_bytes": self.folder.free_bytes(),
                "queue": health.queue_length(status),
            }
        return JSONResponse(said, 503 if level == "failing" else 200)

    def metrics(self, request: Request) -> Response:
        """Prometheus' text."""
        return Response(exposition(self.folder), media_type=CONTENT_TYPE)

    def login(self, request: Request) -> Response:
        """The form for the token."""
        if not self.locked or request.scope["recon.known"]:
            return RedirectResponse("/", 303)
        return self._page("login.html", again="again" in request.query_params)

    async def jobs_events(self, request: Request) -> Response:
        """News of the list."""
        return await self._stream(request, self._jobs)

    async def job_events(self, request: Request) -> Response:
        """News of one job."""
        job = request.path_params["job"]
        if await run_in_threadpool(self.folder.job, job) is None:
            raise HTTPException(404)
        return await self._stream(request, lambda: self._one(job))

    # -- what is new -----------------------------------------------------------------------------------------------------

    def _jobs(self) -> dict[str, Any]:
        """News of the list, looked up once for all who have it open."""
        with self._lock:
            if time.monotonic() - self._looked > GLANCE_SECONDS:
                self._glance, self._looked = self._look(), time.monotonic()
            return self._glance

    def _look(self) -> dict[str, Any]:
        status = self.folder.status()
        jobs = self.folder.jobs(JOBS_SHOWN, status)
        shape = [[job.id, job.state, job.n_warnings, job.n_images > 0] for job in jobs]
        levels = [[check.name, check.level] for check in health.checks(self.folder, status, jobs)]
        transfers = [[backlog.archive, backlog.waiting, backlog.failed] for backlog in self.folder.backlog(status)]
        return {"shape": [shape, levels, transfers], "jobs": {job.id: progress(job) for job in jobs if not job.is_over}}

    def _one(self, id: str) -> dict[str, Any]:
        details = self.folder.job(id)
        if details is None:
            return {"shape": [], "jobs": {}}
        series = [[picture.series, picture.version] for picture in self.gallery.of(id)]
        shape = [
            details.job.state,
            len(details.warnings),
            len(details.words),
            len(details.log),
            series,
            len(details.quality),
        ]
        return {"shape": shape, "jobs": {} if details.job.is_over else {id: progress(details.job)}}

    async def _stream(self, request: Request, look: Callable[[], dict[str, Any]]) -> Response:
        if request.method == "HEAD":
            return Response(media_type="text/event-stream")
        if self._streams >= MAX_STREAMS:
            raise HTTPException(503, "too many open pages")

        async def events() -> AsyncIterator[str]:
            self._streams += 1
            try:
                said, spoke = "", 0.0
                while not await request.is_disconnected():
                    seen = await run_in_threadpool(look)
                    words = json.dumps({"version": _version(seen), "jobs": seen["jobs"]})
                    if words != said:
                        said, spoke = words, time.monotonic()
                        yield f"data: {words}\n\n"
                    elif time.monotonic() - spoke > KEEP_ALIVE_SECONDS:
                        spoke = time.monotonic()
                        yield ": still here\n\n"
                    await asyncio.sleep(STREAM_SECONDS)
            finally:
                self._streams -= 1

        return StreamingResponse(events(), media_type="text/event-stream")

    # -- parts -------------------------------------------------------------------------------------------------------------

    def _details(self, request: Request) -> JobDetails:
        details = self.folder.job(request.path_params["job"])
        if details is None:
            raise HTTPException(404)
        return details

    def _png(self, request: Request, series: int, *, thumbnail: bool) -> Response:
        path = self.gallery.png(request.path_params["job"], series, thumbnail=thumbnail)
        if path is None:
            raise HTTPException(404)
        return FileResponse(path, media_type="image/png", headers={"Cache-Control": "private, max-age=3600"})

    def _page(self, name: str, status_code: int = 200, **values: Any) -> Response:
        return HTMLResponse(
            self._templates.get_template(name).render(locked=self.locked, now=time.time(), **values), status_code
        )

    def refused(self, request: Request, error: Exception) -> Response:
        """A page for what is not there."""
        code = error.status_code if isinstance(error, HTTPException) else 500
        words = {404: "There is no such page or job.", 405: "This monitor can only be read."}.get(code, "This did not work.")
        return self._page("error.html", code, code=code, words=words)


def application(folder: Folder, gallery: Gallery, *, host: str, token: str | None) -> Starlette:
    """The monitor of one spool.

    Parameters
    ----------
    host
        Where it is listened on (see ``gadgets.monitor.access``).
    token
        What one has to know to look; ``None`` on loopback.
    """
    pages = Pages(folder, gallery, locked=token is not None)
    return Starlette(
        routes=pages.routes(),
        middleware=[Middleware(Access, host=host, token=token)],
        exception_handlers={HTTPException: pages.refused, Exception: pages.refused},
    )


def progress(job: Job) -> dict[str, Any]:
    """What moves on the page while a job runs."""
    return {"fraction": round(job.fraction, 3), "words": progress_words(job)}


def progress_words(job: Job) -> str:
    """How far a job is, for people."""
    if job.state == "receiving":
        return f"{job.n_readouts} readouts, {health.size(job.n_bytes)}"
    if job.state == "received":
        return "waits"
    if not job.watched:
        return "no server says how far it is"
    left = f", about {job.left} left" if job.left else ""
    return f"{100 * job.fraction:.0f} %{left}"


def clock(seconds: float) -> str:
    """Date and time in UTC."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S")


def stamp(seconds: float) -> str:
    """The same for machines."""
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def _version(seen: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(seen["shape"]).encode(), digest_size=8).hexdigest()


def _charts(part: Slice) -> list[Any]:
    """The curves of one slice, drawn."""
    found = []
    loss, held_out = part.curves.get("loss", []), part.curves.get("held_out", [])
    if held_out:
        lines = [charts.Curve("held-out error", held_out, "a")]
        found.append(
            ("Error of held-out samples", charts.curves("Error of held-out samples", "iteration", "relative error", lines))
        )
    if loss:
        found.append(("Loss", charts.curves("Loss", "iteration", "loss", [charts.Curve("loss", loss, "b")])))
    weights = [row[1:] for row in part.curves.get("routing_weights", [])]
    if weights:
        found.append(("Routing weights", charts.heat_map("Routing weights", "expert", "state", weights)))
    return [(name, drawn) for name, drawn in found if drawn]
