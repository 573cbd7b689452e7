"""A start without iterations: the table holds the images that are wanted, the output layers are solved for.

Levels finer than the pixel grid are free numbers of every pixel. Their entries can be *set* so that the features of a pixel are
the strongest principal components of the components' target images; hidden layers with small inputs are nearly linear, so what is
left is a linear least-squares problem for each output layer. It costs about as much as two iterations.

Output weights come out larger than a random start has them, and Adam's first steps move every parameter by the learning rate: even
a tenth of the published rate loses some of what was won before it wins anything. This is a start for a refinement of the images,
or for a regression in many small steps (``prefit`` with column parts), not for the published schedule.
"""

from __future__ import annotations

import torch

from recon_core.errors import DataError
from recon_core.methods.moe_dqinr.encoding import level_scale
from recon_core.methods.moe_dqinr.model import MoeField
from recon_core.methods.moe_dqinr.networks import Branches
from recon_core.methods.moe_dqinr.warm_start import component_targets, set_routing, simplex_weights
from recon_core.solvers.cg import conjugate_gradient

Tensor = torch.Tensor

AMPLITUDE = 0.1
"""RMS of the seeded features. Smaller: hidden layers closer to linear, larger output weights."""

GAIN = 3**0.5
"""Hidden weights are scaled to this gain (variance of the inputs kept by a linear layer): a random start's gain of 1 lets small
inputs fade from layer to layer, and the output weights would have to make up for it."""

SEED_ITERATIONS = 10
"""Of the conjugate gradients that find the table's entries; each costs about two encodings."""

RIDGE = 1e-6
"""Of the output layers' least squares, relative to the mean square of the hidden values."""


def start_in_closed_form(field: MoeField, images: Tensor, weights: Tensor | None = None) -> None:
    """Set table, hidden gains, router and output layers so that the field gives a series, as well as that goes.

    Parameters
    ----------
    field
        Freshly made; changed in place. Its table's random numbers stay, under the seeded ones.
    images
        complex working images ``(state, x, z, y)`` in scaled units.
    weights
        Routing weights; ``simplex_weights(images, K)`` if ``None``.

    Raises
    ------
    DataError
        The series does not fit the field.
    """
    expected = (field.n_states, *field.spatial_shape)
    if tuple(images.shape) != expected:
        raise DataError(
            "series does not fit the field", where="closed-form start", got=tuple(images.shape), expected=expected
        )
    if field.router is not None:
        set_routing(field, simplex_weights(images, field.configuration.n_experts) if weights is None else weights)
    with torch.no_grad():
        for branches in (field.background, field.experts):
            if branches is not None:
                _set_gain(branches, GAIN)
    targets = component_targets(field, images)
    seed_table(field, targets)
    solve_output_layers(field, targets)


def _set_gain(branches: Branches, gain: float) -> None:
    for parameter in (*branches.weights[:-1], *branches.biases[:-1]):
        parameter.mul_(gain / branches.shape.gain)


def free_levels(field: MoeField) -> int:
    """How many of the finest levels have at least two grid spacings for a pixel: their corners belong to one pixel alone."""
    grid = field.configuration.grid
    pixels = max(field.encoder.height, field.encoder.width) - 1
    return sum(level_scale(grid, level) >= 2 * pixels for level in range(grid.levels))


def seed_table(field: MoeField, targets: Tensor) -> None:
    """Add the strongest principal components of ``targets`` ``(component, x, z, y)`` to the finest levels, strongest last.

    The entries solve ``A t = features`` with the smallest norm (a few steps of conjugate gradients on ``A A^T``, which is diagonal
    but for pixels that the hash lets collide). Without free levels the finest one takes what it can, smoothly.
    """
    encoder, grid = field.encoder, field.configuration.grid
    values = field.pixels.as_values(targets).transpose(0, 1).flatten(1).double()  # (pixel, component re/im)
    left, sizes, _ = torch.linalg.svd(values - values.mean(0), full_matrices=False)
    wanted = int((sizes > 1e-4 * sizes[0]).sum())
    levels = max(1, free_levels(field))
    n = min(levels * grid.features, wanted)
    features = left.new_zeros(len(values), grid.width)
    # the finest level has the fewest pixels in common with others: the strongest component goes there
    features[:, grid.width - n :] = left[:, :n].flip(1) * (AMPLITUDE * len(values) ** 0.5)
    features = features.to(encoder.table.dtype)
    product = encoder.product
    # rows of A scaled to unit length: all eigenvalues are near one but for collisions
    scale = product.row_squares.rsqrt()
    with torch.no_grad():
        solved = conjugate_gradient(
            lambda u: scale * product.forward(product.transpose(scale * u)),
            scale * features,
            max_iterations=SEED_ITERATIONS,
            n_batch_axes=0,
        )
        encoder.table.add_(product.transpose(scale * solved.solution))


def solve_output_layers(field: MoeField, targets: Tensor) -> None:
    """Least squares, with a small ridge, for the output layers of background and experts on their present hidden values.

    ``targets`` complex ``(component, x, z, y)`` in the order of ``field.components``; the residual basis is left alone.
    """
    values = field.pixels.as_values(targets)
    first = 0
    with torch.no_grad():
        features = field.encoder()
        for branches in (field.background, field.experts):
            if branches is None:
                continue
            for index in range(branches.n_branches):
                _solve_output(branches, index, features, values[first + index])
            first += branches.n_branches


def _solve_output(branches: Branches, index: int, features: Tensor, values: Tensor) -> None:
    hidden = branches.hidden_of(index, features)
    extended = torch.cat([hidden, torch.ones_like(hidden[:, :1])], dim=1).double()
    gram = extended.mT @ extended
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    solved = torch.linalg.solve(gram, extended.mT @ values.double()).to(values.dtype)
    branches.weights[-1][index] = solved[:-1]
    branches.biases[-1][index] = solved[-1:]
