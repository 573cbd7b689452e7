"""A prospective scan without a scanner: mask -> Pulseq -> MRzeroCore -> raw data -> running server -> R2* and susceptibility of inserts.

    python -m benchmarks.prospective [--finer 2]

Every step is the command that a user types; the simulated scanner and the replaying client are processes of their own. Asked: R2* within
3 %, susceptibility within 10 %. The small case of the tests is ``tests/e2e/test_prospective.py``.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, write_result
from gadgets.chain import chain_names
from gadgets.service import Service, ServiceOptions
from tests.prospective import phantom as ph
from tests.prospective.chain import Case, acquire, insert_errors, recon, stored_maps

MAX_R2STAR, MAX_CHI = 0.03, 0.10
CHAINS = ("llr_qsm", "laro_qsm")
BACKGROUNDS = ("v_sharp", "pdf")
SETTINGS = ("--set", "map_mask=object", "--set", "map_phase_sign=negative")


def case(finer: int, threads: int) -> Case:
    """Four inserts in an ellipsoid of 84 x 116 x 148 mm, 4 mm voxels, five echoes, four-fold undersampled, eight coils."""
    phantom = ph.Phantom(
        semi_axes=(0.046, 0.062, 0.076),
        r2star=15.0,
        inserts=(
            ph.Sphere((0.0, -0.016, -0.032), 0.012, chi=0.30, r2star=60.0),
            ph.Sphere((0.004, 0.018, -0.020), 0.012, chi=-0.20, r2star=30.0),
            ph.Sphere((-0.004, -0.018, 0.022), 0.012, chi=0.15, r2star=40.0),
            ph.Sphere((0.0, 0.014, 0.034), 0.014, chi=-0.10, r2star=20.0),
        ),
        outside=(ph.Sphere((0.11, 0.05, -0.05), 0.012, chi=8.0, r2star=0.0),),
        n_coils=8,
    )
    return Case(
        phantom, matrix=(28, 36, 44), voxel=0.004, n_echoes=5, acceleration=4.0, segments=6, acs=(10, 10), first_echo_ms=4.0,
        echo_spacing_ms=5.0, tr_ms=35.0, dummies=80, noise=0.0005, finer=finer, threads=threads,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--finer", type=int, default=1, help="simulated voxels per voxel and axis")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, help="keep everything here; raw data and images that are there are used again"
    )
    parser.add_argument(
        "--chain", action="append", choices=CHAINS, help="repeat for several; all that are installed otherwise"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run(options.folder or Path(temporary), case(options.finer, options.threads), options.chain or CHAINS)


def run(folder: Path, scan: Case, chains: Sequence[str]) -> None:
    """Acquire once, reconstruct by every chain, write the result."""
    folder.mkdir(parents=True, exist_ok=True)
    kept, acquired_from = folder / "case.txt", f"{replace(scan, threads=1)}\n"
    if (folder / "raw.h5").exists() and not (kept.exists() and kept.read_text(encoding="utf-8") == acquired_from):
        raise SystemExit(f"{folder} holds the scan of another case: name another folder")
    kept.write_text(acquired_from, encoding="utf-8")
    started = time.perf_counter()
    raw = folder / "raw.h5" if (folder / "raw.h5").exists() else acquire(scan, folder)
    acquired = time.perf_counter() - started
    rows: list[dict[str, Any]] = []
    with Service(ServiceOptions(port=0, workers=1, threads=scan.threads, masks=folder / "masks")) as server:
        for chain in [name for name in chains if name in chain_names()]:
            for background in BACKGROUNDS:
                out = folder / f"{chain}_{background}.h5"
                if not out.exists():
                    words = ("--set", f"map_background={background}", *SETTINGS)
                    recon("replay", raw, "--port", server.port, "--config", chain, "--out", out, *words)
                maps = stored_maps(out)
                for number, found in enumerate(insert_errors(scan, maps["R2STAR"], 1e-3 * maps["QSM"])):
                    rows.append({"chain": chain, "background": background, "insert": number, **found})
    print_table(
        f"{scan.matrix} voxels of {scan.voxel * 1e3:g} mm, {scan.n_echoes} echoes, R = {scan.acceleration:g}",
        ["chain", "background", "insert", "R2* 1/s", "true", "error %", "chi ppm", "true", "error %"],
        [
            [r["chain"], r["background"], r["insert"], r["r2star"], r["r2star_true"], 100 * r["r2star_error"], r["chi"],
             r["chi_true"], 100 * r["chi_error"]]
            for r in rows
        ],
    )  # fmt: skip
    reached = {
        f"{chain} {background}": {
            "r2star": max(abs(r["r2star_error"]) for r in rows if (r["chain"], r["background"]) == (chain, background)),
            "chi": max(abs(r["chi_error"]) for r in rows if (r["chain"], r["background"]) == (chain, background)),
        }
        for chain, background in dict.fromkeys((r["chain"], r["background"]) for r in rows)
    }
    write_result(
        "prospective",
        {
            "question": "R2* and susceptibility of inserts, from a mask through Pulseq, MRzeroCore and the server",
            "asked": {"r2star": MAX_R2STAR, "chi": MAX_CHI},
            "largest_error": reached,
            "case": {
                "matrix": scan.matrix, "voxel": scan.voxel, "echoes": scan.n_echoes, "acceleration": scan.acceleration,
                "coils": scan.phantom.n_coils, "noise": scan.noise, "finer": scan.finer,
            },
            "seconds_to_acquire": acquired if acquired > 1.0 else None,
            "inserts": rows,
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
