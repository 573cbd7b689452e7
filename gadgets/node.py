"""Our chains inside a real Gadgetron 4.7, as an ``<external>`` node.

Gadgetron sends the node's own configuration, the MRD header and then what the gadgets before the node let through: readouts
(1008), buckets of readouts (1050) or sorted buffers (1023). All three end in the same pipeline. The way in is the same, too,
whether Gadgetron connects to the warm server (``<connect>``) or starts a process (``<execute>``, see ``gadgets.relay``).

What differs from a scanner's connection, and why (all measured with Gadgetron 4.7.2):

* TEXT is an illegal message for Gadgetron: words go to the log, and a failure is ERROR (8). It reads on until the node's CLOSE.
* The noise readouts do not arrive behind its own front end (AcquisitionAccumulateTrigger drops them), and what does arrive may be
  white already: buckets and buffers are never whitened by a stored measurement.
* RemoveROOversampling shortens the readouts but leaves the header as it was (`front_end_header`).
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, tostring

import numpy as np
from defusedxml.ElementTree import fromstring
from numpy.typing import NDArray

from gadgets.cores import cores
from gadgets.errors import ConfigRefused, IllegalOrder, MalformedMessage, SpoolError
from gadgets.handlers import ChainRequest, Scan, ScanFacts
from gadgets.relay import CHAIN_PROPERTY
from gadgets.spool import ScanLog, Spool, default_spool_root
from gadgets.wire import codec, events
from gadgets.wire.composite import Bucket, BucketPart, ReconBuffer, ReconData
from gadgets.wire.dtypes import ACQUISITION_HEADER, DATA_TYPES, Flag, concatenate_headers, flag_bits
from gadgets.wire.header import Encoding, MrdHeader

if TYPE_CHECKING:
    from gadgets.service import Service

logger = logging.getLogger(__name__)

ACCEPTED_DATA_TYPES = frozenset(code for code, dtype in DATA_TYPES.items() if dtype.str in ("<u2", "<f4", "<c8"))
"""Pixels that Gadgetron's ImageReader takes from a node; int16 ends its session with "map::at"."""

MAX_SAMPLES = 2**16 - 1  # of a line: the header's field has 16 bits

OpenScan = Callable[[str, ScanLog], Scan]
Rows = list[tuple[NDArray[np.void], NDArray[np.complex64]]]


def node_request(text: str) -> ChainRequest:
    """What a node's configuration asks for: the property ``chain``, the others are settings of that chain.

    Raises
    ------
    ConfigRefused
        No configuration of a node, or it names no chain.
    """
    from gadgets.chain import META_PROPERTIES, node_properties  # imports the methods

    properties = node_properties(text)
    chain = properties.pop(CHAIN_PROPERTY, "").strip()
    if not chain:
        raise ConfigRefused(
            "names no chain",
            where="node configuration",
            expected=f'<property name="{CHAIN_PROPERTY}" value="(a chain)"/>',
            remedy='Put it into the <configuration> beside <connect>, or use <execute name="gadgets" target="(a chain)"/>',
        )
    # a chain file's own properties come along with <execute>: they are the defaults already
    return ChainRequest(name=chain, overrides={k: v for k, v in properties.items() if k not in META_PROPERTIES})


def require_accepted(message: bytes | bytearray | memoryview) -> None:
    """Refuse to send Gadgetron an image that would end its session.

    Raises
    ------
    MalformedMessage
        Pixels other than uint16, float32 or complex64.
    """
    code = int.from_bytes(memoryview(message)[4:6], "little")  # id, version, data type
    if code not in ACCEPTED_DATA_TYPES:
        got = DATA_TYPES.get(code, code)
        raise MalformedMessage(
            "Gadgetron takes no images of this type", where="node", got=got, expected="uint16, float32 or complex64"
        )


