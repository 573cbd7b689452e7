"""Retrying a job from its raw data: by the server that keeps the spool, or in this process when none runs."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from gadgets.errors import ImageFileError, RetryFailed
from gadgets.journal import JobRow, Journal
from gadgets.outputs import check_file
from gadgets.recovery import require_capture

LOOK_SECONDS = 0.2


def retry(
    root: Path,
    name: str,
    *,
    config: str | None = None,
    settings: Mapping[str, str] | None = None,
    output: Path | None = None,
    here: Callable[[JobRow], JobRow],
) -> tuple[JobRow, Path]:
    """Reconstruct a job again and wait for it.

    Parameters
    ----------
    root
        The spool's folder.
    name
        Id of a job, or enough of its beginning.
    config, settings
        Another chain, and settings by name; by default what the scanner asked for.
    output
        Where the image file is copied to; it must not exist.
    here
        Reconstructs a waiting row in this process, when no server does it.

    Returns
    -------
    The new row, and its image file.

    Raises
    ------
    UnknownJob, CaptureGone
        No such job, or no raw data of it.
    RetryFailed
        It did not work out, for the reason in the row.
    ImageFileError, OutputError
        ``output`` exists, or cannot be written.
    JournalError
        The journal cannot be used.
    """
    if output is not None and output.exists():
        raise ImageFileError("the file exists", where=str(output), remedy="Name another one: nothing is overwritten")
    if output is not None:
        check_file(output)
    journal = Journal.open(root)
    try:
        original = journal.find(name)
        require_capture(root, original)
        row = journal.add_retry(original, {"config": config, "set": dict(settings or {})})
        row = _wait(journal, row, here)
    finally:
        journal.close()
    if row.state != "sent":
        raise RetryFailed("the retry failed", where=f"job {row.id}", got=row.why)
    images = row.images(root)
    if images is None:
        said = " | ".join(row.warnings)
        raise RetryFailed("the retry made no images", where=f"job {row.id}", got=said or f"{row.n_readouts} readouts")
    return row, images if output is None else _copied(images, output)


def _wait(journal: Journal, row: JobRow, here: Callable[[JobRow], JobRow]) -> JobRow:
    while True:
        row = journal.row(row.id)
        if row.is_over:
            return row
        # a server may die in the middle of it: then it is taken over
        if not journal.has_server() and not (row.owner and journal.is_alive(row.owner)):
            row = here(row)
        else:
            time.sleep(LOOK_SECONDS)


def _copied(images: Path, output: Path) -> Path:
    part = output.with_name(f".{output.name}.part")
    try:
        shutil.copyfile(images, part)
        os.replace(part, output)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise ImageFileError("cannot be written", where=str(output), got=error.strerror) from None
    return output
