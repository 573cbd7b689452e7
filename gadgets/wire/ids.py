"""Message ids of the MRD/Gadgetron streaming protocol. Every message is a little-endian uint16 id and a body."""

from __future__ import annotations

from enum import IntEnum


class MessageId(IntEnum):
    """All ids that a real peer may use, also those that this product refuses by name."""

    CONFIG_FILE = 1
    CONFIG_SCRIPT = 2
    HEADER = 3
    CLOSE = 4
    TEXT = 5
    QUERY = 6
    RESPONSE = 7
    ERROR = 8
    ACQUISITION = 1008
    DICOM = 1012
    DICOM_WITHNAME = 1018
    DEPENDENCY = 1019
    IMAGE = 1022
    RECON_DATA = 1023
    IMAGE_ARRAY = 1024
    WAVEFORM = 1026
    NDARRAY = 1030
    BUCKET = 1050
    BUNDLE = 1051


def message_name(number: int) -> str:
    """``"1008 (ACQUISITION)"`` for a known id, ``"4711"`` for any other."""
    try:
        return f"{number} ({MessageId(number).name})"
    except ValueError:
        return str(number)
