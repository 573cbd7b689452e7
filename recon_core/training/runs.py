"""What the programs that train have in common: device, recipe on disk, phases, where the code came from, the command line."""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Self

import torch

import recon_core
from recon_core.errors import ReconError, SettingError
from recon_core.training.checkpoint import read_pair, write_json
from recon_core.training.loop import CHECKPOINT, Progress, TrainingResult
from recon_core.training.png import write_png

Tell = Callable[[str, Progress], None]
"""Told a phase and its progress."""

SET_BY_PROGRAM = ("initial_sha256",)
"""Entries of recipes that are no options of a command."""

RECIPE = "recipe.json"
DATA = "data"
"""Entry of the recipe's file: what is learned from."""


@dataclass(frozen=True)
class TrainingRecipe:
    """Base of the dataclasses that decide the result of a training."""

    def facts(self) -> dict[str, Any]:
        """As JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Self:
        """Back from JSON; keys of other programs are ignored."""
        known = {f.name for f in fields(cls)} & set(facts)
        values: dict[str, Any] = {k: tuple(facts[k]) if isinstance(facts[k], list) else facts[k] for k in known}
        return cls(**values)

    def check_numbers(self, where: str, above_0: Sequence[str], from_0: Sequence[str]) -> None:
        """See that these entries are finite, and above 0 or at least not below.

        Raises
        ------
        SettingError
            One is not.
        """
        for name in (*above_0, *from_0):
            value = getattr(self, name)
            # a NaN compares false: it is refused too
            if not (0 < value < math.inf or (value == 0 and name in from_0)):
                expected = "a finite number, " + ("0 or more" if name in from_0 else "above 0")
                raise SettingError(f"impossible {name}", where=where, got=value, expected=expected)


@dataclass(frozen=True)
class CarryOut:
    """How a training is carried out; nothing here changes its result, but for rounding.

    Attributes
    ----------
    device
        ``"cpu"``, ``"cuda"``, ``"cuda:1"``; ``"auto"`` takes a GPU when there is one.
    max_minutes
        Of this call.
    resume
        Go on in a folder that has a training.
    recompute
        Trade time for memory.
    validate_every, checkpoint_minutes, log_every
        See `LoopSettings`.

    Raises
    ------
    SettingError
        No time at all, or a negative frequency.
    """

    device: str = "auto"
    max_minutes: float = math.inf
    resume: bool = False
    recompute: bool = False
    validate_every: int = 250
    checkpoint_minutes: float = 10.0
    log_every: int = 1

    def __post_init__(self) -> None:
        # a NaN compares false: it is refused too
        if not self.max_minutes > 0:
            raise SettingError("no time to train", where="max_minutes", got=self.max_minutes, expected="above 0")
        for name in ("validate_every", "checkpoint_minutes", "log_every"):
            if not getattr(self, name) >= 0:
                raise SettingError("not a frequency", where=name, got=getattr(self, name), expected="0 or more")


def read_recipe(output: Path) -> dict[str, Any] | None:
    """What the folder's recipe states; ``None`` where no training was begun.

    Raises
    ------
    SettingError
        The file is damaged, or the folder is none.
    """
    try:
        stated = json.loads((output / RECIPE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise _no_folder(output, error) from None
    except (ValueError, RecursionError) as error:
        raise _damaged(output, str(error)) from None
    if not isinstance(stated, dict) or not isinstance(stated.get(DATA, {}), dict):
        raise _damaged(output, type(stated).__name__)
    return stated


def _damaged(output: Path, got: str) -> SettingError:
    return SettingError(
        "the recipe is damaged",
        where=f"{output.name}/{RECIPE}",
        got=got,
        expected="JSON with the choices of a training",
        remedy="put it back from a copy (the JSON of exported weights states it as its recipe), or name another folder",
    )


def _no_folder(output: Path, error: OSError) -> SettingError:
    return SettingError(
        "the training's folder cannot be used",
        where=str(output),
        got=error.strerror,
        expected="a folder, or the name of a new one",
    )


def settle_recipe(recipe: TrainingRecipe, output: Path, resume: bool, data: Mapping[str, str] | None = None) -> None:
    """Write the recipe, or see that the one there is the same.

    To be called when all that can be refused has been: from then on the folder holds a training.

    Parameters
    ----------
    data
        What is learned from but is no choice of the recipe, by name, as digests or words. A recipe from before this was recorded gets it
        when its training is resumed.

    Raises
    ------
    SettingError
        The folder holds a training and ``resume`` is off, one of another recipe or from other data, or a damaged recipe; weights or
        checkpoints without a recipe; or it is no folder, and cannot be made.
    """
    data = dict(data or {})
    stated = read_recipe(output)
    if stated is None:
        _require_unused(output)
        try:
            output.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _no_folder(output, error) from None
        write_json(output / RECIPE, {**recipe.facts(), **({DATA: data} if data else {})})
        return
    if not resume:
        raise SettingError("the folder holds a training", where=output.name, remedy="add --resume, or name another folder")
    _require_same_kind(recipe, output, stated)
    try:
        there = asdict(type(recipe).from_facts(stated))
    except (TypeError, ValueError, AttributeError) as error:
        raise _damaged(output, str(error)) from None
    own, theirs = {**asdict(recipe), **data}, {**there, **stated.get(DATA, {})}
    different = "; ".join(f"{k}: {theirs[k]}, not {own[k]}" for k in own if k in theirs and own[k] != theirs[k])
    if different:
        raise SettingError(
            "the folder holds another training",
            where=output.name,
            got=different,
            remedy="resume with the settings it was begun with, or name another folder",
        )
    if data and DATA not in stated:
        write_json(output / RECIPE, {**stated, DATA: data})


def _require_unused(output: Path) -> None:
    """A training that begins would put its weights in the place of what is there."""
    there = sorted([*output.glob("*.safetensors"), *output.glob(f"*/{CHECKPOINT}.json")])
    if there:
        raise SettingError(
            f"the folder holds weights or checkpoints, but no {RECIPE}",
            where=output.name,
            got=str(there[0].relative_to(output)),
            expected="a folder without them",
            remedy="put the recipe back from a copy (the JSON of exported weights states it), or name another folder",
        )


def _require_same_kind(recipe: TrainingRecipe, output: Path, stated: Mapping[str, Any]) -> None:
    """Choices that are not there have their defaults; choices that this training does not have belong to another method."""
    own = {f.name for f in fields(recipe)}
    foreign = sorted(set(stated) - own - {DATA})
    if foreign:
        raise SettingError(
            "the folder holds a training of another kind",
            where=f"{output.name}/{RECIPE}",
            got=", ".join(foreign),
            expected=f"the choices of {type(recipe).__name__}",
            remedy="name another folder",
        )
    if not own & set(stated):
        raise _damaged(output, "none of its choices")


@contextmanager
def alone_in(output: Path) -> Iterator[None]:
    """Hold a training's folder: of two calls in one folder, each would remove the checkpoints of the other.

    The kernel gives the folder back when the process ends, however it ends.

    Raises
    ------
    SettingError
        Another call holds it.
    """
    fd = os.open(output, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingError(
                "the folder's training is running already",
                where=output.name,
                got="another process",
                remedy="wait for its end, or stop it (SIGTERM: it leaves a checkpoint)",
            ) from None
        except OSError:  # a file system without locks of folders
            pass
        yield
    finally:
        os.close(fd)


def initial_digest(initial: str | None, output: Path, resume: bool) -> str:
    """sha256 of the weights that a training begins, or has begun, with; empty for random ones.

    Raises
    ------
    WeightError
        ``initial`` is no pair of weights.
    SettingError
        There is no training to ``resume``; one that was stopped before its first checkpoint has to be given its initial weights again; or
        a damaged recipe.
    """
    stated = read_recipe(output) if resume else None
    if resume and stated is None:
        raise SettingError(
            "no training to resume",
            where=str(output),
            got=f"no {RECIPE}",
            expected="the folder of one that was begun",
            remedy="leave --resume out to begin one, or name its folder",
        )
    if initial:
        return str(read_pair(initial)[1]["sha256"])
    digest = str((stated or {}).get("initial_sha256", ""))
    if digest and not any(output.glob(f"*/{CHECKPOINT}.json")):
        raise SettingError(
            "stopped before its first checkpoint: it begins anew with its initial weights",
            where=output.name,
            got="no --initial",
            expected=f"weights of sha256 {digest[:16]}",
            remedy="add --initial",
        )
    return digest


def training_device(name: str) -> torch.device:
    """The device called ``name``; ``"auto"``: a GPU when there is one.

    Raises
    ------
    SettingError
        There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
        if device.type == "meta":
            raise RuntimeError("its tensors have no values")
    except (RuntimeError, AssertionError):
        raise SettingError("no such device", where="--device", got=name, expected="auto, cpu or cuda") from None
    return device


