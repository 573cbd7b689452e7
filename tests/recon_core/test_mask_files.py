"""Mask files, and whether a scan kept to its mask."""

import errno
import os
import resource
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

import recon_core
from recon_core.errors import DataError
from recon_core.sampling.agreement import differences
from recon_core.sampling.learned import draw_mask, multilevel_density, samples_for
from recon_core.sampling.mask_files import MaskError, SamplingMask, read_mask, write_mask
from recon_core.sampling.ordering import fan_beam_order

P = np.repeat(multilevel_density((10, 14), 36, (2, 4))[None], 3, 0)
MASK = draw_mask(P, 36, 2, (2, 4))
ORDER = fan_beam_order(MASK, 4).positions


def test_hdf5_round_trip(tmp_path: Path) -> None:
    facts = {"density": "multi-level", "seed": 3, "acceleration": 3.9}
    write_mask(tmp_path / "a.h5", SamplingMask(MASK, P.astype(np.float32), ORDER, 4, facts))
    back = read_mask(tmp_path / "a.h5")
    assert back.probability is not None and back.order is not None
    np.testing.assert_array_equal(back.mask, MASK)
    np.testing.assert_array_equal(back.probability, P.astype(np.float32))
    np.testing.assert_array_equal(back.order, ORDER)
    assert back.n_segments == 4 and dict(back.facts) == facts
    assert back.acceleration == pytest.approx(140 / 36)
    write_mask(tmp_path / "b.h5", SamplingMask(MASK))
    assert read_mask(tmp_path / "b.h5").probability is None and read_mask(tmp_path / "b.h5").order is None


@pytest.mark.parametrize("ordered", [True, False])
def test_csv_round_trip(tmp_path: Path, ordered: bool) -> None:
    path = tmp_path / "a.csv"
    write_mask(path, SamplingMask(MASK, order=ORDER if ordered else None, n_segments=4 if ordered else 1))
    lines = path.read_text().splitlines()
    assert lines[1] == "shot,segment,echo,k2,k1" and len(lines) == 2 + 3 * 36
    if ordered:
        assert lines[2 + 3 * 9] == f"9,1,0,{ORDER[9, 0, 0]},{ORDER[9, 0, 1]}"
    back = read_mask(path)
    np.testing.assert_array_equal(back.mask, MASK)
    assert (back.order is not None) == ordered and back.n_segments == (4 if ordered else 1)
    if ordered:
        np.testing.assert_array_equal(back.order, ORDER)


@pytest.mark.parametrize("name", ["a.h5", "a.csv"])
def test_a_writer_that_dies_leaves_the_old_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_mask(tmp_path / name, SamplingMask(MASK))

    def half(path: Path, *_: object, **__: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("recon_core.sampling.mask_files._write_hdf5", half)
    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(OSError, match="no space"):
        write_mask(tmp_path / name, SamplingMask(~MASK))
    np.testing.assert_array_equal(read_mask(tmp_path / name).mask, MASK)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["mask.h5", "mask.csv"])
