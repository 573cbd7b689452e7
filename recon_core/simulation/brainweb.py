"""BrainWeb's segmented heads, when the user has downloaded them.

Source: BrainWeb, 20 anatomical models of 20 normal brains (Aubert-Broche et al., IEEE Trans. Med. Imag. 25 (2006) 1410), at
0.5 mm; the files are offered as MINC and as headerless bytes.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from recon_core.errors import DataError
from recon_core.simulation.anatomy import CLASSES, Anatomy, check_split, draw_plane, straight_plane, with_vessels_and_lesions
from recon_core.simulation.head_atlas import HeadAtlas, atlas_from_folder
from recon_core.simulation.random_fields import Draws
from recon_core.simulation.volume_files import read_volume
from recon_core.training.checkpoint import sha256_of

Tensor = torch.Tensor
Shape = tuple[int, int, int]

BRAINWEB_LABELS = (
    "background", "csf", "grey", "white", "fat", "muscle", "skin", "skull", "vessel", "fat2", "dura", "marrow",
)  # fmt: skip
BRAINWEB_SHAPE = (362, 434, 362)
FRACTION_NAMES = {
    "csf": ("csf",), "grey": ("gm", "gry"), "white": ("wm", "wht"), "fat": ("fat",), "muscle": ("muscles", "mus"),
    "skin": ("muscles_skin", "m-s"), "vessel": ("vessels", "ves"), "fat2": ("fat2",), "dura": ("dura",), "marrow": ("marrow", "mrw"),
}  # fmt: skip
AXIAL_MARGIN = 120 / 362  # of the volume's height: left out at the bottom and at the top
TEST_FOV = 195.0  # mm: 390 voxels of 0.5 mm become the pixels of a test slice, as in the published method's code


class LabelledHeads:
    """The heads of a BrainWeb folder: 20 normal anatomical models, split 16 / 1 / 3 by head (other numbers in proportion).

    Parameters
    ----------
    folder
        ``subjectNN_crisp_v.rawb`` (or ``.raws``, ``.mnc``, ``.nii``; with or without ``.gz``) of every head; or, for
        partial volumes as published, ``subjectNN_<class>_v.*`` of all ten classes. The user downloads them from BrainWeb.
    device
        Where slices are made.
    shape
        ``(z, y, x)`` of headerless files.

    Raises
    ------
    DataError
        Fewer than three heads.
    """

    name: str = "brainweb"

    def __init__(self, folder: str | Path, device: torch.device | str = "cpu", shape: Shape = BRAINWEB_SHAPE) -> None:
        self._shape = shape
        self._files = brainweb_files(folder)
        subjects = sorted(self._files)
        if len(subjects) < 3:
            raise DataError(
                "too few heads",
                where=f"BrainWeb folder {Path(folder).name}",
                got=len(subjects) if Path(folder).is_dir() else "no such folder",
                expected="at least 3",
                remedy="put subjectNN_crisp_v.rawb, or files of all ten classes, of every head into it",
            )
        n_test = max(1, round(len(subjects) * 3 / 20))
        self._subjects = {
            "train": subjects[: -n_test - 1],
            "validation": subjects[-n_test - 1 : -n_test],
            "test": subjects[-n_test:],
        }
        self._heads: dict[str, Tensor] = {}
        self._device = torch.device(device)

    def subjects(self, split: str) -> tuple[str, ...]:
        """Names of the heads of a split."""
        check_split(split)
        return tuple(self._subjects[split])

    def read(self, *splits: str) -> None:
        """Read the heads of these splits now: a damaged one must not end a training that has run for hours.

        Raises
        ------
        DataError
            A file of another size, or that is no volume, or holds a label that BrainWeb does not have.
        """
        for split in splits:
            for subject in self.subjects(split):
                self._head(subject)

    def digest(self) -> str:
        """sha256 of the names and sha256 of all heads' files: the same for folders with the same heads."""
        digest = hashlib.sha256()
        for subject, files in sorted(self._files.items()):
            digest.update("".join(f"{subject} {name} {sha256_of(files[name])}\n" for name in sorted(files)).encode())
        return digest.hexdigest()

    def fractions(self, draws: Draws, n: int, split: str) -> Tensor:
        """float32 ``(sample, class, n, n)``, see `Anatomy`; the first use of a head reads it.

        Slices of the test heads are as published: straight, of one size, and nothing added to what BrainWeb has. The others are turned,
        sheared, shifted and scaled, with more vessels, and lesions.
        """
        names = self.subjects(split)
        as_published = split == "test"
        plane = straight_plane(len(draws), n, TEST_FOV, draws.device) if as_published else draw_plane(draws, n, warp=0.0)
        which = draws.uniform(0.0, len(names), 1)[:, 0].long().clamp(max=len(names) - 1).tolist()
        height = draws.uniform(AXIAL_MARGIN, 1 - AXIAL_MARGIN, 1)[:, 0].tolist()
        out = plane.y.new_zeros(len(draws), len(CLASSES), n, n)
        for i, (subject, h) in enumerate(zip(which, height, strict=True)):
            head = self._head(names[subject])  # (class, z, y, x), 1 mm
            planes = head[:, int(h * head.shape[1])].float()[None] / 255
            size_y, size_x = planes.shape[-2:]
            where = torch.stack((plane.x[i] * 2 / size_x, plane.y[i] * 2 / size_y), dim=-1)[None]
            out[i, :-1] = functional.grid_sample(planes, where, align_corners=False)[0]
        return out if as_published else with_vessels_and_lesions(draws, out, plane)

    def _head(self, subject: str) -> Tensor:
        if subject not in self._heads:
            fractions = brainweb_fractions(self._files[subject], self._shape)
            self._heads[subject] = torch.from_numpy(fractions).to(self._device)
        return self._heads[subject]