def be_deterministic(device: torch.device) -> None:
    """The same sums in the same order in every run: what makes a resumed training equal to an uninterrupted one."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.deterministic = True


def code_facts(device: torch.device) -> dict[str, str]:
    """What trained: the commit, see `commit_of`, versions, device."""
    return {
        "commit": commit_of(Path(recon_core.__file__).parent),
        "version": recon_core.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
    }


def commit_of(package: Path) -> str:
    """The commit that a package's files are of; ``-dirty`` behind it where they have been changed since.

    ``"unknown"`` where no repository holds them: an installation in somebody's project has that project around it, not its own history.
    """

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=package, capture_output=True, text=True, timeout=10, check=True).stdout

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".").strip()
        return git("rev-parse", "HEAD").strip() + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def option_parser(program: str, description: str | None, *kinds: type) -> argparse.ArgumentParser:
    """Options of a plain command; every field of the dataclasses has one, but for `SET_BY_PROGRAM`."""
    p = argparse.ArgumentParser(prog=program, description=description)
    p.add_argument("--output", type=Path, required=True)
    for kind in kinds:
        for name, default in _options(kind).items():
            option = "--" + name.replace("_", "-")
            if isinstance(default, bool):
                p.add_argument(option, action="store_true")
            elif isinstance(default, tuple):
                p.add_argument(option, type=type(default[0]), nargs="+", default=default)
            else:
                p.add_argument(option, type=str if default is None else type(default), default=default)
    p.add_argument("--threads", type=int, default=0, help="CPU threads; 0 leaves torch's choice")
    return p


def parsed_options(parser: argparse.ArgumentParser, arguments: Sequence[str] | None, *kinds: type) -> tuple[Path, list[Any]]:
    """The output folder and an instance of every dataclass; sets the number of threads."""
    given = vars(parser.parse_args(arguments))
    if given["threads"]:
        torch.set_num_threads(given["threads"])
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    return given["output"], [kind(**{k: given[k] for k in _options(kind)}) for kind in kinds]


def _options(kind: type) -> dict[str, Any]:
    """The entries that have an option, with their defaults."""
    return {name: default for name, default in asdict(kind()).items() if name not in SET_BY_PROGRAM}


def export_facts(
    recipe: TrainingRecipe,
    result: TrainingResult,
    device: torch.device,
    steps: Mapping[str, int],
    reached: Mapping[str, int],
) -> dict[str, Any]:
    """What exported weights state of their training.

    Parameters
    ----------
    result
        Of the phase that was reached.
    steps, reached
        Planned and done, by phase; the last one makes the training complete.
    """
    last = list(steps)[-1]
    facts = recipe.facts()
    return {
        "recipe": facts,
        "seed": facts["seed"],
        **code_facts(device),
        "steps": dict(steps),
        "steps_done": dict(reached),
        "finished": result.finished and reached[last] == steps[last],
        "skipped_steps": result.skipped,
        "validation": dict(result.figures),
    }


class Call:
    """One call of a program: its phases share the time, and every one has a folder with checkpoint, log and pictures.

    Parameters
    ----------
    validated
        Whether there is anything to validate on.
    progress
        Told the phase after every step.
    """

    def __init__(self, output: Path, settings: CarryOut, *, validated: bool, progress: Tell | None) -> None:
        self._output, self._settings, self._progress = output, settings, progress
        self._validate_every = settings.validate_every if validated else 0
        self._deadline = time.monotonic() + 60 * settings.max_minutes

    def limits(self) -> dict[str, Any]:
        """Entries of `LoopSettings` for what is left of the time."""
        s = self._settings
        return {
            "max_minutes": max(1e-6, (self._deadline - time.monotonic()) / 60),
            "validate_every": self._validate_every,
            "checkpoint_minutes": s.checkpoint_minutes,
            "log_every": s.log_every,
        }

    def tell(self, phase: str) -> Callable[[Progress], None]:
        """What a phase calls after every step: pictures go to its folder, the rest to ``progress``."""

        def tell(p: Progress) -> None:
            if p.validation is not None:
                for key, image in p.validation.images.items():
                    write_png(self._output / phase / f"{key}_{p.step:06d}.png", image)
            if self._progress is not None:
                self._progress(phase, p)

        return tell


def plain_command(
    parser: argparse.ArgumentParser,
    run: Callable[..., tuple[TrainingResult, Path]],
    arguments: Sequence[str] | None,
    *kinds: type,
) -> None:
    """A training with a line per report; what is refused is said in a line too.

    Parameters
    ----------
    run
        Of recipe, output folder, settings and report.
    kinds
        Of recipe and settings.
    """
    try:
        output, (recipe, settings) = parsed_options(parser, arguments, *kinds)
        result, weights = run(recipe, output, settings, PlainReport(settings.log_every))
    except ReconError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")
    except OSError as error:  # a folder that cannot be made or read
        parser.exit(1, f"{parser.prog}: {error.strerror or error}: {error.filename or ''}\n")
    state = "finished" if result.finished else "stopped, resumable"
    print(f"{state} after {result.minutes:.1f} min{result.skipped_words}: {weights}")


class PlainReport:
    """A line of text per report.

    Parameters
    ----------
    every
        Steps; 0: only validations.
    """

    def __init__(self, every: int) -> None:
        self._every = every

    def __call__(self, name: str, p: Progress) -> None:
        if (self._every and p.step % self._every == 0) or p.validation is not None:
            figures = dict(p.figures) | ({} if p.validation is None else dict(p.validation.figures))
            text = " ".join(f"{k}={v:.4g}" for k, v in figures.items())
            print(f"{name} {p.step}/{p.steps} {p.minutes:.1f} min loss={p.loss:.5f} {text}", flush=True)
