"""DICOM C-STORE to an archive (PACS): one attempt over one association, with or without TLS.

`gadgets.pacs_queue` repeats attempts. Addresses, AE titles, counts and status codes are all that is ever said about an
attempt: what is sent holds patient data, and pynetdicom, which prints data sets when it debugs, is kept quiet.

Source: DICOM PS3.4 annex B (storage service, table B.2-1 for status codes), PS3.15 annex B (TLS profiles).
"""

from __future__ import annotations

import contextlib
import logging
import shlex
import ssl
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydicom
from pydicom.pixels.utils import get_expected_length
from pydicom.uid import UID
from pynetdicom import AE
from pynetdicom.presentation import build_context
from pynetdicom.sop_class import Verification  # type: ignore[attr-defined]
from pynetdicom.status import code_to_category

from gadgets.tls import ClientTls, TlsError
from recon_core.errors import ReconError

log = logging.getLogger(__name__)
logging.getLogger("pynetdicom").setLevel(logging.CRITICAL)

CALLING_AET = "RECONGADGETS"
CONNECT_SECONDS = 20.0
ANSWER_SECONDS = 120.0
"""Longest wait for the answer to one object: an archive may compress or forward it first."""


class PacsError(ReconError):
    """An archive cannot be reached, does not accept what is sent, or the queue on disk cannot be used."""


@dataclass(frozen=True)
class Tls(ClientTls):
    """Files in PEM form, see `ClientTls`. The archive's certificate is always verified."""

    def context(self) -> ssl.SSLContext:
        """TLS 1.2 or newer, peer and name verified.

        Raises
        ------
        PacsError
            A file that is missing or is no certificate or key.
        """
        try:
            return super().context()
        except TlsError as error:
            raise PacsError(error.what, where=error.where, got=error.got, expected=error.expected) from None


@dataclass(frozen=True)
class Destination:
    """An archive: address, its AE title, ours, and TLS (``None``: unencrypted).

    Raises
    ------
    PacsError
        An AE title or an address that is none, or a port out of range.
    """

    host: str
    port: int
    aet: str
    calling_aet: str = CALLING_AET
    tls: Tls | None = None

    def __post_init__(self) -> None:
        for title in (self.aet, self.calling_aet):
            if not (1 <= len(title.strip()) <= 16 and title.isascii() and title.isprintable() and "\\" not in title):
                raise PacsError("not an AE title", where="destination", got=repr(title[:40]), expected="1 to 16 characters")
        if not self.host.strip():
            raise PacsError(
                "not an address", where="destination", got=repr(self.host), expected="the archive's name or address"
            )
        if not 1 <= self.port <= 65535:
            raise PacsError("not a port", where="destination", got=self.port, expected="1 to 65535")

    def __str__(self) -> str:
        return f"{self.aet}@{self.host}:{self.port}" + (" (TLS)" if self.tls is not None else "")

    def options(self) -> str:
        """As options of ``recon pacs send``."""
        chosen = ["--host", self.host, "--port", str(self.port), "--aet", self.aet]
        if self.calling_aet != CALLING_AET:
            chosen += ["--calling", self.calling_aet]
        if self.tls is not None:
            files = {
                "ca": self.tls.ca,
                "certificate": self.tls.certificate,
                "key": self.tls.key,
                "name": self.tls.server_name,
            }
            chosen += ["--tls", *(word for name, value in files.items() if value for word in (f"--tls-{name}", value))]
        return shlex.join(chosen)


def read_address(text: str) -> tuple[str, str, int]:
    """``AET@HOST:PORT`` (``[...]`` around an IPv6 address) as its parts.

    Raises
    ------
    PacsError
        Something else.
    """
    aet, at, place = text.rpartition("@")
    host, colon, port = place.rpartition(":")
    if not (aet and at and host and colon and port.isascii() and port.isdigit()):
        raise PacsError("not an archive's address", where="pacs", got=repr(text[:80]), expected="AET@HOST:PORT")
    return aet, host.removeprefix("[").removesuffix("]"), int(port)


@dataclass
class Attempt:
    """What became of the files of one attempt. ``problem`` says in words why some are left, "" when none is.

    ``silent``: there was no association, or it broke. Another one now would most likely cost as long a wait for as little.
    """

    stored: list[Path] = field(default_factory=list)
    left: list[Path] = field(default_factory=list)
    problem: str = ""
    silent: bool = False


def require_patient(files: Sequence[Path]) -> None:
    """What nobody can assign to a patient should not fill an archive. Files that are no DICOM objects are not judged here.

    Raises
    ------
    PacsError
        An object with neither PatientID nor PatientName.
    """
    nameless = [path for path in files if _is_nameless(path)]
    if nameless:
        raise PacsError(
            "objects without a patient",
            where=str(nameless[0]),
            got=f"{len(nameless)} of {len(files)} files with neither PatientID nor PatientName",
            remedy="Make them again with recon dicom IMAGES.h5 --header CAPTURE.mrd, or send them as they are: --without-patient",
        )


