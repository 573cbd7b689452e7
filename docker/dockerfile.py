"""A Dockerfile as data: stages, instructions, their values. Understands what the files in this folder use, and refuses the rest."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

KNOWN = frozenset(
    "FROM ARG ENV WORKDIR COPY RUN USER VOLUME EXPOSE HEALTHCHECK ENTRYPOINT CMD LABEL".split()  # noqa: SIM905
)


class Unreadable(Exception):
    """An instruction that is not understood, with its line."""


@dataclass(frozen=True)
class Instruction:
    """One instruction, its text with continued lines joined, and the line on which it begins."""

    name: str
    text: str
    line: int

    @property
    def command(self) -> list[str] | None:
        """The words of a command in its exec form (JSON), ``None`` for the shell form."""
        text = self.text.partition("CMD ")[2] if self.name == "HEALTHCHECK" else self.text
        if not text.lstrip().startswith("["):
            return None
        words = json.loads(text)
        if not isinstance(words, list) or not all(isinstance(word, str) for word in words):
            raise Unreadable(f"line {self.line}: not a list of words")
        return words

    @property
    def pairs(self) -> dict[str, str]:
        """``NAME=value ...`` of ARG and ENV; an ARG without a value is left out."""
        pairs = (word.partition("=") for word in shlex.split(self.text))
        return {name: value for name, sign, value in pairs if sign}

    @property
    def copied(self) -> tuple[str | None, list[str], str]:
        """Of COPY: the stage (``--from``), the sources, the target."""
        words = shlex.split(self.text)
        stage = None
        if words[0].startswith("--from="):
            stage = words.pop(0).removeprefix("--from=")
        if len(words) < 2 or any(word.startswith("--") for word in words):
            raise Unreadable(f"line {self.line}: COPY {self.text}")
        return stage, words[:-1], words[-1]


@dataclass(frozen=True)
class Stage:
    """One ``FROM ... AS name`` with what follows."""

    name: str
    base: str
    instructions: tuple[Instruction, ...]

    def all(self, name: str) -> list[Instruction]:
        return [instruction for instruction in self.instructions if instruction.name == name]

    def last(self, name: str) -> Instruction:
        return self.all(name)[-1]


@dataclass(frozen=True)
class Dockerfile:
    """``arguments`` are the ARGs before the first FROM."""

    path: Path
    arguments: dict[str, str]
    stages: tuple[Stage, ...]


def substitute(text: str, values: dict[str, str]) -> str:
    """``$NAME`` and ``${NAME}`` replaced, as the builder does in FROM, ENV, COPY and WORKDIR."""
    return re.sub(r"\$(?:\{(\w+)\}|(\w+))", lambda found: values.get(found[1] or found[2], ""), text)


def read(path: Path) -> Dockerfile:
    """Read a Dockerfile.

    Raises
    ------
    Unreadable
        An instruction that is not known here.
    """
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    body: list[Instruction] = []
    for instruction in _instructions(path.read_text(encoding="utf-8")):
        if instruction.name == "FROM":
            if stages:
                stages[-1] = Stage(stages[-1].name, stages[-1].base, tuple(body))
            found = re.fullmatch(r"(\S+)(?:\s+AS\s+(\w+))?", instruction.text)
            if found is None:
                raise Unreadable(f"line {instruction.line}: FROM {instruction.text}")
            stages.append(Stage(found[2] or str(len(stages)), substitute(found[1], arguments), ()))
            body = []
        elif not stages:
            if instruction.name != "ARG":
                raise Unreadable(f"line {instruction.line}: {instruction.name} before FROM")
            arguments |= instruction.pairs
        else:
            body.append(instruction)
    if not stages:
        raise Unreadable("no FROM")
    stages[-1] = Stage(stages[-1].name, stages[-1].base, tuple(body))
    return Dockerfile(path, arguments, tuple(stages))


def _instructions(text: str) -> list[Instruction]:
    found, held, began = [], "", 0
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or (not line.strip() and not held):
            continue
        began = began if held else number
        held += line.removesuffix("\\").rstrip() + " " if line.endswith("\\") else line
        if line.endswith("\\"):
            continue
        name, _, rest = held.strip().partition(" ")
        if name not in KNOWN:
            raise Unreadable(f"line {began}: {name}")
        found.append(Instruction(name, rest.strip(), began))
        held = ""
    if held:
        raise Unreadable(f"line {began}: ends in the middle")
    return found
