"""Who, when and where: what DICOM wants to know about patient, study and scanner, taken from the MRD header and nowhere else.

The values go into DICOM files only: never into an error, a log line or a file name. Each is checked against its DICOM value
representation before pydicom sees it, because pydicom repeats what it does not like in its warnings.

Source: ISMRMRD ``schema/ismrmrd.xsd``; DICOM PS3.5 section 6.2 (value representations).
"""

from __future__ import annotations

import re
import uuid
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path

import defusedxml.ElementTree
import h5py

from gadgets.capture import read_capture
from gadgets.errors import HeaderError, RawFileError
from gadgets.raw_source import RawFile
from gadgets.wire.events import HeaderText
from gadgets.wire.framing import FrameParser
from gadgets.wire.header import MrdHeader, parse_header
from gadgets.wire.header_text import header_text
from recon_core.errors import ReconError

MAX_HEADER_BYTES = 16 << 20
_BLOCK = 1 << 20

_UID = re.compile(r"(0|[1-9]\d*)(\.(0|[1-9]\d*))+")
_TIME = re.compile(r"(\d\d):?(\d\d):?(\d\d)(\.\d{1,6})?\d*(Z|[+-]\d\d:\d\d)?", re.ASCII)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\\]")
_Rule = Callable[[str], str | None]
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, "recon-gadgets/dicom")


class DicomError(ReconError):
    """Images that cannot be written as DICOM."""


@dataclass(frozen=True, repr=False)
class Identity:
    """DICOM keywords and values, by module; what the header does not say is missing. Its ``repr`` shows nothing of it.

    ``patient``, ``study``, ``series`` and ``equipment`` hold texts that are valid for their value representation; ``left_out`` are keywords
    of those that were not. ``mrd`` is the rest of the header (sequence, matrices), ``None`` without a header.
    """

    patient: Mapping[str, str] = field(default_factory=dict)
    study: Mapping[str, str] = field(default_factory=dict)
    series: Mapping[str, str] = field(default_factory=dict)
    equipment: Mapping[str, str] = field(default_factory=dict)
    frame_of_reference: str | None = None
    initial_series: int = 0
    sequence_type: str = ""
    mrd: MrdHeader | None = None
    left_out: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"Identity({len(self.patient)} about the patient, {len(self.study)} about the study)"


def make_uid(*parts: object) -> str:
    """A UID that depends on ``parts`` alone: a UUID as a number below 2.25 (DICOM PS3.5 section B.2).

    The same images give the same UIDs, so sending twice does not fill the archive twice. Nothing about the patient may be
    among the parts: short texts can be guessed from their hash.
    """
    return f"2.25.{uuid.uuid5(_NAMESPACE, chr(0).join(map(str, parts))).int}"


def read_identity(text: str) -> Identity:
    """Everything about patient, study and scanner in an MRD header.

    Values that their DICOM field cannot hold (a birth date that is none, a UID that is none, a number of the patient or the order that
    is too long) are left out; descriptions are cut.

    Raises
    ------
    HeaderError
        As `gadgets.wire.header.parse_header`.
    """
    mrd = parse_header(text)  # refuses what is no XML, entities, and absurd sizes
    try:
        root = defusedxml.ElementTree.fromstring(text.strip("\ufeff\0 \t\r\n"), forbid_dtd=True)
    except (ElementTree.ParseError, ValueError):
        raise HeaderError("not XML", where="header") from None
    first_series = _words(root, "measurementInformation", "initialSeriesNumber")
    left_out: list[str] = []
    zone = _zone(root)
    return Identity(
        patient=_module(root, "subjectInformation", _PATIENT, left_out),
        study=_module(root, "studyInformation", _STUDY, left_out) | ({"TimezoneOffsetFromUTC": zone} if zone else {}),
        series=_module(root, "measurementInformation", _SERIES, left_out),
        equipment=_module(root, "acquisitionSystemInformation", _EQUIPMENT, left_out),
        frame_of_reference=_uid(_words(root, "measurementInformation", "frameOfReferenceUID")),
        initial_series=int(first_series)
        if first_series.isascii() and first_series.isdecimal() and len(first_series) < 6
        else 0,
        sequence_type=_words(root, "sequenceParameters", "sequence_type"),
        mrd=mrd,
        left_out=tuple(left_out),
    )


