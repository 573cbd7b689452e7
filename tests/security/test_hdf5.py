"""HDF5 files from somebody else: what they may not refer to, claim, or ask for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from gadgets.errors import RawFileError
from gadgets.image_file import read_images
from gadgets.raw_source import open_source
from recon_core.errors import DataError, ReconError
from recon_core.hdf5_input import UnsafeFile, plain_dataset
from recon_core.sampling.mask_files import read_mask
from tests.e2e.scans import simulated

SECRET = b"the content of another file "


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A raw file that can be replayed."""
    path = tmp_path_factory.mktemp("good") / "scan.h5"
    simulated("cine", path, matrix_x=24, matrix_y=24, coils=2, states=1, slices=1)
    return path


def changed(good: Path, folder: Path, change: Callable[[h5py.File], None]) -> Path:
    path = folder / "changed.h5"
    path.write_bytes(good.read_bytes())
    with h5py.File(path, "a") as file:
        change(file)
    return path


def played(path: Path) -> bytes:
    return b"".join(bytes(piece.data) for piece in open_source(path, config="fourier").pieces())


def replace_with(name: str, make: Callable[[h5py.Group, str], object]) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file["dataset"][name]
        make(file["dataset"], name)

    return change


def test_the_good_file_plays(good: Path) -> None:
    assert played(good).endswith(b"\x04\x00")


@pytest.mark.parametrize("name", ["xml", "data", "waveforms"])
def test_external_links(name: str, good: Path, tmp_path: Path) -> None:
    def link(group: h5py.Group, name: str) -> None:
        group[name] = h5py.ExternalLink(str(good), f"/dataset/{name}")

    with pytest.raises(UnsafeFile, match="leads elsewhere"):
        played(changed(good, tmp_path, replace_with(name, link)))


def test_the_group_is_an_external_link(good: Path, tmp_path: Path) -> None:
    path = tmp_path / "link.h5"
    with h5py.File(path, "w") as file:
        file["dataset"] = h5py.ExternalLink(str(good), "/dataset")
    with pytest.raises(UnsafeFile, match="leads elsewhere"):
        played(path)


def test_external_storage_does_not_read_other_files(good: Path, tmp_path: Path) -> None:
    """Any file of this machine would become the header that is sent to the server."""
    secret = tmp_path / "secret.txt"
    secret.write_bytes(SECRET * 4)

    def outside(group: h5py.Group, name: str) -> None:
        size = len(SECRET) * 4
        group.create_dataset(name, (1,), f"S{size}", external=[(str(secret), 0, size)])

    with pytest.raises(UnsafeFile, match="another file"):
        played(changed(good, tmp_path, replace_with("xml", outside)))


