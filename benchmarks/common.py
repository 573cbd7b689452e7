"""What every benchmark shares: which machine this is, one table on the terminal, one JSON in ``benchmarks/results``."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from recon_core.errors import ReconError, SettingError

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "numpy", "scipy", "ismrmrd", "gadgetron", "h5py")


def machine() -> dict[str, Any]:
    """CPU model, cores, memory, versions and commit: what a figure means nothing without. No host names."""
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        "gpu": _gpu(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
        "commit": _commit(),
    }


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write ``results/<name>.json``: the machine, the time and ``result``; an interruption leaves the file that was there."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    document = {"benchmark": name, "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), **result}
    part = path.with_suffix(".part")
    part.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return part.replace(path)


def check_words(option: str, words: Sequence[str], known: Iterable[str]) -> None:
    """Refuse a word that is none of those that are known.

    Raises
    ------
    SettingError
        With the word and those that are known.
    """
    names = list(known)
    for word in words:
        if word not in names:
            raise SettingError("there is no such choice", where=option, got=word, expected=", ".join(names))


def in_words(main: Callable[[], int]) -> int:
    """The exit code of a command; what is refused, missing on disk or not writable is one line on the terminal and code 1."""
    try:
        return main()
    except (ReconError, OSError) as error:
        print(refusal(error), file=sys.stderr)
        return 1


def refusal(error: BaseException) -> str:
    """One line: an error of ours as it is, the system's with the file that it is about, any other with its type."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    text = " ".join(str(error).split())
    return text if isinstance(error, ReconError | OSError) else f"{type(error).__name__}: {text}"


def each_by_itself(parts: Mapping[str, Callable[[], object]]) -> int:
    """Run the parts of a long command one after the other; one that fails is named at the end, and costs only itself.

    Returns
    -------
    int
        Exit code: 1 if any failed.
    """
    failed = []
    for name, part in parts.items():
        try:
            part()
        except SystemExit as error:  # a training that has said why it does not go on; 2: of words that it does not know
            if error.code in (0, 2):
                raise
            failed.append(f"{name}: see above")
        except Exception as error:
            if not isinstance(error, ReconError | OSError):
                traceback.print_exc()
            failed.append(f"{name}: {refusal(error)}")
            print(f"failed: {failed[-1]}", file=sys.stderr, flush=True)
    print("\n".join(["failed:", *failed]) if failed else "all done", flush=True)
    return 1 if failed else 0


def training_options(parser: argparse.ArgumentParser, max_minutes: float, device: str) -> None:
    """Options of a command that trains, as far as its time goes, and then measures."""
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--max-minutes", type=float, default=max_minutes, help="of training; 0 measures only")
    parser.add_argument("--device", default=device)


def training_words(options: argparse.Namespace, recipe: str) -> list[str]:
    """Words for the training's own command; it goes on when the folder holds one (its file ``recipe``)."""
    resume = ["--resume"] if (options.output / recipe).is_file() else []
    return ["--output", str(options.output), "--max-minutes", str(options.max_minutes), "--device", options.device, *resume]


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """One aligned table on the terminal; numbers are set to the right."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(len(name), *(len(row[i]) for row in cells)) if cells else len(name) for i, name in enumerate(columns)]
    print(f"\n{title}")
    print("  ".join(name.ljust(width) for name, width in zip(columns, widths, strict=True)).rstrip())
    print("  ".join("-" * width for width in widths))
    for row, raw in zip(cells, rows, strict=True):
        numbers = [isinstance(value, int | float) for value in raw]
        pairs = zip(row, numbers, widths, strict=True)
        print("  ".join(text.rjust(width) if number else text.ljust(width) for text, number, width in pairs).rstrip())
    info = machine()
    print(f"({info['cpu']}, {info['cores']} cores, python {info['python']}, commit {info['commit']})")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def _gpu() -> str | None:
    return _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")


def _commit() -> str:
    commit = _output("git", "rev-parse", "--short", "HEAD") or "unknown"
    return commit + ("+changes" if _output("git", "status", "--porcelain", "--untracked-files=no") else "")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
