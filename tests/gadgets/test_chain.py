"""Chain files, overrides and configuration texts: names are picked from a list, code is refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from gadgets.chain import (
    chain_faults,
    chain_from_script,
    chain_names,
    config_directory,
    describe_chain,
    load_chain,
    noise_dependency_request,
    require_chains,
)
from gadgets.errors import ConfigRefused, UnknownChain
from gadgets.service import Service, ServiceOptions
from recon_core.errors import SettingError
from recon_core.methods import methods

WIRE = Path(__file__).parent.parent / "data" / "wire-captures"


def test_every_shipped_chain_loads_with_an_installed_method_and_fallback() -> None:
    assert {"fourier", "cg_sense", "llr", "grasp_pro"} <= set(chain_names())
    for name in chain_names():
        chain = load_chain(name)
        assert chain.name == name
        assert chain.method in methods()
        assert chain.fallback is None or chain.fallback in chain_names()
        assert chain.fallback != name


def test_every_method_has_a_chain() -> None:
    assert {load_chain(name).method for name in chain_names()} == set(methods())


def test_the_suffix_of_the_file_is_optional() -> None:
    assert load_chain("llr.xml") == load_chain("llr")


@pytest.mark.parametrize(
    "name", ["default.xml", "", "../configs/llr", "/etc/passwd", "PATH", "llr.xml.xml", "LLR", "os", "llr\0", "x" * 900]
)
def test_an_unknown_name_is_an_error_that_lists_the_known_ones(name: str) -> None:
    with pytest.raises(UnknownChain) as caught:
        load_chain(name)
    assert all(known in str(caught.value) for known in chain_names())
    assert len(str(caught.value)) < 400


def test_overrides_arrive_as_text_and_are_typed() -> None:
    chain = load_chain("llr", {"prewhiten": "False", "virtual_coils": "6"})
    assert chain.preprocess.prewhiten is False
    assert chain.preprocess.virtual_coils == 6
    assert load_chain("llr").preprocess.prewhiten is True


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"no_such_thing": "1"}, "no_such_thing"),
        ({"virtual_coils": "many"}, "virtual_coils"),
        ({"virtual_coils": "0"}, "out of range"),
        ({"partial_fourier": "magic"}, "pocs"),
        ({"prewhiten": "perhaps"}, "prewhiten"),
        ({"method": "llr"}, "method"),
    ],
)
def test_a_bad_override_says_which_and_what_was_expected(overrides: dict[str, str], words: str) -> None:
    with pytest.raises(SettingError, match=words):
        load_chain("fourier", overrides)


@pytest.mark.parametrize(
    ("overrides", "method", "fit"),
    [
        ({}, 6.0, 6.0),
        ({"t1Max": "4"}, 4.0, 4.0),
        ({"map_t1_max": "3"}, 3.0, 3.0),
        ({"t1_max": "4", "map_t1_max": "3"}, 4.0, 3.0),
    ],
)
def test_limits_of_t1_are_the_same_whoever_makes_the_map(overrides: dict[str, str], method: float, fit: float) -> None:
    chain = load_chain("pinqi_t1", overrides)
    assert (chain.settings.t1_max, chain.maps.map_t1_max) == (method, fit) and len(chain.changed) == len(overrides)


def test_a_bad_limit_is_told_by_the_name_that_was_given() -> None:
    with pytest.raises(SettingError, match=r"\bt1_max\b.*abc"):
        load_chain("pinqi_t1", {"t1Max": "abc"})


def test_a_shipped_file_sent_as_a_script_is_the_same_chain() -> None:
    for name in chain_names():
        text = (config_directory() / f"{name}.xml").read_text()
        sent, installed = chain_from_script(text), load_chain(name)
        assert (sent.method, sent.settings, sent.preprocess, sent.output) == (
            installed.method,
            installed.settings,
            installed.preprocess,
            installed.output,
        )


def test_a_script_may_be_a_bare_name_or_carry_settings() -> None:
    assert chain_from_script(" cg_sense \n").name == "cg_sense"
    text = (config_directory() / "fourier.xml").read_text()
    changed = text.replace(
        "</configuration>\n    </external>", '<property name="prewhiten" value="false"/></configuration></external>'
    )
    assert changed != text
    assert chain_from_script(changed).preprocess.prewhiten is False


STREAM = "<configuration><version>2</version><stream>{}</stream></configuration>"


@pytest.mark.parametrize(
    "script",
    [
        STREAM.format('<external><execute name="os" target="system" type="python"/></external>'),
        STREAM.format('<external><execute name="gadgets" target="fourier" type="matlab"/></external>'),
        STREAM.format('<external><connect address="10.0.0.1" port="9"/></external>'),
        STREAM.format("<gadget><dll>x</dll><classname>Y</classname></gadget>"),
        STREAM.format('<external><execute name="gadgets" target="fourier" type="python"/></external><external/>'),
        STREAM.format("<parallel/>"),
        STREAM.format(""),
        "<configuration><version>2</version><readers><reader><dll>evil</dll><classname>R</classname></reader></readers></configuration>",
        "<configuration><version>3</version></configuration>",
        "<gadgetronStreamConfiguration/>",
        '<!DOCTYPE c [<!ENTITY a "b">]><configuration>&a;</configuration>',
        "<configuration>",
        "import os; os.system('true')",
        "",
    ],
)
def test_a_script_that_names_code_or_is_no_configuration_is_refused(script: str) -> None:
    with pytest.raises(ConfigRefused):
        chain_from_script(script)


def test_a_script_for_a_chain_that_is_not_installed() -> None:
    with pytest.raises(UnknownChain, match="fourier"):
        chain_from_script(STREAM.format('<external><execute name="gadgets" target="nothing" type="python"/></external>'))


def test_the_recorded_noise_dependency_script_is_recognised_and_nothing_else() -> None:
    raw = (WIRE / "client_noise_dependency.bin").read_bytes()
    start = raw.index(b"<?xml")
    text = raw[start : raw.index(b"</gadgetronStreamConfiguration>") + len(b"</gadgetronStreamConfiguration>")].decode()
    assert noise_dependency_request(text) == "66056_1_2_3"
    assert noise_dependency_request((config_directory() / "llr.xml").read_text()) is None
    assert noise_dependency_request("NoiseSummaryGadget".join(["<a>", "</a>"])) is None


def test_every_setting_is_documented() -> None:
    for name in chain_names():
        for group, infos in describe_chain(name).items():
            for info in infos:
                assert len(info.help) > 5, f"{name} {group} {info.name}"


def test_a_site_can_bring_its_own_chain_files(tmp_path: Path) -> None:
    text = (config_directory() / "llr.xml").read_text().replace('target="llr"', 'target="our_llr"')
    (tmp_path / "our_llr.xml").write_text(text)
    assert chain_names(tmp_path) == ("our_llr",)
    assert load_chain("our_llr", directory=tmp_path).method == "llr"
    with pytest.raises(UnknownChain):
        load_chain("llr", directory=tmp_path)


def site_chain(folder: Path, prewhiten: str) -> Path:
    """A site's own chain file, with one setting of its own."""
    end = "</configuration>\n    </external>"
    text = (config_directory() / "llr.xml").read_text().replace('target="llr"', 'target="our_llr"')
    assert end in text
    path = folder / "our_llr.xml"
    path.write_text(text.replace(end, f'<property name="prewhiten" value="{prewhiten}"/>{end}'))
    return path


