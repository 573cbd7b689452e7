"""How long the method of a chain may compute: its own limit and the server's."""

from __future__ import annotations

from dataclasses import dataclass

from gadgets.compute_pool import Budget
from recon_core.settings import setting


@dataclass(frozen=True)
class ComputeSettings:
    """The chain's own limit."""

    time_limit: float = setting(
        0.0,
        "longest time that the method may compute for a scan; what is not done then comes from the fallback chain; 0: the server's limit",
        unit="s",
        low=0.0,
        high=604_800.0,
    )


def budget_of(chain: str, settings: ComputeSettings, server_limit: float) -> Budget | None:
    """The smaller of the chain's limit and the server's, both in s with 0 for none; ``None`` without any."""
    limits = [limit for limit in (settings.time_limit, server_limit) if limit > 0]
    return Budget(min(limits), name=chain) if limits else None
