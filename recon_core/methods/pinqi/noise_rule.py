"""How much what was learned counts at the noise of a scan: factors on the lambdas.

Training draws noise from 0.1 to 4 % of M0 and learns one set of lambdas for all of it, which is a compromise: a quadratic penalty
that suits noise of standard deviation ``s`` grows with ``s``. The factors were chosen on validation slices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from recon_core.errors import SettingError
from recon_core.methods.pinqi.model import Strengths


@dataclass(frozen=True)
class NoiseRule:
    """Factors at a few noise levels; between them linear in the logarithms of both, beyond them constant.

    Attributes
    ----------
    noise
        Standard deviations of a complex sample where M0 is about 1, rising.
    image, signal, parameter
        Factors on lambda_y, lambda_q and lambda_p at these.
    """

    noise: tuple[float, ...]
    image: tuple[float, ...]
    signal: tuple[float, ...]
    parameter: tuple[float, ...]

    def __post_init__(self) -> None:
        rows = (self.noise, self.image, self.signal, self.parameter)
        rising = all(a < b for a, b in zip(self.noise, self.noise[1:], strict=False))
        if not self.noise or {len(row) for row in rows} != {len(self.noise)} or not rising or min(map(min, rows)) <= 0:
            raise SettingError(
                "impossible noise rule", where="PINQI", got=self, expected="rising noise levels, a positive factor for each"
            )

    def at(self, noise: float) -> Strengths:
        """The factors for data with this noise."""
        where = np.log(max(noise, 1e-12))
        knots = np.log(self.noise)
        image, signal, parameter = (
            float(np.exp(np.interp(where, knots, np.log(row)))) for row in (self.image, self.signal, self.parameter)
        )
        return Strengths(image, signal, parameter, noise)

    def facts(self) -> dict[str, list[float]]:
        """As JSON."""
        return {key: list(row) for key, row in asdict(self).items()}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Sequence[Any]]) -> NoiseRule:
        """Back from JSON."""
        return cls(**{key: tuple(float(v) for v in row) for key, row in facts.items()})


_FALLING = ((0.0015, 0.03), (0.05, 1.0))
DEFAULT_RULE = NoiseRule(_FALLING[0], _FALLING[1], _FALLING[1], _FALLING[1])
"""Of weights that state none: full strength from 3 % on, below in proportion, at least a twentieth (undersampling stays when noise
goes)."""
