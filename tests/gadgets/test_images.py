"""The image contract, checked on the bytes with ismrmrd-python as the reader."""

from __future__ import annotations

from typing import Any

import ismrmrd
import numpy as np
import pytest
import torch

from gadgets.geometry import Geometry
from gadgets.image_attributes import Stamp, is_preview, read_stamp
from gadgets.images import ImageWriter, OutputSettings, sending_order
from gadgets.meta import BOTH_FAMILIES
from gadgets.wire.dtypes import ACQUISITION_HEADER
from gadgets.wire.header import Encoding, MrdHeader
from recon_core.errors import DataError, NumericalError, SettingError
from recon_core.settings import parse_settings
from recon_core.types import ImageSeries, ParameterMap, Result, ScanInfo

MATRIX = (1, 12, 20)
FOV = (0.006, 0.12, 0.3)
OBLIQUE = Geometry((10.5, -20.25, 30.0), (0.6, 0.8, 0.0), (0.0, 0.0, 1.0), (0.8, -0.6, 0.0), table_position=(0.0, 0.0, -5.0))
STATES = ({"phase": 0, "set": 1}, {"phase": 1, "set": 1}, {"phase": 2, "set": 1})


def mrd_header(**fields: Any) -> MrdHeader:
    return MrdHeader((Encoding("cartesian", MATRIX, FOV, MATRIX, FOV),), **fields)


def scan_info(slice_index: int = 0, matrix: tuple[int, int, int] = MATRIX, **fields: Any) -> ScanInfo:
    return ScanInfo(matrix, FOV, matrix, FOV, slice_index=slice_index, state_counters=STATES, **fields)


def cine(seed: int = 0, n_states: int = 3, matrix: tuple[int, int, int] = MATRIX, scale: float = 1e-5) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    shape = (n_states, *matrix)
    return torch.from_numpy(((rng.normal(size=shape) + 1j * rng.normal(size=shape)) * scale).astype(np.complex64))


def result(*maps: ParameterMap, data: torch.Tensor | None = None, **fields: Any) -> Result:
    return Result((ImageSeries("image", cine() if data is None else data),), maps, **fields)


def t1_map(values: Any, name: str = "T1", unit: str = "s") -> ParameterMap:
    data = torch.as_tensor(np.broadcast_to(np.asarray(values, np.float32), MATRIX).copy())
    return ParameterMap(name, data, unit, valid=data > 0)


def received(writer: ImageWriter, outcome: Result, scan: ScanInfo | None = None, **more: Any) -> list[ismrmrd.Image]:
    messages = writer.messages(outcome, scan or scan_info(), more.pop("geometry", OBLIQUE), **more)
    return [ismrmrd.Image.from_bytes(message[2:]) for message in messages]


def values(meta: ismrmrd.Meta, key: str) -> list[str]:
    found = meta[key]
    return found if isinstance(found, list) else [found]


def test_header_fields_of_a_cine() -> None:
    stamps = [Stamp(77, 1000 + n, (10 + n, 0, 0), (n,) * 8, (0.5,) * 8) for n in range(3)]
    images = received(ImageWriter(mrd_header(), "llr"), result(), scan_info(4), position=2, stamps=stamps)
    assert len(images) == 3
    for state, image in enumerate(images):
        head = image.getHead()
        assert tuple(head.matrix_size) == (20, 12, 1) and image.data.shape == (1, 1, 12, 20)
        np.testing.assert_allclose(head.field_of_view, (300, 120, 6), rtol=1e-6)
        np.testing.assert_allclose(head.position, OBLIQUE.position)
        np.testing.assert_allclose(head.read_dir, OBLIQUE.read_dir)
        np.testing.assert_allclose(head.phase_dir, OBLIQUE.phase_dir)
        np.testing.assert_allclose(head.slice_dir, OBLIQUE.slice_dir)
        np.testing.assert_allclose(head.patient_table_position, (0, 0, -5))
        assert (head.version, head.channels, head.image_type, head.data_type) == (1, 1, 1, 5)
        assert (head.slice, head.phase, head.set, head.contrast) == (4, state, 1, 0)
        assert (head.measurement_uid, head.acquisition_time_stamp, head.physiology_time_stamp[0]) == (
            77,
            1000 + state,
            10 + state,
        )
        assert head.user_int[3] == state and head.user_float[0] == 0.5
        assert (head.image_series_index, head.image_index) == (1, 2 * 3 + state + 1)
        assert tuple(float(v) for v in values(image.meta, "ImageRowDir")) == OBLIQUE.read_dir
        assert tuple(float(v) for v in values(image.meta, "ImageColumnDir")) == OBLIQUE.phase_dir
        assert tuple(float(v) for v in values(image.meta, "ImageSliceDir")) == OBLIQUE.slice_dir
        assert image.meta["Keep_image_geometry"] == "1"


