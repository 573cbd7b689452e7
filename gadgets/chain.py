"""Reconstruction chains: ``configs/<name>.xml`` -> a typed ``Chain``. The allow-list of what the wire may ask for.

A chain file is a real Gadgetron v2 configuration, so that the same file runs inside Gadgetron. Its one ``<execute>`` names the
chain; its ``<configuration>`` holds the settings as properties. The wire picks a chain by name and may override settings; it can
never name code, libraries or addresses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from gadgets.buffer import AcquisitionSettings
from gadgets.compute_settings import ComputeSettings
from gadgets.errors import ConfigRefused, UnknownChain
from gadgets.images import OutputSettings
from gadgets.manifest_ids import by_setting
from recon_core.coils.estimate import CoilSettings
from recon_core.errors import ReconError, SettingError, plain
from recon_core.maps.settings import MapSettings
from recon_core.methods import get_method, methods
from recon_core.preprocess.settings import PreprocessSettings
from recon_core.settings import SettingInfo, describe, parse_settings, unknown_setting

MODULE = "gadgets"
"""The only ``<execute name=...>`` that a chain may have."""

INERT_PARTS = frozenset(
    {
        ("gadgetron_mricore", "GadgetIsmrmrdAcquisitionMessageReader"),
        ("gadgetron_core_readers", "AcquisitionReader"),
        ("gadgetron_core_readers", "WaveformReader"),
        ("gadgetron_core_readers", "ImageReader"),
        ("gadgetron_core_writers", "ImageWriter"),
        ("gadgetron_core_writers", "TextWriter"),
        ("gadgetron_mricore", "MRIImageWriter"),
    }
)
"""Readers and writers that Gadgetron needs in a chain file; this server has its own and ignores them."""

CHAIN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_DECLARATION = re.compile(r"<\?xml[^>]*\?>")
META_PROPERTIES = ("method", "fallback", "summary", "console")


@dataclass(frozen=True)
class Chain:
    """One selectable reconstruction with all its settings resolved.

    Attributes
    ----------
    name, summary
        The console's choice and one line about it.
    method
        Name of a module in ``recon_core.methods``.
    fallback
        The chain that answers when the method fails, or ``None``.
    acquisition, preprocess, coils, maps, output, compute, settings
        Typed settings: sorting, preprocessing, coil maps, parametric maps, images, limits, and the method's own.
    overrides
        What the peer asked for beyond the chain file, by setting.
    changed
        Those of them that differ from the chain file, as text: what log and images say about the scan.
    console
        Settings that a console offers, in the order of its list.
    """

    name: str
    summary: str
    method: str
    fallback: str | None
    acquisition: AcquisitionSettings
    preprocess: PreprocessSettings
    coils: CoilSettings
    maps: MapSettings
    output: OutputSettings
    settings: Any
    overrides: Mapping[str, Any]
    compute: ComputeSettings = field(default_factory=ComputeSettings)
    changed: Mapping[str, str] = field(default_factory=dict)
    console: tuple[str, ...] = ()


SHARED_GROUPS: dict[str, type] = {
    "acquisition": AcquisitionSettings,
    "preprocess": PreprocessSettings,
    "coils": CoilSettings,
    "maps": MapSettings,
    "output": OutputSettings,
    "compute": ComputeSettings,
}


def config_directory() -> Path:
    """Where the shipped chain files are: beside the packages in a checkout, inside the package once installed."""
    installed = Path(__file__).parent / "_configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


def chain_names(directory: Path | None = None) -> tuple[str, ...]:
    """Names of all installed chains, sorted."""
    return tuple(sorted(p.stem for p in (directory or config_directory()).glob("*.xml") if CHAIN_NAME.fullmatch(p.stem)))


def require_chains(directory: Path | None) -> None:
    """A server without chains would refuse every scan: its folder was misspelt, or is not mounted.

    Raises
    ------
    SettingError
        No chain file in the folder that was named.
    """
    if not chain_names(directory):
        raise SettingError(
            "no chain files",
            where=f"configs {directory}",
            expected="a folder with files such as the shipped configs/llr.xml",
            remedy="Without --configs the shipped chains are used",
        )


def chain_faults(directory: Path | None) -> Iterator[tuple[str, str]]:
    """Name and fault of every chain that cannot answer, or whose stand-in cannot: said before a scan needs them."""
    for name in chain_names(directory):
        try:
            fallback = load_chain(name, directory=directory).fallback
        except ReconError as fault:
            yield name, str(fault)
            continue
        if fallback is not None and fallback not in chain_names(directory):
            yield name, f"no stand-in when its method fails: no chain {fallback} in this folder"


def load_chain(name: str, overrides: Mapping[str, Any] | None = None, *, directory: Path | None = None) -> Chain:
    """The chain called ``name`` (an ``.xml`` suffix is allowed), with ``overrides`` on top of its file.

    Raises
    ------
    UnknownChain
        No such chain file; the installed ones are listed. There is never a substitute.
    SettingError
        An override that does not exist, cannot be parsed or is out of range.
    ConfigRefused
        The file, which is read anew each time, is not what it should be.
    """
    folder = directory or config_directory()
    stem = name.removesuffix(".xml")
    # looked up among the names that exist: a path, a variable or a module name can never match
    if stem not in chain_names(folder):
        shown = repr(name if len(name) <= 64 else name[:61] + "...")
        raise UnknownChain("no such chain", got=shown, expected="one of " + ", ".join(chain_names(folder)))
    file_name, properties = _chain_properties(_file_text(folder / f"{stem}.xml"), where=f"chain {stem}")
    if file_name != stem:
        raise ConfigRefused("the file's target is another chain", where=f"chain {stem}", got=file_name, expected=stem)
    return _build(stem, properties, dict(overrides or {}))


def chain_from_script(text: str, overrides: Mapping[str, Any] | None = None, *, directory: Path | None = None) -> Chain:
    """A chain from a CONFIG_SCRIPT: a chain's bare name, or a v2 document whose only node is one of the installed chains.

    The document's properties override the installed file's settings; ``method`` and ``fallback`` stay the installed file's.

    Raises
    ------
    ConfigRefused
        The text is no configuration, or names gadgets, libraries, modules or addresses.
    UnknownChain, SettingError
        As ``load_chain``.
    """
    stripped = text.strip()
    if not stripped.startswith("<"):
        if CHAIN_NAME.fullmatch(stripped.removesuffix(".xml")):
            return load_chain(stripped, overrides, directory=directory)
        raise ConfigRefused(
            "neither a chain name nor a configuration", where="CONFIG_SCRIPT", expected="a v2 <configuration>"
        )
    name, properties = _chain_properties(stripped, where="CONFIG_SCRIPT")
    own = {key: value for key, value in properties.items() if key not in META_PROPERTIES}
    return load_chain(name, {**own, **(overrides or {})}, directory=directory)


def node_properties(text: str) -> dict[str, str]:
    """The properties of the ``<configuration>`` that Gadgetron sends to an external node; none for an empty document.

    Raises
    ------
    ConfigRefused
        Not well-formed, or it holds something else than properties.
    """
    if not _DECLARATION.sub("", text, count=1).strip():
        return {}
    root = _parse(text.strip(), where="node configuration")
    if _tag(root) != "configuration":
        raise ConfigRefused("not a node's configuration", where="node configuration", expected="<configuration>")
    return _properties(root, where="node")


def noise_dependency_request(text: str) -> str | None:
    """The measurement id that the client's noise-dependency connection asks for, or ``None`` for any other script.

    The real client opens that connection with a legacy document whose NoiseSummaryGadget names a file
    ``GadgetronNoiseCovarianceMatrix_<id>``. The document is only looked at, never executed.
    """
    if "NoiseSummaryGadget" not in text:
        return None
    root = _parse(text, where="CONFIG_SCRIPT")
    if _tag(root) != "gadgetronStreamConfiguration":
        return None
    for gadget in (e for e in root if _tag(e) == "gadget"):
        if _child_text(gadget, "classname") != "NoiseSummaryGadget":
            continue
        for prop in (e for e in gadget if _tag(e) == "property"):
            if _child_text(prop, "name") == "noise_file":
                return (_child_text(prop, "value") or "").removeprefix("GadgetronNoiseCovarianceMatrix_")
        return ""
    return None


def describe_chain(name: str, *, directory: Path | None = None) -> dict[str, tuple[SettingInfo, ...]]:
    """All settings of a chain by group, with the chain file's values as defaults."""
    chain = load_chain(name, directory=directory)
    groups = {**{g: getattr(chain, g) for g in SHARED_GROUPS}, "method": chain.settings}
    return {
        group: tuple(_with_default(info, getattr(values, info.name)) for info in describe(type(values)))
        for group, values in groups.items()
    }


