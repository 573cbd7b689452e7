"""``recon mask``: from the density to the sequence, in four commands."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import ismrmrd
import ismrmrd.xsd as xsd
import numpy as np
import pytest
from typer.testing import CliRunner

from gadgets.errors import HeaderError, OutputError, RawFileError
from gadgets.mask_check import mask_names
from gadgets.mask_cli import app
from gadgets.pulseq_settings import SequenceError
from gadgets.raw_source import RawFile
from gadgets.wire.header import parse_header
from recon_core.errors import DataError, SettingError
from recon_core.sampling.agreement import pattern_digest
from recon_core.sampling.mask_files import SamplingMask, read_mask, write_mask

SMALL = [
    "--k1",
    "16",
    "--k2",
    "8",
    "--echoes",
    "3",
    "--acceleration",
    "4",
    "--segments",
    "4",
    "--acs-k1",
    "4",
    "--acs-k2",
    "2",
]


def _run(*words: str | Path) -> str:
    done = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    return done.output


def test_from_density_to_sequence(tmp_path: Path) -> None:
    drawn, ordered = tmp_path / "drawn.h5", tmp_path / "ordered.h5"
    assert "32 of 16 x 8 positions in each of 3 echoes, acceleration 4.000" in _run("draw", drawn, *SMALL, "--per-echo")
    said = _run("order", drawn, ordered, "--segments", "4", "--png", tmp_path / "order.png")
    assert "4 segments x 8 = 32 excitations, as in the paper" in said and "largest echo-to-echo jump" in said
    shown = _run("show", ordered, "--png", tmp_path / "mask.png")
    assert "acceleration 4.000" in shown and "density: multi-level" in shown and "seed: 0" in shown
    assert "ordered: 4 segments x 8 = 32 excitations" in shown and "not ordered" in _run("show", drawn)
    assert "centre" not in shown
    holed = read_mask(drawn).mask
    holed[1:, 4, 8] = False
    write_mask(tmp_path / "holed.h5", SamplingMask(holed))
    for words in (("show",), ("export", "--csv", tmp_path / "holed.csv")):
        said = _run(words[0], tmp_path / "holed.h5", *words[1:])
        assert "the centre (k2 4, k1 8, counted from 0) is not sampled in echo 1, 2" in said
    for picture in ("order.png", "mask.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    said = _run(
        "export", ordered, "--csv", tmp_path / "scan.csv", "--seq", tmp_path / "scan.seq",
        *["--matrix", "16", "--fov-mm", "160", "160", "80", "--echo-spacing-ms", "4", "--tr-ms", "20", "--dummies", "1"],
    )  # fmt: skip
    assert "96 readouts in 0.7 s, largest gradient" in said and "echo times 3.99" in said and "timing check passed" in said
    assert "16 x 16 x 8 voxels of 10.00 x 10.00 x 10.00 mm (readout, k1, k2), slab of 80 mm" in said
    assert (tmp_path / "scan.seq").is_file() and (tmp_path / "scan.mrd.xml").is_file()
    np.testing.assert_array_equal(read_mask(tmp_path / "scan.csv").order, read_mask(ordered).order)
    assert f"written: {tmp_path / 'back.h5'}" in _run("export", tmp_path / "scan.csv", "--h5", tmp_path / "back")
    np.testing.assert_array_equal(read_mask(tmp_path / "back.h5").order, read_mask(ordered).order)
    assert read_mask(tmp_path / "back.h5").n_segments == 4
    gentle = _run(
        "export", ordered, "--seq", tmp_path / "gentle.seq", "--matrix", "16", "--fov-mm", "160", "160", "80", "--tr-ms", "20",
        *["--first-echo-ms", "6", "--echo-spacing-ms", "5", "--dummies", "1", "--max-grad", "14", "--max-slew", "40", "--dwell-us", "12"],
        *["--slab-mm", "60"],
    )  # fmt: skip
    assert "slab of 60 mm" in gentle and "SliceThickness 0.06" in (tmp_path / "gentle.seq").read_text()
    grad, slew = (float(n) for n in re.findall(r"largest gradient ([\d.]+) mT/m and slew rate ([\d.]+)", gentle)[0])
    assert 0 < grad <= 14 * 3**0.5 and 0 < slew <= 40 * 3**0.5  # three axes together
    with pytest.raises(
        SequenceError, match=r"readout gradient is too strong; got 11\.5 mT/m; expected at most 1 .*longer dwell"
    ):
        _run("export", ordered, "--seq", tmp_path / "x.seq", "--matrix", "16", "--max-grad", "1")
    with pytest.raises(
        SequenceError, match=r"slab gradient is too strong; got 93\.9 mT/m; expected at most 32 .*thicker slab"
    ):
        _run("export", ordered, "--seq", tmp_path / "x.seq", "--matrix", "16", "--slab-mm", "1")


def test_one_pattern_by_default_and_bounded_jumps(tmp_path: Path) -> None:
    _run("draw", tmp_path / "a.h5", *SMALL)
    mask = read_mask(tmp_path / "a.h5").mask
    assert (mask == mask[:1]).all()
    assert "jump 0.00" in _run("order", tmp_path / "a.h5", tmp_path / "b.csv", "--segments", "4", "--max-jump", "0")
    _run("draw", tmp_path / "c.h5", *SMALL, "--per-echo", "--seed", "1")
    with pytest.raises(SettingError, match="at least"):
        _run("order", tmp_path / "c.h5", tmp_path / "d.h5", "--segments", "4", "--max-jump", "0.1")
    for wrong in ("nan", "inf", "-1"):
        with pytest.raises(SettingError, match="not a distance"):
            _run("order", tmp_path / "c.h5", tmp_path / "d.h5", "--segments", "4", "--max-jump", wrong)
    assert not (tmp_path / "d.h5").exists()


def test_a_grid_that_no_segments_fill_is_said(tmp_path: Path) -> None:
    full = [*SMALL[:6], "--acceleration", "1", "--segments", "11", *SMALL[10:]]
    said = _run("draw", tmp_path / "a.h5", *full)
    assert "rounded down to 11 equal segments: 7 of 16 x 8 positions are never sampled" in said
    assert "121 of 16 x 8 positions" in said and int(read_mask(tmp_path / "a.h5").mask[0].sum()) == 121
    assert "rounded down" not in _run("draw", tmp_path / "b.h5", *full[:8], "--segments", "4", *SMALL[10:])
    assert "rounded down" not in _run("draw", tmp_path / "c.h5", *SMALL)


def test_learned_probabilities_for_another_matrix_and_fewer_echoes(tmp_path: Path) -> None:
    """Probability in the left half of k1 in echo 0, in the right half in echo 1: so are the samples."""
    p = np.full((3, 8, 10), 0.02, np.float32)
    p[0, :, :4] = p[1, :, 6:] = 0.6
    write_mask(tmp_path / "trained.h5", SamplingMask(p > 0.5, p))
    words = [
        "--k1",
        "30",
        "--k2",
        "16",
        "--echoes",
        "2",
        "--acceleration",
        "6",
        "--segments",
        "4",
        "--acs-k1",
        "2",
        "--acs-k2",
        "2",
    ]
    _run("draw", tmp_path / "new.h5", "--like", tmp_path / "trained.h5", *words)
    mask = read_mask(tmp_path / "new.h5").mask
    assert mask.shape == (2, 16, 30) and mask.sum((1, 2)).tolist() == [80, 80]
    assert mask[0, :, :15].sum() > 60 and mask[1, :, 15:].sum() > 60
    _run("draw", tmp_path / "one.h5", "--like", tmp_path / "trained.h5", *words, "--one-pattern")
    one = read_mask(tmp_path / "one.h5")
    assert one.probability is not None and (one.probability == one.probability[:1]).all()
    _run("draw", tmp_path / "again.h5", "--like", tmp_path / "one.h5", *words)  # of one pattern, as what it is like
    again = read_mask(tmp_path / "again.h5").mask
    assert (again == again[:1]).all() and one.mask[1, :, :15].sum() > 60
    with pytest.raises(DataError, match="fewer echoes"):
        _run("draw", tmp_path / "x.h5", "--like", tmp_path / "trained.h5", "--echoes", "4")
    write_mask(tmp_path / "bare.h5", SamplingMask(mask))
    with pytest.raises(DataError, match="no probabilities"):
        _run("draw", tmp_path / "x.h5", "--like", tmp_path / "bare.h5")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        _run("show", tmp_path / "none.h5")
    _run("draw", tmp_path / "a.h5", *SMALL)
    with pytest.raises(SettingError, match="nothing to write"):
        _run("export", tmp_path / "a.h5")
    with pytest.raises(SettingError, match="no order"):
        _run("export", tmp_path / "a.h5", "--seq", tmp_path / "a.seq")
    for words in (("--seq", ""), ("--seq", "/"), ("--csv", ""), ("--csv", tmp_path / "a.csv", "--seq", "")):
        with pytest.raises(OutputError, match="names no file"):
            _run("export", tmp_path / "a.h5", *words)
    for words in (("--seq", tmp_path / "x.txt"), ("--csv", tmp_path / "x.h5")):
        with pytest.raises(OutputError, match=r"unknown kind of file; got \.(txt|h5); expected \.(seq|csv)"):
            _run("export", tmp_path / "a.h5", *words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5"]
    assert f"written: {tmp_path / 'table.csv'}" in _run("export", tmp_path / "a.h5", "--csv", tmp_path / "table")
    with pytest.raises(SettingError, match="divides the samples"):
        _run("order", tmp_path / "a.h5", tmp_path / "b.h5", "--segments", "5")


def test_masks_that_no_machine_holds_are_refused(tmp_path: Path) -> None:
    for words in (("draw", tmp_path / "a.h5"), ("learn", tmp_path / "a.h5")):
        with pytest.raises(SettingError, match="too large a mask; got 100000 x 100000, 10 echoes"):
            _run(*words, "--k1", "100000", "--k2", "100000")
        done = CliRunner().invoke(app, [str(word) for word in (*words, "--seed", 10**20)])
        assert done.exit_code == 2 and "--seed" in done.output
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_named_before_anything_is_done(tmp_path: Path) -> None:
    _run("draw", tmp_path / "a.h5", *SMALL)
    lost = tmp_path / "lost"
    for words in (
        ("draw", lost / "b.h5", *SMALL),
        ("order", tmp_path / "a.h5", lost / "b.h5", "--segments", "4"),
        ("order", tmp_path / "a.h5", tmp_path / "b.h5", "--segments", "4", "--png", lost / "b.png"),
        ("show", tmp_path / "a.h5", "--png", lost / "b.png"),
        ("export", tmp_path / "a.h5", "--csv", lost / "b.csv"),
        ("attach", tmp_path / "a.h5", tmp_path / "a.h5", lost / "b.h5"),
        ("learn", lost / "b.h5"),
    ):
        with pytest.raises(OutputError, match="its folder does not exist") as found:
            _run(*words)
        assert found.value.got == str(lost)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.h5"]


def _raw(path: Path, n_samples: int, n_noise: int = 0, places: Iterable[Sequence[int]] = ((0, 0, 0),) * 2) -> Path:
    """Readouts under the header of another protocol, with a measurement id, a coil count and a user parameter of its own.

    ``places`` are (echo, k2, k1). With ``n_noise`` a noise readout of so many samples comes first.
    """
    space = xsd.encodingSpaceType(
        matrixSize=xsd.matrixSizeType(x=7, y=8, z=9), fieldOfView_mm=xsd.fieldOfViewMm(x=1, y=1, z=1)
    )
    header = xsd.ismrmrdHeader(
        measurementInformation=xsd.measurementInformationType(
            measurementID="42_7", patientPosition=xsd.patientPositionType.FFP
        ),
        acquisitionSystemInformation=xsd.acquisitionSystemInformationType(
            receiverChannels=2, systemFieldStrength_T=2.89
        ),
        experimentalConditions=xsd.experimentalConditionsType(H1resonanceFrequency_Hz=123200000),
        encoding=[
            xsd.encodingType(
                encodedSpace=space, reconSpace=space, encodingLimits=xsd.encodingLimitsType(),
                trajectory=xsd.trajectoryType.OTHER,
            )
        ],
        sequenceParameters=xsd.sequenceParametersType(TE=[99.0]),
        userParameters=xsd.userParametersType(
            userParameterLong=[xsd.userParameterLongType(name="kept", value=5)],
            userParameterString=[xsd.userParameterStringType(name="SamplingMask", value="older")],
        ),
    )  # fmt: skip
    dataset = ismrmrd.Dataset(str(path), "dataset")
    dataset.write_xml_header(str(xsd.ToXML(header)))
    if n_noise:
        noise = ismrmrd.Acquisition.from_array(np.ones((2, n_noise), np.complex64))
        noise.set_flag(ismrmrd.ACQ_IS_NOISE_MEASUREMENT)
        dataset.append_acquisition(noise)
    for echo, k2, k1 in places:
        readout = ismrmrd.Acquisition.from_array(np.ones((2, n_samples), np.complex64))
        readout.idx.contrast, readout.idx.kspace_encode_step_2, readout.idx.kspace_encode_step_1 = echo, k2, k1
        dataset.append_acquisition(readout)
    dataset.close()
    return path


def test_attach_takes_the_sequence_from_one_header_and_the_rest_from_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run("draw", tmp_path / "a.h5", *SMALL)
    _run("order", tmp_path / "a.h5", tmp_path / "brain.h5", "--segments", "4")
    shape = ["--matrix", "16", "--fov-mm", "160", "160", "80", "--echo-spacing-ms", "4", "--tr-ms", "20"]
    _run("export", tmp_path / "brain.h5", "--seq", tmp_path / "scan.seq", *shape)
    raw, side = _raw(tmp_path / "raw.h5", 16), tmp_path / "scan.mrd.xml"
    before = raw.read_bytes()
    said = _run("attach", raw, side, tmp_path / "fixed.h5")
    assert "the 1 samples are not those of the mask 'brain', 3 echoes of 8 x 16 (k2 x k1): another sequence" in said
    assert raw.read_bytes() == before
    sampled = np.argwhere(read_mask(tmp_path / "brain.h5").mask)
    for by, words in (
        ((0, 0, 0), "the 96 samples are those of the mask 'brain'"),
        ((0, 0, 9), "of 96 readouts lie outside the mask 'brain', 3 echoes of 8 x 16 (k2 x k1)"),
    ):
        assert words in _run("attach", _raw(tmp_path / f"{by[2]}.h5", 16, 16, sampled + by), side, tmp_path / "scan.h5")
    fixed = RawFile(tmp_path / "fixed.h5", b"").header
    assert fixed is not None and fixed.encodings == parse_header(side.read_text()).encodings
    assert len(fixed.echo_times) == 3 and fixed.measurement_id == "42_7" and fixed.patient_position == "FFP"
    assert fixed.field_strength == 2.89 and fixed.h1_frequency == 123200000 and fixed.receiver_channels == 2
    assert fixed.user_long == {"kept": 5} and fixed.user_string["SamplingMask"] == "brain"
    with pytest.raises(RawFileError, match="would be overwritten"):
        _run("attach", raw, side, raw)
    with pytest.raises(RawFileError, match="not a scan of this sequence"):
        _run("attach", _raw(tmp_path / "short.h5", 12), side, tmp_path / "x.h5")
    with pytest.raises(RawFileError, match="not a scan of this sequence"):  # only the noise is as long
        _run("attach", _raw(tmp_path / "noise.h5", 12, n_noise=16), side, tmp_path / "x.h5")
    with pytest.raises(RawFileError, match="no MRD raw data"):
        _run("attach", tmp_path / "a.h5", side, tmp_path / "x.h5")
    with pytest.raises(HeaderError, match=r"fixed\.h5: not an MRD header"):  # both files mixed up
        _run("attach", side, tmp_path / "fixed.h5", tmp_path / "x.h5")
    with pytest.raises(HeaderError, match=r"lost\.xml: cannot be read; got No such file"):
        _run("attach", raw, tmp_path / "lost.xml", tmp_path / "x.h5")
    before_all = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with monkeypatch.context() as patch:  # Ctrl-C after the copy: one with the scanner's header would be believed

        def stopped(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        patch.setattr("gadgets.pulseq_header.h5py.special_dtype", stopped)
        for name in ("fixed.h5", "x.h5"):
            assert CliRunner().invoke(app, ["attach", str(raw), str(side), str(tmp_path / name)]).exit_code == 130
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before_all
    whole = side.read_text()
    for part in ("encoding", "userParameters"):
        side.write_text(re.sub(rf"<{part}>.*</{part}>", "", whole, flags=re.DOTALL))
        with pytest.raises(HeaderError, match="not the header of a sequence"):
            _run("attach", raw, side, tmp_path / "x.h5")
    side.write_text("<nothing/>")
    with pytest.raises(HeaderError, match="not an MRD header"):
        _run("attach", raw, side, tmp_path / "x.h5")
    assert not (tmp_path / "x.h5").exists()


def test_install_puts_a_mask_where_the_server_looks(tmp_path: Path) -> None:
    _run("draw", tmp_path / "a.h5", *SMALL)
    said = _run("install", tmp_path / "a.h5", "--masks", tmp_path / "masks")
    assert "installed as 'a'" in said and pattern_digest(read_mask(tmp_path / "a.h5").mask) in said
    assert list(mask_names(tmp_path / "masks")) == ["a"]
    (tmp_path / "bad name.h5").write_bytes((tmp_path / "a.h5").read_bytes())
    with pytest.raises(DataError, match="not a name for a mask"):
        _run("install", tmp_path / "bad name.h5", "--masks", tmp_path / "masks")
    with pytest.raises(DataError, match=r"got 'bad name'.*rename the file"):  # nor can a header name it
        _run("export", tmp_path / "bad name.h5", "--seq", tmp_path / "scan.seq")
    _run("export", tmp_path / "bad name.h5", "--csv", tmp_path / "table.csv")
    (tmp_path / "b.h5").write_bytes(b"no mask")
    with pytest.raises(DataError, match="not a readable HDF5 file"):
        _run("install", tmp_path / "b.h5", "--masks", tmp_path / "masks")


def test_one_name_is_one_mask_whatever_the_file_s_ending(tmp_path: Path) -> None:
    """The server knows masks by name: after a table of another mask is installed, scans are compared with that."""
    masks = tmp_path / "masks"
    for number, name in enumerate(("a.h5", "a.csv", "a.hdf5")):
        _run("draw", tmp_path / name, *SMALL, "--seed", number)
        said = _run("install", tmp_path / name, "--masks", masks)
        assert ("in place of" in said) == (number > 0)
        found = read_mask(mask_names(masks)["a"])
        np.testing.assert_array_equal(found.mask, read_mask(tmp_path / name).mask)
    (masks / "a.npy").touch()  # a brain mask has the same name in another list
    _run("install", masks / "a.hdf5", "--masks", masks)  # onto itself
    assert sorted(path.name for path in masks.iterdir()) == ["a.hdf5", "a.npy"]


def test_learn_writes_a_mask_that_can_be_ordered(tmp_path: Path) -> None:
    """One step on tiny scans: what was learned is no matter here, only that the file is a mask of the asked size."""
    words = [
        "--k1", "24", "--k2", "16", "--readout", "16", "--echoes", "3", "--coils", "2", "--acceleration", "4", "--segments", "5",
        "--acs-k1", "6", "--acs-k2", "4", "--steps", "1", "--features", "4", "--features", "8",
        "--precision", "bfloat16",
    ]  # fmt: skip
    said = _run("learn", tmp_path / "m.h5", *words)
    assert "100 of 24 x 16 positions in each of 3 echoes" in said and "learned after 1 of 1 steps" in said
    mask = read_mask(tmp_path / "m.h5")
    assert mask.facts["density"] == "learned" and mask.probability is not None
    assert json.loads((tmp_path / "m.training" / "recipe.json").read_text())["precision"] == "bfloat16"
    assert "5 segments x 20 = 100" in _run("order", tmp_path / "m.h5", tmp_path / "o.h5", "--segments", "5")
    with pytest.raises(SettingError, match="the folder holds a training"):
        _run("learn", tmp_path / "m.h5", *words)
    drawn = mask.mask
    (tmp_path / "m.h5").unlink()
    assert "learned after 1 of 1 steps" in _run("learn", tmp_path / "m.h5", *words, "--resume")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.h5").mask, drawn)
    with pytest.raises(SettingError, match="got first_steps: 1, not 2"):
        _run("learn", tmp_path / "m.h5", *words, "--steps", "2", "--resume")
    with pytest.raises(SettingError, match="no training to resume"):
        _run("learn", tmp_path / "n.h5", *words, "--resume")
    for ending in ("png", "csv"):  # a table would lose what was learned
        with pytest.raises(OutputError, match="unknown kind of file"):
            _run("learn", tmp_path / f"n.{ending}", *words)
    full = [*words[:10], "--acceleration", "1", "--acs-k1", "24", "--acs-k2", "16"]
    for refused, why in (
        ([*words[:10], "--segments", "400"], "more segments than positions"),
        ([*full, "--segments", "5"], "impossible number of samples; got 380; expected 384"),
    ):  # before anything is learned
        with pytest.raises(SettingError, match=why):
            _run("learn", tmp_path / "n.h5", *refused)
    assert not (tmp_path / "n.training").exists()
