"""Short memory: smaller batches, then the CPU, then the fallback; each step said once."""

from __future__ import annotations

import logging
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gadgets.device_errors import device_failure
from gadgets.errors import JobFailed, OutOfGpuMemory, OutOfMemory, TimeLimitReached, WorkerDied, WorkerKilled
from gadgets.memory_ladder import RUNGS, Ladder
from gadgets.slice_work import SliceWork
from recon_core.batches import batch, batch_share
from recon_core.operators.cartesian import CartesianSense
from tests.e2e.slow_chain import write_chain

USUAL, SMALLER, CPU = RUNGS


def gpu() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB.")


def cpu() -> Exception:
    """As torch really raises it."""
    try:
        torch.empty(1 << 60)
    except RuntimeError as error:
        return error
    raise AssertionError("this machine has an exbibyte")


def test_a_gpu_gives_way_to_smaller_batches_and_then_to_the_cpu() -> None:
    ladder = Ladder()
    assert ladder.rung is USUAL
    assert "smaller batches" in (ladder.down("llr", USUAL, gpu()) or "")
    assert ladder.rung is SMALLER
    assert "on the CPU" in (ladder.down("llr", SMALLER, OutOfGpuMemory("out of memory on the GPU")) or "")
    assert ladder.rung is CPU and ladder.down("llr", CPU, cpu()) is None


@pytest.mark.parametrize("error", [cpu(), OutOfMemory("x"), MemoryError(), WorkerKilled("a worker process died twice")])
def test_a_cpu_has_one_step(error: Exception) -> None:
    ladder = Ladder()
    assert ladder.down("llr", USUAL, error) is not None
    assert ladder.rung is SMALLER and ladder.down("llr", SMALLER, error) is None


@pytest.mark.parametrize("error", [ValueError("x"), JobFailed("x"), WorkerDied("x"), TimeLimitReached("x")])
def test_other_failures_take_no_step(error: Exception) -> None:
    ladder = Ladder()
    assert ladder.down("llr", USUAL, error) is None and ladder.rung is USUAL


def test_a_step_is_logged_once_and_never_taken_back(caplog: pytest.LogCaptureFixture) -> None:
    ladder = Ladder()
    words = {ladder.down("llr", USUAL, gpu()) for _ in range(5)}  # five slices were under way
    assert len(words) == 1
    ladder.down("llr", SMALLER, gpu())
    assert words == {ladder.down("llr", USUAL, gpu())} and ladder.rung is CPU
    steps = [record for record in caplog.records if "event=memory_step" in record.getMessage()]
    assert len(steps) == 2 and all(record.levelno == logging.WARNING for record in steps)


def lost_gpu() -> Exception:
    return RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might be reported later")


def test_a_failed_gpu_is_left_for_another_worker_once_and_then_for_the_cpu(caplog: pytest.LogCaptureFixture) -> None:
    ladder = Ladder()
    words = [ladder.down("llr", USUAL, lost_gpu(), slice_) for slice_ in (0, 1)]
    assert words == ["llr: the GPU failed; it goes on on another worker"] * 2 and ladder.rung is USUAL
    assert ladder.down("llr", USUAL, lost_gpu(), 0) == "llr: the GPU failed; it goes on on the CPU"
    assert ladder.rung is CPU
    assert ladder.down("llr", USUAL, lost_gpu(), 2) == "llr: the GPU failed; it goes on on the CPU"  # begun before
    assert ladder.down("llr", CPU, lost_gpu(), 0) is None and ladder.down("llr", CPU, cpu(), 0) is None
    steps = [record.getMessage() for record in caplog.records if "event=device_step" in record.getMessage()]
    assert [step.split("to=")[1].split(" reason")[0] for step in steps] == ["'on another worker'"] * 2 + ["'on the CPU'"]
    assert all("an illegal memory access was encountered" in step for step in steps)


def test_in_the_servers_own_process_only_the_cpu_is_left() -> None:
    ladder = Ladder()
    failed = device_failure(lost_gpu(), here=True)
    assert failed is not None and "on the CPU" in (ladder.down("llr", SMALLER, failed, 0) or "") and ladder.rung is CPU


def test_memory_and_the_gpu_fail_one_after_the_other() -> None:
    ladder = Ladder()
    assert "another worker" in (ladder.down("llr", USUAL, lost_gpu(), 0) or "")
    assert "smaller batches" in (ladder.down("llr", USUAL, gpu(), 0) or "")
    assert "on the CPU" in (ladder.down("llr", SMALLER, lost_gpu(), 0) or "")