def test_float32_magnitudes_are_unscaled() -> None:
    data = cine()
    images = received(ImageWriter(mrd_header(), "fourier"), result(data=data))
    np.testing.assert_array_equal(np.stack([i.data[0] for i in images]), np.abs(data.numpy()))
    assert "WindowCenter" not in images[0].meta  # 1e-5 has no integer window
    loud = received(ImageWriter(mrd_header(), "fourier"), result(data=cine(scale=500.0)))
    assert int(loud[0].meta["WindowWidth"]) > 500


def test_a_slab_is_one_image_per_state() -> None:
    matrix = (5, 12, 20)
    scan = scan_info(matrix=matrix)
    images = received(ImageWriter(mrd_header(), "fourier"), result(data=cine(matrix=matrix, n_states=2)), scan)
    assert [tuple(i.getHead().matrix_size) for i in images] == [(20, 12, 5)] * 2
    assert [i.image_index for i in images] == [1, 2] and images[0].data.shape == (1, 5, 12, 20)
    assert images[0].meta["Keep_image_geometry"] == "0"


def test_bits_stored_in_the_header_means_a_console_and_integers() -> None:
    writer = ImageWriter(mrd_header(user_long={"BitsStored": 16}), "llr")
    data = cine()
    images = received(writer, result(data=data))
    assert {i.data.dtype for i in images} == {np.dtype("uint16")} and {i.getHead().data_type for i in images} == {1}
    assert images[0].data.max() > 4095
    ratio = float(images[0].meta["GADGETRON_ScaleRatio"])
    stored = np.stack([i.data[0] for i in images])
    np.testing.assert_allclose(stored / ratio, np.abs(data.numpy()), atol=0.5 / ratio * 1.001)
    assert int(images[0].meta["WindowWidth"]) > 100  # in codes, as a whole number
    assert "RescaleSlope" not in images[0].meta


def test_one_scale_and_one_window_for_all_slices_of_a_series() -> None:
    writer = ImageWriter(mrd_header(), "llr", OutputSettings(pixel_type="uint16"))
    first, second = cine(0), cine(1) * 1.7
    images = received(writer, result(data=first), scan_info(0)) + received(writer, result(data=second), scan_info(1))
    keys = ("GADGETRON_ScaleRatio", "WindowCenter", "WindowWidth")
    assert len({tuple(i.meta[k] for k in keys) for i in images}) == 1
    assert [i.image_index for i in images] == [1, 2, 3, 4, 5, 6] and {i.image_series_index for i in images} == {1}
    ratio = float(images[0].meta["GADGETRON_ScaleRatio"])
    np.testing.assert_allclose(images[4].data[0] / ratio, np.abs(second.numpy()[1]), atol=0.5 / ratio * 1.001)


def test_a_few_clipped_pixels_are_counted_in_the_comment() -> None:
    matrix = (1, 40, 40)
    writer = ImageWriter(mrd_header(), "llr", OutputSettings(pixel_type="uint16"))
    received(writer, result(data=cine(0, 1, matrix)), scan_info(matrix=matrix))
    spiky = cine(0, 1, matrix)
    spiky[0, 0, 5, 5] = 1.0
    (image,) = received(writer, result(data=spiky), scan_info(1, matrix))
    assert "1 of 1600 pixels saturated" in values(image.meta, "ImageComments")
    assert image.data.max() == 4095 and image.image_series_index == 1


