"""The same here and on a pretended device: ``python -m tests.recon_core.on_pretended_device GROUP ...``, a process of its own."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.cuda_check import problem
from recon_core.maps.settings import MapSettings
from recon_core.methods import get_method, methods
from recon_core.methods.laro import reconstruction as laro
from recon_core.methods.laro.settings import Settings as LaroChoice
from recon_core.methods.pinqi import reconstruction as pinqi
from recon_core.methods.pinqi.model import PinqiSettings
from recon_core.reconstruct import Recipe, reconstruct
from recon_core.settings import parse_settings
from recon_core.training import laro as laro_training
from recon_core.training import pinqi as pinqi_training
from recon_core.training.checkpoint import read_pair
from recon_core.types import Report, Result
from tests.pretended_device import DEVICE, NAME, Elsewhere, Pretending
from tests.recon_core.laro.test_reconstruction import busy
from tests.recon_core.laro.tiny import sampled, tiny_scan
from tests.recon_core.pinqi.saturation_scan import saturation_scan, saved_network
from tests.recon_core.training.test_laro_training import TINY as TINY_LARO
from tests.recon_core.training.test_pinqi_training import JOINT

Case = Callable[[str], Sequence[torch.Tensor]]
"""From the name of a device to tensors that lie on the CPU."""

LARGEST = 1e-3
"""Relative: on the CPU some filters are compiled code, elsewhere they are sums in another order."""
LARGEST_OF_WEIGHTS = 1e-2
"""After a few steps of an optimiser that looks at gradients' signs."""
RECOVERY = (0.1, 0.15, 0.25, 0.4, 0.6, 0.9, 1.4, 2.1, 3.2)


def tensors(result: Result) -> list[torch.Tensor]:
    """All that is sent."""
    return [x.data.cpu() for x in (*result.images, *result.maps)]


def reconstructed(name: str, choices: dict[str, str], maps: dict[str, str]) -> Case:
    """An inversion-recovery slice by a method, coil maps included."""
    kspace, scan = problem(24, 16, 8)
    scan = replace(scan, inversion_times=RECOVERY)
    recipe = Recipe(name, parse_settings(get_method(name).Settings, choices), maps=parse_settings(MapSettings, maps))
    return lambda device: tensors(reconstruct(kspace.to(device), scan, recipe))


def mapped(**choices: str) -> Case:
    """R2*, field and susceptibility of a small head."""
    kspace, info = sampled(tiny_scan())
    maps = {"maps": "qsm", "map_mask": "object", "map_failure": "error", **choices}
    recipe = Recipe("cg_sense", get_method("cg_sense").Settings(), maps=parse_settings(MapSettings, maps))
    return lambda device: tensors(reconstruct(kspace.to(device), replace(info, b0_direction=(1.0, 0.0, 0.0)), recipe))


def by_pinqi(folder: Path, settings: PinqiSettings) -> Case:
    scan = saturation_scan((24, 24), keep=0.5, noise=5e-3)

    def case(device: str) -> list[torch.Tensor]:
        trained = saved_network(folder, settings)
        trained = replace(trained, network=trained.network.to(device))
        return tensors(pinqi.reconstruct_with(trained, scan.kspace.to(device), scan.scan, pinqi.Settings(), Report()))

    return case


def by_laro(start: str) -> Case:
    kspace, info = sampled(tiny_scan())

    def case(device: str) -> list[torch.Tensor]:
        trained = replace(busy(), network=busy().network.to(device))
        return tensors(laro.reconstruct_with(trained, kspace.to(device), info, replace(LaroChoice(), start=start), Report()))

    return case


def trained(run: Callable[..., Any], recipe: Any, settings: Any) -> Case:
    """The weights that a training leaves."""

    def case(device: str) -> list[torch.Tensor]:
        with tempfile.TemporaryDirectory() as folder:
            _, weights = run(recipe, Path(folder) / "out", replace(settings, device=device, validate_every=0))
            return list(read_pair(weights)[0].values())

    return case


def classical_cases(folder: Path) -> Iterator[tuple[str, Case]]:
    for name in sorted(set(methods()) - {"pinqi", "laro", "moe_dqinr"}):
        yield name, reconstructed(name, {}, {"maps": "t1"} if name == "llr" else {})


def moe_dqinr_cases(folder: Path) -> Iterator[tuple[str, Case]]:
    yield "moe_dqinr", reconstructed("moe_dqinr", {"preset": "cpu", "iterations": "3"}, {})


def pinqi_cases(folder: Path) -> Iterator[tuple[str, Case]]:
    yield "as published", by_pinqi(folder, PinqiSettings(n_iterations=2))
    yield "as shipped", by_pinqi(folder, PinqiSettings(n_iterations=1, start="refined", prediction="kernel"))


def laro_cases(folder: Path) -> Iterator[tuple[str, Case]]:
    for start in ("cg_sense", "refined"):  # refined images begin with those of llr
        yield start, by_laro(start)


def map_cases(folder: Path) -> Iterator[tuple[str, Case]]:
    yield "tv, v_sharp", mapped()
    yield "medi, pdf", mapped(map_inversion="medi", map_background="pdf")
    yield "tkd, resharp, arlo", mapped(map_inversion="tkd", map_background="resharp", map_r2star_fit="arlo")


def training_cases(folder: Path) -> Iterator[tuple[str, Case]]:
    recipe = replace(JOINT, epochs=0.001, n_validation=0, start="refined", prediction="kernel", held=1)
    yield "pinqi", trained(pinqi_training.run, recipe, pinqi_training.RunSettings())
    yield "laro", trained(laro_training.run, replace(TINY_LARO, n_validation=0), laro_training.RunSettings())


GROUPS: dict[str, Callable[[Path], Iterator[tuple[str, Case]]]] = {
    "classical": classical_cases,
    "moe_dqinr": moe_dqinr_cases,
    "pinqi": pinqi_cases,
    "laro": laro_cases,
    "maps": map_cases,
    "training": training_cases,
}


def check_the_device() -> None:
    """What the cases rely on: a mistake is an error, and values are right."""
    x = torch.arange(6.0).reshape(2, 3)
    with Pretending():
        y = x.to(DEVICE)
        assert isinstance(y, Elsewhere) and y.device.type == NAME
        for mistake in (lambda: y + x, lambda: x[(y > 2).nonzero()], lambda: y.numpy()):
            with pytest.raises((RuntimeError, TypeError)):
                mistake()
        assert torch.equal((2 * y[torch.tensor([1])].conj()).cpu(), 2 * x[1:])


def main(groups: Sequence[str]) -> None:
    torch.set_num_threads(1)
    check_the_device()
    for group in groups:
        with tempfile.TemporaryDirectory() as folder:
            for name, case in GROUPS[group](Path(folder)):
                compare(f"{group}, {name}", case, LARGEST_OF_WEIGHTS if group == "training" else LARGEST)


def compare(name: str, case: Case, limit: float) -> None:
    here = case("cpu")
    with Pretending():
        there = case(f"{NAME}:0")
    assert len(here) == len(there) > 0
    for own, other in zip(here, there, strict=True):
        assert type(other) is torch.Tensor and other.device.type == "cpu" and bool(torch.isfinite(own).all())
        difference = float((own - other).abs().square().sum().sqrt() / own.abs().square().sum().sqrt().clamp_min(1e-9))
        assert difference < limit, f"{name}: relative difference {difference:.2g}"
    print("same:", name, flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
