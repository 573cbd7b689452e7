"""Simulated scans as wire messages, and how far images are from the truth."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from gadgets.image_attributes import is_preview
from gadgets.service import Service
from gadgets.simulate import Stream, simulate, simulate_stream
from gadgets.wire import codec
from gadgets.wire.dtypes import Flag
from gadgets.wire.events import Image
from tests.strict_client import Answer, StrictClient


@dataclass(frozen=True)
class SimulatedScan:
    """A raw file, the same scan as wire messages, and the truth ``(slice, state, z, y, x)``."""

    path: Path
    stream: Stream

    @property
    def header(self) -> str:
        return self.stream.header_text

    @property
    def messages(self) -> list[bytes]:
        """Readouts as the wire has them, in batches."""
        return [bytes(codec.acquisitions(headers, samples)) for headers, samples in self.stream.batches]

    @property
    def truth(self) -> NDArray[np.float64]:
        """What whitened coils show: the object times ``sqrt(S^H C^-1 S)``, since unit-norm maps belong to whitened coils."""
        truth = self.stream.truth
        maps = truth.coil_maps.astype(complex)
        whitened = np.einsum("dc,sczyx->sdzyx", np.linalg.inv(np.linalg.cholesky(truth.noise_covariance)), maps)
        shading = np.sqrt((np.abs(whitened) ** 2).sum(axis=1))
        return np.asarray(np.abs(truth.images) * shading[:, None])

    @property
    def tissue(self) -> NDArray[np.bool_]:
        return self.stream.truth.tissue


def simulated(kind: str, path: Path, **settings: Any) -> SimulatedScan:
    """Simulate once, as a file and in memory."""
    simulate(kind, path, settings)
    return SimulatedScan(path, simulate_stream(kind, settings))


def stack(images: list[Image], n_states: int) -> NDArray[np.float64]:
    """Images of one series as ``(slice, state, z, y, x)``, by their one-based index."""
    ordered = sorted(images, key=lambda image: int(image.header["image_index"]))
    data = np.stack([image.data[0] for image in ordered]).astype(float)
    return data.reshape(-1, n_states, *data.shape[1:])


def error(images: NDArray[np.floating], truth: NDArray[np.floating], where: NDArray[np.bool_]) -> float:
    """nRMSE of magnitudes inside ``where`` ``(slice, z, y, x)``, after the best common scale (coil combination is free of it)."""
    inside = np.broadcast_to(where[:, None], truth.shape)
    a, b = np.abs(images)[inside], np.abs(truth)[inside]
    return float(np.linalg.norm(a * (a @ b) / (a @ a) - b) / np.linalg.norm(b))


def file_images(path: Path, group: str) -> NDArray[np.float64]:
    """All images of a group of an MRD image file, in order."""
    with h5py.File(path) as file:
        return np.concatenate([file[group][name]["data"][:] for name in sorted(file[group])]).astype(float)


Batches = list[tuple[NDArray[np.void], NDArray[np.complex64]]]


def in_memory(kind: str, **settings: Any) -> SimulatedScan:
    """A simulated scan without a file (and, unless asked for, without waveforms)."""
    return SimulatedScan(Path("(in memory)"), simulate_stream(kind, {"waveforms": False, **settings}))


def encoded(batches: Batches) -> list[bytes]:
    """Batches of readouts as wire messages."""
    return [bytes(codec.acquisitions(headers, samples)) for headers, samples in batches]


def one_by_one(batches: Batches) -> list[bytes]:
    """The same bytes, each readout a piece of its own."""
    return [
        bytes(codec.acquisitions(headers[i : i + 1], samples[i : i + 1]))
        for headers, samples in batches
        for i in range(len(headers))
    ]


def is_noise(headers: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which readouts are noise measurements."""
    return np.asarray(headers["flags"] >> np.uint64(Flag.ACQ_IS_NOISE_MEASUREMENT - 1) & np.uint64(1), dtype=bool)


def noise_part(scan: SimulatedScan) -> Batches:
    """The noise readouts, which the simulation has as a batch of their own."""
    return [batch for batch in scan.stream.batches if is_noise(batch[0]).any()]


def imaging_part(scan: SimulatedScan) -> Batches:
    """Everything else."""
    return [batch for batch in scan.stream.batches if not is_noise(batch[0]).any()]


def ask(
    service: Service,
    chain: str,
    scan: SimulatedScan,
    *,
    messages: Iterable[bytes] | None = None,
    header: str | None = None,
    **overrides: object,
) -> Answer:
    """One scan through the server by the strict client; ``overrides`` go as FIRE parameters, as text."""
    parameters: dict[str, object] = {name: str(value) for name, value in overrides.items()}
    client = StrictClient(service.host, service.port, dialect="fire" if parameters else "gadgetron")
    return client.scan(
        chain,
        header=scan.header if header is None else header,
        messages=scan.messages if messages is None else messages,
        parameters=parameters or None,
    )


def complaints(answer: Answer) -> list[str]:
    """Errors and warnings that the operator gets."""
    return [text for text in answer.texts if text.startswith(("ERR", "WRN"))]


def final_images(answer: Answer) -> list[Image]:
    """The images of an answer that are no previews."""
    return [image for image in answer.images if not is_preview(image.attributes)]
