"""Other people's programs read what we write; and what patients are called is written nowhere."""

from __future__ import annotations

import logging
import shutil
import socket
import struct
import subprocess
import threading
from pathlib import Path

import h5py
import ismrmrd
import numpy as np
import pytest

from gadgets.replay import replay
from gadgets.service import Service
from gadgets.wire import codec
from tests.e2e.scans import SimulatedScan, ask, encoded, error, simulated, stack
from tests.waiting import PATIENCE


@pytest.fixture(scope="module")
def scan(tmp_path_factory: pytest.TempPathFactory) -> SimulatedScan:
    """Oblique, so that geometry can be wrong."""
    return simulated(
        "cine", tmp_path_factory.mktemp("scan") / "scan.h5", matrix_x=48, matrix_y=64, coils=4, states=2, slices=2,
        orientation="oblique", offset_slice=0.03,
    )  # fmt: skip


def test_ismrmrd_python_reads_our_image_files(service: Service, scan: SimulatedScan, tmp_path: Path) -> None:
    out = tmp_path / "out.h5"
    result = replay(scan.path, port=service.port, config="cg_sense", out=out)
    expected = ask(service, "cg_sense", scan).images
    dataset = ismrmrd.Dataset(str(out), str(result.group), create_if_needed=False)
    (name,) = dataset.list()
    assert dataset.number_of_images(name) == 4
    read = [dataset.read_image(name, i) for i in range(4)]
    for image, ours in zip(read, expected, strict=True):
        np.testing.assert_array_equal(image.data, ours.data)
        assert image.matrix_size == tuple(int(n) for n in ours.header["matrix_size"])
        assert list(image.field_of_view) == ours.header["field_of_view"].tolist()
        for key in ("position", "read_dir", "phase_dir", "slice_dir"):
            assert list(getattr(image, key)) == ours.header[key].tolist()
        assert image.slice == ours.header["slice"] and image.phase == ours.header["phase"]
        assert image.image_type == ismrmrd.IMTYPE_MAGNITUDE
        meta = ismrmrd.Meta.deserialize(image.attribute_string)
        assert meta["DataRole"] == "Image" and meta["GADGETRON_DataRole"] == "Image"
        assert meta["SeriesDescriptionAdditional"] == "cg_sense"
        np.testing.assert_allclose([float(v) for v in meta["ImageRowDir"]], ours.header["read_dir"], atol=1e-6)
    dataset.close()


def test_ismrmrd_python_reads_our_messages(service: Service, scan: SimulatedScan) -> None:
    """Its own deserialiser on the bytes of the socket: images of all three pixel types."""
    parameters = codec.text('{"parameters": {"phase": "True", "complex": "True", "pixel_type": "uint16"}}')
    stream = codec.config_file("cg_sense") + codec.header(scan.header) + parameters + b"".join(scan.messages) + codec.close()
    with socket.create_connection((service.host, service.port), timeout=PATIENCE) as connection:
        sender = threading.Thread(target=connection.sendall, args=(stream,))
        sender.start()
        source = connection.makefile("rb")
        images: list[ismrmrd.Image] = []
        while True:
            (number,) = struct.unpack("<H", source.read(2))
            if number == 4:
                break
            if number == 5:
                source.read(struct.unpack("<I", source.read(4))[0])
                continue
            assert number == 1022
            images.append(ismrmrd.Image.deserialize_from(source.read))
        assert not source.read()
        sender.join()
    assert len(images) == 12
    kinds = {(image.image_type, image.data.dtype.name) for image in images}
    assert kinds == {
        (ismrmrd.IMTYPE_MAGNITUDE, "uint16"), (ismrmrd.IMTYPE_PHASE, "uint16"), (ismrmrd.IMTYPE_COMPLEX, "complex64")
    }  # fmt: skip
    assert all(image.data.shape == (1, 1, 64, 48) for image in images)
    assert all(ismrmrd.Meta.deserialize(image.attribute_string)["DataRole"] == "Image" for image in images)