def _with_default(info: SettingInfo, value: Any) -> SettingInfo:
    return SettingInfo(**{**vars(info), "default": value})


def _build(name: str, properties: dict[str, str], overrides: dict[str, Any]) -> Chain:
    method = properties.get("method", name)
    fallback = properties.get("fallback") or None
    if method not in methods():
        known = "one of " + ", ".join(methods())
        raise ConfigRefused("no such method", where=f"chain {name}", got=repr(plain(method, 64)), expected=known)
    groups: dict[str, type] = {**SHARED_GROUPS, "method": get_method(method).Settings}
    same_as: dict[str, str] = getattr(groups["method"], "same_as", {})
    owner = {info.name: group for group, cls in groups.items() for info in describe(cls)}
    own = {key: value for key, value in properties.items() if key not in META_PROPERTIES}
    overrides = by_setting(overrides, owner, where=f"chain {name}")
    console = tuple(properties.get("console", "").replace(",", " ").split())
    values = {**own, **overrides}
    unknown = sorted({*values, *console} - set(owner))
    if unknown:
        raise unknown_setting(unknown, owner, where=f"chain {name}")

    def parse(chosen: Mapping[str, Any]) -> dict[str, Any]:
        return {
            group: parse_settings(cls, {k: v for k, v in chosen.items() if owner[k] == group}, where=f"chain {name}")
            for group, cls in groups.items()
        }

    parse(values)  # first, so that an error names what was given
    own = _for_both(own, same_as)
    parsed, asked = parse({**own, **_for_both(overrides, same_as)}), {key: owner[key] for key in overrides}
    shipped = parse(own) if asked else parsed
    changed = {k: getattr(parsed[g], k) for k, g in asked.items() if getattr(parsed[g], k) != getattr(shipped[g], k)}
    settings = parsed.pop("method")
    return Chain(
        name=name,
        summary=properties.get("summary", get_method(method).SUMMARY),
        method=method,
        fallback=fallback,
        settings=settings,
        overrides=overrides,
        changed={key: str(value) for key, value in sorted(changed.items())},
        console=console,
        **parsed,
    )


