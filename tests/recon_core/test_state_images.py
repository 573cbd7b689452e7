"""States of a slice reconstructed apart: the images are those of the whole slice, bit for bit, and so are maps fitted to them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from recon_core.errors import DataError
from recon_core.maps.settings import MapSettings
from recon_core.methods import fourier, get_method
from recon_core.preprocess.settings import PreprocessSettings
from recon_core.reconstruct import Recipe, finish, reconstruct, reconstruct_images
from recon_core.settings import parse_settings
from recon_core.state_images import StateImages, join_states
from recon_core.types import ImageSeries, KSpace, Result
from tests.recon_core.small_series import SmallSeries, small_series

TIMES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.0)


def partial_series(shape: tuple[int, int, int] = (1, 33, 29)) -> SmallSeries:
    """A third of the lines on one side are missing but for one state's; the console's matrix is another one than the encoded."""
    series = small_series(shape, keep=1.0, n_coils=6)
    k = series.kspace
    counts = k.counts.clone()
    counts[:, :, :11] = 0
    counts[4, :, 7:] = 1
    counts[2] *= 3
    kspace = replace(k, data=k.data * (counts > 0)[:, None, :, :, None], counts=counts, coil_maps=None)
    scan = replace(series.scan, recon_matrix=(shape[0], 39, 31), recon_fov=series.scan.fov, inversion_times=TIMES)
    return replace(series, kspace=kspace, scan=scan)


def assert_same(one: Result, other: Result) -> None:
    assert [s.name for s in one.images] == [s.name for s in other.images]
    assert all(torch.equal(a.data, b.data) for a, b in zip(one.images, other.images, strict=True))
    assert [m.name for m in one.maps] == [m.name for m in other.maps]
    for a, b in zip(one.maps, other.maps, strict=True):
        assert torch.equal(a.data, b.data) and torch.equal(a.valid, b.valid) and a.comment == b.comment
    assert one.notes == other.notes and one.quality == other.quality


@pytest.mark.parametrize("shape", [(1, 33, 29), (6, 33, 17)], ids=["2D", "3D"])
@pytest.mark.parametrize("partial_fourier", ["zero_fill", "pocs"])
@pytest.mark.parametrize("acs", [True, False], ids=["calibration", "none"])
@pytest.mark.parametrize(
    ("method", "settings"), [("fourier", {}), ("fourier", {"combine": "adaptive"}), ("cg_sense", {"iterations": 8})], ids=str
)
def test_parts_together_are_the_whole(
    method: str, settings: dict[str, object], acs: bool, partial_fourier: str, shape: tuple[int, int, int]
) -> None:
    """Virtual coils, coil maps, partial Fourier, another matrix and maps: all from what the states have in common."""
    series = partial_series(shape)
    kspace, scan = series.kspace, series.scan
    if not acs:
        maps = None if settings == {} else series.kspace.coil_maps
        kspace = replace(kspace, acs=None, acs_mask=None, coil_maps=maps)
        if settings:
            kspace = replace(kspace, coil_maps=small_series(shape, keep=1.0, n_coils=6).kspace.coil_maps)
    recipe = Recipe(
        method,
        parse_settings(get_method(method).Settings, settings),
        PreprocessSettings(
            coil_compression="none" if kspace.coil_maps is not None else "svd",
            virtual_coils=4,
            partial_fourier=partial_fourier,
        ),
        maps=MapSettings(maps="t1"),
    )
    whole = reconstruct(kspace, scan, recipe)
    assert whole.maps
    for cuts in ([0, 3, 6], [0, 1, 5, 6]):
        parts = [reconstruct_images(kspace, scan, recipe, states=states) for states in itertools.pairwise(cuts)]
        assert len({part.noise for part in parts}) == 1 and parts[0].noise is not None
        assert_same(finish(join_states(parts), scan, recipe.maps), whole)


def test_methods_that_couple_states_refuse_a_part() -> None:
    series = small_series()
    recipe = Recipe("llr", parse_settings(get_method("llr").Settings, {}))
    with pytest.raises(DataError, match="together"):
        reconstruct_images(series.kspace, series.scan, recipe, states=(0, 3))


def test_a_part_remembers_the_whole() -> None:
    kspace: KSpace = small_series().kspace
    part = kspace.part(2, 5)
    assert part.all_states is kspace and kspace.all_states is kspace and part.n_states == 3
    again = part.part(1, 2)
    assert again.all_states is kspace and torch.equal(again.data, kspace.data[3:4])
    assert part.to("cpu").all_states.n_states == kspace.n_states


def test_notes_are_told_once_and_the_worst_figures_stay() -> None:
    def part(value: float, *notes: str) -> StateImages:
        return StateImages(Result((ImageSeries("image", torch.ones(2, 1, 3, 3) * value),), (), {"residual": value}, notes))

    joined = join_states([part(1.0, "a", "b"), part(3.0, "b", "c"), part(2.0)]).result
    assert joined.notes == ("a", "b", "c") and joined.quality == {"residual": 3.0}
    assert joined.images[0].data[:, 0, 0, 0].tolist() == [1, 1, 3, 3, 2, 2]
    other = StateImages(Result((ImageSeries("magnitude", torch.ones(2, 1, 3, 3)),)))
    with pytest.raises(DataError, match="belong together"):
        join_states([part(1.0), other])


def test_missing_lines_are_counted_over_all_states() -> None:
    series = small_series(keep=0.3)
    recipe = Recipe("fourier", fourier.Settings())
    (note,) = reconstruct_images(series.kspace, series.scan, recipe).result.notes
    assert reconstruct_images(series.kspace, series.scan, recipe, states=(1, 2)).result.notes == (note,)
