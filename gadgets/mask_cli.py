"""The command ``recon mask``: sampling masks of multi-echo scans, from the density to the sequence."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:  # torch takes a second to import: not for --help
    import numpy as np
    from numpy.typing import NDArray

    from recon_core.sampling.mask_files import SamplingMask

app = typer.Typer(
    name="mask", help="Draw, look at, order and export masks for undersampled multi-echo scans.", no_args_is_help=True
)
out = Console()

MaskFile = Annotated[Path, typer.Argument(help="Mask file, .h5 or .csv.")]


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)


@app.command()
def draw(
    output: Annotated[Path, typer.Argument(help="File to write, .h5 or .csv.")],
    k1: Annotated[int, typer.Option(help="Phase-encoding positions along k1 (y).", min=1)] = 206,
    k2: Annotated[int, typer.Option(help="Phase-encoding positions along k2 (partitions, z).", min=1)] = 80,
    echoes: Annotated[int, typer.Option(help="Echoes of the train.", min=1)] = 10,
    acceleration: Annotated[float, typer.Option(help="Grid positions over samples, central block counted.", min=1.0)] = 8.0,
    segments: Annotated[int, typer.Option(help="The number of samples is rounded up to a multiple of this.", min=1)] = 11,
    acs_k1: Annotated[int, typer.Option(help="Central block along k1, always sampled.", min=0)] = 20,
    acs_k2: Annotated[int, typer.Option(help="Central block along k2.", min=0)] = 20,
    like: Annotated[
        Path | None,
        typer.Option(help="Draw from the probabilities in this .h5, interpolated to the matrix. [hand-made density]"),
    ] = None,
    per_echo: Annotated[
        bool | None, typer.Option("--per-echo/--one-pattern", help="Draw every echo anew. [where the probabilities differ]")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same mask.", min=0)] = 0,
) -> None:
    """Draw a mask with exactly as many samples in every echo as were asked for."""
    import numpy as np

    from recon_core.sampling.learned import draw_mask, interpolate_probability, multilevel_density, samples_for
    from recon_core.sampling.mask_files import SamplingMask, read_mask, write_mask

    shape, acs = (k2, k1), (acs_k2, acs_k1)
    n_samples = samples_for(shape, acceleration, segments)
    if like is None:
        density = multilevel_density(shape, n_samples, acs)
        probability = np.repeat(density[None], echoes, axis=0)
    else:
        probability = interpolate_probability(_probabilities(read_mask(like), like, echoes), shape, n_samples)
    if per_echo is None:
        per_echo = bool((probability != probability[:1]).any())
    drawn = draw_mask(probability if per_echo else probability[:1], n_samples, seed, acs)
    facts: dict[str, str | float | int] = {
        "density": "multi-level" if like is None else "learned",
        "patterns": "one per echo" if per_echo else "one",
        "seed": seed,
        "acs_k1": acs_k1,
        "acs_k2": acs_k2,
    }
    mask = SamplingMask(np.array(np.broadcast_to(drawn, probability.shape)), probability.astype(np.float32), facts=facts)
    write_mask(output, mask)
    _say(f"{n_samples} of {k1} x {k2} positions in each of {echoes} echoes, acceleration {mask.acceleration:.3f}: {output}")


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

    mask = read_mask(file)
    n_echoes, n_k2, n_k1 = mask.mask.shape
    table = Table(title=f"{n_k1} x {n_k2} (k1 x k2), {n_echoes} echoes, acceleration {mask.acceleration:.3f}")
    for name in ("echo", "samples", "shared with the echo before", "largest jump from it"):
        table.add_column(name, justify="right")
    for echo, pattern in enumerate(mask.mask):
        shared = str(int((pattern & mask.mask[echo - 1]).sum())) if echo else ""
        table.add_row(str(echo), str(int(pattern.sum())), shared, _jump(mask, echo))
    out.print(table)
    for name, value in mask.facts.items():
        _say(f"{name}: {value}")
    if png is not None:
        from recon_core.training.png import write_png

        write_png(png, _picture(mask))
        _say(f"written: {png}")


@app.command()
def order(
    file: MaskFile,
    output: Annotated[Path, typer.Argument(help="File to write, .h5 or .csv.")],
    segments: Annotated[int, typer.Option(help="Fan-beam segments of equal size.", min=1)] = 11,
    max_jump: Annotated[
        float | None,
        typer.Option(help="Largest jump allowed between consecutive echoes, in grid steps. [as the paper's order has it]"),
    ] = None,
    png: Annotated[
        Path | None, typer.Option(help="Picture of the first echo: darker is acquired earlier in its segment.")
    ] = None,
) -> None:
    """Order the samples for acquisition: fan-beam segments, each from the centre outwards."""
    from dataclasses import replace

    from recon_core.sampling.mask_files import read_mask, write_mask
    from recon_core.sampling.ordering import fan_beam_order

    mask = read_mask(file)
    found = fan_beam_order(mask.mask, segments, max_jump=max_jump)
    write_mask(output, replace(mask, order=found.positions, n_segments=segments))
    how = "echoes matched inside the segments" if found.matched else "as in the paper"
    _say(f"{segments} segments x {found.per_segment} = {len(found.positions)} excitations, {how}: {output}")
    d2, d1 = found.largest_step
    _say(f"largest echo-to-echo jump {found.largest_jump:.2f} grid steps (along k1 up to {d1}, along k2 up to {d2})")
    if png is not None:
        from recon_core.training.png import write_png

        write_png(png, _order_picture(replace(mask, order=found.positions, n_segments=segments)))
        _say(f"written: {png}")


@app.command()
def export(
    file: MaskFile,
    seq: Annotated[
        Path | None, typer.Option(help="Pulseq sequence to write; its MRD header goes beside it (.mrd.xml).")
    ] = None,
    csv: Annotated[Path | None, typer.Option(help="Table to write: one line per readout.")] = None,
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
    dwell_us: Annotated[float, typer.Option(help="Time of one ADC sample, us.", min=0.1)] = 8.0,
    oversampling: Annotated[int, typer.Option(help="ADC samples per readout position.", min=1)] = 1,
    dummies: Annotated[int, typer.Option(help="Excitations before the first readout.", min=0)] = 20,
    field_strength: Annotated[float, typer.Option(help="T.", min=0.01)] = 3.0,
) -> None:
    """Write an ordered mask for the scanner: as a Pulseq sequence of the whole scan, as a table, or both."""
    from recon_core.errors import SettingError
    from recon_core.sampling.mask_files import read_mask, write_mask

    if seq is None and csv is None:
        raise SettingError("nothing to write", where="recon mask export", expected="--seq, --csv or both")
    mask = read_mask(file)
    if csv is not None:
        write_mask(csv.with_suffix(".csv"), mask)
        _say(f"written: {csv.with_suffix('.csv')}")
    if seq is not None:
        from gadgets.pulseq import SequenceSettings, write_sequence

        settings = SequenceSettings(
            matrix_x=matrix,
            fov=(fov_mm[2] * 1e-3, fov_mm[1] * 1e-3, fov_mm[0] * 1e-3),
            echo_times=tuple((first_echo_ms + echo_spacing_ms * n) * 1e-3 for n in range(len(mask.mask))),
            repetition_time=tr_ms * 1e-3,
            flip_angle=math.radians(flip_angle),
            dwell=dwell_us * 1e-6,
            oversampling=oversampling,
            dummies=dummies,
            field_strength=field_strength,
        )
        facts = write_sequence(seq, mask, settings)
        times = ", ".join(f"{t * 1e3:.3f}" for t in facts.echo_times)
        _say(f"{facts.n_readouts} readouts in {facts.duration:.1f} s, echo times {times} ms, timing check passed")
        _say(f"written: {seq} and {seq.with_suffix('.mrd.xml')}")


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


def _picture(mask: SamplingMask) -> NDArray[np.float64]:
    """RGB ``(y, x, 3)`` in [0, 1]: rows are echoes; k2 downwards, k1 to the right."""
    import numpy as np

    rows = []
    for echo, pattern in enumerate(mask.mask):
        before = mask.mask[echo - 1] if echo else pattern
        shared = 0.25 * (pattern & before)
        change = np.stack([np.maximum(pattern & ~before, shared), shared, np.maximum(before & ~pattern, shared)], axis=-1)
        tiles = [np.repeat(pattern[..., None].astype(float), 3, axis=-1), change]
        if mask.probability is not None:
            tiles.append(np.repeat(mask.probability[echo][..., None].astype(float), 3, axis=-1))
        rows.append(np.concatenate([np.pad(tile, ((2, 2), (2, 2), (0, 0)), constant_values=0.5) for tile in tiles], axis=1))
    return _enlarged(np.concatenate(rows))


def _order_picture(mask: SamplingMask) -> NDArray[np.float64]:
    import numpy as np

    assert mask.order is not None
    rank = np.arange(len(mask.order)) % (len(mask.order) // mask.n_segments)
    segment = np.arange(len(mask.order)) // (len(mask.order) // mask.n_segments)
    grey = 0.25 + 0.75 * rank / max(1, rank.max())
    picture = np.zeros((*mask.mask.shape[1:], 3))
    first = mask.order[:, 0]
    # neighbouring segments differ in tint, so that their borders can be seen
    tints = np.array([[1.0, 1.0, 1.0], [1.0, 0.75, 0.4], [0.45, 0.8, 1.0]])
    picture[first[:, 0], first[:, 1]] = grey[:, None] * tints[segment % 3]
    return _enlarged(picture)


def _enlarged(picture: NDArray[np.float64]) -> NDArray[np.float64]:
    """Every position at least three pixels wide, since a viewer would blur single ones."""
    return picture.repeat(3, axis=0).repeat(3, axis=1)
