"""The wall: ``recon_core`` is arrays in, arrays out, and runs in a bare torch environment."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import recon_core

ROOT = Path(recon_core.__file__).parent
SOURCES = sorted(ROOT.rglob("*.py"))
ALLOWED = {"recon_core", "torch", "numpy", "scipy", "h5py", "safetensors"} | sys.stdlib_module_names
COMPILED = {"solvers/patch_kernels.py": {"numba"}}
"""What may import a compiler; `recon_core.solvers.compiled` does without these where it is missing."""


def imported(source: str) -> set[str]:
    """Top-level names of all packages that ``source`` imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("recon_core" if node.level else (node.module or "").partition(".")[0])
    return names


def test_the_scan_sees_imports() -> None:
    assert imported("import gadgets.wire as w\ndef f():\n    from pydicom.tag import Tag\nfrom . import x") == {
        "gadgets",
        "pydicom",
        "recon_core",
    }
    assert len(SOURCES) > 20


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_stay_on_this_side(path: Path) -> None:
    more = COMPILED.get(path.relative_to(ROOT).as_posix(), set())
    assert imported(path.read_text(encoding="utf-8")) <= ALLOWED | more


BLOCKED_IMPORT = """
import importlib, pkgutil, sys

BLOCKED = ("gadgets", "ismrmrd", "pydicom", "gadgetron", "loky", "typer", "rich", "matplotlib", "defusedxml")

class Wall:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ImportError(f"{name} is on the other side of the wall")

sys.meta_path.insert(0, Wall())
import recon_core
for entry in pkgutil.walk_packages(recon_core.__path__, "recon_core."):
    importlib.import_module(entry.name)
from recon_core.methods import methods
assert {"fourier", "llr"} <= set(methods())
assert not set(BLOCKED) & set(sys.modules)
"""


def test_every_module_imports_with_the_outside_blocked() -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED_IMPORT], capture_output=True, text=True, cwd=ROOT.parent, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_client_imports_no_torch() -> None:
    """`recon replay` beside a scanner is there at once, also where torch is slow to come from a network disk."""
    script = "import sys; sys.modules['torch'] = sys.modules['scipy'] = None; import gadgets.cli, gadgets.replay, gadgets.image_file"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
