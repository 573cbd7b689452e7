"""Who is talking: a scanner's client or Gadgetron itself, told apart by the configuration text.

A client's CONFIG_SCRIPT is a whole chain (``<configuration>`` with version, readers, writers, stream; or the legacy root).
Gadgetron sends an external node nothing but that node's own ``<configuration>``: properties, or an empty document when the chain
file has no such element.
"""

from __future__ import annotations

import re

_PROLOGUE = r"\s*(?:<\?xml[^>]*\?>\s*)?(?:<!--.*?-->\s*)*"
_NODE = re.compile(
    _PROLOGUE + r"<configuration\s*(?:/>|>\s*(?:<!--.*?-->\s*)*(?:<property[\s/>]|</configuration\s*>))", re.DOTALL
)
_EMPTY_DOCUMENT = re.compile(r"\s*<\?xml[^>]*\?>\s*")
_LONGEST_PROLOGUE = 4096  # nobody writes more before the first property; a hostile text must not cost more than this


def is_node_configuration(text: str) -> bool:
    """Whether a CONFIG_SCRIPT is what Gadgetron 4.7 sends to an external node, and no client's chain."""
    return bool(_EMPTY_DOCUMENT.fullmatch(text[:_LONGEST_PROLOGUE]) or _NODE.match(text[:_LONGEST_PROLOGUE]))
