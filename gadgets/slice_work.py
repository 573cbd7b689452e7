"""The slices of one scan on the workers: submitted, watched, tried again with less memory, taken."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gadgets.chain import Chain
from gadgets.compute_pool import Budget
from gadgets.compute_settings import budget_of
from gadgets.jobs import Scope
from gadgets.memory_ladder import Ladder, Rung
from gadgets.previews import AUTO
from gadgets.progress import RemainingTime, progress_line
from gadgets.reports import ReportReader
from gadgets.row_files import RowFiles
from gadgets.slice_parts import MapsJob, SliceParts, fit_maps, reconstruct_states, shares
from gadgets.sorted_scan import SortedScan
from gadgets.tasks import Role, SliceJob, reconstruct_slice
from recon_core.methods import is_separable
from recon_core.preprocess.noise import WHITENED_NOISE_STD
from recon_core.reconstruct import Recipe
from recon_core.state_images import StateImages
from recon_core.types import Result

if TYPE_CHECKING:
    from gadgets.pipeline import Services

PROGRESS_SECONDS = 2.0


@dataclass(frozen=True)
class _Pending:
    """A slice that is under way: by which chain, as what, and how carefully."""

    chain: Chain
    role: Role
    rung: Rung
    parts: SliceParts

    @property
    def future(self) -> Future[Result]:
        return self.parts.whole


class SliceWork:
    """The slices of a scan on the workers.

    Parameters
    ----------
    tasks, services, chain
        Where they are computed, with what, and by which method.
    folder
        Where tasks report.
    sorted_scan, rows
        What they are computed from; ``whitened`` says whether the rows' noise is known.
    given_mask
        ``(z, y, x)``, of chains whose maps are to be made in it.
    """

    def __init__(
        self,
        tasks: Scope,
        services: Services,
        chain: Chain,
        folder: Path,
        sorted_scan: SortedScan,
        rows: RowFiles,
        *,
        whitened: bool,
        given_mask: NDArray[np.bool_] | None = None,
    ) -> None:
        self._tasks, self._services, self._chain, self._folder = tasks, services, chain, folder
        self._sorted, self._rows, self._whitened = sorted_scan, rows, whitened
        self._given_mask = given_mask
        self.reports = ReportReader(folder)
        self.remaining = RemainingTime(sorted_scan.n_slices, services.jobs.capacity)
        self._ladder = Ladder()
        self._budgets: dict[Role, Budget | None] = {}
        self._pending: dict[int, _Pending] = {}
        self._taken: set[int] = set()
        self._said = time.monotonic()

    def submit(self, number: int, chain: Chain, *, role: Role = "slice") -> Future[Result]:
        """One slice by ``chain``."""
        return self._submit(number, chain, role).whole

    def _submit(self, number: int, chain: Chain, role: Role) -> SliceParts:
        rung = self._ladder.rung
        job = SliceJob(
            sorted_scan=self._sorted,
            rows=self._rows,
            slice_index=number,
            scan=self._sorted.scan_info(number),
            recipe=Recipe(chain.method, chain.settings, chain.preprocess, chain.coils, chain.maps),
            noise_std=WHITENED_NOISE_STD if self._whitened else None,
            report_folder=str(self._folder),
            role=role,
            previews=role == "slice" and chain.output.preview == AUTO and self._services.previews,
            device=self._services.device,
            batch_share=rung.batch_share,
            cpu_only=rung.cpu_only,
            given_mask=self._given_mask if chain.maps.map_mask_file else None,
        )
        # all slices of a scan share the limit: an operator waits for the scan, not for a slice
        if role not in self._budgets:
            self._budgets[role] = budget_of(chain.name, chain.compute, self._services.time_limit)
        budget = self._budgets[role]
        cuts = self._cuts(chain, rung)
        if len(cuts) < 2:
            future = self._tasks.submit(reconstruct_slice, job, place="remote", budget=budget, alone=rung.alone)
            return SliceParts.of_one(job.tag, future)

        def maps(images: StateImages) -> Future[Result]:
            return self._tasks.submit(fit_maps, MapsJob.of(job, images), place="remote", budget=budget)

        # a preview of some of the states would be none of the slice
        parts = [replace(job, states=states, previews=False) for states in cuts]
        futures = [self._tasks.submit(reconstruct_states, part, place="remote", budget=budget) for part in parts]
        return SliceParts([part.tag for part in parts], futures, None if chain.maps.maps == "none" else maps)

    def _cuts(self, chain: Chain, rung: Rung) -> list[tuple[int, int]]:
        """First and one past the last state of each task: one task for a slice, unless workers would have nothing to do."""
        for_each = self._services.jobs.capacity // self._sorted.n_slices
        # each part assembles the whole slice: not where memory is short
        if for_each < 2 or rung.alone or not is_separable(chain.method):
            return []
        return shares(self._sorted.n_states, for_each)

    def begin(self, numbers: Sequence[int]) -> None:
        """Submit the final images of slices that are not yet under way."""
        for number in numbers:
            if number not in self._pending and number not in self._taken:
                self._put(number, self._chain, "slice")

    def begin_again(self, number: int, fallback: Chain) -> None:
        """Submit a slice whose method failed to another one."""
        self._put(number, fallback, "fallback")

    def ease(self, number: int) -> str | None:
        """Submit a slice that is done again, if it failed for want of memory or of a GPU, and there is something left to try.

        Returns
        -------
        str or None
            What to tell the operator; ``None`` when the result, or the failure, stands.
        """
        pending = self._pending[number]
        error = pending.future.exception()
        words = None if error is None else self._ladder.down(pending.chain.name, pending.rung, error, number)
        if words is not None:
            self._put(number, pending.chain, pending.role)
        return words

    def future(self, number: int) -> Future[Result]:
        return self._pending[number].future

    def take(self, number: int) -> Result:
        """The result of a slice that is done; its memory is not needed twice."""
        self._taken.add(number)
        return self._pending.pop(number).future.result()

    def progress(self, name: str) -> str | None:
        """A line for the operator, when it is time for one."""
        now = time.monotonic()
        reported = self.reports.fractions()
        fractions = dict.fromkeys(self._taken, 1.0)
        for number, pending in self._pending.items():
            fraction = pending.parts.fraction(reported)
            if fraction is not None:  # begun: one that waits for a worker has no time yet
                fractions[number] = fraction
        self.remaining.update(now, fractions)
        if now - self._said < PROGRESS_SECONDS:
            return None
        self._said = now
        return progress_line(name, self.remaining.fraction, self.remaining.seconds_left(now))

    def _put(self, number: int, chain: Chain, role: Role) -> None:
        rung = self._ladder.rung
        self._pending[number] = _Pending(chain, role, rung, self._submit(number, chain, role))
