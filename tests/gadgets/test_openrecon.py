"""OpenRecon: the label is one that scanners accept, and packages are the same bytes every time."""

from __future__ import annotations

import base64
import copy
import io
import json
import re
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.testing import CliRunner

from gadgets.chain import chain_names
from gadgets.cli import app
from gadgets.manifest import manifest
from gadgets.openrecon_forward import parser
from gadgets.openrecon_image import (
    EPOCH,
    Package,
    PackageOptions,
    PackageRefused,
    check_image,
    pinned_requirements,
    write_context,
    write_zip,
)
from gadgets.openrecon_label import LabelOptions, LabelRefused, check, decode, encode, instruction, label, product_name
from gadgets.openrecon_schema import LABEL_NAME, SCHEMA
from tests.gadgets.certificates import authority
from tests.waiting import PATIENCE

FORWARD = PackageOptions(server="gpu.example:9002")


def test_the_schema_is_a_schema() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("name", chain_names())
def test_every_chain_has_a_valid_label(name: str) -> None:
    document = label(manifest(name))
    assert 2 <= len(document["parameters"]) <= 14
    config = document["parameters"][0]
    assert (config["id"], config["type"], config["default"]) == ("config", "choice", name)
    assert document["reconstruction"]["emitter"] == "raw"
    assert document["general"]["id"] == product_name(name)
    # what the scanner reads is exactly this
    assert decode(encode(document)) == document
    found = re.fullmatch(r'LABEL "([^"]+)"="([A-Za-z0-9+/=]+)"', instruction(document))
    assert found is not None and found[1] == LABEL_NAME
    assert json.loads(base64.b64decode(found[2])) == document


def parameter(document: dict[str, Any], kind: str) -> dict[str, Any]:
    found: dict[str, Any] = next(p for p in document["parameters"] if p["type"] == kind and p["id"] != "config")
    return found


def extra(document: dict[str, Any], n: int) -> None:
    document["parameters"] += [{"id": f"x{i}", "type": "boolean", "label": {"en": "x"}, "default": True} for i in range(n)]


