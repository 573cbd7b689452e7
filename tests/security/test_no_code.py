"""Nothing that is read can become code: no pickles, no eval, no import by name, no shell; judged from the sources themselves."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import gadgets
import recon_core

ROOTS = [Path(package.__file__ or "").parent for package in (gadgets, recon_core)]
SOURCES = sorted(path for root in ROOTS for path in root.rglob("*.py"))

FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "joblib",
    "yaml",
    "xmlrpc",
    "telnetlib",
    "pty",
}
"""Their readers execute what they read, or there is no use for them here. (loky pickles tasks between a server and its own workers,
over pipes that nobody else has.)"""

PLAIN_XML = {"fromstring", "parse", "iterparse", "XML", "XMLParser", "XMLPullParser"}
"""Readers of the standard library's XML packages; ours are defusedxml's."""

IMPORTS_BY_NAME = {
    "recon_core/methods/__init__.py",  # the package's own modules, as pkgutil lists them
}
"""Files that may import what a variable names."""

SUBPROCESSES = {
    "gadgets/demo.py",  # the product's own commands
    "gadgets/monitor/child.py",
    "gadgets/openrecon_forward.py",
    "gadgets/pacs_sender.py",
    "gadgets/queries.py",  # nvidia-smi
    "recon_core/training/runs.py",  # git: the commit of a training
}
"""Files that may start processes, by lists of arguments."""


def name_of(node: ast.AST) -> str:
    """``a.b.c`` of a function that is called, as far as it is written out."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def keyword(call: ast.Call, name: str) -> ast.expr | None:
    return next((k.value for k in call.keywords if k.arg == name), None)


def is_false(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is False


def is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def problems(source: str, where: str) -> Iterator[str]:
    """What ``source`` must not do, one line each."""
    xml_readers: set[str] = set()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] in FORBIDDEN_MODULES:
                    yield f"line {node.lineno}: import {alias.name}"
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if module.partition(".")[0] in FORBIDDEN_MODULES:
                yield f"line {node.lineno}: from {module}"
            if module.partition(".")[0] == "xml":
                xml_readers |= {alias.asname or alias.name for alias in node.names if alias.name in PLAIN_XML}
            if module == "subprocess" and where not in SUBPROCESSES:
                yield f"line {node.lineno}: starts processes"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from (f"line {node.lineno}: {text}" for text in _call_problems(node, where, xml_readers))


def _call_problems(call: ast.Call, where: str, xml_readers: set[str]) -> Iterator[str]:
    name = name_of(call.func)
    last = name.rpartition(".")[2]
    if name in ("eval", "exec", "compile", "__import__", "os.system", "os.popen", "builtins.eval", "builtins.exec"):
        yield name
    if (
        name in ("torch.load", "load")
        and last == "load"
        and name == "torch.load"
        and not is_true(keyword(call, "weights_only"))
    ):
        yield "torch.load without weights_only=True"
    if name in ("np.load", "numpy.load") and not is_false(keyword(call, "allow_pickle")):
        yield "np.load without allow_pickle=False"
    if keyword(call, "shell") is not None and not is_false(keyword(call, "shell")):
        yield "shell=True"
    if name.startswith("subprocess.") and where not in SUBPROCESSES:
        yield f"starts processes ({name})"
    if last in ("import_module", "find_spec", "run_module", "run_path", "spec_from_file_location"):
        first = call.args[0] if call.args else None
        if not isinstance(first, ast.Constant) and where not in IMPORTS_BY_NAME and last != "find_spec":
            yield f"{last} of what a variable names"
    if last == "set_start_method" or name in ("torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"):
        yield name
    plain_xml = name in xml_readers or (name.startswith(("ElementTree.", "ET.", "xml.", "minidom.")) and last in PLAIN_XML)
    if plain_xml:
        yield f"{name}: XML with entities"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import pickle", "pickle"),
        ("from pickle import loads", "pickle"),
        ("def f(x):\n    return eval(x)", "eval"),
        ("import torch\ntorch.load(p)", "weights_only"),
        ("import torch\ntorch.load(p, weights_only=False)", "weights_only"),
        ("import numpy as np\nnp.load(p)", "allow_pickle"),
        ("import numpy as np\nnp.load(p, allow_pickle=True)", "allow_pickle"),
        ("import subprocess\nsubprocess.run('ls', shell=True)", "shell"),
        ("import subprocess\nsubprocess.run(['ls'])", "starts processes"),
        ("import importlib\nimportlib.import_module(name)", "variable"),
        ("import importlib\nimportlib.import_module(f'gadgets.{name}')", "variable"),
        ("import os\nos.system('x')", "os.system"),
        ("import xml.etree.ElementTree as ElementTree\nElementTree.fromstring(t)", "entities"),
        ("from xml.etree.ElementTree import fromstring\nfromstring(t)", "entities"),
        ("import yaml", "yaml"),
        ("__import__(name)", "__import__"),
    ],
)
def test_the_scan_sees(source: str, found: str) -> None:
    assert any(found in text for text in problems(source, "gadgets/example.py"))


def test_the_scan_lets_good_code_pass() -> None:
    good = (
        "import numpy as np\nimport importlib\nfrom defusedxml.ElementTree import fromstring\n"
        "np.load(p, allow_pickle=False)\nimportlib.import_module('gadgets.node')\nfromstring(t)\nmodule.eval()\n"
    )
    assert list(problems(good, "gadgets/example.py")) == [] and len(SOURCES) > 100


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: "/".join(path.parts[-3:]))
def test_sources(path: Path) -> None:
    root = next(root for root in ROOTS if path.is_relative_to(root))
    where = path.relative_to(root.parent).as_posix()
    assert list(problems(path.read_text(encoding="utf-8"), where)) == []


def test_exceptions_are_needed() -> None:
    """An exception that nobody uses any more would hide the next file of that name."""
    for where in IMPORTS_BY_NAME | SUBPROCESSES:
        path = ROOTS[0].parent / where
        assert path.exists() or where in SUBPROCESSES, where
        if path.exists():
            assert list(problems(path.read_text(encoding="utf-8"), "nobody")), where