def _is_nameless(path: Path) -> bool:
    try:
        with _broken_files(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = pydicom.dcmread(path, specific_tags=["SOPInstanceUID", "PatientID", "PatientName"])
            if "SOPInstanceUID" not in found:  # a directory of objects, for one
                return False
            return not any(str(found.get(keyword) or "").strip(" ^=") for keyword in ("PatientID", "PatientName"))
    except PacsError:  # sending it says so
        return False


def echo(destination: Destination) -> None:
    """C-ECHO: does the archive answer?

    Raises
    ------
    PacsError
        No association, or no answer.
    """
    entity = _entity(destination)
    entity.add_requested_context(Verification)
    association = _associate(entity, destination)
    try:
        status = association.send_c_echo()
    finally:
        _end(association)
    code = int(status.Status) if "Status" in status else None
    if code != 0:
        raise PacsError("no answer to C-ECHO", where=str(destination), got=_status(code), expected="0x0000")


def store(files: Sequence[Path], destination: Destination, stored: Callable[[Path], None] | None = None) -> Attempt:
    """C-STORE: send files over one association. One that is refused does not keep the others back.

    Parameters
    ----------
    files
        DICOM files.
    stored
        Called after each that the archive has confirmed.
    """
    attempt = Attempt()
    kinds: dict[Path, tuple[str, str]] = {}
    for path in files:
        try:
            kinds[path] = _kind(path)
        except PacsError as error:
            attempt.left.append(path)
            attempt.problem = str(error)
    if not kinds:
        return attempt
    try:
        entity = _entity(destination)
        for sop_class in sorted({kind[0] for kind in kinds.values()}):
            syntaxes = sorted({kind[1] for kind in kinds.values() if kind[0] == sop_class})
            entity.requested_contexts = [*entity.requested_contexts, *(build_context(UID(sop_class), s) for s in syntaxes)]
        association = _associate(entity, destination)
    except PacsError as error:
        attempt.left, attempt.problem, attempt.silent = list(files), str(error), True
        return attempt
    try:
        _store_all(list(kinds), kinds, association, attempt, stored)
    finally:
        _end(association)
    if attempt.left:
        log.warning("event=pacs_incomplete stored=%d left=%d", len(attempt.stored), len(attempt.left))
    return attempt


def _store_all(
    files: Sequence[Path],
    kinds: dict[Path, tuple[str, str]],
    association: Any,
    attempt: Attempt,
    stored: Callable[[Path], None] | None,
) -> None:
    accepted = {(str(c.abstract_syntax), str(s)) for c in association.accepted_contexts for s in c.transfer_syntax}
    refused = 0
    for position, path in enumerate(files):
        if kinds[path] not in accepted:
            refused += 1
            attempt.left.append(path)
            attempt.problem = f"{refused} refused: the archive does not take objects of class {UID(kinds[path][0]).name}"
            continue
        if not association.is_established:
            attempt.left.extend(files[position:])
            attempt.problem, attempt.silent = "connection lost", True
            return
        try:
            code = _send(association, path)
        except PacsError as error:
            attempt.left.append(path)
            attempt.problem = str(error)
            continue
        if code is not None and code_to_category(code) in ("Success", "Warning"):
            attempt.stored.append(path)
            if stored is not None:
                stored(path)
            continue
        attempt.left.append(path)
        if code is None:  # pynetdicom has given the association up
            attempt.problem, attempt.silent = "no answer", True
            continue
        refused += 1
        attempt.problem = f"{refused} refused: {_status(code)}"


def _send(association: Any, path: Path) -> int | None:
    """The archive's status, ``None`` when it did not answer."""
    with _broken_files(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # pydicom repeats values in its warnings
        dataset = pydicom.dcmread(path)
        # pydicom reads a file that ends too early without a word, and would send half a picture
        native = "PixelData" in dataset and not UID(dataset.file_meta.TransferSyntaxUID).is_compressed
        if native and len(dataset.PixelData) < get_expected_length(dataset):
            raise EOFError
        answer = association.send_c_store(dataset)
    return int(answer.Status) if "Status" in answer else None


def _kind(path: Path) -> tuple[str, str]:
    """SOP class and transfer syntax."""
    with _broken_files(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        meta = pydicom.filereader.read_file_meta_info(path)
        return str(meta.MediaStorageSOPClassUID), str(meta.TransferSyntaxUID)


@contextlib.contextmanager
def _broken_files() -> Iterator[None]:
    """There is no list of what a broken file makes pydicom raise; and the texts repeat what is in the file."""
    try:
        yield
    except Exception as error:
        raise PacsError("cannot be sent: no DICOM file, or a broken one", got=type(error).__name__) from None


def _entity(destination: Destination) -> AE:
    entity = AE(destination.calling_aet)
    entity.connection_timeout = entity.acse_timeout = CONNECT_SECONDS
    entity.dimse_timeout = entity.network_timeout = ANSWER_SECONDS
    return entity


def _associate(entity: AE, destination: Destination) -> Any:
    tls = destination.tls
    secure = None if tls is None else (tls.context(), tls.server_name or destination.host)
    try:
        association = entity.associate(destination.host, destination.port, ae_title=destination.aet, tls_args=secure)
    except (OSError, RuntimeError, ValueError) as error:
        raise PacsError("no association", where=str(destination), got=type(error).__name__) from None
    if association.is_established:
        return association
    if association.is_rejected:
        answer = association.acceptor.primitive
        got = f"rejected: {answer.reason_str}" if answer is not None else "rejected"
        raise PacsError("no association", where=str(destination), got=got, remedy="Check both AE titles with the archive")
    remedy = "Check address, firewall and" + (" certificates" if secure else " whether it wants TLS")
    raise PacsError("no association", where=str(destination), got="no connection or aborted", remedy=remedy)


def _end(association: Any) -> None:
    if association.is_established:
        association.release()


def _status(code: int | None) -> str:
    return "nothing" if code is None else f"status 0x{code:04X}"
