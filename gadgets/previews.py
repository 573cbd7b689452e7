"""Quick images ahead of the final ones: made by a quick chain before the slow one begins, or by the slow method on its way.

A preview is a favour: whatever goes wrong with one is logged, and the scan goes on without it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

from gadgets.chain import Chain, load_chain
from gadgets.errors import UnknownChain
from gadgets.images import ImageWriter
from gadgets.reports import ReportReader
from gadgets.sorted_scan import SortedScan
from gadgets.tasks import from_portable
from recon_core.errors import ReconError, SettingError
from recon_core.types import Result

log = logging.getLogger(__name__)

AUTO, OFF = "auto", "off"
PREVIEW_COILS = 6
"""Most virtual coils of a quick chain: its time grows with them, and a glance does not need the last ones."""

MAX_ROUNDS = 8
"""Previews of one slice that are sent; a method that makes more would fill the console."""


def quick_chain(chain: Chain, configs: Path | None) -> Chain | None:
    """The chain that makes the previews of ``chain``, with settings that make it quick; ``None`` when none is asked for.

    Raises
    ------
    UnknownChain, SettingError
        ``output.preview`` names no chain that can be used.
    """
    wanted = chain.output.preview
    if wanted in (AUTO, OFF, ""):
        return None
    quick = load_chain(wanted, directory=configs)
    settings = quick.settings
    if any(field.name == "iterations" for field in dataclasses.fields(settings)):
        settings = replace(settings, iterations=min(settings.iterations, chain.output.preview_iterations))
    # what the rows went through holds for the previews as well; only the coils may be fewer
    preprocess = replace(chain.preprocess, virtual_coils=min(chain.preprocess.virtual_coils, PREVIEW_COILS))
    if preprocess.coil_compression == "none":
        preprocess = replace(preprocess, coil_compression="svd", virtual_coils=PREVIEW_COILS)
    return replace(quick, settings=settings, preprocess=preprocess)


def require_preview(chain: Chain, configs: Path | None) -> None:
    """A preview that was chosen for this scan names a chain. (One of a chain's file that is gone costs no scan: it is logged.)

    Raises
    ------
    SettingError
        It does not.
    """
    try:
        quick_chain(chain, configs)
    except UnknownChain as error:
        where, expected = f"chain {chain.name}.preview", f"{AUTO}, {OFF} or {error.expected}"
        raise SettingError("not a quick chain", where=where, got=error.got, expected=expected) from None


class Previews:
    """The previews of one scan, from the first one submitted to the last one sent.

    Parameters
    ----------
    chain, configs
        The chain whose final images follow, and the folder of chain files.
    writer
        Of the final images; previews get the same pixels, by the same rules, in series of their own.
    sorted_scan
        Where the slices lie.
    reports
        Where a method's own previews arrive.
    """

    def __init__(
        self, chain: Chain, configs: Path | None, writer: ImageWriter, sorted_scan: SortedScan, reports: ReportReader
    ) -> None:
        self.chain, self._final, self._sorted, self._reports = chain, writer, sorted_scan, reports
        self.n_images = 0
        self._pending: dict[int, Future[Result]] = {}
        self._rounds: dict[int, int] = {}
        self._writers: list[ImageWriter] = []
        self._over: set[int] = set()
        self._quick: Chain | None = None
        try:
            self._quick = quick_chain(chain, configs)
        except ReconError as error:
            log.warning("event=preview_refused chain=%s error=%r", chain.name, str(error))

    def begin(self, order: Sequence[int], submit: Callable[[int, Chain], Future[Result]]) -> None:
        """Submit the quick chain's previews of all slices: before the slow tasks, or they would wait behind them."""
        if self._quick is not None:
            self._pending = {number: submit(number, self._quick) for number in order}

    @property
    def pending(self) -> list[Future[Result]]:
        """What to wait for besides the final images."""
        return [future for number, future in self._pending.items() if number not in self._over]

    def over(self, number: int) -> None:
        """The final images of this slice are there: its previews have no purpose any more."""
        self._over.add(number)

    def messages(self) -> Iterator[bytes]:
        """Images of every preview that has arrived since the last look, encoded."""
        for number, result, name in self._arrived():
            self._rounds[number] = round_ = self._rounds.get(number, 0) + 1
            if number in self._over or round_ > MAX_ROUNDS:
                continue
            try:
                images = list(self._writer(round_, name).images(self._sorted, number, result))
            except Exception as error:  # a favour, see above
                log.warning("event=preview_failed chain=%s slice=%d error=%r", name, number, _words(error))
                continue
            self.n_images += len(images)
            yield from images

    def _arrived(self) -> Iterator[tuple[int, Result, str]]:
        if self._quick is not None:
            for number, future in list(self._pending.items()):
                if future.done():
                    del self._pending[number]
                    error = future.exception()
                    if error is None:
                        yield number, from_portable(future.result()), self._quick.name
                    elif number not in self._over:
                        log.warning(
                            "event=preview_failed chain=%s slice=%d error=%r", self._quick.name, number, _words(error)
                        )
            return
        for tag, series in self._reports.previews():
            yield int(tag.rpartition("-")[2]), Result(images=(series,)), self.chain.name

    def _writer(self, round_: int, name: str) -> ImageWriter:
        """Each round of previews is a series, so that every series holds one image of each slice and state."""
        while len(self._writers) < round_:
            self._writers.append(self._final.for_previews(name, beside=self._writers[0] if self._writers else None))
        return self._writers[round_ - 1]


def _words(error: BaseException) -> str:
    """What may be logged of a failure: our own words, or only its kind."""
    return str(error) if isinstance(error, ReconError) else type(error).__name__
