"""R2* and field of measured multi-echo scans: a resolution phantom read in one and in alternating directions, and a human brain.

``python -m benchmarks.multi_echo_measured FOLDER`` reads ``multi-echo-gre-raw/gre_3echo_{monopolar,bipolar}_raw.h5`` and
``brain-multi-echo/{Mag,Phase}.nii`` below FOLDER, prints figures, writes ``benchmarks/results/multi_echo_measured.json`` and, with
``--pictures FOLDER``, one PNG each.

There is no truth. The phantom's two scans are of one object: after the correction of the alternating readouts their fields must agree
up to what the shim changed between them (a plane), and their R2* up to noise. The brain's figures are for plausibility: grey and
white matter at 3 T lie between 12 and 25 1/s.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.common import in_words, print_table, write_result
from recon_core.fourier import ifft_centred
from recon_core.maps.brain_mask import object_mask
from recon_core.maps.field import correct_bipolar, fit_field
from recon_core.maps.r2star import nonlinear_r2star
from recon_core.simulation.volume_files import read_series

PHANTOM_TIMES = (0.004, 0.009, 0.015)
BRAIN_TIMES = (0.004, 0.008, 0.012)  # stated where the data are published, not in the files
REVERSED = np.uint64(1 << 21)
SIGNAL = 0.2  # of the 99.9th percentile: what is darker is air or plastic
BLOCK = 16  # pixels: R2* of 10 1/s is noisy within 15 ms, blocks of this side are compared

GREYS = 32

Image = NDArray[np.floating]


def raw_images(path: Path) -> torch.Tensor:
    """Complex64 ``(echo, z = 1, y, x)`` of one coil; lines read backwards are turned round."""
    with h5py.File(path) as file:
        rows = file["dataset"]["data"][()]
    head = rows["head"]
    n = int(head["number_of_samples"][0])
    kspace = np.zeros((len(PHANTOM_TIMES), 1, n, n), np.complex64)
    for line, samples in zip(head, rows["data"], strict=True):
        values = samples.view(np.complex64)
        # the centre, sample n / 2, stays where it is
        turned = np.roll(values[::-1], 1) if line["flags"] & REVERSED else values
        kspace[line["idx"]["contrast"], 0, line["idx"]["kspace_encode_step_1"]] = turned
    return ifft_centred(torch.from_numpy(kspace), (-2, -1))


def plane_free(
    field: torch.Tensor, mask: torch.Tensor, *, plane: bool = True
) -> tuple[torch.Tensor, tuple[float, float, float]]:
    """A difference of fields without its plane (or only its constant), by median-weighted least squares, and the plane's three numbers."""
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, n, dtype=torch.float64) for n in field.shape[-2:]], indexing="ij")
    columns = [torch.ones_like(x), y, x] if plane else [torch.ones_like(x)]
    basis = torch.stack([c.expand(field.shape)[mask] for c in columns], dim=1)
    values = field.double()[mask]
    keep = torch.ones_like(values, dtype=torch.bool)
    solution = torch.zeros(len(columns), dtype=torch.float64)
    for _ in range(5):  # wrong turns at single pixels must not tilt it
        solution = torch.linalg.lstsq(basis[keep], values[keep, None]).solution[:, 0]
        rest = (values - basis @ solution).abs()
        keep = rest < 4 * rest.median() + 1e-9
    out = torch.zeros_like(field.double())
    out[mask] = values - basis @ solution
    numbers = [*solution.tolist(), 0.0, 0.0]
    return out, (numbers[0], numbers[1], numbers[2])


def phantom(folder: Path) -> tuple[dict[str, Any], dict[str, Image]]:
    """How far the bipolar scan is from the monopolar one, with and without correction."""
    images = {name: raw_images(folder / f"gre_3echo_{name}_raw.h5") for name in ("monopolar", "bipolar")}
    mask = object_mask(images["monopolar"], fraction=SIGNAL) & object_mask(images["bipolar"], fraction=SIGNAL)
    corrected, constant, slope = correct_bipolar(images["bipolar"], PHANTOM_TIMES, mask)
    series = {"monopolar": images["monopolar"], "bipolar": images["bipolar"], "corrected": corrected}
    fields = {name: fit_field(s, PHANTOM_TIMES, mask) for name, s in series.items()}
    r2star = {name: nonlinear_r2star(s.abs(), PHANTOM_TIMES, mask=mask).r2star for name, s in series.items()}
    result: dict[str, Any] = {"pixels": int(mask.sum()), "ramp_rad": slope, "constant_rad": constant}
    pictures: dict[str, Image] = {"monopolar, magnitude": images["monopolar"][0, 0].abs().numpy()}
    for name in ("bipolar", "corrected"):
        difference = fields[name].field.data - fields["monopolar"].field.data
        rest, plane = plane_free(difference, mask)
        result[name] = {
            "phase_residual_rad": float(fields[name].residual.data[mask].median()),
            "field_difference_median_abs_hz": float(rest[mask].abs().median()),
            "plane_hz": plane,
        }
        pictures[f"field, {name}, Hz"] = fields[name].field.data[0].numpy()
        pictures[f"field, {name} - monopolar, plane off, Hz"] = rest[0].numpy()
    result["monopolar"] = {"phase_residual_rad": float(fields["monopolar"].residual.data[mask].median())}
    rates = {name: _block_r2star(images[name], mask) for name in images}
    shift = (rates["bipolar"] - rates["monopolar"])[torch.isfinite(rates["bipolar"]) & torch.isfinite(rates["monopolar"])]
    result["r2star_median"] = {name: float(v[torch.isfinite(v)].median()) for name, v in rates.items()}
    result["r2star_block_difference_median_abs"] = float(shift.abs().median())
    pictures["field, monopolar, Hz"] = fields["monopolar"].field.data[0].numpy()
    pictures["R2*, monopolar, 1/s"] = r2star["monopolar"].data[0].numpy()
    pictures["R2*, bipolar, 1/s"] = r2star["bipolar"].data[0].numpy()
    return result, pictures


