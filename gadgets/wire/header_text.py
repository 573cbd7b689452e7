"""The MRD header's bytes as text, whatever a converter has made of a patient's name.

MRD's texts are UTF-8. Converters that copy a vendor's header byte by byte write names in the scanner's own encoding, and a scan must not be
refused for an umlaut in a name that its reconstruction does not need.
"""

from __future__ import annotations

import re

from gadgets.errors import MalformedText

GUESS = "windows-1252"
"""Where nothing says which encoding it is: that of western scanners. Of others the names come out wrong, and the operator is told."""

DECLARED = frozenset(
    {
        *(f"iso-8859-{n}" for n in (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 14, 15)),
        *(f"windows-125{n}" for n in range(9)),
        *("shift_jis", "euc-jp", "euc-kr", "gb2312", "gbk", "gb18030", "big5", "koi8-r", "koi8-u", "tis-620"),
    }
)
"""What a declaration may name: a codec is looked up by its name, and names come from the wire."""

_DECLARATION = re.compile(r"""(\s*<\?xml\b[^>]{0,200}?\bencoding\s*=\s*["'])([A-Za-z0-9._-]{1,40})(?=["'])""")


def header_text(raw: bytes) -> tuple[str, bool]:
    """The text, and whether its encoding was guessed. Where it is not UTF-8 the declaration is made to say so of what is returned.

    Raises
    ------
    MalformedText
        It does not even begin like XML, or has a NUL in it.
    """
    try:
        return raw.decode("utf-8"), False
    except UnicodeDecodeError as error:
        at = error.start
    found = _DECLARATION.match(raw[:400].decode("latin-1"))
    declared = found[2].lower() if found is not None else ""
    if declared in DECLARED:
        try:
            return _DECLARATION.sub(r"\1UTF-8", raw.decode(declared), count=1), False
        except UnicodeDecodeError:
            pass
    if raw.lstrip()[:1] != b"<" or b"\0" in raw:
        got, expected = f"byte 0x{raw[at]:02x} at position {at}", "UTF-8 text"
        raise MalformedText("the MRD header is not UTF-8", where="HEADER", got=got, expected=expected)
    return _DECLARATION.sub(r"\1UTF-8", raw.decode(GUESS, "replace"), count=1), True
