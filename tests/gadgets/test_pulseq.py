"""The exported sequence: timing, labels, trajectory and header, all on the file as another program reads it."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pypulseq as pp
import pytest

from gadgets.pulseq import make_sequence, write_sequence
from gadgets.pulseq_settings import SequenceError, SequenceFacts, SequenceSettings
from gadgets.wire.header import parse_header
from recon_core.errors import SettingError
from recon_core.sampling.agreement import pattern_digest
from recon_core.sampling.learned import draw_mask, multilevel_density
from recon_core.sampling.mask_files import SamplingMask
from recon_core.sampling.ordering import fan_beam_order

# odd and even matrices, a mask that need not reach the edges, echoes at unequal distances off the raster
SHAPE = (5, 12)
SETTINGS = SequenceSettings(
    matrix_x=16,
    fov=(0.05, 0.12, 0.16),
    echo_times=(0.004, 0.0081, 0.012043),
    repetition_time=0.02,
    oversampling=2,
    dummies=2,
    noise_readouts=4,
)
BLOCKS_PER_SHOT = 1 + 3 * 2 + 1


def _mask() -> SamplingMask:
    p = np.repeat(multilevel_density(SHAPE, 20, (1, 4))[None], 3, 0)
    mask = draw_mask(p, 20, 5, (1, 4))
    return SamplingMask(mask, order=fan_beam_order(mask, 4).positions, n_segments=4)


MASK = _mask()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, SequenceFacts]:
    path = tmp_path_factory.mktemp("sequence") / "scan.seq"
    return path, write_sequence(path, MASK, SETTINGS)


@pytest.fixture(scope="module")
def sequence(written: tuple[Path, SequenceFacts]) -> pp.Sequence:
    found = pp.Sequence(pp.Opts(rf_ringdown_time=30e-6, rf_dead_time=100e-6, adc_dead_time=10e-6))
    found.read(str(written[0]))
    return found


def test_timing_and_duration(sequence: pp.Sequence, written: tuple[Path, SequenceFacts]) -> None:
    fine, report = sequence.check_timing()
    assert fine, report
    facts = written[1]
    noise = sum(sequence.block_durations[n] for n in range(1, 5))
    assert sequence.duration()[0] == pytest.approx(facts.duration) == pytest.approx(noise + 22 * 0.02)
    assert facts.n_readouts == 60 and facts.repetition_time == pytest.approx(0.02)
    assert sequence.definitions["TR"] == pytest.approx(0.02)
    pulses = [n for n in sequence.block_events if sequence.block_events[n][1]]
    starts = np.cumsum([0.0, *(sequence.block_durations[n] for n in sequence.block_events)])[np.array(pulses) - 1]
    np.testing.assert_allclose(np.diff(starts), 0.02, atol=1e-9)  # every TR, dummies included


def test_labels_are_the_order(sequence: pp.Sequence) -> None:
    labels = sequence.evaluate_labels(evolution="adc")
    assert MASK.order is not None
    order = MASK.order.reshape(-1, 2)
    np.testing.assert_array_equal(labels["NOISE"], [1] * 4 + [0] * 60)
    par, lin, eco = (labels[name][4:] for name in ("PAR", "LIN", "ECO"))
    np.testing.assert_array_equal(par, order[:, 0])
    np.testing.assert_array_equal(lin, order[:, 1])
    np.testing.assert_array_equal(eco, np.tile(np.arange(3), 20))
    sampled = np.zeros_like(MASK.mask)
    sampled[eco, par, lin] = True
    np.testing.assert_array_equal(sampled, MASK.mask)


def test_trajectory_agrees_with_the_mask_and_the_echo_times(
    sequence: pp.Sequence, written: tuple[Path, SequenceFacts]
) -> None:
    """From the gradients alone: every readout is a straight line through its position, at k0 = 0 when it says so."""
    k, _, t_excitation, _, t_adc = sequence.calculate_kspace()
    k, t_adc = k[:, 4 * 32 :], t_adc[4 * 32 :]
    x, y, z = k.reshape(3, 60, 32)
    assert MASK.order is not None
    order = MASK.order.reshape(-1, 1, 2)
    assert np.abs(y * 0.12 + 6 - order[..., 1]).max() < 1e-3
    assert np.abs(z * 0.05 + 2 - order[..., 0]).max() < 1e-3
    assert np.abs(x * 0.32 - (np.arange(32) - 16)).max() < 1e-3
    found = t_adc.reshape(20, 3, 32)[:, :, 16] - np.array(t_excitation)[2:, None]
    np.testing.assert_allclose(found, np.broadcast_to(written[1].echo_times, (20, 3)), atol=1e-8)
    assert np.abs(np.array(written[1].echo_times) - SETTINGS.echo_times).max() < 1.5e-5


def test_moments_are_the_same_in_every_repetition(sequence: pp.Sequence) -> None:
    """Two cycles per voxel are left on x, nothing on y, and on z what the slab gradient does before the pulse's centre."""
    areas = np.zeros((22, 3))
    slab = 0.0
    for number in range(5, len(sequence.block_events) + 1):
        block = sequence.get_block(number)
        for axis, g in enumerate((block.gx, block.gy, block.gz)):
            if g is not None:
                area = g.amplitude * (g.flat_time + 0.5 * (g.rise_time + g.fall_time))
                areas[(number - 5) // BLOCKS_PER_SHOT, axis] += area
                slab = area if block.rf is not None else slab
    np.testing.assert_allclose(areas, np.tile([2 * 16 / 0.16, 0.0, 0.5 * slab], (22, 1)), rtol=1e-3, atol=0.02)


def test_gradient_shapes_do_not_change_from_shot_to_shot(sequence: pp.Sequence) -> None:
    """Interpreters that compile a repetition once can scale amplitudes, not times."""
    times: dict[int, set[tuple[float, ...]]] = {}
    for number in range(5, len(sequence.block_events) + 1):
        block = sequence.get_block(number)
        shape = tuple(
            round(v * 1e6, 3)
            for g in (block.gx, block.gy, block.gz)
            if g is not None
            for v in (g.rise_time, g.flat_time, g.fall_time)
        )
        times.setdefault((number - 5) % BLOCKS_PER_SHOT, set()).add(shape)
    assert all(len(found) == 1 for found in times.values()) and len(times) == BLOCKS_PER_SHOT


def test_limits_and_what_the_axes_reach_together(sequence: pp.Sequence, written: tuple[Path, SequenceFacts]) -> None:
    """Each axis within the settings; the facts are the vector sum, found here from the blocks as written."""
    reached = np.zeros(2)
    for number in sequence.block_events:
        block = sequence.get_block(number)
        lobes = [g for g in (block.gx, block.gy, block.gz) if g is not None]
        amplitude = np.array([abs(g.amplitude) for g in lobes]) / 42.577478518e6
        slew = amplitude / np.array([min(g.rise_time, g.fall_time) for g in lobes])
        assert (amplitude <= 32.001e-3).all() and (slew <= 130.01).all()
        reached = np.maximum(reached, [1e3 * np.linalg.norm(amplitude), np.linalg.norm(slew)])
    np.testing.assert_allclose(reached, [written[1].max_grad, written[1].max_slew], rtol=1e-3)


def test_phases_spoil(sequence: pp.Sequence) -> None:
    """Quadratic phase with 117 degrees; the receiver follows the pulse."""
    pulses, receivers = [], []
    for number in range(5, len(sequence.block_events) + 1):
        block = sequence.get_block(number)
        if block.rf is not None:
            pulses.append(block.rf.phase_offset)
        if block.adc is not None:
            receivers.append((block.adc.phase_offset, pulses[-1]))
    n = np.arange(22)
    expected = np.deg2rad(117.0) * n * (n + 1) / 2
    assert np.abs(np.exp(1j * np.array(pulses)) - np.exp(1j * expected)).max() < 1e-4
    assert len(receivers) == 60 and all(a == pytest.approx(b) for a, b in receivers)


def test_header_describes_the_full_grid(written: tuple[Path, SequenceFacts]) -> None:
    path, facts = written
    header = parse_header(path.with_suffix(".mrd.xml").read_text())
    encoding = header.encodings[0]
    assert encoding.trajectory == "cartesian"
    assert encoding.encoded_matrix == (5, 12, 32) and encoding.recon_matrix == (5, 12, 16)
    assert encoding.encoded_fov == pytest.approx((0.05, 0.12, 0.32)) and encoding.recon_fov[2] == pytest.approx(0.16)
    limits = {name: (v.minimum, v.maximum, v.center) for name, v in encoding.limits.items()}
    assert limits["kspace_encode_step_1"] == (0, 11, 6) and limits["kspace_encode_step_2"] == (0, 4, 2)
    assert limits["contrast"] == (0, 2, 0)
    assert header.echo_times == pytest.approx(facts.echo_times) and header.repetition_times == pytest.approx((0.02,))
    assert header.flip_angles == pytest.approx((SETTINGS.flip_angle,)) and header.field_strength == 3.0
    assert header.user_string == {"SamplingMask": "scan", "SamplingMaskSHA256": pattern_digest(MASK.mask)}
    assert encoding.acceleration == (3, 1)  # 60 positions, 20 samples


def test_a_sequence_without_its_header_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C, or a full disk, after the sequence and before its header."""
    path = tmp_path / "a.seq"
    write_sequence(path, MASK, SETTINGS)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert sorted(before) == ["a.mrd.xml", "a.seq"]

    def stopped(*_: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("gadgets.pulseq.header_text", stopped)
    with pytest.raises(KeyboardInterrupt):
        write_sequence(path, MASK, replace(SETTINGS, flip_angle=0.5))
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


@pytest.mark.parametrize("spacing", [3.385e-3, 3.345e-3, 3.384e-3])
def test_echoes_that_are_asked_for_at_equal_distances_have_them(spacing: float) -> None:
    """Also where half a step of the raster is to be rounded, up or down."""
    mask = np.repeat(MASK.mask[:1], 10, axis=0)
    echo_times = tuple(0.004 + spacing * n for n in range(10))
    settings = replace(SETTINGS, echo_times=echo_times, repetition_time=0.05, dummies=0)
    ordered = SamplingMask(mask, order=fan_beam_order(mask, 1).positions)
    found = np.diff(make_sequence(ordered, settings)[1].echo_times)
    assert np.ptp(found) < 1e-9 and abs(found[0] - spacing) < 5.1e-6


def test_older_file_format(tmp_path: Path) -> None:
    write_sequence(tmp_path / "a.seq", MASK, SETTINGS, mask_name="other", pulseq_1_4=True)
    text = (tmp_path / "a.seq").read_text()
    assert "major 1\nminor 4\nrevision 1" in text
    found = pp.Sequence(pp.Opts(rf_ringdown_time=30e-6, rf_dead_time=100e-6, adc_dead_time=10e-6))
    found.read(str(tmp_path / "a.seq"), detect_rf_use=True)
    assert found.check_timing()[0] and len(found.evaluate_labels(evolution="adc")["LIN"]) == 64
    assert parse_header((tmp_path / "a.mrd.xml").read_text()).user_string["SamplingMask"] == "other"


def test_definitions_tell_interpreters_where_the_centre_is(sequence: pp.Sequence) -> None:
    assert sequence.definitions["kSpaceCenterLine"] == 6 and sequence.definitions["kSpaceCenterPartition"] == 2
    np.testing.assert_allclose(sequence.definitions["FOV"], (0.16, 0.12, 0.05))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"echo_times": (0.0008, 0.005, 0.009)}, "before the first echo"),
        ({"echo_times": (0.004, 0.0043, 0.009)}, "after echo 0"),
        ({"repetition_time": 0.012}, "do not fit into TR"),
        ({"fov": (0.002, 0.002, 0.002)}, "slab gradient is too strong"),
    ],
)
def test_what_cannot_be_played_is_refused(tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(SequenceError, match=words):
        write_sequence(tmp_path / "a.seq", MASK, replace(SETTINGS, **change))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fov", (0.05, 0.0, 0.16)),
        ("fov", (0.05, float("nan"), 0.16)),
        ("echo_times", ()),
        ("repetition_time", float("inf")),
        ("field_strength", float("inf")),
        ("slab_thickness", 0.0),
        ("noise_readouts", -1),
    ],
)
def test_a_number_that_cannot_be_is_named(name: str, value: object) -> None:
    with pytest.raises(SettingError, match=rf"sequence\.{name}: must be .*; got {re.escape(str(value))}"):
        replace(SETTINGS, **{name: value})  # type: ignore[arg-type]


def test_settings_are_checked(tmp_path: Path) -> None:
    for change in (
        {"dwell": 8.05e-6},
        {"matrix_x": 15, "oversampling": 1},
        {"echo_times": (0.004, 0.003)},
        {"flip_angle": 0.0},
    ):
        with pytest.raises(SettingError):
            replace(SETTINGS, **change)
    with pytest.raises(SettingError, match="no order"):
        write_sequence(tmp_path / "a.seq", SamplingMask(MASK.mask), SETTINGS)
    with pytest.raises(SettingError, match="one echo time per echo"):
        write_sequence(tmp_path / "a.seq", MASK, replace(SETTINGS, echo_times=(0.004, 0.008)))
