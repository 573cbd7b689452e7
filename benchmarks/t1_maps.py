"""Question: are T1 maps right, is their standard deviation the real spread, and what does a pixel cost?

Simulated series have a known truth (noise 1 % of the equilibrium signal in each real number). The phantom's reference is the map
that came with its images; a tube is a disc of 5 pixels radius. Kidney and brain have no reference: the kidney's figures are those
of three regions, the brain's are compared with scipy's solver, started from 12 T1 values for every sign pattern.

The tables of chains ask the same behind a reconstruction of undersampled k-space (simulated, and the phantom semi-measured): error of
T1 against the fit of the noise-free complete images, and whether the claimed deviation covers it, with the data's noise and with
the fit's residual alone.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.io import loadmat
from scipy.optimize import least_squares

from benchmarks.common import print_table, write_result
from benchmarks.dynamic_cells import NOISES, Cell, make_cell
from recon_core.maps.series_t1 import t1_maps
from recon_core.maps.settings import MapSettings
from recon_core.maps.t1 import T1Maps, inversion_recovery_t1, molli_t1, saturation_recovery_t1
from recon_core.methods import get_method
from recon_core.reconstruct import Recipe, reconstruct
from recon_core.settings import describe, parse_settings
from recon_core.signal_models import SaturationRecovery
from recon_core.solvers.least_squares import levenberg_marquardt
from tests.recon_core.molli_phantom import TUBES

DATA = Path(__file__).parent.parent / "tests" / "data" / "molli"
MOLLI_TIMES = (0.12, 1.12, 2.12, 3.12, 4.12, 0.20, 1.20, 2.20)
SATURATION_TIMES = (0.5, 1.0, 1.5, 2.0, 8.0)
T1S = (0.3, 0.6, 1.0, 1.5, 2.0)
NOISE, SHORTENING = 0.01, 0.8
KIDNEY_REGIONS = {  # slice, rows, columns
    "kidney 1, lateral": (0, slice(105, 130), slice(69, 80)),
    "kidney 2, lower pole": (0, slice(130, 140), slice(158, 172)),
    "psoas muscle": (0, slice(140, 158), slice(142, 148)),
}

Array = NDArray[np.float64]


def simulated(repeats: int) -> list[list[Any]]:
    """T1 in ms; deviation of the mean in %; claimed SD (root mean square) over the spread."""
    generator = torch.Generator().manual_seed(11)
    t1 = torch.tensor(T1S, dtype=torch.float64)[None, :, None].expand(1, len(T1S), repeats)
    ti, tau = (torch.tensor(t, dtype=torch.float64)[:, None, None, None] for t in (MOLLI_TIMES, SATURATION_TIMES))
    molli = SHORTENING - (1 + SHORTENING) * torch.exp(-ti / (SHORTENING * t1))
    saturation = 1 - torch.exp(-tau / t1)
    fits: dict[str, tuple[torch.Tensor, Callable[..., T1Maps], tuple[float, ...]]] = {
        "MOLLI": (molli, molli_t1, MOLLI_TIMES),
        "saturation": (saturation, saturation_recovery_t1, SATURATION_TIMES),
    }
    rows: list[list[Any]] = []
    for name, (signal, fit, times) in fits.items():
        parts = [torch.randn(signal.shape, generator=generator, dtype=torch.float64) for _ in range(2)]
        images = signal * complex(0.6, 0.8) + NOISE * torch.complex(*parts)
        for kind, series in (("complex", images.to(torch.complex64)), ("magnitude", images.abs().float())):
            for noise in (None, NOISE):
                maps = fit(series, times, noise_std=noise)
                for i, truth in enumerate(T1S):
                    valid = maps.t1.valid[0, i]
                    found, claimed = (m.data[0, i][valid].double() for m in (maps.t1, maps.t1_sd))
                    bias = 100 * (float(found.mean()) / truth - 1)
                    ratio = float(claimed.square().mean().sqrt() / found.std())
                    share = 100 * float(valid.double().mean())
                    source = "residual" if noise is None else "known"
                    spread = 1000 * float(found.std())
                    rows.append(
                        [
                            name,
                            kind,
                            source,
                            1000 * truth,
                            round(bias, 3),
                            round(spread, 2),
                            round(ratio, 3),
                            round(share, 2),
                        ]
                    )
    return rows


def phantom(path: Path) -> list[list[Any]]:
    """Mean T1 of every tube against the reference, ms."""
    mat = loadmat(path)
    series, reference = mat["MOLLIT1wTI"][0, 0], mat["MOLLIoffLineT1Map"][0]
    maps = molli_t1(torch.tensor(series[:5])[:, None], series[5:, 0, 0].tolist())
    rows: list[list[Any]] = []
    for number, (y, x) in enumerate(TUBES, 1):
        roi = np.hypot(*np.ogrid[-y : series.shape[1] - y, -x : series.shape[2] - x]) <= 5
        found, expected = (1000 * float(m[roi].mean()) for m in (maps.t1.data[0].numpy(), reference))
        sd = 1000 * float(np.median(maps.t1_sd.data[0].numpy()[roi]))
        share = 100 * float(maps.t1.valid[0].numpy()[roi].mean())
        rows.append(
            [number, round(expected, 1), round(found, 1), round(100 * (found / expected - 1), 2), round(sd, 1), share]
        )
    return rows


def kidney(path: Path) -> list[list[Any]]:
    """Median T1, its quartiles and median SD of three regions, ms."""
    series = np.load(path)
    images = torch.tensor(series["image"].astype(np.float32)).permute(1, 0, 2, 3)
    maps = molli_t1(images, (series["inversion_time_ms"] / 1000).tolist())
    rows: list[list[Any]] = []
    for name, region in KIDNEY_REGIONS.items():
        valid = maps.t1.valid[region].numpy()
        t1, sd = (1000 * m.data[region].numpy()[valid] for m in (maps.t1, maps.t1_sd))
        rows.append(
            [
                name,
                *(round(float(v)) for v in np.percentile(t1, (50, 25, 75))),
                round(float(np.median(sd))),
                round(100 * valid.mean(), 1),
            ]
        )
    return rows


def scipy_t1(signal: Array, times: Array) -> float:
    """The T1 of the least residual that any start and any sign pattern leads to, under the same physical limits."""
    best, found = math.inf, math.nan
    for n_negative in range(len(times)):
        signed = np.where(np.arange(len(times)) < n_negative, -signal, signal)
        for start in np.geomspace(0.06, 5.0, 12):
            design = np.stack([np.ones_like(times), -np.exp(-times / start)], axis=1)
            amplitudes = np.linalg.lstsq(design, signed, rcond=None)[0]

            def residual(p: Array, signed: Array = signed) -> Array:
                return p[0] - p[1] * np.exp(-times * p[2]) - signed

            limits = ((-np.inf, -np.inf, 1 / 6), (np.inf, np.inf, 20))
            fit = least_squares(residual, (*amplitudes, 1 / start), bounds=limits, x_scale="jac", max_nfev=200)
            a, b, rate = fit.x
            if 0 < a < b < 4 * a and fit.cost < best:
                best, found = fit.cost, 1 / rate
    return found


def brain(path: Path, n_pixels: int) -> dict[str, Any]:
    """Inversion recovery of a brain: T1 inside the mask, and how it differs from scipy's."""
    mat = loadmat(path)
    times, mask = mat["TI"][:, 0] / 1000, mat["Mask"] > 0
    images = mat["IRdata"].transpose(2, 0, 1)
    maps = inversion_recovery_t1(torch.tensor(images)[:, None], times.tolist())
    valid = maps.t1.valid[0].numpy() & mask
    places = np.argwhere(valid)
    chosen = places[np.random.default_rng(0).choice(len(places), n_pixels, replace=False)]
    ours = np.array([float(maps.t1.data[0, y, x]) for y, x in chosen])
    theirs = np.array([scipy_t1(images[:, y, x].astype(float), times) for y, x in chosen])
    deviation = np.abs(ours / theirs - 1)
    t1 = 1000 * maps.t1.data[0].numpy()[valid]
    return {
        "valid_in_mask_percent": round(100 * float(valid.sum() / mask.sum()), 1),
        "t1_ms_quartiles": [round(float(v)) for v in np.percentile(t1, (25, 50, 75))],
        "sd_ms_median": round(float(np.median(1000 * maps.t1_sd.data[0].numpy()[valid]))),
        "pixels_against_scipy": n_pixels,
        "median_deviation_percent": round(100 * float(np.median(deviation)), 4),
        "within_1_percent": round(100 * float((deviation < 0.01).mean()), 1),
    }


