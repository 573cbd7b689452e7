"""The command ``recon train``: training of the learned methods, with a progress bar."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from recon_core.errors import SettingError

if TYPE_CHECKING:  # torch takes a second to import: not for --help
    from recon_core.training.loop import Progress as Step
    from recon_core.training.loop import TrainingResult

app = typer.Typer(name="train", help="Train the learned methods on synthetic data.", no_args_is_help=True)
out = Console()
Made = TypeVar("Made")

# options that both trainings have
ValidateEvery = Annotated[int, typer.Option(help="Steps between validations; 0 for none.", min=0)]
LogEvery = Annotated[int, typer.Option(help="Steps between rows of log.csv; 0 for none.", min=0)]
CheckpointMinutes = Annotated[float, typer.Option(help="Between checkpoints.", min=0.0)]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 leaves them to torch.", min=0)]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Precision = Annotated[str, typer.Option(help="Of the networks: float32 or bfloat16.")]


def progress_bars() -> Progress:
    """What `PhaseBars` draws on: a context that shows name, bar, steps, time and figures of every phase."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}"),
        console=out,
    )


class PhaseBars:
    """One bar per phase: loss beside it, validation figures above it."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._bars: dict[str, int] = {}

    def __call__(self, phase: str, step: Step) -> None:
        if phase not in self._bars:
            self._bars[phase] = self._progress.add_task(phase, total=step.steps, completed=step.step, figures="")
        text = f"loss {step.loss:.5f}"
        self._progress.update(self._bars[phase], completed=step.step, figures=text)  # type: ignore[arg-type]
        if step.validation is not None:
            figures = "  ".join(f"{name} {value:.4f}" for name, value in step.validation.figures.items())
            self._progress.console.print(f"{phase} step {step.step}: {figures}", markup=False, highlight=False)


def _say_ended(result: TrainingResult, weights: Path) -> None:
    state, then = ("finished", "") if result.finished else ("stopped", "; --resume goes on")
    text = f"{state} after {result.minutes:.1f} min{result.skipped_words}{then}: {weights}"
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def _made(kind: type[Made], options: Mapping[str, Any]) -> Made:
    """A recipe, or settings, of the options that have the names of its fields: each has one, or this fails.

    Options that were left out (``None``) take the field's default.
    """
    from recon_core.training.runs import SET_BY_PROGRAM

    given = {f.name: options[f.name] for f in fields(kind) if f.name not in SET_BY_PROGRAM}  # type: ignore[arg-type]
    plain = {k: tuple(v) if isinstance(v, list) else str(v) if isinstance(v, Path) else v for k, v in given.items()}
    return kind(**{k: v for k, v in plain.items() if v is not None})


def _check_resumed(output: Path, resume: bool) -> None:
    """A folder that was misspelt would begin a training of hours, by default at the published size."""
    if resume and not (output / "recipe.json").exists():
        raise SettingError(
            "no training to resume", where=str(output), remedy="Correct --output, or leave --resume out to begin one"
        )


@app.callback()
def _train() -> None:
    """Train the learned methods on synthetic data."""


@app.command()
def pinqi(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, logs, pictures and the weights.")],
    max_minutes: Annotated[float, typer.Option(help="Stop, resumably, after this time.", min=0.01)] = math.inf,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the training in the folder was stopped.")] = False,
    size: Annotated[
        int, typer.Option(help="Pixels along each side; 8 or more for each acceleration, 64 for 8.", min=32)
    ] = 192,
    columns: Annotated[
        int, typer.Option(help="Train on strips of so many readout positions, as exact as slices; 0 for slices.", min=0)
    ] = 0,
    batch: Annotated[int, typer.Option(help="Samples per step.", min=1)] = 16,
    epochs: Annotated[float, typer.Option(help="End to end; fractions are allowed.", min=0.0)] = 80.0,
    pretrain_epochs: Annotated[float, typer.Option(help="Of the networks alone, first.", min=0.0)] = 1.0,
    samples_per_epoch: Annotated[int, typer.Option(help="16 heads of 122 slices as published.", min=1)] = 1952,
    accelerations: Annotated[
        list[float] | None,
        typer.Option("--acceleration", help="1 or more; may be repeated, each sample takes one. [4 to 8]"),
    ] = None,
    times: Annotated[
        list[float] | None, typer.Option("--time", help="Saturation delay in s, one per state; repeat.")
    ] = None,
    n_coils: Annotated[int, typer.Option("--coils", help="Receive coils of the samples.", min=1)] = 8,
    ablation: Annotated[str, typer.Option(help="proposed, or a to i of the paper's section III-D (g1, g2).")] = "proposed",
    start: Annotated[
        str,
        typer.Option(
            help="Images that the iterations begin with: adjoint (as published), llr or refined (need less training)."
        ),
    ] = "adjoint",
    n_iterations: Annotated[
        int, typer.Option("--iterations", help="Of the unrolled network; 0: the ablation's, 5 as published.", min=0)
    ] = 0,
    held: Annotated[
        int, typer.Option(help="Batches made once, with their first images, and used in turn; 0: always new ones.", min=0)
    ] = 0,
    noise_factors: Annotated[
        str, typer.Option(help="On the lambdas, by a sample's noise, end to end: none (as published), fixed or learned.")
    ] = "none",
    prediction: Annotated[
        str,
        typer.Option(
            help="Of the parameter network: direct (as published) or kernel (weights of neighbours; learns sooner)."
        ),
    ] = "direct",
    nonlinear_solver: Annotated[
        str, typer.Option(help="Of the parameters' subproblem: lm, per pixel, or lbfgs, as published.")
    ] = "lm",
    initial: Annotated[
        Path | None, typer.Option(help="JSON of weights to begin with, of the same network; random ones otherwise.")
    ] = None,
    pretrain_networks: Annotated[
        str, typer.Option(help="Which the pretraining teaches: both, parameter or image.")
    ] = "both",
    pretrain_scale: Annotated[float, typer.Option(help="Factor on the pretraining's published rates.", min=1e-6)] = 1.0,
    reuse: Annotated[int, typer.Option(help="Steps of the pretraining with the same samples.", min=1)] = 1,
    rate_spread: Annotated[
        float, typer.Option(help="Largest random factor on all R1 of a sample: other tissue, phantoms.", min=1.0)
    ] = 1.0,
    spread_part: Annotated[float, typer.Option(help="Part of the samples with such a factor.", min=0.0, max=1.0)] = 1.0,
    t1_weight: Annotated[
        float, typer.Option(help="Of the mean absolute error of T1 beside the published loss.", min=0.0)
    ] = 0.0,
    image_weight: Annotated[
        float, typer.Option(help="Of the image network's own error beside the published loss, end to end.", min=0.0)
    ] = 0.0,
    first_weight: Annotated[float, typer.Option(help="Deep supervision: of the first prediction.", min=0.0)] = 0.1,
    other_weight: Annotated[float, typer.Option(help="Of the others but the last.", min=0.0)] = 0.05,
    network_rate: Annotated[float, typer.Option(help="Learning rate of the networks.", min=1e-7)] = 0.004,
    image_rate: Annotated[
        float, typer.Option(help="Of the image network alone, end to end; 0: that of the networks.", min=0.0)
    ] = 0.0,
    lambda_rate: Annotated[float, typer.Option(help="Learning rate of the lambdas.", min=1e-7)] = 0.001,
    embedding_rate: Annotated[float, typer.Option(help="Learning rate of the tags' embedding.", min=1e-7)] = 0.002,
    warmup_steps: Annotated[int, typer.Option(help="Of the learning rate; at most a fifth of the steps.", min=0)] = 1500,
    n_validation: Annotated[int, typer.Option(help="Held-out slices of a validation.", min=0)] = 4,
    brainweb: Annotated[
        Path | None, typer.Option(help="Folder of BrainWeb's heads; without it heads are drawn from a tissue atlas.")
    ] = None,
    atlas: Annotated[
        Path | None, typer.Option(help="Folder nilearn/datasets/data, for the tissue atlas at 1 mm instead of 1.5 mm.")
    ] = None,
    atlas_share: Annotated[
        float, typer.Option(help="Part of the training samples from the atlas although BrainWeb's heads are given.", min=0.0)
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of weights and samples.")] = 0,
    device: Device = "auto",
    precision: Precision = "float32",
    recompute: Annotated[bool, typer.Option("--recompute", help="Less memory, a third more time.")] = False,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Fuse the networks' kernels: a slow start, then faster.")
    ] = False,
    ema_decay: Annotated[
        float, typer.Option("--ema", help="Decay of a moving average of the weights; 0 for none.", min=0.0, max=0.99999)
    ] = 0.0,
    validate_every: ValidateEvery = 250,
    log_every: LogEvery = 1,
    checkpoint_minutes: CheckpointMinutes = 10.0,
    threads: Threads = 0,
) -> None:
    """Train PINQI's networks. Ctrl-C stops after the step in progress; --resume goes on, to the same bits on the same device.

    The same without this package's server side: python -m recon_core.training.pinqi --help
    """
    options = locals() | {"compile": compiled}
    import torch

    from recon_core.training.pinqi import RunSettings, run
    from recon_core.training.pinqi_tasks import PinqiRecipe

    if threads:
        torch.set_num_threads(threads)
    recipe, settings = _made(PinqiRecipe, options), _made(RunSettings, options)
    _check_resumed(output, settings.resume)
    with progress_bars() as progress:
        result, weights = run(recipe, output, settings, PhaseBars(progress))
    _say_ended(result, weights)


@app.command()
def laro(
    output: Annotated[Path, typer.Option(help="Folder for checkpoints, logs, pictures, the masks and the weights.")],
    max_minutes: Annotated[float, typer.Option(help="Stop, resumably, after this time.", min=0.01)] = math.inf,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the training in the folder was stopped.")] = False,
    patterns: Annotated[
        list[str] | None,
        typer.Option(
            "--pattern", help="R/SPO: acceleration and kind of mask (0 hand-made, 1 one, 2 one per echo); repeat. [8/2]"
        ),
    ] = None,
    k1: Annotated[int, typer.Option(help="Phase-encoding positions along k1 (y).", min=8)] = 206,
    k2: Annotated[int, typer.Option(help="Phase-encoding positions along k2 (partitions, z).", min=8)] = 80,
    readout: Annotated[int, typer.Option(help="Readout positions of the training scans.", min=8)] = 200,
    n_echoes: Annotated[int, typer.Option("--echoes", help="Echoes of the training scans, at most.", min=1)] = 10,
    n_coils: Annotated[int, typer.Option("--coils", help="Coils of the training scans.", min=2)] = 8,
    acs_k1: Annotated[int, typer.Option(help="Central block along k1, always sampled.", min=0)] = 20,
    acs_k2: Annotated[int, typer.Option(help="Central block along k2.", min=0)] = 20,
    kind: Annotated[str, typer.Option(help="laro, or the comparator modl.")] = "laro",
    fusion: Annotated[int, typer.Option(help="TFF: 1 recurrent over echoes, 0 not.", min=0, max=1)] = 1,
    direction: Annotated[str, typer.Option(help="Of the recurrence: both or forward.")] = "both",
    channels: Annotated[int, typer.Option(help="Features that are fused.", min=1)] = 64,
    features: Annotated[
        list[int] | None, typer.Option(help="Channels of the denoiser's levels, finest first; repeat. [64 128 256]")
    ] = None,
    first_steps: Annotated[int, typer.Option(help="Phase one: masks and network.", min=0)] = 160_000,
    second_steps: Annotated[int, typer.Option(help="Phase two: the network alone.", min=1)] = 160_000,
    first_unrolls: Annotated[int, typer.Option(help="Iterations in phase one.", min=1)] = 2,
    second_unrolls: Annotated[int, typer.Option(help="Iterations in phase two, and in use.", min=1)] = 10,
    pixel_weight: Annotated[float, typer.Option(help="Of the mean absolute error beside SSIM.", min=0.0)] = 0.0,
    decay_weight: Annotated[
        float, typer.Option(help="Of the decay rate's error beside those; three echoes or more.", min=0.0)
    ] = 0.0,
    network_rate: Annotated[float, typer.Option(help="Learning rate of the network.", min=1e-7)] = 1e-3,
    mask_rate: Annotated[float, typer.Option(help="Learning rate of the masks; 0 leaves them.", min=0.0)] = 0.01,
    warmup_steps: Annotated[int, typer.Option(help="Of the learning rate; at most a fifth of the steps.", min=0)] = 100,
    batch: Annotated[int, typer.Option(help="Planes of one scan per step.", min=1)] = 1,
    mask_start: Annotated[str, typer.Option(help="First probabilities: density or uniform.")] = "density",
    scans: Annotated[
        Path | None,
        typer.Option(
            help="Folder of scans to learn from (docs/laro.md), with --resume the same; simulated heads otherwise."
        ),
    ] = None,
    scans_held: Annotated[int, typer.Option(help="Planes are drawn from so many scans at a time.", min=1)] = 6,
    steps_per_scan: Annotated[int, typer.Option(help="Then the oldest of them is exchanged for a new one.", min=1)] = 80,
    masks: Annotated[Path | None, typer.Option(help="Folder with the masks of an earlier training to go on from.")] = None,
    initial: Annotated[
        Path | None, typer.Option(help="JSON of weights to begin with, of the same network; random ones otherwise.")
    ] = None,
    second_start: Annotated[str, typer.Option(help="First images of phase two: cg_sense, llr or refined.")] = "cg_sense",
    mask_draws: Annotated[
        int, typer.Option(help="Masks drawn of each pattern in phase two, from llr or refined images.", min=1)
    ] = 1,
    measured_held: Annotated[
        int, typer.Option(help="Scans held with their first images, from llr or refined images.", min=1)
    ] = 64,
    n_validation: Annotated[int, typer.Option(help="Held-out scans of a validation.", min=0)] = 1,
    seed: Annotated[int, typer.Option(help="Of weights, masks and samples.")] = 0,
    device: Device = "auto",
    precision: Precision = "float32",
    recompute: Annotated[bool, typer.Option("--recompute", help="Less memory, a third more time.")] = False,
    validate_every: ValidateEvery = 250,
    log_every: LogEvery = 1,
    checkpoint_minutes: CheckpointMinutes = 10.0,
    threads: Threads = 0,
) -> None:
    """Train LARO's masks and network. Ctrl-C stops after the step in progress; --resume goes on, to the same bits.

    The same without this package's server side: python -m recon_core.training.laro --help. Masks alone: recon mask learn.
    """
    options = locals() | {"matrix": (k2, k1, readout), "acs": (acs_k2, acs_k1)}
    import torch

    from recon_core.training.laro import RunSettings, run
    from recon_core.training.laro_tasks import LaroRecipe

    if threads:
        torch.set_num_threads(threads)
    recipe, settings = _made(LaroRecipe, options), _made(RunSettings, options)
    _check_resumed(output, settings.resume)
    with progress_bars() as progress:
        result, weights = run(recipe, output, settings, PhaseBars(progress))
    _say_ended(result, weights)


@app.command()
def laro_scan(
    source: Annotated[list[Path], typer.Argument(help="Fully sampled 3D multi-echo raw data: MRD files or captures.")],
    output: Annotated[Path, typer.Option(help="Folder of scans; what it holds stays.")],
    coils: Annotated[int, typer.Option(help="Virtual coils that are kept.", min=2)] = 8,
    group: Annotated[str, typer.Option(help="Group of the raw data in an MRD file.")] = "dataset",
) -> None:
    """Make training scans of measured data: recon train laro --scans FOLDER learns from three or more of them."""
    from gadgets.outputs import check_folder
    from gadgets.training_scans import convert

    check_folder(output)

    def tell(words: str) -> None:
        out.print(words, markup=False, highlight=False, soft_wrap=True)

    for path in convert(source, output, coils=coils, group=group, tell=tell):
        tell(str(path))
