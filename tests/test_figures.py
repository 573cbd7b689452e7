"""Tables of figures in docs/ say what the recorded results in benchmarks/results say, digit by digit."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
LARO = {
    "## At 32 x 64": ["laro", "laro_other_masks", "laro_r4_spo1", "laro_modl", "laro_modl_r4"],
    "The same with coil maps estimated": ["laro_espirit"],
    "BART's LLR (`pics`": ["laro_bart", "laro_bart_r4", "laro_bart_r4_higher"],
    "## At 80 x 206": ["laro_206x80", "laro_206x80_r4", "laro_206x80_bart", "laro_206x80_bart_low"],
    "### Nearly isotropic voxels": ["laro_206x80_fine"],
    "**Heads 5 to 9**": ["laro_206x80_fine_5"],
    "## Ablation": ["laro_ablation"],
    "**`laro` as it ships against": ["laro_deep_admm", "laro"],
}
"""Where a table with a column "R / SPO" stands (it is the first after these words), and the results that it is made of; the first
that knows a row counts."""
ABLATION = {
    "refined, no network": "refined",
    "refined, 0": "laro_tff0",
    "refined, 1, both ways": "laro_tff1",
    "refined, 1, forward (Eq. 8)": "laro_forward",
    "cg_sense, 0": "laro_cg_tff0",
    "cg_sense, 1, both ways": "laro_cg_tff1",
}
NAMES = ABLATION | {"laro (32 x 64)": "laro", "deep ADMM, TFF 0": "laro_deep_admm"}
COLUMNS = ("magnitude", "r2star", "local field")

PINQI = {
    "BrainWeb's test heads": "pinqi_brainweb",
    "Heads of an average atlas": "pinqi_fresh",
    "The same atlas": "pinqi_fresh_16",
}
PINQI_NAMES = {
    "*fully sampled* + fit": "fully sampled + fit",
    "**PINQI as shipped**": "PINQI as shipped",
    "BART LLR + fit, weight chosen by the truth": "BART LLR + fit",
}


@cache
def result(name: str) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return document


def table(page: str, words: str) -> list[list[str]]:
    """Cells of the first table behind ``words``, its head first."""
    text = (ROOT / "docs" / page).read_text()
    assert words in text, words
    behind = text[text.index(words) :]
    found = re.search(r"(?:^\|.*\n)+", behind, re.MULTILINE)
    assert found, words
    lines = [line.strip().strip("|").split("|") for line in found[0].splitlines()]
    return [[cell.strip() for cell in line] for line in lines if not set("".join(line)) <= set("-: ")]


def as_written(text: str, value: float) -> bool:
    """Whether ``value`` rounds to the number, which may lack its leading zero."""
    digits = len(text.partition(".")[2])
    return abs(float(text) - value) <= 0.5000001 * 10**-digits


def wrong(said: str, values: list[float]) -> Iterator[str]:
    numbers = re.findall(r"-?\d*\.?\d+", said)
    if len(numbers) != len(values) or not all(map(as_written, numbers, values)):
        yield f"{said}, recorded {[round(v, 4) for v in values]}"


def scored(files: list[str], kind: str, method: str) -> dict[str, float]:
    rows = [row for name in files for row in result(name)["tables"] if (row["R/SPO"], row["method"]) == (kind, method)]
    assert rows, f"no recorded figures of {method} at {kind}"
    return dict(rows[0])


@pytest.mark.parametrize("words", LARO)
def test_laro_tables(words: str) -> None:
    head, *rows = table("laro_figures.md", words)
    first = next(i for i, name in enumerate(head) if name.startswith("magnitude"))
    faults = []
    for row in rows:
        label = ", ".join(row[1:first])
        label = label.replace("BART's LLR, weight ", "bart_llr_") if head[1] == "method" else label
        label = f"bart_llr_{label}" if head[1] == "weight" else label
        found = scored(LARO[words], row[0].replace(" ", ""), NAMES.get(label, label))
        values = [[found[f"{name} PSNR"], found[f"{name} SSIM"]] for name in COLUMNS]
        values += [[found["QSM RMSE"], found["QSM SSIM"], found["QSM HFEN"]]]
        values += [[found["QSM RMSE, truth"]]] if row[first + 4 :] not in ([], ["°"]) else []
        pairs = zip(row[first:], values, strict=False)
        faults += [f"{row[:first]}: {text}" for cell, own in pairs for text in wrong(cell, own)]
    assert not faults


REGIONS = {
    "fully sampled, noise-free": ("laro", "laro"),
    "`laro`": ("laro", "laro"),
    "`laro`, estimated maps": ("laro_espirit", "laro_espirit"),
    "`refined`": ("laro", "laro"),
    "`llr`": ("laro", "laro"),
    "`modl` °": ("laro_modl", "laro_modl_r4"),
}
"""Results at R = 8 and R = 4 by row."""
REGION_NAMES = {"fully sampled, noise-free": ("full", "noise-free")}


def regional(name: str, kind: str, label: str, part: str, target: str = "truth") -> list[float]:
    method = re.sub(r"[`°]|, estimated maps", "", label).strip()
    kind, method = REGION_NAMES.get(label, (kind, method))
    row = next(r for r in result(name)["regions"] if (r["R/SPO"], r["method"]) == (kind, method))
    return [row[f"{part} slope ({target})"], row[f"{part} R2 ({target})"]]


def test_regions_at_32_x_64() -> None:
    faults = []
    for label, at8, at4, lesions in table("laro_figures.md", "Regional susceptibilities (eight regions")[1:]:
        files = REGIONS[label]
        pairs = [(at8, regional(files[0], "8/2", label, "regions"))]
        pairs += [(at4, regional(files[1], "4/2", label, "regions"))] if at4 else []
        of_lesions = [regional(name, kind, label, "lesions") for name, kind in zip(files, ("8/2", "4/2"), strict=True)]
        pairs += list(zip(lesions.split("; "), of_lesions, strict=False))
        faults += [f"{label}: {text}" for cell, values in pairs for text in wrong(cell, values)]
    assert not faults


def test_regions_at_80_x_206() -> None:
    faults: list[str] = []
    for label, regions, _, lesions in table("laro_figures.md", "Regions and lesions, slope and R2")[1:]:
        for cell, part in ((regions, "regions"), (lesions, "lesions")):
            faults += [f"{label}: {t}" for t in wrong(cell, regional("laro_206x80_ten", "8/2", label, part))]
    fine = {
        "Slope and R2 against the simulated truth (40": "laro_206x80_fine",
        "Slope and R2 of these five": "laro_206x80_fine_5",
    }
    parts = [(part, target) for target in ("truth", "full scan") for part in ("regions", "lesions")]
    for name, row in ((name, row) for words, name in fine.items() for row in table("laro_figures.md", words)[1:]):
        for cell, (part, target) in zip(row[1:], parts, strict=True):
            values = regional(name, "8/2", row[0], part, target)
            faults += [f"{name}, {row[0]}: {t}" for t in wrong(cell, values)] if cell else []
    assert not faults


def test_scans_of_another_kind() -> None:
    text = (ROOT / "docs" / "laro_figures.md").read_text()
    said = text.partition("Scans of another kind (")[2].partition("): ")[2].partition(".\n")[0]
    found = {(r["scan"], r["method"]): r for r in result("laro_general")["general"]}
    rows = [re.fullmatch(r"(.+?) ([\d.]+), ([\d.]+)", part) for part in said.split("; ")]
    assert len(rows) == 7 and all(rows)
    faults: list[str] = []
    for label, *figures in [row.groups() for row in rows if row]:
        name = next(n for n, _ in found if n.replace("x", " x ").replace("  ", " ") == label or n == label)
        faults += wrong(", ".join(figures), [found[name, method]["magnitude PSNR"] for method in ("laro", "llr")])
    assert not faults


def shipped(name: str) -> str:
    sha = json.loads((ROOT / "recon_core" / "weights" / "pinqi_t1.json").read_text())["sha256"]
    return next(n for n in result(name)["summary"]["4"] if n == f"proposed ({sha[:8]})")


@pytest.mark.parametrize("words", PINQI)
def test_pinqi_tables(words: str) -> None:
    name = PINQI[words]
    faults = []
    for label, *cells in table("pinqi_figures.md", f"**{words}")[1:]:
        if label.startswith("goal"):
            continue
        method = PINQI_NAMES.get(label, label.replace("`", ""))
        method = shipped(name) if method == "PINQI as shipped" else method
        keys = ["1"] if method.startswith("fully") else ["4", "6", "8"]
        for cell, figure in zip(cells, ("nrmse", "mae", "ssim"), strict=True):
            faults += [f"{label}: {t}" for t in wrong(cell, [result(name)["summary"][k][method][figure] for k in keys])]
    assert not faults


def test_pinqi_in_other_regions() -> None:
    faults = []
    names = {"BrainWeb": "pinqi_brainweb", "atlas": "pinqi_fresh", "atlas, more noise": "pinqi_fresh_16"}
    figures = ("tissue_nrmse", "tissue_mae", "tissue_ssim", "image_mae", "image_ssim")
    for label, *cells in table("pinqi_figures.md", "**Where one judges.**")[1:]:
        own = [result(names[label])["summary"][k][shipped(names[label])] for k in ("4", "6", "8")]
        for cell, figure in zip(cells, figures, strict=True):
            faults += [f"{label}: {t}" for t in wrong(cell, [s[figure] for s in own])]
    assert not faults


def test_pinqi_ablation() -> None:
    """The variants' nRMSE, and their paired difference from the proposed one."""
    scores = result("pinqi_fresh")["scores"]
    named = {n.partition(",")[0]: n for n in scores if ", 100 steps" in n}
    faults = []
    for label, nrmse, difference, _ in table("pinqi_figures.md", "The variants of the paper's section III-D")[1:]:
        letter = label.partition(":")[0].strip("*")
        name = named.get(letter, "moe_dqinr without its network + fit")
        assert (name in named.values()) == (letter != "no training"), label
        means, differences = [], []
        for key in ("4", "8"):
            own = [scores[name][key][str(i)]["nrmse"] for i in range(8, 16)]
            base = [scores[named["proposed"]][key][str(i)]["nrmse"] for i in range(8, 16)]
            minus = [a - b for a, b in zip(own, base, strict=True)]
            means.append(statistics.fmean(own))
            differences += [statistics.fmean(minus), statistics.stdev(minus)]
        faults += [f"{label}: {t}" for t in wrong(nrmse, means)]
        faults += [f"{label}: {t}" for t in wrong(difference.replace("+", ""), differences)] if difference else []
    assert not faults


