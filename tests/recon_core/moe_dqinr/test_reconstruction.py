"""The method as a whole: presets, stages, what comes back, and what happens when something is missing."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from recon_core.errors import DataError, NumericalError, SettingError
from recon_core.methods import get_method
from recon_core.methods.moe_dqinr.reconstruction import CLEARLY_BETTER, in_order, order_in_time
from recon_core.methods.moe_dqinr.settings import Settings, plan_for
from recon_core.problem import pose
from recon_core.settings import parse_settings
from recon_core.solvers.refinement import RefineSettings, consistent, refine
from recon_core.types import Report, Result
from tests.recon_core.listener import Listener
from tests.recon_core.small_series import SmallSeries, small_series

METHOD = get_method("moe_dqinr")


def run(series: SmallSeries, **settings: Any) -> Result:
    return METHOD.reconstruct(series.kspace, series.scan, Settings(**settings), Report())


def test_auto_is_the_preset_of_the_device() -> None:
    assert plan_for(Settings(), "cpu").name == "cpu"
    assert plan_for(Settings(), "cuda").name == "default"
    assert plan_for(Settings(preset="default"), "cpu").name == "default"


def test_paper_is_the_published_method_and_nothing_else() -> None:
    dynamic = plan_for(Settings(preset="paper"), "cuda")
    assert dynamic.configuration.name == "dynamic" and dynamic.fit.iterations == 850
    assert (dynamic.fit.lr_image, dynamic.fit.lr_state) == (1e-3, 2e-3)
    assert dynamic.prefit is None and dynamic.refinement is None and dynamic.held_out == 0.0 and not dynamic.support
    assert plan_for(Settings(preset="paper", configuration="quantitative"), "cpu").configuration.n_experts == 10


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        (
            {"preset": "paper", "filter_strength": "2"},
            r"preset = paper: changes nothing there; got filter_strength\. Choose default",
        ),
        ({"preset": "paper", "network": "false"}, "preset = paper.*got network"),
        ({"preset": "paper", "held_out": "0.2"}, "preset = paper.*got held_out"),
        ({"refine": "false", "network": "false"}, "refine = false.*got network"),
        ({"refine": "false", "filter_strength": "0.5"}, "refine = false.*got filter_strength"),
        ({"network": "false", "variant": "no_residual"}, "network = false.*got variant"),
        ({"configuration": "quantitative", "variant": "residual_only"}, "quantitative configuration has no residual branch"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(choices: dict[str, str], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        parse_settings(Settings, choices)


def test_what_the_published_method_leaves_out_may_be_switched_off() -> None:
    off = {"preset": "paper", "refine": "false", "warm_start": "false", "held_out": "0"}
    assert plan_for(parse_settings(Settings, off), "cpu") == plan_for(Settings(preset="paper"), "cpu")


def test_default_is_better_than_locally_low_rank() -> None:
    series = small_series()
    llr = get_method("llr")
    low_rank = llr.reconstruct(series.kspace, series.scan, llr.Settings(), Report())
    assert series.error(run(series).images[0].data) < 0.7 * series.error(low_rank.images[0].data)


def test_what_comes_back_besides_images() -> None:
    series = small_series()
    result = run(series, configuration="dynamic")
    n_states = len(series.kspace.data)
    routing = result.extras["routing_weights"]
    assert routing.shape == (n_states, 7) and np.allclose(routing.sum(1), 1, atol=1e-5) and (routing >= 0).all()
    assert result.extras["residual_coefficients"].shape == (n_states, 2)
    assert result.extras["residual_per_state"].shape == (n_states,)
    assert len(result.extras["loss"]) == result.quality["network_iterations"]
    assert result.extras["held_out"].shape[1] == 2
    assert 0.5 < result.quality["residual"] < 2.0
    assert result.quality["started_from_network"] == (
        result.quality["network_estimate_held_out"] < CLEARLY_BETTER * result.quality["first_estimate_held_out"]
    )
    assert result.quality["refine_iterations"] == RefineSettings().iterations


def test_images_that_do_not_explain_the_data_are_no_images() -> None:
    """The chain's stand-in answers in their place."""
    with pytest.raises(NumericalError, match=r"do not explain the data; got \d+ % .* at least 50 %\. More iterations"):
        run(small_series(), preset="paper", iterations=2, configuration="quantitative")


@pytest.mark.parametrize("variant", ["full", "residual_only", "no_residual"])
def test_variants_of_table_4(variant: str) -> None:
    result = run(small_series(), variant=variant)
    assert ("routing_weights" in result.extras) == (variant != "residual_only")
    assert ("residual_coefficients" in result.extras) == (variant != "no_residual")


def test_network_images_alone_are_what_the_network_says() -> None:
    series = small_series()
    result = run(series, refine=False, configuration="quantitative")
    assert "refine_iterations" not in result.quality and "residual_coefficients" not in result.extras
    singular = result.extras["singular_values"]
    # background and experts: rank at most K (6 states here)
    assert singular.shape == (6,)
    refined = run(series)
    assert series.error(refined.images[0].data) < series.error(result.images[0].data)


def test_without_a_network_there_is_no_routing() -> None:
    result = run(small_series(), network=False)
    assert "routing_weights" not in result.extras and "residual" in result.quality


def test_fully_sampled_lines_leave_nothing_to_hold_out() -> None:
    series = small_series(keep=1.0)
    result = run(series)
    assert "held_out" not in result.extras and "started_from_network" not in result.quality
    assert series.error(result.images[0].data) < 0.02