def test_a_much_brighter_slice_is_not_cut_off_but_begins_a_series_with_a_coarser_scale() -> None:
    writer = ImageWriter(mrd_header(), "llr", OutputSettings(pixel_type="uint16"))
    (dim, *_) = received(writer, result(data=cine(0)))
    bright = received(writer, result(data=cine(0) * 100), scan_info(1))
    (after, *_) = received(writer, result(data=cine(0) * 100), scan_info(2))
    assert (dim.image_series_index, bright[0].image_series_index, after.image_series_index) == (1, 2, 2)
    ratio = float(bright[0].meta["GADGETRON_ScaleRatio"])
    shown = np.stack([i.data[0] for i in bright]) / ratio
    np.testing.assert_allclose(shown, np.abs(cine(0).numpy()) * 100, atol=0.51 / ratio)
    assert any("brighter" in comment for comment in values(bright[0].meta, "ImageComments"))


@pytest.mark.parametrize("brighter", [20.0, 5000.0])
def test_a_map_in_the_images_own_unit_is_not_cut_off_where_a_slice_is_much_brighter(brighter: float) -> None:
    writer = ImageWriter(mrd_header(), "llr", OutputSettings(pixel_type="uint16"))
    m0 = np.linspace(100, 150, MATRIX[-1])
    dim, bright, after = (
        received(writer, result(t1_map(gain * m0, "M0", "1")), scan_info(n))[-1]
        for n, gain in enumerate((1, brighter, brighter))
    )
    assert dim.image_series_index < bright.image_series_index == after.image_series_index
    unit = float(values(bright.meta, "QuantityUnit")[0]) if bright.meta.get("QuantityUnit") else 1.0
    shown = unit * bright.data[0] * float(bright.meta["RescaleSlope"])
    np.testing.assert_allclose(shown[0, 0], brighter * m0, rtol=2e-3)
    assert any("new series" in comment for comment in values(bright.meta, "ImageComments"))


def test_an_empty_first_slice_decides_neither_scale_nor_window() -> None:
    writer, plain = (ImageWriter(mrd_header(), "llr", OutputSettings(pixel_type="uint16")) for _ in range(2))
    zero = received(writer, result(t1_map(0.0, "M0", "1"), data=torch.zeros_like(cine())), scan_info(1))
    assert not any(i.data.any() for i in zero)
    full = result(t1_map(np.linspace(1e-5, 3e-5, MATRIX[-1]), "M0", "1"), data=cine())
    after, expected = received(writer, full, scan_info(0)), received(plain, full, scan_info(0))
    for a, b in zip(after, expected, strict=True):
        np.testing.assert_array_equal(a.data, b.data)
        keys = ("GADGETRON_ScaleRatio", "WindowCenter", "WindowWidth")
        assert [a.meta[k] for k in keys] == [b.meta[k] for k in keys] and a.image_series_index == b.image_series_index
    assert {i.image_series_index for i in zero} == {i.image_series_index for i in after}


def test_the_middle_slice_is_sent_first() -> None:
    assert sending_order(1, scaled=True) == (0,) and sending_order(5, scaled=True) == (2, 0, 1, 3, 4)
    assert sorted(sending_order(8, scaled=True)) == list(range(8))
    assert sending_order(3, scaled=False) == (0, 1, 2)


def test_phase_and_complex_on_request_in_series_of_their_own() -> None:
    data = cine()
    settings = OutputSettings(phase=True, complex=True)
    images = received(ImageWriter(mrd_header(), "llr", settings, first_series=10), result(data=data))
    assert [(i.image_series_index, i.getHead().image_type, i.getHead().data_type) for i in images[::3]] == [
        (10, 1, 5),
        (11, 2, 5),
        (12, 5, 7),
    ]
    np.testing.assert_array_equal(np.stack([i.data[0] for i in images[6:]]), data.numpy())
    np.testing.assert_allclose(np.stack([i.data[0] for i in images[3:6]]), np.angle(data.numpy()), atol=1e-6)
    assert {i.image_index for i in images[6:]} == {1, 2, 3}