def test_pinqi_from_random_weights() -> None:
    text = (ROOT / "docs" / "pinqi_figures.md").read_text()
    said = " ".join(text.partition("From random weights, 120 samples")[2].partition(". So few")[0].split())
    rows = result("pinqi_ablation")["rows"]
    pairs = re.findall(r"(?:\*(\w+)\*|(proposed)) (\.\d+)", said)
    assert len(pairs) == len(rows) == 11
    assert not [t for letter, word, cell in pairs for t in wrong(cell, [rows[letter or word]["nrmse"]])]


def test_summary_of_pinqi() -> None:
    """The table of figures.md: ``pinqi_t1``, ``llr`` + fit and BART LLR + fit."""
    faults: list[str] = []
    name = ""
    for slices, figure, *cells in table("figures.md", "## PINQI")[1:]:
        name = {"BrainWeb's heads": "pinqi_brainweb", "": name}.get(slices, "pinqi_fresh")
        key = {"mean absolute error, s": "mae"}.get(figure, figure.lower())
        for cell, method in zip(cells, (shipped(name), "llr + fit", "BART LLR + fit"), strict=False):
            faults += [
                f"{name}: {t}" for t in wrong(cell, [result(name)["summary"][k][method][key] for k in ("4", "6", "8")])
            ]
    assert not faults


