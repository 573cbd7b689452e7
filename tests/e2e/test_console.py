"""What a console sends and what it gets: parameters by id and as text, answers that say what was chosen, and words with their level."""

from __future__ import annotations

import json
import logging
import socket
import struct
from collections.abc import Mapping

import numpy as np
import pytest

from gadgets.manifest import manifest
from gadgets.manifest_formats import fire_json, gadgetron_xml
from gadgets.openrecon_forward import Forwarder
from gadgets.service import Service
from gadgets.wire import codec
from gadgets.wire.session import fire_parameters
from tests.e2e.scans import SimulatedScan, ask, encoded, in_memory
from tests.e2e.test_failures import changed, values, without_signal_in
from tests.strict_client import Answer, StrictClient
from tests.waiting import PATIENCE

LEVELS = ("DBG ", "INF ", "WRN ", "ERROR ")


@pytest.fixture(scope="module")
def scan() -> SimulatedScan:
    """Fully sampled, two slices, separate calibration lines, more coils than some settings keep."""
    return in_memory("cine", matrix_x=32, matrix_y=32, coils=6, states=1, slices=2, calibration="separate", acs=16)


def by_parameters(service: Service, scan: SimulatedScan, chain: str, parameters: Mapping[str, object]) -> Answer:
    client = StrictClient(service.host, service.port, dialect="fire")
    return client.scan("openrecon", header=scan.header, messages=scan.messages, parameters={"config": chain, **parameters})


def same(first: Answer, second: Answer) -> None:
    assert len(first.images) == len(second.images) > 0
    for a, b in zip(first.images, second.images, strict=True):
        assert a.attributes == b.attributes
        np.testing.assert_array_equal(a.data, b.data)


def comments(answer: Answer) -> set[str]:
    return {comment for image in answer.images for comment in values(image.attributes, "ImageComments")}


def test_the_same_values_in_every_writing_give_the_same_images(service: Service, scan: SimulatedScan) -> None:
    """By console id and by name, as text and typed, in the parameters, in a JSON configuration, in Gadgetron's XML."""
    asked = by_parameters(service, scan, "cg_sense", {"virtualCoils": "4", "iterations": "5.0", "prewhiten": "False"})
    same(asked, by_parameters(service, scan, "cg_sense", {"virtual_coils": 4, "iterations": 5, "prewhiten": False}))
    client = StrictClient(service.host, service.port, dialect="fire")
    text = json.dumps(
        {"version": "1.1.0", "parameters": {"config": "cg_sense", "virtualCoils": 4, "iterations": "5", "prewhiten": "0"}}
    )
    same(asked, client.scan(script=text, header=scan.header, messages=scan.messages))
    same(asked, client.scan(text, header=scan.header, messages=scan.messages))
    xml = gadgetron_xml(manifest("cg_sense"))
    for name, value in {"virtual_coils": "4", "iterations": "5", "prewhiten": "False"}.items():
        start = xml.index(f'name="{name}" value="') + len(f'name="{name}" value="')
        xml = xml[:start] + value + xml[xml.index('"', start) :]
    same(asked, client.scan(script=xml, header=scan.header, messages=scan.messages))
    # and they do something
    plain = ask(service, "cg_sense", scan)
    assert not all(np.array_equal(a.data, b.data) for a, b in zip(asked.images, plain.images, strict=True))


def test_what_was_chosen_is_in_every_image_and_in_the_log(
    service: Service, scan: SimulatedScan, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="gadgets.pipeline"):
        asked = by_parameters(service, scan, "cg_sense", {"virtualCoils": "4", "iterations": "30", "phase": "True"})
    chosen = "phase=True, virtual_coils=4"  # 30 iterations are the default: nothing to tell
    assert all(chosen in values(image.attributes, "ImageComments") for image in asked.images)
    assert all(chosen in values(image.attributes, "GADGETRON_ImageComment") for image in asked.images)
    assert any(
        "event=settings chain=cg_sense" in r.getMessage() and "'virtual_coils': '4'" in r.getMessage()
        for r in caplog.records
    )


