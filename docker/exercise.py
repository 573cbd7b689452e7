#!/usr/bin/env python3
"""Run what Dockerfiles say, without a container engine: every RUN step, then the image's command and its health check.

    python docker/exercise.py docker/Dockerfile.cpu                  # everything is installed anew, as in a build
    python docker/exercise.py --reuse .venv docker/Dockerfile.cpu    # packages are taken from an environment (short)
    python docker/exercise.py --context DIR --no-serve DIR/Dockerfile   # what `recon package openrecon` has written

Paths below /opt, /src and /var/lib/recon lie in a scratch folder; its path stays the same from stage to stage, so what one stage
installs works in the next. The base image's Python is an environment of its own there. ``useradd`` and ``groupadd`` write below it (as
root; others only get told). What is left out: the base image's own system, and changing the user. Exit code 0: all steps ended with 0,
the command listened, the health check passed, and SIGTERM ended the command with 0.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from dockerfile import Dockerfile, Instruction, Stage, read, substitute

REPOSITORY = Path(__file__).resolve().parent.parent
ROOTS = re.compile(r"(?<![\w./])(/opt|/src|/var/lib/recon)(?![\w])")
LEFT_OUT = ("__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache")
LISTENING_SECONDS, END_SECONDS = 400.0, 120.0


class Failed(Exception):
    """A step that did not do what a build needs."""


class Build:
    """One Dockerfile in a scratch folder.

    Parameters
    ----------
    scratch
        An empty folder.
    arguments
        Values for ARG.
    reuse
        Environment whose packages count as installed.
    context
        Folder from which COPY takes files.
    """

    def __init__(
        self,
        dockerfile: Dockerfile,
        scratch: Path,
        arguments: dict[str, str],
        reuse: Path | None,
        context: Path = REPOSITORY,
    ) -> None:
        self.dockerfile, self.scratch, self.arguments, self.reuse, self.context = (
            dockerfile,
            scratch,
            arguments,
            reuse,
            context,
        )
        self.root = scratch / "root"
        self.base = scratch / "base"
        self.tools = scratch / "tools"
        self.n_run = 0
        self._make_tools()

    def run(self) -> dict[str, str]:
        """All stages; returns the environment of the last one."""
        environment: dict[str, str] = {}
        for number, stage in enumerate(self.dockerfile.stages):
            if number:
                self.root.rename(self.scratch / f"stage-{self.dockerfile.stages[number - 1].name}")
            environment = self._stage(stage)
        return environment

    def _stage(self, stage: Stage) -> dict[str, str]:
        self.root.mkdir()
        _say(f"stage {stage.name}, from {stage.base}")
        values = {"PATH": f"{self.tools}:{os.environ['PATH']}"}
        folder = self.root
        for instruction in stage.instructions:
            match instruction.name:
                case "ARG":
                    name = instruction.text.partition("=")[0]
                    given = {name: self.arguments[name]} if name in self.arguments else {}
                    values |= {**instruction.pairs, **given}
                case "ENV":
                    values |= {name: self.inside(substitute(text, values)) for name, text in instruction.pairs.items()}
                case "WORKDIR":
                    folder = Path(self.inside(instruction.text))
                    folder.mkdir(parents=True, exist_ok=True)
                case "COPY":
                    self._copy(instruction, folder)
                case "RUN":
                    self._run(instruction, folder, values)
        return values

    def inside(self, text: str) -> str:
        """Absolute paths of the image as those of the scratch folder."""
        return ROOTS.sub(lambda found: f"{self.root}{found[1]}", text)

    def _copy(self, instruction: Instruction, folder: Path) -> None:
        stage, sources, target = instruction.copied
        origin = self.context if stage is None else self.scratch / f"stage-{stage}"
        for source in sources:
            path = origin / source.lstrip("/")
            into = Path(self.inside(target)) if target.startswith("/") else folder / target
            if not path.exists():
                raise Failed(f"line {instruction.line}: nothing to copy at {source}")
            if path.is_dir():
                shutil.copytree(path, into, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT), dirs_exist_ok=True)
            else:
                file = into / path.name if target.endswith("/") else into
                file.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, file)

    def _run(self, instruction: Instruction, folder: Path, values: dict[str, str]) -> None:
        self.n_run += 1
        _say(f"line {instruction.line}: RUN {instruction.text[:110]}")
        environment = {**os.environ, **values, "EXERCISE_ROOT": str(self.root)}
        environment.pop("PYTHONPATH", None)
        began = time.monotonic()
        done = subprocess.run(["/bin/sh", "-ec", self.inside(instruction.text)], cwd=folder, env=environment)
        if done.returncode:
            raise Failed(f"line {instruction.line}: RUN ended with {done.returncode}")
        _say(f"    done in {time.monotonic() - began:.0f} s")
        self._lend()

    def _lend(self) -> None:
        """Let a new environment see the packages of the one that is reused; what pip installs there still goes before them."""
        if self.reuse is None:
            return
        for site in (*self.root.glob("opt/*/lib/python3*/site-packages"), *self.base.glob("lib/python3*/site-packages")):
            lender = next((self.reuse / "lib").glob("python3*/site-packages"))
            (site / "lent.pth").write_text(f"{lender}\n", encoding="utf-8")

    def _make_tools(self) -> None:
        """Commands of the base image that differ here."""
        self.tools.mkdir()
        installs = any("pip" in step.text for stage in self.dockerfile.stages for step in stage.all("RUN"))
        make = [str(Path(sys._base_executable).resolve()), "-m", "venv", *([] if installs else ["--without-pip"])]
        subprocess.run([*make, str(self.base)], check=True)
        self._lend()
        python = f'#!/bin/sh\nexec "{self.base}/bin/python" "$@"\n'
        writes = os.geteuid() == 0
        for name in ("groupadd", "useradd"):
            real = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
            text = '#!/bin/sh\nmkdir -p "$EXERCISE_ROOT/etc"\ntouch "$EXERCISE_ROOT/etc/passwd" "$EXERCISE_ROOT/etc/group"\n'
            text += (
                f'exec "{real}" --prefix "$EXERCISE_ROOT" "$@"\n'
                if writes and real
                else f'echo "not done here: {name} $*"\n'
            )
            self._tool(name, text)
        if not writes:
            self._tool("chown", '#!/bin/sh\necho "not done here: chown $*"\n')
        self._tool("python", python)

    def _tool(self, name: str, text: str) -> None:
        path = self.tools / name
        path.write_text(text, encoding="utf-8")
        path.chmod(0o755)


def serve(build: Build, environment: dict[str, str]) -> None:
    """The image's command, its health check, and its end.

    Raises
    ------
    Failed
    """
    stage = build.dockerfile.stages[-1]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [word for name in ("ENTRYPOINT", "CMD") for step in stage.all(name)[-1:] for word in step.command or []]
    changed = {"0.0.0.0": "127.0.0.1", "cuda": "cuda" if _has_gpu() else "cpu"}
    command = [changed.get(word, word) for word in command] + ["--port", port]
    values = {**os.environ, **environment}
    for name in ("HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"):
        Path(values[name]).mkdir(parents=True, exist_ok=True)
    _say("CMD " + " ".join(command))
    # looked up in the image's path, as its entry point would be
    executable = shutil.which(command[0], path=values["PATH"])
    if executable is None or not executable.startswith(str(build.root)):
        raise Failed(f"{command[0]} is not in the image")
    with subprocess.Popen([executable, *command[1:]], env=values, cwd=build.root) as process:
        try:
            _wait_until_healthy(stage, process, port, values, build.root)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise Failed("SIGTERM did not end the command") from None
    if process.returncode:
        raise Failed(f"the command ended with {process.returncode}")


def _wait_until_healthy(
    stage: Stage, process: subprocess.Popen[bytes], port: str, values: dict[str, str], root: Path
) -> None:
    check = [word.replace("9002", port) for word in stage.last("HEALTHCHECK").command or []]
    python = shutil.which(check[0], path=values["PATH"])
    if python is None or not python.startswith(str(root)):
        raise Failed(f"the health check's {check[0]} is not the image's")
    until = time.monotonic() + LISTENING_SECONDS
    if not subprocess.run([python, *check[1:]], env=values, cwd=root, capture_output=True).returncode:
        raise Failed("the health check passes before anything listens")
    while time.monotonic() < until:
        if process.poll() is not None:
            raise Failed(f"the command ended at once with {process.returncode}")
        if subprocess.run([python, *check[1:]], env=values, cwd=root, capture_output=True).returncode == 0:
            _say("HEALTHCHECK passed")
            return
        time.sleep(0.5)
    raise Failed("the health check never passed")


def _has_gpu() -> bool:
    return Path("/dev/nvidiactl").exists()


def _say(words: str) -> None:
    print(words, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exercise the files named on the command line."""
    parser = argparse.ArgumentParser(description="Run the RUN steps of Dockerfiles without a container engine.")
    parser.add_argument("dockerfiles", nargs="+", type=Path)
    parser.add_argument("--reuse", type=Path, help="environment whose packages count as installed")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--context", type=Path, default=REPOSITORY, help="folder from which COPY takes files")
    parser.add_argument("--no-serve", action="store_true", help="do not start the image's command")
    chosen = parser.parse_args(arguments)
    values = dict(pair.split("=", 1) for pair in chosen.build_arg)
    for path in chosen.dockerfiles:
        with tempfile.TemporaryDirectory(prefix="recon-docker-") as scratch:
            build = Build(read(path), Path(scratch), values, chosen.reuse and chosen.reuse.resolve(), chosen.context)
            try:
                environment = build.run()
                if not chosen.no_serve:
                    serve(build, environment)
            except Failed as failure:
                print(f"{path}: {failure}", file=sys.stderr)
                return 1
            _say(f"{path}: {build.n_run} RUN steps")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
