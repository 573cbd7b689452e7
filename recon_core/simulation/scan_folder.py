"""Multi-echo scans in a folder: simulated ones that several trainings share, or a user's own fully sampled ones.

A scan is a pair ``<name>.json`` and ``<name>.safetensors`` (`write_scan`). Scans are split by their order in the folder: the last
tenth is for validation, the tenth before it for tests (one each at least), the rest for training.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from recon_core.errors import DataError
from recon_core.simulation.anatomy import check_split
from recon_core.simulation.multi_echo_brain import BrainScan, MultiEchoBrains, ScanRecipe
from recon_core.simulation.random_fields import sample_seed
from recon_core.training.checkpoint import read_pair, sha256_of, stated_digest, stored_shape, write_pair

FORMAT = "recon-gadgets multi-echo scan"
TENSORS = ("images", "coil_maps", "brain", "head", "r2star", "field", "local_field", "chi", "labels")
SPLITS = ("train", "test", "validation")


class ScanSupply(Protocol):
    """Where scans come from."""

    def scan(self, split: str, index: int) -> BrainScan:
        """Scan number ``index`` of a split."""


def write_scan(folder: str | Path, name: str, scan: BrainScan) -> Path:
    """Write a scan; the JSON's path. Maps that a measured scan does not have are zeros."""
    facts = {
        "format": FORMAT,
        "echo_times": list(scan.echo_times),
        "voxel": list(scan.voxel),
        "b0": list(scan.b0),
        "noise_std": scan.noise_std,
        "key": list(scan.key),
    }
    return write_pair(folder, name, {k: getattr(scan, k) for k in TENSORS}, facts)


def read_scan(path: str | Path) -> BrainScan:
    """Read a scan of `write_scan`.

    Raises
    ------
    WeightError
        A damaged pair.
    DataError
        Something else.
    """
    tensors, facts = read_pair(path)
    if facts.get("format") != FORMAT or set(tensors) != set(TENSORS):
        raise DataError("not a multi-echo scan", where=Path(path).name, expected=FORMAT)
    images, maps = tensors["images"], tensors["coil_maps"]
    if images.ndim != 4 or maps.shape[1:] != images.shape[1:] or len(facts["echo_times"]) != len(images):
        raise DataError("images, maps and echo times do not fit", where=Path(path).name, got=tuple(images.shape))
    if not all(bool(torch.isfinite(part).all()) for part in (images, maps)):
        raise DataError("values that are not finite", where=Path(path).name, expected="finite images and coil maps")
    if not bool(tensors["brain"].any()):
        raise DataError("a scan without a brain", where=Path(path).name, expected="a brain to learn from")
    z, y, x = facts["voxel"]
    b0 = tuple(facts["b0"])
    split, index = facts["key"]
    return BrainScan(
        **tensors,
        echo_times=tuple(facts["echo_times"]),
        voxel=(z, y, x),
        b0=(b0[0], b0[1], b0[2]),
        noise_std=float(facts["noise_std"]),
        key=(split, index),
    )


