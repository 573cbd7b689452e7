"""A chain's manifest for FIRE (JSON), for Gadgetron (XML) and for people (Markdown)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any
from xml.sax.saxutils import quoteattr

from gadgets.chain import MODULE, SHARED_GROUPS, Chain, chain_names
from gadgets.manifest import Manifest, Parameter, manifest
from gadgets.manifest_ids import console_id
from recon_core.methods import get_method
from recon_core.settings import SettingInfo, describe

PARAMETERS_VERSION = "1.1.0"
"""Of the JSON text that consoles send behind the header."""

DOCS_COMMAND = "recon chains --docs"

_XML = """<?xml version="1.0" encoding="UTF-8"?>
<configuration>
  <version>2</version>
  <readers>
    <reader><dll>gadgetron_mricore</dll><classname>GadgetIsmrmrdAcquisitionMessageReader</classname></reader>
    <reader><dll>gadgetron_core_readers</dll><classname>WaveformReader</classname></reader>
  </readers>
  <writers>
    <writer><dll>gadgetron_core_writers</dll><classname>ImageWriter</classname></writer>
  </writers>
  <stream>
    <external>
      <execute name={module} target={target} type="python"/>
      <configuration>
{properties}
      </configuration>
    </external>
  </stream>
</configuration>
"""


def fire_json(described: Manifest) -> str:
    """The parameters that a FIRE workflow sends: the chain, and every offered setting with its default."""
    values: dict[str, Any] = {"config": described.chain.name}
    values |= {parameter.id: parameter.default for parameter in described.parameters}
    return json.dumps({"version": PARAMETERS_VERSION, "parameters": values}, indent=2) + "\n"


def gadgetron_xml(described: Manifest) -> str:
    """The chain as a Gadgetron configuration: what its file sets, and the offered settings with their values, to be edited."""
    chain = described.chain
    values = {"method": chain.method, "fallback": chain.fallback or "", "summary": chain.summary}
    shown = {**_own_settings(chain), **{p.setting: p.default for p in described.parameters}}
    values |= {name: str(value) for name, value in shown.items()}
    properties = "\n".join(
        f"        <property name={quoteattr(name)} value={quoteattr(value)}/>"
        for name, value in values.items()
        if value or name not in ("fallback",)
    )
    return _XML.format(module=quoteattr(MODULE), target=quoteattr(chain.name), properties=properties)


def _own_settings(chain: Chain) -> dict[str, Any]:
    """What the chain sets differently from the settings' own defaults."""
    groups = [getattr(chain, group) for group in SHARED_GROUPS] + [chain.settings]
    return {f.name: getattr(group, f.name) for group in groups for f in fields(group) if getattr(group, f.name) != f.default}


def markdown(names: Iterable[str] | None = None, *, directory: Path | None = None) -> str:
    """The documentation's page about all chains: what each offers on a console, then all settings there are."""
    names = chain_names(directory) if names is None else tuple(names)
    manifests = [manifest(name, directory=directory) for name in names]
    parts = [
        "# Chains and their settings",
        f"Written by `{DOCS_COMMAND}`: do not edit. A test compares this page with the settings themselves.",
        "A *setting* can be given by its name or by its console id: in the JSON of FIRE and OpenRecon, as a property in Gadgetron's XML, "
        "with `--set` at the command line. Values may be text (`True`, `8`, `0.01`). What differs from the chain's default is in the log "
        "and in the comment of every image.",
        "| chain | what it does | method | if it fails |\n|---|---|---|---|\n"
        + "\n".join(
            f"| [`{m.chain.name}`](#{m.chain.name}) | {_cell(m.chain.summary)} | `{m.chain.method}` | {_code(m.chain.fallback)} |"
            for m in manifests
        ),
    ]
    for described in manifests:
        parts += [f"## {described.chain.name}", f"{_sentence(described.chain.summary)} On the console:"]
        parts.append(_console_table(described.parameters) if described.parameters else "no parameters but the chain itself.")
    parts += ["# All settings", "Defaults of the settings themselves; a chain's own are in `recon chains CHAIN --describe`."]
    for group, cls in SHARED_GROUPS.items():
        parts += [f"## Of every chain: {group}", _settings_table(describe(cls))]
    for name in sorted({m.chain.method for m in manifests}):
        parts += [f"## Of the method {name}", _settings_table(describe(get_method(name).Settings))]
    return "\n\n".join(parts) + "\n"


def _console_table(parameters: Iterable[Parameter]) -> str:
    rows = [
        (p.id, p.setting, p.kind, _shown(p.default), _range(p.low, p.high, p.choices, p.unit), p.help) for p in parameters
    ]
    return _table("console id", "setting", rows)


def _settings_table(infos: Iterable[SettingInfo]) -> str:
    rows = [
        (i.name, console_id(i.name), i.kind.__name__, _shown(i.default), _range(i.low, i.high, i.choices, i.unit), i.help)
        for i in infos
    ]
    return _table("setting", "console id", rows)


def _table(first: str, second: str, rows: Iterable[tuple[str, str, str, str, str, str]]) -> str:
    lines = [f"| {first} | {second} | type | default | range | meaning |", "|---|---|---|---|---|---|"]
    lines += [
        f"| `{a}` | `{b}` | {kind} | {_code(value)} | {ends} | {_cell(words)} |" for a, b, kind, value, ends, words in rows
    ]
    return "\n".join(lines)


def _range(low: float | None, high: float | None, choices: tuple[str, ...], unit: str) -> str:
    if choices:
        return ", ".join(_code(choice) for choice in choices)
    ends = "" if low is None and high is None else f"{_end(low)} to {_end(high)}"
    return _cell(f"{ends} {unit}".strip())


def _end(value: float | None) -> str:
    return "any" if value is None else f"{value:.12g}"


def _shown(value: Any) -> str:
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _code(text: str | None) -> str:
    return f"`{_cell(text)}`" if text else "-"


def _sentence(text: str) -> str:
    return _cell(text.rstrip(".") + ".")


def _cell(text: str) -> str:
    """One cell of a table: no line breaks, no bars that would end it."""
    return " ".join(text.split()).replace("|", "\\|")
