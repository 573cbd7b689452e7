"""Pictures of a training as PNG files, without a graphics library."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from recon_core.training.checkpoint import writing


def write_png(path: str | Path, image: NDArray[np.floating]) -> None:
    """Write values in [0, 1] with 8 bits each; others are clipped, NaN is black.

    Parameters
    ----------
    image
        ``(y, x)`` grey or ``(y, x, 3)`` RGB, first row on top.

    Raises
    ------
    WriteError
        It cannot be written.
    """
    pixels = np.rint(np.clip(np.nan_to_num(np.asarray(image, np.float64)), 0, 1) * 255).astype(np.uint8)
    height, width = pixels.shape[:2]
    colour = 2 if pixels.ndim == 3 else 0
    # every row is preceded by its filter, 0 for none
    rows = np.concatenate((np.zeros((height, 1), np.uint8), pixels.reshape(height, -1)), axis=1)
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows.tobytes(), 6)),
        (b"IEND", b""),
    )
    content = b"\x89PNG\r\n\x1a\n"
    for name, data in parts:
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    with writing(Path(path)):
        Path(path).write_bytes(content)
