"""PINQI's maps through the running server by a separate client: units, windows, geometry, truth, and what stands in for it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from gadgets.meta import read_meta
from gadgets.service import Service
from gadgets.wire.events import Image
from recon_core.simulation.tubes import PROTOCOL, compare_tubes
from tests.e2e.scans import SimulatedScan, ask, complaints, in_memory
from tests.e2e.semi_measured import synthetic_brain
from tests.strict_client import Answer

SMALL = {**PROTOCOL, "matrix_x": 96, "matrix_y": 96, "acceleration": 4.0, "coils": 6, "snr": 60.0}
BRAIN = {"mask": "random", "acceleration": 4.0, "acs": 16, "snr": 50.0}


@pytest.fixture(scope="module")
def tubes() -> SimulatedScan:
    """One slice of nine tubes, five delays, four-fold undersampled: nothing like a brain."""
    return in_memory("satrec", **SMALL)


def meta(image: Image) -> dict[str, tuple[str, ...]]:
    return read_meta(image.attributes)


def by_role(answer: Answer) -> dict[str, list[Image]]:
    found: dict[str, list[Image]] = {}
    for image in answer.images:
        found.setdefault(meta(image).get("GADGETRON_DataRole", ("",))[0], []).append(image)
    return found


def in_ms(image: Image) -> NDArray[np.float64]:
    """A T1 map in ms, NaN where it is empty."""
    m, pixels = meta(image), image.data[0].astype(float)
    shown = pixels * float(m["RescaleSlope"][0]) + float(m["RescaleIntercept"][0])
    return np.where(pixels == float(m["PixelPaddingValue"][0]), np.nan, shown)


def test_maps_arrive_with_units_windows_geometry_and_the_true_t1(service: Service) -> None:
    scan, batch = synthetic_brain(192, 1, **BRAIN)
    answer = ask(service, "pinqi_t1", scan)
    assert not complaints(answer)
    found = by_role(answer)
    assert {role: len(images) for role, images in found.items()} == {"Image": 5, "T1": 1, "T1SD": 1, "M0": 1, "M0_PHASE": 1}
    t1 = found["T1"][0]
    m = meta(t1)
    assert m["QuantityUnit"] == ("ms",) and (int(m["WindowCenter"][0]), int(m["WindowWidth"][0])) == (1600, 1600)
    assert any("weights" in text for text in m["ImageComment"])
    for name in ("position", "read_dir", "phase_dir", "slice_dir", "field_of_view", "matrix_size"):
        np.testing.assert_array_equal(t1.header[name], found["Image"][0].header[name], err_msg=name)
    brain = batch.brain[0].numpy()

    def error(answer: Answer) -> float:
        values, true = in_ms(by_role(answer)["T1"][0])[0][brain], 1e3 * batch.t1[0].numpy()[brain]
        assert np.isfinite(values).mean() > 0.98
        kept = np.isfinite(values)
        return float(np.linalg.norm(values[kept] - true[kept]) / np.linalg.norm(true[kept]))

    assert error(answer) < min(0.1, 1.05 * error(ask(service, "llr_t1", scan, map_model="saturation_recovery")))


def test_what_the_network_cannot_explain_is_answered_by_llr_with_a_fit(service: Service, tubes: SimulatedScan) -> None:
    """Whoever answers, the tubes are right; and nobody takes one for the other."""
    answer = ask(service, "pinqi_t1", tubes)
    found = by_role(answer)
    values = in_ms(found["T1"][0])[0] * 1e-3
    report = compare_tubes(np.nan_to_num(values), tubes.stream.truth.labels[0, 0, 0], np.isfinite(values))
    assert report.rms_deviation < 0.035 and np.abs(report.relative).max() < 0.07
    assert report.valid.min() > 0.95
    told = any("do not fit the measured data" in text and "llr" in text for text in complaints(answer))
    assert told == ("llr_instead_of_pinqi_t1" in meta(found["T1"][0])["SeriesDescriptionAdditional"][0])


@pytest.mark.parametrize(("change", "reason", "maps"), [
    ({"delays": "0.5,1,2,8"}, "trained for other delays", True),
    ({"delays": "0.5,1,1.5,2,6"}, "trained for other delays", True),
])  # fmt: skip
def test_a_scan_that_the_weights_do_not_know_is_answered_by_llr_with_a_fit(
    service: Service, change: dict[str, str], reason: str, maps: bool
) -> None:
    answer = ask(service, "pinqi_t1", in_memory("satrec", **{**SMALL, **change}))
    assert any(reason in text and "llr" in text for text in complaints(answer))
    found = by_role(answer)
    assert len(found["Image"]) == len(change["delays"].split(","))
    assert ("T1" in found) == maps
    for image in answer.images:  # nobody may take them for the network's
        m = meta(image)
        assert any("pinqi_t1 failed" in text for text in m["ImageComment"])
        assert "llr_instead_of_pinqi_t1" in m["SeriesDescriptionAdditional"][0]


def test_without_delay_times_the_images_come_and_the_reason_is_said(service: Service, tubes: SimulatedScan) -> None:
    header = tubes.header
    begin, end = header.index("<sequenceParameters>"), header.index("</sequenceParameters>") + len("</sequenceParameters>")
    bare = header[:begin] + header[end:]
    start, stop = bare.find("<userParameters>"), bare.find("</userParameters>") + len("</userParameters>")
    bare = bare if start < 0 else bare[:start] + bare[stop:]
    answer = ask(service, "pinqi_t1", tubes, header=bare)
    assert any("saturation times" in text for text in complaints(answer))
    found = by_role(answer)
    assert len(found["Image"]) == 5 and "T1" not in found