def test_the_defaults_of_a_console_are_no_choice(service: Service, scan: SimulatedScan) -> None:
    parameters = fire_parameters(fire_json(manifest("cg_sense"))) or {}
    answer = by_parameters(service, scan, "cg_sense", parameters)
    same(answer, ask(service, "cg_sense", scan))
    assert not any("=" in comment for comment in comments(answer))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"virtualCoils": "-3"}, "virtual_coils: out of range; got -3; expected 1 to 128"),
        ({"virtualCoils": "many"}, "virtual_coils: not a valid value; got 'many'; expected a whole number, 1 to 128"),
        ({"phase": "perhaps"}, "phase: not a valid value"),
        ({"partialFourier": "magic"}, "expected one of zero_fill, homodyne, pocs"),
        ({"noSuchThing": "1"}, "unknown setting; got noSuchThing"),
        ({"virtualCoils": [1]}, "'virtualCoils' has no simple value"),
        ({"virtualCoils": None}, "'virtualCoils' has no simple value"),
        ({"config": "no_such_chain"}, "no such chain"),
    ],
)
def test_a_bad_parameter_is_an_error_on_the_console(
    service: Service, scan: SimulatedScan, parameters: dict[str, object], words: str
) -> None:
    answer = by_parameters(service, scan, "cg_sense", parameters)
    assert not answer.images
    (text,) = answer.texts
    assert text.startswith("ERROR ") and words in text


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('{"version": "1.1.0", "parameters": {"virtualCoils": 4}}', "name no chain"),
        ('{"version": "1.1.0", "parameters": ["cg_sense"]}', "no table"),
        ('{"version": "1.1.0"}', "neither a chain name nor a configuration"),
        ('{"parameters": {"config": "cg_sense"', "neither a chain name nor a configuration"),
        ('{"parameters": {"config": "../../etc/passwd"}}', "no such chain"),
    ],
)
def test_a_json_configuration_that_cannot_be_used(service: Service, scan: SimulatedScan, script: str, words: str) -> None:
    client = StrictClient(service.host, service.port, dialect="fire")
    answer = client.scan(script=script, header=scan.header, messages=scan.messages)
    assert not answer.images and answer.texts[0].startswith("ERROR ") and words in answer.texts[0]


def test_images_of_the_stand_in_say_so_and_what_was_chosen(service: Service, scan: SimulatedScan) -> None:
    messages = encoded(changed(scan, without_signal_in(1)))
    answer = ask(service, "cg_sense", scan, messages=messages, config="cg_sense", virtualCoils="5")
    stood_in = [image for image in answer.images if image.header["slice"] == 1]
    assert stood_in
    for image in stood_in:
        said = values(image.attributes, "ImageComments")
        assert "cg_sense failed: image from fourier instead" in said and "virtual_coils=5" in said
        assert values(image.attributes, "SeriesDescriptionAdditional") == ["fourier_instead_of_cg_sense"]
        assert values(image.attributes, "SequenceDescriptionAdditional") == ["fourier_instead_of_cg_sense"]
    assert [text for text in answer.texts if text.startswith("WRN cg_sense failed in slice 1")]


def test_every_word_has_its_level(service: Service, scan: SimulatedScan) -> None:
    messages = encoded(changed(scan, without_signal_in(1)))
    texts = ask(service, "cg_sense", scan, messages=messages).texts + ask(service, "nothing", scan).texts
    assert {text.split()[0] for text in texts} >= {"WRN", "INF", "ERROR"}
    assert all(text.startswith(LEVELS) and text.endswith("\n") and text.count("\n") == 1 for text in texts)


def raw_answer(service: Service, scan: SimulatedScan, nul: bool) -> bytes:
    with socket.create_connection((service.host, service.port), timeout=PATIENCE) as connection:
        connection.sendall(
            codec.config_script("fourier", nul=nul) + codec.header(scan.header, nul=nul) + b"".join(scan.messages)
        )
        connection.sendall(codec.close())
        got = b""
        while piece := connection.recv(1 << 20):
            got += piece
    return got


@pytest.mark.parametrize("nul", [True, False])
def test_texts_end_as_the_peers_own(service: Service, scan: SimulatedScan, nul: bool) -> None:
    """A console counts the NUL that ends its texts; `gadgetron_ismrmrd_client` would print it."""
    got = raw_answer(service, scan, nul)
    start = got.rindex(struct.pack("<H", 5), 0, got.rindex(b"INF fourier"))
    (length,) = struct.unpack_from("<I", got, start + 2)
    text = got[start + 6 : start + 6 + length]
    assert text.startswith(b"INF fourier") and text.endswith(b"after the last readout\n" + b"\0" * nul)
    assert got[start + 6 + length :] == codec.close()


def test_through_the_forwarder_of_an_openrecon_container_the_images_are_the_same(
    service: Service, scan: SimulatedScan
) -> None:
    parameters = {"config": "cg_sense", "virtualCoils": "5", "pixelType": "uint16"}
    with Forwarder("127.0.0.1", 0, [f"{service.host}:{service.port}"]) as forwarder:
        client = StrictClient("127.0.0.1", forwarder.port, dialect="fire")
        carried = client.scan("openrecon", header=scan.header, messages=scan.messages, parameters=parameters)
    same(carried, by_parameters(service, scan, "cg_sense", parameters))
