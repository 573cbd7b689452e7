"""The threat model names tests; they have to be there, and every threat has to have one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = re.compile(r"(tests/[\w/]+\.py)::(\w+)")


def functions(path: Path) -> set[str]:
    return {node.name for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)}


def test_every_named_test_exists() -> None:
    named = NAMED.findall(TEXT)
    assert len(named) > 60
    missing = [f"{file}::{name}" for file, name in named if not (ROOT / file).exists() or name not in functions(ROOT / file)]
    assert missing == []
    assert all(name.startswith("test_") for _, name in named)


def test_every_threat_has_a_test() -> None:
    rows = [line for line in TEXT.splitlines() if line.startswith("| ") and not line.startswith("| Threat")]
    assert len(rows) > 25
    assert [row for row in rows if row.count("|") != 4 or not NAMED.search(row)] == []


def test_every_file_of_these_tests_is_named() -> None:
    """A defence that nobody knows of is soon removed."""
    own = {f"tests/security/{path.name}" for path in Path(__file__).parent.glob("test_*.py")} - {
        "tests/security/test_security_doc.py"
    }
    assert own <= {file for file, _ in NAMED.findall(TEXT)}
