"""``recon install-gadgetron PATH``: chain files and the node's module where Gadgetron 4.7 looks for them.

``PATH`` is what Gadgetron calls its home (``$GADGETRON_HOME``, an installation prefix):

* ``share/gadgetron/config/<chain>.xml`` starts a process for each scan (``<execute>``), the chain files as they are;
  ``<chain>_server.xml`` asks the warm server (``<connect>``).
* ``share/gadgetron/python/gadgets/``, which Gadgetron puts on the path of that process: a module that needs nothing but the
  standard library (`gadgets.relay`), and finds this installation when no server runs.
"""

from __future__ import annotations

import importlib.util
import os
import re
import secrets
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from xml.sax.saxutils import quoteattr

import typer

import gadgets
from gadgets.relay import CHAIN_PROPERTY, DEFAULT_SERVER
from recon_core.errors import ReconError

CONFIG_FOLDER, MODULE_FOLDER = Path("share/gadgetron/config"), Path("share/gadgetron/python/gadgets")
NEEDED = ("torch", "numpy", "scipy", "h5py", "defusedxml", "loky")
SERVER_SUFFIX = "_server"
DEFAULT_PORT = int(DEFAULT_SERVER.rpartition(":")[2])

_EXECUTE = re.compile(r"<execute\b[^>]*/>")
_CONFIGURATION = re.compile(r"<configuration>(?=\s*<property)")

_STUB = '''\
"""Written by `recon install-gadgetron`: lets Gadgetron's Python run the chains of {product}. Do not edit."""

import os
import sys

PACKAGES = {packages!r}  # the folder of the packages gadgets and recon_core
LIBRARIES = {libraries!r}  # and of what they need
PYTHON = {python!r}

if sys.version_info[:2] == PYTHON and os.path.isdir(os.path.join(PACKAGES, "gadgets")):
    __path__.append(os.path.join(PACKAGES, "gadgets"))
    sys.path.extend(path for path in (PACKAGES, *LIBRARIES) if path not in sys.path)
    try:
        from recon_core import __version__
    except ImportError:
        __version__ = {version!r}
else:
    __version__ = {version!r}


def __getattr__(name):
    import gadgets.relay as relay

    return relay.target(name)
'''


class InstallRefused(ReconError):
    """The folder is no Gadgetron's home, or holds files that are not ours."""


@dataclass(frozen=True)
class Installed:
    """What was written, and which chain files were left alone because they are somebody else's."""

    written: tuple[Path, ...]
    skipped: tuple[Path, ...]


def connect_variant(text: str, chain: str, address: str, port: int) -> str:
    """A chain file whose node is the warm server instead of a process of its own.

    Parameters
    ----------
    text
        The chain file, with ``<execute>``.
    chain
        Its name; becomes a property, since ``<connect>`` has no target.
    address, port
        Of the server.

    Raises
    ------
    InstallRefused
        The file has no ``<execute>`` to replace.
    """
    connect = f'<connect address={quoteattr(address)} port="{port}"/>'
    named = f'<property name="{CHAIN_PROPERTY}" value="{chain}"/>'
    changed, n = _EXECUTE.subn(connect, text, count=1)
    if n != 1:
        raise InstallRefused("no <execute> in the chain file", where=chain)
    with_name, n = _CONFIGURATION.subn(f"<configuration>\n        {named}", changed, count=1)
    if n != 1:
        with_name = changed.replace(connect, f"{connect}\n      <configuration>{named}</configuration>", 1)
    return with_name


def install(
    home: Path,
    *,
    address: str = "127.0.0.1",
    port: int = DEFAULT_PORT,
    configs: Path | None = None,
    force: bool = False,
) -> Installed:
    """Write everything; files that are there already and are not ours are left alone.

    Parameters
    ----------
    home
        Gadgetron's home.
    address, port
        Where ``<connect>`` finds the warm server.
    configs
        Folder of chain files instead of the shipped ones.
    force
        Replace others' files as well.

    Raises
    ------
    InstallRefused
        No Gadgetron there.
    """
    from gadgets.chain import chain_names, config_directory, load_chain  # imports torch

    folder = home / CONFIG_FOLDER
    if not folder.is_dir():
        raise InstallRefused(
            "no Gadgetron is installed there",
            where=str(home),
            expected=f"a folder {CONFIG_FOLDER}",
            remedy="Name the prefix that GADGETRON_HOME points to",
        )
    files = dict(_module_files(home / MODULE_FOLDER))
    for chain in chain_names(configs):
        load_chain(chain, directory=configs)  # what is installed can be asked for
        text = ((configs or config_directory()) / f"{chain}.xml").read_text(encoding="utf-8")
        files[folder / f"{chain}.xml"] = text
        files[folder / f"{chain}{SERVER_SUFFIX}.xml"] = connect_variant(text, chain, address, port)
    skipped = tuple(path for path in files if not force and path.exists() and not _is_ours(path))
    written = []
    for path, text in files.items():
        if path not in skipped:
            _write(path, text)
            written.append(path)
    return Installed(tuple(written), skipped)


def _module_files(folder: Path) -> list[tuple[Path, str]]:
    package = Path(gadgets.__file__).resolve().parent
    stub = _STUB.format(
        product="recon-gadgets",
        packages=str(package.parent),
        libraries=tuple(dict.fromkeys(_library(name) for name in NEEDED)),
        python=sys.version_info[:2],
        version=gadgets.__version__,
    )
    return [(folder / "__init__.py", stub), (folder / "relay.py", (package / "relay.py").read_text(encoding="utf-8"))]


def _library(name: str) -> str:
    spec = importlib.util.find_spec(name)
    assert spec is not None and spec.origin is not None, name  # a dependency of this package
    return str(Path(spec.origin).resolve().parent.parent)


def _is_ours(path: Path) -> bool:
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".py":
        return "recon-gadgets" in text
    return '<execute name="gadgets"' in text or f'<property name="{CHAIN_PROPERTY}"' in text


def _write(path: Path, text: str) -> None:
    """Whole or not at all: a running Gadgetron may read it at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def install_gadgetron(
    home: Annotated[Path, typer.Argument(metavar="PATH", help="Gadgetron's home: the prefix that holds share/gadgetron.")],
    address: Annotated[
        str, typer.Option(help="Address of the warm server, for the chains that connect to it.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Its port: recon serve --port ...", min=1, max=65535)] = DEFAULT_PORT,
    configs: Annotated[Path | None, typer.Option(help="Folder of chain files instead of the shipped ones.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files of the same name that are not ours.")] = False,
) -> None:
    """Put chains and the node's module where Gadgetron looks for them."""
    done = install(home, address=address, port=port, configs=configs, force=force)
    for path in done.written:
        print(path)
    for path in done.skipped:
        print(f"left alone, not ours (--force replaces it): {path}", file=sys.stderr)
    print(f"chains named *{SERVER_SUFFIX}.xml need: recon serve --port {port}", file=sys.stderr)
