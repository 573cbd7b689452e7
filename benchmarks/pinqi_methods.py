"""The methods that PINQI is compared with on synthetic saturation recovery: each makes a T1 map of one sample.

Everything that needs a fit gets the *same* one: unregularised Levenberg-Marquardt per pixel with the bounds of `T1_RANGE`, so that
only the images differ. All get the true coil maps and the noise level.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import bart, series
from recon_core.fourier import ifft_centred
from recon_core.methods import get_method
from recon_core.methods.pinqi.figures import t1_figures, t1_from_rate
from recon_core.methods.pinqi.model import ABLATIONS, Pinqi
from recon_core.methods.pinqi.reconstruction import apply_network, network_order
from recon_core.methods.pinqi.weights import TrainedPinqi
from recon_core.sampling.masks import centre_block
from recon_core.signal_models import SaturationRecovery
from recon_core.simulation.quantitative_brain import BrainBatch, SampleRecipe
from recon_core.solvers.least_squares import levenberg_marquardt
from recon_core.types import KSpace, Report, ScanInfo

T1Map = NDArray[np.floating]
Images = NDArray[np.complexfloating]

T1_RANGE = (0.05, 6.0)
"""s; every method's map is held within it. The largest true value is about 5 s."""

START = (0.9, 0.0, 0.8)
"""(Re M0, Im M0, R1) where fits begin."""

TISSUE = "tissue_"
"""Before the names of figures inside all tissue, scalp included; without it inside the brain."""

IMAGE = "image_"
"""Before the names of figures over the whole image, both maps zero outside all tissue: how the published method's code averages."""

BART_WEIGHTS = (0.00025, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.016, 0.032)
MOBA_WEIGHTS = (0.01, 0.001, 0.0001)
MOBA_NOTHING = 1e-6
"""Size of the zeros at t = 0, as a part of the largest sample: exact zeros would count as not sampled."""


@dataclass(frozen=True)
class Sample:
    """One held-out slice: truth ``(y, x)`` and what was measured of it."""

    t1: T1Map
    brain: NDArray[np.bool_]
    tissue: NDArray[np.bool_]
    kspace: KSpace
    scan: ScanInfo
    times: tuple[float, ...]

    @classmethod
    def of(cls, batch: BrainBatch, recipe: SampleRecipe) -> Sample:
        """The first sample of a batch."""
        n = recipe.size
        data = batch.kspace[0][:, :, None]
        centre = torch.from_numpy(centre_block((n,), (recipe.acs,))).to(data.device)
        kspace = KSpace(
            data,
            batch.mask[0][:, None].float(),
            acs=data.mean(0) * centre[None, None, :, None],
            acs_mask=centre[None],
            coil_maps=batch.coil_maps[0][:, None],
            noise_std=float(batch.noise_std[0]),
        )
        place = ((1, n, n), (0.008, 0.22, 0.22))
        scan = ScanInfo(*place, *place, saturation_times=recipe.times)
        truth, brain, tissue = (values[0].cpu().numpy() for values in (batch.t1, batch.brain, batch.tissue))
        return cls(truth, brain, tissue, kspace, scan, recipe.times)

    def score(self, t1: T1Map) -> dict[str, float]:
        """nRMSE, MAE (s) and SSIM inside the brain, and, as ``tissue_...`` and ``image_...``, by `TISSUE` and `IMAGE`."""
        found, truth = np.where(self.tissue, t1, 0.0), np.where(self.tissue, self.t1, 0.0)
        named = {
            TISSUE: t1_figures(t1, self.t1, self.tissue),
            IMAGE: t1_figures(found, truth, np.ones_like(self.tissue)),
        }
        others = {f"{which}{key}": value for which, figures in named.items() for key, value in figures.items()}
        return t1_figures(t1, self.t1, self.brain) | others


@dataclass(frozen=True)
class Answer:
    """A T1 map (s), what it took (CPU and wall seconds, the fit included), and the weight that was best, where one was chosen."""

    t1: T1Map
    cpu_s: float
    wall_s: float
    weight: float | None = None


def fitted(images: torch.Tensor, times: tuple[float, ...]) -> T1Map:
    """T1 of complex images ``(state, y, x)`` without regularisation."""
    data = images.to(torch.complex64)
    peak = float(data.abs().max()) or 1.0
    start = torch.tensor(START, device=data.device).reshape(3, 1, 1).expand(3, *data.shape[1:]).contiguous()
    open_end = torch.full((2,), torch.inf)
    shortest, longest = T1_RANGE
    lower = torch.cat((-open_end, torch.tensor([1 / longest]))).reshape(3, 1, 1).to(data.device)
    upper = torch.cat((open_end, torch.tensor([1 / shortest]))).reshape(3, 1, 1).to(data.device)
    fit = levenberg_marquardt(
        SaturationRecovery(times), data / peak, start, lower=lower, upper=upper, max_iterations=100, statistics=False
    )
    return held(1 / fit.parameters[2].cpu().numpy())


def held(t1: T1Map) -> T1Map:
    """Within `T1_RANGE`."""
    return np.clip(t1, *T1_RANGE)


def timed(make: Callable[[], T1Map]) -> Answer:
    """A map and its cost; a GPU is waited for."""
    used, wall = os.times(), time.perf_counter()
    t1 = make()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    now = os.times()
    return Answer(t1, now.user + now.system - used.user - used.system, time.perf_counter() - wall)