class ScanFolder:
    """The scans of a folder; after the last one the first comes again.

    Parameters
    ----------
    folder
        Holds at least three scans.
    keep
        Scans held in memory.

    Raises
    ------
    DataError
        Fewer than three scans.
    """

    def __init__(self, folder: str | Path, *, keep: int = 8) -> None:
        paths = sorted(Path(folder).glob("*.json"))
        if len(paths) < len(SPLITS):
            raise DataError("too few scans", where=Path(folder).name, got=len(paths), expected="three or more")
        n = max(1, len(paths) // 10)
        self._places = {path: place for place, path in enumerate(paths)}
        self._paths = {"train": paths[: -2 * n], "test": paths[-2 * n : -n], "validation": paths[-n:]}
        self._keep = keep
        self._held: OrderedDict[Path, BrainScan] = OrderedDict()

    def scan(self, split: str, index: int) -> BrainScan:
        """Scan number ``index`` of a split; its key is the split and its place in the folder, whatever the file says.

        Raises
        ------
        SettingError
            An unknown split.
        """
        check_split(split)
        path = self._paths[split][index % len(self._paths[split])]
        if path not in self._held:
            self._held[path] = replace(read_scan(path), key=(split, self._places[path]))
            while len(self._held) > self._keep:
                self._held.popitem(last=False)
        self._held.move_to_end(path)
        return self._held[path]

    def require(self, plane: tuple[int, int], fewest: int, most: int) -> None:
        """See that every scan has planes ``(k2, k1)`` of this size, and not fewer or more echoes, and is there once.

        Raises
        ------
        DataError
            One has not, or is there twice; it is named.
        WeightError
            A damaged pair.
        """
        seen: dict[str, Path] = {}
        for path in self._places:
            first = seen.setdefault(stated_digest(path), path)
            if first != path:
                raise DataError(
                    "a scan that is there twice",
                    where=path.name,
                    got=f"that of {first.name}",
                    expected="different scans: the last ones judge what was learned from the first",
                    remedy="remove one of them",
                )
            n, z, y, _ = shape if len(shape := stored_shape(path, "images")) == 4 else (0, 0, 0, 0)
            if (z, y) != plane or not fewest <= n <= most:
                echoes = f"{fewest} to {most}" if fewest < most else most
                raise DataError(
                    "a scan that does not fit the training",
                    where=path.name,
                    got=f"{n} echoes, planes of {z} x {y} (k2 x k1)",
                    expected=f"{echoes} echoes, planes of {plane[0]} x {plane[1]}",
                    remedy="state the scans' own size (recon train laro: --k2, --k1, --echoes), or leave that scan out",
                )

    def digest(self) -> str:
        """sha256 of the names and of the descriptions, which state the tensors' sha256: the same for folders with the same scans."""
        digest = hashlib.sha256()
        for path in self._places:  # in order
            digest.update(f"{path.name} {sha256_of(path)}\n".encode())
        return digest.hexdigest()


def cut_readout(scan: BrainScan, n_planes: int, seed: int) -> BrainScan:
    """So many neighbouring planes (k2, k1) of a scan, somewhere in the brain: what a large matrix is trained on, since a plane is whole and
    the readout is complete, at a fraction of the cost."""
    inside = scan.brain.any(0).any(0).nonzero().flatten()
    if not len(inside) or n_planes >= scan.images.shape[-1]:
        return scan
    last = max(int(inside[0]), int(inside[-1]) + 1 - n_planes)
    begin = int(np.random.default_rng(seed).integers(int(inside[0]), last + 1))
    begin = min(begin, scan.images.shape[-1] - n_planes)
    cut = {name: getattr(scan, name)[..., begin : begin + n_planes].contiguous() for name in TENSORS}
    return replace(scan, **cut)


def main(arguments: Sequence[str] | None = None) -> None:
    """Simulate scans into a folder: ``python -m recon_core.simulation.scan_folder --output DIR --count 20``."""
    parser = argparse.ArgumentParser(prog="python -m recon_core.simulation.scan_folder", description=main.__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--matrix", type=int, nargs=3, default=ScanRecipe.matrix, metavar=("Z", "Y", "X"))
    parser.add_argument("--voxel", type=float, nargs=2, default=ScanRecipe.voxel, metavar=("LOW", "HIGH"), help="mm")
    parser.add_argument(
        "--echoes", type=int, nargs="+", default=[ScanRecipe.n_echoes], help="several: scans take them in turn"
    )
    parser.add_argument("--coils", type=int, default=ScanRecipe.n_coils)
    parser.add_argument("--first", type=int, default=0, help="number of the first scan: a folder may be filled in parts")
    parser.add_argument("--planes", type=int, default=0, help="keep so many neighbouring readout positions; 0: all")
    options = parser.parse_args(arguments)
    for index in range(options.first, options.first + options.count):
        n_echoes = options.echoes[index % len(options.echoes)]
        recipe = ScanRecipe(tuple(options.matrix), tuple(options.voxel), n_echoes, n_coils=options.coils)
        scan = MultiEchoBrains(recipe, seed=options.seed, keep=1).scan("train", index)
        if options.planes:
            scan = cut_readout(scan, options.planes, sample_seed(options.seed, index, "readout"))
        print(write_scan(options.output, f"scan_{index:04d}", scan), flush=True)


if __name__ == "__main__":
    main()