BREAKS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "an underscore in an id": (lambda d: parameter(d, "int").update(id="virtual_coils"), "parameters"),
    "a unit of four characters": (lambda d: parameter(d, "int").update(unit={"en": "mmHg"}), "parameters"),
    "an int that is none": (lambda d: parameter(d, "int").update(default=1.5), "parameters"),
    "an int beyond 32 bits": (lambda d: parameter(d, "int").update(maximum=2**31), "parameters"),
    "a double of 0.3": (lambda d: parameter(d, "double").update(default=0.3), "parameters"),
    "a double of 0.05": (lambda d: parameter(d, "double").update(default=0.05), "parameters"),
    "fifteen parameters": (lambda d: extra(d, 15 - len(d["parameters"])), "parameters"),
    "a version of two numbers": (lambda d: d["general"].update(version="1.0"), "general.version"),
    "a key too many": (lambda d: d["general"].update(colour="red"), "general"),
    "no safety advices": (lambda d: d["general"]["regulatory_information"].pop("safety_advices"), "regulatory_information"),
    "another protocol": (lambda d: d["reconstruction"]["transfer_protocol"].update(version="1.5.0"), "transfer_protocol"),
    "no cores": (lambda d: d["reconstruction"].update(min_count_required_cpu_cores=0), "reconstruction"),
    "an empty choice": (lambda d: parameter(d, "choice").update(values=[]), "parameters"),
    "a nameless value": (lambda d: parameter(d, "choice")["values"].append({"id": "", "name": {"en": ""}}), "parameters"),
    # what the schema lets through, and the scanner does not
    "a default that is no value": (lambda d: parameter(d, "choice").update(default="magic"), "none of the values"),
    "a value twice": (lambda d: parameter(d, "choice")["values"].append(parameter(d, "choice")["values"][0]), "twice"),
    "a default out of range": (lambda d: parameter(d, "int").update(default=10**6), "out of range"),
    "no config": (lambda d: d["parameters"].pop(0), "config"),
    "a config that is text": (
        lambda d: d["parameters"][0].update(type="string") or d["parameters"][0].pop("values"),
        "config",
    ),
    "one id twice": (lambda d: d["parameters"].append({**parameter(d, "boolean"), "label": {"en": "other"}}), "one id"),
    "a vendor with an underscore": (lambda d: d["general"].update(vendor="a_b"), "vendor.*got 'a_b'"),
    "no table": (lambda d: d.clear(), "whole"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_label_that_the_scanner_would_refuse_is_refused_here(what: str) -> None:
    document = copy.deepcopy(label(manifest("llr")))
    change, words = BREAKS[what]
    change(document)
    with pytest.raises(LabelRefused, match=words):
        check(document)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (PackageOptions(), "nobody would reconstruct"),
        (PackageOptions(server="gpu"), "not an address"),
        (PackageOptions(server="gpu:0"), "not an address"),
        (PackageOptions(server="gpu:70000"), "not an address"),
        (PackageOptions(server='a"; rm -rf /; ":1'), "not an address"),
        (PackageOptions(server="gpu:9002", version="1.0"), "not a version"),
        (PackageOptions(server="gpu:9002", version="1.0.0\nRUN x"), "not a version"),
        (PackageOptions(server="gpu:9002", version="1.0.0+site"), "not a version"),
        (PackageOptions(server="gpu:9002", tls_key=Path("key.pem")), "no authority"),
        (PackageOptions(mode="cpu", tls_ca=Path("ca.pem")), "no server"),
        (PackageOptions(server="gpu:9002", vendor="a b"), "vendor"),
        (PackageOptions(server="gpu:9002", injector="nothing"), "injector"),
    ],
)
def test_a_package_that_could_not_work_is_refused(options: PackageOptions, words: str) -> None:
    with pytest.raises((PackageRefused, LabelRefused), match=words):
        Package(manifest("llr"), options)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("options", [FORWARD, PackageOptions(mode="cpu")], ids=["forward", "cpu"])
def test_a_package_is_the_same_bytes_every_time(tmp_path: Path, options: PackageOptions) -> None:
    package = Package(manifest("llr_t1"), options)
    written = write_context(package, tmp_path / "a")
    first = contents(tmp_path / "a")
    write_context(package, tmp_path / "a")
    write_context(package, tmp_path / "b")
    assert contents(tmp_path / "a") == first == contents(tmp_path / "b")
    assert set(first) == {p.relative_to(tmp_path / "a").as_posix() for p in written}
    assert {p.stat().st_mtime for p in (tmp_path / "b" / "context").rglob("*") if p.is_file()} == {EPOCH}
    manual = first["OpenRecon_recongadgets_llrt1_V0.1.0.pdf"]
    assert manual.startswith(b"%PDF-") and manual.rstrip().endswith(b"%%EOF")
    for name, raw in first.items():
        if name.endswith((".py", ".xml", ".json", ".sh", ".txt", "Dockerfile")):
            assert b"\r" not in raw and str(Path.cwd()).encode() not in raw, name


def test_the_forwarder_needs_nothing_but_the_standard_library(tmp_path: Path) -> None:
    write_context(Package(manifest("llr"), FORWARD), tmp_path)
    app = tmp_path / "context" / "app"
    assert sorted(p.relative_to(app).as_posix() for p in app.rglob("*.py")) == [
        "gadgets/__init__.py",
        "gadgets/openrecon_forward.py",
        "gadgets/relay.py",
        "gadgets/tls.py",
        "gadgets/wire/__init__.py",
        "gadgets/wire/dialect.py",
        "recon_core/__init__.py",
        "recon_core/errors.py",
    ]
    # -S -E: no installed package can help
    command = ["python3", "-S", "-E", "-c", "import sys; sys.path.insert(0, 'app'); import gadgets.openrecon_forward"]
    subprocess.run(command, cwd=tmp_path / "context", check=True, timeout=PATIENCE)


