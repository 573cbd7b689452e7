"""Cases of the LARO benchmark: held-out simulated brains, masks of every kind, and the methods that reconstruct them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

import recon_core
from benchmarks import bart
from recon_core.coils.estimate import CoilSettings, estimate_coil_maps
from recon_core.errors import SettingError
from recon_core.fourier import fft_centred
from recon_core.methods import cg_sense, laro, llr
from recon_core.methods.laro.starts import low_rank_or_refined
from recon_core.methods.laro.weights import TrainedLaro, load_weights
from recon_core.operators.planes import Planes
from recon_core.problem import pose
from recon_core.sampling.learned import draw_mask, interpolate_probability, multilevel_density, samples_for
from recon_core.sampling.mask_files import read_mask
from recon_core.simulation.multi_echo_brain import BrainScan, MultiEchoBrains, ScanRecipe, sampled_kspace
from recon_core.training.laro_tasks import EVALUATION_SEED
from recon_core.types import KSpace, Report, ScanInfo

Tensor = torch.Tensor
Images = tuple[Tensor, float]
"""Complex ``(echo, z, y, x)`` and the CPU seconds that they took."""

WEIGHTS = Path(recon_core.__file__).parent / "weights"
ACS_SHARE = 0.19  # of the samples, as the paper's 20 x 20 of 2068
BART_WEIGHT, BART_ITERATIONS = 0.001, 40
"""The weight is a compromise between magnitude and maps, chosen on a validation head (docs/laro_figures.md)."""


@dataclass(frozen=True, eq=False)
class Case:
    """One undersampled scan; the same one is the same object."""

    scan: BrainScan
    kspace: KSpace
    info: ScanInfo
    acceleration: float
    spo: int


def held_out(recipe: ScanRecipe, count: int, split: str = "test", first: int = 0) -> list[BrainScan]:
    """Test or validation scans: heads of a seed that no training has."""
    supply = MultiEchoBrains(recipe, seed=EVALUATION_SEED, keep=1)
    return [supply.scan(split, i) for i in range(first, first + count)]


def pattern(
    shape: tuple[int, int], n_echoes: int, acceleration: float, spo: int, masks: Path = WEIGHTS, seed: int = 1
) -> NDArray[np.bool_]:
    """A mask ``(echo, k2, k1)``: SPO 0 from the hand-made density, 1 and 2 from learned probabilities, interpolated where need be.

    Raises
    ------
    MaskError
        No learned mask of that acceleration.
    """
    n_samples = samples_for(shape, acceleration)
    acs = acs_block(shape, n_samples)
    if spo == 0:
        drawn = draw_mask(multilevel_density(shape, n_samples, acs)[None], n_samples, seed, acs)
    else:
        learned = read_mask(masks / f"laro_mask_r{acceleration:g}_spo{spo}.h5")
        assert learned.probability is not None
        probability = learned.probability.astype(float)
        # more echoes than were trained: the last pattern goes on, with draws of its own
        chosen = probability[np.minimum(np.arange(n_echoes if spo == 2 else 1), len(probability) - 1)]
        if chosen.shape[1:] != shape:
            chosen = interpolate_probability(chosen, shape, n_samples)
        drawn = draw_mask(chosen, n_samples, seed, acs)
    return np.array(np.broadcast_to(drawn, (n_echoes, *shape)))


def acs_block(shape: tuple[int, int], n_samples: int) -> tuple[int, int]:
    """A square central block of a fifth of the samples, at least 8 and at most 20 wide (the trained 32 x 64 at R = 8 has 8 x 8)."""
    side = 2 * round(min(20.0, max(8.0, (ACS_SHARE * n_samples) ** 0.5)) / 2)
    return min(side, shape[0]), min(side, shape[1])


def acquire(scan: BrainScan, mask: NDArray[np.bool_], acceleration: float, spo: int, seed: int = 0) -> Case:
    """Sample a scan through its coils, with its noise, by a mask ``(echo, k2, k1)``."""
    sampled = torch.from_numpy(mask).float()
    images = scan.images.movedim(-1, 0)
    kspace = Planes(scan.coil_maps.movedim(-1, 0), sampled).forward(images).permute(1, 2, 3, 4, 0)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(kspace.shape, dtype=torch.complex64, generator=generator)
    shape = (mask.shape[1], mask.shape[2])
    data = sampled_kspace(kspace + scan.noise_std * noise, sampled, acs_block(shape, int(mask[0].sum())), scan)
    matrix = (int(images.shape[2]), int(images.shape[3]), int(images.shape[0]))
    fov = (matrix[0] * scan.voxel[0], matrix[1] * scan.voxel[1], matrix[2] * scan.voxel[2])
    info = ScanInfo(matrix, fov, matrix, fov, echo_times=scan.echo_times, field_strength=3.0)
    return Case(scan, data, info, acceleration, spo)


def with_estimated_maps(case: Case) -> Case:
    """The case as a chain meets it: coil maps from its own calibration block (ESPIRiT with the chain's settings)."""
    maps = estimate_coil_maps(replace(case.kspace, coil_maps=None), CoilSettings(), Report())
    return replace(case, kspace=replace(case.kspace, coil_maps=maps))


# --------------------------------------------------------------------------------------------------------------- methods


def available(
    weights: Sequence[Path], bart_weights: Sequence[float] = (), **settings: Any
) -> dict[str, Callable[[Case], Images]]:
    """Methods by name: the classical ones, with ``refined`` (LARO's first images by themselves); a network per weight file, named by the
    file; ``modl``: MoDL's networks together, each for the masks that it was trained with (`by_mask`); and ``bart_llr_W`` for every
    further weight W of BART's regularization. ``settings`` are the networks' (`laro.Settings`)."""
    found: dict[str, Callable[[Case], Images]] = {
        "cg_sense": lambda case: _timed(cg_sense, cg_sense.Settings(), case),
        "llr": lambda case: _timed(llr, llr.Settings(), case),
        "refined": _refined,
    }
    if bart.available():
        found["bart_llr"] = _bart_llr
        found |= {f"bart_llr_{w:g}": partial(_bart_llr, weight=w) for w in bart_weights}
    modl: dict[str, TrainedLaro] = {}
    for path in weights:
        trained = load_weights(path)
        if trained.network.settings.kind == "modl":
            modl |= dict.fromkeys(trained.facts["recipe"]["patterns"], trained)
            continue
        found[path.stem] = partial(network, trained=trained, **settings)
        trained_with = int(trained.facts.get("recipe", {}).get("second_unrolls", 0))
        if trained_with > trained.network.settings.unrolls:
            found[f"{path.stem} {trained_with} iterations"] = partial(
                network, trained=trained, **{**settings, "unrolls": trained_with}
            )
    if modl:
        found["modl"] = partial(by_mask, networks=modl, **settings)
    return found


def by_mask(case: Case, networks: Mapping[str, TrainedLaro], **settings: Any) -> Images:
    """Images by the network that was trained with the case's kind of mask, ``"R/SPO"``.

    Raises
    ------
    SettingError
        There is none.
    """
    kind = f"{case.acceleration:g}/{case.spo}"
    if kind not in networks:
        raise SettingError(
            "no network was trained with such masks", where="MoDL", got=kind, expected=" ".join(sorted(networks))
        )
    return network(case, networks[kind], **settings)


def network(case: Case, trained: TrainedLaro, **settings: Any) -> Images:
    """Images by a network; refined first images are made once for all networks, and counted for each."""
    chosen = replace(laro.Settings(), **settings)
    first, spent = _refined(case) if trained.start == "refined" else (None, 0.0)
    begun = time.process_time()
    images = laro.reconstruct_with(trained, case.kspace, case.info, chosen, Report(), first).images[0].data
    return images, spent + time.process_time() - begun


def _timed(method: Any, settings: Any, case: Case) -> Images:
    begun = time.process_time()
    images = method.reconstruct(case.kspace, case.info, settings, Report()).images[0].data
    return images, time.process_time() - begun


@lru_cache(maxsize=4)
def _refined(case: Case) -> Images:
    begun = time.process_time()
    problem = pose(case.kspace, "refined", Report())
    images = problem.leave(low_rank_or_refined("refined", problem, Report()))
    return images, time.process_time() - begun


def _maps(case: Case) -> Tensor:
    maps = case.kspace.coil_maps
    assert maps is not None
    return maps


def _bart_llr(case: Case, weight: float = BART_WEIGHT) -> Images:
    full = bart.to_bart(fft_centred(case.kspace.data, -1).numpy())
    maps = bart.maps_to_bart(_maps(case).numpy())
    words = ["pics", "-S", "-R", f"L:7:7:{weight:g}", "-b", "4", "-i", str(BART_ITERATIONS)]
    timed = bart.run(words, full, maps)
    return torch.from_numpy(np.array(bart.images_from_bart(timed.data))), timed.cpu_s
