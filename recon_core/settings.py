"""Typed settings: frozen dataclasses whose fields carry unit, range and help, and a parser that accepts what consoles send.

Consoles send every value as text ("True", "8", "0.01"); Gadgetron's XML does too; Python passes typed values. All end here.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeVar, get_type_hints

from recon_core.errors import SettingError

T = TypeVar("T")

TRUE_WORDS = frozenset({"true", "1", "yes", "on"})
FALSE_WORDS = frozenset({"false", "0", "no", "off"})

KIND_WORDS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
"""What a value has to be, in the words of an operator."""


def setting(
    default: Any,
    help: str,
    *,
    unit: str = "",
    low: float | None = None,
    high: float | None = None,
    choices: Iterable[str] = (),
) -> Any:
    """One field of a settings dataclass. ``low`` and ``high`` are inclusive; ``choices`` are for text fields."""
    return dataclasses.field(
        default=default,
        metadata={"help": help, "unit": unit, "low": low, "high": high, "choices": tuple(choices)},
    )


@dataclass(frozen=True)
class SettingInfo:
    """One documented setting, for ``recon chains --describe``, the console's label and the docs table."""

    name: str
    kind: type
    default: Any
    help: str
    unit: str
    low: float | None
    high: float | None
    choices: tuple[str, ...]


def describe(cls: type) -> tuple[SettingInfo, ...]:
    """The settings of a dataclass made with ``setting``, in order."""
    hints = get_type_hints(cls)
    return tuple(
        SettingInfo(
            name=f.name,
            kind=hints[f.name],
            default=f.default,
            help=f.metadata.get("help", ""),
            unit=f.metadata.get("unit", ""),
            low=f.metadata.get("low"),
            high=f.metadata.get("high"),
            choices=f.metadata.get("choices", ()),
        )
        for f in dataclasses.fields(cls)
    )


def unknown_setting(names: Sequence[str], known: Iterable[str], *, where: str) -> SettingError:
    """The error of names that are no setting: the known ones, and the one that the first was probably meant to be."""
    known = list(known)
    alike = get_close_matches(names[0], known, n=1)
    remedy = f"Is {alike[0]} meant?" if alike else None
    got, expected = ", ".join(names), "one of " + ", ".join(known)
    return SettingError("unknown setting", where=where, got=got, expected=expected, remedy=remedy)


def parse_settings(cls: type[T], values: Mapping[str, Any], *, where: str = "settings") -> T:
    """Build ``cls`` from typed or textual values.

    Raises
    ------
    SettingError
        An unknown name (the known ones are listed), text that is not of the field's type, a value out of range.
    """
    infos = {info.name: info for info in describe(cls)}
    unknown = sorted(set(values) - set(infos))
    if unknown:
        raise unknown_setting(unknown, infos, where=where)
    return cls(**{name: parse_value(infos[name], value, where=where) for name, value in values.items()})


def parse_value(info: SettingInfo, value: Any, *, where: str = "settings") -> Any:
    """One value, typed or textual, checked against its field."""
    place = f"{where}.{info.name}"
    wanted = ", ".join(filter(None, (KIND_WORDS[info.kind], _range(info))))
    try:
        parsed = _convert(info.kind, value)
    except (ValueError, OverflowError):
        raise SettingError("not a valid value", where=place, got=repr(value), expected=wanted) from None
    if info.choices and parsed not in info.choices:
        raise SettingError("not a valid choice", where=place, got=repr(parsed), expected="one of " + ", ".join(info.choices))
    if info.kind in (int, float):
        if isinstance(parsed, float) and not math.isfinite(parsed):
            raise SettingError("not a finite number", where=place, got=repr(value), expected=wanted)
        if (info.low is not None and parsed < info.low) or (info.high is not None and parsed > info.high):
            raise SettingError("out of range", where=place, got=parsed, expected=_range(info))
    return parsed


def _range(info: SettingInfo) -> str:
    """``"1 to 128 pixels"``; empty for texts, switches and numbers without bounds."""
    if info.low is None and info.high is None:
        return ""
    low = "-inf" if info.low is None else info.low
    high = "inf" if info.high is None else info.high
    return f"{low} to {high} {info.unit}".strip()


def _convert(kind: type, value: Any) -> Any:
    if kind is bool:
        if isinstance(value, bool):
            return value
        word = str(value).strip().lower()
        if word in TRUE_WORDS:
            return True
        if word in FALSE_WORDS:
            return False
        raise ValueError(value)
    if isinstance(value, bool):
        raise ValueError(value)
    if kind is int:
        if isinstance(value, float) and value != int(value):
            raise ValueError(value)
        if isinstance(value, str) and (whole := re.fullmatch(r"\s*([+-]?\d+)\.0*\s*", value)):
            return int(whole[1])  # some consoles write every number with a point
        return int(value) if not isinstance(value, str) else int(value.strip())
    if kind is float:
        return float(value)
    if kind is str:
        if not isinstance(value, str):
            raise ValueError(value)
        return value.strip()
    raise ValueError(f"settings of type {kind.__name__} are not supported")
