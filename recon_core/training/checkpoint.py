"""Tensors and JSON on disk: training states that can be resumed, and weights that can be trusted. No pickles.

A file pair is a ``.safetensors`` file and a JSON that states its sha256. The JSON is written last and atomically, and names the
tensor file: whoever finds a JSON finds a complete pair, however the writer died.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import nn

from recon_core.errors import DataError, ReconError, WriteError

Tensor = torch.Tensor


MAX_NETWORK_NUMBER = 1024
"""Largest number in the description of a network: a network is built before its tensors can be compared with the file's."""


class WeightError(ReconError):
    """A weight file or checkpoint is missing, damaged, or made for something else."""


# ------------------------------------------------------------------------------------------------------------ file pairs


def write_pair(
    directory: str | Path, name: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], version: str = ""
) -> Path:
    """Write ``<name><version>.safetensors`` and ``<name>.json``, atomically; other versions of the tensors are removed after.

    Without a version the tensors' name is the same again: while they are exchanged there is no JSON.

    Parameters
    ----------
    tensors
        On any device; written as they are, bit for bit.
    facts
        JSON; ``file`` and ``sha256`` are added.
    version
        Distinguishes the tensor file from the one it replaces, so that the old pair is whole until the new one is.

    Returns
    -------
    Path
        The JSON.

    Raises
    ------
    WriteError
        They cannot be written: a full disk, no permission. The pair that was there stays.
    """
    directory = Path(directory)
    file, stated = directory / f"{name}{version}.safetensors", directory / f"{name}.json"
    content = save({key: value.detach().cpu().contiguous() for key, value in tensors.items()})
    facts = {"file": file.name, "sha256": hashlib.sha256(content).hexdigest(), **facts}
    with writing(file):
        directory.mkdir(parents=True, exist_ok=True)
        parts = _on_disk(file, content), _on_disk(stated, _as_text(facts))
        if not version:
            stated.unlink(missing_ok=True)
        for part, final in zip(parts, (file, stated), strict=True):
            os.replace(part, final)
        if version:
            for other in directory.glob(f"{name}*.safetensors*"):  # also what a writer left that was killed
                if other != file:
                    other.unlink()
    return stated


def write_json(path: Path, facts: Mapping[str, Any]) -> Path:
    """Write a JSON document atomically: whoever reads the file finds the old one or the new one, whole.

    Raises
    ------
    WriteError
        It cannot be written.
    """
    with writing(path):
        os.replace(_on_disk(path, _as_text(facts)), path)
    return path


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say which file it is that the system will not write.

    Raises
    ------
    WriteError
        Instead of an ``OSError``.
    """
    try:
        yield
    except OSError as error:
        raise WriteError(
            "cannot be written",
            where=f"{path.parent.name}/{path.name}",
            got=error.strerror or str(error),
            expected="a folder with room, and permission to write",
            remedy="what was written before stays",
        ) from None


def _as_text(facts: Mapping[str, Any]) -> bytes:
    return (json.dumps(facts, indent=1) + "\n").encode()


def _on_disk(final: Path, content: bytes) -> Path:
    """The content beside the file that it is to become; renaming it leaves either the old file or the new one, however one dies."""
    part = final.with_name(f"{final.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            part.unlink()  # half of it would only fill the disk
        raise
    return part


def read_pair(path: str | Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and facts of the pair whose JSON is ``path``.

    Raises
    ------
    WeightError
        No such pair, files that cannot be read, not JSON, a digest that differs from the stated one, or a file that is not safetensors.
    """
    path = Path(path)
    facts, file, stated = _described(path)
    try:
        found = sha256_of(file)
    except OSError as error:
        raise WeightError("cannot be read", where=file.name, got=error.strerror) from None
    if found != stated:
        raise WeightError(
            "wrong sha256",
            where=file.name,
            got=found[:16],
            expected=str(stated)[:16],
            remedy="the file is damaged or was exchanged: install it again",
        )
    try:
        return load_file(file, device=str(device)), facts
    except SafetensorError as error:
        raise WeightError("not a safetensors file", where=file.name, got=str(error)) from None


def stated_digest(path: str | Path) -> str:
    """The sha256 that the JSON ``path`` of a pair states of its tensors, which are not read.

    Raises
    ------
    WeightError
        No such pair.
    """
    return str(_described(Path(path))[2])