def test_the_cpu_image_brings_pinned_packages_and_a_check_of_its_torch(tmp_path: Path) -> None:
    package = Package(manifest("llr"), PackageOptions(mode="cpu", server="gpu:9002"))
    write_context(package, tmp_path)
    lines = (tmp_path / "context" / "requirements.txt").read_text().splitlines()
    assert lines == pinned_requirements() == sorted(lines, key=lambda line: line.partition("=")[0])
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9][0-9A-Za-z.]*", line) for line in lines)
    names = {line.partition("=")[0] for line in lines}
    assert {"torch", "numpy", "ismrmrd", "typer"} <= names and not {"pytest", "recon-gadgets", "mypy"} & names
    dockerfile = (tmp_path / "context" / "Dockerfile").read_text()
    assert "torch.version.cuda is None" in dockerfile and '"--local"' in dockerfile and "gpu:9002" in dockerfile
    assert package.document()["reconstruction"]["min_required_memory"] > 4096
    assert (tmp_path / "context" / "app" / "gadgets" / "_configs" / "llr.xml").is_file()
    assert not list(tmp_path.rglob("__pycache__"))


@pytest.mark.parametrize("options", [FORWARD, PackageOptions(mode="cpu")], ids=["forward", "cpu"])
def test_the_script_that_builds_is_sound(tmp_path: Path, options: PackageOptions) -> None:
    write_context(Package(manifest("llr"), options), tmp_path)
    script = tmp_path / "build.sh"
    assert script.stat().st_mode & 0o100
    subprocess.run(["shellcheck", str(script)], check=True, timeout=PATIENCE)
    assert "-lt 25" in script.read_text()


def test_certificates_become_part_of_the_image(tmp_path: Path) -> None:
    signer = authority(tmp_path / "authority")
    files = dict(zip(("ca", "cert", "key"), map(Path, (signer.certificate, *signer.issue("image"))), strict=True))
    package = Package(manifest("llr"), replace(FORWARD, tls_ca=files["ca"], tls_cert=files["cert"], tls_key=files["key"]))
    write_context(package, tmp_path)
    dockerfile = (tmp_path / "context" / "Dockerfile").read_text()
    script = (tmp_path / "build.sh").read_text()
    for name in files:
        assert (tmp_path / "context" / "app" / "tls" / f"{name}.pem").read_bytes() == files[name].read_bytes()
        assert f'"--tls-{name}", "/opt/recon/app/tls/{name}.pem"' in dockerfile and f"--tls-{name} context/app" in script
    # as the container starts it: every option is known
    words = json.loads(dockerfile.split("CMD ")[1])
    options = parser().parse_args(words[3:])
    assert (options.server, options.tls_ca) == ("gpu.example:9002", "/opt/recon/app/tls/ca.pem")


def test_anothers_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "context").mkdir()
    (tmp_path / "context" / "Dockerfile").write_text("FROM scratch\n")
    with pytest.raises(PackageRefused, match="another folder"):
        write_context(Package(manifest("llr"), FORWARD), tmp_path)
    assert (tmp_path / "context" / "Dockerfile").read_text() == "FROM scratch\n"


# ---- the saved image and the zip --------------------------------------------------------------------------------------------


def saved_image(
    path: Path, package: Package, *, config: dict[str, Any] | None = None, manifest_entries: Any = None, **top: Any
) -> Path:
    """As ``docker save`` writes it, with one small layer."""
    run = {"Labels": {LABEL_NAME: encode(package.document())}, "User": "", **(config or {})}
    document = {"os": "linux", "architecture": "amd64", "config": run, **top}
    entries = [{"Config": "blobs/config.json", "RepoTags": [package.tag], "Layers": ["layer.tar"]}]
    members = {
        "manifest.json": json.dumps(entries if manifest_entries is None else manifest_entries).encode(),
        "blobs/config.json": json.dumps(document).encode(),
        "layer.tar": bytes(1000),
    }
    with tarfile.open(path, "w") as archive:
        for name, raw in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            archive.addfile(entry, io.BytesIO(raw))
    return path


