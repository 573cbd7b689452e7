"""MRD images -> DICOM: values, places, names and structure against what is known, and the validator's verdict."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import sys
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import pydicom
import pytest
import typer
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.sr.coding import Code
from typer.testing import CliRunner

from gadgets.dicom import convert
from gadgets.dicom_cli import dicom
from gadgets.dicom_identity import DicomError, Identity, make_uid, read_header_text, read_identity
from gadgets.dicom_pixels import QUANTITIES, UNITS
from gadgets.errors import MissingExtra, SpoolError
from gadgets.geometry import pixel_to_patient
from gadgets.image_file import ImageFile, read_images
from gadgets.pacs import Destination
from gadgets.results import Archives, queue_images
from gadgets.wire import codec
from gadgets.wire.events import Image
from tests.gadgets.dicom_scan import PATIENT, PATIENT_ID, header_text, scan

DATA = Path(__file__).parent.parent / "data" / "gadgetron-reference"
CONSOLE = {"T1": 1e3, "T1SD": 1e3, "R2*": 1.0, "chi": 1e3, "field": 1.0}
"""SI unit -> the unit that viewers show."""
CODED = {
    "T1": ("ms", 1e3),
    "T1SD": ("ms", 1e3),
    "R2*": ("/s", 1.0),
    "chi": ("ppm", 1.0),
    "field": ("Hz", 1.0),
    "M0": ("[arb'U]", 1.0),
}
ROLE = {"T1": "T1", "T1SD": "T1SD", "R2*": "R2STAR", "chi": "QSM", "M0": "M0", "field": "FREQMAP"}


def by_series(folder: Path) -> dict[str, list[Dataset]]:
    found = defaultdict(list)
    for path in sorted(folder.rglob("*.dcm")):
        dataset = pydicom.dcmread(path)
        found[str(dataset.SeriesDescription).split()[0]].append(dataset)
    return found


def real_world(dataset: Dataset) -> tuple[NDArray[np.float64], float]:
    """What the mapping says, and its step. It holds for all pixels with a value and, of a map, for no other."""
    mapping = dataset.RealWorldValueMappingSequence[0]
    mapped = dataset.pixel_array >= mapping.RealWorldValueFirstValueMapped
    assert (mapped == (dataset.pixel_array != dataset.get("PixelPaddingValue", -1))).all()
    assert mapping.RealWorldValueLastValueMapped >= dataset.pixel_array.max()
    return dataset.pixel_array * mapping.RealWorldValueSlope + mapping.RealWorldValueIntercept, mapping.RealWorldValueSlope


@pytest.mark.parametrize("integers", [True, False])
def test_values_are_within_half_a_step(tmp_path: Path, integers: bool) -> None:
    """Also where the slice that was sent first has no value, and so no scale of its own."""
    known = scan(integers=integers, empty=1)
    convert(known.write(tmp_path / "images.h5"), tmp_path / "out", header=known.header)
    series = by_series(tmp_path / "out")

    magnitudes = np.abs(known.images).reshape(-1, 24, 40)
    for truth, dataset in zip(magnitudes, series["llr_t1"], strict=True):
        values, step = real_world(dataset)
        assert np.abs(values - truth).max() <= 0.5001 * step
        assert "RescaleSlope" not in dataset and step < magnitudes.max() / 500
    for truth, dataset in zip(known.images.reshape(-1, 24, 40), series["llr_t1_phase"], strict=True):
        values, step = real_world(dataset)
        assert np.abs(np.angle(np.exp(1j * (values - np.angle(truth))))).max() <= 0.5001 * step
    for name, (unit, factor) in CODED.items():
        for truth, dataset in zip(known.maps[name][:, 0], series[f"llr_t1_{ROLE[name]}"], strict=True):
            shown = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
            valid = truth != 0
            if name in CONSOLE:
                assert np.abs(shown - truth * CONSOLE[name])[valid].max(initial=0) <= 0.505 * dataset.RescaleSlope
            assert (dataset.pixel_array[~valid] == dataset.PixelPaddingValue).all()
            values, step = real_world(dataset)
            assert np.abs(values - truth * factor)[valid].max(initial=0) <= 0.505 * step
            assert step < np.ptp(known.maps[name] * factor) / 200
            assert dataset.RealWorldValueMappingSequence[0].MeasurementUnitsCodeSequence[0].CodeValue == unit


@pytest.mark.parametrize(("planes", "slices"), [(1, 2), (3, 1)])
def test_every_pixel_lies_where_the_mrd_header_says(tmp_path: Path, planes: int, slices: int) -> None:
    known = scan(planes=planes, slices=slices, states=1, maps=("T1",))
    source = known.write(tmp_path / "images.h5")
    convert(source, tmp_path / "out", header=known.header)
    datasets = {
        (int(d.SeriesNumber) - 300, int(d.InstanceNumber)): d for s in by_series(tmp_path / "out").values() for d in s
    }
    corners = np.array([(0, 0), (39, 0), (0, 23), (39, 23), (19.5, 11.5)])
    n = 0
    for image in read_images(source):
        for z in range(planes):
            instance = (int(image.header["image_index"]) - 1) * planes + z + 1
            dataset = datasets[int(image.header["image_series_index"]), instance]
            # DICOM PS3.3 equation C.7.6.2.1-1
            row, column = np.array(dataset.ImageOrientationPatient, float).reshape(2, 3)
            dy, dx = (float(v) for v in dataset.PixelSpacing)
            points = np.array(dataset.ImagePositionPatient, float) + corners[:, :1] * dx * row + corners[:, 1:] * dy * column
            expected = pixel_to_patient(image.header, [(x, y, z) for x, y in corners])
            assert np.abs(points - expected).max() < 1e-4
            assert float(dataset.SliceThickness) == pytest.approx(6.0)
            n += 1
    assert n == len(datasets)
    if planes == 1:  # and, without any of our functions: the middle of the image is the header's position
        centre = np.array(dataset.ImagePositionPatient, float) + 19.5 * dx * row + 11.5 * dy * column
        assert np.abs(centre - image.header["position"]).max() < 1e-4
        assert (dx, dy) == (7.5, 5.0)


def test_a_turned_image_lies_as_its_attributes_say(tmp_path: Path) -> None:
    known = scan(maps=(), slices=1, states=1)
    source = known.events[0]
    text = source.attributes
    for key, direction in (("ImageRowDir", "0 -1 0"), ("ImageColumnDir", "-1 0 0"), ("ImageSliceDir", "0 0 1")):
        start = text.index(f"<name>{key}</name>")
        end = text.index("</meta>", start)
        values = "".join(f"<value>{v}</value>" for v in direction.split())
        text = text[:start] + f"<name>{key}</name>{values}" + text[end:]
    known.events[:] = [Image(0, source.header, text, source.data)]
    convert(known.write(tmp_path / "images.h5"), tmp_path / "out", header=known.header)
    dataset = by_series(tmp_path / "out")["llr_t1"][0]
    assert [float(v) for v in dataset.ImageOrientationPatient] == [0, -1, 0, -1, 0, 0]
    centre = np.array(dataset.ImagePositionPatient, float) + np.array([-11.5 * 5.0, -19.5 * 7.5, 0])
    assert np.abs(centre - source.header["position"]).max() < 1e-4


def test_units_and_quantities_are_the_standards_own() -> None:
    units, quantities = (
        {code.value: code.meaning for code in (getattr(group, name) for name in dir(group)) if isinstance(code, Code)}
        for group in (codes.cid7181, codes.cid7180)
    )
    for (value, scheme, meaning), _ in UNITS.values():
        assert scheme == "UCUM" and (value == "rad" or units[value] == meaning)
    for value, scheme, meaning in QUANTITIES.values():
        assert scheme == "DCM" and quantities[value] == meaning


def test_the_validator_finds_no_error(tmp_path: Path) -> None:
    validator = shutil.which("dciodvfy")
    assert validator, "dciodvfy is missing: apt-get install dicom3tools"
    for integers in (True, False):
        known = scan(integers=integers, slices=1, states=1)
        folder = tmp_path / str(integers)
        made = convert(known.write(tmp_path / f"{integers}.h5"), folder, header=known.header, parametric_maps=True)
        assert len({path.parent for path in made.files}) == 2 + 2 * len(known.maps)
        for path in made.files:
            done = subprocess.run([validator, str(path)], capture_output=True, text=True, check=False)
            said = (done.stdout + done.stderr).splitlines()
            assert said and not [line for line in said if line.startswith("Error")], "\n".join(said)


@pytest.mark.parametrize(("name", "signed", "factor"), [("chi", False, 1), ("chi", True, 1), ("T1SD", False, 1e3)])
def test_a_parametric_map_says_the_same_as_the_classic_images(
    tmp_path: Path, name: str, signed: bool, factor: float
) -> None:
    known = scan(maps=(name,), integers=True, states=1)
    if signed:  # as other programs store susceptibilities
        known.events[:] = [centred(event) if "Quantitative" in event.attributes else event for event in known.events]
    convert(known.write(tmp_path / "images.h5"), tmp_path / "out", header=known.header, parametric_maps=True)
    (path,) = (tmp_path / "out").glob("*_parametric_map/*.dcm")
    made = pydicom.dcmread(path)
    mapping = made.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence[0]
    quantities = [item.ConceptCodeSequence[0].CodeMeaning for item in mapping.QuantityDefinitionSequence]
    assert quantities == (["T1", "Standard Deviation"] if name == "T1SD" else ["Magnetic Susceptibility"])
    # frames are in the order of their places, not of their instance numbers
    classic = {
        tuple(d.ImagePositionPatient): int(d.InstanceNumber)
        for d in by_series(tmp_path / "out")[f"llr_t1_{ROLE[name]}"]
        if "NumberOfFrames" not in d
    }
    places = [tuple(f.PlanePositionSequence[0].ImagePositionPatient) for f in made.PerFrameFunctionalGroupsSequence]
    truth = factor * np.stack([known.maps[name][classic[place] - 1, 0] for place in places])
    values = made.pixel_array * mapping.RealWorldValueSlope + mapping.RealWorldValueIntercept
    assert np.abs(values - truth)[truth != 0].max() <= 0.5001 * mapping.RealWorldValueSlope
    assert made.PatientName == PATIENT and int(made.NumberOfFrames) == 2 == len(set(places))


def centred(image: Image) -> Image:
    """The same map in signed codes, whose zero is the value zero."""
    header = image.header.copy()
    header["data_type"] = 2
    text = re.sub(
        "<name>(RescaleIntercept|GADGETRON_ScaleOffset|PixelPaddingValue)</name>", "<name>was</name>", image.attributes
    )
    return Image(0, header, text, (image.data.astype(np.int32) - 2048).astype("<i2"))


def test_a_map_that_cannot_be_a_parametric_map_costs_no_other_image(tmp_path: Path) -> None:
    known = scan(maps=("T1",), slices=1, states=1)
    images, (map_,) = known.events[:-1], known.events[-1:]
    again, unscaled, other = map_.header.copy(), map_.header.copy(), map_.header.copy()
    again["image_index"], again["repetition"] = 2, 1
    unscaled["image_series_index"], other["image_series_index"] = 21, 22
    nameless = re.sub("<name>(RescaleSlope|GADGETRON_ScaleRatio)</name>", "<name>was</name>", map_.attributes)
    doubled = map_.attributes.replace(
        "<name>RescaleSlope</name>\n\t\t<value>1.0", "<name>RescaleSlope</name>\n\t\t<value>2.0"
    )
    further = other.copy()
    further["image_index"], further["position"] = 2, map_.header["position"] + 8
    known.events[:] = [*images, map_, Image(0, again, map_.attributes, map_.data), Image(0, unscaled, nameless, map_.data)]
    known.events += [Image(0, other, map_.attributes, map_.data), Image(0, further, doubled, map_.data)]
    made = convert(known.write(tmp_path / "images.h5"), tmp_path / "out", header=known.header, parametric_maps=True)
    assert len(made.files) == len(known.events)
    whys = ("several images at one place", "not a map", "images differ in scaling")
    assert [why in said for why, said in zip(whys, made.unmade, strict=True)] == [True, True, True]
    # classic images have a slope of their own
    slopes = [pydicom.dcmread(path).RescaleSlope for path in made.files if "0322_" in str(path)]
    assert slopes == [1, 2]


def test_what_stands_in_says_so_in_every_object(tmp_path: Path) -> None:
    """Images and maps, classic and Parametric Map; and whole scans that nothing stood in for say nothing."""
    for asked, chain in (("llr_t1", "llr_t1"), ("moe_dqinr_t1", "llr_t1")):
        known = scan(maps=("T1",), asked=asked)
        convert(known.write(tmp_path / f"{asked}.h5"), tmp_path / asked, header=known.header, parametric_maps=True)
        objects = [pydicom.dcmread(path) for path in sorted((tmp_path / asked).rglob("*.dcm"))]
        assert sum("NumberOfFrames" in one for one in objects) == 1 and len(objects) == 11
        for one in objects:
            said = f"{asked} failed: image from {chain} instead" in one.get("ImageComments", "")
            assert said == ("instead_of" in one.SeriesDescription) == (asked != chain)
            assert one.SeriesDescription.startswith(chain if asked == chain else f"{chain}_instead_of_{asked}")


def test_patient_study_and_series_come_from_the_header(tmp_path: Path) -> None:
    known = scan(slices=3)
    made = convert(known.write(tmp_path / "images.h5"), tmp_path / "out", header=known.header)
    datasets = [pydicom.dcmread(path) for path in made.files]
    for dataset in datasets:
        assert (dataset.PatientName, dataset.PatientID, dataset.PatientBirthDate) == (PATIENT, PATIENT_ID, "19700203")
        assert (dataset.PatientSex, dataset.PatientWeight, dataset.PatientPosition) == ("F", 61.5, "HFS")
        assert (dataset.StudyInstanceUID, dataset.StudyDate, dataset.AccessionNumber) == ("1.2.840.99.1", "20260102", "A77")
        assert (dataset.MagneticFieldStrength, dataset.FlipAngle, dataset.RepetitionTime) == (2.89, 30, 3.1)
        assert dataset.ImagingFrequency == 123.2
    assert len({d.FrameOfReferenceUID for d in datasets}) == 1
    assert len({d.SOPInstanceUID for d in datasets}) == len(datasets)
    for series in by_series(tmp_path / "out").values():
        assert len({d.SeriesInstanceUID for d in series}) == len({d.SeriesNumber for d in series}) == 1
        assert [int(d.InstanceNumber) for d in series] == list(range(1, len(series) + 1))
    cine = by_series(tmp_path / "out")["llr_t1"]
    assert [int(d.TemporalPositionIdentifier) for d in cine] == [1, 2] * 3
    assert [float(d.InversionTime) for d in cine] == [100, 180] * 3
    assert list(cine[0].ScanningSequence) == ["IR", "GR"] and cine[0].EchoTime == 1.5
    again = [Image(0, e.header.copy(), e.attributes, e.data) for e in known.events if e.header["image_series_index"] == 1]
    for image in again:  # a second repetition of all phases
        image.header["repetition"], image.header["image_index"] = 1, image.header["image_index"] + 6
    known.events[:] = [e for e in known.events if e.header["image_series_index"] == 1] + again
    convert(known.write(tmp_path / "twice.h5"), tmp_path / "twice", header=known.header)
    twice = by_series(tmp_path / "twice")["llr_t1"]
    assert [int(d.TemporalPositionIdentifier) for d in twice] == [1, 2] * 3 + [3, 4] * 3
    assert twice[0].NumberOfTemporalPositions == 4
    t1 = by_series(tmp_path / "out")["llr_t1_T1"][0]
    assert list(t1.ImageType) == ["DERIVED", "PRIMARY", "T1 MAP", "T1"]
    assert (t1.WindowCenter, t1.WindowWidth, t1.RescaleType) == (1600, 1600, "US")


def test_images_of_a_saturation_recovery_name_their_delays_and_no_echo_is_guessed(tmp_path: Path) -> None:
    known = scan(times="saturation_times", maps=())
    several = known.header.replace("<TE>1.5</TE>", "<TE>1.5</TE><TE>4</TE>")  # the images are of none of them alone
    convert(known.write(tmp_path / "images.h5"), tmp_path / "out", header=several)
    images = by_series(tmp_path / "out")["llr_t1"]
    assert [one.ImageComments for one in images] == [f"llr_t1; {delay} ms after saturation" for delay in (100, 180)] * 2
    assert all("InversionTime" not in one and one.EchoTime is None for one in images)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("Yamada^Tarou=山田^太郎=やまだ^たろう", "Yamada^Tarou=山田^太郎=やまだ^たろう"),
        ("=山田^太郎", "=山田^太郎"),  # no alphabetic group
        ("Müller^Jürgen^^Dr.", "Müller^Jürgen^^Dr."),
        ("Ong==", "Ong"),
        ("==", None),
    ],
)
def test_names_keep_their_letters_and_groups(name: str, kept: str | None) -> None:
    assert read_identity(header_text((1, 24, 40), name=name)).patient.get("PatientName") == kept


@pytest.mark.parametrize(
    ("study", "series", "offset"),
    [
        ("", "", None),
        ("Z", "", None),
        ("Z", "Z", "+0000"),
        ("-05:30", "-05:30", "-0530"),
        ("Z", "+01:00", None),
        ("-00:00", None, "+0000"),
    ],
)
def test_times_keep_their_zone(study: str, series: str | None, offset: str | None) -> None:
    """One for all of them, as DICOM has it; none where they disagree."""
    text = header_text((1, 24, 40)).replace("10:11:12", f"10:11:12{study}")
    if series is not None:
        text = text.replace("<patientPosition>", f"<seriesTime>10:20:30.5{series}</seriesTime><patientPosition>")
    identity = read_identity(text)
    assert identity.study["StudyTime"] == "101112" and identity.study.get("TimezoneOffsetFromUTC") == offset
    assert identity.series.get("SeriesTime") == (None if series is None else "102030.5")


def test_numbers_that_are_too_long_are_left_out_and_not_cut() -> None:
    """The beginning of an order's number may be another order's."""
    text = header_text((1, 24, 40)).replace("A77", "A7700000000000001").replace(PATIENT_ID, 65 * "7")
    identity = read_identity(text)
    assert "AccessionNumber" not in identity.study and "PatientID" not in identity.patient
    assert identity.left_out == ("PatientID", "AccessionNumber")
    assert (
        read_identity(text.replace("A7700000000000001", "A770000000000001")).study["AccessionNumber"] == "A770000000000001"
    )


def test_the_same_images_give_the_same_files_and_others_do_not(tmp_path: Path) -> None:
    known, other = scan(), scan(seed=1)
    for name, one in (("a", known), ("b", known), ("c", other)):
        convert(one.write(tmp_path / f"{name}.h5"), tmp_path / name, header=known.header)
    first, again, different = (
        {p.relative_to(tmp_path / n): p.read_bytes() for p in (tmp_path / n).rglob("*.dcm")} for n in "abc"
    )
    assert first == again
    uids = [{pydicom.dcmread(p).SeriesInstanceUID for p in (tmp_path / n).rglob("*.dcm")} for n in "ac"]
    assert len(different) == len(first) and not uids[0] & uids[1]


def test_two_patients_do_not_share_a_study_for_want_of_its_uid(tmp_path: Path) -> None:
    """Some converters give every measurement the same id; a frame of reference, or a moment, tells them apart."""
    known = scan(maps=())
    bare = re.sub("<studyInstanceUID>.*?</studyInstanceUID>", "", known.header)
    timeless = re.sub("<study(Date|Time)>.*?</study(Date|Time)>", "", bare)
    framed = "<frameOfReferenceUID>1.2.{}</frameOfReferenceUID><protocolName>"
    headers = {
        "at 10": bare,
        "at 10 again": bare,
        "at 11": bare.replace("10:11:12", "11:11:12"),
        "there": timeless.replace("<protocolName>", framed.format(3)),
        "elsewhere": timeless.replace("<protocolName>", framed.format(4)),
        "nowhere": timeless,
    }
    studies = {}
    for name, header in headers.items():
        made = convert(known.write(tmp_path / f"{name}.h5"), tmp_path / name, header=header)
        (studies[name],) = {pydicom.dcmread(path).StudyInstanceUID for path in made.files}
    other = convert(scan(maps=(), seed=1).write(tmp_path / "other.h5"), tmp_path / "other", header=timeless)
    studies["nobody knows"] = pydicom.dcmread(other.files[0]).StudyInstanceUID
    assert studies["at 10"] == studies.pop("at 10 again")
    assert len(set(studies.values())) == len(studies)


def test_without_a_header_the_patient_is_empty(tmp_path: Path) -> None:
    made = convert(scan(maps=()).write(tmp_path / "images.h5"), tmp_path / "out")
    dataset = pydicom.dcmread(made.files[0])
    assert dataset.PatientName == "" and dataset.PatientID == "" and dataset.StudyDate == ""
    assert made.notes and dataset.StudyInstanceUID.startswith("2.25.")


def converted(source: Path, out: Path) -> tuple[set[str], str]:
    """``recon dicom`` without ``--header``: UIDs of the objects, and what was said on stderr."""
    app = typer.Typer()
    app.command()(dicom)
    done = CliRunner().invoke(app, [str(source), "-o", str(out)], catch_exceptions=False)
    assert done.exit_code == 0
    return uids_below(out), done.stderr


def uids_below(folder: Path) -> set[str]:
    return {str(pydicom.dcmread(path).SOPInstanceUID) for path in folder.rglob("*.dcm")}


@pytest.mark.parametrize("place", ["", "r1", "r12"])
def test_images_of_a_job_s_folder_are_those_of_its_patient(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is made by hand and what the server sent by itself are the same objects."""
    known = scan(maps=())
    capture, folder = tmp_path / "20260102T101112.5Z-0a.mrd", tmp_path / "20260102T101112.5Z-0a.job" / place
    capture.write_bytes(codec.config_file("llr_t1.xml") + codec.header(known.header) + codec.close())
    folder.mkdir(parents=True)
    known.write(folder / "images.h5")
    assert queue_images(
        folder, capture, Archives((Destination("127.0.0.1", 104, "PACS"),), tmp_path / "pacs"), "scan"
    ).queued
    monkeypatch.chdir(folder)
    made, said = converted(Path("images.h5"), tmp_path / "out")
    assert made == uids_below(tmp_path / "pacs") and len(made) == len(known.events)
    assert pydicom.dcmread(next((tmp_path / "out").rglob("*.dcm"))).PatientID == PATIENT_ID
    assert f"patient and study from {capture}" in said and "EMPTY" not in said and PATIENT_ID not in said