def stored_shape(path: str | Path, name: str) -> tuple[int, ...]:
    """Shape of one tensor of the pair whose JSON is ``path``; the tensors are not read, and no digest is compared.

    Raises
    ------
    WeightError
        No such pair, a file that is not safetensors, or one without that tensor.
    """
    path = Path(path)
    _, file, _ = _described(path)
    try:
        with safe_open(file, framework="pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())
    except SafetensorError as error:
        raise WeightError("not a safetensors file", where=file.name, got=str(error), expected=f"tensor '{name}'") from None


def _described(path: Path) -> tuple[dict[str, Any], Path, str]:
    """What the JSON of a pair says, the file of its tensors, which exists, and the digest that they should have."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        file = path.parent / Path(str(facts["file"])).name
        stated = facts["sha256"]
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise WeightError("no such weights", where=path.name, expected="the JSON file that names them") from None
    except OSError as error:
        raise WeightError("cannot be read", where=path.name, got=error.strerror) from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise WeightError("not a description of weights", where=path.name, got=type(error).__name__) from None
    if _largest(facts.get("network")) > MAX_NETWORK_NUMBER:
        raise WeightError(
            "not a network that fits into a machine", where=path.name, expected=f"numbers up to {MAX_NETWORK_NUMBER}"
        )
    if not file.is_file():
        raise WeightError("the tensors are missing", where=path.name, got=f"no {file.name}")
    return facts, file, stated


def _largest(value: object) -> float:
    """The largest number (or number of entries) in a part of a JSON document: it would become layers and channels."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return max(len(value), *(_largest(entry) for entry in value), 0)
    return abs(value) if isinstance(value, int | float) else 0


def read_weights(
    path: str | Path, device: torch.device | str, method: str, form: int
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """`read_pair` of a method's weights.

    Raises
    ------
    WeightError
        As `read_pair`; weights of another method, or in another format than ``form``.
    """
    tensors, facts = read_pair(path, device)
    if facts.get("method") != method or facts.get("format") != form:
        got = f"{facts.get('method')} format {facts.get('format')}"
        raise WeightError("weights of another kind", where=Path(path).name, got=got, expected=f"{method} format {form}")
    return tensors, facts


def sha256_of(path: str | Path) -> str:
    """Hexadecimal digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Load weights by name.

    Raises
    ------
    WeightError
        Names or shapes differ.
    """
    wanted = module.state_dict()
    wrong = sorted(set(wanted) ^ set(tensors)) or sorted(k for k in wanted if wanted[k].shape != tensors[k].shape)
    if wrong:
        raise WeightError("weights of another network", where=where, got=f"{len(wrong)} tensors differ, first {wrong[0]}")
    module.load_state_dict(dict(tensors))


# -------------------------------------------------------------------------------------------------------- training state


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of an optimiser's state, named ``<parameter number>.<entry>``."""
    return {
        f"{number}.{entry}": value
        for number, state in optimizer.state_dict()["state"].items()
        for entry, value in state.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` gave; settings of the groups stay the optimiser's own.

    Raises
    ------
    ValueError
        The state of other parameters.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        of = int(name.partition(".")[0])
        if of >= len(parameters) or (value.ndim and value.shape != parameters[of].shape):
            raise ValueError(f"optimizer state {name} of shape {tuple(value.shape)}")
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, entry = name.partition(".")
        state.setdefault(int(number), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def random_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The global generators of torch (CPU and every CUDA device) and NumPy, as tensors and JSON."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002 - the global one, whoever uses it
    tensors = {"torch": torch.get_rng_state(), "numpy": torch.from_numpy(np.asarray(keys, np.uint32).view(np.int32).copy())}
    if torch.cuda.is_available():
        tensors |= {f"cuda{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return tensors, {"kind": kind, "position": int(position), "has_gauss": int(has_gauss), "gauss": float(gauss)}


def restore_random_state(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Put back what `random_state` gave.

    Raises
    ------
    DataError
        The state of another number of CUDA devices.
    """
    torch.set_rng_state(tensors["torch"].cpu())
    keys = tensors["numpy"].cpu().numpy().view(np.uint32)
    np.random.set_state((facts["kind"], keys, facts["position"], facts["has_gauss"], facts["gauss"]))  # noqa: NPY002
    states = [tensors[f"cuda{i}"].cpu() for i in range(len([k for k in tensors if k.startswith("cuda")]))]
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if states and here:
        if len(states) != here:
            raise DataError("another number of devices", where="checkpoint", got=here, expected=len(states))
        torch.cuda.set_rng_state_all(states)
