"""Where commands write: results to stdout, everything else to stderr."""

from __future__ import annotations

import sys

import typer
from rich.console import Console
from rich.table import Table

from gadgets.log_lines import log_to_stderr

PIPE_COLUMNS = 160
out = Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS)
err = Console(stderr=True)


def make_table(*columns: str, title: str | None = None) -> Table:
    """A table whose names stay in one piece, so that they can be copied."""
    made = Table(title=title)
    for column in columns:
        made.add_column(column, no_wrap=column in ("chain", "setting"))
    return made


def log_from(level: str) -> None:
    """Send the log to stderr, warnings of libraries as well.

    Raises
    ------
    BadParameter
        No level.
    """
    if level.upper() not in ("DEBUG", "INFO", "WARNING", "ERROR"):
        raise typer.BadParameter(f"got {level!r}, expected debug, info, warning or error", param_hint="--log-level")
    log_to_stderr(level.upper())
    from gadgets.compute_local import log_python_warnings

    log_python_warnings()
