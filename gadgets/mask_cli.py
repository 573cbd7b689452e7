"""The command ``recon mask``: sampling masks of multi-echo scans, from the density to the sequence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from gadgets.outputs import check_file, check_folder

if TYPE_CHECKING:  # torch takes a second to import: not for --help
    import numpy as np
    from numpy.typing import NDArray

    from gadgets.pulseq_settings import SequenceFacts, SequenceSettings
    from recon_core.sampling.mask_files import SamplingMask

app = typer.Typer(
    name="mask", help="Draw, look at, order and export masks for undersampled multi-echo scans.", no_args_is_help=True
)
out = Console()

ENDINGS = (".h5", ".hdf5", ".csv")
MOST_POSITIONS = 1 << 26
"""Of a mask that is drawn, over all echoes: four hundred times the paper's; probabilities take eight bytes each, several times."""

LARGEST_SEED = (1 << 63) - 1  # a mask's file states it

MaskFile = Annotated[Path, typer.Argument(help="Mask file, .h5 or .csv.")]
K1 = Annotated[int, typer.Option(help="Phase-encoding positions along k1 (y).", min=1)]
K2 = Annotated[int, typer.Option(help="Phase-encoding positions along k2 (partitions, z).", min=1)]
Echoes = Annotated[int, typer.Option(help="Echoes of the train.", min=1)]
Acceleration = Annotated[float, typer.Option(help="Grid positions over samples, central block counted.", min=1.0)]
Segments = Annotated[
    int,
    typer.Option(
        help="The number of samples is rounded up to a multiple of this; down where the grid has not enough positions.",
        min=1,
    ),
]
AcsK1 = Annotated[int, typer.Option(help="Central block along k1, always sampled.", min=0)]
AcsK2 = Annotated[int, typer.Option(help="Central block along k2.", min=0)]


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def draw(
    output: Annotated[Path, typer.Argument(help="File to write, .h5 or .csv.")],
    k1: K1 = 206,
    k2: K2 = 80,
    echoes: Echoes = 10,
    acceleration: Acceleration = 8.0,
    segments: Segments = 11,
    acs_k1: AcsK1 = 20,
    acs_k2: AcsK2 = 20,
    like: Annotated[
        Path | None,
        typer.Option(
            help="Draw from the probabilities in this .h5, interpolated to the matrix. Default: a hand-made density."
        ),
    ] = None,
    per_echo: Annotated[
        bool | None,
        typer.Option("--per-echo/--one-pattern", help="Draw every echo anew. Default: where the probabilities differ."),
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same mask.", min=0, max=LARGEST_SEED)] = 0,
) -> None:
    """Draw a mask with exactly as many samples in every echo as were asked for."""
    import numpy as np

    from recon_core.sampling.learned import interpolate_probability, multilevel_density, samples_for
    from recon_core.sampling.mask_files import read_mask

    check_file(output, *ENDINGS)
    _check_size(k1, k2, echoes)
    shape, acs = (k2, k1), (acs_k2, acs_k1)
    n_samples = samples_for(shape, acceleration, segments)
    if like is None:
        density = multilevel_density(shape, n_samples, acs)
        probability = np.repeat(density[None], echoes, axis=0)
    else:
        probability = interpolate_probability(_probabilities(read_mask(like), like, echoes), shape, n_samples)
    if per_echo is None:
        per_echo = bool((probability != probability[:1]).any())
    facts: dict[str, str | float | int] = {
        "density": "multi-level" if like is None else "learned",
        "patterns": "one per echo" if per_echo else "one",
        "seed": seed,
        "acs_k1": acs_k1,
        "acs_k2": acs_k2,
    }
    _write_draw(output, probability, per_echo, acceleration, segments, acs, facts)


@app.command()
def learn(
    output: Annotated[Path, typer.Argument(help="File to write, .h5: a table has no room for probabilities.")],
    folder: Annotated[
        Path | None, typer.Option(help="Of the training: checkpoints, logs. Default: beside the file.")
    ] = None,
    k1: K1 = 206,
    k2: K2 = 80,
    readout: Annotated[int, typer.Option(help="Readout positions of the training scans.", min=8)] = 200,
    echoes: Echoes = 10,
    coils: Annotated[int, typer.Option(help="Coils of the training scans.", min=1)] = 8,
    acceleration: Acceleration = 8.0,
    segments: Segments = 11,
    acs_k1: AcsK1 = 20,
    acs_k2: AcsK2 = 20,
    per_echo: Annotated[bool, typer.Option("--per-echo/--one-pattern", help="A pattern of its own for each echo.")] = True,
    steps: Annotated[int, typer.Option(help="Of the joint training of mask and network.", min=1)] = 160_000,
    max_minutes: Annotated[float, typer.Option(help="Stop, resumably, after this time.", min=0.01)] = math.inf,
    resume: Annotated[bool, typer.Option("--resume", help="Go on where the training in the folder was stopped.")] = False,
    scans: Annotated[Path | None, typer.Option(help="Folder of scans to learn from; simulated heads otherwise.")] = None,
    features: Annotated[list[int] | None, typer.Option(help="Channels of the network's levels; repeat.")] = None,
    seed: Annotated[int, typer.Option(help="Of the training, and of the draw at its end.", min=0, max=LARGEST_SEED)] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    precision: Annotated[str, typer.Option(help="Of the network: float32 or bfloat16.")] = "float32",
    threads: Annotated[int, typer.Option(help="CPU threads; 0 leaves them to torch.", min=0)] = 0,
) -> None:
    """Learn a mask: LARO's first phase, mask and network together. Ctrl-C stops after the step in progress; --resume goes on.

    The file gets the probabilities and a draw from them, also when the time was too short for all steps.
    """
    from dataclasses import replace

    import torch

    from gadgets.train_cli import PhaseBars, progress_bars
    from recon_core.sampling.learned import SamplingSettings, samples_for
    from recon_core.sampling.mask_files import read_mask
    from recon_core.training.laro import RunSettings, learn_masks
    from recon_core.training.laro_tasks import LaroRecipe

    if threads:
        torch.set_num_threads(threads)
    # before hours of training, not after them: where the mask goes, and that the one that is drawn at the end can be
    check_file(output, ".h5", ".hdf5")
    _check_size(k1, k2, echoes)
    SamplingSettings((k2, k1), echoes, samples_for((k2, k1), acceleration, segments), (acs_k2, acs_k1))
    folder = folder or output.with_suffix(".training")
    check_folder(folder)
    recipe = LaroRecipe(
        patterns=(f"{acceleration:g}/{2 if per_echo else 1}",),
        matrix=(k2, k1, readout),
        n_echoes=echoes,
        n_coils=coils,
        acs=(acs_k2, acs_k1),
        first_steps=steps,
        precision=precision,
        seed=seed,
    )
    if features:
        recipe = replace(recipe, features=tuple(features), channels=features[0])
    settings = RunSettings(
        device=device, max_minutes=max_minutes, resume=resume, scans=None if scans is None else str(scans), validate_every=0
    )
    with progress_bars() as bar:
        result, (learned, *_) = learn_masks(recipe, folder, settings, PhaseBars(bar))
    mask = read_mask(learned)
    assert mask.probability is not None and result is not None
    facts = {**mask.facts, "seed": seed}
    _write_draw(output, mask.probability.astype(float), per_echo, acceleration, segments, (acs_k2, acs_k1), facts)
    _say(f"{'learned' if result.finished else 'stopped, resumable,'} after {result.step} of {steps} steps")


@app.command()
def show(
    file: MaskFile,
    png: Annotated[
        Path | None,
        typer.Option(
            help="Picture: one row per echo with samples, change from the echo before (red: new, blue: gone), probability."
        ),
    ] = None,
) -> None:
    """Print what a mask holds; with --png, draw it."""
    from recon_core.sampling.mask_files import read_mask

    if png is not None:
        check_file(png)
    mask = read_mask(file)
    n_echoes, n_k2, n_k1 = mask.mask.shape
    table = Table(title=f"{n_k1} x {n_k2} (k1 x k2), {n_echoes} echoes, acceleration {mask.acceleration:.3f}")
    for name in ("echo", "samples", "shared with the echo before", "largest jump from it"):
        table.add_column(name, justify="right")
    for echo, pattern in enumerate(mask.mask):
        shared = str(int((pattern & mask.mask[echo - 1]).sum())) if echo else ""
        table.add_row(str(echo), str(int(pattern.sum())), shared, _jump(mask, echo))
    out.print(table)
    n_shots = 0 if mask.order is None else len(mask.order)
    segments = f"ordered: {mask.n_segments} segments x {n_shots // mask.n_segments} = {n_shots} excitations"
    _say(segments if n_shots else "not ordered")
    _say_centre(mask)
    for name, value in mask.facts.items():
        _say(f"{name}: {value}")
    if png is not None:
        from gadgets.mask_pictures import mask_picture
        from recon_core.training.png import write_png

        write_png(png, mask_picture(mask))
        _say(f"written: {png}")


@app.command()
def order(
    file: MaskFile,
    output: Annotated[Path, typer.Argument(help="File to write, .h5 or .csv.")],
    segments: Annotated[int, typer.Option(help="Fan-beam segments of equal size.", min=1)] = 11,
    max_jump: Annotated[
        float | None,
        typer.Option(
            help="Largest jump allowed between consecutive echoes, in grid steps. Default: what the paper's order has."
        ),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Picture of the first echo: darker is acquired earlier in its segment.")
    ] = None,
) -> None:
    """Order the samples for acquisition: fan-beam segments, each from the centre outwards."""
    from dataclasses import replace

    from recon_core.sampling.mask_files import read_mask, write_mask
    from recon_core.sampling.ordering import fan_beam_order

    check_file(output, *ENDINGS)
    if png is not None:
        check_file(png)
    mask = read_mask(file)
    found = fan_beam_order(mask.mask, segments, max_jump=max_jump)
    write_mask(output, replace(mask, order=found.positions, n_segments=segments))
    how = "echoes matched inside the segments" if found.matched else "as in the paper"
    _say(f"{segments} segments x {found.per_segment} = {len(found.positions)} excitations, {how}: {output}")
    d2, d1 = found.largest_step
    _say(f"largest echo-to-echo jump {found.largest_jump:.2f} grid steps (along k1 up to {d1}, along k2 up to {d2})")
    if png is not None:
        from gadgets.mask_pictures import order_picture
        from recon_core.training.png import write_png

        write_png(png, order_picture(replace(mask, order=found.positions, n_segments=segments)))
        _say(f"written: {png}")


@app.command()
def export(
    file: MaskFile,
    seq: Annotated[
        Path | None, typer.Option(help="Pulseq sequence to write, .seq; its MRD header goes beside it (.mrd.xml).")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Table to write, .csv: one line per readout.")] = None,
    h5: Annotated[Path | None, typer.Option(help="HDF5 to write, .h5: of a table, or a copy.")] = None,
    first_echo_ms: Annotated[float, typer.Option(help="First echo time, ms.", min=0.1)] = 4.0,
    echo_spacing_ms: Annotated[float, typer.Option(help="Between echoes, ms.", min=0.1)] = 3.384,
    tr_ms: Annotated[float, typer.Option(help="Repetition time, ms.", min=0.1)] = 40.0,
    flip_angle: Annotated[float, typer.Option(help="Degrees.", min=0.1, max=180.0)] = 15.0,
    matrix: Annotated[int, typer.Option(help="Readout positions.", min=2)] = 256,
    fov_mm: Annotated[tuple[float, float, float], typer.Option(help="Field of view along readout, k1 and k2, mm.")] = (
        256.0,
        206.0,
        160.0,
    ),
    slab_mm: Annotated[
        float | None,
        typer.Option(
            help="Thickness that is excited, mm; beyond the field of view along k2 it folds over. Default: that field of view.",
            min=0.1,
        ),
    ] = None,
    dwell_us: Annotated[float, typer.Option(help="Time of one ADC sample, us.", min=0.1)] = 8.0,
    oversampling: Annotated[int, typer.Option(help="ADC samples per readout position.", min=1)] = 1,
    dummies: Annotated[
        int, typer.Option(help="Excitations before the first readout; 3 s in all let brain tissue settle.", min=0)
    ] = 80,
    noise_readouts: Annotated[int, typer.Option(help="Readouts of noise before the first pulse.", min=0)] = 16,
    max_grad: Annotated[float, typer.Option(help="Largest gradient of one axis, mT/m.", min=1.0)] = 32.0,
    max_slew: Annotated[float, typer.Option(help="Largest slew rate of one axis, T/m/s.", min=1.0)] = 130.0,
    field_strength: Annotated[float, typer.Option(help="T.", min=0.01)] = 3.0,
    pulseq_1_4: Annotated[
        bool, typer.Option("--pulseq-1.4", help="Version 1.4.1 of the file format, for older interpreters, not 1.5.")
    ] = False,
) -> None:
    """Write an ordered mask for the scanner: as a Pulseq sequence of the whole scan, as a table, as HDF5."""
    from recon_core.errors import SettingError
    from recon_core.sampling.mask_files import read_mask, write_mask

    if seq is None and csv is None and h5 is None:
        raise SettingError("nothing to write", where="recon mask export", expected="--seq, --csv, --h5, or several")
    seq, csv, h5 = _named(seq, ".seq"), _named(csv, ".csv"), _named(h5, ".h5")
    if seq is not None:
        from gadgets.mask_check import check_name

        check_name(file)  # the sequence's header states it
        check_file(seq.with_suffix(".mrd.xml"))
    mask = read_mask(file)
    _say_centre(mask)
    for path in (csv, h5):
        if path is not None:
            write_mask(path, mask)
            _say(f"written: {path}")
    if seq is not None:
        from gadgets.pulseq import write_sequence
        from gadgets.pulseq_settings import SequenceSettings

        settings = SequenceSettings(
            matrix_x=matrix,
            fov=(fov_mm[2] * 1e-3, fov_mm[1] * 1e-3, fov_mm[0] * 1e-3),
            echo_times=tuple((first_echo_ms + echo_spacing_ms * n) * 1e-3 for n in range(len(mask.mask))),
            repetition_time=tr_ms * 1e-3,
            flip_angle=math.radians(flip_angle),
            dwell=dwell_us * 1e-6,
            oversampling=oversampling,
            slab_thickness=None if slab_mm is None else slab_mm * 1e-3,
            dummies=dummies,
            noise_readouts=noise_readouts,
            max_grad_mt_m=max_grad,
            max_slew_t_m_s=max_slew,
            field_strength=field_strength,
        )
        facts = write_sequence(seq, mask, settings, mask_name=file.stem, pulseq_1_4=pulseq_1_4)
        times = ", ".join(f"{t * 1e3:.3f}" for t in facts.echo_times)
        sizes = matrix, *mask.mask.shape[:0:-1]
        voxel = " x ".join(f"{length / n:.2f}" for length, n in zip(fov_mm, sizes, strict=True))
        _say(f"{' x '.join(map(str, sizes))} voxels of {voxel} mm (readout, k1, k2), slab of {slab_mm or fov_mm[2]:g} mm")
        _say(
            f"{facts.n_readouts} readouts in {facts.duration:.1f} s, largest gradient {facts.max_grad:.1f} mT/m and slew rate "
            f"{facts.max_slew:.0f} T/m/s (axes together), timing check passed"
        )
        _say(f"TR {facts.repetition_time * 1e3:.3f} ms, echo times {times} ms{_moved(facts, settings)}")
        _say(f"largest echo-to-echo jump {_largest_jump(mask):.2f} grid steps")
        _say(f"written: {seq} and {seq.with_suffix('.mrd.xml')}")


@app.command()
def attach(
    raw: Annotated[Path, typer.Argument(help="Raw data of the scan, MRD (.h5), as the scanner's converter made them.")],
    header: Annotated[Path, typer.Argument(help="The header that was written with the sequence (.mrd.xml).")],
    output: Annotated[Path, typer.Argument(help="Raw data to write, with the sequence's header.")],
    group: Annotated[str, typer.Option(help="Group of the raw data in the file.")] = "dataset",
) -> None:
    """Put the sequence's header into raw data: converters know the protocol's matrix, not the sequence's."""
    from gadgets.pulseq_header import attach_header

    check_file(output)
    _say(attach_header(raw, header, output, group))
    _say(f"written: {output}")


@app.command()
def install(
    file: Annotated[
        Path, typer.Argument(help="Mask file: .h5 or .csv of a sampling mask, .npy of a brain mask (docs/qsm.md).")
    ],
    masks: Annotated[Path | None, typer.Option(help="The server's folder of masks. Default: in the state folder.")] = None,
) -> None:
    """Copy a mask to where the server finds it by the file's name: scans' headers name sampling masks, map_mask_file brain masks.

    It takes the place of a mask of the same name.
    """
    from gadgets.given_masks import ENDING, read_given_mask
    from gadgets.mask_check import ENDINGS, check_name, default_folder, install_mask
    from recon_core.sampling.agreement import pattern_digest
    from recon_core.sampling.mask_files import read_mask

    check_name(file)
    is_given = file.suffix.lower() == ENDING
    if is_given:
        inside = read_given_mask(file)
        facts = f"{' x '.join(map(str, inside.shape))} (z, y, x), {int(inside.sum())} voxels inside"
    else:
        facts = f"sha256 {pattern_digest(read_mask(file).mask)}"
    folder = masks or default_folder()
    check_folder(folder)
    removed = install_mask(file, folder, (ENDING,) if is_given else ENDINGS)
    instead = f", in place of {', '.join(removed)}" if removed else ""
    _say(f"installed as {file.stem!r} in {folder}{instead}, {facts}")


def _largest_jump(mask: SamplingMask) -> float:
    from recon_core.sampling.ordering import jumps

    assert mask.order is not None
    return float(jumps(mask.order).max(initial=0.0))


def _say_centre(mask: SamplingMask) -> None:
    """A table that counts from 1, or another centre than n // 2, mostly shows here first."""
    _, n_k2, n_k1 = mask.mask.shape
    without = [str(echo) for echo, pattern in enumerate(mask.mask) if not pattern[n_k2 // 2, n_k1 // 2]]
    if without:
        _say(f"the centre (k2 {n_k2 // 2}, k1 {n_k1 // 2}, counted from 0) is not sampled in echo {', '.join(without)}")


def _moved(facts: SequenceFacts, settings: SequenceSettings) -> str:
    """Times are whole numbers of 10 us, with equal spacing kept: what that moved."""
    moves = [got - asked for got, asked in zip(facts.echo_times, settings.echo_times, strict=True)]
    largest = max(moves, key=abs)
    return f" (moved to the gradient raster by up to {abs(largest) * 1e6:.0f} us)" if abs(largest) > 1e-7 else ""


def _named(path: Path | None, ending: str) -> Path | None:
    """The file that will be written: the ending may be left out."""
    if path is None:
        return None
    if path.name and not path.is_dir() and path.suffix.lower() in ("", ending):
        path = path.with_suffix(ending)
    check_file(path, ending)
    return path


def _check_size(k1: int, k2: int, echoes: int) -> None:
    from recon_core.errors import SettingError

    if k1 * k2 * echoes > MOST_POSITIONS:
        got = f"{k1} x {k2}, {echoes} echoes"
        raise SettingError(
            "too large a mask", where="recon mask", got=got, expected=f"at most {MOST_POSITIONS} positions in all"
        )


def _write_draw(
    output: Path,
    probability: NDArray[np.float64],
    per_echo: bool,
    acceleration: float,
    segments: int,
    acs: tuple[int, int],
    facts: Mapping[str, str | float | int],
) -> None:
    """A mask of exactly the size that segments need, drawn by ``facts["seed"]``; of one pattern for all echoes, by the first's."""
    import numpy as np

    from recon_core.sampling.learned import draw_mask, samples_for
    from recon_core.sampling.mask_files import SamplingMask, write_mask

    echoes, k2, k1 = probability.shape
    n_samples = samples_for((k2, k1), acceleration, segments)
    drawn_from = probability if per_echo else probability[:1]
    drawn = draw_mask(drawn_from, n_samples, int(facts["seed"]), acs)
    # of one pattern the file states that one for all echoes: a mask that is drawn like it is of one pattern too
    stated = np.broadcast_to(drawn_from, probability.shape).astype(np.float32)
    mask = SamplingMask(np.array(np.broadcast_to(drawn, probability.shape)), stated, facts=facts)
    write_mask(output, mask)
    if n_samples < k2 * k1 / acceleration - 1e-9:
        left = k2 * k1 - n_samples
        _say(f"rounded down to {segments} equal segments: {left} of {k1} x {k2} positions are never sampled")
    _say(f"{n_samples} of {k1} x {k2} positions in each of {echoes} echoes, acceleration {mask.acceleration:.3f}: {output}")


def _probabilities(mask: SamplingMask, file: Path, n_echoes: int) -> NDArray[np.float64]:
    from recon_core.sampling.mask_files import MaskError

    if mask.probability is None:
        raise MaskError("no probabilities in the file", where=file.name, expected="an .h5 written by training or by draw")
    if len(mask.probability) < n_echoes:
        raise MaskError(
            "probabilities for fewer echoes",
            where=file.name,
            got=len(mask.probability),
            expected=n_echoes,
            remedy="use --echoes",
        )
    return mask.probability[:n_echoes].astype(float)


def _jump(mask: SamplingMask, echo: int) -> str:
    from recon_core.sampling.ordering import jumps

    if mask.order is None or not echo:
        return ""
    return f"{jumps(mask.order[:, echo - 1 : echo + 1]).max():.2f}"
