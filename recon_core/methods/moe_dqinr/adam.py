"""Adam's state and steps over torch's own fused kernel.

``torch.optim.Adam`` imports the tracing compiler (torch._dynamo, and sympy with it) when it is made, although nothing is compiled: 3 to 4 s
of a process's start and 100 MB of its memory. The function under it, `torch.optim.adam.adam`, does not, and gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim.adam import adam


@dataclass
class Group:
    """Parameters with one learning rate: a tensor where a captured graph has to read it from memory.

    weight_decay
        Times the parameter, is added to its gradient (L2; not the decoupled decay of AdamW).
    """

    parameters: Sequence[Tensor]
    rate: float | Tensor
    weight_decay: float = 0.0
    moments: dict[int, tuple[Tensor, Tensor, Tensor]] = field(default_factory=dict)
    """Of the parameters that have had a gradient, by their index: first moment, second moment, number of steps."""


class Adam:
    """Kingma and Ba 2015, algorithm 1.

    captured
        Steps may be part of a CUDA graph; every parameter has to have had its first step before the capture begins.
    """

    def __init__(self, groups: Iterable[Group], *, betas: tuple[float, float], eps: float, captured: bool = False) -> None:
        self.groups = [group for group in groups if group.parameters]
        self.betas, self.eps, self.captured = betas, eps, captured

    def forget_gradients(self) -> None:
        """The next backward pass makes them afresh."""
        for group in self.groups:
            for parameter in group.parameters:
                parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        """Move every parameter that has a gradient."""
        for group in self.groups:
            moved = [index for index, parameter in enumerate(group.parameters) if parameter.grad is not None]
            parameters = [group.parameters[index] for index in moved]
            moments = [self._moments(group, index) for index in moved]
            adam(
                parameters,
                [parameter.grad for parameter in parameters if parameter.grad is not None],
                [first for first, _, _ in moments],
                [second for _, second, _ in moments],
                [],
                [steps for _, _, steps in moments],
                fused=True, capturable=self.captured, amsgrad=False, beta1=self.betas[0], beta2=self.betas[1], lr=group.rate,
                weight_decay=group.weight_decay, eps=self.eps, maximize=False,
            )  # fmt: skip

    @staticmethod
    def _moments(group: Group, index: int) -> tuple[Tensor, Tensor, Tensor]:
        if index not in group.moments:
            parameter = group.parameters[index]
            steps = torch.zeros((), dtype=torch.float32, device=parameter.device)
            group.moments[index] = torch.zeros_like(parameter), torch.zeros_like(parameter), steps
        return group.moments[index]