def tool(name: str) -> str:
    path = shutil.which(name)
    assert path is not None, f"{name} is missing: install the Debian package ismrmrd-tools (see .ci/run)"
    return path


def test_ismrmrd_info_reads_our_raw_files(scan: SimulatedScan) -> None:
    done = subprocess.run([tool("ismrmrd_info"), scan.path], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "Dataset support: yes" in done.stdout


def test_ismrmrd_s_own_reconstruction_of_our_raw_files_agrees(service: Service, tmp_path: Path) -> None:
    """It knows neither noise nor several slices or states."""
    scan = simulated(
        "cine", tmp_path / "scan.h5", matrix_x=48, matrix_y=64, coils=4, states=1, noise_readouts=0, waveforms=False
    )
    command = [tool("ismrmrd_recon_cartesian_2d"), scan.path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert "Encoding Matrix Size        : [96, 64, 1]" in done.stdout
    assert "Number of Channels          : 4" in done.stdout
    with h5py.File(scan.path) as file:
        theirs = file["dataset/cpp/data"][0].astype(float)
    ours = stack(ask(service, "fourier", scan).images, 1)
    assert error(ours, theirs.reshape(ours.shape), np.ones((1, 1, 64, 48), bool)) < 1e-5


PATIENT = {
    "patientName": "Surname^Givenname",
    "patientWeight_kg": "73.25",
    "patientHeight_m": "1.7625",
    "patientID": "MRN-0815-4711",
    "patientBirthdate": "1957-03-29",
    "patientGender": "O",
}
STUDY = {
    "studyDate": "2031-02-28",
    "accessionNumber": "77001234",
    "referringPhysicianName": "Referrer^Doctor",
    "studyDescription": "privatestudywords",
    "studyInstanceUID": "1.2.826.0.1.3680043.99.1",
    "bodyPartExamined": "SECRETBODYPART",
}


@pytest.mark.parametrize("chain", ["cg_sense", "no_such_chain"])
@pytest.mark.parametrize("damage", ["none", "header", "readouts", "crash"])
def test_nothing_about_the_patient_is_logged(
    chain: str,
    damage: str,
    service: Service,
    scan: SimulatedScan,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In good scans, refused ones and those that meet a bug."""

    def section(name: str, values: dict[str, str]) -> str:
        return f"<{name}>" + "".join(f"<{key}>{value}</{key}>" for key, value in values.items()) + f"</{name}>"

    secret = section("subjectInformation", PATIENT) + section("studyInformation", STUDY)
    header = scan.header.replace("<measurementInformation>", secret + "<measurementInformation>", 1)
    header = header.replace("<patientPosition>", "<initialSeriesNumber>1</initialSeriesNumber><patientPosition>", 1)
    messages = scan.messages
    if damage == "header":
        header = header.replace("</encoding>", "", 1)
    elif damage == "readouts":
        headers, samples = scan.stream.batches[1]
        messages = [messages[0], *encoded([(headers, np.full_like(samples, np.nan))])]
    elif damage == "crash":

        def broken(*arguments: object, **options: object) -> None:
            raise ValueError(f"a bug that quotes {header}")

        monkeypatch.setattr("gadgets.pipeline.sort_readouts", broken)
    before = set(service.spool.captures())
    with caplog.at_level(logging.DEBUG):
        answer = ask(service, chain, scan, header=header, messages=messages)
        for thread in threading.enumerate():
            if thread.name.startswith("c0"):
                thread.join(PATIENCE)
    assert bool(answer.images) == (chain == "cg_sense" and damage == "none")
    sidecars = [path.with_suffix(".json").read_text() for path in set(service.spool.captures()) - before]
    assert sidecars
    logged = [record.getMessage() + (record.exc_text or "") + str(record.exc_info or "") for record in caplog.records]
    assert any("event=closed" in line for line in logged)
    said = answer.texts + [image.attributes for image in answer.images]
    for text in [*logged, *sidecars, *said]:
        # a gender is one letter, which says nothing about where it came from
        for word in [*PATIENT.values(), *STUDY.values()]:
            if len(word) > 1:
                assert word not in text
