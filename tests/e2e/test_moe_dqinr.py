"""MoE-dqINR through the running server: a cine and a MOLLI scan replayed by a process of its own, and what may go wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gadgets.image_file import read_images
from gadgets.meta import read_meta
from gadgets.service import Service
from gadgets.wire.events import Image
from tests.e2e.scans import SimulatedScan, ask, complaints, encoded, error, in_memory, simulated, stack
from tests.e2e.test_t1_maps import ROLES, maps_of, values
from tests.strict_client import Answer
from tests.waiting import PATIENCE

RECON = Path(sys.executable).with_name("recon")
ITERATIONS = "15"
PREVIEWS = 1000  # series of previews are numbered from here


@pytest.fixture(scope="module")
def cine(tmp_path_factory: pytest.TempPathFactory) -> SimulatedScan:
    folder: Path = tmp_path_factory.mktemp("moe")
    return simulated(
        "cine", folder / "cine.h5", matrix_x=64, matrix_y=64, coils=4, states=6, slices=3, mask="vista", acceleration=3.0,
        acs=12, orientation="oblique",
    )  # fmt: skip


@pytest.fixture(scope="module")
def molli(tmp_path_factory: pytest.TempPathFactory) -> SimulatedScan:
    folder: Path = tmp_path_factory.mktemp("moe_t1")
    return simulated(
        "molli", folder / "molli.h5", matrix_x=64, matrix_y=64, coils=4, mask="golden", acceleration=2.0, acs=12, field_strength=3.0
    )  # fmt: skip


def replayed(service: Service, scan: SimulatedScan, chain: str, out: Path) -> tuple[list[Image], str]:
    """The images that ``recon replay`` wrote, and what it said."""
    command = [str(RECON), "replay", str(scan.path), "-c", chain, "-o", str(out), "--port", str(service.port)]
    done = subprocess.run(
        [*command, f"--set=iterations={ITERATIONS}"], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    return list(read_images(out)), done.stderr


def final(images: list[Image]) -> list[Image]:
    """Without previews and maps."""
    return [
        i
        for i in images
        if int(i.header["image_series_index"]) < PREVIEWS and read_meta(i.attributes)["DataRole"] == ("Image",)
    ]


def test_a_three_slice_cine_arrives_in_another_process(service: Service, cine: SimulatedScan, tmp_path: Path) -> None:
    images, said = replayed(service, cine, "moe_dqinr_cine", tmp_path / "cine.h5")
    frames = final(images)
    assert len(frames) == 3 * 6 and "failed" not in said
    assert sorted(int(i.header["image_index"]) for i in frames) == list(range(1, 19))
    assert error(stack(frames, 6), cine.truth, cine.tissue) < 0.06
    by_slice = sorted(frames, key=lambda i: int(i.header["image_index"]))
    centres = np.array([by_slice[6 * s].header["position"] for s in range(3)])
    steps = np.diff(centres, axis=0)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=1), 10.0, rtol=1e-4)  # mm: thickness and gap
    np.testing.assert_allclose(steps[0] / 10, np.abs(by_slice[0].header["slice_dir"]) * np.sign(steps[0]), atol=1e-4)
    for frame, image in enumerate(by_slice):
        assert (int(image.header["slice"]), int(image.header["phase"])) == divmod(frame, 6)
        assert tuple(image.header["matrix_size"]) == (64, 64, 1)
        np.testing.assert_allclose(image.header["field_of_view"], (340, 340, 8))
        meta = read_meta(image.attributes)
        assert meta["SeriesDescriptionAdditional"][0].startswith("moe_dqinr_cine") and int(meta["WindowWidth"][0]) > 1


def test_a_molli_scan_arrives_with_its_maps_in_another_process(
    service: Service, molli: SimulatedScan, tmp_path: Path
) -> None:
    images, said = replayed(service, molli, "moe_dqinr_t1", tmp_path / "molli.h5")
    assert "failed" not in said
    assert len(final(images)) == 8
    maps = maps_of(Answer(images=images))
    assert {role: len(found) for role, found in maps.items()} == dict.fromkeys(ROLES, 1)
    meta = {role: read_meta(found[0].attributes) for role, found in maps.items()}
    assert meta["T1"]["QuantityUnit"] == meta["T1SD"]["QuantityUnit"] == ("ms",)
    assert (meta["T1"]["WindowCenter"], meta["T1"]["WindowWidth"]) == (("1600",), ("1600",))  # 3 T
    for found in maps.values():
        for name in ("position", "read_dir", "phase_dir", "slice_dir", "field_of_view", "matrix_size"):
            np.testing.assert_array_equal(found[0].header[name], final(images)[0].header[name])
    truth = molli.stream.truth
    t1, sd = values(maps["T1"][0]), values(maps["T1SD"][0])
    inside = truth.interior[0] & np.isfinite(t1)
    assert inside.sum() > 0.95 * truth.interior.sum()
    difference = (t1 - 1e3 * truth.maps["t1"][0])[inside]
    assert abs(np.median(difference)) < 20 and np.median(np.abs(difference)) < 2.5 * np.median(sd[inside])


@pytest.mark.parametrize("chain", ["moe_dqinr_cine", "moe_dqinr_t1"])
def test_values_that_are_not_finite_are_refused_in_words(chain: str, service: Service, cine: SimulatedScan) -> None:
    batches = [(headers, samples.copy()) for headers, samples in cine.stream.batches]
    batches[-1][1][-1, 0, 3] = np.nan
    answer = ask(service, chain, cine, messages=encoded(batches), iterations=ITERATIONS)
    assert not answer.images and any("not finite" in text for text in answer.texts)


def test_one_frame_is_as_good_as_without_neighbours_in_time(service: Service) -> None:
    """There is nothing to mix; the image must not be worse than parallel imaging alone."""
    scan = in_memory("cine", matrix_x=64, matrix_y=64, coils=4, states=1, mask="random", acceleration=2.0, acs=16)
    frames = {
        chain: final(ask(service, chain, scan, iterations=ITERATIONS).images) for chain in ("moe_dqinr_cine", "cg_sense")
    }
    errors = {chain: error(stack(images, 1), scan.truth, scan.tissue) for chain, images in frames.items()}
    assert errors["moe_dqinr_cine"] < 1.05 * errors["cg_sense"]


def test_fully_sampled_data_give_the_truth(service: Service) -> None:
    scan = in_memory("cine", matrix_x=64, matrix_y=64, coils=4, states=4)
    answer = ask(service, "moe_dqinr_cine", scan, iterations=ITERATIONS)
    assert not [text for text in complaints(answer) if "failed" in text]
    assert error(stack(final(answer.images), 4), scan.truth, scan.tissue) < 0.02


def test_without_calibration_lines_there_is_an_answer_or_the_reason(service: Service) -> None:
    """A pattern whose centre is not sampled in any way that coil maps could come from."""
    scan = in_memory(
        "cine", matrix_x=64, matrix_y=64, coils=4, states=4, mask="uniform", acceleration=4.0, calibration="none", acs=0
    )
    answer = ask(service, "moe_dqinr_cine", scan, iterations=ITERATIONS)
    assert not answer.images
    assert any(text.startswith("ERR") and "calibration" in text for text in answer.texts)
