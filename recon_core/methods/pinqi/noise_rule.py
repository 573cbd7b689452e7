"""How much what was learned counts at the noise and the acceleration of a scan: factors on the lambdas.

Training draws noise from 0.1 to 4 % of M0 and learns one set of lambdas for all of it, which is a compromise: a quadratic penalty
that suits noise of standard deviation ``s`` grows with ``s``. Where fewer lines were measured, smaller ones are better: images change
less in every iteration what the data say hardly anything of, and there are only a few iterations. The factors were chosen on validation
slices.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from recon_core.errors import SettingError
from recon_core.methods.pinqi.model import Strengths

TRAINED_ACCELERATIONS = (4.0, 8.0)
"""Between these the factors may follow the acceleration; at the first they hold as they are."""


@dataclass(frozen=True)
class NoiseRule:
    """Factors at a few noise levels; between them linear in the logarithms of both, beyond them constant.

    Attributes
    ----------
    noise
        Standard deviations of a complex sample where M0 is about 1, rising.
    image, signal, parameter
        Factors on lambda_y, lambda_q and lambda_p at these.
    acceleration_power
        ``image`` and ``signal`` fall as this power of the acceleration, see `TRAINED_ACCELERATIONS`.
    """

    noise: tuple[float, ...]
    image: tuple[float, ...]
    signal: tuple[float, ...]
    parameter: tuple[float, ...]
    acceleration_power: float = 0.0

    def __post_init__(self) -> None:
        rows = (self.noise, self.image, self.signal, self.parameter)
        rising = all(a < b for a, b in zip(self.noise, self.noise[1:], strict=False))
        possible = all(0 < value < math.inf for row in rows for value in row) and math.isfinite(self.acceleration_power)
        if not self.noise or {len(row) for row in rows} != {len(self.noise)} or not rising or not possible:
            raise SettingError(
                "impossible noise rule", where="PINQI", got=self, expected="rising noise levels, a positive factor for each"
            )

    def at(self, noise: float, acceleration: float = TRAINED_ACCELERATIONS[0]) -> Strengths:
        """The factors for data with this noise and acceleration."""
        where = np.log(max(noise, 1e-12))
        knots = np.log(self.noise)
        image, signal, parameter = (
            float(np.exp(np.interp(where, knots, np.log(row)))) for row in (self.image, self.signal, self.parameter)
        )
        less = self.part_at(acceleration)
        return Strengths(image * less, signal * less, parameter, noise)

    def part_at(self, acceleration: float) -> float:
        """What ``image`` and ``signal`` are multiplied with at this acceleration."""
        least, most = TRAINED_ACCELERATIONS
        return float((min(max(acceleration, least), most) / least) ** -self.acceleration_power)

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> NoiseRule:
        """Back from JSON."""
        rows = {key: tuple(float(v) for v in row) for key, row in facts.items() if key != "acceleration_power"}
        return cls(**rows, acceleration_power=float(facts.get("acceleration_power", 0.0)))


def acceleration_of(weights: torch.Tensor) -> float:
    """All lines over those that were sampled; from weights or a mask of any shape, 0 or false where nothing was sampled."""
    return weights.numel() / max(1, int(torch.count_nonzero(weights)))


_FALLING = ((0.0015, 0.03), (0.05, 1.0))
DEFAULT_RULE = NoiseRule(_FALLING[0], _FALLING[1], _FALLING[1], _FALLING[1])
"""Of weights that state none: full strength from 3 % on, below in proportion, at least a twentieth (undersampling stays when noise
goes)."""