def read_header_text(path: Path | str, group: str = "dataset") -> str:
    """The MRD header of an MRD raw file, of a raw capture, or an XML file.

    Raises
    ------
    RawFileError, SpoolError, WireError
        The file cannot be read, or has no header.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(_BLOCK)
    except OSError as error:
        raise RawFileError("cannot read the file", where=path.name, got=error.strerror) from None
    if h5py.is_hdf5(path):
        return RawFile(path, b"", b"", group).header_text
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<"):
        if path.stat().st_size > MAX_HEADER_BYTES:
            got = f"{path.stat().st_size} bytes"
            raise RawFileError("too long for a header", where=path.name, got=got, expected=f"at most {MAX_HEADER_BYTES}")
        return header_text(path.read_bytes())[0]
    with FrameParser() as parser:
        for block in _blocks(read_capture(path).path):
            for event in parser.feed(block):
                if isinstance(event, HeaderText):
                    return event.text
    raise RawFileError("no MRD header in this file", where=path.name)


def _blocks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _words(root: ElementTree.Element, section: str, name: str) -> str:
    for parent in root:
        if _plain(parent) == section:
            for child in parent:
                if _plain(child) == name:
                    return (child.text or "").strip()
    return ""


def _zone(root: ElementTree.Element) -> str:
    """The offset from UTC that all times of the header state, as DICOM writes it; DICOM's times have none of their own."""
    times = (_words(root, "studyInformation", "studyTime"), _words(root, "measurementInformation", "seriesTime"))
    found = {match[5] for match in map(_TIME.fullmatch, times) if match is not None}
    stated = next(iter(found), None) if len(found) == 1 else None
    return "" if stated is None else "+0000" if stated in ("Z", "-00:00") else stated.replace(":", "")


def _plain(element: ElementTree.Element) -> str:
    return str(element.tag).rpartition("}")[2]


def _module(
    root: ElementTree.Element, section: str, rules: Mapping[str, tuple[str, _Rule]], left_out: list[str]
) -> dict[str, str]:
    found = {}
    for name, (keyword, rule) in rules.items():
        words = _words(root, section, name)
        if value := rule(words):
            found[keyword] = value
        elif words:
            left_out.append(keyword)
    return found


# One rule per value representation: text of the header -> a valid value, or None.


def text_value(limit: int) -> _Rule:
    """Texts (LO, SH, ST): no control characters, no backslash, at most ``limit`` characters."""
    return lambda value: _CONTROL.sub(" ", value).strip()[:limit].strip() or None


def _identifier(limit: int) -> _Rule:
    """Numbers that something is found by: one that is too long is left out, since its beginning may be somebody else's."""

    def rule(value: str) -> str | None:
        plain = text_value(len(value))(value)
        return plain if plain is not None and len(plain) <= limit else None

    return rule


def _person(value: str) -> str | None:
    """PN: three groups of 64 characters, five components each. The first, alphabetic one may be empty and keeps its place."""
    groups = [_CONTROL.sub(" ", g).strip() for g in value.split("=")[:3]]
    return "=".join("^".join(g.split("^")[:5])[:64].strip() for g in groups).rstrip("=") or None


def _date(value: str) -> str | None:
    match = re.fullmatch(r"(\d{4})-?(\d\d)-?(\d\d)(Z|[+-]\d\d:\d\d)?", value, re.ASCII)
    try:
        return None if match is None else f"{date(int(match[1]), int(match[2]), int(match[3])):%Y%m%d}"
    except ValueError:
        return None


def _time(value: str) -> str | None:
    match = _TIME.fullmatch(value)
    if match is None or int(match[1]) > 23 or int(match[2]) > 59 or int(match[3]) > 59:
        return None
    return match[1] + match[2] + match[3] + (match[4] or "")


def _uid(value: str) -> str | None:
    return value if len(value) <= 64 and _UID.fullmatch(value) else None


def _decimal(value: str) -> str | None:
    try:
        number = float(value)
    except ValueError:
        return None
    return f"{number:.6g}" if 0 < number < 1e6 else None


def _sex(value: str) -> str | None:
    return value.upper() if value.upper() in ("M", "F", "O") else None


def _code(value: str) -> str | None:
    """CS: capitals, digits, blank and underscore, at most 16."""
    return value.upper() if re.fullmatch(r"[A-Z0-9 _]{1,16}", value.upper(), re.ASCII) else None


_PATIENT = {
    "patientName": ("PatientName", _person),
    "patientID": ("PatientID", _identifier(64)),
    "patientBirthdate": ("PatientBirthDate", _date),
    "patientGender": ("PatientSex", _sex),
    "patientWeight_kg": ("PatientWeight", _decimal),
    "patientHeight_m": ("PatientSize", _decimal),
}
_STUDY = {
    "studyDate": ("StudyDate", _date),
    "studyTime": ("StudyTime", _time),
    "studyID": ("StudyID", _identifier(16)),
    "accessionNumber": ("AccessionNumber", _identifier(16)),
    "referringPhysicianName": ("ReferringPhysicianName", _person),
    "studyDescription": ("StudyDescription", text_value(64)),
    "studyInstanceUID": ("StudyInstanceUID", _uid),
    "bodyPartExamined": ("BodyPartExamined", _code),
}
_SERIES = {
    "seriesDate": ("SeriesDate", _date),
    "seriesTime": ("SeriesTime", _time),
    "patientPosition": ("PatientPosition", _code),
    "protocolName": ("ProtocolName", text_value(64)),
    "seriesDescription": ("SeriesDescription", text_value(64)),
    "sequenceName": ("SequenceName", text_value(16)),
}
_EQUIPMENT = {
    "systemVendor": ("Manufacturer", text_value(64)),
    "systemModel": ("ManufacturerModelName", text_value(64)),
    "institutionName": ("InstitutionName", text_value(64)),
    "stationName": ("StationName", text_value(16)),
    "deviceSerialNumber": ("DeviceSerialNumber", text_value(64)),
}
