"""OpenRecon packages: the folder that an image is built from, the manual, and the zip that a scanner takes.

An image cannot be built here: that takes a container engine (older than 25, for the scanner's sake). So packaging has two steps:
`write_context` writes everything that goes into the image, with a script that builds and saves it; `write_zip` checks the saved image
and puts it into the zip with the manual. Both write the same bytes every time.

The image is one of two kinds. *forward* (the default): Python's standard library and a few files of ours, which carry scans to the GPU
server; the scanner's CUDA 11.8 does not matter. *cpu*: the whole program with a CPU-only torch as well, which reconstructs when no
server answers, or where there is none.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gadgets
import recon_core
from gadgets.chain import chain_names, config_directory
from gadgets.manifest import Manifest
from gadgets.openrecon_label import LabelOptions, decode, instruction, is_version, label, product_name, text_of
from gadgets.openrecon_schema import LABEL_NAME
from gadgets.tls import ClientTls
from recon_core.errors import ReconError

Mode = Literal["forward", "cpu"]

BASE_IMAGE = "python:3.11.14-slim-bookworm"
MARK = "# Written by 'recon package openrecon': do not edit."
EPOCH = 315532800  # 1980-01-01, the first day that a zip can name
ZIP_DATE = (1980, 1, 1, 0, 0, 0)
SERVER_ADDRESS = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]{0,252})|\[[0-9A-Fa-f:]+\]):([0-9]{1,5})")
MAX_JSON = 4 << 20
FORWARDER = ("relay.py", "openrecon_forward.py", "tls.py", "wire/__init__.py", "wire/dialect.py")
TLS_FILES = ("ca", "cert", "key")
MEMORY_MB: dict[Mode, int] = {"forward": 1024, "cpu": 16384}
CORES: dict[Mode, int] = {"forward": 1, "cpu": 4}


class PackageRefused(ReconError):
    """A package that cannot be made, or an image that a scanner would not take."""


@dataclass(frozen=True)
class PackageOptions:
    """What is packaged.

    Attributes
    ----------
    server
        The GPU server's ``host:port``; ``None``: none, which needs ``mode = cpu``.
    tls_ca, tls_cert, tls_key
        PEM files that become part of the image: the authority of the server's certificate (TLS is spoken with it), and the image's own
        certificate and key, if the server wants one.
    """

    mode: Mode = "forward"
    server: str | None = None
    vendor: str = LabelOptions.vendor
    version: str = LabelOptions.version
    injector: str = LabelOptions.injector
    configs: Path | None = None
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None


@dataclass(frozen=True)
class Package:
    """One chain to be packaged, checked.

    Raises
    ------
    PackageRefused
        No server to forward to, an address that is none, or a version that scanners do not take.
    TlsError
        PEM files that cannot be used.
    LabelRefused
    """

    described: Manifest
    options: PackageOptions

    def __post_init__(self) -> None:
        options = self.options
        if options.server is None and options.mode == "forward":
            raise PackageRefused(
                "nobody would reconstruct", where="package", got="no --server", expected="--server HOST:PORT, or --cpu"
            )
        if options.server is not None:
            found = SERVER_ADDRESS.fullmatch(options.server)
            if found is None or not 0 < int(found[1]) < 65536:
                raise PackageRefused("not an address", where="package --server", got=options.server, expected="HOST:PORT")
        if options.tls_ca is None and (options.tls_cert or options.tls_key):
            raise PackageRefused("a certificate, but no authority", where="package", expected="--tls-ca FILE")
        if options.tls_ca is not None and options.server is None:
            raise PackageRefused("an authority, but no server", where="package", expected="--server HOST:PORT")
        if options.tls_ca is not None:  # a file that cannot be used would be found on the scanner
            files = [None if path is None else str(path) for path in (options.tls_ca, options.tls_cert, options.tls_key)]
            ClientTls(*files).context()
        if not is_version(options.version):
            raise PackageRefused(
                "not a version that scanners take",
                where="package --version",
                got=options.version,
                expected="three numbers: 1.0.0",
            )
        self.document()

    def document(self) -> dict[str, Any]:
        """The label."""
        mode, options = self.options.mode, self.options
        return label(
            self.described,
            LabelOptions(options.vendor, options.version, MEMORY_MB[mode], CORES[mode], injector=options.injector),
        )

    @property
    def name(self) -> str:
        return product_name(self.described.chain.name)

    @property
    def base(self) -> str:
        """Of the tar, the manual and the zip: the scanner insists on this form."""
        return f"OpenRecon_{self.options.vendor}_{self.name}_V{self.options.version}"

    @property
    def tag(self) -> str:
        """Of the image."""
        return f"OpenRecon_{self.options.vendor}_{self.name}:V{self.options.version}".lower()


def write_context(package: Package, folder: Path) -> list[Path]:
    """Write the image's folder ``context/``, the script that builds it, and the manual.

    Raises
    ------
    PackageRefused
        There is a folder ``context`` that this program did not write.
    """
    from gadgets.openrecon_manual import manual_pdf  # imports matplotlib

    context = folder / "context"
    if context.exists():
        dockerfile = context / "Dockerfile"
        if not dockerfile.is_file() or MARK not in dockerfile.read_text(encoding="utf-8", errors="replace"):
            raise PackageRefused(
                "there is another folder of this name", where=str(context), remedy="Choose another --output"
            )
        shutil.rmtree(context)
    files = dict(_context_files(package))
    written = [_write(context / name, raw) for name, raw in sorted(files.items())]
    written.append(
        _write(folder / f"{package.base}.pdf", manual_pdf(package.described, package.options.mode, package.options.server))
    )
    script = _write(folder / "build.sh", _build_script(package).encode())
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    return [*written, script]


def write_zip(package: Package, folder: Path, image: Path) -> Path:
    """The zip that a scanner takes: the saved image and the manual, nothing else.

    Parameters
    ----------
    image
        What ``docker save`` wrote; any name.

    Raises
    ------
    PackageRefused
        It is another image, or one that the scanner would refuse.
    """
    check_image(package, image)
    manual, target = folder / f"{package.base}.pdf", folder / f"{package.base}.zip"
    partial = target.with_suffix(".zip.part")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
            for path, name in ((image, f"{package.base}.tar"), (manual, f"{package.base}.pdf")):
                entry = zipfile.ZipInfo(name, ZIP_DATE)
                entry.compress_type, entry.external_attr, entry.create_system = zipfile.ZIP_DEFLATED, 0o644 << 16, 3
                entry.file_size = path.stat().st_size
                with path.open("rb") as source, archive.open(entry, "w", force_zip64=entry.file_size >= 1 << 31) as out:
                    shutil.copyfileobj(source, out, 1 << 20)
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    return target


def check_image(package: Package, image: Path) -> None:
    """Whether a saved image is the one of this package, and such as a scanner starts.

    Raises
    ------
    PackageRefused
    """
    where = f"image {image.name}"
    try:
        with tarfile.open(image) as archive:
            entries = _json(archive, "manifest.json", where)
            (entry,) = entries if isinstance(entries, list) and len(entries) == 1 else ({},)
            config = _json(archive, str(entry.get("Config", "")), where)
    except (tarfile.TarError, OSError) as error:
        got = str(error).splitlines()[0].rstrip(":- ")[:120]
        raise PackageRefused("cannot be read as a saved image", where=where, got=got, expected="docker save") from None
    tags = entry.get("RepoTags") or []
    if package.tag not in tags:
        raise PackageRefused(
            "has another tag", where=where, got=", ".join(map(str, tags[:3])) or "none", expected=package.tag
        )
    platform = f"{config.get('os')}/{config.get('architecture')}"
    if platform != "linux/amd64":
        raise PackageRefused("is for another platform", where=where, got=platform, expected="linux/amd64")
    run = config.get("config") or {}
    user = str(run.get("User") or "")
    if user.partition(":")[0] not in ("", "0", "root"):
        raise PackageRefused("does not run as root, which scanners insist on", where=where, got=user)
    found = (run.get("Labels") or {}).get(LABEL_NAME)
    if found is None or decode(str(found)) != package.document():
        raise PackageRefused("has no or another label", where=where, remedy="Build it again with build.sh")


def _json(archive: tarfile.TarFile, name: str, where: str) -> Any:
    try:
        member = archive.getmember(name)
        source = archive.extractfile(member) if member.isreg() and member.size <= MAX_JSON else None
        if source is not None:
            return json.loads(source.read())
    except (KeyError, ValueError, RecursionError):
        pass
    raise PackageRefused(
        "is no saved image", where=where, got=f"no usable {name[:80] or 'configuration'}", expected="docker save"
    )


# -- what goes into the image ---------------------------------------------------------------------------------------------------------


def _context_files(package: Package) -> Iterator[tuple[str, bytes]]:
    yield "Dockerfile", _dockerfile(package).encode()
    yield "OpenReconLabel.json", (text_of(package.document()) + "\n").encode()
    for name in TLS_FILES:
        path = getattr(package.options, f"tls_{name}")
        if path is not None:
            yield f"app/tls/{name}.pem", path.read_bytes()
    source = Path(gadgets.__file__).parent
    if package.options.mode == "forward":
        words = '"""The part of recon-gadgets that forwards scans; nothing else is needed here."""\n'
        yield "app/gadgets/__init__.py", words.encode()
        for name in FORWARDER:
            yield f"app/gadgets/{name}", (source / name).read_bytes()
        core = Path(recon_core.__file__).parent
        for name in ("__init__.py", "errors.py"):
            yield f"app/recon_core/{name}", (core / name).read_bytes()
        return
    yield "requirements.txt", "".join(f"{line}\n" for line in pinned_requirements()).encode()
    for root in (source, Path(recon_core.__file__).parent):
        for path in sorted(root.rglob("*")):
            inside = path.relative_to(root)
            if path.is_file() and not any(part in ("__pycache__", "_configs") or part[0] == "." for part in inside.parts):
                yield f"app/{root.name}/{inside.as_posix()}", path.read_bytes()
    configs = package.options.configs
    for name in chain_names(configs):
        yield f"app/gadgets/_configs/{name}.xml", ((configs or config_directory()) / f"{name}.xml").read_bytes()


def pinned_requirements(product: str = "recon-gadgets") -> list[str]:
    """What the program needs to run, with the versions that are installed here, and what these need; sorted.

    torch's local version (``+cpu``) is left out: which build it is is the registry's matter.
    """
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    found: dict[str, str] = {}
    waiting = [Requirement(product)]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        extras = wanted.extras or {""}
        if name in found and extras == {""}:
            continue
        distribution = importlib.metadata.distribution(name)
        found[name] = distribution.version.partition("+")[0]
        for line in distribution.requires or ():
            needed = Requirement(line)
            applies = needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras)
            if applies and canonicalize_name(needed.name) not in found:
                waiting.append(needed)
    del found[canonicalize_name(product)]
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def _dockerfile(package: Package) -> str:
    options, port = package.options, LabelOptions.port
    command = ["python", "-m", "gadgets.openrecon_forward", "--port", str(port)]
    command += ["--server", options.server] if options.server is not None else []
    for name in TLS_FILES:
        command += [f"--tls-{name}", f"/opt/recon/app/tls/{name}.pem"] if getattr(options, f"tls_{name}") is not None else []
    lines = [
        MARK,
        f"# {package.described.chain.name}: {package.described.chain.summary}",
        "# No USER: scanners refuse images that do not run as root.",
        f"FROM {BASE_IMAGE}",
        instruction(package.document()),
        "ENV PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPATH=/opt/recon/app",
    ]
    if options.mode == "cpu":
        command.append("--local")
        lines += [
            "# Where CPU builds of torch are: others need a newer CUDA than the scanner has, and it refuses them.",
            "ARG TORCH_INDEX_URL",
            "COPY requirements.txt /opt/recon/requirements.txt",
            'RUN test -n "$TORCH_INDEX_URL" || { echo "--build-arg TORCH_INDEX_URL=(an index with CPU builds of torch)"; exit 1; } \\',
            ' && grep "^torch==" /opt/recon/requirements.txt > /opt/recon/torch.txt \\',
            ' && python -m pip install --no-cache-dir --no-deps --index-url "$TORCH_INDEX_URL" -r /opt/recon/torch.txt \\',
            " && python -m pip install --no-cache-dir -r /opt/recon/requirements.txt \\",
            ' && python -c "import torch; assert torch.version.cuda is None, torch.version.cuda"',
        ]
    lines += ["COPY app /opt/recon/app", f"EXPOSE {port}", f"CMD {json.dumps(command)}"]
    return "\n".join(lines) + "\n"


def _build_script(package: Package) -> str:
    options = package.options
    again = ["recon", "package", "openrecon", package.described.chain.name, "--output", "."]
    again += ["--vendor", options.vendor, "--version", options.version, "--injector", options.injector]
    again += ["--server", options.server] if options.server is not None else []
    for name in TLS_FILES:
        path = getattr(options, f"tls_{name}")
        again += [f"--tls-{name}", f"context/app/tls/{name}.pem"] if path is not None else []
    again += ["--cpu"] if options.mode == "cpu" else []
    again += ["--image", f"{package.base}.tar"]
    build = ["docker", "build", "--platform", "linux/amd64", "-t", package.tag]
    arguments = ' --build-arg "TORCH_INDEX_URL=$TORCH_INDEX_URL"' if options.mode == "cpu" else ""
    needs = ': "${TORCH_INDEX_URL:?an index with CPU builds of torch}"\n' if options.mode == "cpu" else ""
    quoted = " ".join(again)
    return f"""#!/usr/bin/env bash
{MARK}
# Builds and saves the image, then makes the zip. Takes a Docker engine older than 25: scanners do not read what newer ones save.
set -euo pipefail
cd "$(dirname "$0")"
{needs}engine="$(docker version --format '{{{{.Server.Version}}}}')"
[ "${{engine%%.*}}" -lt 25 ] || {{ echo "Docker engine $engine: scanners need one older than 25" >&2; exit 1; }}
{" ".join(build)}{arguments} context
docker save -o {package.base}.tar {package.tag}
{quoted}
"""


def _write(path: Path, raw: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(raw)
    os.utime(path, (EPOCH, EPOCH))  # part of the image's layers
    return path
