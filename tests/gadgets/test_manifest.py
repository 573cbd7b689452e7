"""What consoles show of a chain: one manifest, and everything that is made from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gadgets.chain import Chain, chain_from_script, chain_names, config_directory, load_chain
from gadgets.cli import app
from gadgets.manifest import MAX_PARAMETERS, ManifestError, manifest, tenths
from gadgets.manifest_formats import DOCS_COMMAND, fire_json, gadgetron_xml, markdown
from gadgets.manifest_ids import by_setting, console_id
from gadgets.openrecon_label import label
from gadgets.wire.session import fire_parameters
from recon_core.errors import SettingError

PUBLISHED = Path(__file__).parent.parent / "data" / "console_ids.json"
DOCS = Path(__file__).parent.parent.parent / "docs" / "chains.md"
REPOSITORY_CHAINS = chain_names()


Ids = dict[str, dict[str, str | list[str]]]
"""By chain and parameter: its kind, or the values of a choice."""


def published() -> Ids:
    found: Ids = json.loads(PUBLISHED.read_text(encoding="utf-8"))
    return found


def current() -> Ids:
    return {
        name: {p.id: sorted(p.choices) if p.kind == "choice" else p.kind for p in manifest(name).parameters}
        for name in REPOSITORY_CHAINS
    }


def added(known: Ids, new: Ids) -> Ids:
    """What is to be kept from now on: nothing that was published is left out."""
    merged: Ids = {name: dict(parameters) for name, parameters in known.items()}
    for name, parameters in new.items():
        kept = merged.setdefault(name, {})
        for key, kind in parameters.items():
            before = kept.setdefault(key, kind)
            if isinstance(before, list) and isinstance(kind, list):
                kept[key] = sorted({*before, *kind})
    return merged


def typed(chain: Chain) -> tuple[object, ...]:
    return (chain.method, chain.acquisition, chain.preprocess, chain.coils, chain.maps, chain.output, chain.settings)


@pytest.mark.parametrize("name", REPOSITORY_CHAINS)
def test_every_chain_says_what_a_console_offers(name: str) -> None:
    described = manifest(name)
    assert 1 <= len(described.parameters) <= MAX_PARAMETERS, (
        f'configs/{name}.xml: property "console", at most {MAX_PARAMETERS}'
    )
    for parameter in described.parameters:
        assert parameter.id.isascii() and parameter.id.isalnum()
        assert parameter.kind != "choice" or parameter.default in parameter.choices
        assert parameter.help and parameter.label


@pytest.mark.parametrize("name", REPOSITORY_CHAINS)
def test_published_parameters_never_change(name: str) -> None:
    """Protocols saved on a scanner keep ids and chosen values: one that vanishes makes the console refuse them.

    After adding parameters, values or chains: ``python -m tests.gadgets.test_manifest`` adds them to the file. Never remove or rename one.
    """
    known = published()
    assert name in known, "a new chain: run python -m tests.gadgets.test_manifest"
    assert current()[name] == known[name]


@pytest.mark.parametrize("name", REPOSITORY_CHAINS)
def test_published_values_can_be_chosen_by_every_way(name: str) -> None:
    """What a saved protocol sends is in the label that consoles read, and the chain takes it."""
    shown = {entry["id"]: entry for entry in label(manifest(name))["parameters"]}
    choices = {key: values for key, values in published()[name].items() if isinstance(values, list)}
    assert choices
    for key, values in choices.items():
        assert sorted(value["id"] for value in shown[key]["values"]) == values
        for value in values:
            load_chain(name, {key: value})  # raises for a value that is none


def test_what_was_published_stays_when_the_file_is_written_anew() -> None:
    known: Ids = {"a": {"gone": "int", "choice": ["one", "two"], "kind": "int"}, "lost": {"x": "int"}}
    new: Ids = {"a": {"choice": ["three", "two"], "kind": "double", "new": "boolean"}, "b": {"y": ["z"]}}
    assert added(known, new) == {
        "a": {"gone": "int", "choice": ["one", "three", "two"], "kind": "int", "new": "boolean"},
        "lost": {"x": "int"},
        "b": {"y": ["z"]},
    }


def test_no_published_chain_vanishes() -> None:
    assert set(published()) <= set(REPOSITORY_CHAINS)


def test_the_page_about_chains_is_up_to_date() -> None:
    assert DOCS.read_text(encoding="utf-8") == markdown(), f"stale: {DOCS_COMMAND} > docs/chains.md"


def test_ids_are_made_by_rule_and_lead_back() -> None:
    assert [console_id(n) for n in ("weight", "virtual_coils", "map_t1_max", "block_3d")] == [
        "weight", "virtualCoils", "mapT1Max", "block3d",
    ]  # fmt: skip
    known = ("virtual_coils", "phase")
    assert by_setting({"virtualCoils": "6", "phase": True, "other": 1}, known, where="x") == {
        "virtual_coils": "6", "phase": True, "other": 1,
    }  # fmt: skip
    with pytest.raises(SettingError, match="given twice"):
        by_setting({"virtualCoils": "6", "virtual_coils": "6"}, known, where="x")


@pytest.mark.parametrize("name", REPOSITORY_CHAINS)
def test_what_fire_sends_by_default_is_the_chain_itself(name: str) -> None:
    """The JSON's defaults, through the parser of the wire, change nothing; and as text neither."""
    parameters = fire_parameters(fire_json(manifest(name)))
    assert parameters is not None and parameters.pop("config") == name
    loaded = load_chain(name, parameters)
    assert typed(loaded) == typed(load_chain(name))
    assert loaded.changed == {}