def test_one_state_is_said() -> None:
    result = run(small_series(n_states=1, keep=0.6))
    assert any("one state" in note for note in result.notes)


def test_states_are_sorted_by_inversion_time_and_put_back() -> None:
    series = small_series()
    times = (0.3, 0.1, 0.5, 0.2, 0.4, 0.6)
    scan = replace(series.scan, inversion_times=times)
    order = order_in_time(scan, 6)
    assert order.tolist() == [1, 3, 0, 4, 2, 5]
    sorted_kspace = in_order(series.kspace, order)
    assert torch.equal(sorted_kspace.data[0], series.kspace.data[1])
    # shuffled in, shuffled out
    result = METHOD.reconstruct(series.kspace, scan, Settings(configuration="quantitative"), Report())
    assert series.error(result.images[0].data) < 0.05


def test_residuals_are_told_in_the_order_of_the_images() -> None:
    """One state is ten times as noisy; the network's order (by inversion time) is not the scanner's."""
    series = small_series()
    k = series.kspace
    data = k.data.clone()
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(data[0].shape, dtype=data.dtype, generator=generator) * 10 * float(k.noise_std or 0)
    data[0] += noise * k.mask[0][None, :, :, None]
    scan = replace(series.scan, inversion_times=(0.6, 0.1, 0.5, 0.2, 0.4, 0.3))
    listener = Listener()
    result = METHOD.reconstruct(replace(k, data=data), scan, Settings(network=False), listener)
    assert int(np.argmax(result.extras["residual_per_state"])) == 0
    assert list(result.notes) == listener.warnings and len(result.notes) == 1
    assert re.search("state 0 explains its data to .* times the noise only", result.notes[0])


def test_without_a_warm_start_the_network_still_has_to_be_better() -> None:
    quality = run(small_series(), warm_start=False).quality
    assert quality["network_estimate_held_out"] > quality["first_estimate_held_out"] and not quality["started_from_network"]


def test_a_network_that_is_hardly_better_is_no_start() -> None:
    """By some per cent on the lines that neither has seen: the low-rank image in whose place it comes knows those, too."""
    series = small_series(keep=0.12, noise=0.002, seed=2)
    result, without = run(series), run(series, network=False)
    assert 0.9 < result.quality["network_estimate_held_out"] / result.quality["first_estimate_held_out"] < 1
    assert series.error(result.images[0].data) < 1.05 * series.error(without.images[0].data)


@pytest.mark.parametrize("n_states", [1, 6])
def test_every_stage_tells_how_far_it_is(n_states: int) -> None:
    """A scan that was given up is left at the next word, and a stage may take a minute."""
    told: Counter[str] = Counter()

    class Stages(Report):
        def progress(self, fraction: float, message: str = "") -> None:
            told[message] += 1

    series = small_series((1, 16, 12), n_states)
    METHOD.reconstruct(series.kspace, series.scan, Settings(warm_start=False, iterations=30), Stages())
    stages = ("first estimate", "network", "low-rank image", "refinement")
    assert min(told[stage] for stage in stages) > 3, told


def test_a_slab_is_refused_with_a_remedy() -> None:
    with pytest.raises(DataError, match="single slices"):
        run(small_series((8, 18, 15)))


def test_data_without_noise_are_data() -> None:
    series = small_series(noise=0.0)
    series = replace(series, kspace=replace(series.kspace, noise_std=None))
    result = run(series)
    assert series.error(result.images[0].data) < 0.03 and np.isfinite(result.quality["residual"])
    # many times what rounding leaves, and nothing that could be seen
    assert result.quality["residual_worst"] > 3 and not result.notes


def test_rectangular_matrix() -> None:
    series = small_series((1, 40, 24))
    assert series.error(run(series).images[0].data) < 0.05


def test_strength_falls_to_the_noise_and_never_rises() -> None:
    settings = RefineSettings()
    for noise in (0.0, 0.001, 0.01, 0.1):
        sigmas = [settings.sigma(k, noise) for k in range(settings.iterations)]
        assert sigmas == sorted(sigmas, reverse=True)
        assert sigmas[-1] == pytest.approx(max(noise, 1e-3))


def test_data_consistency_is_the_minimum() -> None:
    """Gradient of ``|A x - b|^2 / 2 + mu |x - z|^2 / 2`` vanishes."""
    series = small_series()
    problem = pose(series.kspace, "test", Report())
    prior = torch.randn(problem.rhs.shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(2))
    x = consistent(problem.operator, problem.rhs, prior, 0.3, 60)
    gradient = problem.operator.normal(x) - problem.rhs + 0.3 * (x - prior)
    assert float(gradient.abs().max()) < 1e-3


def test_more_noise_leaves_less_of_the_start() -> None:
    settings = RefineSettings()
    parts = [settings.part_of_start(noise) for noise in (0.0, 0.005, 0.01, 0.05)]
    assert parts[0] == parts[1] == settings.start_part
    assert parts[2] == pytest.approx(settings.start_part / 2) and parts[3] < 0.03


def test_refinement_tells_every_iteration() -> None:
    series = small_series()
    problem = pose(series.kspace, "test", Report())
    seen: list[int] = []
    refine(problem.operator, problem.rhs, problem.noise, problem.rhs, RefineSettings(), lambda k, _: seen.append(k))
    assert seen == list(range(RefineSettings().iterations))