def test_paper_and_here() -> None:
    """LARO beside Table S2 of the paper, over ten heads."""
    faults = []
    rows = table("laro_figures.md", "Beside the paper's own figures")[1:3]
    for label, _, magnitude, _, r2star, _, qsm in rows:
        found = scored(["laro_206x80_ten"], "8/2", {"LLR": "llr", "LARO": "laro_206x80"}[label])
        values = [[found[f"{n} PSNR"], found[f"{n} SSIM"]] for n in ("magnitude", "r2star")]
        values += [[found["QSM RMSE"], found["QSM SSIM"]]]
        faults += [
            f"{label}: {t}" for cell, own in zip((magnitude, r2star, qsm), values, strict=True) for t in wrong(cell, own)
        ]
    assert not faults


def test_goals_of_laro() -> None:
    """Distances to ``llr`` in the table of goals."""
    head, magnitude, ssim, qsm, regions, lesions, *_ = table("laro_figures.md", "## In short")
    names = ("laro_206x80_ten", "laro_206x80_fine", "laro_206x80_fine_5")
    files = (*((name, "laro_206x80") for name in names), ("laro", "laro"))
    faults = []
    for i, (name, network) in enumerate(files, 1):
        own, other = (scored([name], "8/2", method) for method in (network, "llr"))
        lower = 100 * (1 - own["QSM RMSE"] / other["QSM RMSE"])
        values = [[own["magnitude PSNR"] - other["magnitude PSNR"]], [own["magnitude SSIM"]], [lower]]
        values += [regional(name, "8/2", network, part) for part in ("regions", "lesions")]
        cells = [re.split(r":| %", row[i])[0].strip("+") for row in (magnitude, ssim, qsm, regions, lesions)]
        faults += [f"{head[i]}: {t}" for cell, found in zip(cells, values, strict=True) for t in wrong(cell, found)]
    assert not faults


def test_measured_multi_echo_scans() -> None:
    """Bipolar against monopolar readouts, and the brain's unwrapped phase."""
    text = (ROOT / "docs" / "qsm_figures.md").read_text().partition("## Measured data")[2].partition("\n## ")[0]
    phantom, brain = result("multi_echo_measured")["phantom"], result("multi_echo_measured")["brain"]
    differences = [phantom[k]["field_difference_median_abs_hz"] for k in ("bipolar", "corrected")]
    residuals = [phantom[k]["phase_residual_rad"] for k in ("bipolar", "corrected")]
    hz = re.search(r"differ by ([\d.]+) Hz.*?by ([\d.]+) Hz", text, re.DOTALL)
    rad = re.search(r"falls from ([\d.]+)\s+to ([\d.]+) rad", text)
    assert hz and rad and not [*wrong(", ".join(hz.groups()), differences), *wrong(", ".join(rad.groups()), residuals)]
    assert ("no neighbours" in text) == (brain["neighbours_half_a_period_apart"] == 0)
