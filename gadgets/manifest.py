"""What a console shows of a chain: one manifest, made from the chain's typed settings.

The chain file names the settings that a console offers (property ``console``); their types, ranges, units and words come from the
settings themselves, their defaults from the chain. Everything that describes a chain to somebody else is made from this: OpenRecon's
label (`gadgets.openrecon_label`), FIRE's JSON, Gadgetron's XML and the tables of the documentation (`gadgets.manifest_formats`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from gadgets.chain import Chain, describe_chain, load_chain
from gadgets.manifest_ids import console_id
from recon_core.errors import ReconError
from recon_core.settings import SettingInfo

Kind = Literal["boolean", "int", "double", "string", "choice"]

MAX_PARAMETERS = 13
"""OpenRecon shows 14; one of them is the chain itself."""

INT32 = (-(2**31), 2**31 - 1)
MAX_UNIT = 3


class ManifestError(ReconError):
    """A chain file offers settings that no console could show."""


@dataclass(frozen=True)
class Parameter:
    """One setting as a console shows it.

    Attributes
    ----------
    id
        Letters and digits; never changes once it was published, because saved protocols keep it.
    setting, group
        Which setting it is.
    kind
        How consoles enter it. Numbers that OpenRecon's ``double`` cannot hold (multiples of 0.1) are ``string``: they travel as
        text anyway, and the server checks them.
    default
        The chain's value: bool, int, float or str, as ``kind`` says.
    low, high
        Range of numbers, inclusive; of a ``string`` as well if it stands for a number.
    choices
        Ids of a ``choice``.
    """

    id: str
    setting: str
    group: str
    kind: Kind
    default: bool | int | float | str
    low: float | None
    high: float | None
    choices: tuple[str, ...]
    unit: str
    label: str
    help: str


@dataclass(frozen=True)
class Manifest:
    """A chain and the parameters that a console offers for it."""

    chain: Chain
    parameters: tuple[Parameter, ...]


def manifest(name: str, *, directory: Path | None = None) -> Manifest:
    """The manifest of an installed chain.

    Raises
    ------
    UnknownChain
        There is no such chain.
    ManifestError
        Its file offers more settings than a console shows, one twice, or one that cannot be shown.
    """
    chain = load_chain(name, directory=directory)
    where = f"chain {chain.name} console"
    if len(chain.console) > MAX_PARAMETERS:
        raise ManifestError("too many settings", where=where, got=len(chain.console), expected=f"at most {MAX_PARAMETERS}")
    if len(set(chain.console)) < len(chain.console):
        raise ManifestError("a setting is offered twice", where=where, got=", ".join(chain.console))
    groups = describe_chain(chain.name, directory=directory)
    found = {info.name: (group, info) for group, infos in groups.items() for info in infos}
    parameters = tuple(_parameter(*found[setting], where=where) for setting in chain.console)
    ids = ["config", "customconfig", *(p.id for p in parameters)]
    if len({i.lower() for i in ids}) < len(ids):
        raise ManifestError("two parameters with one id", where=where, got=", ".join(ids))
    return Manifest(chain, parameters)


def tenths(value: float) -> bool:
    """Whether OpenRecon's schema takes a number as ``double``: ``multipleOf 0.1``, computed as its validator does."""
    quotient = value / 0.1
    return math.isfinite(quotient) and int(quotient) == quotient


def _parameter(group: str, info: SettingInfo, *, where: str) -> Parameter:
    kind = _kind(info, where=where)
    default: Any = info.default
    if kind == "string":
        default = f"{default:g}" if isinstance(default, float) else str(default)
    low, high = info.low, info.high
    if kind == "int":
        low, high = INT32[0] if low is None else low, INT32[1] if high is None else high
        if not INT32[0] <= low <= default <= high <= INT32[1]:
            raise ManifestError(
                "not a console's whole number", where=where, got=info.name, expected="a range within 32 bits"
            )
    if kind == "choice" and ("" in info.choices or default not in info.choices):
        raise ManifestError("a choice without a name, or a default that is none", where=where, got=info.name)
    words = info.help.rstrip(".")
    if ":" not in words.partition(" ")[0]:  # "rss: root sum of squares" begins with a choice's name
        words = words[:1].upper() + words[1:]
    return Parameter(
        id=console_id(info.name),
        setting=info.name,
        group=group,
        kind=kind,
        default=default,
        low=low,
        high=high,
        choices=info.choices,
        unit=info.unit,
        label=_label(info.name),
        help=words,
    )


def _kind(info: SettingInfo, *, where: str) -> Kind:
    if info.kind is bool:
        return "boolean"
    if info.kind is int:
        return "int"
    if info.kind is float:
        ends = (info.low, info.high, info.default)
        return "double" if all(end is not None and tenths(float(end)) for end in ends) else "string"
    if info.kind is str:
        return "choice" if info.choices else "string"
    raise ManifestError("a setting of a kind that consoles do not have", where=where, got=f"{info.name}: {info.kind}")


def _label(setting: str) -> str:
    """``map_t1_max`` -> ``Map T1 max``: what stands beside the field."""
    words = [word.upper() if word[:-1] in ("t", "b") and word[-1:].isdigit() else word for word in setting.split("_")]
    text = " ".join(words)
    return text[:1].upper() + text[1:]
