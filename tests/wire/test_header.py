"""The MRD header: units, tolerance, refusals."""

from __future__ import annotations

import math
import tracemalloc

import pytest

from gadgets.errors import HeaderError
from gadgets.wire.header import Limit, parse_header
from gadgets.wire.header_text import header_text
from tests.wire.streams import HEADER

FULL = """<?xml version="1.0" encoding="ISO-8859-1"?>
<m:ismrmrdHeader xmlns:m="http://www.ism.org/other">
 <m:version>999</m:version>
 <m:studyInformation><m:studyTime>12:00</m:studyTime></m:studyInformation>
 <m:measurementInformation>
  <m:measurementID>45_1</m:measurementID><m:patientPosition>HFS</m:patientPosition><m:protocolName>cine ü</m:protocolName>
  <m:measurementDependency><m:dependencyType>SenMap</m:dependencyType><m:measurementID>1</m:measurementID></m:measurementDependency>
  <m:measurementDependency><m:dependencyType>NOISE</m:dependencyType><m:measurementID>2</m:measurementID></m:measurementDependency>
 </m:measurementInformation>
 <m:acquisitionSystemInformation>
  <m:systemFieldStrength_T>1.5</m:systemFieldStrength_T>
  <m:relativeReceiverNoiseBandwidth>0.79</m:relativeReceiverNoiseBandwidth>
  <m:receiverChannels>30</m:receiverChannels><m:somethingNew a="b"/>
 </m:acquisitionSystemInformation>
 <m:experimentalConditions><m:H1resonanceFrequency_Hz>63500000</m:H1resonanceFrequency_Hz></m:experimentalConditions>
 <m:encoding>
  <m:encodedSpace><m:matrixSize><m:x>256.0</m:x><m:y>144</m:y><m:z>1</m:z></m:matrixSize>
   <m:fieldOfView_mm><m:x>720</m:x><m:y>270.5</m:y><m:z>8</m:z></m:fieldOfView_mm></m:encodedSpace>
  <m:reconSpace><m:matrixSize><m:x>128</m:x><m:y>120</m:y><m:z>1</m:z></m:matrixSize>
   <m:fieldOfView_mm><m:x>360</m:x><m:y>270</m:y><m:z>8</m:z></m:fieldOfView_mm></m:reconSpace>
  <m:encodingLimits>
   <m:kspace_encoding_step_0><m:minimum>0</m:minimum><m:maximum>255</m:maximum><m:center>128</m:center></m:kspace_encoding_step_0>
   <m:kspace_encoding_step_1><m:minimum>3</m:minimum><m:maximum>119</m:maximum><m:center>60</m:center></m:kspace_encoding_step_1>
   <m:phase><m:minimum>0</m:minimum><m:maximum>24</m:maximum><m:center>0</m:center></m:phase>
   <m:user_3><m:minimum>0</m:minimum><m:maximum>24</m:maximum><m:center>0</m:center></m:user_3>
  </m:encodingLimits>
  <m:trajectory>cartesian</m:trajectory>
  <m:parallelImaging><m:accelerationFactor><m:kspace_encoding_step_1>3</m:kspace_encoding_step_1>
   <m:kspace_encoding_step_2>2</m:kspace_encoding_step_2></m:accelerationFactor>
   <m:calibrationMode>embedded</m:calibrationMode></m:parallelImaging>
 </m:encoding>
 <m:sequenceParameters><m:TR>3.2</m:TR><m:TE>1.5</m:TE><m:TE>2.5</m:TE><m:TI>100</m:TI><m:flipAngle_deg>60</m:flipAngle_deg></m:sequenceParameters>
 <m:userParameters>
  <m:userParameterLong><m:name>n</m:name><m:value>-9007199254740993</m:value></m:userParameterLong>
  <m:userParameterDouble><m:name>d</m:name><m:value>1e-3</m:value></m:userParameterDouble>
  <m:userParameterString><m:name>s</m:name><m:value>a &lt; b</m:value></m:userParameterString>
  <m:userParameterBase64><m:name>b</m:name><m:value>AAAA</m:value></m:userParameterBase64>
 </m:userParameters>
</m:ismrmrdHeader>
"""


def test_everything_in_si_units() -> None:
    header = parse_header(FULL)
    (encoding,) = header.encodings
    assert encoding.encoded_matrix == (1, 144, 256)
    assert encoding.recon_matrix == (1, 120, 128)
    assert encoding.encoded_fov == pytest.approx((0.008, 0.2705, 0.72))
    assert encoding.recon_fov == pytest.approx((0.008, 0.27, 0.36))
    assert encoding.limits == {
        "kspace_encode_step_0": Limit(0, 255, 128),
        "kspace_encode_step_1": Limit(3, 119, 60),
        "phase": Limit(0, 24, 0),
    }
    assert (encoding.trajectory, encoding.acceleration, encoding.calibration_mode) == ("cartesian", (3, 2), "embedded")
    assert (header.measurement_id, header.noise_dependency, header.patient_position) == ("45_1", "2", "HFS")
    assert (header.protocol_name, header.receiver_channels) == ("cine ü", 30)
    assert (header.field_strength, header.h1_frequency, header.relative_noise_bandwidth) == (1.5, 63.5e6, 0.79)
    assert header.repetition_times == (0.0032,)
    assert header.echo_times == (0.0015, 0.0025)
    assert header.inversion_times == (0.1,)
    assert header.flip_angles == (pytest.approx(math.pi / 3),)
    assert header.user_long == {"n": -9007199254740993}
    assert header.user_double == {"d": 1e-3}
    assert header.user_string == {"s": "a < b"}
    assert header.text == FULL
    assert "ismrmrdHeader" not in repr(header)


