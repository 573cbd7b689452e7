"""Cartesian sampling masks: exact line counts, seeded, different for every state.

Axes: ``(state, k1)`` for 2D scans, ``(state, k2, k1)`` for 3D scans; DC is at index ``n // 2``; ``True`` is sampled.

Counts are exact: ``n_sampled = round(n_available / acceleration)`` *including* the calibration lines (the PINQI convention);
with ``acs_counted=False`` the calibration lines come on top (the CMRxRecon convention). Only :func:`uniform` and
:func:`elliptical` have counts that follow from their geometry.

``available`` marks the positions that the sequence reaches (partial Fourier, elliptical scanning); nothing else is drawn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from recon_core.errors import SettingError

BoolArray = NDArray[np.bool_]
FloatArray = NDArray[np.float64]

GOLDEN_RATIO_FRACTION = (np.sqrt(5.0) - 1.0) / 2.0

PINQI_SIGMA = 0.2
"""Width of the Gaussian line density in units of half the matrix (PINQI's training masks)."""


def centre_block(shape: tuple[int, ...], acs: tuple[int, ...]) -> BoolArray:
    """The fully sampled block of ``acs`` positions around DC (index ``n // 2``).

    Raises
    ------
    SettingError
        A negative block, or one larger than the matrix.
    """
    block = np.ones(shape, dtype=bool)
    for axis, (n, width) in enumerate(zip(shape, acs, strict=True)):
        if not 0 <= width <= n:
            raise SettingError("calibration block does not fit", where="mask.acs", got=width, expected=f"0 to {n}")
        inside = np.zeros(n, dtype=bool)
        start = n // 2 - width // 2
        inside[start : start + width] = True
        block &= inside.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return block


def _plan(
    shape: tuple[int, ...],
    n_states: int,
    acceleration: float,
    acs: tuple[int, ...],
    available: BoolArray | None,
    acs_counted: bool,
) -> tuple[BoolArray, BoolArray, int]:
    """Positions that may be drawn, the calibration block, and how many to draw *outside* the block."""
    if min(shape) < 1:
        raise SettingError("empty matrix", where="mask.shape", got=shape, expected="at least one line")
    if n_states < 1:
        raise SettingError("no states", where="mask.n_states", got=n_states, expected="1 or more")
    if not acceleration >= 1.0 or not np.isfinite(acceleration):
        raise SettingError("not an acceleration", where="mask.acceleration", got=acceleration, expected="1 or more")
    allowed = np.ones(shape, dtype=bool) if available is None else np.array(available, dtype=bool)
    if allowed.shape != shape:
        raise SettingError("wrong shape", where="mask.available", got=allowed.shape, expected=shape)
    block = centre_block(shape, acs)
    if not allowed[block].all():
        raise SettingError(
            "calibration block reaches positions that are not acquired",
            where="mask.acs",
            got=f"{int((block & ~allowed).sum())} positions outside",
            expected="a block inside the acquired part",
            remedy="use fewer calibration lines or a larger partial Fourier factor",
        )
    wanted = round(float(allowed.sum()) / acceleration)
    n_block = int(block.sum())
    n_free = wanted - n_block if acs_counted else wanted
    if n_free < 0 or wanted < 1:
        raise SettingError(
            "more calibration lines than lines",
            where="mask",
            got=f"{n_block} calibration positions of {wanted}",
            expected=f"at most {wanted}",
            remedy="lower the acceleration, use fewer calibration lines, or do not count them (acs_counted=False)",
        )
    free = allowed & ~block
    return free, block, min(n_free, int(free.sum()))


def full(shape: tuple[int, ...], n_states: int, available: BoolArray | None = None) -> BoolArray:
    """Every available position in every state."""
    allowed, _, _ = _plan(shape, n_states, 1.0, (0,) * len(shape), available, True)
    return np.repeat(allowed[None], n_states, axis=0)


def uniform(
    n_lines: int,
    n_states: int,
    acceleration: int,
    acs: int = 0,
    *,
    available: BoolArray | None = None,
    interleaved: bool = False,
) -> BoolArray:
    """Every ``acceleration``-th line (DC is one of them in state 0) plus the calibration block: GRAPPA and SENSE scans.

    With ``interleaved`` the comb moves by one line from state to state (TGRAPPA, TSENSE).

    Returns
    -------
    bool ``(state, k1)``

    Raises
    ------
    SettingError
        An acceleration that is not an integer, or as for :func:`random_variable_density`.
    """
    if acceleration != int(acceleration):
        raise SettingError(
            "not an integer", where="mask.acceleration", got=acceleration, expected="1, 2, 3, ... for uniform masks"
        )
    _plan((n_lines,), n_states, acceleration, (acs,), available, False)
    allowed = np.ones(n_lines, dtype=bool) if available is None else np.asarray(available, dtype=bool)
    block = centre_block((n_lines,), (acs,))
    step = int(acceleration)
    lines = np.arange(n_lines) - n_lines // 2
    shifts = np.arange(n_states) if interleaved else np.zeros(n_states, dtype=int)
    comb = (lines[None] - shifts[:, None]) % step == 0
    return np.asarray((comb | block) & allowed)


def uniform_2d(
    shape: tuple[int, int],
    n_states: int,
    acceleration: tuple[int, int],
    acs: tuple[int, int] = (0, 0),
    *,
    caipi_shift: int = 0,
) -> BoolArray:
    """Every ``a2``-th partition and ``a1``-th line; ``caipi_shift`` moves the comb along k1 between sampled partitions.

    Returns
    -------
    bool ``(state, k2, k1)``, the same in every state.
    """
    a2, a1 = acceleration
    _plan(shape, n_states, float(a1 * a2) if a1 >= 1 and a2 >= 1 else 0.0, acs, None, False)
    k2 = (np.arange(shape[0]) - shape[0] // 2)[:, None]
    k1 = (np.arange(shape[1]) - shape[1] // 2)[None]
    comb = (k2 % a2 == 0) & ((k1 - caipi_shift * (k2 // a2)) % a1 == 0)
    return np.repeat((comb | centre_block(shape, acs))[None], n_states, axis=0)


def radius(shape: tuple[int, ...]) -> FloatArray:
    """Distance from DC; 1 at the middle of each edge of the matrix."""
    total = np.zeros(shape)
    for axis, n in enumerate(shape):
        k = (np.arange(n) - n // 2) / max(n / 2, 1.0)
        total = total + (k.reshape([-1 if a == axis else 1 for a in range(len(shape))])) ** 2
    return np.sqrt(total)


def pinqi_density(shape: tuple[int, ...], acceleration: float) -> FloatArray:
    """Unnormalised line density ``exp(-r^2 / (2 sigma^2)) + 1 / (2 acceleration)``, ``sigma`` = 0.2 of half the matrix."""
    return np.asarray(np.exp(-0.5 * (radius(shape) / PINQI_SIGMA) ** 2) + 0.5 / acceleration)


def random_variable_density(
    shape: int | tuple[int, ...],
    n_states: int,
    acceleration: float,
    acs: int | tuple[int, ...],
    rng: np.random.Generator,
    *,
    available: BoolArray | None = None,
    acs_counted: bool = True,
) -> BoolArray:
    """Lines (or (k2, k1) positions) drawn without replacement from a density that is Gaussian plus a constant.

    The recipe of PINQI (Zimmermann et al.): exactly ``n / acceleration`` lines *including* the calibration lines,
    redrawn for every state.

    Parameters
    ----------
    shape
        ``n_k1`` or ``(n_k2, n_k1)``.
    acs
        Calibration lines, one number per axis.
    rng
        Source of randomness; the same seed gives the same mask.

    Returns
    -------
    bool ``(state, *shape)``

    Raises
    ------
    SettingError
        The request is impossible: acceleration below 1, calibration block outside the acquired part or larger than
        the count.
    """
    dims = _tuple(shape)
    free, block, n_free = _plan(dims, n_states, acceleration, _tuple(acs), available, acs_counted)
    density = np.where(free, pinqi_density(dims, acceleration), 0.0).ravel()
    masks = np.repeat(block[None], n_states, axis=0)
    if n_free == 0:
        return masks
    for state in range(n_states):
        chosen = rng.choice(density.size, size=n_free, replace=False, p=density / density.sum())
        masks[state].reshape(-1)[chosen] = True
    return masks


def golden_angle(
    n_lines: int,
    n_states: int,
    acceleration: float,
    acs: int,
    rng: np.random.Generator | None = None,
    *,
    available: BoolArray | None = None,
    acs_counted: bool = True,
) -> BoolArray:
    """Golden-ratio stepping on the Cartesian grid: the next line is ``0.618 n`` further (modulo ``n``), across all states.

    Consecutive states fill each other's gaps. A step that lands on a line the state already has is skipped, so
    counts are exact. ``rng`` draws the start; without it the start is 0.

    Returns
    -------
    bool ``(state, k1)``
    """
    free, block, n_free = _plan((n_lines,), n_states, acceleration, (acs,), available, acs_counted)
    lines = np.flatnonzero(free)
    start = 0.0 if rng is None else float(rng.random())
    masks = np.repeat(block[None], n_states, axis=0)
    step = 0
    for state in range(n_states):
        missing = n_free
        while missing:
            # the steps run over the lines outside the block, so that none is wasted on lines that are sampled anyway
            line = lines[int(len(lines) * ((start + step * GOLDEN_RATIO_FRACTION) % 1.0))]
            step += 1
            if not masks[state, line]:
                masks[state, line] = True
                missing -= 1
    return masks


def vista_density(n_lines: int) -> FloatArray:
    """Unnormalised line density that falls to about a quarter of its maximum at the edges."""
    return np.asarray(np.exp(-((radius((n_lines,)) / 0.4) ** 2)) + 0.3)


def vista(
    n_lines: int,
    n_states: int,
    acceleration: float,
    acs: int,
    rng: np.random.Generator,
    *,
    available: BoolArray | None = None,
    acs_counted: bool = True,
    sweeps: int = 2,
) -> BoolArray:
    """Variable-density lines that keep clear of their neighbours in k1 *and* in time (periodic): VISTA-like.

    VISTA (Ahmad et al., Magn Reson Med 2015, doi:10.1002/mrm.25507) minimises a Riesz energy over positions in the (k1, t)
    plane. Here such an energy, with k1 distances in units of the local line spacing, is lowered by placing one line
    at a time
    where it is smallest and then moving every line once per sweep; the grid stays exact and so does the count.

    Returns
    -------
    bool ``(state, k1)``
    """
    free, block, n_free = _plan((n_lines,), n_states, acceleration, (acs,), available, acs_counted)
    masks = np.repeat(block[None], n_states, axis=0)
    if n_free == 0:
        return masks
    density = np.where(free, vista_density(n_lines), 0.0)
    # in the cumulative density the wanted spacing is 1 everywhere; closing it to a circle keeps the edges from
    # attracting lines
    place = np.cumsum(density) * (n_free / density.sum())
    dt = np.abs(np.arange(n_states)[:, None] - np.arange(n_states)[None])
    dt = np.minimum(dt, n_states - dt)  # cardiac phases are a circle

    def kernel(line: int, state: int) -> FloatArray:
        """Energy that a sample at (state, line) puts on every (state, line)."""
        dk = np.abs(place - place[line])
        dk = np.minimum(dk, n_free - dk)
        return np.asarray(1.0 / (dk[None] ** 2 + (0.35 * dt[state][:, None]) ** 2 + 0.01) * (dt[state][:, None] <= 3))

    energy = rng.random((n_states, n_lines)) * 2.0  # jitter: breaks ties and regular patterns
    taken = ~np.repeat(free[None], n_states, axis=0)

    def place_one(state: int) -> None:
        line = int(np.argmin(np.where(taken[state], np.inf, energy[state])))
        masks[state, line] = taken[state, line] = True
        energy[:] += kernel(line, state)

    for state in rng.permutation(n_states):
        for _ in range(n_free):
            place_one(state)
    for _ in range(sweeps):
        for state in rng.permutation(n_states):
            for line in rng.permutation(np.flatnonzero(masks[state] & free)):
                masks[state, line] = taken[state, line] = False
                energy -= kernel(int(line), state)
                place_one(state)
    return masks


def poisson_disc(
    shape: tuple[int, int],
    n_states: int,
    acceleration: float,
    acs: tuple[int, int],
    rng: np.random.Generator,
    *,
    available: BoolArray | None = None,
    acs_counted: bool = True,
) -> BoolArray:
    """Variable-density (k2, k1) positions with a minimum distance that grows with the distance from DC, exact in number.

    Dart throwing cannot promise a count. Here every new position is the one with the least repulsion from those that are
    there already (a random draw breaks ties), which gives the same blue-noise look and an exact count. States differ by
    their random numbers and repel each other weakly, so that neighbouring echoes fill each other's holes.

    Returns
    -------
    bool ``(state, k2, k1)``
    """
    free, block, n_free = _plan(shape, n_states, acceleration, acs, available, acs_counted)
    masks = np.repeat(block[None], n_states, axis=0)
    if n_free == 0:
        return masks
    density = np.where(free, np.exp(-radius(shape) * 2.0) + 0.1, 0.0)
    share = n_free * density / density.sum()  # expected samples at every position
    distance = 1.0 / np.sqrt(np.maximum(share, 1e-9))  # expected distance between samples
    reach = int(np.ceil(3.0 * float(np.sqrt(free.sum() / n_free))))
    carried = np.zeros(shape)
    for state in range(n_states):
        energy = carried * 0.3 + rng.random(shape) * 0.5
        fresh = np.zeros(shape)
        mask = masks[state]
        score = np.where(free & ~mask, energy, np.inf)
        for _ in range(n_free):
            k2, k1 = np.unravel_index(int(np.argmin(score)), shape)
            mask[k2, k1] = True
            rows = slice(max(0, k2 - reach), k2 + reach + 1)
            cols = slice(max(0, k1 - reach), k1 + reach + 1)
            d2 = (np.arange(shape[0])[rows, None] - k2) ** 2 + (np.arange(shape[1])[None, cols] - k1) ** 2
            repulsion = np.exp(-d2 / (0.5 * distance[rows, cols] * distance[k2, k1])) * 4.0
            fresh[rows, cols] += repulsion
            score[rows, cols] += repulsion
            score[k2, k1] = np.inf
        carried = 0.5 * carried + fresh
    return masks


def elliptical(shape: tuple[int, int]) -> BoolArray:
    """The ellipse inscribed in (k2, k1): corners are not acquired. bool ``(k2, k1)``, to be used as ``available``."""
    return radius(shape) <= 1.0


def partial_fourier_lines(n_lines: int, fraction: float) -> BoolArray:
    """Lines that a partial Fourier scan of ``fraction`` (0.5 < fraction <= 1) acquires: the first ones are left out.

    Raises
    ------
    SettingError
        A fraction outside (0.5, 1], or one that leaves out DC.
    """
    if not 0.5 < fraction <= 1.0:
        raise SettingError(
            "not a partial Fourier factor", where="mask.partial_fourier", got=fraction, expected="above 0.5, up to 1"
        )
    dropped = n_lines - round(n_lines * fraction)
    available = np.ones(n_lines, dtype=bool)
    available[:dropped] = False
    if not available[n_lines // 2]:
        raise SettingError(
            "the centre line would be left out", where="mask.partial_fourier", got=fraction, expected="a larger factor"
        )
    return available


def _tuple(value: int | tuple[int, ...]) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else tuple(value)
