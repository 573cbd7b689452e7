"""The states of one slice or slab on several workers, here and on a Dask cluster: the bits of one worker, whatever happens to a part."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gadgets import slice_work
from gadgets.image_attributes import is_preview
from gadgets.previews import Previews
from gadgets.scheduler_options import SchedulerOptions
from gadgets.service import Service, ServiceOptions
from gadgets.slice_parts import reconstruct_states
from gadgets.slice_work import SliceWork
from gadgets.tasks import SliceJob
from recon_core.errors import DataError
from recon_core.state_images import StateImages
from tests.e2e.multi_echo_head import multi_echo_head
from tests.e2e.scans import SimulatedScan, ask, complaints, in_memory
from tests.strict_client import Answer
from tests.waiting import until

QSM: dict[str, Any] = {"maps": "qsm", "map_background": "v_sharp", "map_inversion": "tkd"}


@pytest.fixture(scope="module")
def local() -> Iterator[Service]:
    """Three workers of this machine."""
    with Service(ServiceOptions(port=0, workers=3, threads=1, rehearse=False)) as running:
        yield running


@pytest.fixture(scope="module")
def cluster() -> Iterator[Service]:
    """Three Dask workers; no file of the server is given to them."""
    options = ServiceOptions(port=0, workers=1, threads=1, rehearse=False, scheduler=SchedulerOptions("local:3"))
    with Service(options) as running:
        until(lambda: running.jobs.capacity == 3, "the cluster is not whole")
        yield running


@pytest.fixture(params=["local", "cluster"])
def several(request: pytest.FixtureRequest) -> Service:
    service: Service = request.getfixturevalue(request.param)
    until(lambda: service.jobs.capacity == 3, "a worker is missing")
    return service


@pytest.fixture
def cuts(monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[int, int]]]:
    """How slices were cut, one entry each time one was submitted."""
    seen: list[list[tuple[int, int]]] = []
    original = SliceWork._cuts

    def noting(work: SliceWork, *arguments: Any) -> list[tuple[int, int]]:
        seen.append(original(work, *arguments))
        return seen[-1]

    monkeypatch.setattr(SliceWork, "_cuts", noting)
    return seen


@pytest.fixture(scope="module")
def slab() -> SimulatedScan:
    """One slab of four echoes, two-fold undersampled in both directions."""
    return multi_echo_head(mask="poisson", acceleration=2.0, orientation="oblique")[0]


@pytest.fixture(scope="module")
def slice_() -> SimulatedScan:
    """One slice of six phases, complete, so that plain Fourier may stand in."""
    return in_memory("cine", matrix_x=48, matrix_y=48, coils=4, states=6, slices=1)


def assert_same(one: Answer, other: Answer) -> None:
    """The same images and maps, bit for bit and word for word."""

    def ordered(answer: Answer) -> list[Any]:
        return sorted(answer.images, key=lambda i: (int(i.header["image_series_index"]), int(i.header["image_index"])))

    assert len(one.images) == len(other.images) > 0
    for a, b in zip(ordered(one), ordered(other), strict=True):
        np.testing.assert_array_equal(a.data, b.data)
        assert a.attributes == b.attributes


def test_echoes_and_maps_are_those_of_one_worker(
    service: Service, several: Service, slab: SimulatedScan, cuts: list[list[tuple[int, int]]]
) -> None:
    one = ask(service, "cg_sense", slab, **QSM)
    assert cuts == [[]] and not complaints(one)
    assert any("QSM" in image.attributes for image in one.images)
    spread = ask(several, "cg_sense", slab, **QSM)
    assert cuts[1:] == [[(0, 1), (1, 2), (2, 4)]]
    assert complaints(spread) == complaints(one)
    assert_same(spread, one)


@pytest.mark.parametrize("settings", [{"combine": "rss"}, {"combine": "adaptive", "phase": True}], ids=["rss", "adaptive"])
def test_phases_by_fourier_are_those_of_one_worker(
    service: Service, local: Service, slice_: SimulatedScan, cuts: list[list[tuple[int, int]]], settings: dict[str, Any]
) -> None:
    one, spread = ask(service, "fourier", slice_, **settings), ask(local, "fourier", slice_, **settings)
    assert cuts == [[], [(0, 2), (2, 4), (4, 6)]]
    assert_same(spread, one)


def die_once(job: SliceJob, marker: str) -> StateImages:
    """The worker of the second part is killed, the first time."""
    assert job.states is not None
    if job.states[0] == 2:
        try:
            Path(marker).touch(exist_ok=False)
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return reconstruct_states(job)


def test_a_worker_that_is_killed_in_one_part_costs_no_image(
    service: Service, several: Service, slice_: SimulatedScan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "died"
    monkeypatch.setattr(slice_work, "reconstruct_states", partial(die_once, marker=str(marker)))
    spread = ask(several, "cg_sense", slice_)
    assert marker.exists() and not complaints(spread)
    assert_same(spread, ask(service, "cg_sense", slice_))


def fail_last(job: SliceJob) -> StateImages:
    """One part of the method's fails, none of its stand-in's."""
    assert job.states is not None
    if job.role == "slice" and job.states[0] == 4:
        raise DataError("not this time", where="the last part")
    return reconstruct_states(job)


def test_a_part_that_fails_makes_the_stand_in_answer_for_all_states(
    service: Service,
    several: Service,
    slice_: SimulatedScan,
    cuts: list[list[tuple[int, int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slice_work, "reconstruct_states", fail_last)
    answer = ask(several, "cg_sense", slice_)
    assert cuts == [[(0, 2), (2, 4), (4, 6)]] * 2
    assert len(answer.images) == 6 and all("cg_sense failed" in image.attributes for image in answer.images)
    (told,) = complaints(answer)
    assert "the last part" in told and "come from fourier" in told
    plain = ask(service, "fourier", slice_, virtual_coils=12, coil_compression="svd")
    for a, b in zip(answer.images, plain.images, strict=True):
        np.testing.assert_array_equal(a.data, b.data)


def starve(job: SliceJob) -> StateImages:
    """A part that wants more memory than there is."""
    raise MemoryError


def test_a_part_without_memory_gives_way_to_one_task_for_all_states(
    service: Service,
    local: Service,
    slice_: SimulatedScan,
    cuts: list[list[tuple[int, int]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slice_work, "reconstruct_states", starve)
    answer = ask(local, "cg_sense", slice_)
    assert cuts == [[(0, 2), (2, 4), (4, 6)], []]
    (told,) = complaints(answer)
    assert "memory on this machine is short" in told
    for a, b in zip(answer.images, ask(service, "cg_sense", slice_).images, strict=True):
        np.testing.assert_array_equal(a.data, b.data)


def after_the_preview(job: SliceJob, marker: str) -> StateImages:
    """Final images wait until the quick ones have left."""
    if job.role == "slice":
        until(Path(marker).exists, "no preview left")
    return reconstruct_states(job)


def test_a_preview_is_of_all_states(
    local: Service, slice_: SimulatedScan, cuts: list[list[tuple[int, int]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "left"
    original = Previews.messages

    def noting(previews: Previews) -> Iterator[bytes]:
        for message in original(previews):
            marker.touch()
            yield message

    monkeypatch.setattr(Previews, "messages", noting)
    monkeypatch.setattr(slice_work, "reconstruct_states", partial(after_the_preview, marker=str(marker)))
    answer = ask(local, "cg_sense", slice_, preview="fourier")
    assert cuts == [[(0, 2), (2, 4), (4, 6)]] * 2 and not complaints(answer)
    assert [is_preview(image.attributes) for image in answer.images] == [True] * 6 + [False] * 6
