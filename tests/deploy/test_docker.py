"""Container files: pinned, without root, and every command in them one that the programs understand."""

from __future__ import annotations

import configparser
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest
import typer
import yaml

from gadgets import bookkeeping, results
from gadgets.cli import app
from tests.waiting import PATIENCE

REPOSITORY = Path(__file__).parent.parent.parent
DOCKER = REPOSITORY / "docker"
DOCKERFILES = sorted(path for path in DOCKER.glob("Dockerfile.*") if path.suffix != ".dockerignore")
SCRIPTS = sorted(DOCKER.glob("*.sh"))


def module(name: str) -> ModuleType:
    """A module of the folder ``docker``, which is no package."""
    spec = importlib.util.spec_from_file_location(f"docker_{name}", DOCKER / f"{name}.py")
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = made
    spec.loader.exec_module(made)
    return made


dockerfile = module("dockerfile")
exercise = module("exercise")


def understood_by_recon(arguments: list[str]) -> dict[str, Any]:
    """The options as the command line reads them; an unknown one raises."""
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group) or hasattr(group, "commands")
    command = group.commands[arguments[0]]  # type: ignore[attr-defined]
    return dict(command.make_context(arguments[0], list(arguments[1:])).params)


def understood_by_dask(words: list[str]) -> dict[str, Any]:
    from distributed.cli.dask_scheduler import main as scheduler
    from distributed.cli.dask_worker import main as worker

    assert words[0] == "dask"
    command = {"scheduler": scheduler, "worker": worker}[words[1]]
    return dict(command.make_context(words[1], list(words[2:])).params)


def expanded(text: str) -> str:
    """``${NAME:-default}`` as without the variable."""
    return re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text)


def assert_pinned(image: str) -> None:
    name, _, tag = image.rpartition(":")
    assert "." not in name.split("/")[0], f"{image}: names a registry's host"
    assert image.count(":") == 1 and tag not in ("latest", "stable", ""), f"{image}: not an exact tag"
    assert re.search(r"\d+\.\d+\.\d+", tag) or name == "recon-gadgets", f"{image}: not an exact version"


# ---- Dockerfiles ----------------------------------------------------------------------------------------------------------------


def test_there_are_both_kinds() -> None:
    assert [path.name for path in DOCKERFILES] == ["Dockerfile.cpu", "Dockerfile.gpu"]


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_is_pinned_staged_and_without_root(path: Path) -> None:
    read = dockerfile.read(path)
    assert len(read.stages) == 2
    for stage in read.stages:
        assert_pinned(stage.base)
    last = read.stages[-1]
    user = last.last("USER").text
    assert user == "10001:10001"
    # nothing after USER needs root, and nothing of the build's tools is left
    assert [i.name for i in last.instructions].index("USER") > max(
        i for i, x in enumerate(last.instructions) if x.name == "RUN"
    )
    assert {i.copied[0] for i in last.all("COPY")} == {"build"}
    assert last.last("EXPOSE").text == "9002"
    for name in ("HEALTHCHECK", "ENTRYPOINT", "CMD"):
        assert last.last(name).command, f"{name} in its exec form: signals reach the program"
    assert len(last.all("HEALTHCHECK")) == len(last.all("CMD")) == len(last.all("ENTRYPOINT")) == 1


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_run_steps_are_careful(path: Path) -> None:
    """What linters of Dockerfiles ask for."""
    text = path.read_text(encoding="utf-8")
    assert "://" not in text, "addresses come from build arguments"
    for stage in dockerfile.read(path).stages:
        for step in stage.all("RUN"):
            for part in re.split(r"&&|;|\|\|", step.text):
                assert not re.search(r"\b(sudo|curl|wget|ADD)\b", part)
                assert "apt-get install" not in part or "--no-install-recommends" in part
                if "pip install" in part:
                    assert "--constraint requirements.lock" in part or ("--no-deps" in part and " -r " in part), part
            assert not re.search(r"(?<!\|)\|(?!\|)", step.text) or "pipefail" in step.text, "a pipe hides a failure"
        for step in stage.all("WORKDIR"):
            assert step.text.startswith("/")


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_what_is_copied_exists_and_is_not_left_out(path: Path) -> None:
    ignore = path.with_name(path.name + ".dockerignore").read_text(encoding="utf-8").split("\n")
    assert ignore[1] == "*"
    taken = {line[1:] for line in ignore if line.startswith("!")}
    build = dockerfile.read(path).stages[0]
    sources = {source for step in build.all("COPY") for source in step.copied[1]}
    assert sources == taken
    assert all((REPOSITORY / source).exists() for source in sources)


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_the_command_is_one_and_lets_nobody_in_by_default(path: Path) -> None:
    last = dockerfile.read(path).stages[-1]
    options = understood_by_recon(last.last("CMD").command)
    assert options["host"] == "0.0.0.0" and list(options["allow"]) == ["127.0.0.1"] and not options["allow_any"]
    check = last.last("HEALTHCHECK").command
    compile(check[2], "HEALTHCHECK", "exec")


