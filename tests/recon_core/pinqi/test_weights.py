"""Trained weights: they know what they are for, and damaged or foreign ones are refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from recon_core.errors import DataError
from recon_core.methods.pinqi.figures import t1_figures, t1_from_rate
from recon_core.methods.pinqi.installed import find_weights
from recon_core.methods.pinqi.model import ABLATIONS, Pinqi
from recon_core.methods.pinqi.weights import check_times, load_weights, save_weights
from recon_core.signal_models import SaturationRecovery
from recon_core.training.checkpoint import WeightError, write_pair
from recon_core.training.pinqi_tasks import PinqiRecipe

TIMES = (0.5, 1.0, 1.5, 2.0, 8.0)


@pytest.fixture(scope="module")
def network() -> Pinqi:
    torch.manual_seed(0)
    return Pinqi(SaturationRecovery(TIMES), ABLATIONS["g1"])


@pytest.fixture
def saved(tmp_path: Path, network: Pinqi) -> Path:
    return save_weights(tmp_path, "w", network, TIMES, {"amplitude": 0.9, "seed": 4})


def test_weights_come_back_with_their_facts(saved: Path, network: Pinqi) -> None:
    trained = load_weights(saved, precision="bfloat16")
    assert trained.times == TIMES and trained.amplitude == 0.9 and trained.facts["seed"] == 4
    assert trained.network.settings.precision == "bfloat16" and trained.network.settings.n_iterations == 1
    for name, value in network.state_dict().items():
        assert torch.equal(trained.network.state_dict()[name], value), name
    assert not any(p.requires_grad for p in trained.network.parameters())


def test_other_delays_are_refused_and_rounded_ones_accepted(saved: Path) -> None:
    trained = load_weights(saved)
    check_times(trained, [t + 0.0004 for t in TIMES])
    check_times(trained, [t + 0.001 for t in TIMES])  # a millisecond, though 0.501 - 0.5 is more in floating point
    for times in (TIMES[:4], (0.5, 1.0, 1.5, 2.5, 8.0), (0.5, 1.0, 1.5, 2.0, 8.002), ()):
        with pytest.raises(WeightError, match="other delays"):
            check_times(trained, times)


def test_wrong_hash_other_methods_and_other_networks_are_refused(saved: Path, tmp_path: Path) -> None:
    facts = json.loads(saved.read_text())
    for change, why in (
        ({"sha256": "0" * 64}, "sha256"),
        ({"method": "laro"}, "another kind"),
        ({"format": 99}, "another kind"),
        ({"times": None}, "incomplete"),
        ({"amplitude": "x"}, "incomplete"),
        ({"amplitude": 0}, "incomplete.*amplitude"),
        ({"amplitude": -1.0}, "incomplete.*amplitude"),
        ({"amplitude": float("nan")}, "incomplete.*amplitude"),
        ({"amplitude": float("inf")}, "incomplete.*amplitude"),
        ({"network": {"depth": 3}}, "incomplete"),
        ({"network": {**facts["network"], "n_iterations": 1.5}}, "incomplete"),
        ({"network": [1]}, "incomplete"),
        ({"noise_rule": [1, 2]}, "incomplete"),
        ({"noise_rule": {"noise": 0.1}}, "incomplete"),
        ({"times": [float("nan"), 1.0, 1.5, 2.0, 8.0]}, "incomplete.*not a time"),
        ({"is_complex": False}, "incomplete.*no range is known"),
        ({"times": [0.5, 1.0, 8.0]}, "another network"),
    ):
        (tmp_path / "other.json").write_text(json.dumps({**facts, **change}))
        with pytest.raises(WeightError, match=why):
            load_weights(tmp_path / "other.json")
    path = write_pair(
        tmp_path / "x", "w", {"a": torch.zeros(1)}, {k: v for k, v in facts.items() if k not in ("file", "sha256")}
    )
    with pytest.raises(WeightError, match="another network"):
        load_weights(path)


def test_the_shipped_weights_say_what_they_are_and_were_trained_for() -> None:
    trained = load_weights(find_weights("pinqi_t1"))  # checks the sha256
    facts, recipe = trained.facts, PinqiRecipe.from_facts(trained.facts["recipe"])
    assert trained.times == (0.5, 1.0, 1.5, 2.0, 8.0) == recipe.times and recipe.size == 192
    assert (min(recipe.accelerations), max(recipe.accelerations)) == (4.0, 8.0)
    assert facts["seed"] == recipe.seed and re.fullmatch("[0-9a-f]{40}", facts["commit"])
    assert set(facts["validation"]) == {"nrmse", "mae", "ssim"} and facts["finished"]
    assert facts["steps_done"] == facts["steps"] and facts["minutes"] > 0
    assert recipe.initial_sha256 and all(
        "what" in stage and "minutes" in stage for stage in facts["stages"] if "steps" in stage
    )


def test_figures_of_a_t1_map_by_hand() -> None:
    rng = np.random.default_rng(0)
    truth = rng.uniform(0.8, 2.0, (24, 24))
    tissue = np.zeros((24, 24), bool)
    tissue[4:20, 4:20] = True
    t1 = np.where(tissue, truth + 0.1, 50.0)  # what lies outside does not count
    figures = t1_figures(t1, truth, tissue)
    assert figures["mae"] == pytest.approx(0.1)
    assert figures["nrmse"] == pytest.approx(0.1 * np.sqrt(tissue.sum()) / np.linalg.norm(truth[tissue]))
    assert 0.9 < figures["ssim"] < 1
    assert t1_figures(truth, truth, tissue)["ssim"] == pytest.approx(1)
    with pytest.raises(DataError, match="window"):
        t1_figures(t1, truth, np.eye(24, dtype=bool))


def test_rates_that_make_no_sense_have_a_long_t1() -> None:
    assert t1_from_rate(np.array([2.0, 0.0, -1.0])).tolist() == [0.5, 10.0, 10.0]
