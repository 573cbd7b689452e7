"""Train PINQI: ``python -m recon_core.training.pinqi --output DIR`` on a machine that has torch, NumPy and SciPy alone.

The folder gets ``recipe.json``; ``pretraining/`` and ``training/``, each with a checkpoint and ``log.csv``; pictures of the
validation; and, whenever a call ends, ``pinqi.safetensors`` with ``pinqi.json``. ``--resume`` goes on where the last call ended.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

import recon_core
from recon_core.errors import SettingError
from recon_core.methods.pinqi.model import ABLATIONS, Pinqi
from recon_core.methods.pinqi.weights import save_weights
from recon_core.simulation.anatomy import Anatomy
from recon_core.simulation.brainweb import open_anatomy
from recon_core.simulation.quantitative_brain import QuantitativeBrains
from recon_core.simulation.random_fields import sample_seed
from recon_core.training.loop import Progress, Task, TrainingResult, train
from recon_core.training.pinqi_tasks import EndToEnd, PinqiRecipe, Pretraining, typical_amplitude
from recon_core.training.png import write_png

RECIPE = "recipe.json"
NAME = "pinqi"


@dataclass(frozen=True)
class RunSettings:
    """How a training is carried out; nothing here changes its result, but for rounding.

    Attributes
    ----------
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``; ``"auto"`` takes a GPU when there is one.
    max_minutes
        Of this call.
    resume
        Go on in a folder that has a training.
    brainweb
        Folder of BrainWeb heads; `None` draws heads from an atlas.
    atlas
        Folder ``nilearn/datasets/data`` of an installation, for the atlas at 1 mm; `None` takes the packed one at 1.5 mm.
    recompute
        Trade time for memory.
    compile
        Fuse the networks' kernels with `torch.compile`: a minute or two at the start, then faster; a resumed training must
        use it as well to give the same bits.
    validate_every, checkpoint_minutes, log_every
        See `LoopSettings`.
    """

    device: str = "auto"
    max_minutes: float = math.inf
    resume: bool = False
    brainweb: str | None = None
    atlas: str | None = None
    recompute: bool = False
    compile: bool = False
    validate_every: int = 250
    checkpoint_minutes: float = 10.0
    log_every: int = 1


def run(
    recipe: PinqiRecipe,
    output: str | Path,
    settings: RunSettings | None = None,
    progress: Callable[[str, Progress], None] | None = None,
) -> tuple[TrainingResult, Path]:
    """Pretrain, train and export, as far as the time allows.

    Parameters
    ----------
    progress
        Called after every step with the phase, ``"pretraining"`` or ``"training"``.

    Returns
    -------
    result, weights
        Of the phase that was reached, and the JSON of the exported weights.

    Raises
    ------
    SettingError
        The folder holds a training and ``resume`` is off, or one of another recipe.
    """
    settings = settings or RunSettings()
    output = Path(output)
    device = _device(settings.device)
    _be_deterministic(device)
    _settle_recipe(recipe, output, settings.resume)
    anatomy = open_anatomy(settings.brainweb, device, atlas=settings.atlas)
    torch.manual_seed(sample_seed(recipe.seed, "weights"))
    choice = replace(
        ABLATIONS[recipe.ablation], start=recipe.start, precision=recipe.precision, recompute=settings.recompute
    )
    network = Pinqi(recipe.samples.model, choice).to(device)
    if settings.compile:
        for net in (network.parameter_net, network.image_net):
            if net is not None:
                net.unet.compile(dynamic=False)  # in place: names of weights stay
    deadline = time.monotonic() + 60 * settings.max_minutes

    def phase(task: Task, name: str, epochs: float) -> TrainingResult:
        loop = recipe.loop(
            epochs,
            pretraining=name == "pretraining",
            max_minutes=max(1e-6, (deadline - time.monotonic()) / 60),
            validate_every=settings.validate_every if recipe.n_validation else 0,
            checkpoint_minutes=settings.checkpoint_minutes,
            log_every=settings.log_every,
        )

        def tell(p: Progress) -> None:
            if p.validation is not None:
                for key, image in p.validation.images.items():
                    write_png(output / name / f"{key}_{p.step:06d}.png", image)
            if progress is not None:
                progress(name, p)

        return train(task, loop, output / name, resume=settings.resume, progress=tell)

    result = None
    if recipe.n_pretraining:
        result = phase(Pretraining(network, recipe, anatomy, device, first=0), "pretraining", recipe.pretrain_epochs)
    reached = {"pretraining": 0 if result is None else result.step, "training": 0}
    if result is None or result.finished:
        first = recipe.n_pretraining * recipe.batch
        result = phase(EndToEnd(network, recipe, anatomy, device, first=first), "training", recipe.epochs)
        reached["training"] = result.step
    return result, _export(network, recipe, output, anatomy, device, result, reached)


def _export(
    network: Pinqi,
    recipe: PinqiRecipe,
    output: Path,
    anatomy: Anatomy,
    device: torch.device,
    result: TrainingResult,
    reached: dict[str, int],
) -> Path:
    brains = QuantitativeBrains(anatomy, recipe.samples, seed=recipe.seed, device=device)
    facts: dict[str, Any] = {
        "amplitude": typical_amplitude(brains),
        "recipe": recipe.facts(),
        "seed": recipe.seed,
        "anatomy": anatomy.name,
        "commit": _commit(),
        "version": recon_core.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "steps": {"pretraining": recipe.n_pretraining, "training": recipe.steps(recipe.epochs)},
        "steps_done": reached,
        "samples_seen": {k: done * recipe.batch for k, done in reached.items()},
        "finished": result.finished and reached["training"] > 0,
        "minutes": round(result.minutes, 2),
        "skipped_steps": result.skipped,
        "validation": dict(result.figures),
    }
    return save_weights(output, NAME, network, recipe.times, facts)


def _settle_recipe(recipe: PinqiRecipe, output: Path, resume: bool) -> None:
    """Write the recipe, or see that the one there is the same."""
    path = output / RECIPE
    output.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        there = PinqiRecipe.from_facts(json.loads(path.read_text(encoding="utf-8")))
        if not resume:
            raise SettingError(
                "the folder holds a training", where=output.name, remedy="add --resume, or name another folder"
            )
        if there != recipe:
            own, theirs = asdict(recipe), asdict(there)
            different = "; ".join(f"{k}: {theirs[k]}, not {own[k]}" for k in own if own[k] != theirs[k])
            raise SettingError("the folder holds another training", where=output.name, got=different)
    path.write_text(json.dumps(recipe.facts(), indent=1) + "\n", encoding="utf-8")


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise SettingError("no such device", where="--device", got=name, expected="auto, cpu or cuda") from None
    return device


def _be_deterministic(device: torch.device) -> None:
    """The same sums in the same order in every run: what makes a resumed training equal to an uninterrupted one."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def _commit() -> str:
    """The repository's commit, or ``"unknown"`` where there is no repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(recon_core.__file__).parent, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"


# -------------------------------------------------------------------------------------------------------- command line


def parser() -> argparse.ArgumentParser:
    """Options of the plain command; every field of the recipe and of the run has one."""
    p = argparse.ArgumentParser(prog="python -m recon_core.training.pinqi", description=__doc__)
    p.add_argument("--output", type=Path, required=True)
    for kind in (PinqiRecipe, RunSettings):
        for name, default in asdict(kind()).items():
            option = "--" + name.replace("_", "-")
            if isinstance(default, bool):
                p.add_argument(option, action="store_true")
            elif isinstance(default, tuple):
                p.add_argument(option, type=float, nargs="+", default=default)
            else:
                p.add_argument(option, type=str if default is None else type(default), default=default)
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    return p


def main(arguments: Sequence[str] | None = None) -> None:
    """The plain command: a line per report."""
    given = vars(parser().parse_args(arguments))
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    recipe = PinqiRecipe(**{k: given[k] for k in asdict(PinqiRecipe())})
    settings = RunSettings(**{k: given[k] for k in asdict(RunSettings())})

    def tell(name: str, p: Progress) -> None:
        if p.step % settings.log_every == 0 or p.validation is not None:
            figures = dict(p.figures) | ({} if p.validation is None else dict(p.validation.figures))
            text = " ".join(f"{k}={v:.4g}" for k, v in figures.items())
            print(f"{name} {p.step}/{p.steps} {p.minutes:.1f} min loss={p.loss:.5f} {text}", flush=True)

    result, weights = run(recipe, given["output"], settings, tell)
    print(f"{'finished' if result.finished else 'stopped, resumable'} after {result.minutes:.1f} min: {weights}")


if __name__ == "__main__":
    main()
