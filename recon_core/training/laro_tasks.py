"""What LARO is trained on and for: the recipe, and the two phases (masks and network together; then the network alone)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from recon_core.errors import SettingError
from recon_core.methods.laro.model import Laro, LaroSettings, least_squares_start
from recon_core.metrics import psnr, ssim
from recon_core.operators.planes import Planes
from recon_core.problem import signal_scale
from recon_core.sampling.learned import LearnedSampling, SamplingSettings, samples_for
from recon_core.sampling.masks import centre_block
from recon_core.simulation.multi_echo_brain import BrainScan, MultiEchoBrains, ScanRecipe
from recon_core.simulation.random_fields import sample_seed
from recon_core.simulation.scan_folder import ScanFolder, ScanSupply
from recon_core.training.laro_starts import STARTS, MeasuredScan, MeasuredScans
from recon_core.training.loop import LoopSettings, ParameterGroup, Validation
from recon_core.training.losses import channel_ssim, decay_error
from recon_core.training.runs import TrainingRecipe
from recon_core.types import KSpace

Tensor = torch.Tensor

EVALUATION_SEED = 20230306  # of validation and test scans, whatever the training's seed is
TYPICAL_SCANS, NOISE_SCANS = 3, 12
SHOWN_ERROR = 10.0
LEAST_OF_DECAY = 3
"""Echoes of a training on the decay rate."""


@dataclass(frozen=True)
class LaroRecipe(TrainingRecipe):
    """Everything that decides the result of a training.

    Attributes
    ----------
    kind, fusion, direction, channels, features
        The network, see `LaroSettings`.
    patterns
        ``"R/SPO"`` (acceleration over kind of mask), one per step in turn: one network for several masks.
    matrix
        ``(z, y, x)`` of the training scans; k2 is z and k1 is y.
    n_echoes, n_coils
        Of the training scans.
    acs
        Central block ``(k2, k1)``.
    first_steps, first_unrolls
        Phase one: masks and network.
    second_steps, second_unrolls
        Phase two: masks drawn once and kept.
    second_start
        First images of phase two: ``"cg_sense"``, or ``"llr"`` or ``"refined"`` (`recon_core.training.laro_starts`).
    mask_draws
        How many masks are drawn of each pattern for a phase two that starts from those; 1 in the paper.
    measured_held
        Scans sampled by one mask, with their first images, that are held in memory.
    initial_sha256
        sha256 of the weights from which the network began; empty: random ones.
    batch
        Planes of one scan per step.
    scans_held, steps_per_scan
        Planes are drawn from so many scans at a time; every ``steps_per_scan`` steps the oldest is exchanged for a new one.
    network_rate, mask_rate
        Learning rates; the paper has 1e-3 for both and a hundred times as many steps.
    mask_start
        First probabilities: ``"density"`` those of the hand-made pattern, ``"uniform"`` the paper's.
    pixel_weight
        Of the mean absolute error beside SSIM; 0 in the paper.
    decay_weight
        Of the decay rate's error (`decay_error`) beside those; 0 in the paper. For three echoes or more.
    precision
        Of the network in training, see `LaroSettings`; the weights stay float32.
    """

    kind: str = "laro"
    fusion: int = 1
    direction: str = "both"
    channels: int = 64
    features: tuple[int, ...] = (64, 128, 256)
    patterns: tuple[str, ...] = ("8/2",)
    matrix: tuple[int, int, int] = (80, 206, 200)
    n_echoes: int = 10
    n_coils: int = 8
    acs: tuple[int, int] = (20, 20)
    first_steps: int = 160_000
    first_unrolls: int = 2
    second_steps: int = 160_000
    second_unrolls: int = 10
    second_start: str = "cg_sense"
    initial_sha256: str = ""
    mask_draws: int = 1
    measured_held: int = 64
    batch: int = 1
    scans_held: int = 6
    steps_per_scan: int = 80
    network_rate: float = 1e-3
    mask_rate: float = 0.01
    mask_start: str = "density"
    pixel_weight: float = 0.0
    decay_weight: float = 0.0
    precision: str = "float32"
    warmup_steps: int = 100
    seed: int = 0
    n_validation: int = 1

    def __post_init__(self) -> None:
        self.check_numbers(
            "LARO training",
            ("first_unrolls", "second_steps", "second_unrolls", "mask_draws", "measured_held", "batch", "scans_held",
             "steps_per_scan", "network_rate"),
            ("first_steps", "mask_rate", "pixel_weight", "decay_weight", "warmup_steps", "n_validation"),
        )  # fmt: skip
        for name, known in (("mask_start", ("density", "uniform")), ("second_start", ("cg_sense", *STARTS))):
            if getattr(self, name) not in known:
                got, expected = getattr(self, name), ", ".join(known)
                raise SettingError(f"unknown {name}", where="LARO training", got=got, expected=expected)
        if not self.patterns:
            raise SettingError("no pattern", where="LARO training", expected="R/SPO, such as 8/2")
        if self.n_echoes < self.fewest_echoes:
            raise SettingError(
                "too few echoes for the decay's error",
                where="LARO training",
                got=self.n_echoes,
                expected=f"{LEAST_OF_DECAY} or more",
            )
        _ = self.scans, self.network(self.second_unrolls)  # they raise
        for name in self.patterns:
            self.sampling(name)

    def facts(self) -> dict[str, Any]:
        """As JSON; of later choices those that change nothing are left out: trainings from before there was a choice go on."""
        facts = super().facts()
        for later, without in (("initial_sha256", ""), ("decay_weight", 0.0), ("precision", "float32")):
            if facts[later] == without:
                del facts[later]
        return facts

    def sampling(self, pattern: str) -> SamplingSettings:
        """What ``"R/SPO"`` means for this matrix.

        Raises
        ------
        SettingError
            Not of this form, or impossible for the matrix.
        """
        try:
            acceleration, spo = pattern.split("/")
            shape = (self.matrix[0], self.matrix[1])
            n_samples = samples_for(shape, float(acceleration))
            return SamplingSettings(shape, self.n_echoes, n_samples, self.acs, int(spo), seed=self.seed)
        except ValueError:
            raise SettingError("not a pattern", where="LARO training", got=pattern, expected="R/SPO, such as 8/2") from None

    def pattern_of(self, step: int) -> str:
        """The pattern of a step: all in turn."""
        return self.patterns[step % len(self.patterns)]

    @property
    def fewest_echoes(self) -> int:
        """That a scan may have: MoDL's network is for one number, and a decay has to be seen where it is trained on."""
        return self.n_echoes if self.kind == "modl" else LEAST_OF_DECAY if self.decay_weight else 1

    @property
    def scans(self) -> ScanRecipe:
        """How heads are scanned."""
        return ScanRecipe(matrix=self.matrix, n_echoes=self.n_echoes, n_coils=self.n_coils)

    def network(self, unrolls: int, *, recompute: bool = False) -> LaroSettings:
        """The architecture with so many unrolls."""
        return LaroSettings(
            self.kind,
            self.fusion,
            self.direction,
            self.channels,
            self.features,
            unrolls,
            self.n_echoes if self.kind == "modl" else 0,
            recompute=recompute,
            precision=self.precision,
        )

    def loop(self, phase: int, **limits: Any) -> LoopSettings:
        """Settings of the loop of phase 1 or 2."""
        steps = self.first_steps if phase == 1 else self.second_steps
        return LoopSettings(steps, warmup_steps=min(self.warmup_steps, steps // 5), betas=(0.9, 0.99), **limits)


class LaroModule(nn.Module):
    """The network and its sampling patterns."""

    def __init__(self, recipe: LaroRecipe, *, recompute: bool = False) -> None:
        super().__init__()
        self.network = Laro(recipe.network(recipe.second_unrolls, recompute=recompute))
        # module names hold no dots and no slashes
        self.sampling = nn.ModuleDict({_key(p): LearnedSampling(recipe.sampling(p)) for p in recipe.patterns})
        if recipe.mask_start == "density":
            for learned in self.sampling.values():
                assert isinstance(learned, LearnedSampling)
                learned.start_from_density()

    def pattern(self, name: str) -> LearnedSampling:
        """The sampling module of ``"R/SPO"``."""
        found = self.sampling[_key(name)]
        assert isinstance(found, LearnedSampling)
        return found


def _key(pattern: str) -> str:
    return "r" + pattern.replace("/", "_").replace(".", "p")


@dataclass(frozen=True)
class PlaneSample:
    """Planes of one scan; complex ``(plane, echo, z, y)`` and bool ``(plane, 1, z, y)``."""

    images: Tensor
    coil_maps: Tensor
    brain: Tensor
    kspace: Tensor
    start: Tensor | None = None
    """First images; ``None``: `least_squares_start`."""
    mask: Tensor | None = None
    """float ``(echo, k2, k1)`` where the scan has one of its own."""
    echo_times: tuple[float, ...] = ()
    """s."""


class PlaneSamples:
    """Planes by step number: from a window of scans that moves on slowly, so that making scans costs little.

    Parameters
    ----------
    brains
        The supply; it should keep as many scans as the window has.
    """

    def __init__(
        self, brains: ScanSupply, recipe: LaroRecipe, device: torch.device, phase: int, measured: MeasuredScans | None = None
    ) -> None:
        self._brains, self._recipe, self._device, self._phase = brains, recipe, device, phase
        self._measured = measured

    def batch(self, step: int) -> PlaneSample:
        """Of a step: a function of its number alone."""
        r = self._recipe
        seed = sample_seed(r.seed, "step", self._phase, step)
        rng = np.random.default_rng(seed)
        first = step // r.steps_per_scan
        index = first + int(rng.integers(r.scans_held)) + 1_000_000 * (self._phase - 1)
        scan = self._brains.scan("train", index)
        columns = scan.brain.any(0).any(0).nonzero().flatten().numpy()
        chosen = torch.from_numpy(rng.choice(columns, r.batch, replace=len(columns) < r.batch))
        # an unknown receiver phase, and scales as far apart as the door's scaling leaves them
        factor = complex(np.exp(2j * np.pi * rng.random()) * rng.uniform(0.85, 1.15))
        if self._measured is not None:
            return measured_sample(self._measured.measured("train", index, r.pattern_of(step)), chosen, factor, self._device)
        return plane_sample(scan, chosen, factor, seed, self._device)


def plane_sample(scan: BrainScan, columns: Tensor, factor: complex, seed: int, device: torch.device) -> PlaneSample:
    """Columns of a scan with noise: what a full scan would measure."""
    images = (scan.images[..., columns].movedim(-1, 0) * factor).contiguous().to(device)
    maps = scan.coil_maps[..., columns].movedim(-1, 0).contiguous().to(device)
    full = Planes(maps, torch.ones(images.shape[1], 1, 1, device=device)).forward(images)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(full.shape, dtype=torch.complex64, generator=generator).to(device)
    brain = scan.brain[..., columns].movedim(-1, 0)[:, None].to(device)
    return PlaneSample(images, maps, brain, full + scan.noise_std * noise, echo_times=scan.echo_times)


def measured_sample(measured: MeasuredScan, columns: Tensor, factor: complex, device: torch.device) -> PlaneSample:
    """Columns of a scan with the noise and the first images that it has."""

    def planes(volume: Tensor) -> Tensor:
        return volume[..., columns].movedim(-1, 0).contiguous().to(device)

    return PlaneSample(
        planes(measured.images) * factor,
        planes(measured.maps),
        planes(measured.scan.brain)[:, None],
        measured.kspace(columns, device) * factor,
        planes(measured.start) * factor,
        measured.mask.to(device),
        measured.scan.echo_times,
    )


class LaroTask:
    """One phase of the training.

    Parameters
    ----------
    supply
        Of scans; ``None`` simulates them.
    masks
        Phase two: bool ``(echo, k2, k1)`` by pattern. Phase one draws them anew in every step.
    """

    def __init__(
        self,
        module: LaroModule,
        recipe: LaroRecipe,
        device: torch.device,
        phase: int,
        supply: ScanSupply | None = None,
        masks: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.module = module
        self.recipe, self.phase, self._masks, self._device = recipe, phase, masks, device
        brains = supply or scan_supply(recipe)
        of_slabs = phase == 2 and recipe.second_start in STARTS
        self.samples = PlaneSamples(brains, recipe, device, phase, self._measured(brains) if of_slabs else None)
        evaluation = MultiEchoBrains(recipe.scans, seed=EVALUATION_SEED, keep=max(1, recipe.n_validation))
        self._evaluation: ScanSupply = supply if isinstance(supply, ScanFolder) else evaluation
        self._validation = self._measured(self._evaluation) if of_slabs else None
        self.unrolls = recipe.first_unrolls if phase == 1 else recipe.second_unrolls

    def _measured(self, supply: ScanSupply) -> MeasuredScans:
        r = self.recipe
        return MeasuredScans(
            supply, lambda pattern, number: self.module.pattern(pattern).draw(number),
            acs=r.acs, draws=r.mask_draws, seed=r.seed, keep=r.measured_held, device=self._device, start=r.second_start,
        )  # fmt: skip

    def facts(self) -> dict[str, Any]:
        """JSON that a checkpoint must agree with."""
        return {"phase": self.phase, **self.recipe.facts()}

    def groups(self) -> list[ParameterGroup]:
        """The network, and in phase one the masks' weights."""
        groups = [ParameterGroup("network", list(self.module.network.parameters()), self.recipe.network_rate, 0.0)]
        weights = [w for w in self.module.sampling.parameters() if w.requires_grad]
        if self.phase == 1 and weights:
            groups.append(ParameterGroup("masks", weights, self.recipe.mask_rate, 0.0))
        return groups

    def loss(self, step: int) -> tuple[Tensor, dict[str, float]]:
        """``1 - SSIM`` (Eq. 9) of real and imaginary parts inside the brain, mean over unrolls, plus ``pixel_weight`` times the mean
        absolute error and ``decay_weight`` times that of the decay rate."""
        sample = self.samples.batch(step)
        mask = self._mask(self.recipe.pattern_of(step)) if sample.mask is None else sample.mask
        found = self.reconstruct(sample, mask)
        total = sample.images.real.new_zeros(())
        truth = sample.images * sample.brain
        for images in found:
            inside = images * sample.brain
            total = total + 1 - channel_ssim(inside, truth)
            if self.recipe.pixel_weight:
                error = (inside - truth).abs().sum() / sample.brain.sum().clamp_min(1) / truth.shape[1]
                total = total + self.recipe.pixel_weight * error
            if self.recipe.decay_weight:
                total = total + self.recipe.decay_weight * decay_error(images, truth, sample.echo_times, sample.brain)
        error = (found[-1].detach() * sample.brain - truth).norm() / truth.norm()
        return total / len(found), {"error": float(error), "rho": float(self.module.network.rho.detach())}

    def reconstruct(self, sample: PlaneSample, mask: Tensor) -> list[Tensor]:
        """Images after every unroll; of a mask for more echoes than the scan has, the first ones."""
        operator = Planes(sample.coil_maps, mask[: sample.images.shape[1]])
        rhs = operator.adjoint(sample.kspace)
        start = least_squares_start(operator, rhs) if sample.start is None else sample.start
        return self.module.network(operator, rhs, start, self.unrolls)

    def _mask(self, name: str) -> Tensor:
        if self._masks is not None:
            return self._masks[name].to(self._device).float()
        mask: Tensor = self.module.pattern(name)()
        return mask

    def validate(self, step: int) -> Validation:
        """PSNR and SSIM of the echo-combined magnitude in the brain, by pattern, on planes of held-out heads."""
        figures: dict[str, list[float]] = {}
        pictures: dict[str, NDArray[np.floating]] = {}
        for i in range(self.recipe.n_validation):
            scan = self._evaluation.scan("validation", i)
            columns = _shown_columns(scan.brain)
            for name in dict.fromkeys(self.recipe.patterns):
                sample, mask = self._validation_sample(scan, i, name, columns)
                found = self.reconstruct(sample, mask)[-1]
                first = least_squares_start_of(sample, mask) if sample.start is None else sample.start
                images, truth, start = (_combined(x).cpu().numpy() for x in (found, sample.images, first))
                brain = sample.brain[:, 0].cpu().numpy()
                for label, image in (("", images), ("_start", start)):
                    figures.setdefault(f"psnr{label}_{name}", []).append(psnr(image, truth, brain))
                    figures.setdefault(f"ssim{label}_{name}", []).append(ssim(image, truth, brain))
                if name == self.recipe.patterns[0]:
                    pictures[f"magnitude_{i}"] = _picture(images, start, truth)
        return Validation({k: float(np.mean(v)) for k, v in figures.items()}, pictures)

    def _validation_sample(self, scan: BrainScan, index: int, name: str, columns: Tensor) -> tuple[PlaneSample, Tensor]:
        if self._validation is not None:
            sample = measured_sample(self._validation.measured("validation", index, name), columns, 1.0, self._device)
            assert sample.mask is not None
            return sample, sample.mask
        sample = plane_sample(scan, columns, 1.0, sample_seed("validation", index), self._device)
        mask = torch.from_numpy(self.module.pattern(name).draw(0)) if self._masks is None else self._masks[name]
        return sample, mask.to(self._device).float()


def _shown_columns(brain: Tensor) -> Tensor:
    """Readout positions that are validated on: some away from the brain's ends; of a short readout the middle one."""
    inside = brain.any(0).any(0).nonzero().flatten()
    chosen = inside[4:-4:6]
    return chosen if len(chosen) else inside[len(inside) // 2 :][:1]


def least_squares_start_of(sample: PlaneSample, mask: Tensor) -> Tensor:
    """The first images alone, for comparison; the mask as in `LaroTask.reconstruct`."""
    operator = Planes(sample.coil_maps, mask[: sample.images.shape[1]])
    return least_squares_start(operator, operator.adjoint(sample.kspace))


def scan_supply(recipe: LaroRecipe, folder: str | None = None) -> ScanSupply:
    """The scans of a folder, or simulated ones."""
    keep = recipe.scans_held + 1
    return ScanFolder(folder, keep=keep) if folder else MultiEchoBrains(recipe.scans, seed=recipe.seed, keep=keep)


def typical_amplitude(recipe: LaroRecipe, supply: ScanSupply, mask: NDArray[np.bool_]) -> float:
    """Median of what `signal_scale` gives for training scans: the amplitude that a scan has to be brought to.

    Parameters
    ----------
    mask
        ``(echo, k2, k1)``: what is sampled where the recipe has no central block, by which scans are judged otherwise.
    """
    block = torch.from_numpy(centre_block(recipe.matrix[:2], recipe.acs))
    sampled = block.expand(recipe.n_echoes, -1, -1) if bool(block.any()) else torch.from_numpy(mask)
    scales = []
    for i in range(TYPICAL_SCANS):
        scan = supply.scan("train", i)
        every = sampled[: len(scan.images)].float()
        full = Planes(scan.coil_maps.movedim(-1, 0), every).forward(scan.images.movedim(-1, 0)).permute(1, 2, 3, 4, 0)
        scales.append(signal_scale(KSpace(full * every[:, None, :, :, None], every, coil_maps=scan.coil_maps)))
    return float(np.median(scales))


def typical_noise(recipe: LaroRecipe, supply: ScanSupply) -> float:
    """Geometric mean of the noise of simulated scans; of a folder's, of the first dozen."""
    if isinstance(supply, ScanFolder):
        return float(np.exp(np.mean([np.log(max(supply.scan("train", i).noise_std, 1e-9)) for i in range(NOISE_SCANS)])))
    low, high = recipe.scans.noise
    return float(np.sqrt(low * high))


def _combined(images: Tensor) -> Tensor:
    """``sqrt(sum_j |s_j|^2)``, ``(plane, z, y)``."""
    return images.abs().square().sum(1).sqrt()


def _picture(found: NDArray[np.floating], start: NDArray[np.floating], truth: NDArray[np.floating]) -> NDArray[np.floating]:
    """Rows: planes; columns: truth, start, result, and both errors times ten; the largest true value is white."""
    peak = float(truth.max())
    rows = [
        np.concatenate([t, s, f, SHOWN_ERROR * np.abs(s - t), SHOWN_ERROR * np.abs(f - t)], axis=1)
        for t, s, f in zip(truth, start, found, strict=True)
    ]
    return np.clip(np.concatenate(rows)[:, :] / peak, 0, 1)
