"""Noise covariances by measurement id."""

import threading
import time
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gadgets import noise_store
from gadgets.errors import SpoolError
from gadgets.noise_store import NoiseStore


def covariance(n: int = 4) -> NDArray[np.complex128]:
    rng = np.random.default_rng(7)
    a = rng.standard_normal((n, n)) + 1j * rng.standard_normal((n, n))
    matrix = a @ a.conj().T + np.eye(n)
    matrix.flags.writeable = False
    return matrix


def test_round_trip_is_exact(tmp_path: Path) -> None:
    store = NoiseStore(tmp_path / "noise")
    store.put("66056_1_2_3", covariance(), 5e-6, ("A", "B", "C", "D"))
    found = store.get("66056_1_2_3")
    assert found is not None
    np.testing.assert_array_equal(found.covariance, covariance())
    assert found.covariance.dtype == np.complex128
    assert found.dwell_time == 5e-6 and found.coil_labels == ("A", "B", "C", "D")


def test_unknown_ids_and_no_id_are_none(tmp_path: Path) -> None:
    store = NoiseStore(tmp_path)
    assert store.get("nobody") is None
    assert store.get("") is None


def test_ids_never_become_paths_or_names(tmp_path: Path) -> None:
    store = NoiseStore(tmp_path / "noise")
    for name in ("../../etc/passwd", "/abs", "a\0b", "DOE^JOHN", "x" * 5000, "\ud800"):
        store.put(name, covariance(2), 1e-6)
        assert store.get(name) is not None
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 6
    assert all(path.parent == tmp_path / "noise" and len(path.stem) == 64 for path in files)
    assert not any(b"DOE" in path.read_bytes() for path in files)


def test_what_is_too_old_is_none_and_is_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = NoiseStore(tmp_path, max_age=60.0)
    store.put("old", covariance(), 1e-6)
    now = time.time()
    monkeypatch.setattr(noise_store.time, "time", lambda: now + 59)
    assert store.get("old") is not None
    monkeypatch.setattr(noise_store.time, "time", lambda: now + 3600)
    assert store.get("old") is None
    assert store.prune() == 1
    assert list(tmp_path.iterdir()) == []


def test_newer_replaces_older(tmp_path: Path) -> None:
    store = NoiseStore(tmp_path)
    store.put("id", covariance(2), 1e-6)
    store.put("id", covariance(3), 2e-6)
    found = store.get("id")
    assert found is not None and found.covariance.shape == (3, 3)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not really", b"\x93NUMPY", b"\x80\x04cos\nsystem\n."])
def test_a_damaged_file_is_as_good_as_none(tmp_path: Path, damage: bytes) -> None:
    store = NoiseStore(tmp_path)
    store.put("id", covariance(), 1e-6)
    next(tmp_path.iterdir()).write_bytes(damage)
    assert store.get("id") is None


@pytest.mark.parametrize(
    ("matrix", "dwell", "labels"),
    [
        (np.ones((2, 3)), 1e-6, ()),
        (np.zeros((0, 0)), 1e-6, ()),
        (np.array([[1.0, 2.0], [3.0, 1.0]]), 1e-6, ()),
        (np.array([[-1.0, 0.0], [0.0, 1.0]]), 1e-6, ()),
        (np.full((2, 2), np.nan), 1e-6, ()),
        (np.eye(2), 0.0, ()),
        (np.eye(2), 1e-6, ("only one",)),
    ],
)
def test_nonsense_is_refused(tmp_path: Path, matrix: NDArray[np.float64], dwell: float, labels: tuple[str, ...]) -> None:
    with pytest.raises(SpoolError):
        NoiseStore(tmp_path).put("id", matrix.astype(complex), dwell, labels)
    assert list(tmp_path.iterdir()) == []


def test_meta_says_what_the_real_client_prints(tmp_path: Path) -> None:
    store = NoiseStore(tmp_path)
    store.put("id", np.diag([1.0, 4.0, 9.0]).astype(complex), 2.5e-6)
    found = store.get("id")
    assert found is not None
    root = ElementTree.fromstring(found.meta())  # noqa: S314 - our own text
    values = {meta.findtext("name"): meta.findtext("value") for meta in root}
    assert root.tag == "ismrmrdMeta" and values["status"] == "success" and values["channels"] == "3"
    numbers = {name: float(text or "nan") for name, text in values.items() if name not in ("status", "channels")}
    assert numbers == {"min_sigma": 1.0, "max_sigma": 3.0, "mean_sigma": 2.0, "noise_dwell_time_us": 2.5}


def test_readers_never_see_half_a_measurement(tmp_path: Path) -> None:
    """Two servers write the same id at once; whoever reads gets one of them, whole."""
    stores = [NoiseStore(tmp_path), NoiseStore(tmp_path)]
    stores[0].put("scan", np.eye(64), 1e-6)
    seen: set[float] = set()
    wrong: list[object] = []
    done = threading.Event()

    def write(store: NoiseStore, scale: float) -> None:
        for _ in range(40):
            store.put("scan", scale * np.eye(64), scale * 1e-6)

    def read() -> None:
        while not (seen and done.is_set()):
            noise = stores[1].get("scan")
            if noise is None or not np.array_equal(noise.covariance, round(noise.dwell_time * 1e6) * np.eye(64)):
                wrong.append(noise)
                return
            seen.add(noise.dwell_time)

    writers = [threading.Thread(target=write, args=(store, scale)) for store, scale in zip(stores, (2.0, 3.0), strict=True)]
    reader = threading.Thread(target=read)
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    done.set()
    reader.join()
    assert not wrong and seen
    assert [path.name[0] for path in tmp_path.iterdir()] != ["."] and len(list(tmp_path.iterdir())) == 1
