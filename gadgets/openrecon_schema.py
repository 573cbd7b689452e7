"""What a scanner accepts as OpenRecon metadata (version 1.1.0), as a JSON schema (draft 7) in our own words.

Public facts: top-level parts, required fields, enumerations, patterns and limits as open OpenRecon packages have to keep them.
"""

from __future__ import annotations

from typing import Any

VERSION = "1.1.0"
LABEL_NAME = f"com.siemens-healthineers.magneticresonance.openrecon.metadata:{VERSION}"
MAX_PARAMETERS = 14
REGULATORY = (
    "device_trade_name",
    "production_identifier",
    "manufacturer_address",
    "made_in",
    "manufacture_date",
    "material_number",
    "gtin",
    "udi",
    "safety_advices",
    "special_operating_instructions",
    "additional_relevant_information",
)  # fmt: skip
SEMVER = r"^(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?(\+[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?$"
_TEXT: dict[str, Any] = {"type": "string"}
_ID: dict[str, Any] = {"type": "string", "pattern": "^[A-Za-z0-9]+$"}
_NATURAL: dict[str, Any] = {"type": "integer", "minimum": 0}
_FLAG: dict[str, Any] = {"type": "boolean"}
_WORDS: dict[str, Any] = {"type": "object", "required": ["en"], "properties": {"en": _TEXT}}
_UNIT: dict[str, Any] = {
    "type": "object",
    "required": ["en"],
    "properties": {"en": {"type": "string", "minLength": 1, "maxLength": 3}},
}
_INT: dict[str, Any] = {"type": "integer", "minimum": -(2**31), "maximum": 2**31 - 1}
_DOUBLE: dict[str, Any] = {"type": "number", "multipleOf": 0.1}
_VALUE: dict[str, Any] = {
    "type": "object",
    "required": ["id", "name"],
    "additionalProperties": False,
    "properties": {"id": {"type": "string", "minLength": 1}, "name": _WORDS},
}


def _closed(required: tuple[str, ...], **properties: dict[str, Any]) -> dict[str, Any]:
    """An object with these properties and no others."""
    return {"type": "object", "required": list(required), "additionalProperties": False, "properties": properties}


def _parameter(kind: str, required: tuple[str, ...], **own: dict[str, Any]) -> dict[str, Any]:
    return _closed(("type", "id", "label", *required), type={"const": kind}, id=_ID, label=_WORDS, information=_WORDS, **own)


SCHEMA: dict[str, Any] = {
    "$schema": "http://json-schema.org/draft-07/schema#",
    "title": f"OpenRecon metadata {VERSION}",
    **_closed(
        ("general", "reconstruction", "parameters"),
        general=_closed(
            ("name", "version", "vendor", "information", "id", "regulatory_information"),
            name=_WORDS,
            version={"type": "string", "pattern": SEMVER},
            vendor=_TEXT,
            information=_WORDS,
            id=_TEXT,
            regulatory_information=_closed(REGULATORY, **{name: _TEXT for name in REGULATORY}),
            license_string=_TEXT,
        ),
        reconstruction=_closed(
            (
                "transfer_protocol",
                "port",
                "emitter",
                "injector",
                "can_use_gpu",
                "min_required_memory",
                "min_count_required_cpu_cores",
            ),
            transfer_protocol=_closed(("protocol", "version"), protocol={"enum": ["ISMRMRD"]}, version={"enum": ["1.4.1"]}),
            port={"type": "integer"},
            emitter={"enum": ["raw", "image"]},
            injector={"enum": ["compleximage", "image"]},
            can_process_adjustment_data=_FLAG,
            can_use_gpu=_FLAG,
            min_count_required_gpus=_NATURAL,
            min_required_gpu_memory=_NATURAL,
            min_required_memory=_NATURAL,
            min_count_required_cpu_cores={"type": "integer", "minimum": 1},
            content_qualification_type={"enum": ["PRODUCT", "SERVICE", "RESEARCH"]},
            require_readout_filter_off=_FLAG,
            channel_compression=_closed(
                (), require_state={"enum": ["on", "off"]}, require_number_target_channels={"type": "integer", "minimum": 1}
            ),
        ),
        parameters={
            "type": "array",
            "maxItems": MAX_PARAMETERS,
            "uniqueItems": True,
            "items": {
                "oneOf": [
                    _parameter("boolean", ("default",), default=_FLAG),
                    _parameter("string", (), default=_TEXT, isLargeText=_FLAG),
                    _parameter(
                        "int", ("minimum", "maximum", "default"), minimum=_INT, maximum=_INT, default=_INT, unit=_UNIT
                    ),
                    _parameter(
                        "double",
                        ("minimum", "maximum", "default"),
                        minimum=_DOUBLE,
                        maximum=_DOUBLE,
                        default=_DOUBLE,
                        unit=_UNIT,
                    ),
                    _parameter(
                        "choice",
                        ("default", "values"),
                        default=_TEXT,
                        values={"type": "array", "minItems": 1, "items": _VALUE},
                    ),
                ]
            },
        },
    ),
}