class Recorder:
    """Takes tasks as a scope does; the test answers them."""

    def __init__(self) -> None:
        self.jobs: list[Any] = []
        self.options: list[dict[str, Any]] = []
        self.futures: list[Future[Any]] = []

    def submit(self, task: Any, job: Any, **options: Any) -> Future[Any]:
        self.jobs.append(job)
        self.options.append(options)
        self.futures.append(Future())
        return self.futures[-1]


def test_slices_go_on_where_the_last_one_succeeded(tmp_path: Path) -> None:
    from gadgets.chain import load_chain

    tasks = Recorder()
    services = SimpleNamespace(jobs=SimpleNamespace(capacity=1), device="cuda", previews=False, time_limit=0.0)
    scan = SimpleNamespace(n_slices=3, scan_info=lambda number: None)
    work = SliceWork(tasks, services, load_chain("llr"), tmp_path, scan, None, whitened=True)  # type: ignore[arg-type]
    work.begin([0])
    for failure in (gpu(), gpu()):
        tasks.futures[-1].set_exception(failure)
        assert work.ease(0) is not None
    tasks.futures[-1].set_result("images")
    assert work.ease(0) is None and work.take(0) == "images"
    work.begin([0, 1])
    shares = [(job.slice_index, job.batch_share, job.cpu_only, job.device) for job in tasks.jobs]
    assert shares == [(0, 1.0, False, "cuda"), (0, 0.125, False, "cuda"), (0, 0.125, True, "cuda"), (1, 0.125, True, "cuda")]
    assert [options["alone"] for options in tasks.options] == [False, True, True, True]


def test_batches_shrink_and_images_stay() -> None:
    maps = torch.randn(6, 1, 64, 96, dtype=torch.complex64)
    weights = (torch.rand(3, 1, 64) < 0.5).float()
    image = torch.randn(3, 96, 1, 64, dtype=torch.complex64)
    usual = CartesianSense(maps, weights).normal(image)
    with batch_share(1e-4):
        assert batch(1 << 19) == 52
        small = CartesianSense(maps, weights)
        assert len(small._columns) == 96
        torch.testing.assert_close(small.normal(image), usual, rtol=1e-6, atol=1e-6)
    assert batch(7) == 7


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_shares_that_are_none(share: float) -> None:
    with pytest.raises(ValueError, match="batch share"), batch_share(share):
        pass


SCRIPT = """
import resource, sys
from pathlib import Path
from types import SimpleNamespace
import torch
torch.set_num_threads(1)
from gadgets.service import Service, ServiceOptions
from recon_core.batches import batch
from recon_core.methods import get_method, methods
from tests.e2e.scans import ask, in_memory

def hungry(divisible):
    def reconstruct(kspace, scan, settings, report):
        torch.empty(batch(6 << 30) if divisible else 6 << 30, dtype=torch.uint8)  # really asked for
        return get_method("fourier").reconstruct(kspace, scan, get_method("fourier").Settings(), report)
    settings = get_method("fourier").Settings
    return SimpleNamespace(NAME="x", SUMMARY="", NEEDS_COIL_MAPS=False, Settings=settings, reconstruct=reconstruct)

methods()["hungry"], methods()["greedy"] = hungry(True), hungry(False)
scan = in_memory("cine", matrix_x=32, matrix_y=32, coils=2, states=2, slices=3)
with Service(ServiceOptions(port=0, workers=0, threads=1, configs=Path(sys.argv[1]), rehearse=False)) as service:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + (3 << 30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for chain in ("hungry", "greedy"):
        answer = ask(service, chain, scan)
        print(chain, len(answer.images), sum("_instead_of_" in image.attributes for image in answer.images))
        print("".join(text for text in answer.texts if text.startswith("WRN")), end="")
"""


def test_a_scan_without_memory_gets_its_images(tmp_path: Path) -> None:
    """A process that may have 3 GiB more; one method wants 6 at once or an eighth of that, the other 6 and no less."""
    for chain in ("hungry", "greedy"):
        write_chain(tmp_path, chain, chain, "quick")
    write_chain(tmp_path, "quick", "fourier")
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    step = "memory on this machine is short; it goes on with smaller batches, one slice at a time"
    assert lines[:4] == ["hungry 6 0", f"WRN hungry: {step}", "greedy 6 6", f"WRN greedy: {step}"]
    assert len(lines) == 7 and all("come from quick" in line for line in lines[4:])  # one for each slice
    assert done.stderr.count("event=memory_step") == 2
