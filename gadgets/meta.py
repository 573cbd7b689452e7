"""Image attributes: the ismrmrdMeta document, written so that every known peer reads the same thing.

Two dialects of key names exist: the MRD standard's (Siemens IceFire, OpenRecon) and Gadgetron's with its prefix. Both are
written. What peers cannot bear is never produced: an empty value (ismrmrd-python turns it into the text "None"), a character
that XML does not allow, or bytes outside ASCII (pip ``gadgetron`` encodes attributes as ASCII; a character reference carries
the same text through every XML parser).

Source: ISMRMRD ``doc/mrd_image_data.md``; Gadgetron ``toolboxes/mri_core/mri_core_def.h``.
"""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

import defusedxml.ElementTree
from defusedxml.common import DefusedXmlException

from gadgets.errors import MalformedText
from recon_core.errors import DataError

MetaValue = str | int | float | Sequence[str | int | float]

MAX_META_CHARACTERS = 4 * 1024 * 1024
"""Longest document that is parsed; Siemens' base64 mini headers are a few tens of kB."""

# the standard's key and Gadgetron's key for the same thing
BOTH_FAMILIES = {
    "DataRole": "GADGETRON_DataRole",
    "ImageComments": "GADGETRON_ImageComment",
    "ImageProcessingHistory": "GADGETRON_ImageProcessingHistory",
    "SequenceDescriptionAdditional": "GADGETRON_SeqDescription",
    "WindowCenter": "GADGETRON_WindowCenter",
    "WindowWidth": "GADGETRON_WindowWidth",
    "EchoTime": "GADGETRON_TE",
    "InversionTime": "GADGETRON_TI",
}

_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_.:-]*")
_NOT_XML = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")  # XML 1.0, production 2


def write_meta(entries: Mapping[str, MetaValue]) -> str:
    """An ismrmrdMeta document with sorted keys, in ASCII; the empty text when nothing is left to say.

    Parameters
    ----------
    entries
        Key to one value or a sequence of values. Integers stay integers ("WindowCenter" is a *long* on the console), floats
        get the shortest text that reads back exactly. Empty texts, blanks and empty sequences are left out with their key.

    Raises
    ------
    DataError
        A key that is no plain name, or a number that is not finite.
    """
    parts = []
    for key in sorted(entries):
        if not _KEY.fullmatch(key):
            raise DataError("not a usable attribute name", where="image attributes", got=repr(key))
        raw = entries[key]
        values = [_text(key, v) for v in ([raw] if isinstance(raw, str | int | float) else raw)]
        values = [v for v in values if v]
        if values:
            lines = "".join(f"\t\t<value>{escape(v)}</value>\n" for v in values)
            parts.append(f"\t<meta>\n\t\t<name>{key}</name>\n{lines}\t</meta>\n")
    if not parts:
        return ""
    document = f'<?xml version="1.0"?>\n<ismrmrdMeta>\n{"".join(parts)}</ismrmrdMeta>\n'
    return document.encode("ascii", "xmlcharrefreplace").decode("ascii")


def read_meta(text: str) -> dict[str, tuple[str, ...]]:
    """Every key of an ismrmrdMeta document with all its values, as text; ``{}`` for the empty text.

    Trailing NUL and white space are ignored; a key that occurs twice keeps the values of both; an empty value reads as "".

    Raises
    ------
    MalformedText
        Not XML, XML with entities or a DTD, another root element, a nameless entry, or an absurd length.
    """
    text = text.rstrip("\0 \t\r\n")
    if not text:
        return {}
    if len(text) > MAX_META_CHARACTERS:
        raise MalformedText("too long", where="image attributes", got=len(text), expected=f"at most {MAX_META_CHARACTERS}")
    try:
        root = defusedxml.ElementTree.fromstring(text, forbid_dtd=True)
    except (ElementTree.ParseError, DefusedXmlException, ValueError) as problem:
        raise MalformedText("not an ismrmrdMeta document", where="image attributes", got=type(problem).__name__) from None
    if root.tag != "ismrmrdMeta":
        raise MalformedText("wrong root element", where="image attributes", got=root.tag[:64], expected="ismrmrdMeta")
    found: dict[str, tuple[str, ...]] = {}
    for entry in root.findall("meta"):
        name = entry.findtext("name", "").strip()
        if not name:
            raise MalformedText("an entry without a name", where="image attributes")
        found[name] = found.get(name, ()) + tuple(value.text or "" for value in entry.findall("value"))
    return found


def both_families(entries: Mapping[str, MetaValue]) -> dict[str, MetaValue]:
    """``entries`` and, for each standard key that has one, Gadgetron's twin; a twin that is given explicitly wins.

    Give the twin where the two peers mean different numbers: the console applies a window to rescaled values, Gadgetron to
    stored ones.
    """
    twins = {BOTH_FAMILIES[key]: value for key, value in entries.items() if key in BOTH_FAMILIES}
    return {**twins, **entries}


def direction_texts(direction: Sequence[float]) -> tuple[str, str, str]:
    """Three texts with 18 digits behind the point, as consoles want ``ImageRowDir`` and its kin."""
    x, y, z = (f"{float(component):.18f}" for component in direction)
    return x, y, z


def _text(key: str, value: str | int | float) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    if isinstance(value, float):
        if not math.isfinite(value):
            raise DataError("not a finite number", where=f"image attribute {key}", got=value)
        return repr(float(value))
    return _NOT_XML.sub("\ufffd", str(value).rstrip("\0")).strip()
