"""LARO on held-out simulated brains: ``python -m benchmarks.laro``.

Retrospective undersampling at R = 8 and 4 by masks of all three kinds (SPO 0, 1, 2); every method reconstructs the same data with the
same coil maps; the same chain makes R2*, local field and susceptibility of all of them. The reference is that chain on the noise-free,
fully sampled images. Networks: all ``laro*.json`` of ``--weights`` folders, named by their files.

``--parts`` chooses: ``tables`` (the paper's S1 to S4), ``regions`` (S5 and lesions, against the simulated truth), ``general`` (other
echo counts, matrix, coils, flip angle).
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import bart
from benchmarks.common import check_words, in_words, print_table, write_result
from benchmarks.laro_cases import (
    WEIGHTS,
    Case,
    Images,
    acquire,
    available,
    held_out,
    pattern,
    with_estimated_maps,
)
from benchmarks.laro_scores import Maps, maps_of, regional, regression, scores, true_regional
from recon_core.errors import SettingError
from recon_core.simulation.multi_echo_brain import BrainScan, ScanRecipe
from recon_core.training.png import write_png

Method = Callable[[Case], Images]
Row = dict[str, Any]

TEST = ScanRecipe(first_echo=(0.002, 0.002), echo_spacing=(0.0045, 0.0045), flip_angle=(15.0, 15.0), noise=(0.01, 0.01))
"""Like the training's matrix; echoes at 2 to 24.5 ms."""

LARGE: dict[str, Any] = {"matrix": (80, 206, 48), "voxel": (1.0, 1.1)}
"""The published plane, 80 x 206; the readout is short, and its voxels 3.7 to 4.4 mm long, so that a table takes minutes."""

FINE: dict[str, Any] = {**LARGE, "matrix": (80, 206, 128)}
"""The same with readout voxels of 1.4 to 1.7 mm, nearly isotropic as the published scan's: a quarter of an hour of a core a head."""

MATRICES: dict[str, dict[str, Any]] = {"small": {}, "large": LARGE, "fine": FINE}

PARTS = ("tables", "regions", "general")

KIND = re.compile(r"\d+(\.\d+)?/[012]")
"""R/SPO."""

FULL = ("full", "noise-free")
"""Of the reference: the maps of the fully sampled scan."""

SHOWN_SIDE = 128
"""Pixels of a map in a picture, about."""

GENERAL: dict[str, dict[str, Any]] = {
    "as trained": {},
    "7 echoes": {"n_echoes": 7, "echo_spacing": (0.0038, 0.0038)},
    "4 echoes": {"n_echoes": 4, "echo_spacing": (0.0065, 0.0065)},
    "matrix 40 x 80": {"matrix": (40, 80, 64), "voxel": (2.1, 2.7)},
    "matrix 80 x 206": LARGE,
    "12 coils": {"n_coils": 12},
    "flip angle 25": {"flip_angle": (25.0, 25.0)},
    "three times the noise": {"noise": (0.03, 0.03)},
}