def test_a_full_disk_is_an_error_of_the_file_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    """An HDF5 file that the library cannot close is one that it tries to close again when the process ends: that one crashes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    mask = SamplingMask(np.random.default_rng(0).random((2, 60, 80)) < 0.5)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
    try:
        with pytest.raises(OSError) as error:
            write_mask(tmp_path / name, mask)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    # not in the library's words, which name no file
    assert (error.value.errno, error.value.strerror) == (errno.EFBIG, os.strerror(errno.EFBIG))
    assert not list(tmp_path.iterdir())


def test_a_spreadsheet_may_have_saved_the_table(tmp_path: Path) -> None:
    """Line ends and a byte-order mark of another system, empty cells in the first line, empty lines at the end, quotes."""
    path = tmp_path / "a.csv"
    write_mask(path, SamplingMask(MASK, order=ORDER, n_segments=4))
    text = path.read_text()
    first, rest = text.split("\n", 1)
    older = text.replace("; readouts 108", "")
    assert older != text
    for content in ("\ufeff" + text.replace("\n", "\r\n"), f"{first},,,,\n{rest},,,,\n\n", f'"{first}"\n{rest}', older):
        path.write_bytes(content.encode())
        np.testing.assert_array_equal(read_mask(path).order, ORDER)


def test_a_table_that_would_be_another_scan_is_refused(tmp_path: Path) -> None:
    """Sorted by another column, cut at the end of a shot, in another number of segments: all samples lie inside the matrix."""
    path = tmp_path / "a.csv"
    write_mask(path, SamplingMask(MASK, order=ORDER, n_segments=4))
    text = path.read_text()
    first, columns, *rows = text.splitlines()
    older = first.replace("; readouts 108", "")
    shots = [rows[n : n + 3] for n in range(0, len(rows), 3)]
    by_k1 = [row for shot in sorted(shots, key=lambda shot: int(shot[0].split(",")[4])) for row in shot]
    unordered = tmp_path / "b.csv"
    write_mask(unordered, SamplingMask(MASK))
    for content, words in (
        ([first, columns, *by_k1], "lines out of order"),
        ([older, columns, *rows[: 3 * 32]], "lines out of order, or some are missing"),
        ([first, columns, *rows[: 3 * 32]], "not the lines that line 1 states; got 96; expected 108"),
        (unordered.read_text().splitlines()[:-1], "not the lines that line 1 states; got 107; expected 108"),
        ([first.replace("segments 4", "segments 2"), columns, *rows], "in 2 equal segments"),
        ([first, columns, rows[0], "# mine", *rows[1:]], "a.csv, line 4: not a line of a mask; got # mine; expected 5 whole numbers"),
        ([first, columns, *(word for row in rows for word in row.split(","))], "line 3: not a line of a mask; got 0;"),
        ([first, columns.replace("k2,k1", "k1,k2"), *rows], "line 2: other columns; got shot,segment,echo,k1,k2"),
        ([first, columns.replace(",", ";")], "line 2: other columns"),
        ([first.replace("k1 14", "k1 13"), columns, *rows], r"positions outside.* the first .* counted from 0"),
        ([first, columns, *rows[:-1], rows[2]], r"positions repeated; got 1, the first \(2, "),
    ):  # fmt: skip
        path.write_text("\n".join(content))
        with pytest.raises(MaskError, match=words):
            read_mask(path)
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(MaskError, match="not a readable table; got no text in UTF-8"):
        read_mask(path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mask": P.astype(np.float32)}, r"a\.h5, mask: wrong kind of numbers; got float32; expected 0 to 1"),
        ({"mask": np.where(MASK, 7, 0)}, "mask: impossible values; got 0 to 7"),
        ({"order": ORDER + 0.4}, "order: wrong kind of numbers"),
        ({"order": ORDER[::-1, :, ::-1] % 7}, r"a\.h5, mask\.order, echo 0: the order does not belong to the mask"),
    ],
)
def test_an_hdf5_file_that_contradicts_itself_is_a_mask_error(tmp_path: Path, change: dict, words: str) -> None:
    write_mask(tmp_path / "a.h5", SamplingMask(MASK, order=ORDER, n_segments=4))
    with h5py.File(tmp_path / "a.h5", "r+") as file:
        for name, values in change.items():
            del file[name]
            file[name] = values
    with pytest.raises(MaskError, match=words):
        read_mask(tmp_path / "a.h5")


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.csv"
    write_mask(good, SamplingMask(MASK, order=ORDER, n_segments=4))
    text = good.read_text()
    rows = text.splitlines(keepends=True)
    broken = {
        "empty.csv": "",
        "text.csv": "hello\nworld\n",
        "word.csv": text.replace("\n0,0,0,", "\n0,0,zero,", 1),
        "outside.csv": text.replace("k1 14", "k1 7"),
        "huge.csv": text.replace("k1 14", "k1 99999999999"),
        "twice.csv": text + rows[-1],
        "lost.csv": "".join(rows[:-1]),
        "swapped.csv": "".join([*rows[:2], rows[3], rows[2], *rows[4:]]),
        "short.csv": "".join(rows[:5]) + "1,2\n",
        "none.csv": "".join(rows[:2]),
        "segments.csv": text.replace("segments 4", "segments four"),
        "unsegmented.csv": text.replace("; segments 4", ""),
        "nought.csv": text.replace("segments 4", "segments 0"),
        "text.h5": "hello",
        "mask.txt": text,
    }
    for name, content in broken.items():
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError):
            read_mask(tmp_path / name)
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["mask"] = np.ones((2, 2))
    for name in ("other.h5", "missing.h5"):
        with pytest.raises(MaskError):
            read_mask(tmp_path / name)
    write_mask(tmp_path / "cut.h5", SamplingMask(MASK))
    whole = (tmp_path / "cut.h5").read_bytes()
    (tmp_path / "cut.h5").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(MaskError):
        read_mask(tmp_path / "cut.h5")
    with pytest.raises(MaskError):
        write_mask(tmp_path / "a.npz", SamplingMask(MASK))


@pytest.mark.parametrize("structure", [b"HEAP", b"TREE", b"SNOD"])
def test_damage_inside_an_hdf5_file_is_a_typed_error(tmp_path: Path, structure: bytes) -> None:
    """The library raises RuntimeError for these."""
    write_mask(tmp_path / "a.h5", SamplingMask(MASK, P.astype(np.float32)))
    whole = (tmp_path / "a.h5").read_bytes()
    assert structure in whole
    (tmp_path / "a.h5").write_bytes(whole.replace(structure, b"lost"))
    with pytest.raises(MaskError, match="not a readable HDF5 file"):
        read_mask(tmp_path / "a.h5")


def test_contradictions_are_refused() -> None:
    fine = SamplingMask(MASK, order=ORDER, n_segments=4)
    for change in ({"order": ORDER[::-1][:-1]}, {"probability": P[:2]}, {"n_segments": 5}, {"mask": ~MASK}):
        with pytest.raises(DataError):
            replace(fine, **change)  # type: ignore[arg-type]
    for wrong in (MASK.astype(int), MASK[0], np.zeros((1, 2, 3), bool)):
        with pytest.raises(MaskError):
            SamplingMask(wrong)


def test_agreement_is_silent_and_single_samples_are_named() -> None:
    assert differences(MASK, MASK) == []
    got = MASK.copy()
    lost, extra = np.argwhere(MASK[1])[5], np.argwhere(~MASK[2])[7]
    got[1][tuple(lost)] = False
    got[2][tuple(extra)] = True
    assert differences(got, MASK) == [
        f"echo 1: 1 missing (({lost[0]}, {lost[1]}))",
        f"echo 2: 1 not in the mask (({extra[0]}, {extra[1]}))",
    ]


@pytest.mark.parametrize(
    ("acquired", "words"),
    [
        (MASK[::-1], "echoes reversed"),
        (np.roll(MASK, 1, 0), "echoes moved by 1"),
        (MASK[[0, 2, 1]], "with its echoes in the order 0, 2, 1"),
        (MASK[:, ::-1], "mirrored along k2"),
        (MASK[..., ::-1], "mirrored along k1"),
        (np.roll(MASK[:, ::-1, ::-1], (1, 1), (1, 2)), "mirrored about DC along k2 and k1"),
        (np.roll(MASK, (0, 1), (1, 2)), r"shifted by (0, 1)"),
        (MASK.transpose(0, 2, 1), "transposed"),
        (MASK[:2], "the scan has 2 echoes, the mask 3"),
        (MASK * np.array([1, 0, 1], bool)[:, None, None], "echo 1: no samples at all"),
        (np.zeros((3, 10, 12), bool), "matrix is 10 x 12, the mask's 10 x 14"),
    ],
)
def test_common_mistakes_are_explained(acquired: np.ndarray, words: str) -> None:
    assert words in "; ".join(differences(acquired, MASK))


SHIPPED = sorted((Path(recon_core.__file__).parent / "weights").glob("laro_mask_*.h5"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_masks_have_their_samples_and_can_be_drawn_again(path: Path) -> None:
    """R = 8 and 4, SPO 1 and 2, at 32 x 64 with six echoes and at 80 x 206 with ten; 188 x 11 samples as published."""
    assert len(SHIPPED) == 8
    shipped = read_mask(path)
    large, acceleration, spo = path.stem.endswith("_206x80"), shipped.facts["acceleration"], shipped.facts["spo"]
    assert f"_r{acceleration:g}_spo{spo}" in path.stem
    assert shipped.mask.shape == ((10, 80, 206) if large else (6, 32, 64))
    n_samples = samples_for(shipped.mask.shape[1:], float(acceleration), 11 if large else 1)  # type: ignore[arg-type]
    assert n_samples in (2068, 4125, 256, 512) and set(shipped.mask.sum((1, 2))) == {n_samples}
    acs = (int(shipped.facts["acs_k2"]), int(shipped.facts["acs_k1"]))
    assert acs == ((20, 20) if large else (8, 8)) and shipped.probability is not None
    patterns = shipped.probability[: 1 if spo == 1 else None].astype(float)
    again = draw_mask(patterns, n_samples, int(shipped.facts["seed"]), acs)
    assert (shipped.mask == again).all() and (len(again) > 1) == bool((shipped.mask != shipped.mask[:1]).any())


def test_a_mistake_is_explained_although_a_sample_was_lost_too() -> None:
    """And one that explains nothing is not: of two echoes in another order one may be missing, not half of it."""
    acquired = MASK[[0, 2, 1]].copy()
    acquired[1][tuple(np.argwhere(acquired[1])[3])] = False
    assert differences(acquired, MASK)[0] == "but for 1, the samples equal the mask with its echoes in the order 0, 2, 1"
    acquired[1, :5] = False
    assert differences(acquired, MASK)[0].startswith("echo 1: ")


def test_a_square_matrix_may_be_transposed() -> None:
    square = MASK[:, :, :10]
    assert differences(square.transpose(0, 2, 1), square)[0] == "the samples equal the mask with k1 and k2 exchanged"