def test_the_build_s_tools_are_pinned() -> None:
    lines = [line for line in (DOCKER / "build-requirements.txt").read_text().splitlines() if not line.startswith("#")]
    assert lines and all(re.fullmatch(r"[a-z0-9-]+==[0-9.]+", line) for line in lines)


@pytest.mark.parametrize(
    "text", ["ONBUILD x", "FROM a\nADD x y", "FROM a b c", "RUN x", "FROM a\nRUN x \\", "", "FROM a\nCOPY --chown=1 a b"]
)
def test_what_the_reader_does_not_understand_it_refuses(tmp_path: Path, text: str) -> None:
    (tmp_path / "Dockerfile").write_text(text)
    with pytest.raises(dockerfile.Unreadable):
        for stage in dockerfile.read(tmp_path / "Dockerfile").stages:
            for step in stage.all("COPY"):
                assert step.copied


def test_the_reader_joins_lines_and_passes_over_comments(tmp_path: Path) -> None:
    text = '# x\nARG TAG=1.2.3\nFROM a:${TAG} AS one\nRUN a \\\n# between\n && b\n\nENV A=1 B=\'x y\'\nFROM one\nCMD ["c", "d"]\n'
    (tmp_path / "Dockerfile").write_text(text)
    one, two = dockerfile.read(tmp_path / "Dockerfile").stages
    assert (one.base, one.name, one.last("RUN").text, one.last("RUN").line) == ("a:1.2.3", "one", "a  && b", 4)
    assert one.last("ENV").pairs == {"A": "1", "B": "x y"}
    assert two.last("CMD").command == ["c", "d"]


# ---- exercise.py: it finds what is wrong ------------------------------------------------------------------------------------------

GOOD = """FROM python:3.11.14-slim AS run
RUN mkdir -p /opt/recon/bin && printf '#!/bin/sh\\n{body}\\n' > /opt/recon/bin/recon && chmod +x /opt/recon/bin/recon
RUN ln -s "$(command -v python)" /opt/recon/bin/python
ENV PATH=/opt/recon/bin:$PATH HOME=/var/lib/recon XDG_STATE_HOME=/var/lib/recon XDG_CACHE_HOME=/var/lib/recon
HEALTHCHECK CMD ["python", "-c", "{check}"]
ENTRYPOINT ["recon"]
CMD ["serve"]
"""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("FROM a:1\nRUN true\nRUN false\n", "line 3: RUN ended with 1"),
        ("FROM a:1\nRUN cd /opt/nowhere\n", "line 2: RUN ended with"),
        ("FROM a:1\nCOPY no_such_file ./\n", "nothing to copy at no_such_file"),
        ("FROM a:1 AS one\nRUN true\nFROM a:1\nCOPY --from=one /opt/recon /opt/recon\n", "nothing to copy at /opt/recon"),
        (GOOD.format(body="exit 0", check="raise SystemExit(1)"), "ended at once with 0"),
        (GOOD.format(body="sleep 100", check="pass"), "passes before anything listens"),
        (
            'FROM a:1\nENV HOME=/opt XDG_STATE_HOME=/opt XDG_CACHE_HOME=/opt\nCMD ["no_such"]\n',
            "no_such is not in the image",
        ),
    ],
    ids=[
        "a step fails",
        "a folder is missing",
        "nothing to copy",
        "nothing in the stage",
        "ends at once",
        "always healthy",
        "no command",
    ],
)
def test_the_exercise_finds_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, words: str) -> None:
    (tmp_path / "Dockerfile").write_text(text)
    assert exercise.main([str(tmp_path / "Dockerfile")]) == 1
    assert words in capsys.readouterr().err