def _block_r2star(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Of the mean magnitudes of blocks that are at least half in the mask; NaN elsewhere."""

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(values.float(), BLOCK)

    share = mean(mask)
    echoes = mean(images.abs() * mask) / share.clamp_min(1e-6)
    fitted = nonlinear_r2star(echoes, PHANTOM_TIMES, mask=share >= 0.5).r2star
    return torch.where(fitted.valid, fitted.data, torch.nan)


def brain(folder: Path) -> tuple[dict[str, Any], dict[str, Image]]:
    """R2* and field of a patch of a human brain."""
    magnitude, _ = read_series(folder / "Mag.nii")
    stored, _ = read_series(folder / "Phase.nii")
    low, high = float(stored.min()), float(stored.max())
    phase = (stored.astype(np.float64) - low) / (high - low) * 2 * np.pi - np.pi
    images = torch.from_numpy((magnitude * np.exp(1j * phase)).astype(np.complex64))
    mask = object_mask(images, fraction=SIGNAL)
    r2star = nonlinear_r2star(images.abs(), BRAIN_TIMES, mask=mask).r2star
    field = fit_field(images, BRAIN_TIMES, mask)
    values = r2star.data[r2star.valid]
    quartiles = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75])).tolist()
    jumps = _jumps(field.field.data, mask, 1 / min(b - a for a, b in pairwise(BRAIN_TIMES)))
    result = {
        "voxels": int(mask.sum()),
        "r2star_quartiles": quartiles,
        "r2star_valid": float(r2star.valid.sum() / mask.sum()),
        "phase_residual_rad": float(field.residual.data[mask].median()),
        "field_spread_hz": float(field.field.data[mask].std()),
        "neighbours_half_a_period_apart": jumps,
    }
    middle = images.shape[1] // 2
    pictures = {
        "magnitude, echo 1": images[0, middle].abs().numpy(),
        "phase, echo 3, rad": images[2, middle].angle().numpy(),
        "R2*, 1/s": r2star.data[middle].numpy(),
        "field, Hz": field.field.data[middle].numpy(),
    }
    return result, pictures


def _jumps(field: torch.Tensor, mask: torch.Tensor, period: float) -> float:
    """Part of all neighbours whose fields differ by more than half a period: wraps that are left."""
    wrong = total = 0
    for axis in range(3):
        n = field.shape[axis]
        both = mask.narrow(axis, 1, n - 1) & mask.narrow(axis, 0, n - 1)
        wrong += int((field.diff(dim=axis)[both].abs() > period / 2).sum())
        total += int(both.sum())
    return wrong / max(1, total)


def draw(pictures: dict[str, Image], path: Path, limits: dict[str, tuple[float, float]]) -> None:
    """All pictures side by side, each with its scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from PIL import Image as Picture

    columns = min(4, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.4 * columns, 3.2 * rows), squeeze=False)
    for place in axes.ravel():
        place.axis("off")
    for place, (title, image) in zip(axes.ravel(), pictures.items(), strict=False):
        key = next((k for k in limits if title.startswith(k)), "")
        low, high = limits.get(key, (float(np.percentile(image, 1)), float(np.percentile(image, 99))))
        shown = place.imshow(image, cmap="gray", vmin=low, vmax=high)
        place.set_title(title, fontsize=8)
        figure.colorbar(shown, ax=place, fraction=0.046)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.tight_layout()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=70)
    plt.close(figure)
    # grey, and few of them: a document's picture
    Picture.open(drawn).convert("L").quantize(GREYS).save(path, optimize=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="folder that holds multi-echo-gre-raw and brain-multi-echo")
    parser.add_argument("--pictures", type=Path, help="where PNGs go; none are drawn if left out")
    options = parser.parse_args(arguments)
    found, shown = phantom(options.folder / "multi-echo-gre-raw")
    rows = [
        (name, found[name]["phase_residual_rad"], found[name].get("field_difference_median_abs_hz", 0.0))
        for name in ("monopolar", "bipolar", "corrected")
    ]
    print_table("Resolution phantom, 3 echoes", ("readouts", "phase residual, rad", "field against monopolar, Hz"), rows)
    print(f"R2* median {found['r2star_median']}, difference {found['r2star_block_difference_median_abs']:.2f} 1/s in blocks")
    tissue, patch = brain(options.folder / "brain-multi-echo")
    print_table("Human brain, 3 echoes", ("figure", "value"), [(k, str(v)) for k, v in tissue.items()])
    write_result("multi_echo_measured", {"phantom": found, "brain": tissue})
    if options.pictures:
        draw(
            shown,
            options.pictures / "multi_echo_phantom.png",
            {"R2*": (0, 40), "field, corrected -": (-10, 10), "field, bipolar -": (-60, 60)},
        )
        draw(patch, options.pictures / "multi_echo_brain.png", {"R2*": (0, 60)})
    return 0


if __name__ == "__main__":
    raise SystemExit(in_words(main))
