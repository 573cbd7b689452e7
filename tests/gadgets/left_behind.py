"""A spool as a dead server left it, and what takes up the jobs in it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gadgets.bookkeeping import Books
from gadgets.capture import sidecar
from gadgets.handlers import ChainRequest, Handlers
from gadgets.jobs import Jobs
from gadgets.journal import JobRow
from gadgets.recovery import Recovery
from gadgets.results import Results
from gadgets.spool import ScanLog, Spool
from gadgets.wire import codec
from tests.gadgets.serving import HEADER, CountingScan, check_config, data
from tests.waiting import until

SESSION = codec.config_file("fourier") + codec.header(HEADER) + data(3) + data(2) + codec.close()
STEM = "20260101T000000.000000Z-0000000"


@dataclass
class Site:
    """A spool with whatever a dead server left in it, and what takes it up."""

    root: Path
    scan: type = CountingScan
    opened: list[Any] = field(default_factory=list)
    checks: list[ChainRequest] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def left(self, number: int, session: bytes = SESSION, info: Mapping[str, Any] | None = None) -> str:
        """A capture as it lies there after kill -9 (no sidecar), or after a scan."""
        self.root.mkdir(exist_ok=True)
        path = self.root / f"{STEM}{number}.mrd"
        path.write_bytes(session)
        if info is not None:
            sidecar(path).write_text(json.dumps({"status": "complete", "bytes": len(session), **info}))
        return path.stem

    def open_scan(self, request: ChainRequest, header: str, raw: ScanLog, say: Callable[[str], None]) -> Any:
        check_config(request)
        scan = self.scan(request, header, raw, say)
        self.opened.append(scan)
        return scan

    def check(self, request: ChainRequest) -> None:
        self.checks.append(request)
        check_config(request)

    @contextmanager
    def recovery(self, *, start: bool = True) -> Iterator[tuple[Recovery, Books]]:
        spool = Spool(self.root, **{"min_free_bytes": 0, **self.options})
        books, jobs = Books(self.root), Jobs(0)
        handlers = Handlers(open_scan=self.open_scan, check_config=self.check, entry=books.entry)
        recovery = Recovery(books, spool, Results(self.root, books, jobs), handlers)
        try:
            if start:
                begin(recovery, books)
            yield recovery, books
        finally:
            recovery.close()
            jobs.close()
            recovery.join()
            books.close()

    def info(self, stem: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / f"{stem}.json").read_text())
        return found


def begin(recovery: Recovery, books: Books) -> None:
    """For a test whose scan needs to know what `Site.recovery` gives: begun once it does."""
    books.is_server = True
    recovery.start()


def over(books: Books, stem: str) -> JobRow:
    """The row when its job is over."""

    def look() -> JobRow | None:
        return next((row for row in books.journal().rows(limit=None) if row.id == stem and row.is_over), None)

    row = until(look, lambda: f"{stem} is not over: {books.journal().rows()}")
    assert row is not None
    return row