def test_the_exercise_keeps_paths_from_stage_to_stage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = """FROM a:1 AS build
ARG WORD=none
WORKDIR /src
COPY README.md ./
RUN test -s README.md && mkdir -p /opt/recon && echo "#!/bin/sh\necho said $WORD" > /opt/recon/say && chmod +x /opt/recon/say
FROM a:1 AS run
COPY --from=build /opt/recon /opt/recon
ENV PATH=/opt/recon:$PATH
RUN say && test ! -e /src
"""
    (tmp_path / "Dockerfile").write_text(text.replace("\necho said", "\\necho said"))
    assert exercise.main(["--no-serve", "--build-arg", "WORD=hello", str(tmp_path / "Dockerfile")]) == 0
    assert "said hello" in capfd.readouterr().out
    assert not Path("/opt/recon/say").exists()


# ---- compose and Kubernetes -----------------------------------------------------------------------------------------------------------


def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text(encoding="utf-8"))
    return found


def test_compose_is_of_known_parts_and_closed_to_the_outside() -> None:
    document = compose()
    assert {key for key in document if not key.startswith("x-")} == {"name", "services", "networks", "volumes"}
    known = {
        "build", "cap_drop", "command", "depends_on", "deploy", "image", "init", "networks", "ports", "profiles", "read_only", "restart",
        "security_opt", "shm_size", "stop_grace_period", "tmpfs", "volumes",
    }  # fmt: skip
    for name, service in document["services"].items():
        assert set(service) <= known, name
        assert_pinned(expanded(service["image"]))
        assert service["cap_drop"] == ["ALL"] and "no-new-privileges:true" in service["security_opt"]
        for port in service["ports"]:
            assert expanded(port).startswith("127.0.0.1:"), f"{name}: {port} is open to the network"
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert source in document["volumes"] or (DOCKER / source).exists()
        assert set(service["networks"]) <= set(document["networks"])
        assert set(service.get("depends_on", {})) <= set(document["services"])
        if "build" in service:
            assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


@pytest.mark.parametrize("name", ["recon", "recon-gpu"])
def test_compose_starts_a_server_that_sends_to_the_archive(name: str) -> None:
    service = compose()["services"][name]
    options = understood_by_recon([expanded(word) for word in service["command"]])
    assert list(options["pacs"]) == ["ORTHANC@orthanc:4242"] and not options["allow_any"]
    orthanc = json.loads((DOCKER / "orthanc.json").read_text(encoding="utf-8"))
    assert (orthanc["DicomAet"], orthanc["DicomPort"]) == ("ORTHANC", 4242)
    assert options["pacs_calling"] in {modality[0] for modality in orthanc["DicomModalities"].values()}
    assert not orthanc["DicomAlwaysAllowStore"] and orthanc["DicomCheckCalledAet"]
    assert service["shm_size"] and service["read_only"] and "/tmp" in service["tmpfs"]


TIDYING = results.CLOSE_SECONDS + 2 * bookkeeping.CLOSE_SECONDS + 30.0
"""s that a server may take when its scans are over: image files, the last rows, the thread of jobs without a client."""


@pytest.mark.parametrize("name", ["recon", "recon-gpu"])
def test_compose_waits_for_scans_under_way(name: str) -> None:
    service = compose()["services"][name]
    options = understood_by_recon([expanded(word) for word in service["command"]])
    minutes = re.fullmatch(r"(\d+)m", service["stop_grace_period"])
    assert minutes is not None and 300 <= options["stop_seconds"] <= 60 * int(minutes[1]) - TIDYING


KINDS = {
    "PersistentVolumeClaim": "v1",
    "Service": "v1",
    "Deployment": "apps/v1",
    "NetworkPolicy": "networking.k8s.io/v1",
}


def objects() -> list[dict[str, Any]]:
    # one by one: an anchor of one document is unknown in the next
    text = (DOCKER / "kubernetes.yaml").read_text(encoding="utf-8")
    return [yaml.safe_load(part) for part in text.split("\n---\n")]


def deployments() -> dict[str, dict[str, Any]]:
    return {o["metadata"]["name"]: o for o in objects() if o["kind"] == "Deployment"}