class Comparison:
    """Figures of every method under every mask, head after head: one head at a time is held, and a run that is stopped leaves what it has.

    Parameters
    ----------
    methods
        By name.
    kinds
        ``R/SPO`` each.
    pictures
        Folder for a montage of the first head under every mask.
    own_maps
        Coil maps estimated from the case's own calibration block.
    """

    def __init__(
        self, methods: Mapping[str, Method], kinds: Sequence[str], pictures: Path | None = None, *, own_maps: bool = False
    ) -> None:
        self._methods, self._kinds, self._pictures, self._own_maps = methods, kinds, pictures, own_maps
        self._figures: dict[tuple[str, str], list[dict[str, float]]] = {}
        self._regional: dict[tuple[str, str], dict[str, float]] = {FULL: {}}
        self._simulated: dict[str, float] = {}
        self._heads = 0

    def add(self, scan: BrainScan, tell: Callable[[], object] = lambda: None) -> None:
        """Reconstruct and score one head; ``tell`` is called after every method."""
        head, truth = self._heads, maps_of(scan.images, scan)
        self._heads += 1
        self._keep(FULL, head, regional(truth, scan))
        self._simulated |= _numbered(head, true_regional(scan, truth.region))
        for kind in self._kinds:
            acceleration, spo = kind.split("/")
            case = _case(scan, float(acceleration), int(spo), head, self._own_maps)
            shown = {}
            for name, method in self._methods.items():
                images, seconds = method(case)
                shown[name] = maps_of(images, scan)
                figures = {**scores(shown[name], truth, scan), "CPU s": seconds}
                self._figures.setdefault((kind, name), []).append(figures)
                self._keep((kind, name), head, regional(shown[name], scan))
                print(f"head {head}", kind, name, {k: round(v, 4) for k, v in figures.items()}, flush=True)
                tell()
            if self._pictures is not None and head == 0:
                write_png(self._pictures / f"laro_{kind.replace('/', '_')}.png", montage(truth, shown))

    def _keep(self, key: tuple[str, str], head: int, means: Mapping[str, float]) -> None:
        self._regional.setdefault(key, {}).update(_numbered(head, means))

    def tables(self) -> list[Row]:
        """Means over the heads that each method has been through."""
        return [
            {
                "R/SPO": kind,
                "method": name,
                **{column: float(np.mean([f[column] for f in figures])) for column in figures[0]},
                "heads": len(figures),
            }
            for (kind, name), figures in sorted(self._figures.items(), key=lambda item: self._order(item[0]))
        ]

    def regions(self) -> list[Row]:
        """Regional susceptibility of every method: against the simulated truth, and against the fully sampled scan's map."""
        rows = []
        for key in sorted(self._regional, key=self._order):
            found = self._regional[key]
            row: Row = {"R/SPO": key[0], "method": key[1]}
            for label, target in (("truth", self._simulated), ("full scan", self._regional[FULL])):
                for part, chosen in (("regions", False), ("lesions", True)):
                    mine = {k: v for k, v in found.items() if ("lesion" in k) == chosen}
                    slope, r2, n = regression(mine, target)
                    row |= {f"{part} slope ({label})": slope, f"{part} R2 ({label})": r2, f"{part} n": n}
            names = sorted({k.split(" ", 1)[1] for k in found if "lesion" not in k})
            row["means"] = {n: float(np.mean([v for k, v in found.items() if k.split(" ", 1)[1] == n])) for n in names}
            rows.append(row)
        return rows

    def _order(self, key: tuple[str, str]) -> tuple[int, int]:
        return (-1, 0) if key == FULL else (list(self._kinds).index(key[0]), list(self._methods).index(key[1]))


def _numbered(head: int, means: Mapping[str, float]) -> dict[str, float]:
    return {f"{head} {name}": value for name, value in means.items()}


def general(
    methods: Mapping[str, Method], pictures: Path | None = None, tell: Callable[[list[Row]], object] = lambda rows: None
) -> list[Row]:
    """Scans that differ from the training's in one thing each; R = 8, SPO = 2, masks interpolated or cut as the paper does."""
    rows = []
    for label, changes in GENERAL.items():
        scan = held_out(replace(TEST, **changes), 1)[0]
        case = _case(scan, 8.0, 2, 0)
        truth = maps_of(scan.images, scan)
        shown = {}
        for name, method in methods.items():
            try:
                images, _ = method(case)
            except Exception as error:  # a network for a fixed number of echoes says so; the table shows it
                rows.append({"scan": label, "method": name, "error": str(error)})
                print(label, name, error, flush=True)
                continue
            shown[name] = maps_of(images, scan)
            figures = scores(shown[name], truth, scan)
            row: Row = {"scan": label, "method": name, **figures}
            rows.append(row)
            print(label, name, {k: round(v, 4) for k, v in figures.items()}, flush=True)
            tell(rows)
        if pictures is not None:
            write_png(pictures / f"laro_{label.replace(' ', '_')}.png", montage(truth, shown))
    return rows


def montage(truth: Maps, found: Mapping[str, Maps]) -> np.ndarray:
    """Columns: reference, then every method; rows: magnitude, its error x 5, R2*, QSM, its error x 3; middle slice."""
    z = truth.magnitude.shape[0] // 2
    zoom = max(1, round(SHOWN_SIDE / truth.magnitude.shape[-1]))
    peak = float(truth.magnitude.max())
    columns = []
    for maps in (truth, *found.values()):
        rows = [
            maps.magnitude[z] / peak,
            5 * np.abs(maps.magnitude[z] - truth.magnitude[z]) / peak,
            maps.r2star[z] / 60,
            (maps.chi[z] + 0.1) / 0.3,
            3 * np.abs(maps.chi[z] - truth.chi[z]) / 0.3,
        ]
        columns.append(np.concatenate(rows))
    return np.clip(np.concatenate(columns, axis=1), 0, 1).repeat(zoom, 0).repeat(zoom, 1)