def test_a_folder_without_chains_is_refused_before_a_scanner_finds_out(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "misspelt"):
        with pytest.raises(SettingError, match=r"configs .*: no chain files; expected a folder .*--configs"):
            Service(ServiceOptions(port=0, spool=None, configs=folder, rehearse=False))
    require_chains(None)


def test_a_chain_that_cannot_answer_or_has_no_stand_in_is_told_before_a_scan_needs_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    site_chain(tmp_path, "true")
    (tmp_path / "copied.xml").write_text((config_directory() / "fourier.xml").read_text())
    (tmp_path / "fourier.xml").write_text((config_directory() / "fourier.xml").read_text())
    faults = dict(chain_faults(tmp_path))
    assert faults.keys() == {"copied", "our_llr"}
    assert "target" in faults["copied"] and "copied" in faults["copied"]
    assert "cg_sense" in faults["our_llr"]
    assert not dict(chain_faults(None))
    with caplog.at_level("WARNING"):
        Service(ServiceOptions(port=0, workers=0, spool=None, configs=tmp_path, rehearse=False)).close()
    assert [f"chain={name}" in caplog.text for name in ("copied", "our_llr", "fourier")] == [True, True, False]


def test_an_edited_chain_file_holds_from_the_next_scan_on(tmp_path: Path) -> None:
    before = site_chain(tmp_path, "yes").stat()
    assert load_chain("our_llr", directory=tmp_path).preprocess.prewhiten is True
    path = site_chain(tmp_path, "off")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as old and as long, which some copying leaves behind
    assert path.stat().st_size == before.st_size
    assert load_chain("our_llr", directory=tmp_path).preprocess.prewhiten is False


@pytest.mark.parametrize(
    ("edit", "error", "words"),
    [
        (lambda text: text[: len(text) // 2], ConfigRefused, "chain our_llr: not well-formed XML"),
        (lambda text: "", ConfigRefused, "chain our_llr: not well-formed XML"),
        (lambda text: text.replace('value="yes"', 'value="maybe"'), SettingError, "chain our_llr.*prewhiten"),
        (lambda text: text.replace('"prewhiten"', '"prewhite"'), SettingError, "chain our_llr.*unknown setting.*prewhite"),
        (lambda text: text.replace('value="llr"', 'value="lrl"'), ConfigRefused, "chain our_llr: no such method.*'lrl'"),
        (lambda text: text.replace('target="our_llr"', 'target="llr"'), ConfigRefused, "target is another chain"),
        (lambda text: text.encode("utf-16"), ConfigRefused, "our_llr.xml: the chain file cannot be read"),
        (None, UnknownChain, "no such chain"),
    ],
)
def test_a_broken_edit_is_a_clear_error_until_it_is_mended(tmp_path: Path, edit: Any, error: type, words: str) -> None:
    path = site_chain(tmp_path, "yes")
    good = path.read_text()
    loaded = load_chain("our_llr", directory=tmp_path)
    if edit is None:
        path.unlink()
    else:
        broken = edit(good)
        assert broken != good
        path.write_bytes(broken if isinstance(broken, bytes) else broken.encode())
    with pytest.raises(error, match=words):
        load_chain("our_llr", directory=tmp_path)
    path.write_text(good)
    assert load_chain("our_llr", directory=tmp_path) == loaded