def test_missing_is_none() -> None:
    header = parse_header("\ufeff\n" + HEADER + "\n")
    assert header.encodings[0].limits == {}
    assert header.encodings[0].acceleration is None
    for value in (header.measurement_id, header.noise_dependency, header.field_strength, header.receiver_channels):
        assert value is None
    assert header.echo_times == ()


@pytest.mark.parametrize(
    "root", ["<!DOCTYPE a>", '<!DOCTYPE a [<!ENTITY b "c">]>', '<!DOCTYPE a SYSTEM "file:///etc/passwd">']
)
def test_dtd_and_entities_are_refused(root: str) -> None:
    with pytest.raises(HeaderError, match="DTD or an entity"):
        parse_header(root + HEADER)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not XML"),
        ("hello", "not XML"),
        ("\0\0", "not XML"),
        ("\ud800", "not XML"),
        (HEADER[:-3], "not XML"),
        (HEADER + "<b/>", "not XML"),
        (HEADER.replace("cartesian", "&x;"), "not XML"),
        ("<configuration/>", "not an MRD header"),
        ("<ismrmrdHeader/>", "no k-space"),
        (HEADER.replace("encodedSpace", "other"), "no matrixSize"),
        (HEADER.replace("<y>4</y>", "", 1), "an incomplete one"),
        (HEADER.replace("fieldOfView_mm", "fov"), "no fieldOfView_mm"),
        (HEADER.replace("<x>8</x>", "<x>eight</x>", 1), "matrixSize/x: not a number; got 'eight'"),
        (HEADER.replace("<x>8</x>", "<x>8.5</x>", 1), "whole number"),
        (HEADER.replace("<x>8</x>", "<x>0</x>", 1), "1 to 65535"),
        (HEADER.replace("<x>8</x>", "<x>70000</x>", 1), "1 to 65535"),
        (HEADER.replace("<x>16</x>", "<x>nan</x>", 1), "fieldOfView_mm/x: not a number"),
        (HEADER.replace("<x>16</x>", "<x>inf</x>", 1), "not a number"),
        (HEADER.replace("<x>16</x>", "<x>-16</x>", 1), "not a field of view"),
        (
            HEADER.replace("<encoding>", "<encoding><encodingLimits><slice><minimum>0</minimum></slice></encodingLimits>"),
            "slice/",
        ),
        (HEADER.replace("<encoding>", "<sequenceParameters><TE>x</TE></sequenceParameters><encoding>"), "TE: not a number"),
    ],
)
def test_refusals(text: str, words: str) -> None:
    with pytest.raises(HeaderError, match=words):
        parse_header(text)


@pytest.mark.parametrize(
    "text",
    [
        "<a>" * 3000,
        "<ismrmrdHeader>" + "<a/>" * 200_000,
        "<ismrmrdHeader " + " ".join(f'a{i}="x>"' for i in range(400_000)) + "/>",
        "<ismrmrdHeader><!--" + "x" * (4 << 20) + "--></ismrmrdHeader>",
    ],
)
def test_bombs(text: str) -> None:
    tracemalloc.start()
    with pytest.raises(HeaderError, match="too l"):
        parse_header(text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 60 << 20


@pytest.mark.parametrize(
    ("declared", "encoding", "name", "guessed"),
    [
        ("", "utf-8", "Müller^山田", False),
        ("ISO-8859-1", "utf-8", "Müller^山田", False),  # what is UTF-8 is UTF-8, whatever it says
        ("", "latin-1", "Müller^Zoë", True),
        ("UTF-8", "windows-1252", "Müller^Zoë", True),
        ("ISO-8859-1", "latin-1", "Müller^Zoë", False),
        ("iso-8859-2", "iso-8859-2", "Dvořák^Łucja", False),
        ("Shift_JIS", "shift_jis", "Yamada^Tarou=山田^太郎", False),
        ("idna", "latin-1", "Müller", True),  # no codec of a peer's choice
    ],
)
def test_names_in_foreign_encodings(declared: str, encoding: str, name: str, guessed: bool) -> None:
    prolog = f"<?xml version='1.0' encoding='{declared}'?>\n" if declared else ""
    named = HEADER.replace(
        "<encoding>", f"<measurementInformation><protocolName>{name}</protocolName></measurementInformation><encoding>"
    )
    text, told = header_text((prolog + named).encode(encoding))
    assert told == guessed and parse_header(text).protocol_name == name
    assert header_text(text.encode()) == (text, False), "what is sent on says what it is"
