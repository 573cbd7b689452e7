"""Train LARO: ``python -m recon_core.training.laro --output DIR`` on a machine that has torch, NumPy, SciPy and h5py alone.

The folder gets ``recipe.json``; ``phase1/`` and ``phase2/``, each with a checkpoint, ``log.csv`` and pictures of the validation;
and, whenever a call ends, ``laro.safetensors`` with ``laro.json`` and one mask file per pattern. ``--resume`` goes on where the last
call ended. `learn_masks` runs the first phase alone.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recon_core.errors import SettingError
from recon_core.methods.laro.weights import save_weights
from recon_core.sampling.learned import FIXED
from recon_core.sampling.mask_files import SamplingMask, read_mask, write_mask
from recon_core.simulation.random_fields import sample_seed
from recon_core.simulation.scan_folder import ScanFolder
from recon_core.training.checkpoint import load_into, read_pair
from recon_core.training.laro_tasks import LaroModule, LaroRecipe, LaroTask, scan_supply, typical_amplitude, typical_noise
from recon_core.training.loop import TrainingResult, asked_to_stop, train
from recon_core.training.runs import (
    Call,
    CarryOut,
    Tell,
    alone_in,
    be_deterministic,
    export_facts,
    initial_digest,
    option_parser,
    plain_command,
    settle_recipe,
    training_device,
)

NAME = "laro"
MASK_SEED = 0
TAKEN_OVER = "masks"


def run(
    recipe: LaroRecipe, output: str | Path, settings: RunSettings | None = None, progress: Tell | None = None
) -> tuple[TrainingResult, Path]:
    """Both phases and export, as far as the time allows.

    Parameters
    ----------
    progress
        Called after every step with the phase, ``"phase1"`` or ``"phase2"``.

    Returns
    -------
    result, weights
        Of the phase that was reached, and the JSON of the exported weights.

    Raises
    ------
    SettingError
        The folder holds a training and ``resume`` is off, one of another recipe, one from other scans or masks, or one that is running.
    DataError
        A scan of the folder has another matrix than the recipe, or a number of echoes that the recipe has no use for.
    """
    training = _Training(recipe, Path(output), settings or RunSettings(), progress)
    with alone_in(training.output):
        with asked_to_stop() as stop:
            result = training.first(stop)
            if result is None or result.finished:
                result = training.second(stop)
        return result, training.export(result)


def learn_masks(
    recipe: LaroRecipe, output: str | Path, settings: RunSettings | None = None, progress: Tell | None = None
) -> tuple[TrainingResult | None, list[Path]]:
    """The first phase alone; masks are written for every pattern, also when the time was too short for all steps.

    Returns
    -------
    result, masks
        The mask files, which `recon_core.sampling.mask_files.read_mask` reads.
    """
    training = _Training(recipe, Path(output), settings or RunSettings(), progress)
    with alone_in(training.output):
        result = training.first()
        return result, training.write_masks()


@dataclass(frozen=True)
class RunSettings(CarryOut):
    """How a training of LARO is carried out.

    Attributes
    ----------
    scans
        Folder of scans (`recon_core.simulation.scan_folder`); `None` simulates them on the way.
    masks
        Folder with the mask files of an earlier training, whose probabilities are taken over: phase one goes on from them, or is left
        out (``first_steps = 0``).
    initial
        JSON of weights of the same network to begin with; recorded by its sha256.
    """

    scans: str | None = None
    masks: str | None = None
    initial: str | None = None


class _Training:
    def __init__(self, recipe: LaroRecipe, output: Path, settings: RunSettings, progress: Tell | None) -> None:
        recipe = replace(recipe, initial_sha256=initial_digest(settings.initial, output, settings.resume))
        self.recipe, self.output, self.settings = recipe, output, settings
        self.device = training_device(settings.device)
        be_deterministic(self.device)
        self.supply = scan_supply(recipe, settings.scans)
        if isinstance(self.supply, ScanFolder):
            self.supply.require(recipe.matrix[:2], recipe.fewest_echoes, recipe.n_echoes)
        torch.manual_seed(sample_seed(recipe.seed, "weights"))
        self.module = LaroModule(recipe, recompute=settings.recompute).to(self.device)
        if settings.initial:  # a resumed phase replaces them by its checkpoint's
            tensors, _ = read_pair(settings.initial, self.device)
            load_into(self.module.network, tensors, Path(settings.initial).name)
        masks = self._masks_taken_over()
        self.data: dict[str, str] = {
            "scans": self.supply.digest() if isinstance(self.supply, ScanFolder) else "simulated",
            "masks": masks_digest(masks) if masks else "none",
        }
        settle_recipe(recipe, output, settings.resume, self.data)
        if settings.masks:  # copies for the calls that resume
            for name, mask in masks.items():
                (output / TAKEN_OVER).mkdir(exist_ok=True)
                write_mask(output / TAKEN_OVER / name, mask)
        self.call = Call(output, settings, validated=recipe.n_validation > 0, progress=progress)
        self.reached = {"phase1": 0, "phase2": 0}
        self.minutes = {"phase1": 0.0, "phase2": 0.0}

    def _masks_taken_over(self) -> dict[str, SamplingMask]:
        """Those of an earlier training by file name, given or in the folder already; their probabilities are where this one begins."""
        copies, given = self.output / TAKEN_OVER, self.settings.masks
        found: dict[str, SamplingMask] = {}
        for pattern in dict.fromkeys(self.recipe.patterns):
            learned, name = self.module.pattern(pattern), mask_name(pattern)
            copied = (copies / name).is_file()
            if learned.settings.spo == FIXED or not (given or copied):
                continue
            path = Path(given or copies) / name
            if not path.is_file():
                expected = f"the folder of a training that learned {pattern}"
                raise SettingError("no mask of the pattern", where=str(path.parent), got=f"no {name}", expected=expected)
            mask = found[name] = read_mask(path)
            if given and copied and self.settings.resume:
                theirs, own = (masks_digest({name: m})[:16] for m in (read_mask(copies / name), mask))
                if theirs != own:
                    raise SettingError("it was begun with another mask", where=name, got=own, expected=theirs)
            learned.start_from(mask.mask.astype(np.float32) if mask.probability is None else mask.probability)
        return found

    def first(self, stop: threading.Event | None = None) -> TrainingResult | None:
        """Masks and network; ``None`` where the recipe has no steps for it."""
        if not self.recipe.first_steps:
            return None
        return self._phase(1, LaroTask(self.module, self.recipe, self.device, 1, self.supply), stop)

    def second(self, stop: threading.Event) -> TrainingResult:
        """The network for masks that are drawn once."""
        masks = {p: torch.from_numpy(self.module.pattern(p).draw(MASK_SEED)) for p in self.recipe.patterns}
        return self._phase(2, LaroTask(self.module, self.recipe, self.device, 2, self.supply, masks), stop)

    def _phase(self, number: int, task: LaroTask, stop: threading.Event | None) -> TrainingResult:
        name = f"phase{number}"
        loop = self.recipe.loop(number, **self.call.limits())
        folder, resume = self.output / name, self.settings.resume
        result = train(task, loop, folder, resume=resume, progress=self.call.tell(name), stop=stop)
        self.reached[name], self.minutes[name] = result.step, round(result.minutes, 2)
        return result

    def write_masks(self) -> list[Path]:
        """One file per pattern."""
        written = []
        for pattern in dict.fromkeys(self.recipe.patterns):
            learned = self.module.pattern(pattern)
            acceleration, spo = pattern.split("/")
            facts: dict[str, str | float | int] = {
                "density": "multi-level" if learned.settings.spo == FIXED else "learned",
                "patterns": "one per echo" if learned.settings.spo == 2 else "one",
                "acceleration": float(acceleration),
                "spo": int(spo),
                "seed": MASK_SEED,
                "steps": self.reached["phase1"],
                "acs_k2": self.recipe.acs[0],
                "acs_k1": self.recipe.acs[1],
            }
            probability = learned.probability().detach().cpu().float().numpy()
            path = self.output / mask_name(pattern)
            write_mask(path, SamplingMask(learned.draw(MASK_SEED), probability, facts=facts))
            written.append(path)
        return written

    def export(self, result: TrainingResult) -> Path:
        """Masks and weights."""
        self.write_masks()
        recipe = self.recipe
        steps = {"phase1": recipe.first_steps, "phase2": recipe.second_steps}
        facts: dict[str, Any] = {
            "amplitude": typical_amplitude(recipe, self.supply, self.module.pattern(recipe.patterns[0]).draw(MASK_SEED)),
            "noise": typical_noise(recipe, self.supply),
            "scans": "a folder" if self.settings.scans else "simulated heads (recon_core.simulation.multi_echo_brain)",
            "data": self.data,
            **export_facts(recipe, result, self.device, steps, self.reached),
            "minutes": self.minutes,
        }
        return save_weights(self.output, NAME, self.module.network, recipe.second_start, facts)


def masks_digest(masks: Mapping[str, SamplingMask]) -> str:
    """sha256 of masks and probabilities, by name."""
    digest = hashlib.sha256()
    for name in sorted(masks):
        mask, probability = masks[name].mask, masks[name].probability
        digest.update(repr((name, mask.shape, probability is None)).encode())
        digest.update(np.ascontiguousarray(mask).tobytes())
        digest.update(b"" if probability is None else np.ascontiguousarray(probability, np.float32).tobytes())
    return digest.hexdigest()


def mask_name(pattern: str) -> str:
    """File of the mask of ``"R/SPO"``."""
    acceleration, spo = pattern.split("/")
    return f"{NAME}_mask_r{acceleration}_spo{spo}.h5"


# -------------------------------------------------------------------------------------------------------- command line


def main(arguments: Sequence[str] | None = None) -> None:
    """The plain command: a line per report."""
    kinds = (LaroRecipe, RunSettings)
    plain_command(option_parser("python -m recon_core.training.laro", __doc__, *kinds), run, arguments, *kinds)


if __name__ == "__main__":
    main()
