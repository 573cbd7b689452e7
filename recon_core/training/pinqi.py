"""Train PINQI: ``python -m recon_core.training.pinqi --output DIR`` on a machine that has torch, NumPy and SciPy alone.

The folder gets ``recipe.json``; ``pretraining/`` and ``training/``, each with a checkpoint and ``log.csv``; pictures of the
validation; and, whenever a call ends, ``pinqi.safetensors`` with ``pinqi.json``. ``--resume`` goes on where the last call ended.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from recon_core.errors import SettingError
from recon_core.methods.pinqi.model import ABLATIONS, Pinqi
from recon_core.methods.pinqi.noise_rule import DEFAULT_RULE, NoiseRule
from recon_core.methods.pinqi.weights import save_weights
from recon_core.simulation.anatomy import Anatomy
from recon_core.simulation.brainweb import LabelledHeads, open_anatomy
from recon_core.simulation.quantitative_brain import QuantitativeBrains
from recon_core.simulation.random_fields import sample_seed
from recon_core.solvers.nonlinear_layer import NonlinearSettings
from recon_core.training.checkpoint import load_into, read_pair
from recon_core.training.loop import Progress, Task, TrainingResult, asked_to_stop, train
from recon_core.training.pinqi_samples import HeldBatches
from recon_core.training.pinqi_tasks import EndToEnd, PinqiRecipe, Pretraining, typical_amplitude
from recon_core.training.runs import (
    Call,
    CarryOut,
    alone_in,
    be_deterministic,
    export_facts,
    initial_digest,
    option_parser,
    plain_command,
    settle_recipe,
    training_device,
)

Tensor = torch.Tensor

NAME = "pinqi"


@dataclass(frozen=True)
class RunSettings(CarryOut):
    """How a training is carried out; see `CarryOut` for the rest.

    Attributes
    ----------
    brainweb
        Folder of BrainWeb heads; `None` draws heads from an atlas.
    atlas
        Folder ``nilearn/datasets/data`` of an installation, for the atlas at 1 mm; `None` takes the packed one at 1.5 mm.
    initial
        JSON of weights of the same network to begin with, for instance of another training that ended; recorded by its sha256.
    compile
        Fuse the networks' kernels with `torch.compile`: a minute or two at the start, then faster; a resumed training must
        use it as well to give the same bits.
    """

    brainweb: str | None = None
    atlas: str | None = None
    initial: str | None = None
    compile: bool = False


def run(
    recipe: PinqiRecipe,
    output: str | Path,
    settings: RunSettings | None = None,
    progress: Callable[[str, Progress], None] | None = None,
    held: HeldBatches | None = None,
) -> tuple[TrainingResult, Path]:
    """Pretrain, train and export, as far as the time allows.

    Parameters
    ----------
    held
        Batches of another training end to end on the same samples, so that they need not be made again; made if ``None``.
    progress
        Called after every step with the phase, ``"pretraining"`` or ``"training"``.

    Returns
    -------
    result, weights
        Of the phase that was reached (its ``minutes`` are those of all phases), and the JSON of the exported weights.

    Raises
    ------
    SettingError
        The folder holds a training and ``resume`` is off, one of another recipe or from other heads, or one that is running.
    DataError
        Heads that are no heads.
    """
    settings = settings or RunSettings()
    output = Path(output)
    device = training_device(settings.device)
    be_deterministic(device)
    recipe = replace(recipe, initial_sha256=initial_digest(settings.initial, output, settings.resume))
    anatomy = _heads(recipe, settings, device)
    network = _new_network(recipe, settings, device)
    rule = _begin_with(network, recipe, settings, output, device)
    if settings.compile:
        for net in (network.parameter_net, network.image_net):
            if net is not None:
                net.unet.compile(dynamic=False)  # in place: names of weights stay
    data = {"heads": anatomy.digest() if isinstance(anatomy, LabelledHeads) else anatomy.name}
    settle_recipe(recipe, output, settings.resume, data)
    call = Call(output, settings, validated=recipe.n_validation > 0, progress=progress)

    def phase(task: Task, name: str, epochs: float) -> TrainingResult:
        loop = recipe.loop(epochs, pretraining=name == "pretraining", **call.limits())
        return train(task, loop, output / name, resume=settings.resume, progress=call.tell(name), stop=stop)

    result = None
    with alone_in(output):
        with asked_to_stop() as stop:
            if recipe.n_pretraining:
                result = phase(Pretraining(network, recipe, anatomy, device, first=0), "pretraining", recipe.pretrain_epochs)
            reached = {"pretraining": 0 if result is None else result.step, "training": 0}
            before = 0.0 if result is None else result.minutes
            if recipe.n_training and (result is None or result.finished):
                first = recipe.n_pretraining * recipe.batch
                task = EndToEnd(network, recipe, anatomy, device, first=first, rule=rule, held=held)
                result = phase(task, "training", recipe.epochs)
                result = replace(result, minutes=before + result.minutes)
                reached["training"] = result.step
                rule = rule if task.factors is None else task.factors.rule()
        assert result is not None
        stated = {} if recipe.noise_factors == "none" else {"noise_rule": rule.facts()}
        return result, _export(network, recipe, output, anatomy, device, result, reached, stated)


def _heads(recipe: PinqiRecipe, settings: RunSettings, device: torch.device) -> Anatomy:
    if recipe.atlas_share and not settings.brainweb:
        raise SettingError(
            "a part of all samples from the atlas, which gives them all",
            where="PINQI training",
            got=f"atlas_share {recipe.atlas_share:g} and no BrainWeb folder",
            remedy="add --brainweb FOLDER, or leave --atlas-share out",
        )
    anatomy = open_anatomy(settings.brainweb, device, atlas=settings.atlas, atlas_share=recipe.atlas_share)
    if isinstance(anatomy, LabelledHeads):
        anatomy.read("train", "validation")
    return anatomy


def _new_network(recipe: PinqiRecipe, settings: RunSettings, device: torch.device) -> Pinqi:
    """Of the recipe, with the random weights of its seed."""
    torch.manual_seed(sample_seed(recipe.seed, "weights"))
    ablation = ABLATIONS[recipe.ablation]
    choice = replace(
        ablation,
        start=recipe.start,
        prediction=recipe.prediction,
        precision=recipe.precision,
        recompute=settings.recompute,
        n_iterations=recipe.n_iterations or ablation.n_iterations,
    )
    solver = NonlinearSettings.of(recipe.nonlinear_solver)
    return Pinqi(recipe.samples.model, choice, nonlinear=solver).to(device)


def _begin_with(network: Pinqi, recipe: PinqiRecipe, settings: RunSettings, output: Path, device: torch.device) -> NoiseRule:
    """Give the network the initial weights, if any (a resumed phase replaces them by its checkpoint's); the rule for the noise that
    goes with them.
    """
    if recipe.noise_factors != "none" and recipe.initial_sha256 and not settings.initial:
        raise SettingError(
            "the factors for the noise begin with those of the initial weights", where=output.name, remedy="add --initial"
        )
    if not settings.initial:
        return DEFAULT_RULE
    tensors, stated = read_pair(settings.initial, device)
    if "noise_rule" in stated and recipe.noise_factors == "none" and not settings.resume:
        raise SettingError(
            "lambdas that were learned with factors by the noise, which the weights of this training would not state",
            where=Path(settings.initial).name,
            got="noise_factors none",
            expected="fixed or learned, and batch 1",
            remedy="add --noise-factors fixed --batch 1",
        )
    load_into(network, fitting(tensors, network), Path(settings.initial).name)
    return NoiseRule.from_facts(stated["noise_rule"]) if "noise_rule" in stated else DEFAULT_RULE


def _export(
    network: Pinqi,
    recipe: PinqiRecipe,
    output: Path,
    anatomy: Anatomy,
    device: torch.device,
    result: TrainingResult,
    reached: dict[str, int],
    stated: dict[str, Any],
) -> Path:
    brains = QuantitativeBrains(anatomy, recipe.samples, seed=recipe.seed, device=device)
    steps = {"pretraining": recipe.n_pretraining, "training": recipe.n_training}
    facts: dict[str, Any] = {
        "amplitude": typical_amplitude(brains),
        "anatomy": anatomy.name,
        **export_facts(recipe, result, device, steps, reached),
        "samples_seen": {k: done * recipe.batch for k, done in reached.items()},
        "minutes": round(result.minutes, 2),
        **stated,
    }
    return save_weights(output, NAME, network, recipe.times, facts)


def fitting(tensors: dict[str, Tensor], network: Pinqi) -> dict[str, Tensor]:
    """Weights for a network that predicts another thing, has fewer iterations, or lacks a part of the one they are of.

    A last layer of zeros instead of theirs; of the lambdas those of the same parts of the way; nothing of parts that a variant does
    without. Sizes of gradient steps (variant e) are as they were where the weights have none.
    """
    own = network.state_dict()
    parts = {key.split(".")[0] for key in own}
    found = {key: value for key, value in own.items() if key.startswith("step_sizes.")}
    found |= {key: value for key, value in tensors.items() if key.split(".")[0] in parts}
    for key in ("lambda_y.raw", "lambda_q.raw", "lambda_p.raw"):
        if key in own and key in found and len(own[key]) < len(found[key]):
            found[key] = found[key][torch.linspace(0, len(found[key]) - 1, len(own[key])).round().long()]
    for key in ("parameter_net.unet.last.weight", "parameter_net.unet.last.bias"):
        if key in own and key in found and found[key].shape != own[key].shape:
            found[key] = torch.zeros_like(own[key])
    return found


# -------------------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    """Options of the plain command; every field of the recipe and of the run has one."""
    return option_parser("python -m recon_core.training.pinqi", __doc__, PinqiRecipe, RunSettings)


def main(arguments: Sequence[str] | None = None) -> None:
    """The plain command: a line per report."""
    plain_command(parser(), run, arguments, PinqiRecipe, RunSettings)


if __name__ == "__main__":
    main()
