"""The MRD header: a tolerant reader of the fields that a reconstruction needs. SI units inside.

Any ``<version>`` is accepted, unknown elements are ignored, a missing field stays ``None`` (never a made-up default).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from xml.etree.ElementTree import ParseError
from xml.parsers.expat import ErrorString

from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import DefusedXMLParser

from gadgets.errors import HeaderError

MAX_ELEMENTS = 100_000
MAX_DEPTH = 64
MIN_FOV, MAX_FOV = 1e-3, 1e6
"""mm; far outside what can be imaged, and well inside what float32 (image headers) and a matrix size can hold."""
MAX_TAG_CHARACTERS = 1 << 20
_SLICE = 64 << 10
_NAMED_LIMITS = ("average", "slice", "contrast", "phase", "repetition", "set", "segment")


@dataclass(frozen=True)
class Limit:
    """One encoding limit: inclusive ``minimum`` and ``maximum``, and the counter value of the k-space centre."""

    minimum: int
    maximum: int
    center: int


@dataclass(frozen=True)
class Encoding:
    """One ``<encoding>``. Matrices and fields of view are ``(z, y, x)``; fields of view in m.

    ``limits`` is keyed by the counter's field name in the acquisition header's ``idx`` (``kspace_encode_step_1``,
    ``kspace_encode_step_2``, ``average``, ``slice``, ``contrast``, ``phase``, ``repetition``, ``set``, ``segment``) plus
    ``kspace_encode_step_0``; only those that the header has.
    """

    trajectory: str
    encoded_matrix: tuple[int, int, int]
    encoded_fov: tuple[float, float, float]
    recon_matrix: tuple[int, int, int]
    recon_fov: tuple[float, float, float]
    limits: Mapping[str, Limit] = field(default_factory=dict)
    acceleration: tuple[int, int] | None = None  # (kspace_encode_step_1, kspace_encode_step_2)
    calibration_mode: str | None = None


@dataclass(frozen=True)
class MrdHeader:
    """What the header says. Times in s, angles in rad, frequencies in Hz, field strength in T.

    Nothing here identifies a patient; ``text`` is the whole document and must never be logged.
    """

    encodings: tuple[Encoding, ...]
    text: str = field(repr=False, default="")
    measurement_id: str | None = None
    noise_dependency: str | None = None  # measurement id of the dependency of type Noise
    protocol_name: str | None = None
    patient_position: str | None = None
    field_strength: float | None = None
    h1_frequency: float | None = None
    receiver_channels: int | None = None
    coil_labels: tuple[str, ...] = ()  # names of the coil elements, in the order of the document
    relative_noise_bandwidth: float | None = None
    repetition_times: tuple[float, ...] = ()
    echo_times: tuple[float, ...] = ()
    inversion_times: tuple[float, ...] = ()
    flip_angles: tuple[float, ...] = ()
    user_long: Mapping[str, int] = field(default_factory=dict)
    user_double: Mapping[str, float] = field(default_factory=dict)
    user_string: Mapping[str, str] = field(default_factory=dict)

    def labels_of(self, n_channels: int) -> tuple[str, ...]:
        """Names of the channels, where there is one for each of them and no two are the same; else none."""
        named = {label for label in self.coil_labels if label}
        return self.coil_labels if len(self.coil_labels) == len(named) == n_channels else ()


def parse_header(text: str) -> MrdHeader:
    """Read an MRD header.

    Element names are compared without namespace; unknown elements and any ``<version>`` are ignored. Milliseconds,
    millimetres and degrees become s, m and rad here.

    Parameters
    ----------
    text
        The document. A byte order mark, surrounding blanks and any declared encoding are accepted.

    Raises
    ------
    HeaderError
        Not XML; a DTD or entities; more than ``MAX_ELEMENTS`` elements or ``MAX_DEPTH`` levels; not an MRD header; no
        encoding, encoded or reconstructed matrix or field of view; a number that is none or is out of its field's range.
    """
    root = _tree(text)
    if root.name != "ismrmrdHeader":
        raise HeaderError("not an MRD header", where="header", got="another root element", expected="<ismrmrdHeader>")
    encodings = tuple(_encoding(node, f"encoding[{i}]") for i, node in enumerate(root.all("encoding")))
    if not encodings:
        raise HeaderError(
            "the header describes no k-space",
            where="header",
            got="no <encoding>",
            expected="at least one",
            remedy="Check how the scanner's data were converted to MRD",
        )
    measurement = root.child("measurementInformation")
    system = root.child("acquisitionSystemInformation")
    sequence = root.child("sequenceParameters")
    user = root.child("userParameters")
    return MrdHeader(
        encodings=encodings,
        text=text,
        measurement_id=measurement.words("measurementID"),
        noise_dependency=_noise_dependency(measurement),
        protocol_name=measurement.words("protocolName"),
        patient_position=measurement.words("patientPosition"),
        field_strength=system.number("systemFieldStrength_T"),
        h1_frequency=root.child("experimentalConditions").number("H1resonanceFrequency_Hz"),
        receiver_channels=system.whole("receiverChannels"),
        coil_labels=tuple(label.words("coilName") or "" for label in system.all("coilLabel")),
        relative_noise_bandwidth=system.number("relativeReceiverNoiseBandwidth"),
        repetition_times=tuple(ms / 1e3 for ms in sequence.numbers("TR")),
        echo_times=tuple(ms / 1e3 for ms in sequence.numbers("TE")),
        inversion_times=tuple(ms / 1e3 for ms in sequence.numbers("TI")),
        flip_angles=tuple(math.radians(degrees) for degrees in sequence.numbers("flipAngle_deg")),
        user_long={name: node.needed_whole("value", -(1 << 63)) for name, node in _named(user, "userParameterLong")},
        user_double={name: node.needed_number("value") for name, node in _named(user, "userParameterDouble")},
        user_string={name: node.words("value") or "" for name, node in _named(user, "userParameterString")},
    )


class _Node:
    """An element without its namespace and attributes. A missing child is an empty node, so that paths can be followed."""

    __slots__ = ("children", "name", "pieces", "where")

    def __init__(self, name: str, where: str) -> None:
        self.name, self.where = name, where
        self.children: list[_Node] = []
        self.pieces: list[str] = []

    def all(self, name: str) -> list[_Node]:
        return [node for node in self.children if node.name == name]

    def has(self, name: str) -> bool:
        return any(node.name == name for node in self.children)

    def child(self, name: str) -> _Node:
        return next((node for node in self.children if node.name == name), None) or _Node(name, f"{self.where}/{name}")

    @property
    def text(self) -> str:
        return "".join(self.pieces).strip()

    def words(self, name: str) -> str | None:
        """The text of a child; ``None`` when it is missing or empty."""
        return self.child(name).text or None

    def numbers(self, name: str) -> list[float]:
        return [_number(node) for node in self.all(name)]

    def number(self, name: str) -> float | None:
        return _number(self.child(name)) if self.words(name) else None

    def whole(self, name: str) -> int | None:
        return _whole(self.child(name), 0) if self.words(name) else None

    def needed_number(self, name: str) -> float:
        return _number(self.child(name))

    def needed_whole(self, name: str, low: int = 0, high: int = (1 << 63) - 1) -> int:
        return _whole(self.child(name), low, high)


def _number(node: _Node) -> float:
    try:
        value = float(node.text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise HeaderError("not a number", where=node.where, got=repr(node.text[:40]), expected="a finite number")
    return value


def _whole(node: _Node, low: int, high: int = 0xFFFF) -> int:
    # some converters write whole numbers as "256.0"
    value = _number(node)
    if value != int(value) or not low <= value <= high:
        raise HeaderError(
            "not a valid whole number", where=node.where, got=repr(node.text[:40]), expected=f"{low} to {high}"
        )
    return int(node.text) if node.text.lstrip("+-").isdecimal() else int(value)


def _named(user: _Node, kind: str) -> list[tuple[str, _Node]]:
    return [(node.words("name") or "", node) for node in user.all(kind)]


def _noise_dependency(measurement: _Node) -> str | None:
    for node in measurement.all("measurementDependency"):
        if (node.words("dependencyType") or "").lower() == "noise":
            return node.words("measurementID")
    return None


def _encoding(node: _Node, where: str) -> Encoding:
    acceleration, calibration = None, None
    if node.has("parallelImaging"):
        parallel = node.child("parallelImaging")
        calibration = parallel.words("calibrationMode")
        if parallel.has("accelerationFactor"):
            factor = parallel.child("accelerationFactor")
            first, second = factor.whole("kspace_encoding_step_1"), factor.whole("kspace_encoding_step_2")
            if first is not None:
                acceleration = (first, 1 if second is None else second)  # a 2D header may leave the second out
    return Encoding(
        trajectory=node.words("trajectory") or "",
        encoded_matrix=_matrix(node, "encodedSpace", where),
        encoded_fov=_fov(node, "encodedSpace", where),
        recon_matrix=_matrix(node, "reconSpace", where),
        recon_fov=_fov(node, "reconSpace", where),
        limits=_limits(node.child("encodingLimits")),
        acceleration=acceleration,
        calibration_mode=calibration,
    )


def _space(node: _Node, space: str, what: str, where: str) -> _Node:
    found = node.child(space).child(what)
    if not all(found.words(axis) for axis in "xyz"):
        raise HeaderError(
            f"the header has no {what}",
            where=f"{where}/{space}",
            got="nothing" if not found.children else "an incomplete one",
            expected=f"<{what}> with x, y and z",
        )
    return found


def _matrix(node: _Node, space: str, where: str) -> tuple[int, int, int]:
    size = _space(node, space, "matrixSize", where)
    return size.needed_whole("z", 1, 0xFFFF), size.needed_whole("y", 1, 0xFFFF), size.needed_whole("x", 1, 0xFFFF)


def _fov(node: _Node, space: str, where: str) -> tuple[float, float, float]:
    size = _space(node, space, "fieldOfView_mm", where)
    z, y, x = (size.needed_number(axis) for axis in "zyx")
    if not all(extent == 0 or MIN_FOV <= extent <= MAX_FOV for extent in (x, y, z)):  # 0: not stated
        raise HeaderError(
            "not a field of view",
            where=size.where,
            got=(x, y, z),
            expected=f"mm along x, y and z, {MIN_FOV:g} to {MAX_FOV:g} each",
        )
    return z / 1e3, y / 1e3, x / 1e3


def _limits(node: _Node) -> dict[str, Limit]:
    names = {f"kspace_encoding_step_{i}": f"kspace_encode_step_{i}" for i in range(3)} | {
        name: name for name in _NAMED_LIMITS
    }
    return {
        field_name: Limit(*(node.child(name).needed_whole(part, 0, 0xFFFF) for part in ("minimum", "maximum", "center")))
        for name, field_name in names.items()
        if node.has(name)
    }


class _Target:
    """Collects nodes while expat reads, and stops it when a document grows out of any header's proportions."""

    def __init__(self) -> None:
        self.root = _Node("", "")
        self.open = [self.root]
        self.count = 0

    def start(self, tag: str, attributes: Mapping[str, str]) -> None:
        self.count += 1
        if self.count > MAX_ELEMENTS or len(self.open) > MAX_DEPTH:
            raise HeaderError(
                "the document is too large or too deep",
                where="header",
                got=f"{self.count} elements, {len(self.open)} levels",
                expected=f"at most {MAX_ELEMENTS} elements, {MAX_DEPTH} levels",
            )
        name = tag.rpartition("}")[2][:64]  # long enough for every name of MRD
        parent = self.open[-1]
        node = _Node(name, f"{parent.where}/{name}" if parent.where else name)
        parent.children.append(node)
        self.open.append(node)

    def data(self, piece: str) -> None:
        if not piece.isspace():
            self.open[-1].pieces.append(piece)

    def end(self, tag: str) -> None:
        self.open.pop()

    def close(self) -> _Node:
        return self.root.children[0]


def _tree(text: str) -> _Node:
    parser = DefusedXMLParser(target=_Target(), forbid_dtd=True)
    words = text.strip()
    try:
        for i in range(0, len(words), _SLICE):
            parser.feed(words[i : i + _SLICE])
            # expat keeps an unfinished tag whole, and its attributes would cost ten times their size
            if i - parser.parser.CurrentByteIndex > MAX_TAG_CHARACTERS:
                raise HeaderError("a tag is too long", where="header", expected=f"at most {MAX_TAG_CHARACTERS} characters")
        root: _Node = parser.close()
    except DefusedXmlException:
        raise HeaderError("a DTD or an entity definition", where="header", expected="plain MRD XML") from None
    except ParseError as error:
        line, column = error.position
        raise HeaderError(
            "not XML", where=f"header, line {line}, column {column}", got=ErrorString(error.code), expected="an MRD header"
        ) from None
    except (UnicodeEncodeError, ValueError, IndexError):
        raise HeaderError("not XML", where="header", expected="an MRD header") from None
    return root