def test_integer_phase_is_exact_to_half_a_step_around_the_circle() -> None:
    angles = np.linspace(-np.pi, np.pi, 240).reshape(1, 1, 12, 20)
    data = torch.from_numpy(np.exp(1j * angles).astype(np.complex64))
    settings = OutputSettings(magnitude=False, phase=True, pixel_type="uint16")
    (image,) = received(ImageWriter(mrd_header(), "llr", settings), result(data=data))
    meta = image.meta
    shown = image.data[0] * float(meta["RescaleSlope"]) + float(meta["RescaleIntercept"])
    error = np.angle(np.exp(1j * (shown * np.pi / 4096 - angles[0])))
    assert np.abs(error).max() < np.pi / 4096 * 1.01
    gadgetron = (image.data[0] - float(meta["GADGETRON_ScaleOffset"])) / float(meta["GADGETRON_ScaleRatio"])
    assert np.abs(np.angle(np.exp(1j * (gadgetron - angles[0])))).max() < np.pi / 4096 * 1.01
    assert (meta["WindowCenter"], meta["WindowWidth"]) == ("0", "8192")
    assert (meta["GADGETRON_WindowCenter"], meta["GADGETRON_WindowWidth"]) == ("2048", "4096")


def test_a_real_series_is_sent_as_magnitude_and_says_so() -> None:
    settings = OutputSettings(magnitude=False, phase=True)
    images = received(ImageWriter(mrd_header(), "llr", settings), result(data=cine().abs()))
    assert len(images) == 3 and "only the magnitude exists" in values(images[0].meta, "ImageComments")


def test_a_t1_map_reaches_the_console_in_milliseconds() -> None:
    seconds = np.full(MATRIX, 1.234)
    seconds[0, 0, :4] = (0.0, np.nan, 4.0, 2.0)
    header = mrd_header(field_strength=3.0)
    images = received(ImageWriter(header, "molli"), result(t1_map(seconds), data=cine()))
    image = images[-1]
    assert image.getHead().image_type == 1 and image.data.dtype == np.uint16
    assert image.data[0, 0, 0, :5].tolist() == [0, 0, 4000, 2000, 1234]
    meta = image.meta
    assert (meta["DataRole"], meta["GADGETRON_DataRole"]) == ("Quantitative", "T1")
    assert (float(meta["RescaleSlope"]), float(meta["RescaleIntercept"])) == (1.0, 0.0)
    assert (meta["WindowCenter"], meta["WindowWidth"]) == ("1600", "1600")
    assert (meta["PixelPaddingValue"], meta["QuantityUnit"], meta["Skip_processing_after_recon"]) == ("0", "ms", "1")
    comments = values(meta, "ImageComments")
    assert "T1_x1_1ms" in comments and not any("outside" in text for text in comments)
    assert "EchoTime" not in meta and image.image_series_index == 2 and image.image_index == 1


@pytest.mark.parametrize(
    ("name", "unit", "value", "said"),
    [
        ("R2*", "1/s", 37.5, "R2STAR_x10_0.1/s"),
        ("M0", "1", 2.5e-5, "M0_x0.0625_16x1e-9"),
        ("chi", "ppm", 0.1, "QSM_x2_0.5ppb"),
    ],
)
def test_the_scale_of_a_map_is_said_in_figures_that_do_not_run_together(
    name: str, unit: str, value: float, said: str
) -> None:
    image = received(ImageWriter(mrd_header(), "mgre"), result(t1_map(value, name, unit)))[-1]
    assert values(image.meta, "ImageComments")[1] == said


def test_a_t1_beyond_4095_ms_is_neither_cut_off_nor_hidden() -> None:
    """Fluid has up to 4.5 s; of 12 bits in ms it would show 4.095 s. A later slice that holds such gets a series of its own."""
    short, long = np.full(MATRIX, 1.234), np.full(MATRIX, 1.234)
    long[0, :2] = 4.5
    writer = ImageWriter(mrd_header(), "pinqi_t1")
    first, second, third = (received(writer, result(t1_map(s), data=cine()))[-1] for s in (short, long, short))
    for image, seconds, slope in ((first, short, 1.0), (second, long, 2.0), (third, short, 2.0)):
        assert float(image.meta["RescaleSlope"]) == slope and image.meta["QuantityUnit"] == "ms"
        np.testing.assert_allclose(image.data[0, 0] * slope, 1e3 * seconds[0], atol=1)
    assert first.image_series_index != second.image_series_index == third.image_series_index
    assert any("larger values" in text for text in values(second.meta, "ImageComments"))


