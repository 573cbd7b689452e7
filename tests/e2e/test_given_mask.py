"""A susceptibility in a mask that somebody made, by name, through the running server: states on two workers, and all in one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from gadgets.service import Service, ServiceOptions
from gadgets.wire.events import Image
from tests.e2e.multi_echo_head import INSERTS
from tests.e2e.scans import ask, complaints
from tests.e2e.test_qsm import contrast, head, inner, maps_of
from tests.e2e.test_t1_maps import meta, values
from tests.strict_client import Answer

QSM: dict[str, Any] = {"maps": "qsm", "map_failure": "warn", "map_echo_images": False}


def drawn() -> NDArray[np.bool_]:
    """The anterior half of the brain and a little more: no method would find it, and it is mirrored along no axis."""
    brain = head()[1].brain.copy()
    brain[:, : brain.shape[1] // 2 - 6] = False
    return brain


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("masks")
    mask = drawn()
    np.save(folder / "half.npy", mask)
    np.save(folder / "turned.npy", mask.T)
    np.save(folder / "empty.npy", np.zeros_like(mask))
    (folder / "damaged.npy").write_bytes(b"\x93NUMPY")
    np.save(folder.parent / "outside.npy", mask)
    (folder / "folder.npy").mkdir()
    (folder / "broken.h5").write_bytes(b"\x89HDF")
    return folder


@pytest.fixture(scope="module", params=[2, 0], ids=["states on two workers", "one process"])
def server(request: pytest.FixtureRequest, masks: Path) -> Iterator[Service]:
    with Service(
        ServiceOptions(port=0, workers=request.param, threads=1, spool=None, masks=masks, rehearse=False)
    ) as running:
        yield running


def pixels(image: Image) -> NDArray[Any]:
    return np.asarray(image.data)


def only_r2star(answer: Answer) -> bool:
    return bool(contrast(answer)) and sorted(maps_of(answer)) == ["R2STAR", "R2STARSD", "S0"]


def test_maps_are_made_in_the_given_mask_and_nowhere_else(server: Service) -> None:
    scan, truth = head()
    given = ask(server, "cg_sense", scan, map_mask_file="half", **QSM)
    found = ask(server, "cg_sense", scan, **QSM)
    assert not complaints(given)
    ours, theirs = maps_of(given), maps_of(found)
    np.testing.assert_array_equal(np.isfinite(values(ours["BRAINMASK"])), drawn())
    assert "as given" in ours["BRAINMASK"].attributes and "as given" not in theirs["BRAINMASK"].attributes
    assert np.isfinite(values(theirs["BRAINMASK"])).sum() > 1.2 * drawn().sum()
    for role in ("R2STAR", "R2STARSD", "S0"):
        np.testing.assert_array_equal(pixels(ours[role]), pixels(theirs[role]))
    ppm = values(ours["QSM"]) / 1e3
    assert np.isfinite(ppm).sum() > 0.5 * drawn().sum() and not np.isfinite(ppm[~drawn()]).any()
    inside = [(sphere & drawn(), row[2]) for sphere, row in zip(truth.inserts, INSERTS, strict=True)]
    whole = [
        (sphere, true) for (sphere, true), all_ in zip(inside, truth.inserts, strict=True) if sphere.sum() == all_.sum()
    ]
    assert len(whole) >= 2
    brain = np.median(inner(drawn() & (truth.chi == 0), ppm))
    for sphere, true in whole:
        assert float(inner(sphere, ppm).mean()) - brain == pytest.approx(true, abs=0.05)


def test_a_mask_that_cannot_be_used_is_named_and_none_is_looked_for_in_its_place(server: Service) -> None:
    said = ask(server, "cg_sense", head()[0], map_mask_file="turned", **QSM)
    assert only_r2star(said)
    assert any("not (x, y, z)" in text for text in complaints(said))
    assert any("R2* only, no susceptibility map" in text for text in complaints(said))


def test_where_maps_must_be_made_the_chain_is_refused_and_its_fallback_says_so(server: Service) -> None:
    said = ask(
        server, "llr_qsm", head()[0], map_mask_file="turned", map_failure="error", map_echo_images=False, iterations=2
    )
    assert only_r2star(said)
    assert any("llr_qsm failed" in text and "not (x, y, z)" in text for text in complaints(said))
    assert "fallback" in " ".join(said.texts) or any("its images come from" in text for text in complaints(said))
    assert all("QSM" not in meta(image).get("ImageTypeValue4", ()) for image in said.images)


@pytest.mark.parametrize(
    ("setting", "name", "words"),
    [
        (
            "map_mask_file",
            "absent",
            "no such mask on this server; got 'absent'; expected one of damaged, empty, half, turned",
        ),
        ("map_mask_file", "../outside", "no such mask on this server"),
        ("map_mask_file", "folder", "no such mask on this server"),
        ("map_mask_file", "empty", "mask is empty"),
        ("map_mask_file", "damaged", "not a readable mask"),
        ("sampling_mask", "half", "no such mask on this server"),
        ("sampling_mask", "broken", "not a readable HDF5 file"),
    ],
)
def test_a_mask_that_was_chosen_and_is_none_stops_the_scan_before_its_first_readout(
    server: Service, setting: str, name: str, words: str
) -> None:
    said = ask(server, "cg_sense", head()[0], messages=(), **{**QSM, setting: name})
    (complaint,) = complaints(said)
    assert complaint.startswith(("ERROR MaskError", "ERROR DataError")) and words in complaint


def test_a_mask_of_another_matrix_is_doubted_as_the_scan_begins(server: Service) -> None:
    turned, last = complaints(ask(server, "cg_sense", head()[0], messages=(), map_mask_file="turned", **QSM))
    assert "not (x, y, z)" in turned and "no readouts" in last
