"""``laro_qsm`` with the learned masks that ship: readouts at their positions to R2* and susceptibility, through the running server.

The truth is that of the simulated head. How well a method may do is measured, not guessed: by the same maps of the noise-free, fully
sampled images.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from gadgets.service import Service, ServiceOptions
from gadgets.wire.header import parse_header
from recon_core.maps.series_qsm import multi_echo_maps
from recon_core.maps.settings import MapSettings
from recon_core.sampling.mask_files import read_mask
from recon_core.simulation.brain import LABELS
from recon_core.types import ImageSeries, ScanInfo
from tests.e2e.learned_mask_scan import WEIGHTS, head, learned_mask_scan
from tests.e2e.scans import ask, complaints
from tests.e2e.test_qsm import ROLES, contrast, maps_of, without_echoes
from tests.e2e.test_t1_maps import meta, values
from tests.strict_client import Answer

EIGHT, FOUR = "laro_mask_r8_spo2", "laro_mask_r4_spo2"
SEED = 31
QUICK: dict[str, Any] = {"start": "zero_filled", "unrolls": 1}
NUCLEI = ("caudate", "putamen", "pallidum", "thalamus")

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Knows the shipped masks, and one of another matrix."""
    folder = tmp_path_factory.mktemp("laro_qsm")
    (folder / "masks").mkdir()
    for name in (EIGHT, FOUR, "laro_mask_r8_spo2_206x80"):
        (folder / "masks" / f"{name}.h5").symlink_to(WEIGHTS / f"{name}.h5")
    options = ServiceOptions(
        port=0, workers=1, threads=1, spool=folder / "spool", noise=folder / "noise", masks=folder / "masks", rehearse=False
    )
    with Service(options) as running:
        yield running


@pytest.fixture(scope="module")
def answers(server: Service) -> dict[str, Answer]:
    """At R = 8 and R = 4, by the mask's name."""
    return {mask: ask(server, "laro_qsm", learned_mask_scan(mask, seed=SEED)) for mask in (EIGHT, FOUR)}


@pytest.fixture(scope="module")
def best() -> NDArray[np.float64]:
    """Susceptibility in ppm by the same functions from the true images, NaN outside: what no sampling can better."""
    brain = head(SEED)
    header = parse_header(learned_mask_scan(EIGHT, seed=SEED).header).encodings[0]
    scan = ScanInfo(
        header.recon_matrix, header.recon_fov, header.recon_matrix, header.recon_fov, echo_times=brain.echo_times,
        field_strength=3.0, b0_direction=brain.b0,
    )  # fmt: skip
    made = multi_echo_maps(ImageSeries("all", brain.images), scan, None, MapSettings(maps="qsm", map_r2star_fit="arlo"))
    (chi,) = (m for m in made.maps if m.name == "QSM")
    return np.asarray(torch.where(chi.valid, chi.data, torch.nan).numpy(), dtype=np.float64)


def correlation(chi: NDArray[np.float64]) -> float:
    """With the true susceptibility, over all of the map that is brain."""
    brain = head(SEED)
    where = np.isfinite(chi) & brain.brain.numpy()
    return float(np.corrcoef(chi[where], brain.chi.numpy()[where])[0, 1])


def nuclei(chi: NDArray[np.float64]) -> tuple[float, float]:
    """Slope and R^2 of the means over deep nuclei, optic radiation and white matter, in ppm, against the true ones."""
    brain = head(SEED)
    labels, true = brain.labels.numpy(), brain.chi.numpy()
    inside = np.isfinite(chi) & brain.brain.numpy()
    regions = [inside & (labels == n) for n in (*(LABELS[name] for name in NUCLEI), LABELS["white"], 32)]
    points = np.array([(true[r].mean(), chi[r].mean()) for r in regions if r.sum() > 12])
    return float(np.polyfit(points[:, 0], points[:, 1], 1)[0]), float(np.corrcoef(points.T)[0, 1] ** 2)


@pytest.mark.parametrize("mask", [EIGHT, FOUR])
def test_images_and_maps_arrive_with_units_windows_and_geometry(answers: dict[str, Answer], mask: str) -> None:
    answer, scan, brain = answers[mask], learned_mask_scan(mask, seed=SEED), head(SEED)
    assert not complaints(answer)
    n_samples = int(read_mask(WEIGHTS / f"{mask}.h5").mask.sum())
    assert any(f"all {n_samples} samples are those of mask '{mask}'" in text for text in answer.texts)
    combined, *echoes = contrast(answer)
    assert [float(meta(i)["EchoTime"][0]) for i in echoes] == pytest.approx([1e3 * t for t in brain.echo_times], abs=1e-3)
    found = maps_of(answer)
    assert set(found) == set(ROLES)
    for role, unit in ROLES.items():
        m = meta(found[role])
        assert unit is None or m.get("QuantityUnit", ("",)) == (unit,)
        assert found[role].data.dtype == np.uint16 and found[role].data[0].shape == brain.brain.shape
        for name in ("position", "read_dir", "phase_dir", "slice_dir", "field_of_view", "matrix_size"):
            np.testing.assert_array_equal(found[role].header[name], combined.header[name], err_msg=f"{role} {name}")
    chi = meta(found["QSM"])
    assert (int(chi["WindowCenter"][0]), int(chi["WindowWidth"][0])) == (0, 300)
    slope = float(chi["RescaleSlope"][0])  # coarser where single voxels exceed 1023 ppb
    assert slope in (0.5, 1.0, 2.0) and float(chi["RescaleIntercept"][0]) == -2048 * slope
    extent = [n * 1e3 * v for n, v in zip(brain.brain.shape, brain.voxel, strict=True)]
    assert list(combined.header["field_of_view"]) == pytest.approx(extent[::-1], rel=1e-4)
    assert scan.stream.truth.mask.shape[1:] == brain.brain.shape[:2]