@pytest.mark.parametrize(
    ("name", "unit", "peak", "console"),
    [
        ("T1", "s", 2.0, 1e3),
        ("R2*", "1/s", 90.0, 1.0),
        ("chi", "ppm", 0.9, 1e3),
        ("M0", "1", 2e3, 1.0),
        ("speed", "m/s", 3.0, 1.0),
    ],
)
def test_few_bits_hold_a_map_in_coarser_steps(name: str, unit: str, peak: float, console: float) -> None:
    """Of 8 bits in steps of 1 ms T1 would end at 255 ms."""
    values_ = np.linspace(0.05, 1.0, 240).reshape(MATRIX) * peak
    writer = ImageWriter(mrd_header(), "demo", OutputSettings(bits_stored=8))
    image = received(writer, result(t1_map(values_, name, unit)))[-1]
    step = float(image.meta["RescaleSlope"])
    shown = image.data[0] * step + float(image.meta["RescaleIntercept"])
    assert image.data.max() < 256 and np.abs(shown - values_ * console).max() <= 0.51 * step <= 12 * peak * console / 256
    assert not any("outside" in text for text in values(image.meta, "ImageComments"))


def test_a_map_says_which_pixels_show_a_limit_and_not_their_value() -> None:
    rates = np.full(MATRIX, 37.5)
    rates[0, 0, 0] = 500.0
    image = received(ImageWriter(mrd_header(), "mgre"), result(t1_map(rates, "R2*", "1/s")))[-1]
    assert image.data.max() == 4095
    assert "1 of 240 pixels lie outside 0.1 to 409.5 1/s and show its end" in values(image.meta, "ImageComments")


def test_r2star_windows_are_in_rescaled_values_for_the_console_and_in_codes_for_gadgetron() -> None:
    meta = received(ImageWriter(mrd_header(), "mgre"), result(t1_map(37.5, "R2*", "1/s")))[-1].meta
    assert (meta["WindowCenter"], meta["WindowWidth"], meta["RescaleSlope"]) == ("50", "100", "0.1")
    assert (meta["GADGETRON_WindowCenter"], meta["GADGETRON_WindowWidth"]) == ("500", "1000")
    assert float(meta["GADGETRON_ScaleRatio"]) == 10.0 and meta["GADGETRON_DataRole"] == "R2STAR"


def test_negative_susceptibility_survives_and_float_maps_are_in_console_units() -> None:
    chi = torch.full(MATRIX, -0.1)
    chi[0, 0, 0] = 0.25
    valid = torch.ones(MATRIX, dtype=torch.bool)
    valid[0, 0, 1] = False
    outcome = result(ParameterMap("chi", chi, "ppm", valid))
    image = received(ImageWriter(mrd_header(), "laro_qsm"), outcome)[-1]
    shown = image.data[0] * float(image.meta["RescaleSlope"]) + float(image.meta["RescaleIntercept"])
    assert shown[0, 0, 0] == 250 and shown[0, 0, 2] == -100 and image.data[0, 0, 0, 1] == 0
    assert (image.meta["WindowCenter"], image.meta["WindowWidth"]) == ("0", "300")
    plain = received(ImageWriter(mrd_header(), "laro_qsm", OutputSettings(map_pixel_type="float32")), outcome)[-1]
    np.testing.assert_allclose(plain.data[0, 0, 0, :3], (250, 0, -100), rtol=1e-6)
    assert "RescaleSlope" not in plain.meta and plain.meta["QuantityUnit"] == "ppb"


def test_both_key_families_and_no_empty_value() -> None:
    scan = scan_info(echo_times=(0.00246, 0.005, 0.0075), inversion_times=(0.1, 0.2, 0.3), saturation_times=(0.6,) * 3)
    outcome = result(t1_map(1.0), data=cine(scale=1e3), notes=("slice 3: 41 of 48 lines",), quality={"residual": 1.02})
    images = received(ImageWriter(mrd_header(), "pinqi"), outcome, scan)
    for image in images:
        meta = image.meta
        for standard, twin in BOTH_FAMILIES.items():
            assert (standard in meta) == (twin in meta), standard
        assert all(v for key in meta for v in values(meta, key))
        assert list(meta) == sorted(meta)
        assert "pinqi" in meta["SequenceDescriptionAdditional"] and "SeriesDescriptionAdditional" in meta
        assert "slice 3: 41 of 48 lines" in values(meta, "ImageComments") and meta["ReconQuality"] == "residual=1.02"
        assert values(meta, "ImageProcessingHistory") == ["recon-gadgets", "pinqi"]
        assert len(image.attribute_string) > 0 and int(meta["GADGETRON_ImageNumber"]) == image.image_index
    assert (images[1].meta["EchoTime"], images[1].meta["GADGETRON_TE"]) == ("5.0", "5.0")
    assert images[0].meta["EchoTime"] == "2.46" and images[2].meta["InversionTime"] == "300.0"
    assert images[0].meta["GADGETRON_TS"] == "600.0"


