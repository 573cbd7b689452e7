"""A head of the simulation that LARO is trained on, acquired with a sampling mask as a 3D multi-echo scan, as the wire has it."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import recon_core
from gadgets.mask_check import DIGEST_PARAMETER, NAME_PARAMETER
from gadgets.simulate import Stream, stream_of
from recon_core.sampling.agreement import pattern_digest
from recon_core.sampling.mask_files import read_mask
from recon_core.simulation.multi_echo_brain import BrainScan, ScanRecipe, simulate
from recon_core.simulation.options import settings_for
from recon_core.simulation.scan import Scan, Truth, make_plan
from tests.e2e.scans import SimulatedScan
from tests.e2e.semi_measured import encode_oversampled

WEIGHTS = Path(recon_core.__file__).parent / "weights"
MATRIX, N_ECHOES, N_COILS = (32, 64, 24), 6, 8


@lru_cache(maxsize=2)
def head(seed: int) -> BrainScan:
    """32 x 64 positions, 24 samples along the readout, six echoes, eight coils."""
    return simulate(ScanRecipe(matrix=MATRIX, n_echoes=N_ECHOES, n_coils=N_COILS), seed)


@lru_cache(maxsize=4)
def learned_mask_scan(name: str, *, seed: int = 31, noise: float = 0.01) -> SimulatedScan:
    """The head sampled by the shipped mask ``name``; the header tells the mask, nothing marks calibration lines.

    Parameters
    ----------
    noise
        SD of the complex noise of a sample; the brain peaks near 1.
    """
    brain, mask = head(seed), read_mask(WEIGHTS / f"{name}.h5").mask
    z, y, x = MATRIX
    dz, dy, dx = brain.voxel
    values: dict[str, Any] = {
        "matrix_x": x, "matrix_y": y, "partitions": z, "fov_x": x * dx, "fov_y": y * dy, "slice_thickness": dz, "states": N_ECHOES,
        "coils": N_COILS, "mask": "random", "acceleration": mask.size / mask.sum(), "calibration": "none", "repetition_time": 0.06,
        "echo_time": brain.echo_times[0],
        "echo_spacing": brain.echo_times[1] - brain.echo_times[0],
    }  # fmt: skip
    settings = settings_for("mgre", values)
    images, maps = brain.images.numpy()[None], brain.coil_maps.numpy()[None]
    inside = brain.brain.numpy()[None]
    truth = Truth(
        images=images,
        coil_maps=maps,
        maps={name: getattr(brain, name).numpy()[None] for name in ("r2star", "chi", "field")},
        tissue=brain.head.numpy()[None],
        interior=inside,
        labels=brain.labels.numpy()[None, None],
        label_names={},
        mask=mask,
        acs_mask=np.zeros(mask.shape[1:], dtype=bool),
        noise_covariance=np.eye(N_COILS, dtype=np.complex128) * noise**2,
        states=brain.echo_times,
    )
    clean = encode_oversampled(images[:, :, None] * maps[:, None], (-3, -2, -1))
    plan = make_plan("mgre", settings, mask, truth.acs_mask, brain.echo_times, np.random.default_rng(seed))
    stream = stream_of(Scan("mgre", settings, clean, plan, truth, (0.0,), first_line=0, first_sample=0))
    return SimulatedScan(Path("(in memory)"), _told(stream, name, mask))


def _told(stream: Stream, name: str, mask: NDArray[np.bool_]) -> Stream:
    told = "".join(
        f"<userParameterString><name>{key}</name><value>{value}</value></userParameterString>"
        for key, value in ((NAME_PARAMETER, name), (DIGEST_PARAMETER, pattern_digest(mask)))
    )
    text = stream.header_text.replace("</ismrmrdHeader>", f"<userParameters>{told}</userParameters></ismrmrdHeader>")
    return replace(stream, header_text=text)