def test_virtual_data_sets(good: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["xml"] = np.array([SECRET])

    def virtual(group: h5py.Group, name: str) -> None:
        layout = h5py.VirtualLayout((1,), f"S{len(SECRET)}")
        layout[:] = h5py.VirtualSource(str(other), "xml", (1,))
        group.create_virtual_dataset(name, layout)

    with pytest.raises(UnsafeFile, match="another file"):
        played(changed(good, tmp_path, replace_with("xml", virtual)))


@pytest.mark.parametrize("rows", [10**6, 10**15])
def test_claimed_shapes(rows: int, good: Path, tmp_path: Path) -> None:
    def huge(group: h5py.Group, name: str) -> None:
        kind = h5py.File(good)["dataset/data"].dtype
        group.create_dataset(name, (rows,), kind, chunks=(1024,))

    with pytest.raises(UnsafeFile, match="claims more than it has"):
        played(changed(good, tmp_path, replace_with("data", huge)))


def test_large_elements_and_large_pieces(good: Path, tmp_path: Path) -> None:
    def text(group: h5py.Group, name: str) -> None:
        group.create_dataset(name, (1,), f"S{1 << 30}")

    with pytest.raises(UnsafeFile, match="too large"):
        played(changed(good, tmp_path, replace_with("xml", text)))
    with h5py.File(tmp_path / "bomb.h5", "w") as file:
        file.create_dataset("zeros", (1 << 20, 1 << 9), "u1", chunks=(1 << 20, 1 << 9), compression="gzip")
        with pytest.raises(UnsafeFile, match="pieces of 536870912 bytes"):
            plain_dataset(file, "zeros")
        file.create_dataset("whole", (1 << 20, 1 << 14), "u1", chunks=(1 << 20, 1 << 14 >> 7), compression="gzip")
        with pytest.raises(UnsafeFile):
            plain_dataset(file, "whole", whole=True)


def test_filters_that_would_load_code(good: Path, tmp_path: Path) -> None:
    """The library looks for the code of an unknown filter in a plug-in folder."""
    with h5py.File(tmp_path / "filter.h5", "w") as file:
        plan = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        plan.set_chunk((16,))
        plan.set_filter(32008, h5py.h5z.FLAG_OPTIONAL)  # bitshuffle: not built in
        space = h5py.h5s.create_simple((16,))
        h5py.h5d.create(file.id, b"packed", h5py.h5t.NATIVE_INT32, space, plan)
        with pytest.raises(UnsafeFile, match="filter"):
            plain_dataset(file, "packed")


@pytest.mark.parametrize(
    "make",
    [
        lambda group, name: group.create_group(name),
        lambda group, name: group.create_dataset(name, (0,), "S8"),
        lambda group, name: group.create_dataset(name, data=np.zeros(3)),
        lambda group, name: group.create_dataset(name, data=np.float32(1)),
        lambda group, name: group.create_dataset(name, data=h5py.Empty("f4")),
    ],
)
@pytest.mark.parametrize("name", ["xml", "data"])
def test_other_kinds_in_place_of_header_and_readouts(
    name: str, make: Callable[[h5py.Group, str], object], good: Path, tmp_path: Path
) -> None:
    path = changed(good, tmp_path, replace_with(name, make))
    try:
        played(path)
    except ReconError:
        return
    source = open_source(path, config="fourier")
    assert source.n_readouts == 0 or source.header is None, "the server will refuse the header"


@pytest.mark.parametrize("name", ["header", "attributes", "data"])
def test_image_files(name: str, tmp_path: Path) -> None:
    path = tmp_path / "images.h5"
    with h5py.File(path, "w") as file:
        series = file.create_group("run/image_0")
        for part in {"header", "attributes", "data"} - {name}:
            series.create_dataset(part, data=np.zeros(0))
        series[name] = h5py.ExternalLink("/etc/passwd", "/x")
    with pytest.raises(ReconError):
        list(read_images(path))


def test_a_series_elsewhere_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "images.h5"
    with h5py.File(path, "w") as file:
        file.create_group("run")["image_0"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/")
    assert list(read_images(path)) == []


def test_masks(tmp_path: Path) -> None:
    path = tmp_path / "mask.h5"
    with h5py.File(path, "w") as file:
        file.attrs["format"], file.attrs["version"] = "recon-gadgets sampling mask", 1
        file["mask"] = h5py.ExternalLink(str(tmp_path / "other.h5"), "/mask")
    with pytest.raises(DataError):
        read_mask(path)


def test_a_truncated_file(good: Path, tmp_path: Path) -> None:
    for part in (0.2, 0.6, 0.95):
        path = tmp_path / "cut.h5"
        path.write_bytes(good.read_bytes()[: int(part * good.stat().st_size)])
        with pytest.raises(RawFileError):
            played(path)


@pytest.mark.parametrize("structure", [b"HEAP", b"TREE", b"SNOD"])
def test_damage_in_the_file_s_own_structures(structure: bytes, good: Path, tmp_path: Path) -> None:
    """The library raises RuntimeError for these."""
    path = tmp_path / "damaged.h5"
    path.write_bytes(good.read_bytes().replace(structure, b"lost"))
    with pytest.raises(ReconError):
        played(path)
