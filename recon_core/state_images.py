"""Final images of some states of a slice, made apart from the others, and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from recon_core.errors import DataError
from recon_core.maps.series import ImageNoise
from recon_core.preprocess.measured_part import Band
from recon_core.types import Result


@dataclass(frozen=True)
class StateImages:
    """Images on the console's matrix, before the recipe's maps.

    ``noise`` is that of the images of *all* states of the slice, for maps; ``None`` when no maps are to be made, or without any noise.
    ``no_maps`` says why maps of these images would be wrong; empty where they would not.
    ``phase``: complex ``(state, z, y, x)``, what the field is fitted to in place of the images; ``None``: the images themselves.
    ``band``: what lies outside was not measured but completed, and is no part of what the field is fitted to; ``None``: nothing is.
    """

    result: Result
    noise: ImageNoise | None = None
    no_maps: str = ""
    phase: torch.Tensor | None = None
    band: Band | None = None


def join_states(parts: Sequence[StateImages]) -> StateImages:
    """The images of a slice from those of its states, in the order of the states.

    Notes are told once, figures of merit are the worst (largest) of the parts'.

    Raises
    ------
    DataError
        The parts are none of one series by a separable method.
    """
    results = [part.result for part in parts]
    names = [tuple(series.name for series in result.images) for result in results]
    if len(set(names)) != 1 or any(result.maps or result.extras for result in results):
        raise DataError(
            "parts that do not belong together", where="states of a slice", got=names, expected="one list of series"
        )
    first = results[0]
    images = tuple(
        replace(first.images[i], data=torch.cat([result.images[i].data for result in results]))
        for i in range(len(first.images))
    )
    quality: dict[str, float] = {}
    for result in results:
        for name, value in result.quality.items():
            quality[name] = max(value, quality.get(name, value))
    notes = tuple(dict.fromkeys(note for result in results for note in result.notes))
    result = replace(first, images=images, quality=quality, notes=notes)
    return StateImages(result, parts[0].noise, parts[0].no_maps, band=parts[0].band)
