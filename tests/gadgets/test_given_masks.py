"""Masks for susceptibility maps that somebody made: what a file may hold, and by which names it is found."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from gadgets import node
from gadgets.buffer import AcquisitionSettings, sort_readouts
from gadgets.chain import config_directory, load_chain
from gadgets.cli import app
from gadgets.given_masks import doubt_of_mask, given_mask_of, read_given_mask, require_given_mask
from gadgets.mask_check import default_folder, mask_names
from gadgets.service import ServiceOptions
from gadgets.wire.header import Limit
from recon_core.errors import DataError
from recon_core.maps.brain_mask import given_mask
from recon_core.sampling.mask_files import MaskError
from tests.gadgets.scan_factory import mrd_header, readout_headers

SHAPE = (3, 4, 5)
MASK = np.zeros(SHAPE, bool)
MASK[1, 2:, 3:] = True


def saved(path: Path, values: object) -> Path:
    np.save(path, np.asarray(values), allow_pickle=True)
    return path


def test_bool_and_zeros_and_ones_are_a_mask(tmp_path: Path) -> None:
    for kind in (bool, np.uint8, np.dtype(">i4"), np.float32):
        np.testing.assert_array_equal(read_given_mask(saved(tmp_path / "a.npy", MASK.astype(kind)), SHAPE), MASK)
    np.testing.assert_array_equal(read_given_mask(saved(tmp_path / "f.npy", np.asfortranarray(MASK)), SHAPE), MASK)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (MASK.transpose(2, 1, 0), r"got 5 x 4 x 3; expected 3 x 4 x 5 \(z, y, x\), not \(x, y, z\)"),
        (MASK[:2], r"got 2 x 4 x 5; expected 3 x 4 x 5 \(z, y, x\)\."),
        (MASK[1], "not a mask; got bool"),
        (np.zeros(SHAPE, bool), "mask is empty"),
        (MASK * 0.5, "not a mask; got values of float64"),
        (np.where(MASK, 2, 0), "not a mask; got values of int64"),
        (np.where(MASK, 1.0, np.nan), "not a mask; got values of float64"),
        (MASK.astype(np.complex64), "not a mask; got complex64"),
        (np.full(SHAPE, None), "not a readable mask; got ValueError"),  # a pickle
    ],
)
def test_what_is_no_mask_of_this_scan_is_refused(values: np.ndarray, words: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=words):
        read_given_mask(saved(tmp_path / "a.npy", values), SHAPE)


@pytest.mark.parametrize(
    ("part", "instead"), [(b"False", b"Fals]"), (b"|b1", b"|,1"), (b"(3, 4", b"((, 4"), (b"'descr'", b"'descr ")]
)
def test_a_damaged_header_is_a_typed_error(tmp_path: Path, part: bytes, instead: bytes) -> None:
    """numpy reads it as text of Python, with the errors of that."""
    whole = saved(tmp_path / "a.npy", MASK).read_bytes()
    assert part in whole
    (tmp_path / "a.npy").write_bytes(whole.replace(part, instead))
    with pytest.raises(MaskError, match="not a readable mask"):
        read_given_mask(tmp_path / "a.npy", SHAPE)


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    whole = saved(tmp_path / "a.npy", MASK).read_bytes()
    for content in (b"", b"text", whole[:40], whole[:-1], whole.replace(b"(3, 4, 5)", b"(3, 4, 9)")):
        (tmp_path / "b.npy").write_bytes(content)
        with pytest.raises(MaskError, match="not a readable mask"):
            read_given_mask(tmp_path / "b.npy", SHAPE)
    with pytest.raises(MaskError, match="no such file"):
        read_given_mask(tmp_path / "c.npy", SHAPE)


def test_a_mask_is_found_by_its_name_alone(tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    folder.mkdir()
    saved(folder / "head.npy", np.ones((4, 6, 8), bool))
    saved(tmp_path / "outside.npy", np.ones((4, 6, 8), bool))
    (folder / "sampling.h5").write_bytes(b"")
    limits = {"kspace_encode_step_1": Limit(0, 5, 3), "kspace_encode_step_2": Limit(0, 3, 2)}
    header = mrd_header(n1=6, n2=4, n_x=8, limits=limits)
    counters = [{"k2": k2, "k1": k1} for k2 in range(4) for k1 in range(6)]
    scan = sort_readouts(readout_headers(counters, n_samples=8), header, AcquisitionSettings())
    assert scan.scan_info(0).recon_matrix == (4, 6, 8)
    assert given_mask_of(scan, "head", folder).shape == (4, 6, 8)
    for name in ("../outside", str(tmp_path / "outside"), "outside", "head.npy", "sampling", ".", "x" * 10_000):
        with pytest.raises(MaskError, match=r"no such mask on this server.*expected one of head") as found:
            given_mask_of(scan, name, folder)
        assert len(str(found.value)) < 300
    with pytest.raises(MaskError, match="which has none"):
        given_mask_of(scan, "head", None)
    two = replace(scan, slices=(0, 1))
    with pytest.raises(MaskError, match="a mask is of one slab; got 2 slabs"):
        given_mask_of(two, "head", folder)


def test_a_chain_s_mask_costs_no_scan_and_is_doubted_with_its_header(tmp_path: Path) -> None:
    """One that was chosen for the scan is as any other setting."""
    shipped = (config_directory() / "cg_sense.xml").read_text()
    named = '<property name="maps" value="qsm"/><property name="map_mask_file" value="head"/></configuration>'
    (tmp_path / "own.xml").write_text(
        shipped.replace('target="cg_sense"', 'target="own"').replace("</configuration>", named, 1)
    )
    own, chosen = load_chain("own", directory=tmp_path), load_chain("cg_sense", {"maps": "qsm", "map_mask_file": "head"})
    header = mrd_header(n1=4, n2=3, n_x=5)
    for chain in (own, chosen):
        assert "no such mask on this server" in doubt_of_mask(chain, header, tmp_path)
    require_given_mask(own, tmp_path)
    with pytest.raises(MaskError, match="no such mask on this server"):
        require_given_mask(chosen, tmp_path)
    saved(tmp_path / "head.npy", MASK)
    require_given_mask(chosen, tmp_path)
    assert doubt_of_mask(own, header, tmp_path) == ""
    assert "do not fit" in doubt_of_mask(own, mrd_header(n1=6, n2=3, n_x=5), tmp_path)
    assert doubt_of_mask(load_chain("cg_sense", {"map_mask_file": "absent"}), header, tmp_path) == ""


def test_a_masks_folder_that_cannot_be_read_is_told_from_an_empty_one(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_bytes(b"")
    for place in (tmp_path / "loop", tmp_path / "file"):
        with pytest.raises(MaskError, match=r"the server's masks cannot be read.*--masks"):
            mask_names(place)
    assert mask_names(tmp_path / "nowhere") == {}


def test_sampling_masks_and_brain_masks_are_told_apart(tmp_path: Path) -> None:
    saved(tmp_path / "head.npy", MASK)
    done = CliRunner().invoke(app, ["mask", "install", str(tmp_path / "head.npy"), "--masks", str(tmp_path / "masks")])
    words = " ".join(done.output.split())
    assert done.exit_code == 0 and "3 x 4 x 5 (z, y, x), 4 voxels inside" in words and "installed as 'head'" in words
    assert not mask_names(tmp_path / "masks") and list(mask_names(tmp_path / "masks", (".npy",))) == ["head"]
    saved(tmp_path / "half.npy", MASK * 0.5)
    with pytest.raises(DataError, match="not a mask"):
        CliRunner().invoke(
            app, ["mask", "install", str(tmp_path / "half.npy"), "--masks", str(tmp_path / "masks")], catch_exceptions=False
        )
    assert [path.name for path in (tmp_path / "masks").iterdir()] == ["head.npy"]


def test_every_front_looks_into_the_server_s_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    seen: list[ServiceOptions] = []
    monkeypatch.setattr("gadgets.service.Service", seen.append)
    node._service()
    monkeypatch.setattr("gadgets.service.reconstruct_row", lambda options, row: seen.append(options))
    monkeypatch.setattr("gadgets.retry.retry", lambda *_, here, **__: here(None))
    CliRunner().invoke(app, ["retry", "job"])
    assert [options.masks for options in seen] == [default_folder()] * 2
    assert default_folder().is_relative_to(tmp_path)


def test_the_argument_of_python_is_checked_alike() -> None:
    mask = torch.from_numpy(MASK)
    assert given_mask(mask.float(), SHAPE).dtype == torch.bool
    for wrong, words in (
        (mask[0], "do not fit"),
        (mask.permute(2, 1, 0), r"not \(x, y, z\)"),
        (mask * 0.5, "not a mask"),
        (torch.where(mask, torch.nan, 0.0), "not a mask"),
        (torch.zeros(SHAPE), "mask is empty"),
        (torch.tensor(1), "do not fit; got a number"),
    ):
        with pytest.raises(DataError, match=words):
            given_mask(wrong, SHAPE)