class NodeScan:
    """One scan from Gadgetron: readouts as they are, buckets and buffers written out as readouts.

    Parameters
    ----------
    open_scan
        Opens the pipeline's scan for a header text and the log that holds its readouts.
    header
        Of the connection.
    log
        The connection's verbatim log.
    """

    def __init__(self, open_scan: OpenScan, header: MrdHeader, log: ScanLog) -> None:
        self._open, self._header, self._log = open_scan, header, log
        self._scan: Scan | None = None
        self._held: list[events.Readouts | events.Waveform] = []  # until the first readout shows what the front end did
        self._written: ScanLog | None = None
        self._kind: str | None = None

    def readouts(self, event: events.Readouts) -> None:
        """Message 1008."""
        self._expect("readouts")
        imaging = _imaging(event.headers)
        if self._scan is None and not imaging.any():
            self._held.append(event)
            return
        self._begin(event.headers[imaging], self._log).readouts(event)

    def waveform(self, event: events.Waveform) -> None:
        """Message 1026, or one that came with a bucket."""
        if self._scan is None:
            self._held.append(event)
        else:
            self._scan.waveform(event)

    def composite(self, event: events.Composite) -> int:
        """Message 1050 or 1023: its readouts go into a log of their own, in the order in which they were acquired.

        Returns
        -------
        How many they are.

        Raises
        ------
        SpoolError
            No room for them.
        SortError, IllegalOrder
            They cannot belong to one scan.
        """
        self._expect("composite")
        if self._written is None:
            self._written = Spool(None).open()
            self._written.replayed, self._written.cut = self._log.replayed, self._log.cut
        n_readouts = 0
        for headers, samples in unpack(event.content):
            n_readouts += len(headers)
            scan = self._begin(headers[_imaging(headers)], self._written)
            encoded = memoryview(codec.acquisitions(headers, samples))
            start, size = self._written.append(encoded), len(encoded) // len(headers)
            offsets = start + size * np.arange(len(headers), dtype=np.int64)
            payload = np.full(len(headers), size - 2 - ACQUISITION_HEADER.itemsize, np.int64)
            scan.readouts(events.Readouts(start, concatenate_headers([headers]), offsets, payload))
        for header, data in event.content.waveforms if isinstance(event.content, Bucket) else ():
            self.waveform(events.Waveform(event.offset, header, data))
        return n_readouts

    @property
    def facts(self) -> ScanFacts:
        """See ``gadgets.handlers.Scan``."""
        return ScanFacts() if self._scan is None else self._scan.facts

    def finish(self) -> Iterator[bytes]:
        """Images, after Gadgetron's CLOSE."""
        try:
            yield from self._begin(np.zeros(0, ACQUISITION_HEADER), self._log).finish()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Give up."""
        if self._scan is not None:
            self._scan.abandon()
        if self._written is not None:
            self._written.finish("complete")

    def _expect(self, kind: str) -> None:
        if self._kind not in (None, kind):
            raise IllegalOrder(
                "single readouts and buckets (or buffers) in one scan", where="node", expected="one kind of them"
            )
        self._kind = kind

    def _begin(self, imaging: NDArray[np.void], log: ScanLog) -> Scan:
        """The pipeline's scan, opened with the first imaging readouts."""
        if self._scan is None:
            composite = self._kind == "composite"
            text = front_end_header(self._header, shortened_encodings(imaging, self._header), whitened=composite)
            self._scan = self._open(text, log)
            held, self._held = self._held, []
            for event in held:
                if isinstance(event, events.Readouts):
                    self._scan.readouts(event)
                else:
                    self._scan.waveform(event)
        return self._scan


def _imaging(headers: NDArray[np.void]) -> NDArray[np.bool_]:
    return np.asarray((headers["flags"] & flag_bits(Flag.ACQ_IS_NOISE_MEASUREMENT)) == 0)


# -- buckets and buffers -------------------------------------------------------------------------------------------------------