@pytest.mark.parametrize("name", REPOSITORY_CHAINS)
def test_the_gadgetron_configuration_is_the_chain_itself(name: str) -> None:
    text = gadgetron_xml(manifest(name))
    assert typed(chain_from_script(text)) == typed(load_chain(name))
    assert chain_from_script(text).changed == {}
    for parameter in manifest(name).parameters:
        assert f'<property name="{parameter.setting}" ' in text


def test_console_values_reach_the_typed_settings_and_are_told_apart_from_defaults() -> None:
    sent = {
        "virtualCoils": "8",
        "iterations": "30.0",
        "phase": "True",
        "weight": "0.5",
        "prewhiten": "true",
        "pixelType": "auto",
    }
    chain = load_chain("llr", sent)
    assert (chain.preprocess.virtual_coils, chain.output.phase, chain.settings.weight) == (8, True, 0.5)
    assert chain.settings.iterations == 30
    assert chain.changed == {"phase": "True", "virtual_coils": "8", "weight": "0.5"}


@pytest.mark.parametrize(
    ("sent", "words"),
    [
        ({"virtualCoils": "-3"}, "llr.virtual_coils.*out of range"),
        ({"virtualCoils": "8.5"}, r"virtual_coils: not a valid value; got '8.5'; expected a whole number, 1 to 128$"),
        ({"virtualCoils": "1e999"}, "virtual_coils"),
        ({"weight": "0,5"}, "weight.*expected a number, 0.* to 1000"),
        ({"weight": "nan"}, "not a finite number"),
        ({"phase": "maybe"}, "phase.*expected true or false$"),
        ({"partialFourier": "Pocs"}, "one of zero_fill, homodyne, pocs"),
        ({"virtualcoils": "8"}, "unknown setting; got virtualcoils; .*Is virtual_coils meant.$"),
        ({"": "8"}, "unknown setting"),
        ({"virtualCoils": "8", "virtual_coils": "8"}, "given twice"),
    ],
)
def test_a_value_that_cannot_be_used_is_an_error_that_says_which(sent: dict[str, str], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        load_chain("llr", sent)


def site_chain(folder: Path, console: str) -> Path:
    text = (config_directory() / "llr.xml").read_text(encoding="utf-8").replace('target="llr"', 'target="ours"')
    start = text.index('name="console" value="') + len('name="console" value="')
    (folder / "ours.xml").write_text(text[:start] + console + text[text.index('"', start) :], encoding="utf-8")
    return folder


FOURTEEN = (
    "weight iterations block block_3d power tolerance prewhiten virtual_coils partial_fourier cardiac_phases phase complex magnitude"
    " pixel_type"
)


@pytest.mark.parametrize(
    ("console", "error", "words"),
    [
        ("weight no_such_setting", SettingError, "no_such_setting"),
        ("weight, weight", ManifestError, "twice"),
(FOURTEEN, ManifestError, "too many"),
    ],
)  # fmt: skip
def test_a_console_list_that_cannot_be_shown(tmp_path: Path, console: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        manifest("ours", directory=site_chain(tmp_path, console))


def test_fine_numbers_travel_as_text(tmp_path: Path) -> None:
    """OpenRecon's double takes multiples of 0.1 as binary floats: 0.5, but neither 0.3 nor 0.001."""
    assert [tenths(v) for v in (0.0, 0.1, 0.5, 1.0, 6.0, 1000.0)] == [True] * 6
    assert not any(tenths(v) for v in (0.3, 0.7, 0.05, 1e-3))
    (parameter,) = manifest("ours", directory=site_chain(tmp_path, "min_line_fraction")).parameters
    assert (parameter.kind, parameter.default) == ("double", 0.1)
    (other := tmp_path / "other").mkdir()
    (parameter,) = manifest("ours", directory=site_chain(other, "tick")).parameters
    assert (parameter.kind, parameter.default, parameter.high) == ("string", "0.0025", 1.0)


def test_a_choice_without_a_name_cannot_be_shown(tmp_path: Path) -> None:
    folder = site_chain(tmp_path, "precision")
    text = (folder / "ours.xml").read_text(encoding="utf-8").replace('value="llr"', 'value="moe_dqinr"')
    (folder / "ours.xml").write_text(text, encoding="utf-8")
    with pytest.raises(ManifestError, match="without a name"):
        manifest("ours", directory=folder)


def test_the_command_prints_each_form() -> None:
    run = CliRunner().invoke
    assert json.loads(run(app, ["manifest", "llr"]).output)["general"]["id"] == "llr"
    assert run(app, ["manifest", "llr", "--format", "fire"]).output == fire_json(manifest("llr"))
    assert run(app, ["manifest", "llr", "--format", "gadgetron"]).output == gadgetron_xml(manifest("llr"))
    assert "## llr" in run(app, ["manifest", "llr", "-f", "markdown"]).output
    assert run(app, ["chains", "--docs"]).output == markdown()
    assert isinstance(run(app, ["manifest", "llr", "-f", "pdf"]).exception, SettingError)


if __name__ == "__main__":
    kept = published() if PUBLISHED.exists() else {}
    PUBLISHED.write_text(json.dumps(added(kept, current()), indent=1) + "\n", encoding="utf-8")
