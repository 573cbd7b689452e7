"""Spools without a server: a journal, job folders and a status as a server writes them."""

from __future__ import annotations

import atexit
import os
import shutil
import subprocess
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from gadgets.capture import write_sidecar
from gadgets.job_folder import JobRecord, write_job_folder
from gadgets.journal import JobRow, Journal
from gadgets.meta import write_meta
from gadgets.monitor.files import LOG_FILE, STATUS_FILE, folder_of, image_name
from gadgets.monitor.tallies import Tallies
from gadgets.wire import codec
from gadgets.wire.dtypes import IMAGE_HEADER
from recon_core.types import Result
from tests.waiting import PATIENCE

GOOD = "20261120T101500.250000Z-00c0ffee"
FAILED = "20261120T101000.000000Z-0badcafe"
RETRY = f"{GOOD}.r1"
RECEIVED = 1_795_169_701.25  # one second after GOOD's first byte
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{7*7}}"


def row(id: str, **values: Any) -> JobRow:
    given: dict[str, Any] = {
        "chain": "moe_dqinr_t1", "state": "sent", "received": RECEIVED, "started": RECEIVED, "finished": RECEIVED + 12.5,
        "timings": {"receiving": 1.0, "first_image": 4.0, "last_image": 12.5}, "n_readouts": 640, "n_images": 9,
        "settings": {"name": "moe_dqinr_t1", "method": {"experts": 4, "preset": "cpu"}},
        "versions": {"recon-gadgets": "0.1.0", "torch": "2.13.0"}, "capture": f"{id}.mrd",
    }  # fmt: skip
    return JobRow(id, **{**given, **values})


def journal(root: Path, *rows: JobRow) -> None:
    root.mkdir(parents=True, exist_ok=True)
    book = Journal(root)
    for each in rows:
        book.put(each)
    book.close()


def image(series: int, number: int, pixels: np.ndarray[Any, Any], **meta: Any) -> bytes:
    """One encoded image of ``(z, y, x)``."""
    header = np.zeros((), IMAGE_HEADER)
    header["image_series_index"], header["image_index"], header["image_type"] = series, number, 1
    header["field_of_view"] = (pixels.shape[2], pixels.shape[1], pixels.shape[0])
    return codec.image(header, write_meta(meta), pixels[None])


def put_images(root: Path, id: str) -> None:
    """Three contrast images and a T1 map in ms, T1 1000 inside a disc."""
    folder = folder_of(root, id)
    folder.mkdir(parents=True, exist_ok=True)
    y, x = np.mgrid[:48, :64]
    disc = ((y - 24) ** 2 + (x - 32) ** 2 < 300)[None]
    for number in (1, 2, 3):
        contrast = (disc * 1000 * number).astype(np.uint16)
        path = folder / image_name(1, number)
        path.write_bytes(
            image(1, number, contrast, SequenceDescriptionAdditional="moe", WindowCenter=1500, WindowWidth=3000)
        )
    values = {
        "SequenceDescriptionAdditional": "moe T1", "QuantityName": "T1", "QuantityUnit": "ms", "RescaleSlope": 1.0,
        "RescaleIntercept": 0.0, "WindowCenter": 1000, "WindowWidth": 2000, "DataRole": "Quantitative",
    }  # fmt: skip
    (folder / image_name(2, 1)).write_bytes(image(2, 1, (disc * 1000).astype(np.uint16), **values))


def put_curves(root: Path, id: str) -> None:
    """What MoE-dqINR tells: loss, held-out error, routing weights (state, expert)."""
    shutil.copytree(_curves(), folder_of(root, id), dirs_exist_ok=True)


@cache
def _curves() -> Path:
    """Made once: drawing takes seconds."""
    made = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    weights = np.zeros((9, 4), np.float32)
    weights[np.arange(9), np.arange(9) % 4] = 1
    extras = {
        "routing_weights": weights,
        "loss": np.geomspace(1, 1e-3, 200).astype(np.float32),
        "held_out": np.array([[0, 0.5], [100, 0.2], [199, 0.1]], np.float32),
    }
    record = JobRecord("moe_dqinr_t1")
    record.add(0, "moe_dqinr_t1", Result(images=(), quality={"residual": 1.02}, notes=("stopped early",), extras=extras))
    write_job_folder(made / "job", record)
    return made / "job"


def put_log(root: Path, id: str, text: str) -> None:
    folder = folder_of(root, id)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOG_FILE).write_text(text)


def put_status(
    root: Path,
    *,
    age: float = -PATIENCE,
    pid: int | None = None,
    tallies: Tallies | None = None,
    active: Any = (),
    **server: Any,
) -> None:
    """A server's word, ``age`` seconds ago; by default of this very process, without workers, and fresh for as long as a test takes."""
    root.mkdir(parents=True, exist_ok=True)
    said = {
        "time": time.time() - age,
        "started": time.time() - 3600,
        "pid": os.getpid() if pid is None else pid,
        "server": {
            "listening": True, "connections": 1, "workers": 0, "device": "cpu", "queued": 2, "min_free_bytes": 0,
            "versions": {"recon-gadgets": "0.1.0", "torch": "2.13.0"}, **server,
        },
        "active": list(active),
        "tallies": (tallies or Tallies()).document(),
    }  # fmt: skip
    write_sidecar(root / STATUS_FILE, said)


def gone_process() -> int:
    """The number of a process that is no more."""
    child = subprocess.Popen(["true"])
    child.wait()
    return child.pid
