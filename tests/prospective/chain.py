"""From a mask to maps as a user does it: every step is a command; the scanner and the client are processes of their own."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typer.testing import CliRunner

from gadgets.cli import app
from gadgets.image_file import read_images
from tests.prospective import phantom as ph

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Case:
    """One scan: voxels ``(z, y, x)`` of ``voxel`` m, echo times in ms; ``finer``: simulated voxels per voxel and axis."""

    phantom: ph.Phantom
    matrix: tuple[int, int, int]
    voxel: float
    n_echoes: int
    acceleration: float
    segments: int
    acs: tuple[int, int]
    first_echo_ms: float = 4.0
    echo_spacing_ms: float = 5.0
    tr_ms: float = 30.0
    dummies: int = 60
    noise: float = 0.0001
    finer: int = 1
    threads: int = 1

    @property
    def fov(self) -> ph.Vector:
        z, y, x = (n * self.voxel for n in self.matrix)
        return z, y, x

    @property
    def place(self) -> list[ph.FloatArray]:
        return ph.grid(self.matrix, self.fov)


def recon(*words: object) -> str:
    """The command ``recon`` in a process of its own."""
    return _run([sys.executable, "-m", "gadgets.cli", *map(str, words)])


def prepare(*words: object) -> str:
    """The same command in this process, where starting another would take longer than the command."""
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
    if done.exit_code:
        raise AssertionError(f"{words[:2]}: {done.output}")
    return done.output


def acquire(case: Case, folder: Path) -> Path:
    """Draw, order and export a mask, play it on the phantom, attach the header: the raw file."""
    n_z, n_y, n_x = case.matrix
    prepare(
        "mask", "draw", folder / "drawn.h5", "--k1", n_y, "--k2", n_z, "--echoes", case.n_echoes,
        "--acceleration", case.acceleration, "--segments", case.segments, "--acs-k1", case.acs[1], "--acs-k2", case.acs[0],
        "--per-echo", "--seed", 1,
    )  # fmt: skip
    prepare("mask", "order", folder / "drawn.h5", folder / "mask.h5", "--segments", case.segments)
    prepare("mask", "install", folder / "mask.h5", "--masks", folder / "masks")
    fov = [length * 1e3 for length in case.fov[::-1]]
    prepare(
        "mask", "export", folder / "mask.h5", "--seq", folder / "scan.seq", "--matrix", n_x, "--fov-mm", *fov,
        "--first-echo-ms", case.first_echo_ms, "--echo-spacing-ms", case.echo_spacing_ms, "--tr-ms", case.tr_ms,
        "--dummies", case.dummies, "--field-strength", case.phantom.field_strength,
    )  # fmt: skip
    case.phantom.save(folder / "phantom.json")
    scanner(case, folder)
    said = prepare("mask", "attach", folder / "scanned.h5", folder / "scan.mrd.xml", folder / "raw.h5")
    assert "samples are those of the mask 'mask'" in said, said
    return folder / "raw.h5"


def scanner(case: Case, folder: Path) -> None:
    """The other program: knows the sequence file and the object, nothing else."""
    matrix = [n * case.finer for n in case.matrix]
    _run([
        sys.executable, "-m", "tests.prospective.scanner", folder / "scan.seq", folder / "phantom.json", folder / "scanned.h5",
        "--matrix", *matrix, "--noise", case.noise, "--threads", case.threads, "--trajectory", folder / "played.npz",
    ])  # fmt: skip


def stored_maps(images: Path) -> dict[str, NDArray[np.float64]]:
    """The maps of an image file by type, ``(z, y, x)`` in the unit of the console (1/s, Hz, ppb; NaN where there is none)."""
    found = {}
    for image in read_images(images):
        told = dict(re.findall(r"<name>([^<]*)</name>\s*<value>([^<]*)</value>", image.attributes))
        if told["DataRole"] == "Quantitative":
            scale, offset = (float(told[f"GADGETRON_Scale{name}"]) for name in ("Ratio", "Offset"))
            stored = image.data[0].astype(float)
            # 0 is where a map with an offset is not valid
            found[told["ImageType"]] = np.where((stored == 0.0) & (offset > 0), np.nan, (stored - offset) / scale)
    return found


def insert_errors(case: Case, r2star: NDArray[np.float64], chi: NDArray[np.float64]) -> list[dict[str, float]]:
    """Of every insert: mean inside, a voxel away from its surface, and what it should be. Susceptibility against the body around."""
    place, voxel = case.place, case.voxel
    body = ph.in_body(case.phantom, place, 2.5 * voxel)
    for sphere in case.phantom.inserts:
        body &= ~ph.inside(sphere, place, -1.5 * voxel)
    body &= np.isfinite(chi)
    found = []
    for sphere in case.phantom.inserts:
        core = ph.inside(sphere, place, voxel)
        measured = float(chi[core].mean() - chi[body].mean())
        found.append(
            {
                "r2star": float(r2star[core].mean()),
                "r2star_true": sphere.r2star,
                "r2star_error": float(r2star[core].mean()) / sphere.r2star - 1.0,
                "chi": measured,
                "chi_true": sphere.chi,
                "chi_error": measured / sphere.chi - 1.0,
                "voxels": int(core.sum()),
            }
        )
    return found


def _run(words: list[object]) -> str:
    done = subprocess.run([str(word) for word in words], cwd=ROOT, capture_output=True, text=True, timeout=3600)
    if done.returncode:
        raise AssertionError(f"{words[1:4]}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return done.stdout
