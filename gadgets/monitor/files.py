"""The files between server and monitor, and their names.

In the spool: ``server.status`` (a heartbeat with counters, anew every second). In a job's folder (``<capture>.job/``): ``told.json``
(chain, settings, progress, warnings, timings), ``log.txt`` and some of the images, ``image-<series>-<number>.mrd``, each one encoded
MRD message. All of them are written whole or not at all, for the server's user only, and hold no patient data.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from gadgets.capture import JOB_SUFFIX
from gadgets.journal import JobRow

STATUS_FILE = "server.status"
TOLD_FILE = "told.json"
LOG_FILE = "log.txt"
MAX_JSON = 8 << 20
"""Bytes of a file that is still read: ours are far smaller."""

JOB_ID = re.compile(r"[0-9]{8}T[0-9]{6}\.[0-9]{6}Z-[0-9a-f]{8}(\.r[0-9]{1,4})?")
"""A capture's name without its suffix, or that of a retry. Whatever else somebody asks for is not looked for."""

IMAGE_FILE = re.compile(r"image-(\d{4,5})-(\d{6})\.mrd")


def is_job_id(text: str) -> bool:
    """Whether ``text`` can be the name of a job, and so be part of a path."""
    return JOB_ID.fullmatch(text) is not None


def begun(id: str) -> float:
    """When the first byte of a scan came, in seconds since the epoch: its name says so."""
    match = JOB_ID.fullmatch(id)
    if match is None:
        return 0.0
    with contextlib.suppress(ValueError):
        return datetime.strptime(id.partition("Z-")[0] + "+0000", "%Y%m%dT%H%M%S.%f%z").timestamp()
    return 0.0


def job_of(folder: Path) -> str:
    """The job whose folder this is (see ``JobRow.folder``)."""
    name = folder.name
    return name.removesuffix(JOB_SUFFIX) if name.endswith(JOB_SUFFIX) else f"{job_of(folder.parent)}.{name}"


def folder_of(root: Path, job: str) -> Path:
    """Where a job's files are; a retry's lie inside its scan's (see ``JobRow.folder``).

    Raises
    ------
    ValueError
        ``job`` is not the name of one.
    """
    if not is_job_id(job):
        raise ValueError("not a job's id")
    return root / JobRow(job).folder


def image_name(series: int, number: int) -> str:
    """File of the ``number``-th image (from 1) of a series."""
    return f"image-{series:04d}-{number:06d}.mrd"


def read_object(path: Path) -> Mapping[str, Any]:
    """A JSON object; empty when there is none that can be read (it may be gone by now)."""
    try:
        if path.stat().st_size > MAX_JSON:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
