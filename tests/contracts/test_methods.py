"""One contract, all methods: every module that discovery finds must pass, today's and tomorrow's."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

from recon_core.errors import CalibrationError, DataError, ReconError, UnknownMethod
from recon_core.methods import Method, delivered_maps, get_method, is_separable, methods
from recon_core.settings import describe, parse_settings
from recon_core.state_images import StateImages, join_states
from recon_core.types import KSpace, Report, Result
from tests.contracts.series_of import series_of
from tests.recon_core.listener import Listener
from tests.recon_core.small_series import SmallSeries

every_method = pytest.mark.parametrize("method", methods().values(), ids=methods().keys())
SHAPES = {"2D": (1, 32, 30), "3D": (8, 18, 15)}
both_geometries = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())


def run(method: Method, series: SmallSeries, kspace: KSpace | None = None, **settings: Any) -> Result:
    chosen: Any = parse_settings(method.Settings, settings)
    return method.reconstruct(kspace or series.kspace, series.scan, chosen, Report())


def takes(method: Method, shape: tuple[int, int, int]) -> bool:
    """Whether a method reconstructs this geometry; one that does not has to say so."""
    if shape[0] == 1 or getattr(method, "SUPPORTS_3D", True):
        return True
    with pytest.raises(DataError) as refused:
        run(method, series_of(method, shape))
    assert refused.value.remedy
    return False


def rounding(method: Method) -> float:
    """How much of float32 rounding may be seen in the images: thresholds amplify it."""
    return float(getattr(method, "ROUNDING", 1e-4))


def fidelity(method: Method, otherwise: float) -> float:
    """How much of complete data a method may change: what was learned stays in the solution, everything else goes."""
    return float(getattr(method, "FIDELITY", otherwise))


def first(result: Result) -> torch.Tensor:
    return result.images[0].data


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    return float(torch.linalg.vector_norm(a - b)) <= tolerance * float(torch.linalg.vector_norm(b))


def test_the_classical_methods_are_found() -> None:
    assert {"fourier", "cg_sense", "llr", "grasp_pro"} <= set(methods())
    with pytest.raises(UnknownMethod, match="cg_sense"):
        get_method("os.system")


@every_method
def test_declares_itself(method: Method) -> None:
    assert get_method(method.NAME) is method
    assert method.SUMMARY and isinstance(method.NEEDS_COIL_MAPS, bool)
    fields = dataclasses.fields(method.Settings)
    settings_class: Any = method.Settings
    assert settings_class.__dataclass_params__.frozen
    assert all(info.help for info in describe(method.Settings)) and len(fields) == len(describe(method.Settings))


@both_geometries
@every_method
def test_shapes_and_types(method: Method, shape: tuple[int, int, int]) -> None:
    if not takes(method, shape):
        return
    chosen = series_of(method, shape)
    result = run(method, chosen)
    for series in result.images:
        assert tuple(series.data.shape) == (len(chosen.images), *shape)
        assert series.data.dtype in (torch.complex64, torch.float32)
        assert bool(torch.isfinite(series.data.abs()).all())
    for parameter in result.maps:
        assert tuple(parameter.data.shape) == shape and parameter.data.dtype == torch.float32
    stated = delivered_maps(method.NAME)
    assert stated is None or {parameter.name for parameter in result.maps} == stated
    assert all(isinstance(value, float) for value in result.quality.values())


@pytest.mark.parametrize("factor", [1e-6, 1e6])
@every_method
def test_scale_equivariant(method: Method, factor: float) -> None:
    series = series_of(method)
    k = series.kspace
    assert k.acs is not None and k.noise_std is not None
    scaled = replace(k, data=k.data * factor, acs=k.acs * factor, noise_std=k.noise_std * factor)
    assert close(first(run(method, series, scaled)) / factor, first(run(method, series)), rounding(method))
    unknown = replace(k, noise_std=None)
    scaled = replace(scaled, noise_std=None)
    assert close(first(run(method, series, scaled)) / factor, first(run(method, series, unknown)), rounding(method))


@every_method
def test_order_of_coils_does_not_matter(method: Method) -> None:
    series = series_of(method)
    k, order = series.kspace, [2, 0, 3, 1]
    assert k.acs is not None and k.coil_maps is not None
    permuted = replace(k, data=k.data[:, order], acs=k.acs[order], coil_maps=k.coil_maps[order])
    assert close(first(run(method, series, permuted)), first(run(method, series)), rounding(method))


@every_method
def test_same_data_same_images(method: Method) -> None:
    series = series_of(method)
    assert torch.equal(first(run(method, series)), first(run(method, series)))


@both_geometries
@every_method
def test_finite_on_pure_noise(method: Method, shape: tuple[int, int, int]) -> None:
    if not takes(method, shape):
        return
    series = series_of(method, shape)
    k = series.kspace
    data = torch.randn(k.data.shape, dtype=torch.complex64, generator=torch.Generator().manual_seed(1))
    noise = replace(k, data=data * k.mask[:, None, :, :, None], acs=None, acs_mask=None, noise_std=1.0)
    assert bool(torch.isfinite(first(run(method, series, noise)).abs()).all())


@every_method
def test_all_zero_data_give_zero_or_a_typed_error(method: Method) -> None:
    series = series_of(method)
    k = series.kspace
    assert k.acs is not None
    zero = replace(k, data=torch.zeros_like(k.data), acs=torch.zeros_like(k.acs))
    try:
        image = first(run(method, series, zero))
    except ReconError as error:
        assert error.remedy
    else:
        assert float(image.abs().max()) == 0


@both_geometries
@every_method
def test_single_state_works_or_says_what_to_use(method: Method, shape: tuple[int, int, int]) -> None:
    series = series_of(method, shape, n_states=1, keep=1.0)
    try:
        image = first(run(method, series))
    except ReconError as error:
        assert error.remedy
    else:
        assert series.error(image) < 0.15 or not image.is_complex()


@every_method
def test_one_coil_fully_sampled_is_exact_to_the_noise(method: Method) -> None:
    series = series_of(method, n_coils=1, keep=1.0, noise=1e-4)
    image = first(run(method, series)).abs()
    truth = torch.from_numpy(abs(series.images)).float()
    assert close(image, truth, fidelity(method, 0.01))


@every_method
def test_empty_mask_is_an_error(method: Method) -> None:
    series = series_of(method)
    k = series.kspace
    empty = replace(k, data=torch.zeros_like(k.data), counts=torch.zeros_like(k.counts))
    with pytest.raises(DataError, match="nothing was sampled"):
        run(method, series, empty)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@every_method
def test_values_that_are_not_finite_are_an_error(method: Method, bad: float) -> None:
    series = series_of(method)
    data = series.kspace.data.clone()
    data[1, 0, 0, 16, 3] = bad
    with pytest.raises(DataError, match="not finite"):
        run(method, series, replace(series.kspace, data=data))


@every_method
def test_counts_of_another_shape_are_an_error(method: Method) -> None:
    series = series_of(method)
    with pytest.raises(DataError, match="counts"):
        run(method, series, replace(series.kspace, counts=series.kspace.counts[:, :, :-1]))


@every_method
def test_missing_or_misfit_maps_are_an_error_where_maps_are_needed(method: Method) -> None:
    if not method.NEEDS_COIL_MAPS:
        return
    series = series_of(method)
    maps = series.kspace.coil_maps
    assert maps is not None
    with pytest.raises(CalibrationError, match="coil maps"):
        run(method, series, replace(series.kspace, coil_maps=None))
    with pytest.raises(CalibrationError, match="zero everywhere"):
        run(method, series, replace(series.kspace, coil_maps=torch.zeros_like(maps)))
    with pytest.raises(DataError, match="coil maps"):
        run(method, series, replace(series.kspace, coil_maps=maps[:-1]))


@every_method
def test_leaves_the_callers_arrays_alone(method: Method) -> None:
    series = series_of(method)
    k = series.kspace
    before = [t.clone() for t in (k.data, k.counts, k.acs, k.acs_mask, k.coil_maps) if t is not None]
    run(method, series)
    after = [t for t in (k.data, k.counts, k.acs, k.acs_mask, k.coil_maps) if t is not None]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@every_method
def test_progress_rises_to_one(method: Method) -> None:
    series, listener = series_of(method), Listener()
    method.reconstruct(series.kspace, series.scan, method.Settings(), listener)
    assert listener.fractions == sorted(listener.fractions) and listener.fractions[-1] == 1.0


@every_method
def test_averages_and_their_counts_are_accepted(method: Method) -> None:
    """Uneven averaging must neither bias the image nor upset the solver."""
    series = series_of(method, keep=1.0, noise=1e-3)
    k = series.kspace
    counts = k.counts.clone()
    counts[:, :, 8:24] = 4
    image = first(run(method, series, replace(k, counts=counts))).abs()
    assert close(image, torch.from_numpy(abs(series.images)).float(), fidelity(method, 0.02))


# ---- states by themselves ---------------------------------------------------------------------------------------------------

SEPARABLE = [
    (method, settings)
    for method in methods().values()
    if is_separable(method.NAME)
    for settings in ({}, *({"combine": "adaptive"} for _ in range(method.NAME == "fourier")))
]


def test_which_methods_treat_each_state_by_itself() -> None:
    assert [name for name in methods() if is_separable(name)] == ["cg_sense", "fourier"]


@pytest.mark.parametrize("noise", [0.01, None], ids=["noise measured", "noise estimated"])
@pytest.mark.parametrize("calibration", [True, False], ids=["calibration", "none"])
@both_geometries
@pytest.mark.parametrize(("method", "settings"), SEPARABLE, ids=lambda value: getattr(value, "NAME", "") or str(value))
def test_states_by_themselves_are_those_of_the_whole(
    method: Method, settings: dict[str, Any], shape: tuple[int, int, int], calibration: bool, noise: float | None
) -> None:
    """Bit for bit, also where scale, weights and noise of a part alone would be others: one state is louder, another averaged."""
    series = series_of(method, shape)
    counts = series.kspace.counts.clone()
    counts[4] *= 5
    counts[5, :, ::3] *= 2
    data = series.kspace.data.clone()
    data[2] *= 20
    k = replace(series.kspace, data=data, counts=counts, noise_std=noise)
    if not calibration:
        k = replace(k, acs=None, acs_mask=None)
    whole = run(method, series, k, **settings)
    for cuts in ([0, 3, 6], [0, 1, 2, 3, 4, 5, 6], [0, 5, 6]):
        parts = [run(method, series, k.part(a, b), **settings) for a, b in itertools.pairwise(cuts)]
        joined = join_states([StateImages(part) for part in parts]).result
        assert [s.name for s in joined.images] == [s.name for s in whole.images]
        assert all(torch.equal(a.data, b.data) for a, b in zip(joined.images, whole.images, strict=True))
        assert joined.quality == whole.quality and joined.notes == whole.notes
        assert not whole.maps and not whole.extras


@pytest.mark.parametrize(("method", "settings"), SEPARABLE, ids=lambda value: getattr(value, "NAME", "") or str(value))
def test_what_is_wrong_with_one_state_is_said_for_every_part(method: Method, settings: dict[str, Any]) -> None:
    series = series_of(method)
    counts = series.kspace.counts.clone()
    counts[4] = 0
    k = replace(series.kspace, counts=counts)
    with pytest.raises(DataError, match=r"states without any sample.*\[4\]"):
        run(method, series, k.part(0, 2), **settings)
    with pytest.raises(DataError, match="no such states"):
        k.part(4, 7)
