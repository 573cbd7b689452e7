"""What a worker runs on tiny data before its first scan."""

from __future__ import annotations

import logging

import pytest

from gadgets import tasks
from recon_core.methods import methods


def test_a_method_that_breaks_keeps_no_worker_from_starting(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it raises, as with weights of the site: a worker has all the other methods."""
    names = list(methods())
    tried: list[str] = []

    def counted(kspace: object, scan: object, recipe: tasks.Recipe) -> None:
        tried.append(recipe.method)
        if recipe.method == names[0]:
            raise ZeroDivisionError("float division by zero")

    monkeypatch.setattr(tasks, "reconstruct", counted)
    with caplog.at_level(logging.WARNING):
        tasks.rehearse()
    assert tried == names and len(names) > 1
    assert caplog.text.count("event=rehearsal_failed") == 1 and "ZeroDivisionError" in caplog.text
