"""OpenRecon's label: the JSON that tells a scanner what a container is, what it needs, and which parameters to show.

The scanner reads it from the image's label, base64 of UTF-8. A label that the scanner cannot use is only found out there, so it is
checked here: against the schema (`gadgets.openrecon_schema`), and for what the schema passes over (a choice's default among its values,
one ``config``, ranges that hold their defaults).
"""

from __future__ import annotations

import base64
import json
import re
from dataclasses import dataclass
from typing import Any

from gadgets import __version__
from gadgets.errors import MalformedText
from gadgets.manifest import MAX_UNIT, Manifest, Parameter
from gadgets.openrecon_schema import LABEL_NAME, SCHEMA
from recon_core.errors import ReconError

PORT = 9002
MAX_INFORMATION = 400


class LabelRefused(ReconError):
    """A label that a scanner would not accept, or could not run."""


@dataclass(frozen=True)
class LabelOptions:
    """Who packages the chain, and what the container needs.

    Attributes
    ----------
    vendor
        Letters and digits: part of the file's name.
    version
        Semantic version. The scanner does not install the same version again.
    memory_mb, cores
        What the container needs at most.
    port
        That it listens on, inside.
    injector
        ``compleximage`` (what open packages that take raw data use) or ``image``.
    """

    vendor: str = "recongadgets"
    version: str = __version__
    memory_mb: int = 1024
    cores: int = 1
    port: int = PORT
    injector: str = "compleximage"


def product_name(chain: str) -> str:
    """The chain's name in file names, which use underscores to separate their parts."""
    return re.sub(r"[^a-z0-9]", "", chain.lower())


def label(described: Manifest, options: LabelOptions | None = None) -> dict[str, Any]:
    """The metadata of a container that runs one chain, checked.

    Raises
    ------
    LabelRefused
        It would not be accepted (what, and where), or ``jsonschema`` is not installed.
    """
    options = options or LabelOptions()
    chain, name = described.chain, product_name(described.chain.name)
    research = "Research software, not a medical device"
    document = {
        "general": {
            "name": {"en": name},
            "version": options.version,
            "vendor": options.vendor,
            "information": {"en": chain.summary},
            "id": name,
            "regulatory_information": {
                "device_trade_name": name,
                "production_identifier": options.version,
                "manufacturer_address": options.vendor,
                "made_in": "unknown",
                "manufacture_date": "unknown",  # a date would make every package a different one
                "material_number": f"{name}_{options.version}",
                "gtin": "00000000000000",
                "udi": f"(00)00000000000000(00){options.version}",
                "safety_advices": f"{research}. Not for diagnosis.",
                "special_operating_instructions": "None",
                "additional_relevant_information": research,
            },
        },
        "reconstruction": {
            "transfer_protocol": {"protocol": "ISMRMRD", "version": "1.4.1"},
            "port": options.port,
            "emitter": "raw",
            "injector": options.injector,
            "can_process_adjustment_data": True,
            "can_use_gpu": False,
            "min_count_required_gpus": 0,
            "min_required_memory": options.memory_mb,
            "min_count_required_cpu_cores": options.cores,
            "content_qualification_type": "RESEARCH",
        },
        "parameters": [_config(chain.name), *(_parameter(p) for p in described.parameters)],
    }
    check(document)
    return document


