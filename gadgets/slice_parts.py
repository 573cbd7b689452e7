"""The states of one slice on several workers: which ones each computes, their images put together, and the maps that need all of them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gadgets.devices import device_of_task
from gadgets.reports import FileReport
from gadgets.tasks import (
    Role,
    SliceJob,
    SliceReport,
    as_tensor,
    from_portable,
    portable,
    report_tag,
    state_images,
    told_of_memory,
)
from recon_core.batches import batch_share
from recon_core.maps.settings import MapSettings
from recon_core.reconstruct import finish
from recon_core.state_images import StateImages, join_states
from recon_core.types import Result, ScanInfo


def shares(n_states: int, n_parts: int) -> list[tuple[int, int]]:
    """First and one past the last state of each part: neighbours together, sizes that differ by one at most, none empty."""
    n_parts = max(1, min(n_parts, n_states))
    edges = [n_states * part // n_parts for part in range(n_parts + 1)]
    return list(itertools.pairwise(edges))


def failure_of(done: Future[Any]) -> BaseException | None:
    """What became of a task that is over; one that was cancelled raises when it is asked, and has failed like any other."""
    return CancelledError() if done.cancelled() else done.exception()


def reconstruct_states(job: SliceJob) -> StateImages:
    """Some of the states of a slice; what they have in common with the others is found from the whole slice.

    Raises
    ------
    ReconError
        As `gadgets.tasks.reconstruct_slice`.
    """
    return told_of_memory(_reconstruct_states, job)


def _reconstruct_states(job: SliceJob) -> StateImages:
    images = state_images(job, SliceReport(job))
    return replace(images, result=portable(images.result.to("cpu")))


@dataclass(frozen=True)
class MapsJob:
    """Fit the maps of one slice to the images of all its states. The fields are those of `SliceJob`."""

    images: StateImages
    slice_index: int
    scan: ScanInfo
    maps: MapSettings
    report_folder: str
    role: Role
    device: str
    batch_share: float
    cpu_only: bool
    given_mask: NDArray[np.bool_] | None

    @classmethod
    def of(cls, job: SliceJob, images: StateImages) -> MapsJob:
        """What follows the parts of ``job``, a job for the whole slice."""
        portable_images = replace(images, result=portable(images.result))
        return cls(
            portable_images, job.slice_index, job.scan, job.recipe.maps, job.report_folder, job.role, job.device,
            job.batch_share, job.cpu_only, job.given_mask,
        )  # fmt: skip

    @property
    def tag(self) -> str:
        """Under which name it reports; the parts have others."""
        return report_tag(self.role, self.slice_index)

    def packed(self, device: str) -> MapsJob:
        """The same job for a worker elsewhere, which chooses ``device``: the images are in it already."""
        return replace(self, device=device)


def fit_maps(job: MapsJob) -> Result:
    """The images of the slice and their maps, as one task would have made them.

    Raises
    ------
    ReconError
        No map can be made, and the recipe calls this an error; ``JobFailed`` when memory ran out or the GPU failed.
    """
    return told_of_memory(_fit_maps, job)


def _fit_maps(job: MapsJob) -> Result:
    report = FileReport(Path(job.report_folder), job.tag)
    # fitted where the images were made: sums are ordered in another way on another device
    there = from_portable(job.images.result).to("cpu" if job.cpu_only else device_of_task(job.device))
    with batch_share(job.batch_share):
        return portable(finish(replace(job.images, result=there), job.scan, job.maps, report, as_tensor(job.given_mask)))


class SliceParts:
    """The tasks of one slice, and its images when all are done.

    A part that fails fails the slice: whatever stands in for it stands in for all states, or contrasts would come from two methods.
    The others are waited for: they take as long, and what comes next needs their memory.

    Parameters
    ----------
    tags, parts
        Under which name each task reports, and its images; in the order of the states.
    maps
        Submits the fit of the slice's maps; ``None`` where there are none.
    """

    def __init__(
        self,
        tags: Sequence[str],
        parts: Sequence[Future[StateImages]],
        maps: Callable[[StateImages], Future[Result]] | None = None,
    ) -> None:
        self.whole: Future[Result] = Future()
        self._tags, self._maps = tuple(tags), maps
        self._lock = threading.Lock()
        self._done: set[str] = set()
        self._images: dict[int, StateImages] = {}
        self._failures: dict[int, BaseException] = {}
        for number, part in enumerate(parts):
            part.add_done_callback(lambda done, number=number: self._ended(number, done))  # type: ignore[misc]

    @classmethod
    def of_one(cls, tag: str, future: Future[Result]) -> SliceParts:
        """A slice that one task computes."""
        made = cls((tag,), ())
        made.whole = future
        return made

    def fraction(self, reported: Mapping[str, float]) -> float | None:
        """Of the slice, 0 to 1, from what its tasks have reported by tag; ``None`` when none has begun."""
        if self.whole.done() and self.whole.exception() is None:
            return 1.0
        with self._lock:
            known = [1.0 if tag in self._done else reported.get(tag) for tag in self._tags]
        begun = [fraction for fraction in known if fraction is not None]
        return sum(begun) / len(known) if begun else None

    def _ended(self, number: int, part: Future[StateImages]) -> None:
        """From a thread of whoever computes."""
        failure = failure_of(part)
        with self._lock:
            if failure is None:
                self._images[number] = part.result()
                self._done.add(self._tags[number])
            else:
                self._failures[number] = failure
            if len(self._images) + len(self._failures) < len(self._tags):
                return
            images = [self._images[n] for n in sorted(self._images)]
            self._images.clear()  # joined in a moment: not needed twice
        if self._failures:
            self.whole.set_exception(self._failures[min(self._failures)])
            return
        try:
            self._join(images)
        except (
            BaseException
        ) as error:  # an exception of a callback is only logged: the slice would be waited for without end
            self.whole.set_exception(error)

    def _join(self, images: list[StateImages]) -> None:
        joined = join_states([replace(part, result=from_portable(part.result)) for part in images])
        if self._maps is None:
            self.whole.set_result(portable(joined.result))
        else:
            self._maps(joined).add_done_callback(self._mapped)

    def _mapped(self, maps: Future[Result]) -> None:
        failure = failure_of(maps)
        if failure is not None:
            self.whole.set_exception(failure)
        else:
            self.whole.set_result(maps.result())