def unpack(content: object) -> Rows:
    """The readouts of a bucket or of buffers, once each, as runs of one shape in the order of acquisition.

    Gadgetron puts lines for calibration *and* imaging into both parts of a bucket (and so into both buffers of a bit); the
    reference part is left out for them.

    Parameters
    ----------
    content
        ``Bucket`` or ``ReconData``.

    Returns
    -------
    Headers ``(n,)`` and samples complex64 ``(n, coil, sample)``, as many pairs as shapes change.

    Raises
    ------
    MalformedMessage
        No such message.
    """
    if isinstance(content, Bucket):
        parts = [_readouts(content.data, False), _readouts(content.reference, True)]
    elif isinstance(content, ReconData):
        parts = []
        for data, reference in content.bits:
            parts.append(_lines(data, False))
            if reference is not None:
                parts.append(_lines(reference, True))
    else:
        raise MalformedMessage("not a bucket or buffer", where="node", got=type(content).__name__)
    headers = concatenate_headers([part[0] for part in parts]) if parts else np.zeros(0, ACQUISITION_HEADER)
    samples = [row for part in parts for row in part[1]]
    order = np.lexsort((headers["acquisition_time_stamp"], headers["scan_counter"]))
    runs: Rows = []
    start = 0
    for stop in range(1, len(order) + 1):
        if stop == len(order) or samples[order[stop]].shape != samples[order[start]].shape:
            chosen = order[start:stop]
            runs.append((headers[chosen], np.stack([samples[i] for i in chosen])))
            start = stop
    return runs


def _only_reference(headers: NDArray[np.void]) -> NDArray[np.bool_]:
    # AcquisitionAccumulateTrigger: data is everything that is not for calibration alone
    return np.asarray((headers["flags"] & flag_bits(Flag.ACQ_IS_PARALLEL_CALIBRATION, Flag.ACQ_IS_PHASECORR_DATA)) != 0)


def _readouts(part: BucketPart, reference: bool) -> tuple[NDArray[np.void], list[NDArray[np.complex64]]]:
    wanted = _only_reference(part.headers) if reference else np.ones(len(part.headers), bool)
    headers = part.headers[wanted]  # a copy
    headers["channel_mask"] = 0  # coil compression and selection do not keep it
    headers["trajectory_dimensions"] = 0
    return headers, [row for row, keep in zip(part.samples, wanted, strict=True) if keep]


def _lines(buffer: ReconBuffer, reference: bool) -> tuple[NDArray[np.void], list[NDArray[np.complex64]]]:
    """The lines of a buffer that were acquired. BucketToBuffer has put their samples in place: nothing is discarded any more."""
    wanted = buffer.headers["number_of_samples"] > 0
    if reference:
        wanted &= _only_reference(buffer.headers)
    headers = buffer.headers[wanted]  # (line,), a copy
    n_samples = buffer.data.shape[-1]
    if n_samples > MAX_SAMPLES:
        raise MalformedMessage("the lines of a buffer are too long", where="ReconData", got=n_samples, expected=MAX_SAMPLES)
    headers["number_of_samples"], headers["center_sample"] = n_samples, n_samples // 2
    headers["discard_pre"] = headers["discard_post"] = headers["channel_mask"] = 0
    headers["trajectory_dimensions"] = 0
    if buffer.headers.shape != (*buffer.data.shape[:3], *buffer.data.shape[4:6]):
        raise MalformedMessage(
            "headers and data of a buffer contradict each other",
            where="ReconData",
            got=buffer.headers.shape,
            expected=(*buffer.data.shape[:3], *buffer.data.shape[4:6]),
        )
    return headers, list(np.moveaxis(buffer.data, 3, -2)[wanted])


# -- the header behind a front end --------------------------------------------------------------------------------------------


