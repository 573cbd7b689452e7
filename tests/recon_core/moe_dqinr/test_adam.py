"""The optimiser that imports no compiler takes torch's own steps."""

from __future__ import annotations

import torch

from recon_core.methods.moe_dqinr.adam import Adam, Group


def test_steps_are_those_of_torch_bit_for_bit() -> None:
    """Two rates, one of them moved while it runs, decay in one group, and a parameter that has no gradient at first."""
    generator = torch.Generator().manual_seed(3)
    shapes = ((7, 5), (11,), (3, 2, 2))
    ours = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    theirs = [p.detach().clone().requires_grad_() for p in ours]
    one = Adam(
        [Group(ours[:2], 1e-2, weight_decay=0.3), Group(ours[2:], 3e-3), Group([], 1.0)], betas=(0.9, 0.99), eps=1e-15
    )
    other = torch.optim.Adam(
        [{"params": theirs[:2], "lr": 1e-2, "weight_decay": 0.3}, {"params": theirs[2:], "lr": 3e-3}],
        betas=(0.9, 0.99), eps=1e-15, fused=True,
    )  # fmt: skip
    for step in range(6):
        one.forget_gradients()
        other.zero_grad()
        one.groups[0].rate = other.param_groups[0]["lr"] = 1e-2 / (1 + step)
        for index, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            if index or step > 1:
                p.grad = torch.randn(p.shape, generator=generator)
                q.grad = p.grad.clone()
        one.step()
        other.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True)), step
    assert not torch.equal(ours[0], torch.zeros_like(ours[0])) and len(one.groups) == 2