def test_the_zip_holds_image_and_manual_and_nothing_else(tmp_path: Path) -> None:
    package = Package(manifest("llr"), FORWARD)
    write_context(package, tmp_path)
    image = saved_image(tmp_path / "any.tar", package)
    made = write_zip(package, tmp_path, image)
    assert made.name == "OpenRecon_recongadgets_llr_V0.1.0.zip"
    first = made.read_bytes()
    assert write_zip(package, tmp_path, image).read_bytes() == first
    with zipfile.ZipFile(made) as archive:
        assert archive.testzip() is None
        entries = {e.filename: e for e in archive.infolist()}
        assert set(entries) == {"OpenRecon_recongadgets_llr_V0.1.0.tar", "OpenRecon_recongadgets_llr_V0.1.0.pdf"}
        assert {e.compress_type for e in entries.values()} == {zipfile.ZIP_DEFLATED}
        assert archive.read("OpenRecon_recongadgets_llr_V0.1.0.tar") == image.read_bytes()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"config": {"User": "recon"}}, "root"),
        ({"config": {"User": "1000:0"}}, "root"),
        ({"config": {"Labels": {}}}, "label"),
        ({"config": {"Labels": None}}, "label"),
        ({"architecture": "arm64"}, "linux/arm64"),
        ({"manifest_entries": []}, "no usable"),
        ({"manifest_entries": {"Config": "x"}}, "no usable"),
        ({"manifest_entries": [{"Config": "layer.tar", "RepoTags": []}]}, "no usable"),
        ({"manifest_entries": [{"Config": "blobs/config.json", "RepoTags": None}]}, "another tag"),
    ],
)
def test_an_image_that_a_scanner_would_refuse_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    package = Package(manifest("llr"), FORWARD)
    with pytest.raises(PackageRefused, match=words):
        check_image(package, saved_image(tmp_path / "x.tar", package, **change))


def test_an_image_of_other_settings_or_no_image_is_refused(tmp_path: Path) -> None:
    package = Package(manifest("llr"), FORWARD)
    other = Package(manifest("llr"), replace(FORWARD, injector="image"))
    with pytest.raises(PackageRefused, match="another label"):
        check_image(package, saved_image(tmp_path / "x.tar", other))
    (tmp_path / "y.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(PackageRefused, match="cannot be read"):
        check_image(package, tmp_path / "y.tar")


def test_options_of_the_label() -> None:
    document = label(
        manifest("llr"), LabelOptions(vendor="clinic", version="2.3.4", memory_mb=2000, cores=3, injector="image")
    )
    assert (document["general"]["vendor"], document["general"]["version"]) == ("clinic", "2.3.4")
    assert document["reconstruction"]["injector"] == "image"


def test_the_command(tmp_path: Path) -> None:
    run = CliRunner().invoke
    made = run(app, ["package", "openrecon", "llr", "-o", str(tmp_path), "--server", "gpu:9002", "--vendor", "clinic"])
    assert made.exit_code == 0, made.exception
    assert Path(made.output.split()[-1]) == tmp_path / "build.sh" and (tmp_path / "build.sh").is_file()
    package = Package(manifest("llr"), PackageOptions(server="gpu:9002", vendor="clinic"))
    image = saved_image(tmp_path / "image.tar", package)
    again = [
        "package",
        "openrecon",
        "llr",
        "-o",
        str(tmp_path),
        "--server",
        "gpu:9002",
        "--vendor",
        "clinic",
        "--image",
        str(image),
    ]
    assert Path(run(app, again).output.strip()).name == "OpenRecon_clinic_llr_V0.1.0.zip"
    assert isinstance(run(app, ["package", "openrecon", "llr", "-o", str(tmp_path)]).exception, PackageRefused)
