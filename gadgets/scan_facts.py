"""What a chain reconstructs with, in plain values: for the journal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from gadgets.chain import Chain
from gadgets.handlers import ScanFacts
from gadgets.wire.header import MrdHeader
from recon_core.errors import ReconError

GROUPS = ("acquisition", "preprocess", "coils", "maps", "output")


def facts_of(chain: Chain, header: MrdHeader | None = None) -> ScanFacts:
    """Settings by group and the sha256 of the method's weights, if it has any; which they are may depend on the scan's matrix."""
    groups = {name: getattr(chain, name) for name in GROUPS} | {"method": chain.settings}
    settings = {name: asdict(group) for name, group in groups.items() if is_dataclass(group) and not isinstance(group, type)}
    plain = json.loads(json.dumps(settings, default=str))
    return ScanFacts(
        chain=chain.name, settings={"name": chain.method, **plain}, weights=_weights(chain.method, chain.settings, header)
    )


def _weights(method: str, settings: Any, header: MrdHeader | None) -> str:
    """As the JSON beside the weights states it (whoever loads them checks that it is true)."""
    name = getattr(settings, "weights", None)
    if hasattr(settings, "weights_for"):
        name = settings.weights_for(_plane(header))
    if not isinstance(name, str) or not name:
        return ""
    from recon_core.installed_weights import find_installed

    try:
        stated = json.loads(find_installed(name, method).read_text(encoding="utf-8"))
    except (ReconError, OSError, ValueError):
        return ""  # the method says what is wrong with them
    return str(stated.get("sha256", "")) if isinstance(stated, Mapping) else ""


def _plane(header: MrdHeader | None) -> tuple[int, int] | None:
    """Positions of a plane without the readout; of a slice, with it."""
    if header is None or not header.encodings:
        return None
    encoding = header.encodings[0]
    n2, n1, _ = encoding.encoded_matrix
    return (n2, n1) if n2 > 1 else (n1, encoding.recon_matrix[2])