def shortened_encodings(headers: NDArray[np.void], header: MrdHeader) -> dict[int, int]:
    """Encodings whose readout oversampling has been removed already, judged by the first readouts of the scan.

    RemoveROOversampling cuts every readout to the reconstructed field of view. A readout that short cannot be a partial echo of
    the encoded matrix: it would not reach beyond the centre.

    Parameters
    ----------
    headers
        Of imaging readouts, ``(n,)``.
    header
        As received.

    Returns
    -------
    Number of the encoding -> samples of a whole readout.
    """
    found = {}
    for number, encoding in enumerate(header.encodings):
        own = headers[headers["encoding_space_ref"] == number]
        n_encoded, n_cropped = encoding.encoded_matrix[2], _cropped(encoding)
        longest = int(own["number_of_samples"].max()) if len(own) else n_encoded
        if (2 * n_cropped <= n_encoded and longest <= n_cropped) or longest == n_cropped < n_encoded:
            found[number] = n_cropped
    return found


def _cropped(encoding: Encoding) -> int:
    if not (encoding.encoded_fov[2] > 0 and encoding.recon_fov[2] > 0):
        return encoding.encoded_matrix[2]
    # Gadgetron rounds down; a field of view in float32 must not cost a sample
    return int(encoding.encoded_matrix[2] * encoding.recon_fov[2] / encoding.encoded_fov[2] + 1e-3)


def front_end_header(header: MrdHeader, shortened: Mapping[int, int], *, whitened: bool) -> str:
    """The header text that is true for what Gadgetron's front end lets through.

    Parameters
    ----------
    header
        As received.
    shortened
        See `shortened_encodings`.
    whitened
        Leave out the noise dependency: whitening is the front end's business.
    """
    if not shortened and not (whitened and header.noise_dependency):
        return header.text
    root = fromstring(header.text.strip().lstrip("\ufeff"), forbid_dtd=True)
    encodings = _all(root, "encoding")
    for number, n_samples in shortened.items():
        encoded, reconstructed = (_all(encodings[number], name)[0] for name in ("encodedSpace", "reconSpace"))
        _along_x(encoded, "matrixSize").text = str(n_samples)
        _along_x(encoded, "fieldOfView_mm").text = _along_x(reconstructed, "fieldOfView_mm").text
    if whitened:
        for measurement in _all(root, "measurementInformation"):
            for dependency in _all(measurement, "measurementDependency"):
                if any((kind.text or "").strip().lower() == "noise" for kind in _all(dependency, "dependencyType")):
                    measurement.remove(dependency)
    return tostring(root, encoding="unicode")


def _along_x(space: Element, name: str) -> Element:
    return _all(_all(space, name)[0], "x")[0]


def _all(node: Element, name: str) -> list[Element]:
    return [child for child in node if str(child.tag).rpartition("}")[2] == name]


# -- in this process -----------------------------------------------------------------------------------------------------------


def serve(end: socket.socket) -> None:
    """Reconstruct one scan from ``end`` in this process: what ``<execute>`` falls back to when no server runs.

    Parameters
    ----------
    end
        A connected stream socket, on which the other side speaks as Gadgetron does. It is closed.
    """
    import torch

    from gadgets.connection import Connection
    from gadgets.peer import Peer

    service = _service()
    torch.set_num_threads(service.jobs.threads)
    try:
        peer = Peer(end, service.options.timing)
        handlers, limits = service.server.handlers, service.options.limits
        Connection("node", peer, "gadgetron", handlers, limits, service.spool).run()
    finally:
        service.close()


def _service() -> Service:
    """Not listening: its spool, noise store and jobs are what is needed."""
    from gadgets.service import Service, ServiceOptions

    # as many threads as a worker of the server has by default: sums depend on their number in the last bits
    threads = cores() // max(1, cores() // 2)
    root = default_spool_root()
    options = ServiceOptions(
        port=0,
        workers=0,
        threads=threads,
        spool=root,
        noise=root.parent / "noise",
        masks=root.parent / "masks",
        previews=False,
    )
    try:
        return Service(options)
    except (SpoolError, OSError) as error:  # Gadgetron's user may have no home
        logger.warning("event=no_capture error=%r", str(error))
        return Service(replace(options, spool=None, noise=None))
