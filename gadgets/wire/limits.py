"""What one peer may ask for. Every length field is compared with its limit before anything is allocated."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Largest sizes in bytes, unless said otherwise."""

    config_script: int = 1 << 20
    header: int = 16 << 20
    text: int = 1 << 20
    query: int = 64 << 10
    readout: int = 64 << 20  # trajectory and samples of one readout
    waveform: int = 16 << 20
    image_meta: int = 1 << 20
    image: int = 1 << 30  # received by a client or a node
    input_image: int = 64 << 20  # received by a server (image chains)
    composite: int = 1 << 30  # 1023 and 1050, received by a node
    texts: int = 1000  # number of messages to a server other than readouts, waveforms and images