def _case(scan: BrainScan, acceleration: float, spo: int, seed: int, own_maps: bool = False) -> Case:
    n_echoes, z, y, _ = scan.images.shape
    case = acquire(scan, pattern((z, y), n_echoes, acceleration, spo), acceleration, spo, seed)
    return with_estimated_maps(case) if own_maps else case


def chosen_methods(methods: dict[str, Method], names: str) -> dict[str, Method]:
    """Those of the names, comma separated, in their order; all if empty.

    Raises
    ------
    SettingError
        There is no such method; BART's are there where BART is installed.
    """
    wanted = [n for n in names.split(",") if n]
    if any(n.startswith("bart_llr") for n in wanted) and not bart.available():
        raise SettingError("BART is not installed", where="--methods", got=names, remedy="Install it, or leave bart_llr out")
    check_words("--methods", wanted, methods)
    return {n: methods[n] for n in wanted} if wanted else methods


def above_0(text: str) -> int:
    """A number of an option that is 1 or more."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is not 1 or more")
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scans", type=above_0, default=2, help="held-out heads")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument(
        "--split", choices=("test", "validation"), default="test", help="choices are made on validation heads"
    )
    parser.add_argument("--kinds", nargs="+", default=["8/0", "8/1", "8/2", "4/0", "4/1", "4/2"], help="R/SPO")
    parser.add_argument("--weights", nargs="*", type=Path, default=[WEIGHTS], help="folders of networks")
    parser.add_argument("--methods", default="", help="names, comma separated; all if empty")
    parser.add_argument("--bart-weights", nargs="*", type=float, default=[], help="each is a method more, bart_llr_W")
    parser.add_argument("--low-rank-steps", type=int, help="of the networks, instead of their setting's; 0: none")
    parser.add_argument("--parts", default="tables,regions,general")
    parser.add_argument(
        "--coil-maps",
        choices=("true", "espirit"),
        default="true",
        help="of the reconstruction: the simulated ones, or estimated",
    )
    parser.add_argument(
        "--matrix",
        choices=tuple(MATRICES),
        default="small",
        help="of tables and regions: 32 x 64, or 80 x 206; fine: that with shorter voxels along the readout",
    )
    parser.add_argument("--pictures", type=Path, help="folder for PNGs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--name", default="laro", help="of the JSON")
    options = parser.parse_args(arguments)
    own_maps = options.coil_maps == "espirit"
    torch.set_num_threads(options.threads)
    files = sorted(p for folder in options.weights for p in folder.glob("laro*.json"))
    of_networks = {} if options.low_rank_steps is None else {"low_rank_steps": options.low_rank_steps}
    methods = chosen_methods(available(files, options.bart_weights, **of_networks), options.methods)
    parts = options.parts.split(",")
    check_words("--parts", parts, PARTS)
    if "regions" in parts and "tables" not in parts:
        raise SettingError("regions are made with the tables", where="--parts", got=options.parts, expected="tables,regions")
    for kind in options.kinds:
        if not KIND.fullmatch(kind):
            raise SettingError("no kind of masks", where="--kinds", got=kind, expected="R/SPO, as 8/2")
    if options.pictures is not None:
        options.pictures.mkdir(parents=True, exist_ok=True)
    recipe = replace(TEST, **MATRICES[options.matrix])
    result: dict[str, Any] = {
        "test": str(recipe),
        "scans": options.scans,
        "threads": options.threads,
        "coil maps": options.coil_maps,
        **of_networks,
    }
    if "tables" in parts:
        compared = Comparison(methods, options.kinds, options.pictures, own_maps=own_maps)

        def keep() -> None:
            result["tables"] = compared.tables()
            if "regions" in parts:
                result["regions"] = compared.regions()
            write_result(options.name, result)

        for number in range(options.first, options.first + options.scans):
            compared.add(held_out(recipe, 1, options.split, number)[0], keep)
        for title, rows in (("LARO, held-out simulated brains", "tables"), ("Susceptibility", "regions")):
            if rows in parts:
                columns = [c for c in result[rows][0] if c != "means"]
                print_table(title, columns, [[row[c] for c in columns] for row in result[rows]])
    if "general" in parts:
        others = {k: v for k, v in methods.items() if k != "cg_sense" and not k.startswith("bart_llr")}
        result["general"] = general(
            others, options.pictures, lambda rows: write_result(options.name, {**result, "general": rows})
        )
    write_result(options.name, result)
    return 0


if __name__ == "__main__":
    raise SystemExit(in_words(main))
