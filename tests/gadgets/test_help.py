"""What ``--help`` shows is what was written: Rich's markup takes words in brackets for styles, and swallows them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
from rich.text import Text
from typer.main import get_command
from typer.testing import CliRunner

from gadgets.cli import app

BRACKETED = re.compile(r"\[[^\]]*\]")


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


ALL = dict(commands(get_command(app)))


def test_every_command_is_looked_at() -> None:
    assert {("serve",), ("run",), ("mask", "draw"), ("mask", "learn"), ("train", "laro"), ("pacs", "send")} <= set(ALL)


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_no_help_loses_a_word(path: tuple[str, ...]) -> None:
    texts = [ALL[path].help or "", *(getattr(param, "help", None) or "" for param in ALL[path].params)]
    shown = " ".join(CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "2000"}).output.split())
    for text in texts:
        assert Text.from_markup(text).plain == text
        for words in BRACKETED.findall(text):
            assert words in shown


def test_defaults_that_are_no_numbers_are_shown() -> None:
    for path, words in (
        (("serve",), "Default: in the state folder."),
        (("mask", "draw"), "Default: a hand-made density."),
        (("mask", "draw"), "Default: where the probabilities differ."),
        (("mask", "learn"), "Default: beside the file."),
        (("mask", "order"), "Default: what the paper's order has."),
        (("mask", "install"), "Default: in the state folder."),
    ):
        shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "2000"}).output
        assert words in shown
