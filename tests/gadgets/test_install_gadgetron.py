"""``recon install-gadgetron``: what lands where Gadgetron looks, and what is left alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from defusedxml.ElementTree import fromstring
from typer.testing import CliRunner

from gadgets.chain import chain_names, config_directory, load_chain, node_properties
from gadgets.install_gadgetron import InstallRefused, connect_variant, install, install_gadgetron
from gadgets.node import node_request
from gadgets.relay import SERVER
from tests.gadgetron_stand_in import executed, recorded, session
from tests.gadgets.serving import serving
from tests.waiting import PATIENCE


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "share/gadgetron/config").mkdir(parents=True)
    return tmp_path


def test_every_chain_in_both_forms(home: Path) -> None:
    done = install(home, address="recon.local", port=18003)
    assert not done.skipped
    configs = home / "share/gadgetron/config"
    for chain in chain_names():
        assert (configs / f"{chain}.xml").read_text() == (config_directory() / f"{chain}.xml").read_text()
        root = fromstring((configs / f"{chain}_server.xml").read_text())
        external = root.find("stream/external")
        assert external is not None and external.find("execute") is None
        connect = external.find("connect")
        assert connect is not None and connect.attrib == {"address": "recon.local", "port": "18003"}
        # what Gadgetron sends to the node is this element alone
        text = re.search(
            r"<external>.*?(<configuration>.*</configuration>)\s*</external>", path_text(configs, chain), re.DOTALL
        )
        assert text is not None
        request = node_request(text[1])
        assert request.name == chain
        asked, shipped = load_chain(chain, request.overrides), load_chain(chain)
        assert asked.settings == shipped.settings and asked.preprocess == shipped.preprocess


def path_text(configs: Path, chain: str) -> str:
    return (configs / f"{chain}_server.xml").read_text()


def test_a_chain_file_without_settings() -> None:
    text = '<configuration><stream><external><execute name="gadgets" target="a" type="python"/></external></stream></configuration>'
    changed = connect_variant(text, "a", "127.0.0.1", 1)
    inner = re.search(r"<external>.*?(<configuration>.*?</configuration>)", changed, re.DOTALL)
    assert inner is not None and node_properties(inner[1]) == {"chain": "a"}
    with pytest.raises(InstallRefused):
        connect_variant("<configuration/>", "a", "127.0.0.1", 1)


def test_others_files_are_left_alone(home: Path) -> None:
    theirs = home / "share/gadgetron/config/llr.xml"
    theirs.write_text("<configuration><version>2</version></configuration>")
    done = install(home)
    assert done.skipped == (theirs,) and "execute" not in theirs.read_text()
    assert install(home, force=True).skipped == () and "execute" in theirs.read_text()
    assert install(home).skipped == ()  # our own are written anew
    assert not list(home.rglob(".*"))


def test_no_gadgetron_there(tmp_path: Path) -> None:
    with pytest.raises(InstallRefused, match="no Gadgetron"):
        install(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_command(home: Path) -> None:
    app = typer.Typer()
    app.command()(install_gadgetron)
    done = CliRunner().invoke(app, [str(home), "--port", "18009"])
    assert done.exit_code == 0
    assert str(home / "share/gadgetron/config/llr.xml") in done.stdout
    assert 'port="18009"' in path_text(home / "share/gadgetron/config", "llr")


# -- the module, in the process that Gadgetron starts -----------------------------------------------------------------------------


def test_the_module_finds_this_installation(home: Path) -> None:
    install(home)
    code = "import gadgets, gadgets.relay, gadgets.node; print(gadgets.__file__, gadgets.node.__file__, sep='\\n')"
    folder = home / "share/gadgetron/python"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={"PYTHONPATH": str(folder)},
        cwd=home,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    stub, node = done.stdout.split()
    assert Path(stub).parent == folder / "gadgets" and Path(node) == Path(install_gadgetron.__code__.co_filename).with_name(
        "node.py"
    )


def test_a_python_that_is_not_ours_reaches_the_server(home: Path, tmp_path: Path) -> None:
    """Gadgetron's Python may be another one, without torch and without this package."""
    install(home)
    foreign(home)
    with serving(tmp_path) as served:
        environment = {SERVER: f"127.0.0.1:{served.server.port}"}
        with executed("cg_sense", folder=home / "share/gadgetron/python", environment=environment) as (node, _):
            received = session(node, recorded("acquisitions", "<configuration/>"))
    assert received.images[0].data.flat[0] == 81 and served.scans[0].request.name == "cg_sense"


def test_without_server_and_torch_the_operator_hears_what_to_do(home: Path) -> None:
    install(home)
    foreign(home)
    with executed("llr", folder=home / "share/gadgetron/python", environment={SERVER: "127.0.0.1:1"}) as (node, _):
        received = session(node, recorded("bucket", "<configuration/>"))
    (error,) = received.errors
    assert "recon serve --port 18002" in error and "gadgets.node" in error


def foreign(home: Path) -> None:
    """As if another Python had been used for the installation."""
    stub = home / "share/gadgetron/python/gadgets/__init__.py"
    text, n = re.subn(r"^PYTHON = .*$", "PYTHON = (2, 7)", stub.read_text(), flags=re.MULTILINE)
    assert n == 1
    stub.write_text(text)
