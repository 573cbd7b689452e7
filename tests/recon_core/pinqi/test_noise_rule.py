"""How the lambdas follow the noise: between the levels, beyond them, and refused nonsense."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from recon_core.errors import SettingError
from recon_core.methods.pinqi.installed import installed_weights
from recon_core.methods.pinqi.model import PinqiSettings
from recon_core.methods.pinqi.noise_rule import DEFAULT_RULE, NoiseRule, acceleration_of
from recon_core.methods.pinqi.reconstruction import reconstruct_with
from recon_core.methods.pinqi.settings import DEFAULT_WEIGHTS, Settings
from recon_core.methods.pinqi.weights import load_weights
from recon_core.training.checkpoint import WeightError, read_pair, write_pair
from recon_core.types import Report
from tests.recon_core.pinqi.saturation_scan import SaturationScan, saturation_scan, save_network

RULE = NoiseRule((0.01, 0.04), (0.5, 2.0), (1.0, 1.0), (0.1, 10.0))


def test_factors_are_straight_in_logarithms_and_constant_beyond() -> None:
    middle = RULE.at(0.02)
    assert (middle.image, middle.signal, middle.parameter) == pytest.approx((1.0, 1.0, 1.0))
    assert RULE.at(0.0).parameter == RULE.at(0.01).parameter and RULE.at(1.0).image == RULE.at(0.04).image
    assert RULE.at(1.0).parameter == pytest.approx(10.0) and RULE.at(0.0).image == pytest.approx(0.5)


def test_factors_fall_with_the_acceleration_where_the_rule_says_so() -> None:
    falling = replace(RULE, acceleration_power=2.0)
    least, high, beyond, low = (falling.at(0.02, a) for a in (4.0, 8.0, 9.0, 3.0))
    assert (least.image, least.signal) == pytest.approx((1.0, 1.0)) and low == least
    assert (high.image, high.signal, high.parameter) == pytest.approx((0.25, 0.25, 1.0)) and beyond == high
    assert RULE.at(0.02, 8.0) == RULE.at(0.02) and NoiseRule.from_facts(falling.facts()) == falling
    mask = torch.zeros(2, 12)
    mask[:, ::4] = 1.4
    assert acceleration_of(mask) == 4.0 and acceleration_of(mask > 0) == 4.0


def test_weights_without_a_rule_are_at_full_strength_from_three_per_cent() -> None:
    for noise, factor in ((0.03, 1.0), (0.2, 1.0), (0.015, 0.5), (1e-5, 0.05)):
        assert DEFAULT_RULE.at(noise).image == pytest.approx(factor)


@pytest.mark.parametrize(
    "rows",
    [
        ((), (), (), ()),
        ((0.01,), (1,), (1,), (1,), float("nan")),
        ((0.01,), (float("nan"),), (1,), (1,)),
        ((0.01,), (1,), (float("inf"),), (1,)),
        ((0.02, 0.01), (1, 1), (1, 1), (1, 1)),
        ((0.01,), (0.0,), (1,), (1,)),
        ((0.01,), (1,), (1, 2), (1,)),
    ],
)
def test_impossible_rules_are_refused(rows: tuple[tuple[float, ...], ...]) -> None:
    with pytest.raises(SettingError, match="noise rule"):
        NoiseRule(*rows)


def test_the_rule_travels_with_the_weights(tmp_path: Path) -> None:
    tensors, facts = read_pair(save_network(tmp_path, settings=PinqiSettings(n_iterations=1)))
    del facts["file"], facts["sha256"]
    path = write_pair(tmp_path, "ruled", tensors, {**facts, "noise_rule": RULE.facts()})
    assert load_weights(path).noise_rule == RULE
    bad = write_pair(tmp_path, "bad", tensors, {**facts, "noise_rule": {"noise": [0.1]}})
    with pytest.raises(WeightError, match="incomplete"):
        load_weights(bad)


def test_what_ships_leans_on_its_parameter_network() -> None:
    """Weights once shipped whose lambda_p had all but vanished: the network could say what it liked."""
    trained = installed_weights(DEFAULT_WEIGHTS, torch.device("cpu"), "float32")
    s: SaturationScan = saturation_scan((48, 40), keep=0.5, noise=0.03, times=trained.times)
    before = reconstruct_with(trained, s.kspace, s.scan, Settings(), Report()).maps[0]
    assert trained.network.lambda_p is not None
    whole = trained.network.lambda_p.raw.data.clone()
    trained.network.lambda_p.raw.data.fill_(-10.0)  # softplus: nothing
    try:
        without = reconstruct_with(trained, s.kspace, s.scan, Settings(), Report()).maps[0]
    finally:
        trained.network.lambda_p.raw.data.copy_(whole)
    truth = torch.from_numpy(s.t1)
    both = (before.valid & without.valid)[0]
    error, without_it = (float((m.data[0] - truth)[both].abs().mean()) for m in (before, without))
    assert error < 0.9 * without_it, (error, without_it)