def test_kubernetes_objects_are_whole_and_belong_together() -> None:
    found = objects()
    names = {(o["kind"], o["metadata"]["name"]) for o in found}
    assert len(names) == len(found)
    labels = [o["spec"]["template"]["metadata"]["labels"] for o in deployments().values()]
    for o in found:
        assert KINDS[o["kind"]] == o["apiVersion"] and o["metadata"]["namespace"] == "recon"
        if o["kind"] == "Deployment":
            assert o["spec"]["selector"]["matchLabels"].items() <= o["spec"]["template"]["metadata"]["labels"].items()
        if o["kind"] == "Service":
            (target,) = [d for d in deployments().values() if o["spec"]["selector"].items()
                         <= d["spec"]["template"]["metadata"]["labels"].items()]  # fmt: skip
            ports = {p["name"] for c in target["spec"]["template"]["spec"]["containers"] for p in c["ports"]}
            assert {p["targetPort"] for p in o["spec"]["ports"]} <= ports
        if o["kind"] == "NetworkPolicy" and "matchLabels" in o["spec"]["podSelector"]:
            assert any(o["spec"]["podSelector"]["matchLabels"].items() <= each.items() for each in labels)


@pytest.mark.parametrize("name", ["recon", "dask-scheduler", "dask-worker"])
def test_a_pod_has_no_more_rights_than_it_needs(name: str) -> None:
    pod = deployments()[name]["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == 10001
    volumes = {volume["name"] for volume in pod["volumes"]}
    for container in pod["containers"]:
        own = container["securityContext"]
        assert (
            not own["allowPrivilegeEscalation"]
            and own["readOnlyRootFilesystem"]
            and own["capabilities"] == {"drop": ["ALL"]}
        )
        assert_pinned(container["image"])
        assert "memory" in container["resources"]["limits"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounts.values()) <= volumes and {"/tmp", "/var/lib/recon", "/tls"} <= set(mounts)


def test_the_cluster_s_commands_are_understood_and_fit_each_other(tmp_path: Path) -> None:
    for name in ("ca.pem", "cert.pem", "key.pem"):
        (tmp_path / name).touch()  # the command line looks whether they are there

    def here(words: list[str]) -> list[str]:
        return [word.replace("/tls/", f"{tmp_path}/") for word in words]

    def container(name: str) -> dict[str, Any]:
        (found,) = deployments()[name]["spec"]["template"]["spec"]["containers"]
        return dict(found)

    server = understood_by_recon(here(container("recon")["args"]))
    scheduler, worker = (
        understood_by_dask(here(c["command"] + c["args"])) for c in map(container, ("dask-scheduler", "dask-worker"))
    )
    (service,) = [o for o in objects() if o["kind"] == "Service" and o["metadata"]["name"] == "dask-scheduler"]
    port = service["spec"]["ports"][0]["port"]
    assert server["scheduler"] == worker["scheduler"] == f"tls://dask-scheduler:{port}"
    assert int(scheduler["port"]) == port and scheduler["protocol"] == "tls"
    assert str(server["scheduler_ca"]) == scheduler["tls_ca_file"] == worker["tls_ca_file"] == str(tmp_path / "ca.pem")
    assert not server["scheduler_insecure"] and not server["allow_any"]
    assert not scheduler["dashboard"] and not worker["dashboard"]
    assert int(worker["nthreads"]) == 1
    assert container("dask-worker")["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_kubernetes_waits_for_scans_under_way() -> None:
    pod = deployments()["recon"]["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    words = [word for word in container["args"] if "/tls/" not in word]
    assert 300 <= understood_by_recon(words)["stop_seconds"] <= pod["terminationGracePeriodSeconds"] - TIDYING


# ---- scripts ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_sound(path: Path) -> None:
    subprocess.run(["bash", "-n", str(path)], check=True, timeout=PATIENCE)
    subprocess.run(["shellcheck", str(path)], check=True, timeout=PATIENCE)
    assert path.stat().st_mode & 0o100


# ---- without a container --------------------------------------------------------------------------------------------------------


def test_the_unit_of_systemd_says_what_recon_understands_and_waits_long_enough() -> None:
    text = (REPOSITORY / "docs" / "operations.md").read_text(encoding="utf-8")
    unit = configparser.ConfigParser()
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # names as they are written
    unit.read_string(text.split("```ini\n")[1].split("```")[0])
    service = unit["Service"]
    program, *arguments = service["ExecStart"].split()
    assert program.endswith("/recon")
    options = understood_by_recon(arguments)
    assert str(options["spool"]).startswith(f"/var/lib/{service['StateDirectory']}/"), "the only place that it may write"
    assert float(service["TimeoutStopSec"]) > options["stop_seconds"] + 150, (
        "images are finished and rows written after the scans"
    )
