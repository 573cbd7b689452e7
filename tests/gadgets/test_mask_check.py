"""What was sampled against the mask that the scan was told of: every way in which the two can differ, by the readouts' headers."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
from numpy.typing import NDArray

from gadgets.buffer import AcquisitionSettings, sort_readouts
from gadgets.mask_check import MaskReport, check_samples, mask_names
from gadgets.wire.header import Limit
from recon_core.sampling.agreement import pattern_digest
from recon_core.sampling.mask_files import MaskError, SamplingMask, write_mask
from tests.gadgets.scan_factory import mrd_header, readout_headers

SHAPE = (3, 6, 10)


def _mask(seed: int = 0) -> NDArray[np.bool_]:
    """Not symmetric, another pattern in every echo."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(SHAPE, dtype=bool)
    for echo in mask.reshape(3, -1):
        echo[rng.permutation(60)[:24]] = True
    return mask


MASK = _mask()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_mask(tmp_path / "learned.h5", SamplingMask(MASK))
    write_mask(tmp_path / "other.csv", SamplingMask(_mask(1)))
    write_mask(tmp_path / "narrow.h5", SamplingMask(np.ascontiguousarray(MASK[:, :, 1:])))
    (tmp_path / "damaged.h5").write_bytes(b"nothing")
    (tmp_path / "notes.txt").write_text("not a mask")
    return tmp_path