def test_it_is_said_when_nobody_can_tell_whose_images_these_are(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Copied out of the job's folder; or the capture has gone; or it names no patient."""
    known = scan(maps=())
    folder = tmp_path / "a.job"
    folder.mkdir()
    known.write(folder / "images.h5")
    shutil.copy(folder / "images.h5", tmp_path / "copy.h5")
    _, said = converted(tmp_path / "copy.h5", tmp_path / "copied")
    assert "EMPTY" in said and "--header CAPTURE.mrd" in said
    _, said = converted(folder / "images.h5", tmp_path / "gone")
    assert "not there any more" in said and "a.mrd" in said and "EMPTY" in said
    nameless = re.sub("<subjectInformation>.*</subjectInformation>", "", known.header)
    (tmp_path / "a.mrd").write_bytes(codec.config_file("llr_t1.xml") + codec.header(nameless) + codec.close())
    _, said = converted(folder / "images.h5", tmp_path / "nameless")
    assert "patient and study from" in said and "the MRD header names no patient" in said
    archives = Archives((Destination("127.0.0.1", 104, "PACS"),), tmp_path / "pacs")
    assert queue_images(folder, tmp_path / "a.mrd", archives, "scan-1").queued
    assert f"event=archive_without_patient job=scan-1 objects={len(known.events)}" in caplog.text


def test_a_capture_beside_that_is_none_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.job").mkdir()
    source = scan(maps=()).write(tmp_path / "a.job" / "images.h5")
    (tmp_path / "a.mrd").write_bytes(b"nonsense")
    with pytest.raises(SpoolError, match=r"a\.mrd: .*capture of a session"):
        converted(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_nothing_of_the_patient_is_said_anywhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = "Secret\\Name" + 30 * "^x" + "\t" + 80 * "y"
    header = header_text((1, 24, 40), name=secret, study_uid="1.02.not-a-uid").replace("1970-02-03", "1970-02-31")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # pydicom would repeat a bad value in a warning
        made = convert(scan(maps=()).write(tmp_path / "images.h5"), tmp_path / "out", header=header)
        dataset = pydicom.dcmread(made.files[0])
        name = str(dataset.PatientName)
    assert "\\" not in name and len(name) <= 64 and name.startswith("Secret Name")
    assert dataset.PatientBirthDate == "" and dataset.StudyInstanceUID.startswith("2.25.")
    assert made.notes == (
        "left out, because DICOM cannot hold what the MRD header says: PatientBirthDate, StudyInstanceUID",
    )
    told = caplog.text + " ".join(str(p.relative_to(tmp_path)) for p in made.files) + repr(read_identity(header))
    assert "Secret" not in told and PATIENT_ID not in told
    assert "event=dicom_written" in caplog.text


def test_previews_are_left_out_unless_wanted(tmp_path: Path) -> None:
    known, preview = scan(maps=()), scan(maps=(), preview=True)
    known.events += preview.events
    source = known.write(tmp_path / "images.h5")
    assert len(convert(source, tmp_path / "final").files) == len(preview.events)
    both = convert(source, tmp_path / "both", previews=True)
    types = [list(pydicom.dcmread(p).ImageType) for p in both.files]
    assert sum(t[-1] == "PREVIEW" for t in types) == len(preview.events) == len(types) // 2


def test_complex_images_become_magnitude_and_phase(tmp_path: Path) -> None:
    known = scan(maps=(), slices=1, states=1)
    source = known.events[0]
    header = source.header.copy()
    header["data_type"], header["image_type"] = 7, 5
    known.events[:] = [Image(0, header, "", known.images[0, 0][None])]
    convert(known.write(tmp_path / "images.h5"), tmp_path / "out")
    series = by_series(tmp_path / "out")
    magnitude, step = real_world(series["images"][0])
    phase, _ = real_world(series["images_phase"][0])
    truth = known.images[0, 0, 0]
    error = np.abs(magnitude * np.exp(1j * phase) - truth)
    assert error.max() <= 0.51 * step + np.abs(truth).max() * np.pi / 4096


def test_files_of_the_real_client_are_converted(tmp_path: Path) -> None:
    text = read_header_text(DATA / "shepp_logan_raw.h5")
    made = convert(DATA / "gadgetron_default_images.h5", tmp_path / "out", header=text)
    truth = [image.data[0, 0] for image in read_images(DATA / "gadgetron_default_images.h5")]
    for path, pixels in zip(made.files, truth, strict=True):
        values, step = real_world(pydicom.dcmread(path))
        assert np.abs(values - pixels).max() <= 0.5001 * step


def test_the_header_is_found_in_raw_files_captures_and_xml(tmp_path: Path) -> None:
    text = header_text((1, 24, 40))
    (tmp_path / "header.xml").write_text(text, encoding="utf-8")
    (tmp_path / "capture.mrd").write_bytes(codec.config_file("llr.xml") + codec.header(text) + codec.close())
    assert read_header_text(tmp_path / "header.xml") == read_header_text(tmp_path / "capture.mrd") == text
    assert "<ismrmrdHeader" in read_header_text(DATA / "shepp_logan_raw.h5")


def test_what_cannot_be_converted_is_said_and_leaves_nothing_behind(tmp_path: Path) -> None:
    known = scan(maps=(), slices=1, states=1)
    source = known.write(tmp_path / "images.h5")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(DicomError, match="in use"):
        convert(source, tmp_path / "used")
    known.write(source, "second")
    with pytest.raises(DicomError, match="images, second"):
        convert(source, tmp_path / "out")
    with pytest.raises(DicomError, match=r"no images in this file.*recon run"):
        convert(DATA / "shepp_logan_raw.h5", tmp_path / "out")
    assert convert(source, tmp_path / "one", group="second").files
    with ImageFile(tmp_path / "colour.h5") as file:
        header = known.events[0].header.copy()
        header["channels"], header["data_type"] = 3, 1
        file.append(Image(0, header, "", np.zeros((3, 1, 24, 40), np.uint16)))
    with pytest.raises(DicomError, match="3 channels"):
        convert(tmp_path / "colour.h5", tmp_path / "out")
    broken = known.events[0].header.copy()
    broken["field_of_view"] = (300, 0, 6)
    known.events[:] = [Image(0, broken, known.events[0].attributes, known.events[0].data)]
    with pytest.raises(DicomError, match="field of view"):
        convert(known.write(tmp_path / "flat.h5"), tmp_path / "out")
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_uids_are_valid_and_depend_on_their_parts_alone() -> None:
    uid = make_uid("series", 1, "a")
    assert pydicom.uid.UID(uid).is_valid and uid == make_uid("series", 1, "a") != make_uid("series", 1, "b")
    assert "about the patient" in repr(Identity())


def test_a_missing_package_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = scan(slices=1, states=1).write(tmp_path / "images.h5")
    monkeypatch.setitem(sys.modules, "highdicom", None)
    monkeypatch.delitem(sys.modules, "gadgets.parametric_map", raising=False)
    app = typer.Typer()
    app.command()(dicom)
    arguments = [str(source), "--parametric-maps", "-o", str(tmp_path / "out")]
    with pytest.raises(MissingExtra, match=r"highdicom.*recon-gadgets\[dicom\]"):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert not (tmp_path / "out").exists()
