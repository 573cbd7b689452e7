"""Files that we write are for their owner alone, and links do not lead out of our folders."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gadgets.capture import capture_status, sidecar
from gadgets.job_folder import remove_orphans
from gadgets.noise_store import NoiseStore
from gadgets.orphans import module_process
from gadgets.pacs import Attempt, Destination
from gadgets.pacs_queue import Queue
from gadgets.private_folder import make_private
from gadgets.service import Service, ServiceOptions
from gadgets.spool import Spool
from tests.e2e.scans import SimulatedScan, ask, in_memory
from tests.waiting import PATIENCE

ARCHIVE = Destination("127.0.0.1", 104, "ARCHIVE")


@pytest.fixture
def no_mask() -> Iterator[None]:
    """A user who shares everything."""
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    return in_memory("cine", matrix_x=24, matrix_y=24, coils=2, states=2, slices=1)


def open_to_others(root: Path) -> list[str]:
    """Everything below (and) ``root`` that anybody but its owner may touch."""
    paths = [root, *root.rglob("*")]
    return [str(path.relative_to(root)) for path in paths if stat.S_IMODE(path.lstat().st_mode) & 0o077]


def test_what_a_scan_leaves_is_for_its_owner_alone(no_mask: None, scan: SimulatedScan, tmp_path: Path) -> None:
    """Captures, sidecars, journal, job folders, noise measurements: with a mask of 0 and a folder that was open before."""
    state = tmp_path / "state"
    (state / "spool").mkdir(parents=True)
    options = ServiceOptions(port=0, workers=0, threads=1, spool=state / "spool", noise=state / "noise", rehearse=False)
    with Service(options) as service:
        for chain in ("cg_sense", "no_such_chain"):
            ask(service, chain, scan)
    written = [path for path in state.rglob("*") if path.is_file()]
    assert len(written) >= 4
    assert open_to_others(state / "spool") == [] and open_to_others(state / "noise") == []


def test_the_queue_of_an_archive(no_mask: None, tmp_path: Path) -> None:
    root = tmp_path / "queue"
    (root / "waiting").mkdir(parents=True)  # open to everybody
    source = tmp_path / "image.dcm"
    source.write_bytes(b"DICM")
    Queue(root).put([source], ARCHIVE)
    left = [name for name in open_to_others(root) if not name.endswith(("job.json", "lock"))]  # no patient data in these
    assert left == []


@pytest.mark.parametrize(
    "make", [lambda root: Queue(root), lambda root: NoiseStore(root), lambda root: Spool(root), make_private]
)
def test_a_folder_that_was_open_is_closed(make: object, tmp_path: Path) -> None:
    root = tmp_path / "folder"
    root.mkdir(mode=0o777)
    root.chmod(0o777)
    make(root)  # type: ignore[operator]
    assert stat.S_IMODE(root.stat().st_mode) == 0o700


def test_a_folder_of_another_user_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told by the number that the kernel gives: as another user, our own folder is somebody else's."""
    root = tmp_path / "folder"
    root.mkdir()
    mine = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    with pytest.raises(PermissionError):
        make_private(root)


def test_links_in_the_spool_lead_nowhere(tmp_path: Path) -> None:
    """Eviction removes the link, never what it points to; adopting leaves it as it is."""
    treasure, folder = tmp_path / "treasure.txt", tmp_path / "folder"
    treasure.write_bytes(b"x" * 5000)
    folder.mkdir()
    (folder / "kept").write_text("kept")
    root = tmp_path / "spool"
    root.mkdir()
    (root / "20200101T000000.000000Z-00000000.mrd").symlink_to(treasure)
    (root / "20200101T000000.000000Z-00000000.job").symlink_to(folder)
    (root / "20200101T000000.000000Z-00000001.job").symlink_to(folder)
    spool = Spool(root, max_bytes=1000, min_free_bytes=0)
    spool.make_room(5000)
    remove_orphans(root)
    assert treasure.read_bytes() == b"x" * 5000 and (folder / "kept").read_text() == "kept"


def test_links_in_temporary_storage_lead_nowhere(tmp_path: Path) -> None:
    """Anybody may put a link into /tmp under the name of a log that a dead server left."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "kept").write_text("kept")
    os.utime(precious, (0, 0))
    shared = tmp_path / "tmp"
    shared.mkdir()
    (shared / "recon-gadgets-log-x").symlink_to(precious)
    Spool(tmp_path / "spool", temporary_directories=(shared,))
    assert (precious / "kept").read_text() == "kept"


def test_links_in_the_queue_are_not_sent(tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue")
    source = tmp_path / "image.dcm"
    source.write_bytes(b"DICM")
    secret = tmp_path / "secret.dcm"
    secret.write_bytes(b"another patient")
    job = queue.put([source], ARCHIVE)
    (queue.root / "waiting" / job.id / "000001.dcm").symlink_to(secret)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "job.json").write_text((queue.root / "waiting" / job.id / "job.json").read_text())
    (elsewhere / "000000.dcm").write_bytes(b"another patient")
    (queue.root / "waiting" / "20200101-000000-00000000").symlink_to(elsewhere)
    sent: list[bytes] = []

    def send(files: list[Path], destination: Destination, stored: object) -> Attempt:
        sent.extend(path.read_bytes() for path in files)
        for path in files:
            stored(path)  # type: ignore[operator]
        return Attempt()

    (after,) = queue.send_due(send)
    assert sent == [b"DICM"] and after.left == 1 and secret.exists()
    queue.retry(job.id)
    (after,) = queue.send_due(send)
    assert sent == [b"DICM"] and "links" in after.problem
    assert (elsewhere / "000000.dcm").exists()
    assert [path.name for path in (queue.root / "failed").iterdir()] == ["20200101-000000-00000000"]


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "null", '"x"', "[]", '{"status": ["' + "x" * 50 + '"]}', "NaN", "{", "\0", '{"status": NaN}']
)
def test_sidecars_and_records_of_any_content(text: str, tmp_path: Path) -> None:
    capture = tmp_path / "a.mrd"
    capture.write_bytes(b"\x01\x00")
    sidecar(capture).write_text(text)
    assert isinstance(capture_status(capture), str)
    Spool(tmp_path, max_bytes=1, min_free_bytes=0).make_room(10)
    queue = Queue(tmp_path / "queue")
    folder = queue.root / "waiting" / "x"
    folder.mkdir()
    (folder / "job.json").write_text(text)
    assert queue.jobs() == [] and queue.send_due(lambda *_: Attempt()) == []


COMPUTE = """
import os
import gadgets.cli
from gadgets.compute_local import worker_environment
from loky import ProcessPoolExecutor
if __name__ == "__main__":
    with ProcessPoolExecutor(1, env=worker_environment(1, 0, 0, os.environ)) as pool:
        print(pool.submit(os.path.basename, "a/computed").result(100.0))
"""


def test_files_of_the_folder_in_which_a_command_was_typed_are_not_executed(tmp_path: Path) -> None:
    """Somebody's own ``json.py`` or ``signal.py`` there was imported in place of Python's by every worker, which then died."""
    program, folder = tmp_path / "program.py", tmp_path / "folder"
    program.write_text(COMPUTE)
    folder.mkdir()
    for name in ("json", "signal", "argparse", "logging"):
        (folder / f"{name}.py").write_text("import os; os.close(os.open('executed', os.O_CREAT)); raise ImportError")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(program)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert done.stdout == "computed\n", done.stderr[-2000:]
    command, environment = module_process("gadgets.pacs_sender", "--nothing")
    assert subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, timeout=PATIENCE, check=False
    ).returncode
    assert not (folder / "executed").exists()