def test_a_long_comment_is_cut_and_not_left_out() -> None:
    """What was changed at the console may be a long list."""
    changed = {f"setting_{n:02d}": "0.123456789" for n in range(60)}
    [image] = received(ImageWriter(mrd_header(), "llr", changed=changed), result(data=cine()[:1]))
    (said,) = [text for text in values(image.meta, "ImageComments") if text.startswith("setting_00=0.123456789")]
    assert len(said) == 200


def test_a_series_never_mixes_matrices_types_or_meanings() -> None:
    writer = ImageWriter(mrd_header(), "llr", OutputSettings(phase=True, complex=True))
    received(writer, result(t1_map(1.0), t1_map(20.0, "R2*", "1/s")))
    wide = scan_info(1, matrix=(1, 12, 24))
    other = Result((ImageSeries("image", cine(matrix=(1, 12, 24))),))
    images = received(ImageWriter(mrd_header(), "llr"), result()) + received(writer, other, wide)
    images = received(writer, result(t1_map(1.0), t1_map(20.0, "R2*", "1/s")), scan_info(2)) + images[3:]
    seen: dict[int, set[Any]] = {}
    for image in images:
        head = image.getHead()
        what = (
            tuple(head.matrix_size),
            head.data_type,
            head.channels,
            head.image_type,
            image.meta.get("GADGETRON_DataRole"),
        )
        seen.setdefault(head.image_series_index, set()).add(what)
    assert all(len(kinds) == 1 for kinds in seen.values()) and len(seen) == 8


def test_a_slice_that_comes_again_gets_new_indices() -> None:
    writer = ImageWriter(mrd_header(), "fourier")
    indices = [i.image_index for _ in range(2) for s in range(2) for i in received(writer, result(), scan_info(s))]
    assert sorted(indices) == list(range(1, 13))


def test_more_images_than_a_series_can_number_go_on_in_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """``image_index`` has 16 bits; the middle slice goes first, so that numbers are free below when the last one is taken."""
    monkeypatch.setattr("gadgets.images.MAX_IMAGE_INDEX", 13)
    writer = ImageWriter(mrd_header(), "fourier")
    images = [i for s in (4, 0, 1, 2, 3, 5) for i in received(writer, result(), scan_info(s))]
    numbers = [(i.image_series_index, i.image_index) for i in images]
    assert len(set(numbers)) == len(images) == 18 and max(index for _, index in numbers) <= 13


def test_order_of_slices_does_not_change_their_indices() -> None:
    writer = ImageWriter(mrd_header(), "fourier")
    assert [received(writer, result(), scan_info(s))[0].image_index for s in (2, 0, 1)] == [7, 1, 4]


def test_a_fallback_never_shares_a_series_with_the_chain_it_stands_in_for() -> None:
    writer = ImageWriter(mrd_header(), "llr")
    spare = writer.for_fallback("cg_sense")
    a = received(spare, result(), scan_info(0))
    b = received(writer, result(), scan_info(1))
    assert a[0].image_series_index != b[0].image_series_index
    assert "llr failed: image from cg_sense instead" in values(a[0].meta, "ImageComments")
    assert "cg_sense" in a[0].meta["SequenceDescriptionAdditional"]