def _check(
    acquired: NDArray[np.bool_],
    folder: Path | None,
    *,
    name: str | None = "learned",
    digest: str | None = None,
    slices: int = 1,
    announced: int | None = None,
    first: int = 0,
    header_first: int = 0,
    **settings: object,
) -> MaskReport:
    n_echoes, n2, n1 = acquired.shape
    single = {"contrast": Limit(header_first, header_first + (announced or n_echoes) - 1, header_first)}
    limits = {"kspace_encode_step_1": Limit(0, n1 - 1, n1 // 2), "kspace_encode_step_2": Limit(0, n2 - 1, n2 // 2), **single}
    told = {key: value for key, value in (("SamplingMask", name), ("SamplingMaskSHA256", digest)) if value is not None}
    header = mrd_header(n1=n1, n2=n2, limits=limits, user_string=told)
    counters = [
        {"contrast": first + echo, "k2": k2, "k1": k1, "slice": number}
        for number in range(slices)
        for echo, k2, k1 in np.argwhere(acquired).tolist()
    ]
    scan = sort_readouts(readout_headers(counters), header, replace(AcquisitionSettings(), **settings))
    return check_samples(scan, folder)


def test_agreement(folder: Path) -> None:
    for digest in (None, pattern_digest(MASK)):
        found = _check(MASK, folder, digest=digest)
        assert found == MaskReport(agreement="all 72 samples are those of mask 'learned'")
    assert _check(MASK, folder, slices=2).agreement == "all 144 samples are those of mask 'learned'"
    for header_first in (0, 1):  # echoes that are counted from 1
        counted = _check(MASK, folder, first=1, header_first=header_first)
        assert counted.agreement == "all 72 samples are those of mask 'learned'"


def test_nothing_is_said_without_a_mask(folder: Path) -> None:
    assert _check(MASK, folder, name=None) == MaskReport()
    assert _check(~MASK, folder, sampling_mask="none") == MaskReport()


def test_missing_and_additional_samples_are_counted_echo_by_echo(folder: Path) -> None:
    acquired = MASK.copy()
    (k2, k1), *_ = np.argwhere(MASK[1]).tolist()
    acquired[1, k2, k1] = False
    extra = np.argwhere(~MASK[2])[:6]
    acquired[2, extra[:, 0], extra[:, 1]] = True
    found = _check(acquired, folder)
    assert found.refusal is None and found.agreement is None
    (note,) = found.notes
    assert f"echo 1: 1 missing (({k2}, {k1}))" in note
    assert "echo 2: 6 not in the mask (" in note and "and 2 more)" in note and "echo 0" not in note


def test_known_mistakes_are_named(folder: Path) -> None:
    (note,) = _check(np.ascontiguousarray(MASK[::-1]), folder).notes
    assert "the samples equal the mask with its echoes reversed" in note
    (note,) = _check(np.roll(MASK, 1, axis=2), folder).notes
    assert "shifted by (0, 1) along (k2, k1)" in note


def test_the_slice_is_named(folder: Path) -> None:
    found = _check(_mask(1), folder, slices=2)
    assert [note[:8] for note in found.notes] == ["slice 0:", "slice 1:"]
    assert all(len(note) < 800 for note in found.notes)  # an operator has to be able to read it


def test_an_echo_that_was_dropped_is_named(folder: Path) -> None:
    acquired = MASK.copy()
    acquired[1] = False
    acquired[1, 0, 0] = True  # far fewer than the others have
    found = _check(acquired, folder, incomplete="drop")
    assert found.refusal is None and "echo 1: no samples at all" in found.notes[0]


def test_an_echo_that_never_came_is_named(folder: Path) -> None:
    """Announced by the header: the mask is that of the scan, and one of its echoes has nothing."""
    found = _check(MASK[:2], folder, announced=3, incomplete="drop")
    assert found.refusal is None and "echo 2: no samples at all" in found.notes[0] and "echo 1" not in found.notes[0]


def test_what_a_peer_says_costs_no_memory(folder: Path) -> None:
    counters = [{"contrast": 65000, "k2": k, "k1": 0} for k in range(2)]
    for name, digest in (("learned", None), ("lost", "0" * 64)):
        told = {"SamplingMask": name, **({} if digest is None else {"SamplingMaskSHA256": digest})}
        header = mrd_header(n1=2000, n2=200, n_x=1, user_string=told)
        scan = sort_readouts(readout_headers(counters, n_samples=1, n_channels=1), header, AcquisitionSettings())
        tracemalloc.start()
        found = check_samples(scan, folder)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10_000_000 and (found.refusal is not None or "were not compared" in found.notes[0])
    long = _check(MASK, folder, name="x" * 100_000).notes[0]
    assert len(long) < 1000


@pytest.mark.parametrize("name", ["narrow", "learned"])
def test_a_mask_of_another_scan_refuses_the_chain(folder: Path, name: str) -> None:
    acquired = MASK if name == "narrow" else MASK[:2]
    found = _check(acquired, folder, name=name)
    assert isinstance(found.refusal, MaskError)
    words = "the scan's matrix is 6 x 10, the mask's 6 x 9" if name == "narrow" else "the scan has 2 echoes, the mask 3"
    assert words in str(found.refusal) and "sampling_mask" in str(found.refusal)


def test_the_header_names_a_mask_that_the_server_does_not_have(folder: Path) -> None:
    for place in (folder, None, folder / "nowhere"):
        (note,) = _check(MASK, place, name="lost").notes
        assert "were not compared with mask 'lost'" in note and "recon mask install" in note
    # the digest still tells right from wrong
    right = _check(MASK, None, name="lost", digest=pattern_digest(MASK).upper())
    assert right.agreement == "the samples are those of mask 'lost', by its digest" and not right.notes
    wrong = _check(_mask(1), None, name="lost", digest=pattern_digest(MASK))
    assert "the samples are not those of mask 'lost'; what differs is not known" in wrong.notes[0]
    (note,) = _check(MASK, folder, name="damaged").notes
    assert "not a readable HDF5 file" in note
    order = np.stack([np.argwhere(echo) for echo in MASK], axis=1)
    write_mask(folder / "torn.h5", SamplingMask(MASK, order=order))
    with h5py.File(folder / "torn.h5", "r+") as file:
        file["order"][0] = file["order"][1]
    (note,) = _check(MASK, folder, name="torn").notes  # the images come all the same
    assert "torn.h5, mask.order, echo 0: the order does not belong to the mask" in note


def test_another_file_of_the_same_name(folder: Path) -> None:
    found = _check(MASK, folder, name="other", digest=pattern_digest(MASK))
    assert "is not the one that the sequence was made from" in found.notes[0]
    assert "the samples are not those of mask 'other'" in found.notes[1] and found.agreement is None


def test_the_chain_names_a_mask(folder: Path) -> None:
    assert _check(MASK, folder, name=None, sampling_mask="learned").agreement is not None
    assert _check(MASK, folder, name="narrow", sampling_mask="learned").agreement is not None  # over the header's
    for name in ("lost", "../learned", "learned.h5", "notes", "damaged"):
        refusal = _check(MASK, folder, name=None, sampling_mask=name).refusal
        assert isinstance(refusal, MaskError)


def test_only_masks_with_plain_names_are_known(folder: Path) -> None:
    (folder / ".hidden.h5").touch()
    (folder / "sub.h5").mkdir()
    assert sorted(mask_names(folder)) == ["damaged", "learned", "narrow", "other"]


def test_averaged_echoes_are_not_compared(folder: Path) -> None:
    (note,) = _check(MASK, folder, state="single").notes
    assert "the echoes are averaged" in note


def test_digest_is_that_of_the_samples_alone() -> None:
    changed = MASK.copy()
    changed[0, 0, 0] = not changed[0, 0, 0]
    assert pattern_digest(MASK) == pattern_digest(np.asfortranarray(MASK)) != pattern_digest(changed)
    assert pattern_digest(MASK) != pattern_digest(MASK.reshape(6, 3, 10))
    assert len(pattern_digest(MASK)) == 64
