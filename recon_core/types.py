"""The contract between acquisition, preprocessing and methods.

Array axes, outermost first: ``(slice, state, coil, k2, k1, x)`` in hybrid k-space and ``(slice, state, z, y, x)`` in image
space. A method sees one slice (2D: ``k2 = z = 1``) or one slab (3D) at a time, so it never sees the slice axis. *State* is
whatever changes between images of the same anatomy: cardiac phase, inversion time, saturation delay or echo.

Transforms are centred and orthonormal (adjoint equals inverse). The readout is always transformed already: Cartesian
readouts are complete, so data fidelity, gradients and solutions are identical and only the phase-encoding FFTs remain.

Units are SI (s, m, Hz, T); flip angles are radians.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from recon_core.errors import DataError

STATE, COIL, K2, K1, X = -5, -4, -3, -2, -1
"""Axes of ``KSpace.data``, counted from the end."""

Tensor = torch.Tensor


@dataclass(frozen=True)
class KSpace:
    """One slice or slab of hybrid k-space.

    Attributes
    ----------
    data
        complex64 ``(state, coil, k2, k1, x)``; zero where nothing was sampled; repeated samples are already averaged.
        DC is at index ``n // 2`` of k1 and k2; x is image space, already cropped to the readout field of view.
    counts
        float32 ``(state, k2, k1)``: how many readouts were averaged at a position; 0 where nothing was sampled.
    acs
        complex64 ``(coil, k2, k1, x)`` on the same grid: the calibration lines to estimate coil maps from (mean over all
        states and repetitions that have them), zero elsewhere; ``None`` when the scan has none.
    acs_mask
        bool ``(k2, k1)``, the positions that ``acs`` fills.
    acs_states
        bool ``(state, k2, k1)``, in which of all states each position of ``acs`` was measured, where no state (and no scan of its own)
        has all of them: then lines side by side differ in contrast. ``None``: one has.
    coil_maps
        complex64 ``(coil, z, y, x)``, unit root-sum-of-squares inside the object; ``None`` until estimated.
    noise_std
        Standard deviation of the noise of one *complex* sample of ``data`` where ``counts == 1`` (that is
        ``sqrt(E|n|^2)``); after prewhitening it is ``preprocess.noise.WHITENED_NOISE_STD``, sqrt(2): the scale gives unit
        SD to the real and to the imaginary part. ``None`` when no noise measurement exists.
    readout_ranges
        For each state the first and one past the last readout sample that all its readouts have *measured*, on the k0 grid of length
        ``x`` (asymmetric echo; states may differ); ``(0, n_x)`` when complete. ``None``: all are.
    whole
        The k-space of all states that this one is a part of, see ``part``; ``None`` for one that is no part.
    """

    data: Tensor
    counts: Tensor
    acs: Tensor | None = None
    acs_mask: Tensor | None = None
    acs_states: Tensor | None = None
    coil_maps: Tensor | None = None
    noise_std: float | None = None
    readout_ranges: tuple[tuple[int, int], ...] | None = None
    whole: KSpace | None = None

    @property
    def mask(self) -> Tensor:
        """bool ``(state, k2, k1)``: sampled positions."""
        return self.counts > 0

    @property
    def n_states(self) -> int:
        return int(self.data.shape[STATE])

    @property
    def n_coils(self) -> int:
        return int(self.data.shape[COIL])

    @property
    def is_3d(self) -> bool:
        return int(self.data.shape[K2]) > 1

    @property
    def readout_extents(self) -> tuple[tuple[int, int], ...]:
        """``readout_ranges``, spelt out where they are ``None``."""
        return self.readout_ranges or ((0, int(self.data.shape[X])),) * self.n_states

    @property
    def common_readout(self) -> tuple[int, int]:
        """First and one past the last readout sample that every state has measured; an empty range where there is none."""
        starts, stops = zip(*self.readout_extents, strict=True)
        return max(starts), min(stops)

    @property
    def readout_shares(self) -> tuple[float, ...]:
        """For each state the part of the readout that was measured, above 0."""
        return tuple((stop - start) / int(self.data.shape[X]) for start, stop in self.readout_extents)

    @property
    def readout_share(self) -> float:
        """Mean of ``readout_shares``."""
        return sum(self.readout_shares) / self.n_states

    @property
    def all_states(self) -> KSpace:
        """What the states have in common (scale, noise, typical count) is taken from here; itself unless it is a part."""
        return self if self.whole is None else self.whole

    def part(self, first: int, stop: int) -> KSpace:
        """The states from ``first`` to ``stop`` (not included), a view.

        For methods that treat each state by itself (``SEPARABLE``): their images of a part are those of the whole, bit for bit.

        Raises
        ------
        DataError
            There are no such states.
        """
        if not 0 <= first < stop <= self.n_states:
            raise DataError("no such states", where="k-space", got=(first, stop), expected=f"within 0 to {self.n_states}")
        return replace(
            self,
            data=self.data[first:stop],
            counts=self.counts[first:stop],
            readout_ranges=None if self.readout_ranges is None else self.readout_ranges[first:stop],
            whole=self.all_states,
        )

    def in_order(self, order: Tensor) -> KSpace:
        """The states in another order: int64 ``(state,)``, which of them comes first, second and so on."""
        ranges = self.readout_ranges
        return replace(
            self,
            data=self.data[order],
            counts=self.counts[order],
            readout_ranges=None if ranges is None else tuple(ranges[i] for i in order.tolist()),
        )

    def to(self, device: torch.device | str) -> KSpace:
        """The same k-space on another device."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device)

        return replace(
            self,
            data=self.data.to(device),
            counts=self.counts.to(device),
            acs=move(self.acs),
            acs_mask=move(self.acs_mask),
            acs_states=move(self.acs_states),
            coil_maps=move(self.coil_maps),
            whole=None if self.whole is None else self.whole.to(device),
        )


