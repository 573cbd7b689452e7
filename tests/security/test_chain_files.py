"""Chain files that an administrator was given: settings, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from gadgets.chain import chain_names, load_chain
from recon_core.errors import ReconError
from recon_core.methods import get_method

FILE = (
    "<configuration><version>2</version><stream><external>"
    '<execute name="{name}" target="{target}" type="{kind}"/>{more}'
    "<configuration>{properties}</configuration></external></stream></configuration>"
)


def chain_file(folder: Path, **parts: str) -> None:
    given = {"name": "gadgets", "target": "mine", "kind": "python", "more": "", "properties": "", **parts}
    (folder / "mine.xml").write_text(FILE.format(**given))


@pytest.mark.parametrize(
    "parts",
    [
        {"name": "os"},
        {"name": "gadgets.node"},
        {"kind": "matlab"},
        {"more": '<connect address="10.0.0.1" port="9"/>'},
        {"more": "<readers/>"},
        {"target": "other"},
        {"target": "../mine"},
        {"properties": '<property name="module" value="os"/>'},
        {"properties": "<include href='/etc/passwd'/>"},
    ],
    ids=str,
)
def test_files_that_name_code(parts: dict[str, str], tmp_path: Path) -> None:
    method = '<property name="method" value="fourier"/>'
    chain_file(tmp_path, **{**parts, "properties": method + parts.get("properties", "")})
    with pytest.raises(ReconError):
        load_chain("mine", directory=tmp_path)


@pytest.mark.parametrize(
    "name", ["os", "subprocess", "gadgets.node", "recon_core.errors", "..fourier", "__init__", "fourier ", "Fourier", ""]
)
def test_methods_are_looked_up_not_imported(name: str, tmp_path: Path) -> None:
    chain_file(tmp_path, properties=f'<property name="method" value="{name}"/>')
    with pytest.raises(ReconError):
        load_chain("mine", directory=tmp_path)
    with pytest.raises(ReconError):
        get_method(name)


def test_document_types(tmp_path: Path) -> None:
    chain_file(tmp_path, properties='<property name="method" value="fourier"/>')
    good = (tmp_path / "mine.xml").read_text()
    load_chain("mine", directory=tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.xml").write_text('<!DOCTYPE c [<!ENTITY a SYSTEM "file:///etc/passwd">]>' + good)
    with pytest.raises(ReconError):
        load_chain("mine", directory=tmp_path / "other")


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "mine.xml").write_bytes(b"\xff\xfe\x00\x01" * 100)
    assert chain_names(tmp_path) == ("mine",)
    with pytest.raises(ReconError):
        load_chain("mine", directory=tmp_path)
