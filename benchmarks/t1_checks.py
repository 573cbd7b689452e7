"""Question: what do the checks of a T1 scan find, what do they not, and do they leave good scans alone?

* Delays whose images are brighter or darker than the others' (`recon_core.maps.saturation`): simulated brains, nine tubes and the measured
  brain, ``llr`` with coil maps estimated from eight lines. T1's error is that of a plain fit, against the fit of the scan as it was.
* What the physics of a scan does to T1 by saturation, and what is said of it: a saturation that leaves something, readout pulses before the
  centre of k-space, delays counted to another moment. Nine tubes, in which T1 is known.
* What differs from place to place (`recon_core.maps.saturation_places`): a saturation that follows B1, and coil maps of too few lines.
  T1's error there, and what is said.
* An object that moved in one state (`recon_core.maps.state_motion`): T1's error against that of the object at rest, and what is said.
* Scans without calibration lines: T1 by coil maps of what all states have together, beside the contrast between those lines.
* Scans with separate calibration lines whose states lack lines at the centre of k-space, beside how many.
* A noise measurement three times too loud, against outer k-space and (``--pinqi``) against the residual of the maps; and one that is
  1000 times too quiet.

    python -m benchmarks.t1_checks --pinqi
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import pinqi_measured
from benchmarks.common import print_table, write_result
from benchmarks.pinqi_methods import Sample
from benchmarks.pinqi_phantom import acquired
from recon_core.errors import ReconError
from recon_core.fourier import fft_centred, ifft_centred
from recon_core.maps.sampled_centre import doubtful_centre, missing_at_centre, missing_centre
from recon_core.maps.saturation import judge_recovery
from recon_core.maps.series_t1 import t1_maps
from recon_core.maps.settings import MapSettings
from recon_core.maps.t1 import T1Maps, molli_t1, saturation_recovery_t1
from recon_core.methods import get_method
from recon_core.problem import noise_scan_excess, noise_scan_lack
from recon_core.reconstruct import Recipe, calibration_contrast, reconstruct
from recon_core.simulation.head_atlas import HeadAtlas
from recon_core.simulation.options import settings_for
from recon_core.simulation.quantitative_brain import QuantitativeBrains, SampleRecipe
from recon_core.simulation.scan import Scan, make_mask, simulate_scan
from recon_core.simulation.tubes import PROTOCOL, compare_tubes
from recon_core.training.pinqi_tasks import EVALUATION_SEED
from recon_core.types import ImageSeries, KSpace, ScanInfo

MATRIX = 96
EXTENT = 24  # calibration lines of a scan without calibration, at most
GAINS: dict[str, tuple[float, ...]] = {
    "as it was": (0, 0, 0, 0, 0),
    "0.5 s +5 %": (0.05, 0, 0, 0, 0),
    "0.5 s -10 %": (-0.1, 0, 0, 0, 0),
    "1.5 s -5 %": (0, 0, -0.05, 0, 0),
    "2 s +10 %": (0, 0, 0, 0.1, 0),
    "8 s +5 %": (0, 0, 0, 0, 0.05),
    "8 s -10 %": (0, 0, 0, 0, -0.1),
    "2 and 8 s +5 %": (0, 0, 0, 0.05, 0.05),
    "drift -5 to +5 %": (-0.05, -0.025, 0, 0.025, 0.05),
    "drift +5 to -5 %": (0.05, 0.025, 0, -0.025, -0.05),
}


def brain(acceleration: float, noise: float) -> tuple[KSpace, ScanInfo]:
    """A held-out simulated brain without its coil maps."""
    recipe = SampleRecipe(size=MATRIX, accelerations=(acceleration,), noise=(noise, noise))
    sample = Sample.of(QuantitativeBrains(HeadAtlas(), recipe, seed=EVALUATION_SEED).batch("test", [1]), recipe)
    return replace(sample.kspace, coil_maps=None), sample.scan


def tubes(acceleration: float, seed: int = 0, **change: Any) -> tuple[Scan, KSpace, ScanInfo]:
    """Nine tubes, six coils."""
    values = {
        **PROTOCOL,
        "matrix_x": MATRIX,
        "matrix_y": MATRIX,
        "acceleration": acceleration,
        "coils": 6,
        "snr": 60.0,
        "seed": seed,
    }
    scan = simulate_scan("satrec", settings_for("satrec", {**values, **change}))
    return scan, *acquired(scan, seed)


def cases() -> dict[str, tuple[KSpace, ScanInfo]]:
    """Good scans."""
    measured = pinqi_measured.truth()
    return {
        **{f"brain {r:g}x, noise {noise:g}": brain(r, noise) for r, noise in ((4.0, 0.003), (6.0, 0.01), (8.0, 0.03))},
        "tubes 4x": tubes(4.0)[1:],
        "measured brain 6x": pinqi_measured.acquired(measured, "brain", 6.0, 0.01, 0),
    }


def images_of(kspace: KSpace, scan: ScanInfo) -> torch.Tensor:
    """``(state, z, y, x)`` by ``llr``."""
    return reconstruct(kspace, scan, Recipe("llr", get_method("llr").Settings())).images[0].data


def gain_rows(name: str, kspace: KSpace, scan: ScanInfo) -> list[list[Any]]:
    """What is found of every entry of `GAINS`, and what T1 makes of it."""
    rows, reference = [], None
    order = sorted(range(len(scan.saturation_times)), key=scan.saturation_times.__getitem__)
    for label, gains in GAINS.items():
        factor = torch.ones(len(order))
        factor[order] += torch.tensor(gains)
        data = kspace.data * factor[:, None, None, None, None]
        acs = None if kspace.acs_mask is None else data.mean(0) * kspace.acs_mask[None, ..., None]
        images = images_of(replace(kspace, data=data, acs=acs), scan)
        maps = saturation_recovery_t1(images, scan.saturation_times)
        valid = maps.t1.valid
        assert maps.m0_phase is not None
        m0 = torch.polar(maps.m0.data[valid], maps.m0_phase.data[valid])
        judged = judge_recovery(images[:, valid], m0, maps.t1.data[valid], scan.saturation_times)
        reference = maps if reference is None else reference
        both = valid & reference.t1.valid
        error = (maps.t1.data[both] / reference.t1.data[both] - 1).numpy()
        best = judged.likely[0]
        unit = 1000 if best.shifted else 100
        found = "delays, ms" if best.shifted else "M0 left" if best.delay is None else f"{best.delay:g} s"
        rows.append([
            name, label, found, f"{unit * best.size:+.1f}", f"{100 * best.effect:.2f}", f"{100 * judged.shared:.2f}",
            "no map" if judged.forbids_map else "told" if judged.note else "-",
            f"{100 * np.median(error):+.0f}", f"{100 * np.quantile(np.abs(error), 0.75):.0f}",
        ])  # fmt: skip
    return rows


PHYSICS: dict[str, tuple[dict[str, Any], float]] = {
    "as it should be": ({}, 0.0),
    **{f"{100 * left:g} % of M0 left": ({"saturation_left": left}, 0.0) for left in (0.02, 0.05, 0.1)},
    **{f"{n} pulses of 6 deg": ({"pulses_before_centre": n}, 0.0) for n in (3, 6, 12, 24)},
    "12 pulses, counted to the centre": ({"pulses_before_centre": 12}, 0.072),
    "24 pulses, counted to the centre": ({"pulses_before_centre": 24}, 0.144),
    **{f"delays {1e3 * d:+g} ms": ({}, d) for d in (-0.05, -0.02, -0.01, 0.01, 0.02, 0.05)},
}
"""Settings of the simulation, and by how much the delays of the header are longer than those to the first pulse, s."""


def physics_rows() -> list[list[Any]]:
    """How far the tubes are off by ``llr`` with a fit, shortest T1, median and longest, and what is said."""
    rows = []
    settings = MapSettings(maps="t1", map_model="saturation_recovery", map_delays="tell")
    for label, (change, later) in PHYSICS.items():
        real = [float(t) - later for t in PROTOCOL["delays"].split(",")]
        scan, kspace, info = tubes(4.0, delays=",".join(f"{t:g}" for t in real), **change)
        stated = replace(info, saturation_times=tuple(t + later for t in info.saturation_times))
        images = ImageSeries("image", images_of(kspace, stated))
        strict = replace(settings, map_delays="require")
        found = t1_maps(images, stated, None, settings)
        try:
            verdict = "told" if any("T1 is" in note for note in t1_maps(images, stated, None, strict).notes) else "-"
        except ReconError:
            verdict = "no map"
        t1 = found.maps[0]
        relative = compare_tubes(t1.data[0].numpy(), scan.truth.labels[0, 0, 0], t1.valid[0].numpy()).relative
        off = [f"{100 * value:+.1f}" for value in (relative[0], np.nanmedian(relative), relative[-1])]
        said = next((note for note in found.notes if "T1 is" in note), "")
        rows.append([label, *off, verdict, said.partition(" (")[0] + said.partition(" (median)")[2].partition(" (")[0]])
    return rows


SLOPES = (0.0, 0.05, 0.1, 0.15)
"""By how much more of M0 is left at one edge of the field of view than in the middle, and less at the other."""


def place_row(name: str, kspace: KSpace, scan: ScanInfo, truth: NDArray[Any], inside: NDArray[np.bool_]) -> list[Any]:
    """T1 by ``llr`` with a fit: error in all pixels ``inside``, of which a quarter and a twentieth is further off, and what is said."""
    settings = MapSettings(maps="t1", map_model="saturation_recovery", map_delays="tell")
    found = t1_maps(ImageSeries("image", images_of(kspace, scan)), scan, None, settings)
    t1 = found.maps[0]
    seen = inside & t1.valid[0].numpy()
    error = np.abs(t1.data[0].numpy()[seen] / truth[seen] - 1)
    off = [f"{100 * np.quantile(error, part):.0f}" for part in (0.5, 0.75, 0.95)]
    said = next((note for note in found.notes if "from place to place" in note), "")
    return [name, *off, said.partition(" from place")[0].rpartition("T1: ")[2]]


def place_rows() -> list[list[Any]]:
    """Tubes and a brain whose saturation varies along y; heads by coil maps of eight lines, and by the true ones."""
    rows = []
    for phantom in ("tubes", "auto"):
        for slope in SLOPES:
            scan, kspace, info = tubes(4.0, phantom=phantom, saturation_slope=slope, fov_x=0.23, fov_y=0.23)
            name = f"{'brain' if phantom == 'auto' else phantom}, slope {slope:g}"
            rows.append(place_row(name, kspace, info, scan.truth.maps["t1"][0, 0], scan.truth.interior[0, 0]))
    for acceleration, noise in ((4.0, 0.003), (6.0, 0.01)):
        recipe = SampleRecipe(size=MATRIX, accelerations=(acceleration,), noise=(noise, noise))
        for index in (1, 5):
            batch = QuantitativeBrains(HeadAtlas(), recipe, seed=EVALUATION_SEED).batch("test", [index])
            sample = Sample.of(batch, recipe)
            for maps, kspace in (("of eight lines", replace(sample.kspace, coil_maps=None)), ("true", sample.kspace)):
                name = f"head {index}, {acceleration:g}x, coil maps {maps}"
                rows.append(place_row(name, kspace, sample.scan, batch.t1[0].numpy(), batch.brain[0].numpy()))
    return rows


MOVES: tuple[tuple[int, float, float], ...] = ((-1, 2, 0), (-1, 0, 1), (-1, 0.5, 0), (2, 2, 0), (0, 0, 2), (0, 1, 0))
"""Which state, in order of times, and by how many pixels along y and x."""


def moved(kspace: KSpace, state: int, dy: float, dx: float) -> KSpace:
    """The object (and its coils) of one state elsewhere."""
    data = kspace.data.clone()
    one = fft_centred(data[state], -1)
    for axis, pixels in ((-2, dy), (-1, dx)):
        n = one.shape[axis]
        ramp = torch.exp(-2j * math.pi * pixels * (torch.arange(n) - n // 2) / n)
        one = one * (ramp if axis == -1 else ramp[:, None])
    data[state] = ifft_centred(one, -1)
    return replace(
        kspace, data=data, acs=None if kspace.acs_mask is None else data.mean(0) * kspace.acs_mask[None, ..., None]
    )


def motion_cases() -> dict[str, tuple[str, KSpace, ScanInfo]]:
    """Brains, tubes, and a heart by MOLLI 5(3)3."""
    saturated = {name: ("saturation_recovery", *case) for name, case in cases().items()}
    values = {"matrix_x": MATRIX, "matrix_y": MATRIX, "coils": 6, "snr": 60.0, "mask": "random"}
    for r in (3.0, 6.0):
        scan = simulate_scan("molli", settings_for("molli", {**values, "acceleration": r}))
        kspace, info = acquired(scan, 0)
        info = replace(info, saturation_times=(), inversion_times=tuple(scan.truth.states))
        saturated[f"MOLLI {r:g}x"] = ("molli", kspace, info)
    return saturated


def motion_rows() -> list[list[Any]]:
    """What is said of an object at rest, and of one that is elsewhere in one state."""
    rows: list[list[Any]] = []
    for name, (model, kspace, info) in motion_cases().items():
        settings, rest = MapSettings(maps="t1", map_model=model, map_delays="tell"), None
        times = info.saturation_times or info.inversion_times
        order = sorted(range(len(times)), key=times.__getitem__)
        for move in (None, *MOVES):
            data = kspace if move is None else moved(kspace, order[move[0]], *move[1:])
            found = t1_maps(ImageSeries("image", images_of(data, info)), info, None, settings)
            t1 = found.maps[0]
            rest = t1 if rest is None else rest
            both = t1.valid & rest.valid
            error = (t1.data[both] / rest.data[both] - 1).abs().numpy()
            off = [f"{100 * np.quantile(error, part):.0f}" for part in (0.5, 0.75, 0.95)]
            said = next((note for note in found.notes if "seems to have moved" in note), "").partition("moved ")[2]
            label = "-" if move is None else f"{times[order[move[0]]]:g} s: {move[1]:g}, {move[2]:g}"
            rows.append([name, label, *off, re.sub(": T1 is wrong.*pixels by", "; a quarter by", said)])
    return rows


def without_calibration(kspace: KSpace) -> KSpace:
    """Calibrated as the server would: the centre that the states sample together, each line the mean of the states that have it."""
    counts = kspace.counts.sum(0)
    sampled = (counts[0] > 0).tolist()
    first = last = len(sampled) // 2
    for _ in range(EXTENT // 2):
        first -= first > 0 and sampled[first - 1] and last - first + 1 < EXTENT
        last += last + 1 < len(sampled) and sampled[last + 1] and last - first + 1 < EXTENT
    mask = torch.zeros_like(counts, dtype=torch.bool)
    mask[0, first : last + 1] = True
    acs = kspace.data.sum(0) / counts.clamp_min(1)[None, ..., None] * mask[None, ..., None]
    return replace(kspace, acs=acs, acs_mask=mask, acs_states=kspace.mask & mask)


def calibration_row(kind: str, scan: Scan, kspace: KSpace, info: ScanInfo, label: str) -> list[Any]:
    """Contrast of the calibration lines, and the worst tube or tissue."""
    kspace = without_calibration(kspace)
    assert kspace.acs_states is not None
    times = info.saturation_times or info.inversion_times
    contrast = calibration_contrast(kspace.acs_states, times, inverted=kind == "molli")
    fit: Callable[[torch.Tensor, Sequence[float]], T1Maps] = molli_t1 if kind == "molli" else saturation_recovery_t1
    try:
        t1 = fit(images_of(kspace, info), times).t1
    except ReconError as error:
        return [kind, label, f"{contrast:.3f}", str(error), ""]
    values, valid = t1.data[0].numpy(), t1.valid[0].numpy()
    if kind == "satrec":
        relative = compare_tubes(values, scan.truth.labels[0, 0, 0], valid).relative
    else:
        truth, inside = scan.truth.maps["t1"][0, 0], scan.truth.interior[0, 0] & valid
        labels: NDArray[Any] = scan.truth.labels[0, 0, 0]
        relative = np.array([np.median((values / truth - 1)[inside & (labels == n)]) for n in np.unique(labels[inside])])
    return [
        kind,
        label,
        f"{contrast:.3f}",
        f"{100 * np.nanmax(np.abs(relative)):.0f}",
        f"{100 * np.nanmedian(np.abs(relative)):.0f}",
    ]


def calibration_rows() -> list[list[Any]]:
    """Random and interleaved lines, delays in several orders; MOLLI 5(3)3."""
    rows = []
    none: dict[str, Any] = {"calibration": "none", "acs": 0}
    regular: dict[str, Any] = {"mask": "uniform", "interleaved": True}
    for r, delays in ((2.0, "0.5,1,1.5,2,8"), (2.0, "0.5,1,1.5,8,2"), (2.0, "0.5,8,1,2,1.5"), (3.0, "0.5,1,1.5,2,8")):
        scan, kspace, info = tubes(r, **none, **regular, delays=delays)
        rows.append(calibration_row("satrec", scan, kspace, info, f"{r:g}x interleaved, {delays}"))
    for r in (2.0, 3.0, 4.0):
        for seed in (1, 2):
            scan, kspace, info = tubes(r, seed, **none)
            rows.append(calibration_row("satrec", scan, kspace, info, f"{r:g}x random, seed {seed}"))
    for r, mask in ((2.0, regular), (2.0, {"mask": "random"}), (3.0, {"mask": "random"}), (3.0, regular)):
        values = {"matrix_x": MATRIX, "matrix_y": MATRIX, "acceleration": r, "coils": 6, "snr": 60.0, **none, **mask}
        scan = simulate_scan("molli", settings_for("molli", values))
        kspace, info = acquired(scan, 0)
        info = replace(info, saturation_times=(), inversion_times=tuple(scan.truth.states))
        rows.append(calibration_row("molli", scan, kspace, info, f"{r:g}x {mask['mask']}"))
    return rows


def centre_row(scan: Scan, n_coils: int, pattern: dict[str, Any], seed: int) -> list[Any]:
    """The worst tube of a saturation recovery with coil maps of all central lines of the longest delay, which the images may lack."""
    complete, info = acquired(replace(scan, truth=replace(scan.truth, mask=np.ones_like(scan.truth.mask))), seed)
    values = {"calibration": "separate", **pattern}
    settings = replace(scan.settings, **values)
    mask = torch.from_numpy(make_mask(settings, np.random.default_rng(seed), complete.n_states)[0])
    acs_mask = torch.zeros_like(mask[0])
    middle = mask.shape[-1] // 2
    acs_mask[0, middle - EXTENT // 2 : middle + EXTENT // 2] = True
    acs = complete.data[-1] * acs_mask[None, ..., None]
    kspace = replace(
        complete, data=complete.data * mask[:, None, ..., None], counts=mask.float(), acs=acs, acs_mask=acs_mask
    )
    missing = missing_at_centre(mask)
    label = f"{pattern['acceleration']:g}x {pattern['mask']}{', interleaved' if pattern.get('interleaved') else ''}"
    if missing_centre(kspace.mask, n_coils, "saturation", label) is not None:
        verdict = "no map"
    else:
        verdict = "told" if doubtful_centre(kspace.mask) else "-"
    try:
        images = ImageSeries("image", images_of(kspace, info))
        t1, *_ = t1_maps(images, info, None, MapSettings(maps="t1", map_model="saturation_recovery")).maps
    except ReconError as error:
        return [n_coils, label, seed, max(missing), verdict, "no map", str(error).split(";")[1]]
    relative = compare_tubes(t1.data[0].numpy(), scan.truth.labels[0, 0, 0], t1.valid[0].numpy()).relative
    return [n_coils, label, seed, max(missing), verdict, f"{100 * np.nanmax(np.abs(relative)):.0f}", ""]


def centre_rows() -> list[list[Any]]:
    """One, four and eight coils; random lines and regular ones."""
    rows = []
    for n_coils, accelerations in ((1, (2.0, 3.0)), (4, (4.0, 6.0)), (8, (6.0, 8.0))):
        scan = tubes(1.0, mask="full", coils=n_coils)[0]
        random = [({"mask": "random", "acceleration": r, "acs": 8}, seed) for r in accelerations for seed in range(5)]
        regular = [
            ({"mask": "uniform", "acceleration": r, "acs": 8, "interleaved": i}, 0)
            for r in (2.0, 3.0, 4.0)
            for i in (False, True)
        ]
        rows += [centre_row(scan, n_coils, pattern, seed) for pattern, seed in (*random, *regular)]
    return rows


def noise_row(name: str, kspace: KSpace, scan: ScanInfo, pinqi: bool) -> list[Any]:
    """The noise measurement over outer k-space, and PINQI's residual over it, as it is and three times too loud."""
    row: list[Any] = [name]
    for louder in (1.0, 3.0):
        assert kspace.noise_std is not None
        loud = replace(kspace, noise_std=louder * kspace.noise_std)
        row.append(f"{noise_scan_excess(loud):.2f}")
        if pinqi:
            recipe = Recipe("pinqi", get_method("pinqi").Settings(), maps=MapSettings())
            row.append(f"{reconstruct(loud, scan, recipe).quality['residual_maps']:.2f}")
    for quieter in (1.0, 1000.0):
        assert kspace.noise_std is not None
        row.append(f"{noise_scan_lack(replace(kspace, noise_std=kspace.noise_std / quieter)):.2f}")
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pinqi", action="store_true", help="the residual of PINQI's maps as well; slower")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    good = cases()
    gains = [row for name, (kspace, scan) in good.items() for row in gain_rows(name, kspace, scan)]
    gain_columns = ["scan", "gain", "found", "size %", "effect %", "shared %", "verdict", "T1 off %", "a quarter, %"]
    print_table("delays that are brighter or darker; effect and shared: of M0", gain_columns, gains)
    physics = physics_rows()
    physics_columns = ["the scan", "T1 off %, 0.28 s", "median", "1.76 s", "verdict", "said"]
    print_table("what a scan's physics does to T1 of nine tubes", physics_columns, physics)
    places = place_rows()
    place_columns = ["the scan", "T1 off %, median", "a quarter", "a twentieth", "said"]
    print_table("what differs from place to place", place_columns, places)
    motion = motion_rows()
    motion_columns = ["the scan", "moved: pixels along y, x", "T1 off %, median", "a quarter", "a twentieth", "said: moved"]
    print_table("an object that moved in one state", motion_columns, motion)
    calibration = calibration_rows()
    calibration_columns = ["kind", "lines", "contrast", "T1 off %, worst", "median"]
    print_table("without calibration lines", calibration_columns, calibration)
    centre = centre_rows()
    centre_columns = ["coils", "lines", "seed", "missing at the centre", "centre", "worst tube %", "delays"]
    print_table("with separate calibration lines, and gaps at the centre of k-space", centre_columns, centre)
    noise = [noise_row(name, kspace, scan, options.pinqi) for name, (kspace, scan) in good.items()]
    per = ["over outer", "residual"] if options.pinqi else ["over outer"]
    noise_columns = ["scan", *(f"{text} {times}" for times in ("1x", "3x") for text in per), "quieter 1x", "1/1000"]
    print_table("noise measurement", noise_columns, noise)
    tables = {
        "gains": gains,
        "physics": physics,
        "places": places,
        "motion": motion,
        "calibration": calibration,
        "centre": centre,
        "noise": noise,
    }
    columns = {
        "gains": gain_columns,
        "physics": physics_columns,
        "places": place_columns,
        "motion": motion_columns,
        "calibration": calibration_columns,
        "centre": centre_columns,
        "noise": noise_columns,
    }
    write_result("t1_checks", {"settings": vars(options), "columns": columns, "rows": tables})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
