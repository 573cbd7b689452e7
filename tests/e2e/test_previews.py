"""Quick images ahead of the final ones, through the running server by a client of its own; what methods tell besides images;
and memory that runs out.

One worker computes first come, first served, so every order asserted here is decided by the order of submission, not by timing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from gadgets import pipeline, slice_work
from gadgets.chain import load_chain
from gadgets.cli import app
from gadgets.image_attributes import is_preview
from gadgets.job_folder import job_folder_of
from gadgets.meta import read_meta
from gadgets.previews import quick_chain
from gadgets.service import Service, ServiceOptions
from gadgets.tasks import SliceJob, SliceReport, reconstruct_slice
from gadgets.wire.events import Image
from recon_core.errors import UnknownMethod
from recon_core.types import ImageSeries, Result
from tests.e2e.scans import SimulatedScan, ask, complaints, error, final_images, in_memory, stack
from tests.strict_client import Answer, StrictClient
from tests.waiting import until

SCRIPT = """<?xml version="1.0"?><configuration><version>2</version><stream><external>
<execute name="gadgets" target="llr" type="python"/><configuration>
<property name="iterations" value="12"/><property name="preview" value="grasp_pro"/>
</configuration></external></stream></configuration>"""


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    """Three slices, six phases, undersampled; twice as many encoded as reconstructed pixels along the phase encoding."""
    return in_memory("cine", matrix_x=48, matrix_y=48, coils=5, states=6, slices=3, mask="vista", acceleration=2.0)


def previews(answer: Answer) -> list[Image]:
    return [image for image in answer.images if is_preview(image.attributes)]


def series_of(images: list[Image]) -> set[int]:
    return {int(image.header["image_series_index"]) for image in images}


# ---- a quick chain ---------------------------------------------------------------------------------------------------------


def test_every_slice_has_a_preview_before_any_final_image(service: Service, scan: SimulatedScan) -> None:
    client = StrictClient(service.host, service.port)
    answer = client.scan(script=SCRIPT, header=scan.header, messages=scan.messages)
    quick, final = previews(answer), final_images(answer)
    assert len(quick) == len(final) == 18 and answer.images == quick + final
    assert not complaints(answer) and "INF llr: 18 images" in answer.texts[-1]
    assert len(series_of(quick)) == 1 and series_of(final) == {1}
    assert sorted(int(i.header["image_index"]) for i in final) == list(range(1, 19))
    for number in range(3):  # the slice's own place, at once in both
        pairs = [[i for i in images if i.header["slice"] == number] for images in (quick, final)]
        for a, b in zip(*pairs, strict=True):
            for name in (
                "position",
                "read_dir",
                "phase_dir",
                "slice_dir",
                "field_of_view",
                "matrix_size",
                "phase",
                "image_index",
            ):
                np.testing.assert_array_equal(a.header[name], b.header[name], err_msg=name)
            assert read_meta(a.attributes)["ImageTypeValue4"] == ("PREVIEW",)
    truth = (scan.truth, scan.tissue)
    assert error(stack(final, 6), *truth) < error(stack(quick, 6), *truth) < 0.2
    # unscaled: the same values mean the same brightness
    ratio = np.linalg.norm(stack(quick, 6)) / np.linalg.norm(stack(final, 6))
    assert 0.9 < ratio < 1.1


def test_previews_change_nothing_about_the_final_images(service: Service, scan: SimulatedScan) -> None:
    with_them = ask(service, "llr", scan, iterations=8, preview="grasp_pro")
    without = ask(service, "llr", scan, iterations=8, preview="off")
    assert previews(with_them) and not previews(without)
    for a, b in zip(final_images(with_them), without.images, strict=True):
        # the comment says which settings were asked for, and they differ in one
        said = (a.attributes.replace("preview=grasp_pro", "preview=off"), b.attributes)
        assert said[0] == said[1]
        headers = [image.header.copy() for image in (a, b)]
        for header in headers:
            header["attribute_string_len"] = 0
        assert bytes(headers[0]) == bytes(headers[1])
        np.testing.assert_array_equal(a.data, b.data)


def test_integer_previews_have_a_scale_of_their_own_series(service: Service, scan: SimulatedScan) -> None:
    answer = ask(service, "llr", scan, iterations=8, preview="grasp_pro", pixel_type="uint16")
    quick, final = previews(answer), final_images(answer)
    assert {i.data.dtype for i in answer.images} == {np.dtype("<u2")}
    assert [int(i.header["slice"]) for i in quick[::6]] == [1, 0, 2]  # the middle one sets the scale, as of the final ones
    widths = [float(read_meta(images[0].attributes)["WindowWidth"][0]) for images in (quick, final)]
    assert 0.8 < widths[0] / widths[1] < 1.25


@pytest.mark.parametrize(
    ("chain", "preview", "log"),
    [
        ("llr", "fourier", "event=preview_failed"),  # aliased: not shown
        ("fourier", "grasp_pro", "event=preview_failed"),  # no common lines
    ],
)
def test_a_preview_that_fails_is_only_logged(
    service: Service, chain: str, preview: str, log: str, caplog: pytest.LogCaptureFixture
) -> None:
    small = {"matrix_x": 48, "matrix_y": 48, "coils": 4, "states": 2 if chain == "fourier" else 5}
    one = in_memory("cine", **small, mask="vista", acceleration=2.0 if chain == "llr" else 1.0)
    answer = ask(service, chain, one, preview=preview)
    assert not previews(answer) and not [text for text in complaints(answer) if "aliased" not in text]
    assert len(final_images(answer)) == small["states"]
    assert log in caplog.text


@pytest.mark.parametrize("name", ["preview", "script"])
def test_a_preview_that_does_not_exist_stops_the_scan(service: Service, scan: SimulatedScan, name: str) -> None:
    if name == "script":
        script = SCRIPT.replace("grasp_pro", "no_such_chain")
        answer = StrictClient(service.host, service.port).scan(script=script, header=scan.header, messages=scan.messages)
    else:
        answer = ask(service, "llr", scan, preview="no_such_chain")
    words = "chain llr.preview: not a quick chain; got 'no_such_chain'; expected auto, off or one of cg_sense"
    assert words in "".join(complaints(answer)) and not answer.images


def test_a_quick_chain_is_quick() -> None:
    slow = load_chain("llr", {"preview": "grasp_pro", "preview_iterations": "2", "virtual_coils": "20"})
    quick = quick_chain(slow, None)
    assert quick is not None and quick.method == "grasp_pro" and quick.settings.iterations == 2
    assert quick.preprocess == replace(slow.preprocess, virtual_coils=6)
    few = quick_chain(load_chain("llr", {"preview": "cg_sense", "coil_compression": "none", "virtual_coils": "4"}), None)
    assert few is not None and few.preprocess.coil_compression == "svd" and few.preprocess.virtual_coils == 6
    assert quick_chain(load_chain("llr"), None) is None
    assert quick_chain(load_chain("llr", {"preview": "off"}), None) is None


def test_a_server_can_do_without_previews(tmp_path: Path, scan: SimulatedScan) -> None:
    with Service(ServiceOptions(port=0, workers=0, threads=1, previews=False, rehearse=False)) as plain:
        answer = ask(plain, "llr", scan, iterations=2, preview="grasp_pro")
    assert len(answer.images) == 18 and not previews(answer)


# ---- a method's own previews -----------------------------------------------------------------------------------------------


def reconstruct_with_previews(job: SliceJob) -> Result:
    """As a slow method does: rough images first; it goes on when they have been fetched."""
    report = SliceReport(job)
    for strength in (1.0, 2.0):
        data = torch.full((6, *job.scan.matrix), strength * (1 + job.slice_index), dtype=torch.complex64)
        report.preview(ImageSeries("preview", data))
        if job.previews:
            until(lambda: not list(Path(job.report_folder).glob(f"{job.tag}.preview-*")))  # fetched ones are removed
    report.preview(ImageSeries("preview", torch.ones(6, 1, 3, 3)))  # on no matrix of this scan
    return reconstruct_slice(job)


@pytest.mark.parametrize("wanted", ["auto", "off"])
def test_a_methods_own_previews_leave_while_it_computes(
    service: Service, scan: SimulatedScan, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slice_work, "reconstruct_slice", reconstruct_with_previews)
    answer = ask(service, "llr", scan, iterations=4, preview=wanted)
    quick, final = previews(answer), final_images(answer)
    assert len(final) == 18 and series_of(final) == {1} and not complaints(answer)
    if wanted == "off":
        assert not quick
        return
    # a series for each round: two images of one slice and state never share one
    assert len(quick) == 36 and len(series_of(quick)) == 2
    for number in range(3):
        rounds = [i for i in answer.images if i.header["slice"] == number]
        assert [is_preview(i.attributes) for i in rounds] == [True] * 12 + [False] * 6
        levels = [float(np.median(i.data)) for i in rounds[:12]]
        np.testing.assert_allclose(levels, [1.0 + number] * 6 + [2.0 * (1 + number)] * 6, rtol=1e-5)
        assert {i.data.shape for i in rounds} == {final[0].data.shape}


# ---- progress --------------------------------------------------------------------------------------------------------------


def reconstruct_slowly(job: SliceJob) -> Result:
    """Half done until the operator has heard of it."""
    report = SliceReport(job)
    report.progress(0.0)
    report._last = 0.0  # reports of the last tenth of a second would be swallowed
    report.progress(0.5)
    until(lambda: (Path(job.report_folder) / f"heard-{job.slice_index}").exists())
    return reconstruct_slice(job)


def test_the_operator_hears_how_far_it_is(service: Service, scan: SimulatedScan, monkeypatch: pytest.MonkeyPatch) -> None:
    original = slice_work.SliceWork.progress

    def progress(work: slice_work.SliceWork, name: str) -> str | None:
        line = original(work, name)
        for number, percent in enumerate((17, 50, 83)):  # half of one, one and a half, two and a half of three slices
            if line is not None and f" {percent} %" in line:
                (work.reports.folder / f"heard-{number}").touch()
        return line

    monkeypatch.setattr(slice_work.SliceWork, "progress", progress)
    monkeypatch.setattr(slice_work, "PROGRESS_SECONDS", 0.0)
    monkeypatch.setattr(slice_work, "reconstruct_slice", reconstruct_slowly)
    answer = ask(service, "llr", scan)
    assert len(answer.images) == 18 and not complaints(answer)
    told = [int(found[1]) for text in answer.texts if (found := re.fullmatch(r"DBG llr (\d+) %(, about .* left)?\n", text))]
    # a slice begins to count again when its method does, and may say the same once more
    assert [percent for percent in dict.fromkeys(told) if percent in (17, 50, 83)] == [17, 50, 83]


# ---- the job folder --------------------------------------------------------------------------------------------------------


@pytest.fixture
def keeping(tmp_path: Path) -> Iterator[Service]:
    with Service(ServiceOptions(port=0, workers=1, threads=1, spool=tmp_path / "spool", rehearse=False)) as running:
        yield running


def test_what_a_method_tells_lies_beside_the_capture(keeping: Service, scan: SimulatedScan, tmp_path: Path) -> None:
    assert len(ask(keeping, "grasp_pro", scan, iterations=3).images) == 18
    ask(keeping, "fourier", scan)
    keeping.close()  # waits for what is being written
    chains = {
        json.loads(path.read_text())["chain"]: path.with_suffix(".mrd") for path in (tmp_path / "spool").glob("*.json")
    }
    assert not job_folder_of(chains["fourier"]).exists()  # it tells nothing
    folder = job_folder_of(chains["grasp_pro"])
    for number in range(3):
        with np.load(folder / f"slice-{number:04d}.npz", allow_pickle=False) as kept:
            basis = kept["temporal_basis"]
        np.testing.assert_allclose(basis.conj().T @ basis, np.eye(basis.shape[1]), atol=1e-5)
    quality = json.loads((folder / "quality.json").read_text())
    assert quality["slices"]["2"]["quality"]["iterations"] == 3.0


def test_a_job_folder_that_cannot_be_written_costs_no_image_and_is_told(tmp_path: Path, full_cine: SimulatedScan) -> None:
    (tmp_path / "quality.json" / "in the way").mkdir(parents=True)
    asked = ("run", full_cine.path, "-c", "fourier", "-o", tmp_path / "images.h5", "--workers", 0, "--job-folder", tmp_path)
    done = CliRunner().invoke(app, list(map(str, asked)))
    assert done.exit_code == 0 and "4 images in" in done.stdout
    assert "what the method tells besides:" not in done.output
    assert f"WRN not all that the method tells besides is in {tmp_path}: Is a directory" in done.stderr


# ---- memory that runs out --------------------------------------------------------------------------------------------------


def reconstruct_without_memory(job: SliceJob) -> Result:
    """The method wants more than any machine has; its stand-in does not."""
    if job.role == "slice" and job.slice_index == 1:
        torch.empty(1 << 58, dtype=torch.complex64)
    return reconstruct_slice(job)


def test_a_method_that_runs_out_of_memory_is_replaced_loudly(
    service: Service, scan: SimulatedScan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slice_work, "reconstruct_slice", reconstruct_without_memory)
    answer = ask(service, "llr", scan)
    *steps, told = complaints(answer)
    assert all(step.startswith("WRN") and "memory" in step for step in steps)  # smaller batches were tried first
    assert told.startswith("WRN llr failed in slice 1 (out of memory on this machine: 2147483648.00 GiB more were asked for")
    assert "its images come from cg_sense" in told and "alloc_cpu" not in told
    assert len(answer.images) == 18
    marked = {int(i.header["slice"]) for i in answer.images if "llr failed" in i.attributes}
    assert marked == {1}


def test_without_a_fallback_the_reason_is_said_as_well(
    service: Service, scan: SimulatedScan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slice_work, "reconstruct_slice", reconstruct_without_memory)
    answer = ask(service, "fourier", scan)  # has no fallback
    assert {int(i.header["slice"]) for i in answer.images} == {0}  # what was ready is not lost
    (told,) = [text for text in answer.texts if text.startswith("ERROR")]
    assert "OutOfMemory: out of memory on this machine" in told and "internal error" not in told


def test_the_reason_of_an_unexpected_failure_is_its_kind_only() -> None:
    assert pipeline._reason(ZeroDivisionError("patient 4711")) == "ZeroDivisionError"
    assert pipeline._reason(UnknownMethod("no such method")) == "no such method"
    assert pipeline._reason(MemoryError()).startswith("out of memory on this machine. Use")
