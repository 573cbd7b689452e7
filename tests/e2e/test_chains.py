"""Every chain through the running server, seen by a client as unforgiving as the real one, against the known truth."""

from __future__ import annotations

import numpy as np
import pytest

from gadgets.chain import chain_names, load_chain
from gadgets.service import Service
from tests.e2e.scans import SimulatedScan, ask, complaints, error, final_images, stack
from tests.strict_client import StrictClient

# chains that make maps need inversion times: tests/e2e/test_t1_maps.py
image_chains = pytest.mark.parametrize("chain", [name for name in chain_names() if load_chain(name).maps.maps == "none"])

LARGEST_ERROR = {"fourier": 0.4, "cg_sense": 0.15, "llr": 0.08, "grasp_pro": 0.12, "moe_dqinr_cine": 0.08}
LARGEST_ERROR_3D = {"fourier": 0.4, "cg_sense": 0.19, "llr": 0.09, "grasp_pro": 0.15, "moe_dqinr_cine": 0.09}
"""nRMSE inside tissue, three-fold undersampled; ``fourier`` does not unfold and is only here to run; ``moe_dqinr`` is for single
slices, and its fallback ``llr`` answers in 3D."""


@image_chains
def test_a_chain_reconstructs_an_undersampled_cine(chain: str, service: Service, cine: SimulatedScan) -> None:
    answer = StrictClient(service.host, service.port).scan(chain, header=cine.header, messages=cine.messages)
    final = final_images(answer)
    assert len(final) == 12
    assert {int(image.header["image_series_index"]) for image in final} == {1}
    assert sorted(int(image.header["image_index"]) for image in final) == list(range(1, 13))
    said = [text for text in answer.texts if text.startswith(("ERR", "WRN"))]
    assert [("aliased" in text) for text in said] == ([True] if chain == "fourier" else [])
    images = stack(final, 6)
    assert np.isfinite(images).all()
    assert error(images, cine.truth, cine.tissue) < LARGEST_ERROR[chain]


@image_chains
def test_a_chain_reconstructs_a_three_dimensional_multi_echo_scan(chain: str, service: Service, mgre: SimulatedScan) -> None:
    answer = StrictClient(service.host, service.port).scan(chain, header=mgre.header, messages=mgre.messages)
    final = final_images(answer)
    assert len(final) == 4
    assert tuple(final[0].header["matrix_size"]) == (48, 40, 12)
    images = stack(final, 4)
    assert error(images, mgre.truth, mgre.tissue) < LARGEST_ERROR_3D[chain]


def test_learning_from_neighbours_in_time_pays(service: Service, cine: SimulatedScan) -> None:
    def of(chain: str) -> float:
        answer = StrictClient(service.host, service.port).scan(chain, header=cine.header, messages=cine.messages)
        return error(stack(answer.images, 6), cine.truth, cine.tissue)

    assert of("llr") < 0.8 * of("cg_sense") < 0.8 * of("fourier")


def test_fully_sampled_images_equal_the_truth_up_to_noise(service: Service, full_cine: SimulatedScan) -> None:
    for chain in ("cg_sense", "llr"):
        answer = StrictClient(service.host, service.port).scan(chain, header=full_cine.header, messages=full_cine.messages)
        assert error(stack(answer.images, 4), full_cine.truth, full_cine.tissue) < 0.025


def test_settings_of_the_console_reach_the_images(service: Service, full_cine: SimulatedScan) -> None:
    client = StrictClient(service.host, service.port, dialect="fire")
    both = client.scan(
        "fourier", header=full_cine.header, messages=full_cine.messages, parameters={"config": "cg_sense", "phase": "True"}
    )
    assert sorted({int(image.header["image_type"]) for image in both.images}) == [1, 2]
    series = {(int(i.header["image_series_index"]), int(i.header["image_type"])) for i in both.images}
    assert len(series) == 2


def test_readouts_in_any_order_give_the_same_images(service: Service, full_cine: SimulatedScan) -> None:
    client = StrictClient(service.host, service.port)
    straight = client.scan("fourier", header=full_cine.header, messages=full_cine.messages)
    noise, *imaging = full_cine.messages
    mixed = client.scan("fourier", header=full_cine.header, messages=[noise, *imaging[::-1]])
    np.testing.assert_allclose(stack(mixed.images, 4), stack(straight.images, 4), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(("chain", "settings"), [("fourier", {"combine": "adaptive"}), ("cg_sense", {}), ("fourier", {})])
def test_phase_and_complex_images_on_request(
    chain: str, settings: dict[str, str], service: Service, full_cine: SimulatedScan
) -> None:
    answer = ask(service, chain, full_cine, phase=True, complex=True, **settings)
    by_type = {kind: [i for i in answer.images if i.header["image_type"] == kind] for kind in (1, 2, 5)}
    if chain == "fourier" and not settings:  # a root sum of squares has no phase: said, not left out in silence
        assert [len(images) for images in by_type.values()] == [4, 0, 0]
        assert complaints(answer) == ["WRN only magnitudes exist here, no phase (fourier has one with combine = adaptive)\n"]
        return
    assert [len(images) for images in by_type.values()] == [4, 4, 4] and not complaints(answer)
    assert len({int(i.header["image_series_index"]) for i in answer.images}) == 3
    for magnitude, phase, whole in zip(*by_type.values(), strict=True):
        np.testing.assert_allclose(magnitude.data * np.exp(1j * phase.data), whole.data, rtol=1e-4, atol=1e-3)
