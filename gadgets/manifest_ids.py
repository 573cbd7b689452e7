"""Names of settings as consoles can write them: letters and digits only, ``virtual_coils`` -> ``virtualCoils``.

A protocol that is saved on a scanner keeps these ids for years, so they are made by a fixed rule and never by hand, and a test keeps
those that were published.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from recon_core.errors import SettingError


def console_id(setting: str) -> str:
    """A setting's id on a console: ``map_t1_max`` -> ``mapT1Max``."""
    first, *rest = setting.split("_")
    return first + "".join(word[:1].upper() + word[1:] for word in rest)


def by_setting(values: Mapping[str, Any], known: Iterable[str], *, where: str) -> dict[str, Any]:
    """``values`` with console ids replaced by the names of the settings; other names are left to whoever checks them.

    Parameters
    ----------
    values
        What a peer sent, by setting or by console id.
    known
        Names of all settings.
    where
        For the error.

    Raises
    ------
    SettingError
        A setting is given by its name and by its id.
    """
    names = {console_id(name): name for name in known}
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = names.get(key, key)
        if name in found:
            raise SettingError(
                "a setting is given twice", where=where, got=f"{name} and {console_id(name)}", expected="one of them"
            )
        found[name] = value
    return found
