"""Names that would be paths: chains, noise measurements, jobs, series and groups never leave their folders."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from gadgets.buffer import AcquisitionSettings, sort_readouts
from gadgets.chain import chain_from_script, chain_names, load_chain
from gadgets.errors import UnknownChain
from gadgets.given_masks import given_mask_of
from gadgets.journal import Journal
from gadgets.node import node_request
from gadgets.noise_store import NoiseStore
from gadgets.pacs import PacsError
from gadgets.pacs_queue import Queue
from gadgets.wire import codec
from recon_core.errors import ReconError
from recon_core.sampling.mask_files import MaskError
from tests.gadgets.scan_factory import mrd_header, readout_headers
from tests.gadgets.serving import HEADER, data, errors, serving, still_works

PATHS = [
    "../configs/fourier",
    "..",
    ".",
    "/etc/passwd",
    "//host/share",
    "fourier/../llr",
    "./fourier",
    "fourier/",
    "..\\llr",
    "C:\\llr",
    "~/llr",
    "$HOME",
    "PATH",
    "fourier.xml.xml",
    "fourier\n",
    " fourier",
    "FOURIER",
    "os",
    "gadgets.node",
    "%2e%2e/llr",
    "llr;id",
    "`id`",
    "$(id)",
    "a" * 5000,
    "",
]


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A folder of chains with a file beside it that must never be read."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "fourier.xml").write_text((Path(__file__).parents[2] / "configs" / "fourier.xml").read_text())
    (tmp_path / "outside.xml").write_text("<secret/>")
    return folder


@pytest.mark.parametrize("name", [*PATHS, "../outside", "../outside.xml"])
def test_chains(name: str, configs: Path) -> None:
    with pytest.raises(UnknownChain) as caught:
        load_chain(name, directory=configs)
    assert "secret" not in str(caught.value)
    with pytest.raises(ReconError):
        chain_from_script(name if name.strip() != "fourier" else "other", directory=configs)


@pytest.mark.parametrize("name", PATHS)
def test_chains_inside_a_configuration(name: str, configs: Path) -> None:
    quoted = name.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;").replace("\n", "&#10;")
    with pytest.raises(ReconError):
        chain_from_script(
            "<configuration><version>2</version><stream><external>"
            f'<execute name="gadgets" target="{quoted}" type="python"/></external></stream></configuration>',
            directory=configs,
        )
    with pytest.raises(ReconError):
        request = node_request(f'<configuration><property name="chain" value="{quoted}"/></configuration>')
        if request.name == "fourier":  # blanks around a value are no part of it
            raise UnknownChain("no such chain")
        load_chain(request.name or "", directory=configs)


def test_odd_files_are_no_chains(configs: Path) -> None:
    for name in ("..xml", "-rf.xml", "a b.xml", "a\nb.xml", "$x.xml"):
        (configs / name).write_text("<secret/>")
    assert chain_names(configs) == ("fourier",)


@pytest.mark.parametrize("name", PATHS)
def test_noise_measurements(name: str, tmp_path: Path) -> None:
    store = NoiseStore(tmp_path / "noise")
    assert store.get(name) is None
    path = store._path(name)
    assert path.parent == store.root and len(path.name) == 68


@pytest.mark.parametrize("name", PATHS)
def test_jobs_of_the_queue(name: str, tmp_path: Path) -> None:
    queue = Queue(tmp_path / "queue")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "job.json").write_text("{}")
    for wanted in (name, "../../outside"):
        with pytest.raises(PacsError, match="no such job"):
            queue.retry(wanted)
    assert (tmp_path / "outside" / "job.json").exists()


@pytest.mark.parametrize("name", [*PATHS, "' OR 1=1 --", "%", "x'; DROP TABLE jobs; --"])
def test_jobs_of_the_journal(name: str, tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    with pytest.raises(ReconError):
        journal.row(name)
    journal.close()


@pytest.mark.parametrize("name", PATHS)
def test_given_masks(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "masks"
    folder.mkdir()
    for path in (folder / "head.npy", tmp_path / "llr.npy", tmp_path / "outside.npy"):
        np.save(path, np.ones((1, 8, 8), bool))
    scan = sort_readouts(readout_headers([{"k1": k1} for k1 in range(8)]), mrd_header(), AcquisitionSettings())
    for asked in (name, f"{name}/../head", "../outside"):
        with pytest.raises(MaskError, match="no such mask on this server"):
            given_mask_of(scan, asked, folder)


def test_names_on_the_wire(tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        for name in PATHS:
            raw = struct.pack("<H1024s", 1, name.encode()[:1023])
            answer = served.client().send(raw + codec.header(HEADER) + data() + codec.close())
            assert "UnknownChain" in errors(answer)[0] and not answer.images
        still_works(served)
        assert len(served.scans) == 1
        captures = sorted(served.spool.iterdir())
    assert all(path.name[:8].isdigit() or path.name.startswith(("journal", ".")) for path in captures)