def _for_both(values: Mapping[str, Any], same_as: Mapping[str, str]) -> dict[str, Any]:
    """``values``, and for each of two settings that say the same, where only one is given, the other with its value."""
    pairs = [*same_as.items(), *((b, a) for a, b in same_as.items())]
    return {**{there: values[here] for here, there in pairs if here in values}, **values}


def _file_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigRefused("the chain file cannot be read", where=path.name, got=type(error).__name__) from None


def _chain_properties(text: str, *, where: str) -> tuple[str, dict[str, str]]:
    """Target and properties of a v2 document that consists of inert readers and writers and one chain of ours."""
    root = _parse(text, where=where)
    if _tag(root) != "configuration":
        raise ConfigRefused(
            "not a Gadgetron v2 configuration", where=where, got=f"<{_tag(root)}>", expected="<configuration>"
        )
    target: str | None = None
    properties: dict[str, str] = {}
    for part in root:
        tag = _tag(part)
        if tag == "version":
            if (part.text or "").strip() != "2":
                raise ConfigRefused("not version 2", where=where, got=repr(part.text))
        elif tag in ("readers", "writers"):
            for entry in part:
                pair = (_child_text(entry, "dll") or "", _child_text(entry, "classname") or "")
                if pair not in INERT_PARTS:
                    raise ConfigRefused(
                        "names a library", where=f"{where} <{tag}>", got="/".join(pair), expected="a chain name"
                    )
        elif tag == "stream":
            target, properties = _stream(part, where=where)
        else:
            raise ConfigRefused("unknown element", where=where, got=f"<{tag}>")
    if target is None:
        raise ConfigRefused(
            "names no chain", where=where, expected=f'<execute name="{MODULE}" target="(a chain)" type="python"/>'
        )
    return target, properties


def _stream(stream: Element, *, where: str) -> tuple[str | None, dict[str, str]]:
    nodes = list(stream)
    if not nodes:
        return None, {}
    if len(nodes) > 1 or _tag(nodes[0]) != "external":
        found = ", ".join(f"<{_tag(n)}>" for n in nodes[:4])
        raise ConfigRefused(
            "names gadgets", where=f"{where} <stream>", got=found, expected="one <external> with a chain's name"
        )
    target: str | None = None
    properties: dict[str, str] = {}
    for entry in nodes[0]:
        tag = _tag(entry)
        if tag == "execute":
            if entry.get("name") != MODULE or entry.get("type", "python") != "python":
                got = f"{entry.get('type', '')} {entry.get('name', '')}".strip()
                raise ConfigRefused(
                    "names code", where=f"{where} <execute>", got=repr(got[:64]), expected=f'name="{MODULE}"'
                )
            target = entry.get("target", "")
        elif tag == "configuration":
            properties = _properties(entry, where=where)
        else:
            raise ConfigRefused(
                "not allowed here", where=f"{where} <external>", got=f"<{tag}>", expected="<execute>, <configuration>"
            )
    if target is not None and not CHAIN_NAME.fullmatch(target):
        raise UnknownChain("no such chain", where=where, got=repr(target[:64]))
    return target, properties


def _properties(node: Element, *, where: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for prop in node:
        if _tag(prop) != "property":
            raise ConfigRefused(
                "unknown element", where=f"{where} <configuration>", got=f"<{_tag(prop)}>", expected="<property>"
            )
        name = prop.get("name") or _child_text(prop, "name")
        value = prop.get("value") if prop.get("value") is not None else _child_text(prop, "value")
        if not name or value is None:
            raise ConfigRefused("a property needs a name and a value", where=f"{where} <configuration>")
        if name in found:
            raise ConfigRefused("a property is given twice", where=f"{where} <configuration>", got=name)
        found[name] = value
    return found


def _parse(text: str, *, where: str) -> Element:
    try:
        return fromstring(text, forbid_dtd=True)
    except DefusedXmlException:
        raise ConfigRefused("XML with a document type or entities", where=where, expected="plain elements") from None
    except (ParseError, ValueError) as error:
        raise ConfigRefused("not well-formed XML", where=where, got=str(error)[:120]) from None


def _tag(node: Element) -> str:
    return str(node.tag).rpartition("}")[2]


def _child_text(node: Element, name: str) -> str | None:
    for child in node:
        if _tag(child) == name:
            return (child.text or "").strip()
    return None
