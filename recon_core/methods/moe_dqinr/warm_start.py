"""A start in the image domain: router and experts fitted to a series that a quick low-rank method found.

From a random start all experts are alike, the router moves along one direction, and the series stays near rank two. Here the
router starts from the temporal subspace of a given series, background and experts from the images that go with it. No coils, no
transforms: only the MLPs are evaluated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from recon_core.errors import DataError
from recon_core.methods.moe_dqinr.fit import FitResult, FitSettings, IterationReport, fit
from recon_core.methods.moe_dqinr.model import MoeField
from recon_core.methods.moe_dqinr.objective import Objective

Tensor = torch.Tensor

PREFIT = FitSettings(iterations=250, schedule="cosine", lr_image=1e-2, weight_decay=0.0)
"""250 image-domain iterations, as many as the study of the rank collapse took. A regression on known images stands ten times the
published rate, and needs it: at 1e-3 it is far from done. ``column_parts`` makes more, cheaper steps of the same work."""

LEAST_WEIGHT = 0.02
"""Smallest routing weight that a start may have: softmax saturates near zero and would not move again."""

NEGLIGIBLE = 1e-3
"""Principal components of the states below this part of the strongest one get no expert: the start would be badly conditioned."""

MOST_VOLUME_GAIN = 1.05
"""Vertices are exchanged until no exchange grows the simplex by more than this factor."""


def simplex_weights(images: Tensor, n_experts: int, least_weight: float = LEAST_WEIGHT) -> Tensor:
    """Routing weights ``(state, expert)`` whose span, with a constant, is the series' strongest temporal subspace.

    States are points in the space of the series' principal components (mean over states removed). The K states that span the
    largest simplex of dimension K - 1 are chosen; barycentric coordinates with respect to it sum to one and span the
    subspace exactly. Each face is then moved until the smallest coordinate with respect to it is ``least_weight``.
    With more experts than states, or than the series has components, the spare ones get the least weight everywhere.

    Parameters
    ----------
    images
        complex ``(state, ...)``, any layout.
    n_experts
        K.

    Returns
    -------
    float64, rows positive and of sum one, on the images' device.
    """
    n_states = int(images.shape[0])
    if not 0 < least_weight < 1 / max(2, n_experts):
        raise DataError(
            "weights cannot be that large", where="simplex weights", got=least_weight, expected=f"0 to 1/{n_experts}"
        )
    coordinates = temporal_coordinates(images, min(n_experts, n_states) - 1)
    spare = n_experts - 1 - coordinates.shape[1]
    least = least_weight / (1 - spare * least_weight)
    weights = coordinates.new_ones(n_states, 1)
    if coordinates.shape[1]:
        weights = _enclose(_barycentric(coordinates), least)
    weights = weights * (1 - spare * least_weight)
    return torch.cat([weights, weights.new_full((n_states, spare), least_weight)], dim=1)


def temporal_coordinates(images: Tensor, most: int) -> Tensor:
    """The states as points: strongest principal components of real and imaginary parts, float64 ``(state, component)``.

    At most ``most``, without those below ``NEGLIGIBLE`` of the strongest.
    """
    pairs = torch.view_as_real(images.to(torch.complex128)).reshape(len(images), -1)
    whole = pairs.norm()
    pairs = pairs - pairs.mean(0)
    squares, vectors = torch.linalg.eigh(pairs @ pairs.mT)
    sizes = squares.clamp_min(0).sqrt().flip(0)
    # differences between states that are rounding errors of the states are no component either
    n = int((sizes > torch.maximum(NEGLIGIBLE * sizes[0], 1e-6 * whole)).sum())
    coordinates: Tensor = (vectors.flip(1) * sizes)[:, : min(n, most)]
    return coordinates


def _barycentric(points: Tensor) -> Tensor:
    """Coordinates of all points with respect to the largest simplex among them; ``(state, n + 1)``."""
    n = points.shape[1] + 1
    homogeneous = torch.cat([torch.ones_like(points[:, :1]), points / points.abs().amax(0)], dim=1)
    chosen = _pivots(homogeneous, n)
    coordinates = homogeneous @ torch.linalg.pinv(homogeneous[chosen])
    for _ in range(10 * n):
        # exchanging vertex v for state q multiplies the volume by |coordinates[q, v]|
        flat = int(coordinates.abs().argmax())
        state, vertex = divmod(flat, n)
        if float(coordinates[state, vertex].abs()) <= MOST_VOLUME_GAIN:
            break
        chosen[vertex] = state
        coordinates = homogeneous @ torch.linalg.pinv(homogeneous[chosen])
    # without rank for n vertices the sums are off: the rest goes to all alike
    return coordinates + (1 - coordinates.sum(1, keepdim=True)) / n


def _pivots(rows: Tensor, n: int) -> list[int]:
    """Greedy choice of ``n`` rows, each the farthest from the span of those before."""
    rest = rows.clone()
    chosen: list[int] = []
    for _ in range(n):
        lengths = rest.square().sum(1)
        if chosen:
            lengths[chosen] = -1.0
        best = int(lengths.argmax())
        chosen.append(best)
        direction = rest[best] / rest[best].norm().clamp_min(torch.finfo(rest.dtype).tiny)
        rest = rest - (rest @ direction)[:, None] * direction
    return chosen


def _enclose(coordinates: Tensor, least: float) -> Tensor:
    """Move each face of the simplex until the nearest point has the coordinate ``least`` with respect to it: an affine map."""
    lowest = coordinates.amin(0)
    size = (1 - lowest.sum()) / (1 - len(lowest) * least)
    return (coordinates - lowest) / size + least


def set_routing(field: MoeField, weights: Tensor) -> None:
    """Make the router answer with these weights ``(state, expert)``: its output layer solves for their logarithms.

    The smallest change of the output layer that does it; exact where the router is at least as wide as there are states.
    """
    router = field.router
    if router is None:
        raise DataError("there is no router to set", where="warm start", got=f"variant {field.variant}")
    wanted = weights.double().log()
    wanted = wanted - wanted.mean(1, keepdim=True)
    with torch.no_grad():
        hidden = router.hidden(field.state_features)[0].double()
        extended = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1)
        missing = wanted.to(hidden.device) - field.logits().double()
        change = torch.linalg.pinv(extended, rtol=1e-6) @ missing
        router.weights[-1][0] += change[:-1].to(router.weights[-1].dtype)
        router.biases[-1][0] += change[-1:].to(router.biases[-1].dtype)


def component_targets(field: MoeField, images: Tensor) -> Tensor:
    """Background and experts that explain the series best given the routing: complex ``(component, x, z, y)``.

    Least squares with the smallest norm (a constant is also a sum of routing weights, so background and experts share it); the
    residual basis, there to correct later, is left as it is.
    """
    n = 1 + (field.experts.n_branches if field.experts is not None else 0)
    with torch.no_grad():
        mixing = field.mixing().double()
        components = field.component_images().to(torch.complex128)
        rest = images.to(torch.complex128).flatten(1) - mixing[:, n:].to(torch.complex128) @ components[n:].flatten(1)
        inverse = torch.linalg.pinv(mixing[:, :n], rtol=1e-6).to(torch.complex128)
        solved = (inverse @ rest).reshape(n, *images.shape[1:])
    return torch.cat([solved, components[n:]]).to(images.dtype)


@dataclass(frozen=True)
class ComponentTarget:
    """``sum_n |c_n - t_n|^2``: every branch learns its own image, working layout ``(component, x, z, y)``."""

    targets: Tensor
    held_out: Objective | None = None

    @property
    def n_rows(self) -> int:
        return len(self.targets)

    def mixing(self, field: MoeField) -> Tensor:
        return torch.eye(self.n_rows, dtype=field.encoder.table.dtype, device=self.targets.device)

    def value_and_gradient(self, images: Tensor) -> tuple[Tensor, Tensor]:
        difference = images - self.targets
        value = torch.view_as_real(difference).square().flatten(1).sum(1, dtype=torch.float64)
        return value, difference

    def columns(self, first: int, step: int) -> ComponentTarget:
        return ComponentTarget(self.targets[:, first::step].contiguous())


def prefit(
    field: MoeField,
    images: Tensor,
    settings: FitSettings | None = None,
    weights: Tensor | None = None,
    on_iteration: Callable[[IterationReport], None] | None = None,
) -> FitResult:
    """Start a field from a series: router from its temporal subspace, background and experts by regression on their images.

    Parameters
    ----------
    field
        Changed in place.
    images
        complex working images ``(state, x, z, y)`` in scaled units, e.g. a low-rank reconstruction.
    settings
        Of the image-domain iterations; ``PREFIT`` by default.
    weights
        Routing weights; ``simplex_weights(images, K)`` if ``None``.

    Returns
    -------
    FitResult
        Of the regression; ``images`` is the series that the field now gives.

    Raises
    ------
    DataError
        The series does not fit the field.
    """
    expected = (field.n_states, *field.spatial_shape)
    if tuple(images.shape) != expected:
        raise DataError("series does not fit the field", where="warm start", got=tuple(images.shape), expected=expected)
    if field.router is not None:
        set_routing(field, simplex_weights(images, field.configuration.n_experts) if weights is None else weights)
    targets = component_targets(field, images)
    result = fit(field, ComponentTarget(targets), settings or PREFIT, on_iteration)
    # the regression speaks of components; the caller wants the series
    return FitResult(field.images(), result.losses, result.penalty, (), result.iterations, result.best_iteration)