def test_the_maps_are_those_of_the_head(answers: dict[str, Answer], best: NDArray[np.float64]) -> None:
    """The noise-free, fully sampled map has correlation 0.85 and slope 0.92; found: 0.55, 0.89 (R = 8) and 0.80, 0.89 (R = 4)."""
    brain = head(SEED)
    full = correlation(best)
    slope, r2 = nuclei(best)
    assert full > 0.75 and 0.85 < slope < 1.1 and r2 > 0.98
    found = {mask: values(maps_of(answer)["QSM"]) / 1e3 for mask, answer in answers.items()}
    eight, four = found[EIGHT], found[FOUR]
    assert correlation(eight) > 0.5 * full and correlation(four) > max(0.75 * full, correlation(eight))
    for chi, least in ((eight, 0.7), (four, 0.75)):
        slope, r2 = nuclei(chi)
        assert least < slope < 1.1 and r2 > 0.93
    white = (brain.labels.numpy() == LABELS["white"]) & brain.brain.numpy()
    for mask, answer in answers.items():
        found_maps = maps_of(answer)
        inside = np.isfinite(values(found_maps["BRAINMASK"]))
        both = 2 * (inside & brain.brain.numpy()).sum() / (inside.sum() + brain.brain.sum())
        assert both > 0.88, mask  # voxels of 5.5 mm, and the sulci's fluid at the surface is not in the true mask's opening
        rate = values(found_maps["R2STAR"])[white]
        assert np.nanmedian(rate) == pytest.approx(np.median(brain.r2star.numpy()[white]), rel=0.04), mask
        local = values(found_maps["LOCALFIELD"])
        where = np.isfinite(local) & brain.brain.numpy()
        assert np.corrcoef(local[where], brain.local_field.numpy()[where])[0, 1] > (0.45 if mask == EIGHT else 0.6), mask


def test_what_was_sampled_besides_the_mask_is_named(server: Service) -> None:
    """Told the mask of R = 4, given the samples of R = 8: reconstructed from what was measured, and the difference said."""
    answer = ask(server, "laro_qsm", learned_mask_scan(EIGHT, seed=SEED), sampling_mask=FOUR, maps="none", **QUICK)
    (told,) = [text for text in complaints(answer) if "not those of mask" in text]
    assert f"'{FOUR}'" in told and "echo 0:" in told and re.search(r"\d+ missing \(\(\d+, \d+\)", told)
    assert len(contrast(answer)) == 6


def test_a_mask_of_another_matrix_leaves_the_fallbacks_images(server: Service) -> None:
    answer = ask(
        server, "laro_qsm", learned_mask_scan(FOUR, seed=SEED), sampling_mask="laro_mask_r8_spo2_206x80", maps="none"
    )
    told = " ".join(complaints(answer))
    assert "the scan's matrix is 32 x 64, the mask's 80 x 206" in told and "llr_qsm" in told
    assert len(contrast(answer)) == 6


def test_an_echo_that_never_came_is_named_and_the_others_are_reconstructed(server: Service) -> None:
    scan = learned_mask_scan(EIGHT, seed=SEED)
    five = ask(server, "laro_qsm", scan, messages=without_echoes(scan, {2}), incomplete="drop", maps="r2star", **QUICK)
    times = [float(meta(i)["EchoTime"][0]) for i in contrast(five)[1:]]
    assert times == pytest.approx([1e3 * t for n, t in enumerate(head(SEED).echo_times) if n != 2], abs=1e-3)
    told = " ".join(complaints(five))
    assert "echo 2: no samples at all" in told and "echo 1:" not in told
    assert "R2STAR" in maps_of(five)


def test_echo_times_of_another_number_of_echoes_leave_the_methods_images_without_maps(server: Service) -> None:
    scan = learned_mask_scan(EIGHT, seed=SEED)
    header = re.sub(r"(<TE>.*?</TE>)+", "<TE>4</TE><TE>9</TE>", scan.header)
    answer = ask(server, "laro_qsm", scan, header=header, **QUICK)
    assert len(contrast(answer)) == 6 and not maps_of(answer)
    told = " ".join(complaints(answer))
    assert "echo times" in told and "llr_qsm" not in told
    assert all("LARO, weights laro " in " ".join(meta(image)["ImageComments"]) for image in contrast(answer))
