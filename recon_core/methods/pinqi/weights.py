"""Trained weights with what they were trained for: written by training, read by the method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from recon_core.errors import ReconError
from recon_core.methods.pinqi.model import Pinqi, PinqiSettings
from recon_core.methods.pinqi.noise_rule import DEFAULT_RULE, NoiseRule
from recon_core.signal_models import SaturationRecovery, SignalModel
from recon_core.solvers.nonlinear_layer import NonlinearSettings
from recon_core.training.checkpoint import WeightError, load_into, read_weights, write_pair

METHOD = "pinqi"
FORMAT = 1
MODELS = {"saturation_recovery": SaturationRecovery}
TIME_TOLERANCE = 1e-3 + 1e-9  # s: headers round, and so do differences


@dataclass(frozen=True)
class TrainedPinqi:
    """A network and what it is good for.

    Attributes
    ----------
    network
        In evaluation mode, on the device asked for.
    times
        Delay of every state in s, in the order in which the network knows them.
    amplitude
        What `recon_core.problem.signal_scale` gives for a typical training sample: a scan must be brought to it.
    facts
        Everything else that the JSON says: recipe, seed, commit, metrics, sha256.
    noise_rule
        How the lambdas follow the noise of a scan; chosen for these weights, or the default.
    """

    network: Pinqi
    times: tuple[float, ...]
    amplitude: float
    facts: Mapping[str, Any]
    noise_rule: NoiseRule = DEFAULT_RULE


def save_weights(directory: str | Path, name: str, network: Pinqi, times: Sequence[float], facts: Mapping[str, Any]) -> Path:
    """Write ``<name>.safetensors`` and ``<name>.json``.

    Parameters
    ----------
    facts
        Recipe, seed, commit, metrics, ``amplitude``.
    """
    model = next(key for key, kind in MODELS.items() if isinstance(network.model, kind))
    settings = {k: v for k, v in asdict(network.settings).items() if k not in ("precision", "recompute")}
    stated = {
        "method": METHOD,
        "format": FORMAT,
        "signal_model": model,
        "times": list(times),
        "is_complex": network.model.is_complex,
        "network": settings,
        **facts,
    }
    return write_pair(directory, name, network.state_dict(), stated)


def load_weights(
    path: str | Path, device: torch.device | str = "cpu", precision: str = "float32", nonlinear_solver: str = "lm"
) -> TrainedPinqi:
    """The network whose JSON is ``path``, with a solver of Eq. 13 (see `NonlinearSettings.of`): any serves weights of any.

    Raises
    ------
    WeightError
        Missing, damaged (sha256), of another method or another network.
    """
    tensors, facts = read_weights(path, device, METHOD, FORMAT)
    where = Path(path).name
    solver = NonlinearSettings.of(nonlinear_solver)
    if facts.get("signal_model") not in MODELS:
        got, known = str(facts.get("signal_model")), ", ".join(MODELS)
        raise WeightError("weights of another kind", where=where, got=got, expected=known)
    try:
        times, amplitude = tuple(float(t) for t in facts["times"]), float(facts["amplitude"])
        if not 0 < amplitude < math.inf:
            raise ValueError(f"amplitude {amplitude}, expected above 0")
        settings = PinqiSettings(**{**facts["network"], "precision": precision})
        rule = NoiseRule.from_facts(facts["noise_rule"]) if "noise_rule" in facts else DEFAULT_RULE
        model: SignalModel = MODELS[facts["signal_model"]](times, is_complex=bool(facts["is_complex"]))
        network = Pinqi(model, settings, nonlinear=solver)
    except (AttributeError, KeyError, TypeError, ValueError, ReconError) as error:
        raise WeightError("incomplete description of weights", where=where, got=str(error)) from None
    network = network.to(device).eval()
    load_into(network, tensors, where)
    return TrainedPinqi(network.requires_grad_(False), times, amplitude, facts, rule)


def check_times(trained: TrainedPinqi, times: Sequence[float]) -> None:
    """Refuse a scan with other delays than the weights were trained for.

    Raises
    ------
    WeightError
        Another number of states, or another delay by more than a millisecond.
    """
    same = len(times) == len(trained.times) and all(
        abs(a - b) <= TIME_TOLERANCE for a, b in zip(times, trained.times, strict=True)
    )
    if not same:
        raise WeightError(
            "the weights were trained for other delays",
            where="pinqi",
            got=f"{len(times)} states: " + ", ".join(f"{t:g}" for t in times) + " s",
            expected=f"{len(trained.times)} states: " + ", ".join(f"{t:g}" for t in trained.times) + " s",
            remedy="train weights for these delays, or use the chain's fallback",
        )