def chains(methods: list[str], accelerations: tuple[int, ...]) -> list[list[Any]]:
    """T1 behind each method: nRMSE and median error, coverage of the claimed deviation, in the interior of the heart's rectangle."""
    rows: list[list[Any]] = []
    for acceleration in accelerations:
        for noise in NOISES:
            cell = make_cell("molli", 0, acceleration, noise)
            reference, believable = cell.reference_t1()
            inside = cell.roi & cell.support & believable
            for method in methods:
                rows.append([f"{acceleration}x", f"{100 * noise:g} %", method, *_behind(cell, method, reference, inside)])
    return rows


def _recipe(method: str) -> Recipe:
    """A method at its defaults, in the configuration for contrasts where it has one, with T1 maps."""
    cls = get_method(method).Settings
    quantitative = {"configuration": "quantitative"} if "configuration" in {info.name for info in describe(cls)} else {}
    return Recipe(method, parse_settings(cls, quantitative), maps=MapSettings(maps="t1"))


def _behind(cell: Cell, method: str, reference: NDArray[np.float32], inside: NDArray[np.bool_]) -> list[Any]:
    kspace, scan = cell.problem()
    recipe = _recipe(method)
    result = reconstruct(kspace, scan, recipe)
    residual_only = t1_maps(result.images[0], scan, None, recipe.maps).maps
    t1, sd, weak = (m.data.numpy() for m in (result.maps[0], result.maps[1], residual_only[1]))
    valid = inside & result.maps[0].valid.numpy() & residual_only[0].valid.numpy()
    error = (t1 - reference)[valid]
    return [
        round(float(np.linalg.norm(error) / np.linalg.norm(reference[valid])), 4),
        round(1000 * float(np.median(np.abs(error))), 1),
        round(1000 * float(np.median(sd[valid])), 1),
        round(100 * float((np.abs(error) <= 2 * sd[valid]).mean()), 1),
        round(100 * float((np.abs(error) <= 2 * weak[valid]).mean()), 1),
        round(100 * float(valid.sum() / inside.sum()), 1),
    ]