@dataclass(frozen=True)
class ScanInfo:
    """What a method may need to know about the scan besides its k-space. SI units.

    Attributes
    ----------
    matrix, fov
        Encoded grid ``(z, y, x)`` after the readout crop, and its field of view in m.
    recon_matrix, recon_fov
        What the console expects back, ``(z, y, x)`` and m.
    echo_times, inversion_times, saturation_times
        One value per state in s, or empty when the header has none that fits the state axis.
    repetition_time, flip_angle, field_strength
        s, rad, T; ``None`` when the header is silent (missing is not a default).
    larmor_frequency
        Of protons in this scanner, Hz; ``None`` when the header is silent.
    b0_direction
        Unit vector of B0 in the image frame, ``(z, y, x)``; ``None`` when the readouts carry no directions.
    reversed_readouts
        For each state whether its readouts were read backwards (bipolar gradients); empty: none were.
    state_counters
        For each state the encoding counters it came from, e.g. ``{"contrast": 0, "phase": 3, "set": 0, "repetition": 0}``.
    slice_index
        The slice counter of this k-space.
    """

    matrix: tuple[int, int, int]
    fov: tuple[float, float, float]
    recon_matrix: tuple[int, int, int]
    recon_fov: tuple[float, float, float]
    echo_times: tuple[float, ...] = ()
    inversion_times: tuple[float, ...] = ()
    saturation_times: tuple[float, ...] = ()
    repetition_time: float | None = None
    flip_angle: float | None = None
    field_strength: float | None = None
    larmor_frequency: float | None = None
    b0_direction: tuple[float, float, float] | None = None
    reversed_readouts: tuple[bool, ...] = ()
    state_counters: tuple[Mapping[str, int], ...] = ()
    slice_index: int = 0


@dataclass(frozen=True)
class ImageSeries:
    """Images of one meaning: ``data`` is ``(state, z, y, x)``, complex64, or float32 when only the magnitude exists."""

    name: str
    data: Tensor
    comment: str = ""


@dataclass(frozen=True)
class ParameterMap:
    """One quantitative map: float32 ``(z, y, x)`` in ``unit``, with the pixels that may be believed.

    ``unit`` is SI as text (``"s"``, ``"1/s"``, ``"ppm"``); the console's unit and slope are chosen at the edge.
    """

    name: str
    data: Tensor
    unit: str
    valid: Tensor
    comment: str = ""


@dataclass(frozen=True)
class Result:
    """What a method returns for one slice or slab.

    ``quality`` holds named figures of merit (``{"residual": 1.02, "iterations": 30}``); ``notes`` are sentences for the
    operator; ``extras`` are arrays for the job's folder (loss curves, routing weights), never sent to the console.
    """

    images: tuple[ImageSeries, ...]
    maps: tuple[ParameterMap, ...] = ()
    quality: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    extras: Mapping[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> Result:
        """The same images and maps on another device."""
        return replace(
            self,
            images=tuple(replace(s, data=s.data.to(device)) for s in self.images),
            maps=tuple(replace(m, data=m.data.to(device), valid=m.valid.to(device)) for m in self.maps),
        )


class Report:
    """Where a method says how far it is; this base class is silent and is the default in Python and in tests."""

    def progress(self, fraction: float, message: str = "") -> None:
        """``fraction`` of the method's work that is done, 0 to 1."""

    def warn(self, message: str) -> None:
        """Something that the operator has to know, without patient data."""

    def preview(self, series: ImageSeries) -> None:
        """A quick image, to be shown before the final ones."""
