"""The multi-layer perceptrons: branches that turn features of a pixel into complex values, heads that turn a state into coefficients."""

from __future__ import annotations

import math
from itertools import pairwise

import torch

from recon_core.methods.moe_dqinr.configurations import MlpShape

Tensor = torch.Tensor


class Branches(torch.nn.Module):
    """Several MLPs of one shape evaluated together by batched products (Eq. 12-14).

    Parameters
    ----------
    n_branches
        How many; their weights have this as first axis.
    n_inputs, shape, n_outputs
        Of each.
    generator
        On the CPU. Weights and biases are uniform within ``gain / sqrt(inputs)``.
    """

    def __init__(
        self,
        n_branches: int,
        n_inputs: int,
        shape: MlpShape,
        n_outputs: int = 2,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.n_branches, self.n_outputs, self.shape = n_branches, n_outputs, shape
        sides = [n_inputs, *[shape.width] * shape.depth, n_outputs]
        self.weights = torch.nn.ParameterList()
        self.biases = torch.nn.ParameterList()
        for a, b in pairwise(sides):
            bound = shape.gain / math.sqrt(a)
            weight = torch.empty(n_branches, a, b, dtype=dtype).uniform_(-bound, bound, generator=generator)
            bias = torch.empty(n_branches, 1, b, dtype=dtype).uniform_(-bound, bound, generator=generator)
            self.weights.append(torch.nn.Parameter(weight.to(device)))
            self.biases.append(torch.nn.Parameter(bias.to(device)))

    def hidden(self, features: Tensor, precision: torch.dtype | None = None) -> Tensor:
        """Last hidden layer ``(branch, pixel, width)`` in ``precision`` (that of the features if ``None``).

        Half precision is meant for the products; biases are added and sums accumulated as the library does for that type.
        """
        dtype = precision or features.dtype
        h = features.to(dtype)[None].expand(self.n_branches, -1, -1)
        for weight, bias in zip(self.weights[:-1], self.biases[:-1], strict=True):
            h = torch.nn.functional.silu(torch.baddbmm(bias.to(dtype), h, weight.to(dtype)))
        return h

    def forward(self, features: Tensor, precision: torch.dtype | None = None) -> Tensor:
        """``(pixel, input)`` to ``(branch, pixel, output)``; the output layer always has the precision of the features."""
        h = self.hidden(features, precision).to(features.dtype)
        return torch.baddbmm(self.biases[-1], h, self.weights[-1])


def state_features(
    n_states: int, harmonics: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Tensor:
    """Fourier encoding of the normalised state index, Eq. 17: ``(state, 1 + 2 harmonics)``.

    ``q~ = (q - 1) / (Q - 1)``; a single state has ``q~ = 0``. At the first and the last state all harmonics agree: only the
    first element tells them apart.
    """
    q = torch.arange(n_states, dtype=torch.float64) / max(1, n_states - 1)
    parts = [q]
    for h in range(1, harmonics + 1):
        parts += [torch.sin(2 * math.pi * h * q), torch.cos(2 * math.pi * h * q)]
    return torch.stack(parts, dim=1).to(device=device, dtype=dtype)