def zero_filled(sample: Sample) -> Answer:
    """``A^H k``, lines that were not sampled left at zero."""

    def make() -> T1Map:
        k = sample.kspace
        assert k.coil_maps is not None
        return fitted((ifft_centred(k.data, -2) * k.coil_maps.conj()).sum(1)[:, 0], sample.times)

    return timed(make)


def classical(name: str, **settings: Any) -> Callable[[Sample], Answer]:
    """One of our methods with its default settings but for those that are given, then the fit."""
    method = get_method(name)

    def run(sample: Sample) -> Answer:
        def make() -> T1Map:
            result = method.reconstruct(sample.kspace, sample.scan, method.Settings(**settings), Report())
            return fitted(result.images[0].data[:, 0], sample.times)

        return timed(make)

    return run


def learned(trained: TrainedPinqi) -> Callable[[Sample], Answer]:
    """A trained network through the method's own scaling; its parameters as they are, nothing emptied."""

    def run(sample: Sample) -> Answer:
        def make() -> T1Map:
            order = network_order(trained, sample.times)
            applied = apply_network(trained, sample.kspace, order, "benchmark", Report())
            rate = applied.operator.leave_image(applied.found.parameters)[0, 2]
            return held(t1_from_rate(rate.cpu().numpy()))

        return timed(make)

    return run


SWITCHED_OFF = ("a", "b", "c", "d", "f", "h")
"""Variants of section III-D that need nothing that the proposed network has not learned. Without training of its own i is h."""


def switched_off(trained: TrainedPinqi, ablation: str) -> TrainedPinqi:
    """Trained weights in one of the variants `SWITCHED_OFF`: a part of them is not used, and nothing is trained to do without it."""
    usual, variant = asdict(ABLATIONS["proposed"]), asdict(ABLATIONS[ablation])
    change = {key: value for key, value in variant.items() if value != usual[key]}
    network = Pinqi(trained.network.model, replace(trained.network.settings, **change))
    kept = trained.network.state_dict()
    network.load_state_dict({key: kept[key] for key in network.state_dict()})
    device = next(trained.network.parameters()).device
    return replace(trained, network=network.to(device).eval().requires_grad_(False))


def bart_low_rank(iterations: int, threads: int) -> Callable[[Sample], Answer]:
    """BART's locally low rank reconstruction, then the fit; the weight with the best T1, *chosen by the truth*."""

    def run(sample: Sample) -> Answer:
        full, maps = _full(sample), bart.maps_to_bart(_maps(sample))

        def once(weight: float) -> Answer:
            words = ["pics", "-S", "-R", f"L:3:3:{weight}", "-b", "8", "-i", str(iterations)]
            done = bart.run(words, full, maps, threads=threads)
            images = torch.from_numpy(np.ascontiguousarray(bart.images_from_bart(done.data)[:, 0]))
            fit = timed(lambda: fitted(images, sample.times))
            return Answer(fit.t1, done.cpu_s + fit.cpu_s, done.wall_s + fit.wall_s, weight)

        return _best(sample, [once(weight) for weight in BART_WEIGHTS])

    return run


def bart_moba(iterations: int, threads: int, weights: Sequence[float] = MOBA_WEIGHTS) -> Callable[[Sample], Answer]:
    """BART's nonlinear model-based reconstruction with its Look-Locker model ``Mss - (Mss + M0) exp(-t R1)``; weight by the truth.

    Saturation recovery is its case ``M0 = 0``, which ``moba`` (0.8) has no option for: a complete state of (all but) zeros at ``t = 0``
    says so as data, and brings its M0 to 2 % of Mss. It estimates the coils itself. Its rate is taken as R1, without a Look-Locker
    correction: there is one readout per saturation.
    """

    def run(sample: Sample) -> Answer:
        full = _full(sample)
        nothing = MOBA_NOTHING * np.abs(full).max() * np.random.default_rng(0).standard_normal((*full.shape[:-1], 1))
        full = np.concatenate([nothing, full], axis=-1)
        times = np.array([0.0, *sample.times], np.complex64).reshape(1, 1, 1, 1, 1, -1)

        def once(weight: float) -> Answer:
            words = ["moba", "-L", "-l1", f"-i{iterations}", "-C100", f"-j{weight:g}", "-B0.1"]
            done = bart.run(words, full, times, threads=threads)
            rate = done.data[:, :, 0, 0, 0, 0, 2].reshape(done.data.shape[:2]).T.real
            return Answer(held(t1_from_rate(rate)), done.cpu_s, done.wall_s, weight)

        return _best(sample, [once(weight) for weight in weights])

    return run


def _best(sample: Sample, answers: list[Answer]) -> Answer:
    return min(answers, key=lambda answer: sample.score(answer.t1)["nrmse"])


def _full(sample: Sample) -> Images:
    """K-space along the readout too, in BART's axes."""
    return bart.to_bart(series.centred_fft(sample.kspace.data.cpu().numpy(), -1))


def _maps(sample: Sample) -> Images:
    assert sample.kspace.coil_maps is not None
    return np.asarray(sample.kspace.coil_maps.cpu().numpy())
