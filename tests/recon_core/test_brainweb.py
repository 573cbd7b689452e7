"""Volumes in the formats of atlases, and a BrainWeb folder in miniature."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
import torch

from recon_core.errors import DataError, SettingError
from recon_core.simulation.anatomy import CLASSES
from recon_core.simulation.brainweb import (
    BRAINWEB_LABELS,
    HeadsAndAtlas,
    LabelledHeads,
    brainweb_files,
    brainweb_fractions,
    open_anatomy,
)
from recon_core.simulation.quantitative_brain import QuantitativeBrains, SampleRecipe
from recon_core.simulation.random_fields import Draws
from recon_core.simulation.volume_files import read_volume
from tests.recon_core.volume_writers import minc1, minc2, nifti, store

SHAPE = (24, 40, 36)


def labels(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 12, [s // 4 for s in SHAPE])
    return blocks.repeat(4, 0).repeat(4, 1).repeat(4, 2).astype(np.uint8)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("dtype", ["u1", "i2", "f4", "u2"])
def test_nifti(tmp_path: Path, name: str, order: str, dtype: str) -> None:
    data = np.arange(24).reshape(2, 3, 4).astype(dtype)
    nifti(tmp_path / name, data, order=order)
    assert np.array_equal(read_volume(tmp_path / name), data)
    nifti(tmp_path / name, data, slope=0.5, intercept=-1.0, order=order)
    assert np.allclose(read_volume(tmp_path / name), 0.5 * data - 1)


@pytest.mark.parametrize("name", ["a.mnc", "a.mnc.gz"])
def test_minc1_bytes_are_unsigned_and_scaled(tmp_path: Path, name: str) -> None:
    stored = np.arange(24, dtype=np.uint8).reshape(2, 3, 4) * 11  # beyond 127
    minc1(tmp_path / name, stored, low=0.0, high=1.0, valid=(0, 255))
    assert np.allclose(read_volume(tmp_path / name), stored / 255)


def test_minc1_signed_shorts(tmp_path: Path) -> None:
    stored = np.arange(-12, 12, dtype=np.int16).reshape(2, 3, 4)
    minc1(tmp_path / "a.mnc", stored, low=-1.0, high=1.0, valid=(-100, 100))
    assert np.allclose(read_volume(tmp_path / "a.mnc"), stored / 100)


def test_minc2_has_a_range_per_slice(tmp_path: Path) -> None:
    stored = np.full((2, 3, 4), 255, np.uint8)
    minc2(tmp_path / "a.mnc", stored, np.array([0.0, 0.0]), np.array([1.0, 3.0]))
    assert np.allclose(read_volume(tmp_path / "a.mnc")[:, 0, 0], [1.0, 3.0])


def test_files_that_are_not_volumes_say_why(tmp_path: Path) -> None:
    for name, content, why in (
        ("a.nii", b"abc", "not a NIfTI-1"),
        ("a.mnc", b"abc", "neither MINC"),
        ("a.rawb", b"abc", "wrong size"),
        ("a.txt", b"abc", "unknown kind"),
        ("a.nii.gz", gzip.compress(bytes(range(256)))[:40], "damaged"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=why):
            read_volume(tmp_path / name, (2, 3, 4))
    with pytest.raises(DataError, match="no such file"):
        read_volume(tmp_path / "b.nii")
    nifti(tmp_path / "c.nii", np.zeros((2, 3, 4), np.float32))
    (tmp_path / "c.nii").write_bytes((tmp_path / "c.nii").read_bytes()[:-1])
    with pytest.raises(DataError, match=r"c\.nii: truncated; got 447 bytes; expected 448 bytes"):
        read_volume(tmp_path / "c.nii")
    minc1(tmp_path / "d.mnc", np.zeros((2, 3, 4), np.uint8), low=0.0, high=1.0, valid=(0, 255))
    minc2(tmp_path / "e.mnc", np.zeros((2, 3, 4), np.uint8), np.zeros(2), np.ones(2))
    for name in ("d.mnc", "e.mnc"):
        content = (tmp_path / name).read_bytes()
        for end in (8, len(content) // 3, len(content) - 9):
            (tmp_path / name).write_bytes(content[:end])
            with pytest.raises(DataError, match=rf"{name}: damaged volume"):
                read_volume(tmp_path / name)


def test_classes_of_different_sizes_are_refused(tmp_path: Path) -> None:
    files = {name: tmp_path / f"subject04_{name}.nii" for name in CLASSES[:-1]}
    for name, path in files.items():
        nifti(path, np.zeros((4, 6, 8 if name != "dura" else 10), np.uint8))
    with pytest.raises(
        DataError, match=r"subject04_dura\.nii: classes of other sizes; got \(4, 6, 10\); expected \(4, 6, 8\)"
    ):
        brainweb_fractions(files)


@pytest.mark.parametrize("ending", ["rawb", "raws.gz", "mnc.gz", "nii"])
def test_crisp_labels_in_every_format(tmp_path: Path, ending: str) -> None:
    data = labels()
    path = tmp_path / f"subject04_crisp_v.{ending}"
    if ending == "raws.gz":
        store(path, (data.astype("<u2") << 4).tobytes())  # as BrainWeb's 16-bit downloads have them
    elif ending == "rawb":
        store(path, data.tobytes())
    elif ending == "nii":
        nifti(path, data)
    else:
        minc1(path, data, low=0.0, high=11.0, valid=(0, 11))
    found = brainweb_fractions({"crisp": path}, SHAPE)
    assert found.shape == (len(CLASSES) - 1, 12, 20, 18) and set(np.unique(found)) <= {0, 255}
    for i, name in enumerate(CLASSES[:-1]):
        assert np.array_equal(found[i] > 0, data[::2, ::2, ::2] == BRAINWEB_LABELS.index(name)), name


def test_partial_volumes_come_from_blocks_and_from_fuzzy_files(tmp_path: Path) -> None:
    data = np.full(SHAPE, BRAINWEB_LABELS.index("grey"), np.uint8)
    data[:, :, 1::2] = BRAINWEB_LABELS.index("white")
    store(tmp_path / "subject04_crisp_v.rawb", data.tobytes())
    found = brainweb_fractions({"crisp": tmp_path / "subject04_crisp_v.rawb"}, SHAPE)
    assert set(np.unique(found[1])) == {128} and set(np.unique(found[2])) == {128}

    names = ("csf", "gm", "wm", "fat", "muscles", "muscles_skin", "vessels", "fat2", "dura", "marrow")
    for i, name in enumerate(names):
        store(tmp_path / f"subject05_{name}_v.rawb.gz", np.full(SHAPE, 10 * i, np.uint8).tobytes())
    files = brainweb_files(tmp_path)
    assert set(files) == {"subject04", "subject05"}
    fuzzy = brainweb_fractions(files["subject05"], SHAPE)
    assert fuzzy[:, 3, 3, 3].tolist() == [10 * i for i in range(10)]


def test_an_unknown_label_is_refused(tmp_path: Path) -> None:
    store(tmp_path / "subject04_crisp_v.rawb", np.full(SHAPE, 13 << 4, np.uint8).tobytes())
    with pytest.raises(DataError, match="unknown label"):
        brainweb_fractions({"crisp": tmp_path / "subject04_crisp_v.rawb"}, SHAPE)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("brainweb")
    for i in range(20):
        # every head consists of one tissue: what a slice shows tells whose it is
        label = 1 + i % 6
        store(path / f"subject{i:02d}_crisp_v.rawb", np.full(SHAPE, label, np.uint8).tobytes())
    (path / "subject99_gm_v.rawb").write_bytes(b"")  # an incomplete head is left out
    return path


def test_heads_are_split_16_1_3_and_never_shared(folder: Path) -> None:
    heads = LabelledHeads(folder, shape=SHAPE)
    groups = [set(heads.subjects(s)) for s in ("train", "validation", "test")]
    assert [len(g) for g in groups] == [16, 1, 3] and len(set.union(*groups)) == 20
    draws = Draws(range(30))
    shown = heads.fractions(draws, 16, "test").amax((2, 3)) > 0.9
    tissues = {CLASSES[i] for i in shown.any(0).nonzero()[:, 0].tolist()} - {"vessel", "lesion"}
    assert tissues == {BRAINWEB_LABELS[1 + i % 6] for i in (17, 18, 19)}
    with pytest.raises(SettingError, match="split"):
        heads.subjects("all")


def test_the_digest_is_of_the_heads_wherever_they_lie(folder: Path, tmp_path: Path) -> None:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    own, copied = (LabelledHeads(place, shape=SHAPE).digest() for place in (folder, tmp_path))
    assert own == copied
    store(tmp_path / "subject03_crisp_v.rawb", np.full(SHAPE, 7, np.uint8).tobytes())
    changed = LabelledHeads(tmp_path, shape=SHAPE).digest()
    (tmp_path / "subject07_crisp_v.rawb").rename(tmp_path / "subject21_crisp_v.rawb")
    assert len({own, changed, LabelledHeads(tmp_path, shape=SHAPE).digest()}) == 3


def test_samples_are_made_of_labelled_heads(folder: Path) -> None:
    heads = LabelledHeads(folder, shape=SHAPE)
    batch = QuantitativeBrains(heads, SampleRecipe(size=32, accelerations=(2.0,))).batch("train", [0, 1])
    assert torch.isfinite(torch.view_as_real(batch.kspace)).all() and float(batch.images.abs().max()) > 0.1


def test_slices_of_test_heads_are_as_published(folder: Path) -> None:
    """Straight, all of one size, nothing added: what differs between two slices of such heads is their height and tissue alone."""
    heads = LabelledHeads(folder, shape=SHAPE)
    n = 130  # pixels of 1.5 mm
    test = heads.fractions(Draws(range(12)), n, "test")
    added = [CLASSES.index(name) for name in ("vessel", "lesion")]
    assert float(test[:, added].abs().max()) == 0
    head = test.sum(1)
    for same in (head[:1].expand_as(head), head.flip(-1), head.flip(-2)):
        assert torch.allclose(head, same, atol=1e-4)
    assert float((head[0] > 0.5).sum()) * 1.5**2 == pytest.approx(SHAPE[1] / 2 * SHAPE[2] / 2, rel=0.08)  # mm^2
    train = heads.fractions(Draws(range(12)), n, "train")
    assert float(train[:, added].max()) > 0.3 and not torch.equal(train[0].sum(0), train[1].sum(0))


class _Air:
    """An atlas whose slices show nothing: what a sample shows tells whence it is."""

    name = "air"

    def fractions(self, draws: Draws, n: int, split: str) -> torch.Tensor:
        return torch.zeros(len(draws), len(CLASSES), n, n)


def test_a_part_of_the_training_samples_alone_is_from_the_atlas(folder: Path) -> None:
    mixed, own = HeadsAndAtlas(folder, _Air(), 0.25, shape=SHAPE), LabelledHeads(folder, shape=SHAPE)
    shown = mixed.fractions(Draws(range(200)), 32, "train").sum((1, 2, 3)) > 1
    assert 0.65 < float(shown.float().mean()) < 0.85
    for split in ("validation", "test"):
        assert torch.equal(mixed.fractions(Draws(range(8)), 8, split), own.fractions(Draws(range(8)), 8, split))
    assert mixed.name == "brainweb, 0.25 air" and mixed.digest() == own.digest()


def test_both_sources_are_opened_only_when_both_are_asked_for(folder: Path) -> None:
    assert type(open_anatomy(folder)) is LabelledHeads
    assert open_anatomy(folder, atlas_share=0.3).name == f"brainweb, 0.3 {open_anatomy().name}"


def test_too_few_heads_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"{tmp_path.name}: too few heads; got 0; expected at least 3. put subjectNN"):
        open_anatomy(tmp_path)
    with pytest.raises(DataError, match=r"folder nowhere: .*no such folder"):
        open_anatomy(tmp_path / "nowhere")
