"""What the journal learns of a chain: every setting, and which weights exactly."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace

import pytest

from gadgets.chain import chain_names, load_chain
from gadgets.scan_facts import facts_of
from recon_core.installed_weights import find_installed
from tests.gadgets.scan_factory import mrd_header

TRAINED = [name for name in chain_names() if getattr(load_chain(name).settings, "weights", "")]


def digest(name: str, method: str) -> str:
    """Of the installed tensors."""
    return hashlib.sha256(find_installed(name, method).with_suffix(".safetensors").read_bytes()).hexdigest()


def test_there_are_trained_methods() -> None:
    assert {load_chain(name).method for name in TRAINED} >= {"pinqi", "laro"}


@pytest.mark.parametrize("name", TRAINED)
def test_the_hash_is_that_of_the_file_of_weights(name: str) -> None:
    chain = load_chain(name)
    named = chain.settings.weights_for(None) if chain.method == "laro" else chain.settings.weights
    assert facts_of(chain).weights == digest(named, chain.method)


@pytest.mark.parametrize(
    ("matrix", "name"),
    [((32, 64, 64), "laro"), ((80, 206, 256), "laro_206x80"), ((1, 64, 64), "laro"), ((1, 256, 256), "laro_206x80")],
)
def test_the_hash_is_that_of_the_weights_for_the_scan_s_matrix(matrix: tuple[int, int, int], name: str) -> None:
    n2, n1, n_x = matrix
    assert facts_of(load_chain("laro_qsm"), mrd_header(n_x, n1, n2)).weights == digest(name, "laro")


def test_weights_that_are_not_there_are_the_methods_to_complain_about() -> None:
    chain = load_chain(TRAINED[0])
    for named in ("no_such_weights", "../../etc/passwd"):
        settings = replace(chain.settings, weights=named)
        assert facts_of(replace(chain, settings=settings)).weights == ""


@pytest.mark.parametrize("name", chain_names())
def test_every_setting_is_there_and_plain(name: str) -> None:
    facts = facts_of(load_chain(name, {"virtual_coils": "5"}))
    preprocess = facts.settings["preprocess"]
    assert facts.chain == name and isinstance(preprocess, dict) and preprocess["virtual_coils"] == 5
    assert json.loads(json.dumps(facts.settings)) == facts.settings
    assert set(facts.settings) == {"name", "acquisition", "preprocess", "coils", "maps", "output", "method"}
    if name not in TRAINED:
        assert facts.weights == ""