class HeadsAndAtlas(LabelledHeads):
    """A BrainWeb folder's heads; of the *training* samples a part is drawn from an atlas instead.

    Sixteen heads are few, and their crisp labels make sharper borders than an average atlas does: both teach more than either.
    Validation and test see BrainWeb's heads alone.

    Parameters
    ----------
    folder, device, shape
        See `LabelledHeads`.
    atlas
        The other source.
    share
        Part of the training samples that come from it.
    """

    def __init__(
        self,
        folder: str | Path,
        atlas: Anatomy,
        share: float,
        device: torch.device | str = "cpu",
        shape: Shape = BRAINWEB_SHAPE,
    ) -> None:
        super().__init__(folder, device, shape)
        self._atlas, self._share = atlas, share
        self.name = f"{LabelledHeads.name}, {share:g} {atlas.name}"

    def fractions(self, draws: Draws, n: int, split: str) -> Tensor:
        """As `LabelledHeads.fractions`; which source a sample is of is its own first draw."""
        if split != "train":
            return super().fractions(draws, n, split)
        drawn = draws.flip(self._share, 1, 1, 1)
        return torch.where(drawn, self._atlas.fractions(draws, n, split), super().fractions(draws, n, split))


def brainweb_files(folder: str | Path) -> dict[str, dict[str, Path]]:
    """Files by head and by class (or ``"crisp"``); heads that are incomplete are left out."""
    heads: dict[str, dict[str, Path]] = {}
    for path in sorted(Path(folder).glob("subject*")):
        subject, _, rest = path.name.partition("_")
        kind = rest.partition(".")[0].removesuffix("_v")
        known = ["crisp"] if kind == "crisp" else [c for c, names in FRACTION_NAMES.items() if kind in names]
        for name in known:
            heads.setdefault(subject, {})[name] = path
    complete = set(FRACTION_NAMES)
    return {s: files for s, files in heads.items() if "crisp" in files or complete <= set(files)}


def brainweb_fractions(files: dict[str, Path], shape: Shape = BRAINWEB_SHAPE) -> NDArray[np.uint8]:
    """uint8 ``(class, z, y, x)`` at 1 mm, fractions times 255, all classes but lesions.

    Raises
    ------
    DataError
        A label that BrainWeb does not have, classes of different sizes, or files that are no volumes.
    """
    if set(FRACTION_NAMES) <= set(files):
        shares = [np.asarray(read_volume(files[name], shape), np.float32) for name in CLASSES[:-1]]
        for name, share in zip(CLASSES, shares, strict=False):
            if share.shape != shares[0].shape:
                raise DataError("classes of other sizes", where=files[name].name, got=share.shape, expected=shares[0].shape)
        return np.stack([_halved(s * (255.0 if s.max() <= 1.0 else 1.0)) for s in shares])
    labels = np.rint(np.asarray(read_volume(files["crisp"], shape), np.float32)).astype(np.int32)
    if labels.max() >= len(BRAINWEB_LABELS):
        labels >>= 4  # 16-bit downloads hold the label in the upper bits
    if labels.min() < 0 or labels.max() >= len(BRAINWEB_LABELS):
        raise DataError("unknown label", where=files["crisp"].name, got=int(labels.max()), expected="0 to 11")
    return np.stack([_halved(255.0 * (labels == BRAINWEB_LABELS.index(name))) for name in CLASSES[:-1]])


def _halved(volume: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Mean of blocks of two voxels along every axis (0.5 mm to 1 mm)."""
    z, y, x = (2 * (s // 2) for s in volume.shape)
    blocks = volume[:z, :y, :x].reshape(z // 2, 2, y // 2, 2, x // 2, 2)
    return np.rint(blocks.mean(axis=(1, 3, 5), dtype=np.float32)).astype(np.uint8)


def open_anatomy(
    brainweb: str | Path | None = None,
    device: torch.device | str = "cpu",
    *,
    atlas: str | Path | None = None,
    atlas_share: float = 0.0,
) -> Anatomy:
    """The heads of a BrainWeb folder when one is given, else heads drawn from an atlas: `nilearn`'s folder at 1 mm, or the packed one.

    Parameters
    ----------
    atlas_share
        Part of the training samples that come from the atlas although there is a BrainWeb folder.
    """
    if brainweb and not atlas_share:
        return LabelledHeads(brainweb, device)
    drawn = HeadAtlas(atlas_from_folder(atlas) if atlas else None, device)
    return HeadsAndAtlas(brainweb, drawn, atlas_share, device) if brainweb else drawn