def check(document: Any) -> None:
    """Refuse a label that the scanner would refuse, or accept and then fail with.

    Raises
    ------
    LabelRefused
    """
    try:
        import jsonschema
    except ImportError:
        raise LabelRefused(
            "cannot be checked",
            where="OpenRecon label",
            got="no jsonschema",
            remedy="pip install 'recon-gadgets[openrecon]'",
        ) from None
    errors = sorted(jsonschema.Draft7Validator(SCHEMA).iter_errors(document), key=lambda e: list(map(str, e.absolute_path)))
    if errors:
        worst = jsonschema.exceptions.best_match(errors) or errors[0]
        place = ".".join(map(str, worst.absolute_path)) or "the whole"
        raise LabelRefused(
            "not OpenRecon metadata 1.1.0",
            where=f"label {place}",
            got=worst.message[:200],
            expected=f"{len(errors)} errors fewer",
        )
    if re.fullmatch(r"[A-Za-z0-9]+", document["general"]["vendor"]) is None:
        raise LabelRefused(
            "not usable in a file name",
            where="label general.vendor",
            got=repr(document["general"]["vendor"]),
            expected="letters and digits",
        )
    ids = [parameter["id"] for parameter in document["parameters"]]
    if len({i.lower() for i in ids}) < len(ids):
        raise LabelRefused("two parameters with one id", where="label parameters", got=", ".join(ids))
    if [p["type"] for p in document["parameters"] if p["id"] == "config"] != ["choice"]:
        raise LabelRefused("no choice named 'config'", where="label parameters", got=", ".join(ids))
    for parameter in document["parameters"]:
        _check_default(parameter)


def is_version(text: str) -> bool:
    """Whether ``text`` is a version as the scanner wants it: three numbers. (The schema takes more, an image's tag does not.)"""
    return re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", text, re.ASCII) is not None


def text_of(document: Any) -> str:
    """The label's JSON, the same text every time."""
    return json.dumps(document, indent=2, ensure_ascii=True)


def instruction(document: Any) -> str:
    """The line of a Dockerfile that sets the label."""
    return f'LABEL "{LABEL_NAME}"="{encode(document)}"'


def encode(document: Any) -> str:
    """The value of the image's label."""
    return base64.b64encode(text_of(document).encode()).decode()


def decode(value: str) -> Any:
    """The JSON of an image's label.

    Raises
    ------
    MalformedText
        Not base64 of a JSON text.
    """
    try:
        return json.loads(base64.b64decode(value, validate=True).decode())
    except ValueError:
        raise MalformedText("not base64 of a JSON text", where="OpenRecon label", got=value[:40]) from None


def _config(chain: str) -> dict[str, Any]:
    return {
        "id": "config",
        "label": {"en": "Chain"},
        "type": "choice",
        "values": [{"id": chain, "name": {"en": chain}}],
        "default": chain,
        "information": {"en": "The reconstruction that the server runs"},
    }


def _parameter(parameter: Parameter) -> dict[str, Any]:
    words = parameter.help
    short = 0 < len(parameter.unit) <= MAX_UNIT
    if parameter.unit and not (short and parameter.kind in ("int", "double")):
        words += f" ({parameter.unit})"
    shown: dict[str, Any] = {
        "id": parameter.id,
        "label": {"en": parameter.label},
        "type": parameter.kind,
        "information": {"en": words[:MAX_INFORMATION]},
        "default": parameter.default,
    }
    if parameter.kind in ("int", "double"):
        assert parameter.low is not None and parameter.high is not None  # of this kind because it has both
        ends = (parameter.low, parameter.high)
        low, high = map(int, ends) if parameter.kind == "int" else ends
        shown |= {"minimum": low, "maximum": high}
        if short:
            shown["unit"] = {"en": parameter.unit}
    elif parameter.kind == "choice":
        shown["values"] = [{"id": choice, "name": {"en": choice.replace("_", " ")}} for choice in parameter.choices]
    elif parameter.kind == "string" and parameter.low is not None and parameter.high is not None:
        shown["information"] = {"en": f"{words[: MAX_INFORMATION - 60]}; {parameter.low:.12g} to {parameter.high:.12g}"}
    return shown


def _check_default(parameter: dict[str, Any]) -> None:
    where, default = f"label parameters.{parameter['id']}", parameter.get("default")
    if parameter["type"] == "choice":
        known = [value["id"] for value in parameter["values"]]
        if len(set(known)) < len(known):
            raise LabelRefused("a value twice", where=where, got=", ".join(known))
        if default not in known:
            raise LabelRefused(
                "the default is none of the values", where=where, got=repr(default), expected=", ".join(known)
            )
    elif parameter["type"] in ("int", "double") and not parameter["minimum"] <= parameter["default"] <= parameter["maximum"]:
        raise LabelRefused("the default is out of range", where=where, got=default)