@pytest.mark.parametrize("header", [mrd_header(), mrd_header(user_long={"BitsStored": 12})], ids=["float32", "uint16"])
def test_previews_are_marked_and_leave_the_final_images_as_they_are(header: MrdHeader) -> None:
    writer, undisturbed = ImageWriter(header, "llr"), ImageWriter(header, "llr")
    first = writer.for_previews("grasp_pro")
    second = writer.for_previews("grasp_pro", beside=first)
    quick = [received(w, result(data=cine(n)), scan_info(s)) for w in (first, second) for n, s in enumerate((1, 0))]
    final = [image for s in (1, 0) for image in received(writer, result(data=cine(9 + s)), scan_info(s))]
    alone = [image for s in (1, 0) for image in received(undisturbed, result(data=cine(9 + s)), scan_info(s))]
    for a, b in zip(final, alone, strict=True):
        assert bytes(a.getHead()) == bytes(b.getHead()) and a.attribute_string == b.attribute_string
        np.testing.assert_array_equal(a.data, b.data)
        assert not is_preview(a.attribute_string) and "PREVIEW" not in a.attribute_string
    # one image of each slice and state in each of their series, which are no series of final images
    numbers = [{i.image_series_index for i in images} for images in quick]
    assert numbers[0] == numbers[1] and numbers[2] == numbers[3]
    assert len({*numbers[0], *numbers[2], *(i.image_series_index for i in final)}) == 3
    assert [i.image_index for i in quick[0] + quick[1]] == [i.image_index for i in final]
    for image, same in zip(quick[0], final, strict=False):
        assert is_preview(image.attribute_string)
        for key in ("SequenceDescriptionAdditional", "GADGETRON_SeqDescription"):
            assert image.meta[key].strip("_") == "llr_PREVIEW" and len(image.meta[key]) <= 64  # DICOM's LO
        assert image.meta["ImageTypeValue4"] == "PREVIEW"  # DICOM's CS: capitals
        assert "preview by grasp_pro: the final images of llr follow" in values(image.meta, "ImageComments")
        for name in ("position", "read_dir", "phase_dir", "slice_dir", "field_of_view", "matrix_size", "slice", "phase"):
            a, b = getattr(image.getHead(), name), getattr(same.getHead(), name)
            assert tuple(a) == tuple(b) if hasattr(a, "__len__") else a == b, name


def test_a_preview_of_the_final_images_has_their_pixels_and_window() -> None:
    header = mrd_header(user_long={"BitsStored": 12})
    writer = ImageWriter(header, "llr")
    quick, final = (received(w, result(data=cine(scale=300.0))) for w in (writer.for_previews("grasp_pro"), writer))
    for a, b in zip(quick, final, strict=True):
        np.testing.assert_array_equal(a.data, b.data)
        for key in ("WindowCenter", "WindowWidth", "GADGETRON_ScaleRatio"):
            assert a.meta[key] == b.meta[key]


def test_inputs_are_not_changed() -> None:
    data, chi = cine(), t1_map(-0.1, "chi", "ppm")
    before = data.clone(), chi.data.clone()
    received(ImageWriter(mrd_header(), "llr", OutputSettings(pixel_type="uint16", phase=True)), result(chi, data=data))
    assert torch.equal(before[0], data) and torch.equal(before[1], chi.data)


def test_geometry_repairs_are_said_in_the_image() -> None:
    repaired = Geometry((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), notes=("acquisition directions are missing",))
    (image, *_) = received(ImageWriter(mrd_header(), "llr"), result(), geometry=repaired)
    assert "acquisition directions are missing" in values(image.meta, "ImageComments")


def test_what_cannot_be_an_image_is_refused_by_type() -> None:
    writer = ImageWriter(mrd_header(), "llr")
    broken = cine()
    broken[1, 0, 2, 3] = float("nan")
    with pytest.raises(NumericalError, match="1 of 720"):
        received(writer, result(data=broken))
    with pytest.raises(DataError, match="state, z, y, x"):
        received(writer, result(data=cine()[0]))
    with pytest.raises(DataError, match="neither matrix"):
        received(writer, result(data=cine(matrix=(1, 8, 8))))
    with pytest.raises(DataError, match="nothing to send"):
        received(writer, Result(()))
    with pytest.raises(SettingError, match="bits"):
        ImageWriter(mrd_header(), "llr", OutputSettings(bits_stored=3))


def test_settings_from_text() -> None:
    settings = parse_settings(OutputSettings, {"phase": "True", "pixel_type": "uint16", "bits_stored": "16"})
    assert settings == OutputSettings(phase=True, pixel_type="uint16", bits_stored=16)


def test_stamp_of_a_readout() -> None:
    header = np.zeros(1, ACQUISITION_HEADER)
    header["measurement_uid"], header["acquisition_time_stamp"] = 5, 6
    header["physiology_time_stamp"] = (7, 8, 9)
    assert read_stamp(header[0]) == Stamp(5, 6, (7, 8, 9))
