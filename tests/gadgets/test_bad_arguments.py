"""Arguments that cannot be are refused before anything is begun, by one line that names them."""

from __future__ import annotations

import re
from pathlib import Path

import h5py
import pytest
import typer
from typer.testing import CliRunner

from gadgets.cli import app
from gadgets.devices import choose_device
from gadgets.jobs_cli import name_value_pairs
from gadgets.outputs import check_image_file
from recon_core.errors import ReconError, SettingError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Files that are not what they should be, in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    (tmp_path / "empty").touch()
    (tmp_path / "text.h5").write_text("text" * 100)
    (tmp_path / "bad.pem").write_text("-----BEGIN CERTIFICATE-----\nx\n")
    (tmp_path / "chains").mkdir()
    with h5py.File(tmp_path / "other.h5", "w") as file:
        file["x"] = range(1000)
    (tmp_path / "cut.h5").write_bytes((tmp_path / "other.h5").read_bytes()[:-2000])
    return tmp_path


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("run cut.h5 -c fourier -o o.h5 --workers 0", r"RawFileError: cut.h5: cannot be read; got a file that is cut short"),
        ("run other.h5 -c fourier -o o.h5 --workers 0", r"RawFileError: other.h5: .*group 'dataset'; expected a group with"),
        (
            "run other.h5 -c fourier -o cut.h5 --workers 0",
            r"ImageFileError: cut.h5: .*got a file that is cut short; expected",
        ),
        (
            "run other.h5 -c fourier -o o.h5 --device gpu",
            r"SettingError: device: no such device; got 'gpu'; expected auto, cpu",
        ),
        ("serve --port 0 --workers 0 --device cuda0", r"SettingError: device: no such device; got 'cuda0'"),
        (
            "serve --port 0 --monitor-token-file empty",
            r"SettingError: --monitor-token-file: a token, but no page.*--monitor",
        ),
        ("serve --port 0 --scheduler-ca bad.pem", r"SettingError: scheduler: no cluster.*--scheduler tls"),
        (
            "serve --port 0 --pacs A@127.0.0.1:104 --pacs-tls-ca none.pem",
            r"PacsError: TLS .*none.pem: cannot use the TLS files",
        ),
        ("chains --configs none", r"SettingError: configs none: no chain files"),
        ("chains --docs --configs chains", r"SettingError: configs chains: no chain files"),
        ("manifest llr --configs none", r"SettingError: configs none: no chain files"),
        ("package openrecon llr -o p --configs none", r"SettingError: configs none: no chain files"),
        ("package openrecon llr -o empty --cpu", r"OutputError: empty: is no folder"),
        ("package openrecon llr -o p --server h:1 --tls-ca bad.pem", r"TlsError: TLS bad.pem: cannot use the TLS files"),
        ("package openrecon llr -o p --server h:1 --tls-ca chains", r"TlsError: TLS chains: cannot use the TLS files"),
        (
            "package openrecon llr -o p --server h:1 --image text.h5",
            r"PackageRefused: [^\n]*saved image; got [^\n]*docker save$",
        ),
        ("dicom cut.h5", r"ImageFileError: cut.h5: cannot be read; got a file that is cut short; expected an HDF5 file"),
        ("dicom text.h5", r"ImageFileError: text.h5: cannot be read; got no HDF5 file; expected an HDF5 file"),
        ("dicom other.h5 -o empty/d", r"OutputError: empty/d: is no folder; got the file"),
        ("pacs echo --aet A --host ", r"PacsError: destination: not an address; got ''"),
        (
            "pacs echo --aet A --host 127.0.0.1 --port 1 --tls-key bad.pem",
            r"PacsError: TLS .*bad.pem: a key, but no certificate",
        ),
        ("mask show cut.h5", r"MaskError: cut.h5: not a readable HDF5 file; got a file that is cut short"),
        ("mask attach none.h5 empty text.h5", r"HeaderError: empty: not an MRD header"),
        (
            "mask attach other.h5 none.xml o.h5",
            r"HeaderError: none.xml: cannot be read; got No such file.*beside the sequence",
        ),
        ("mask attach other.h5 chains o.h5", r"HeaderError: chains: cannot be read; got Is a directory"),
        (
            "train laro --output t --second-start x",
            r"SettingError: LARO training: unknown second_start; got x; expected cg_sense",
        ),
        ("train laro --output t --resume", r"SettingError: t: no training to resume.*--output"),
        ("train pinqi --output t --resume", r"SettingError: t: no training to resume.*--output"),
        ("train laro --output t --kind x", r"SettingError: LARO: unknown architecture; got kind 'x'; expected laro, modl"),
    ],
)
def test_one_line_says_what_is_wrong_and_nothing_is_made(command: str, said: str, folder: Path) -> None:
    before = sorted(folder.rglob("*"))
    done = CliRunner().invoke(app, command.split(" "))
    assert isinstance(done.exception, ReconError), done.output
    assert re.match(said, f"{type(done.exception).__name__}: {done.exception}"), done.exception
    assert [path for path in sorted(folder.rglob("*")) if "state" not in path.parts] == before


@pytest.mark.parametrize("name", ["", "nosuch", "CPU", "cuda:", "cuda:x", "cpu\n"])
def test_names_of_no_device(name: str) -> None:
    with pytest.raises(SettingError, match="no such device"):
        choose_device(name)


def test_a_setting_with_two_values() -> None:
    assert name_value_pairs(["weight=1", "seed=2", "weight=1"]) == {"weight": "1", "seed": "2"}
    with pytest.raises(typer.BadParameter, match="weight is both '1' and '2'"):
        name_value_pairs(["weight=1", "weight=2"])


def test_an_image_file_that_is_whole_is_appended_to(folder: Path) -> None:
    check_image_file(folder / "other.h5")
