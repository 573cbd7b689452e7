"""Fully sampled MRD raw data as scans to train LARO on: sorted, whitened and combined by the stages of the server.

The written scan holds the images that its own coil maps combine, their brain and the noise that was measured; training adds noise of that
size and leaves samples out. Truth that no measurement gives (R2*, fields, susceptibility, labels) is zero. Nothing of the header's
text is written.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from gadgets.buffer import assemble
from gadgets.buffer_settings import AcquisitionSettings
from gadgets.jobs import Jobs
from gadgets.preparation import Preparation
from gadgets.raw_source import open_source
from gadgets.readouts import ReadoutIndex
from gadgets.sample_checks import unmeasured
from gadgets.scratch import Scratch
from gadgets.sorting import sort_readouts
from gadgets.wire.events import HeaderText, Problem, Readouts
from gadgets.wire.framing import FrameParser
from gadgets.wire.header import MrdHeader, parse_header
from recon_core.coils.estimate import estimate_coil_maps
from recon_core.errors import DataError
from recon_core.fourier import ifft_centred
from recon_core.maps.brain_mask import brain_mask, object_mask
from recon_core.preprocess.noise import WHITENED_NOISE_STD
from recon_core.preprocess.settings import PreprocessSettings
from recon_core.problem import outer_noise
from recon_core.reconstruct import compress_coils, with_believable_noise
from recon_core.simulation.multi_echo_brain import BrainScan
from recon_core.simulation.scan_folder import write_scan
from recon_core.types import KSpace, Report, ScanInfo

Tell = Callable[[str], None]
ANY_CHAIN = "cg_sense"  # a session begins with a name; nothing of the chain is used
LEAST = 8
"""Positions of k2 and k1 that a training plane has at least."""


def convert(
    sources: Iterable[Path], folder: Path, *, coils: int = 8, group: str = "dataset", tell: Tell | None = None
) -> Iterator[Path]:
    """Convert raw files into ``folder`` under the first numbers that are free; the JSON of each.

    Numbers, not the files' names: those may say who was scanned.

    Raises
    ------
    ReconError
        A file that cannot be used (see `training_scan`); those before it are written.
    """
    for source in sources:
        scan = training_scan(source, coils=coils, group=group, tell=tell)
        number = next(n for n in itertools.count() if not (folder / f"measured_{n:04d}.json").exists())
        yield write_scan(folder, f"measured_{number:04d}", scan)


def training_scan(source: Path, *, coils: int = 8, group: str = "dataset", tell: Tell | None = None) -> BrainScan:
    """One raw file (MRD HDF5, or a capture of the spool) as a scan to train on.

    Parameters
    ----------
    coils
        Virtual coils; fewer measured ones stay as they are.
    group
        Of the raw data in an HDF5 file.
    tell
        Hears warnings.

    Raises
    ------
    DataError
        Not one slab of at least 8 x 8 positions, not fully sampled, states that are no echoes, no echo times, no directions.
    ReconError
        From reading, sorting or calibration.
    """
    kspace, scan = read_kspace(source, group=group, tell=tell)
    _require_training_scan(kspace, scan, source.name)
    kspace, notes = with_believable_noise(kspace, Report())
    if tell is not None:
        for note in notes:
            tell(note)
    # as the method meets them: in the order of their times
    order = sorted(range(kspace.n_states), key=scan.echo_times.__getitem__)
    if order != sorted(order):
        kspace = kspace.in_order(torch.tensor(order))
    kspace = compress_coils(kspace, PreprocessSettings(coil_compression="svd", virtual_coils=coils))
    maps = estimate_coil_maps(kspace)
    planes = ifft_centred(kspace.data, (-3, -2))
    images = (maps.conj() * planes).sum(1)
    voxel = tuple(fov / n for fov, n in zip(scan.fov, scan.matrix, strict=True))
    brain, head = brain_mask(images, voxel), object_mask(images)
    scale = float(torch.quantile(images[0].abs()[brain], 0.99))
    noise = kspace.noise_std or outer_noise(kspace)
    nothing = torch.zeros(images.shape[1:])
    assert scan.b0_direction is not None
    return BrainScan(
        images=(images / scale).to(torch.complex64),
        coil_maps=maps.to(torch.complex64),
        brain=brain,
        head=head,
        r2star=nothing,
        field=nothing.clone(),
        local_field=nothing.clone(),
        chi=nothing.clone(),
        labels=torch.zeros(images.shape[1:], dtype=torch.uint8),
        echo_times=tuple(scan.echo_times[n] for n in order),
        voxel=(voxel[0], voxel[1], voxel[2]),
        b0=scan.b0_direction,
        noise_std=noise / math.sqrt(float(kspace.counts.mean())) / scale,
        key=("measured", 0),
    )


def read_kspace(source: Path, *, group: str = "dataset", tell: Tell | None = None) -> tuple[KSpace, ScanInfo]:
    """Whitened hybrid k-space of the only slice or slab of a raw file, all coils, and what its header says.

    Raises
    ------
    DataError
        More than one slice.
    ReconError
        A file that cannot be read, or readouts that cannot be sorted.
    """
    acquisition = AcquisitionSettings()
    preprocess = PreprocessSettings(coil_compression="none")
    with contextlib.ExitStack() as stack:
        jobs, scratch = Jobs(0, threads=torch.get_num_threads(), rehearse=False), Scratch()
        stack.callback(scratch.close)
        stack.callback(jobs.close)
        log = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "session"
        header, index = _session(source, group, log)
        preparation = Preparation(
            index,
            header,
            acquisition,
            preprocess,
            lambda: str(log),
            jobs.scope(),
            scratch,
            None,
            tell or (lambda words: None),
        )
        stack.callback(preparation.close)
        ordered = sort_readouts(index.headers, header, acquisition)
        if ordered.n_slices != 1:
            raise DataError("not one slab", where=source.name, got=f"{ordered.n_slices} slices")
        rows = preparation.rows()
        without = unmeasured(ordered, preparation.samples().empty)
        if len(without):
            ordered = sort_readouts(index.headers, header, acquisition, without)
        kspace = assemble(ordered, 0, rows)
        noise = WHITENED_NOISE_STD if preparation.whitened else None
    if tell is not None:
        for note in ordered.notes:
            tell(note)
    return replace(kspace, noise_std=noise), ordered.scan_info(0)


def _session(source: Path, group: str, log: Path) -> tuple[MrdHeader, ReadoutIndex]:
    """The file as the wire has it, written to ``log``, with where its readouts lie."""
    index, header = ReadoutIndex(), None
    with log.open("wb") as file, FrameParser() as parser:
        for piece in open_source(source, config=ANY_CHAIN, dataset=group).pieces():
            file.write(piece.data)
            for event in parser.feed(bytes(piece.data)):
                if isinstance(event, Problem):
                    raise event.error
                if isinstance(event, HeaderText):
                    header = parse_header(event.text)
                if isinstance(event, Readouts):
                    index.append(event.headers, event.offsets, event.payload_bytes)
    if header is None or len(index) == 0:
        raise DataError("no raw data", where=source.name, got="no header" if header is None else "no readouts")
    return header, index


def _require_training_scan(kspace: KSpace, scan: ScanInfo, where: str) -> None:
    if min(scan.matrix[:2]) < LEAST:
        got = f"{scan.matrix[0]} x {scan.matrix[1]}"
        raise DataError("not a slab", where=where, got=f"{got} positions (k2 x k1)", expected=f"at least {LEAST} each")
    others = {name for state in scan.state_counters for name in state if len({s[name] for s in scan.state_counters}) > 1}
    if others - {"contrast"}:
        raise DataError(
            "images that are no echoes", where=where, got=", ".join(sorted(others - {"contrast"})), expected="contrast alone"
        )
    if len(scan.echo_times) != kspace.n_states:
        raise DataError("echo times and echoes differ", where=where, got=f"{len(scan.echo_times)} and {kspace.n_states}")
    if scan.b0_direction is None:
        raise DataError("no directions", where=where, expected="read_dir, phase_dir and slice_dir in the readouts")
    missing = int((kspace.counts == 0).sum())
    if missing:
        worst = int((kspace.counts == 0).sum((1, 2)).argmax())
        raise DataError(
            "not fully sampled",
            where=where,
            got=f"{missing} of {kspace.counts.numel()} positions missing, most in echo {worst}",
            remedy="Train on scans that sample every (k2, k1) position of every echo (no acceleration, no partial Fourier)",
        )
