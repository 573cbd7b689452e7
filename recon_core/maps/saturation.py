"""Do the delays of a saturation recovery belong together, and does it begin at zero? If not, every T1 is wrong, and it hardly shows.

A fit of M0 and T1 takes most of it up. With 10 % of M0 left by the saturation, T1 of 0.3 to 1.8 s comes out 5 to 16 % too short; with
the longest delay 5 % too bright, 9 % too long; and what remains unexplained is 2 to 3 % of the signal, little more than many a good scan
leaves. But it has the same sign in all pixels. So the residual of the fit is compared with the change that a remainder, ``M0 exp(-t R1)``,
delays that are all longer by the same time (or readout pulses before the centre of k-space, during which M0 recovers), or another gain of
one state would make, as far as M0 and T1 cannot imitate it. What explains most of it is told, and if that
does not explain it, several delays are wrong.

What differs from place to place (a saturation that follows B1; coil maps of too few calibration lines, whose aliases every delay has of its
own) is none of all pixels: its median may be nothing. So the remainder is asked for in each part of the object as well
(`recon_core.maps.saturation_places`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from recon_core.maps.saturation_places import Place, note_of_places, parts
from recon_core.signal_models.saturation_recovery import along_states

Tensor = torch.Tensor

OBJECT = 0.1
"""A pixel belongs to the object if its RMS over the states is at least this part of the 99.9th percentile."""

MOST_LEFT = 0.04
"""Part of M0 left by the saturation above which the operator is told: T1 is then up to 6 % wrong. Good scans show up to 0.01, and 0.03
where noise is 15 % of M0 at 8x."""

MOST_GAIN = 0.03
"""The same of one state's gain: T1 is then 1 to 5 % wrong, short ones up to 8 %. Good scans show up to 0.014
(`benchmarks.t1_checks`)."""

MOST_SHIFTED = 0.04
"""The same of the error of T1, beyond doubt, that a quarter of the pixels exceed by delays that are all longer or shorter. Good scans show
up to 0.03: tissues that share a pixel recover as if they had begun earlier."""

MOST_SHARED = 0.007
"""RMS, as a part of M0, of what all pixels share beside the best explanation. Good scans, and such with one delay wrong by 10 %, show up
to 0.005, two of five delays that are 5 % brighter 0.008 to 0.017 (`benchmarks.t1_checks`)."""

MOST_OF_BEST = 0.25
"""... and as a part of that explanation: a large one is not exact to first order."""

MOST_WRONG = 0.1
"""No T1 map where a quarter of the object would be further off than this part."""

NO_SATURATION = 0.3
"""Above this the recovery is none from saturation: other delays, or an inversion."""

ALIKE = 0.8
"""Two explanations cannot be told apart if one explains at least this part of what the other does. The most similar
are a remainder, longer delays and a gain of the shortest delay."""

LEFT: Literal["left"] = "left"
SHIFTED: Literal["shifted"] = "shifted"
Cause = int | Literal["left", "shifted"]
"""A state whose gain differs, or one of the two that concern all states."""

ALIKE_SHIFTED = 0.9
"""The same where one of the two is longer delays. Of a single pixel a remainder is the same, and only tissues of unlike T1 tell it."""

FEWEST_PIXELS = 50

MEDIAN_TO_MEAN = 1.25
"""Standard error of a median over that of a mean, for Gaussian noise."""


@dataclass(frozen=True)
class Deviation:
    """One way in which all pixels may differ alike from the recovery that was fitted to them.

    Attributes
    ----------
    state, delay
        Which state's gain differs, and its delay in s; ``None``: none.
    shifted
        All delays are longer than they are said to be; if not, and no gain differs, the saturation left a part of M0.
    size
        Part by which the state is brighter than the others, part of M0 that is left, or by how much delays are longer in s; to first order.
    doubt
        Two standard errors of ``size``.
    effect, explained
        RMS of what M0 and T1 cannot imitate of it, as a part of M0; and how much smaller, in the mean over pixels, it makes the residual.
    t1_median, t1_quartile
        Relative error of T1 that follows: its median, and the size that a quarter of the pixels exceed.
    """

    state: int | None
    delay: float | None
    size: float
    doubt: float
    effect: float
    explained: float
    t1_median: float
    t1_quartile: float
    shifted: bool = False

    @property
    def is_remainder(self) -> bool:
        return self.delay is None and not self.shifted

    @property
    def matters(self) -> bool:
        """Whether the operator has to know."""
        if self.shifted:
            return abs(self.size) > self.doubt and self.t1_quartile * (1 - self.doubt / abs(self.size)) > MOST_SHIFTED
        return abs(self.size) - self.doubt > (MOST_LEFT if self.delay is None else MOST_GAIN)

    @property
    def sure_effect(self) -> float:
        """The part of the effect that is beyond doubt."""
        return self.effect * max(0.0, 1 - self.doubt / abs(self.size)) if self.size else 0.0

    @property
    def text(self) -> str:
        """What seems to be wrong with the scan."""
        if self.shifted:
            return (
                f"all delays seem to be {1e3 * abs(self.size):.0f} ms {'longer' if self.size > 0 else 'shorter'} than stated"
            )
        if self.delay is None:
            return f"the recovery seems to begin at {100 * self.size:.0f} % of M0"
        how = "brighter" if self.size > 0 else "darker"
        return f"the images of the delay {self.delay:g} s seem to be {100 * abs(self.size):.0f} % {how} than the others"

    @property
    def causes(self) -> str:
        """What does such a thing."""
        if self.shifted:
            pulses = ", readout pulses before the centre of k-space" if self.size > 0 else ""
            return f"counted to another moment{pulses}, or states of unlike gain"
        if self.delay is not None:
            return "receiver gain, flip angle or scaling, or that delay is wrong"
        why = "incomplete saturation" if self.size > 0 else "inverted magnetisation"
        return f"{why}, wrong delays, or states of unlike gain"

    @property
    def consequence(self) -> str:
        """What follows for T1."""
        if self.t1_quartile > 0.5:
            return "T1 is wrong by half and more"
        quarter = f"a quarter of the pixels by {100 * self.t1_quartile:.0f} % or more"
        if abs(self.t1_median) < 0.005:
            return f"T1 is wrong, {quarter}"
        return f"T1 is {100 * abs(self.t1_median):.0f} % too {'long' if self.t1_median > 0 else 'short'} (median), {quarter}"


@dataclass(frozen=True)
class Judgement:
    """What all pixels together say of a scan.

    Attributes
    ----------
    likely
        The best explanation, and those that cannot be told from it. Empty: nobody can tell.
    shared
        RMS of what the pixels share beside it beyond doubt, as a part of M0.
    places
        The remainder in each part of the object, beside what is said of the whole; empty where positions are not known.
    """

    likely: tuple[Deviation, ...] = ()
    shared: float = 0.0
    places: tuple[Place, ...] = ()

    @property
    def several(self) -> bool:
        """Whether no single delay explains what the pixels share."""
        return self.shared > max(MOST_SHARED, MOST_OF_BEST * self.likely[0].effect) if self.likely else False

    @property
    def note(self) -> str:
        """What the operator has to know; empty where that is next to nothing."""
        return "; ".join(text for text in (self._of_all, note_of_places(self.places)) if text)

    @property
    def _of_all(self) -> str:
        """What all pixels share."""
        if self.several:
            unexplained = 100 * math.hypot(self.likely[0].effect, self.shared)
            return (
                "the images of several delays do not belong together (drifting receiver gain, flip angle or scaling, motion, or wrong "
                f"delays; {unexplained:.1f} % of M0 are unexplained in all pixels alike): T1 is wrong"
            )
        if not any(deviation.matters for deviation in self.likely):
            return ""
        worst = max(self.likely, key=lambda deviation: deviation.t1_quartile)
        # causes last: consoles show the beginning of a comment
        named = [d for d in self.likely if d in (self.likely[0], worst)]
        seen, causes = (", or ".join(texts) for texts in zip(*((d.text, d.causes) for d in named), strict=True))
        return f"{seen}: {worst.consequence} ({causes})"

    @property
    def forbids_map(self) -> bool:
        """Whether T1 is too wrong to be shown."""
        wrong = any(d.matters and d.t1_quartile > MOST_WRONG for d in self.likely)
        return self.several or self.is_no_saturation or wrong

    @property
    def is_no_saturation(self) -> bool:
        """Whether the recovery begins too far from zero for a remainder."""
        return any(d.is_remainder and abs(d.size) > NO_SATURATION for d in self.likely)


def judge_recovery(
    images: Tensor, m0: Tensor, t1: Tensor, times: Sequence[float], inside: Tensor | None = None
) -> Judgement:
    """What explains best that pixels differ alike from the recovery ``M0 (1 - exp(-t / T1))`` that was fitted to them.

    Neither ``M0`` nor ``T1`` has to be exact. A gain common to all states is none, and of one that drifts along the delays T1 takes up
    nearly all: from 0.95 to 1.05 it makes T1 9 to 18 % wrong (median) and leaves 0.5 to 2 % of M0, which is found in tubes and mostly
    not in brains.

    Parameters
    ----------
    images
        ``(state, pixel)``, complex or signed; such as were not drawn towards the recovery.
    m0, t1
        Of the fit, ``(pixel,)``; T1 in s.
    times
        Delays in s.
    inside
        bool ``(..., y, x)``: where in the image the pixels lie, in the order of its true ones; ``None``: nothing is said of places.

    Returns
    -------
    Judgement
        An empty one where fewer than `FEWEST_PIXELS` pixels or than three different delays can tell.
    """
    if t1.numel() < FEWEST_PIXELS or len(set(times)) < 3:
        return Judgement()
    fitted = _Fitted.of(images, m0, t1, times)
    found = fitted.deviations()
    if not found:
        return Judgement()
    best = max(found, key=lambda deviation: deviation.explained)
    alike = [d for d in found if d is not best and d.explained >= _alike(d, best) * best.explained]
    shared = max(deviation.sure_effect for deviation in fitted.less(best).deviations())
    judgement = Judgement((best, *alike), shared)
    if inside is None:
        return judgement
    beside = fitted.less(best) if judgement.note else fitted
    return replace(judgement, places=tuple(beside.places(inside)))


def _alike(deviation: Deviation, best: Deviation) -> float:
    """The part of what ``best`` explains from which on the other cannot be told from it."""
    return ALIKE_SHIFTED if deviation.shifted or (deviation.is_remainder and best.shifted) else ALIKE


@dataclass(frozen=True)
class _Fitted:
    """Pixels and the recovery that was fitted to them: all float64, ``(state, pixel)`` over M0 or ``(pixel,)``.

    Attributes
    ----------
    residual
        Along M0 in the complex plane, as far as neither M0 nor R1 can imitate it.
    decay, recovered
        ``exp(-t R1)`` and what has recovered, ``1 - exp(-t R1)``.
    slope
        Derivative by R1, less its part along ``recovered``: what M0 cannot imitate.
    """

    times: tuple[float, ...]
    residual: Tensor
    decay: Tensor
    recovered: Tensor
    slope: Tensor
    amplitude: Tensor
    rate: Tensor

    @classmethod
    def of(cls, images: Tensor, m0: Tensor, t1: Tensor, times: Sequence[float]) -> _Fitted:
        magnitude = m0.abs()
        along = images * (m0.conj() / magnitude.clamp_min(torch.finfo(magnitude.dtype).tiny))
        axis = (along.real if along.is_complex() else along).double()
        amplitude, rate = magnitude.double(), 1 / t1.double()
        delays = along_states(times, rate)
        decay = torch.exp(-delays * rate)
        recovered = 1 - decay
        slope = _without(delays * decay, recovered)
        residual = _without(_without(axis / amplitude, recovered), slope)
        return cls(tuple(times), residual, decay, recovered, slope, amplitude, rate)

    def deviations(self) -> tuple[Deviation, ...]:
        """What the saturation left, a shift of all delays and the gain of every state, each as if it were alone: medians over pixels.

        ``r_i = M0 (1 - (1 - a) exp(-t_i R1))``, ``M0 (1 - exp(-(t_i + a) R1))`` or ``r_k = (1 + a) M0 (1 - exp(-t_k R1))``; a pixel
        counts by what it tells of ``a``. A remainder that is not small comes out too large by a fifth or, if negative, too near to zero.
        Three different delays leave one number beside M0 and T1, which cannot tell a gain: it is called a remainder or a shift.
        """
        gains = range(len(self.times)) if len(set(self.times)) > 3 else ()
        found = (self._deviation(cause) for cause in (LEFT, SHIFTED, *gains))
        return tuple(deviation for deviation in found if deviation is not None)

    def less(self, deviation: Deviation) -> _Fitted:
        """The same pixels without a deviation."""
        cause = SHIFTED if deviation.shifted else LEFT if deviation.state is None else deviation.state
        return replace(self, residual=self.residual - deviation.size * self._beyond(self._change(cause)))

    def places(self, inside: Tensor) -> Iterator[Place]:
        """The remainder in each part of the object that has enough pixels."""
        for part in parts(inside):
            found = self._of(part)._deviation(LEFT)
            if found is not None:
                yield Place(len(part), found.size, found.doubt, found.t1_median)

    def _of(self, part: Tensor) -> _Fitted:
        """Some of the pixels, by their numbers."""
        names = ("residual", "decay", "recovered", "slope", "amplitude", "rate")
        return replace(self, **{name: getattr(self, name)[..., part] for name in names})

    def _beyond(self, change: Tensor) -> Tensor:
        """What neither M0 nor R1 can imitate."""
        return _without(_without(change, self.recovered), self.slope)

    def _change(self, cause: Cause) -> Tensor:
        """What a deviation of size 1 adds, over M0."""
        if cause == LEFT:
            return self.decay
        if cause == SHIFTED:
            return self.decay * self.rate
        change = torch.zeros_like(self.recovered)
        change[cause] = self.recovered[cause]
        return change

    def _deviation(self, cause: Cause) -> Deviation | None:
        """``None`` where too few pixels tell."""
        change = self._change(cause)
        beyond = self._beyond(change)
        tells = beyond.square().sum(0)
        sizes = (beyond * self.residual).sum(0) / tells
        rate_change = (self.slope * change).sum(0) / self.slope.square().sum(0) / self.rate
        weight = self.amplitude.square() * tells
        known = torch.isfinite(sizes) & torch.isfinite(weight) & torch.isfinite(rate_change) & (weight > 0)
        if int(known.sum()) < FEWEST_PIXELS:
            return None
        size, spread = weighted_median(sizes[known], weight[known])
        effect = abs(size) * math.sqrt(float(weight[known].sum() / self.amplitude[known].square().sum()))
        # lengths and not squares: single pixels with artefacts must not decide
        shorter = torch.linalg.vector_norm(self.residual, dim=0) - torch.linalg.vector_norm(
            self.residual - size * beyond, dim=0
        )
        explained = float((self.amplitude * shorter)[known].sum() / self.amplitude[known].sum())
        n_equal = float(weight[known].sum().square() / weight[known].square().sum())
        doubt = 2 * MEDIAN_TO_MEAN * spread / math.sqrt(n_equal)
        t1_error = (-size * rate_change[known]).sort().values
        quartile = t1_error.abs().sort().values[3 * len(t1_error) // 4]
        state = cause if isinstance(cause, int) else None
        delay = None if state is None else self.times[state]
        median = float(t1_error[len(t1_error) // 2])
        return Deviation(state, delay, size, doubt, effect, explained, median, float(quartile), cause == SHIFTED)


def strong_signal(images: Tensor) -> Tensor:
    """bool ``(*pixels)``: where the RMS over states of ``(state, *pixels)`` is at least `OBJECT` of its 99.9th percentile."""
    strength = images.abs().square().mean(0).sqrt()
    flat = strength.flatten()
    top = float(flat.kthvalue(max(1, math.ceil(0.999 * flat.numel()))).values)
    return (strength >= OBJECT * top) & (strength > 0)


def weighted_median(values: Tensor, weight: Tensor) -> tuple[float, float]:
    """And half the distance of the two values that hold 68 % of the weight between them."""
    values, order = values.sort()
    share = weight[order].cumsum(0)
    low, middle, high = (float(values[int((share < part * share[-1]).sum())]) for part in (0.16, 0.5, 0.84))
    return middle, (high - low) / 2


def _without(vector: Tensor, direction: Tensor) -> Tensor:
    """``vector`` less its part along ``direction``, over the states."""
    return vector - direction * ((vector * direction).sum(0) / direction.square().sum(0).clamp_min(1e-300))
