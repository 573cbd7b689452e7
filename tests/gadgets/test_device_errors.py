"""GPUs that fail: told from other errors, their processes ended, and looked for again after a while."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gadgets import queries
from gadgets.device_errors import device_failure
from gadgets.devices import device_of_task
from gadgets.errors import DeviceFailed, DeviceFailedHere, OutOfGpuMemory
from gadgets.jobs import Jobs
from gadgets.monitor import health
from gadgets.monitor.folder import Folder
from recon_core.errors import DataError
from tests.gadgets.worker_tasks import process_id
from tests.monitor import spools
from tests.waiting import PATIENCE, is_alive, until

WORDS = (
    "CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be asynchronously reported at some other API "
    "call, so the stacktrace below might be incorrect.\nCompile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)


def lose_the_gpu(words: str = WORDS) -> None:
    raise RuntimeError(words)


def lose_the_gpu_as_torch_does() -> None:
    raise torch.AcceleratorError(WORDS)


@pytest.mark.parametrize(
    ("words", "got"),
    [
        (WORDS, "an illegal memory access was encountered"),
        ("CUDA error: device-side assert triggered\nCUDA kernel errors", "device-side assert triggered"),
        ("CUDA error: unspecified launch failure", "unspecified launch failure"),
        (
            "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(handle, 1)`",
            "CUBLAS_STATUS_EXECUTION_FAILED",
        ),
        ("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED", "CUDNN_STATUS_EXECUTION_FAILED"),
        ("cuFFT error: CUFFT_EXEC_FAILED", "CUFFT_EXEC_FAILED"),
        ("cusolver error: CUSOLVER_STATUS_INTERNAL_ERROR, when calling `f`", "CUSOLVER_STATUS_INTERNAL_ERROR"),
        ("Triton Error [CUDA]: an illegal memory access was encountered", "an illegal memory access was encountered"),
        ("No CUDA GPUs are available", None),
        ("Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility", None),
    ],
)
def test_how_libraries_say_it(words: str, got: str | None) -> None:
    told = device_failure(RuntimeError(words))
    assert type(told) is DeviceFailed and told.got == got and "TORCH_USE" not in str(told)
    assert type(device_failure(RuntimeError(words), here=True)) is DeviceFailedHere


def test_torchs_own_kind_needs_no_words() -> None:
    assert device_failure(torch.AcceleratorError("something new")) is not None


@pytest.mark.parametrize(
    "error",
    [
        None, RuntimeError("shape '[3]' is invalid"), ValueError(WORDS), DataError("CUDA error: x"), OutOfGpuMemory("x"),
        torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)  # fmt: skip
def test_other_failures_are_none_of_the_gpu(error: Exception | None) -> None:
    assert device_failure(error) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_gpu_that_is_gone_is_a_failed_one() -> None:
    assert device_of_task("auto") == "cpu"
    with pytest.raises(DeviceFailed, match="no GPU any more; got cuda"):
        device_of_task("cuda")


@pytest.fixture(scope="module")
def worker() -> Iterator[Jobs]:
    jobs = Jobs(1, threads=1, rehearse=False)
    yield jobs
    jobs.close()


@pytest.mark.parametrize("task", [lose_the_gpu, lose_the_gpu_as_torch_does])
def test_a_worker_whose_gpu_failed_is_ended(worker: Jobs, task: object, caplog: pytest.LogCaptureFixture) -> None:
    before = worker.submit(process_id).result(PATIENCE)
    with pytest.raises(DeviceFailed, match="the GPU failed; got an illegal memory access was encountered"):
        worker.submit(task).result(PATIENCE)  # type: ignore[arg-type]
    assert "event=device_failed" in caplog.text and "event=worker_ended" in caplog.text
    assert worker.submit(process_id).result(PATIENCE) != before
    until(lambda: not is_alive(before), "the process still runs")


def test_in_this_process_the_error_says_so() -> None:
    jobs = Jobs(0, threads=1, rehearse=False)
    with pytest.raises(DeviceFailedHere):
        jobs.submit(lose_the_gpu).result(PATIENCE)
    assert jobs.submit(process_id).result(PATIENCE) == os.getpid()
    jobs.close()


def test_a_gpu_that_falls_off_is_missed_and_one_that_comes_back_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool, devices = tmp_path / "nvidia-smi", tmp_path / "devices"
    tool.write_text(f"#!/bin/sh\nexec cat {devices}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(queries, "GPU_SECONDS", 0.05)
    root = tmp_path / "spool"

    def level() -> str:
        spools.put_status(root, device="cuda")
        return next(check.level for check in health.checks(Folder(root)) if check.name == "gpu")

    devices.write_text("NVIDIA X, 80 GiB, 9.0, 580.1\n")
    until(lambda: level() == "ok", "the GPU is not seen")
    assert queries.answer("gadgetron::cuda::driver") == "580.1"
    devices.unlink()  # the tool fails, as it does then
    until(lambda: level() == "failing", "the GPU is not missed")
    assert queries.answer("gadgetron::cuda::driver") == "N/A"
    devices.write_text("NVIDIA X, 80 GiB, 9.0, 580.1\n")
    until(lambda: level() == "ok", "the GPU that is back is not seen")
    queries._gpus.cache_clear()


def test_an_answer_of_the_drivers_tool_counts_for_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = tmp_path / "asked"
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho >>{asked}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(queries, "GPU_SECONDS", 1e9)
    queries._gpus.cache_clear()
    assert [queries.gpus() for _ in range(5)] == [()] * 5
    assert len(asked.read_text()) == 1
    queries._gpus.cache_clear()
