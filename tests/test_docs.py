"""What README and docs/ point to is there: links, commands with their options, benchmarks, recorded figures."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from gadgets.chain import chain_names, describe_chain, load_chain
from gadgets.cli import app

ROOT = Path(__file__).parent.parent
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
COMMAND: Any = get_command(app)
TEXT = {page.relative_to(ROOT).as_posix(): page.read_text() for page in PAGES}


def anchor(heading: str) -> str:
    """As GitHub and GitLab make it of a heading."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading.strip().lower())).replace(" ", "-")


def broken_links(page: str) -> Iterator[str]:
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXT[page]):
        if link.startswith("http"):
            continue
        file, _, wanted = link.partition("#")
        target = (ROOT / page).parent / file if file else ROOT / page
        if not target.exists() or (
            wanted and wanted not in {anchor(h) for h in re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)}
        ):
            yield link


def commands(page: str) -> list[list[str]]:
    """Words of every ``recon ...`` and ``python -m ...`` in code, without the remark behind it."""
    text = TEXT[page].replace("\\\n", " ")
    fenced = re.compile(r"^ *```.*?\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
    blocks, text = fenced.findall(text), fenced.sub("", text)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [line for line in text.splitlines() if line.startswith("    ")]  # indented code
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    found = [re.split(r"\s#", line)[0].split() for line in lines]
    return [words for words in found if words[:1] == ["recon"] or words[:2] == ["python", "-m"]]


def options(words: list[str]) -> list[str]:
    return [word.split("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]


def wrong_use(words: list[str]) -> list[str]:
    """Options of a ``recon`` command that it does not have, or the command's name if there is none."""
    command = COMMAND
    rest = words[1:]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            return [rest[0]]
        command, rest = command.commands[rest[0]], rest[1:]
    known = {"--help"} | {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    return [option for option in options(rest) if option not in known]


@pytest.mark.parametrize("page", TEXT)
def test_links_lead_somewhere(page: str) -> None:
    assert not list(broken_links(page))


@pytest.mark.parametrize("page", TEXT)
def test_commands_exist_and_have_these_options(page: str) -> None:
    wrong = {" ".join(words): wrong_use(words) for words in commands(page) if words[0] == "recon"}
    assert not {command: names for command, names in wrong.items() if names}


@pytest.mark.parametrize("page", TEXT)
def test_modules_exist_and_have_these_options(page: str) -> None:
    for words in (words[2:] for words in commands(page) if words[0] == "python"):
        found = importlib.util.find_spec(words[0])
        assert found and found.origin, words
        source = Path(found.origin).read_text()
        for name in re.findall(r"^from (benchmarks[.\w]+) import", source, re.MULTILINE):  # parsers that several share
            source += (ROOT / (name.replace(".", "/") + ".py")).read_text()
        if words[0].startswith("benchmarks."):  # the others' options are made from their recipes
            assert not [option for option in options(words[1:]) if f'"{option}"' not in source], words


def test_every_recorded_figure_is_named_by_a_page() -> None:
    said = "\n".join(TEXT.values())
    groups = [name.removesuffix("*") for name in re.findall(r"`(\w+_\*)`", said)]
    short = {f"{stem}_{end}" for stem in ("pinqi_strengths", "moe_dqinr_full") for end in re.findall(r"`_(\w+)`", said)}
    silent = [
        path.name
        for path in sorted((ROOT / "benchmarks" / "results").iterdir())
        if not re.search(rf"\b{path.stem}\b", said) and path.stem not in short and not any(map(path.stem.startswith, groups))
    ]
    assert not silent


def named_settings(page: str) -> Iterator[tuple[str, str, str]]:
    """Chain ("" for any), name and value of every ``name = value`` in code, and of ``--set`` in commands."""
    for words in commands(page):
        if words[:2] in (["recon", "run"], ["recon", "replay"], ["recon", "retry"]):
            chain = next((words[i + 1] for i, word in enumerate(words[:-1]) if word in ("-c", "--config")), "")
            yield from ((chain, *words[i + 1].split("=", 1)) for i, word in enumerate(words[:-1]) if word == "--set")
    for name, value in re.findall(r"`(\w+) = ([\w.]+)`", TEXT[page]):
        if name in SETTINGS:  # a recipe of a training has names as well
            yield "", name, value


SETTINGS = {info.name: chain for chain in chain_names() for infos in describe_chain(chain).values() for info in infos}


@pytest.mark.parametrize("page", TEXT)
def test_settings_exist_and_take_these_values(page: str) -> None:
    for chain, name, value in named_settings(page):
        load_chain(chain or SETTINGS[name], {name: value})


def sources(*folders: str) -> str:
    return "\n".join(path.read_text() for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))


def test_lines_of_the_log_are_those_that_the_program_writes() -> None:
    program = sources("gadgets", "recon_core")
    said = {event for text in TEXT.values() for event in re.findall(r"event=(\w+)", text)} - {"NAME"}
    assert len(said) > 20
    assert not {event for event in said if f"event={event} " not in program and f'"{event}"' not in program}


def test_metrics_are_those_that_the_monitor_has() -> None:
    program = (ROOT / "gadgets" / "monitor" / "metrics.py").read_text()
    names = set(re.findall(r'"(recon_\w+)"', program))
    names |= {f"recon_{counter}" for counter in re.findall(r'\("(?!recon_)(\w+)", "[A-Z]', program)}
    table = TEXT["docs/monitor.md"].partition("## Metrics")[2].partition("\n## ")[0]
    said = {name.removesuffix("_total") for name in re.findall(r"\brecon_\w+", table)}
    assert said == names
    everywhere = {name.removesuffix("_total") for text in TEXT.values() for name in re.findall(r"`(recon_\w+)[`{]", text)}
    assert everywhere - names <= {"recon_core"}
