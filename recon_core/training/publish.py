"""Make weights ready to ship: ``python -m recon_core.training.publish DIR/pinqi.json --output FOLDER --name pinqi_t1``.

Copies a pair under another name, by default with half the digits (float16): rounding to 0.05 % is far below what training leaves
open, and halves what every installation carries. What the JSON says stays, with the original's sha256 beside the new one.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from recon_core.errors import ReconError, SettingError
from recon_core.training.checkpoint import WeightError, read_pair, write_pair

_OWN = {"file", "sha256", "trained_sha256", "stored_as", "method", "format", "network"}
"""Facts on which reading the weights depends."""
DTYPES = {"float16": torch.float16, "float32": torch.float32}


def publish(
    source: str | Path, output: str | Path, name: str, dtype: str = "float16", facts: Mapping[str, Any] | None = None
) -> Path:
    """Write ``output/name.safetensors`` and ``output/name.json``.

    Parameters
    ----------
    source
        JSON of the weights that a training left.
    dtype
        ``"float16"`` or ``"float32"``, of all floating-point tensors.
    facts
        Added to the JSON.

    Returns
    -------
    Path
        The JSON.

    Raises
    ------
    WeightError
        The source is missing or damaged, or no weights: a checkpoint.
    SettingError
        A weight that the smaller format cannot hold, or a fact that the files or the method state themselves.
    """
    tensors, stated = read_pair(source)
    if "method" not in stated:
        raise WeightError("no weights of a method", where=Path(source).name, expected="the JSON that a training exports")
    if taken := sorted(_OWN & set(facts or {})):
        raise SettingError("not for you to state", where="--fact", got=", ".join(taken), expected="other facts than those")
    smaller = {key: value.to(DTYPES[dtype]) if value.is_floating_point() else value for key, value in tensors.items()}
    if lost := sorted(key for key, value in smaller.items() if not bool(torch.isfinite(value).all())):
        raise SettingError("weights do not fit the format", where=dtype, got=lost[0], remedy="use float32")
    original = stated.pop("sha256")
    del stated["file"]
    return write_pair(output, name, smaller, {**stated, "stored_as": dtype, "trained_sha256": original, **(facts or {})})


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m recon_core.training.publish", description=__doc__)
    parser.add_argument("source", type=Path, help="JSON that a training left")
    parser.add_argument("--output", type=Path, required=True, help="folder, for instance recon_core/weights")
    parser.add_argument("--name", required=True)
    parser.add_argument("--dtype", default="float16", choices=sorted(DTYPES))
    parser.add_argument(
        "--fact", type=_fact, action="append", default=[], metavar="KEY=TEXT", help="added to the JSON; repeat"
    )
    options = parser.parse_args(arguments)
    try:
        print(publish(options.source, options.output, options.name, options.dtype, dict(options.fact)))
    except ReconError as error:
        parser.exit(1, f"{parser.prog}: {error}\n")


def _fact(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"'{text}' is not KEY=TEXT")
    return key, value


if __name__ == "__main__":
    main()
