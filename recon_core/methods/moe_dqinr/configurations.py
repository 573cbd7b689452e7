"""Layer sizes: the two published configurations (section 3.7), small ones for tests and CPUs, and what the paper leaves out.

The paper names the encoder, K, and width and depth of background and experts. It does not name the router's and the residual
branch's MLPs nor any initialisation; those fields are our choice and say so.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from recon_core.errors import SettingError


@dataclass(frozen=True)
class HashGridShape:
    """Multiresolution hash grid (Eq. 11): level l has ``base * growth**l`` grid lines along each axis.

    Attributes
    ----------
    levels, features
        Number of levels and features of each.
    log2_size
        A level has at most ``2**log2_size`` entries; finer ones are hashed.
    base, growth
        Resolution of the coarsest level and the factor from one level to the next.
    init_scale
        Entries start uniform in ``(-init_scale, init_scale)``. The paper is silent; 1e-4 is the usual value of hash grids.
    """

    levels: int
    log2_size: int
    base: int
    growth: float
    features: int = 2
    init_scale: float = 1e-4

    @property
    def width(self) -> int:
        """Length of the feature vector psi(r)."""
        return self.levels * self.features


@dataclass(frozen=True)
class MlpShape:
    """``depth`` hidden layers of ``width`` with SiLU, then a linear output (Eq. 12-14).

    ``gain`` multiplies the initial weights and biases, which are uniform within 1/sqrt(inputs) (torch's default for linear
    layers; the paper is silent).
    """

    width: int
    depth: int
    gain: float = 1.0


@dataclass(frozen=True)
class ResidualShape:
    """The dynamic residual branch (Eq. 21): rank L = 2 and gamma = 0.022 as published.

    "Substantially smaller residual MLPs than the main expert branches" is all that the paper says of their size: ``branch``
    (for each spatial basis function r_l) and ``coefficients`` (from the state feature to beta) are our choice.
    """

    rank: int = 2
    gamma: float = 0.022
    branch: MlpShape = MlpShape(width=64, depth=3)
    coefficients: MlpShape = MlpShape(width=64, depth=2)


OUR_ROUTER = MlpShape(width=64, depth=2)
"""The router's MLP g_omega: our choice, the paper gives no size. 5 inputs and some ten states need no more."""


@dataclass(frozen=True)
class Configuration:
    """Everything that decides the number of parameters and their start, and the two constants of the loss.

    Attributes
    ----------
    grid, background, expert, n_experts, residual, router, harmonics
        The parts; ``residual`` is ``None`` where the branch does not exist (quantitative); ``harmonics`` is H_s of Eq. 17.
    weight_decay
        lambda_wd of Eq. 24.
    state_normalised
        Divide the data term of Eq. 23 by the number of states. Section 3.7 calls the quantitative loss "q-normalized" and
        says no more; this is how we read it.
    """

    name: str
    grid: HashGridShape
    background: MlpShape
    expert: MlpShape
    n_experts: int
    residual: ResidualShape | None
    weight_decay: float
    state_normalised: bool
    router: MlpShape = field(default=OUR_ROUTER)
    harmonics: int = 2

    def __post_init__(self) -> None:
        shapes = [self.background, self.expert, self.router]
        if self.residual is not None:
            shapes += [self.residual.branch, self.residual.coefficients]
        numbers = [self.n_experts, self.grid.levels, self.grid.features, self.grid.base, self.harmonics + 1]
        if min([*numbers, *(s.width for s in shapes), *(s.depth for s in shapes)]) < 1 or self.grid.growth < 1:
            raise SettingError("sizes must be positive and the growth at least 1", where=f"configuration {self.name}")


DYNAMIC = Configuration(
    name="dynamic",
    grid=HashGridShape(levels=18, log2_size=20, base=20, growth=1.45),
    background=MlpShape(width=160, depth=6),
    expert=MlpShape(width=224, depth=7),
    n_experts=7,
    residual=ResidualShape(),
    weight_decay=1.2e-4,
    state_normalised=False,
)
"""Section 3.7, dynamic MRI (cine)."""

QUANTITATIVE = Configuration(
    name="quantitative",
    grid=HashGridShape(levels=16, log2_size=19, base=16, growth=1.5),
    background=MlpShape(width=128, depth=5),
    expert=MlpShape(width=160, depth=6),
    n_experts=10,
    residual=None,
    weight_decay=1e-4,
    state_normalised=True,
)
"""Section 3.7, quantitative MRI (T1 mapping)."""

SMALL_DYNAMIC = Configuration(
    name="small dynamic",
    grid=HashGridShape(levels=16, log2_size=18, base=16, growth=1.4),
    background=MlpShape(width=64, depth=3),
    expert=MlpShape(width=64, depth=3),
    n_experts=7,
    residual=ResidualShape(branch=MlpShape(width=32, depth=2), coefficients=MlpShape(width=32, depth=2)),
    weight_decay=1.2e-4,
    state_normalised=False,
)
"""Not of the paper: 64 x 3 branches, the size on which the rank collapse was studied; a step costs 1/30 of the published one."""

SMALL_QUANTITATIVE = replace(
    SMALL_DYNAMIC, name="small quantitative", residual=None, weight_decay=QUANTITATIVE.weight_decay, state_normalised=True
)
"""Not of the paper: as ``SMALL_DYNAMIC`` without residual branch."""

TINY = Configuration(
    name="tiny",
    grid=HashGridShape(levels=4, log2_size=8, base=4, growth=1.6, init_scale=0.1),
    background=MlpShape(width=8, depth=1),
    expert=MlpShape(width=8, depth=2),
    n_experts=3,
    residual=ResidualShape(branch=MlpShape(width=4, depth=1), coefficients=MlpShape(width=4, depth=1)),
    weight_decay=1e-4,
    state_normalised=False,
    router=MlpShape(width=8, depth=1),
)
"""For tests: every part is there and a step takes a millisecond."""