def phantom_chains(path: Path, methods: list[str], acceleration: float) -> list[list[Any]]:
    """Deviation of every tube's mean T1 from the reference behind each method, %; semi-measured."""
    reference = loadmat(path)["MOLLIoffLineT1Map"][0]
    rows: list[list[Any]] = []
    kspace, scan = make_cell("molli", "phantom", acceleration, NOISES[0]).problem()
    for method in methods:
        t1 = reconstruct(kspace, scan, _recipe(method)).maps[0]
        deviations, shares = [], []
        for y, x in TUBES:
            roi = np.hypot(*np.ogrid[-y : reference.shape[0] - y, -x : reference.shape[1] - x]) <= 5
            valid = roi & t1.valid[0].numpy()
            shares.append(100 * float(valid.sum() / roi.sum()))
            if valid.any():
                deviations.append(100 * float(t1.data[0].numpy()[valid].mean() / reference[roi].mean() - 1))
        by_size = sorted(deviations, key=lambda d: abs(d))
        rows.append([method, len(deviations), round(by_size[0], 2), round(by_size[-1], 2), round(min(shares), 1)])
    return rows


def speed(repeats: int) -> list[list[Any]]:
    """Seconds of one call, median and least."""
    generator = torch.Generator().manual_seed(2)
    n = 192 * 192
    u = torch.rand(3, n, generator=generator)
    p = torch.stack([0.3 + u[0], u[1] - 0.5, 1 / (0.3 + 2.7 * u[2])])
    model = SaturationRecovery(SATURATION_TIMES)
    y = model.signal(p)
    y = y + 0.02 * torch.complex(*(torch.randn(y.shape, generator=generator) for _ in range(2)))
    start = torch.tensor([0.9, 0.0, 0.8])[:, None].expand(3, n)
    ti = torch.tensor(MOLLI_TIMES)[:, None, None, None]
    t1 = (0.3 + 2 * u[2]).reshape(1, 192, 192)
    molli = SHORTENING - (1 + SHORTENING) * torch.exp(-ti / (SHORTENING * t1))
    molli = molli + 0.01 * torch.randn(molli.shape, generator=generator)
    calls: dict[str, Callable[[], Any]] = {}
    for weight in (0.0, 0.05, 3.0):
        name = f"solver, 192x192x5 complex, lambda {weight:g}"
        calls[name] = partial(levenberg_marquardt, model, y, start, regularisation=weight, reference=start)
    calls["saturation_recovery_t1, 192x192x5 complex"] = lambda: saturation_recovery_t1(
        y.reshape(5, 1, 192, 192), SATURATION_TIMES
    )
    calls["molli_t1, 192x192x8 complex"] = lambda: molli_t1(molli.to(torch.complex64), MOLLI_TIMES)
    calls["molli_t1, 192x192x8 magnitude"] = lambda: molli_t1(molli.abs(), MOLLI_TIMES)
    rows: list[list[Any]] = []
    for name, call in calls.items():
        call()
        seconds = []
        for _ in range(repeats):
            began = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - began)
        rows.append([name, round(statistics.median(seconds), 4), round(min(seconds), 4)])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draws", type=int, default=5000, help="noise draws for each T1")
    parser.add_argument("--repeats", type=int, default=9, help="timed calls")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--brain", type=Path, help="qMRLab's IR_demo.mat, not in this repository")
    parser.add_argument("--pixels", type=int, default=100, help="brain pixels that scipy fits too")
    parser.add_argument("--methods", default="cg_sense,grasp_pro,llr", help="behind which T1 maps are judged")
    parser.add_argument("--accelerations", default="4,8")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    methods = options.methods.split(",")
    accelerations = tuple(int(a) for a in options.accelerations.split(","))
    tables: dict[str, tuple[str, list[str], list[list[Any]]]] = {
        "simulated": (
            f"Simulated, noise {NOISE:g} of M0, {options.draws} draws",
            ["series", "images", "noise from", "T1 ms", "bias %", "spread ms", "claimed SD / spread", "valid %"],
            simulated(options.draws),
        ),
        "phantom": (
            "Measured phantom (MyoMapNet), 5 images",
            ["tube", "reference ms", "found ms", "deviation %", "SD ms", "valid %"],
            phantom(DATA / "myomapnet_phantom.mat"),
        ),
        "kidney": (
            "Measured kidney (mdreg), 8 images, not registered",
            ["region", "T1 ms", "quartile 1", "quartile 3", "SD ms", "valid %"],
            kidney(DATA / "kidney_molli.npz"),
        ),
        "chains": (
            "Behind a reconstruction, simulated MOLLI 144 x 144 x 9, 10 coils, golden-angle lines and 16 calibration lines",
            [
                "acceleration",
                "noise",
                "method",
                "nRMSE",
                "median error ms",
                "median SD ms",
                "within 2 SD %",
                "residual alone %",
                "valid %",
            ],
            chains(methods, accelerations),
        ),
        "phantom_chains": (
            "Behind a reconstruction, semi-measured phantom at 4x",
            ["method", "tubes", "least deviation %", "worst deviation %", "least valid %"],
            phantom_chains(DATA / "myomapnet_phantom.mat", methods, 4),
        ),
        "speed": (f"Time, {options.threads} thread(s)", ["call", "median s", "least s"], speed(options.repeats)),
    }
    document: dict[str, Any] = {}
    for name, (title, columns, rows) in tables.items():
        print_table(title, columns, rows)
        document[name] = [dict(zip(columns, row, strict=True)) for row in rows]
    if options.brain:
        document["brain"] = brain(options.brain, options.pixels)
        print_table(
            "Measured brain (qMRLab), 9 images", ["figure", "value"], [[k, str(v)] for k, v in document["brain"].items()]
        )
    write_result("t1_maps", {"settings": {"draws": options.draws, "threads": options.threads}, **document})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
