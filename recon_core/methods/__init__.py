"""Reconstruction methods: one module each, the same contract for all.

A method is a module of this package with ``NAME``, ``SUMMARY``, ``NEEDS_COIL_MAPS``, a frozen dataclass ``Settings`` (fields made
with ``recon_core.settings.setting``) and ``reconstruct(kspace, scan, settings, report) -> Result``. Adding the file is all it
takes: discovery walks the package.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from typing import Any, Protocol, cast

from recon_core.errors import UnknownMethod
from recon_core.types import KSpace, Report, Result, ScanInfo


class Method(Protocol):
    """What every module of this package has."""

    NAME: str
    SUMMARY: str
    NEEDS_COIL_MAPS: bool
    Settings: type
    # optional: SUPPORTS_3D = False where slabs are refused, ROUNDING = the relative change that float32 rounding may cause,
    # REHEARSAL = settings that make a worker's rehearsal short, FIDELITY = the relative change that a learned prior may make of
    # complete data, calibration(kspace, scan, settings) = the k-space whose calibration lines coil maps are to be estimated from,
    # SEPARABLE = True where every state is treated by itself: ``kspace.part(...)`` then gives the images of the whole, bit for bit,
    # figures of merit whose largest value over parts is that of the whole, no maps and no extras,
    # MAPS = names of the maps that it delivers: a stand-in for it sends no others

    def reconstruct(self, kspace: KSpace, scan: ScanInfo, settings: Any, report: Report) -> Result:
        """Images (and maps) of one slice or slab."""
        ...


@cache
def methods() -> dict[str, Method]:
    """All methods by name, sorted."""
    found: dict[str, Method] = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        if hasattr(module, "reconstruct") and hasattr(module, "NAME"):
            found[module.NAME] = cast(Method, module)
    return dict(sorted(found.items()))


def needs_coil_maps(method: Method, settings: Any) -> bool:
    """Whether a method needs coil maps with these settings: its ``needs_coil_maps(settings)`` if it has one, else the constant."""
    decide = getattr(method, "needs_coil_maps", None)
    return bool(decide(settings)) if decide is not None else method.NEEDS_COIL_MAPS


def is_separable(name: str) -> bool:
    """Whether the states of a slice may be reconstructed by different workers.

    Raises
    ------
    UnknownMethod
        As `get_method`.
    """
    return bool(getattr(get_method(name), "SEPARABLE", False))


def delivered_maps(name: str) -> frozenset[str] | None:
    """Names of the maps that a method itself delivers; ``None`` where it does not say, or leaves them to the recipe.

    Raises
    ------
    UnknownMethod
        As `get_method`.
    """
    names = getattr(get_method(name), "MAPS", None)
    return None if names is None else frozenset(names)


def get_method(name: str) -> Method:
    """The method called ``name``.

    Raises
    ------
    UnknownMethod
        There is none; the known ones are listed.
    """
    try:
        return methods()[name]
    except KeyError:
        raise UnknownMethod("no such method", got=repr(name), expected="one of " + ", ".join(methods())) from None
