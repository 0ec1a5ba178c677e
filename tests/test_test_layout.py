"""Tests import no other test module; what they share is in tests/support, each module with a line on the page there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from tests.support.ranks import ROOT

SUPPORT = sorted((ROOT / "tests" / "support").glob("[!_]*.py"))
FILES = [path for top in ("tests", "integration") for path in sorted((ROOT / top).rglob("*.py"))]
TOOLS = ("tests.support", "tests.fuzz", "tests.mutants", "tests.prose", "tests.versions")


def imported(path: Path) -> list[str]:
    """Modules of the tests that a file imports, "package.name" for ``from package import name``."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in found if name.split(".")[0] in ("tests", "integration")]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_shared_code_is_imported_from_support(path):
    beside = ".".join(path.relative_to(ROOT).parent.parts)  # a helper of one folder, as tests/sharding/patched.py
    allowed = (*TOOLS, f"{beside}.") if path.is_relative_to(ROOT / "tests") else ("tests.support",)
    others = [name for name in imported(path) if not name.startswith(allowed) or ".test_" in name]
    assert not others, f"move what is shared to tests/support instead of importing {', '.join(others)}"


def test_support_stands_on_its_own():
    for path in SUPPORT:
        assert all(name.startswith("tests.support") for name in imported(path)), path.name


def test_every_module_of_support_is_short_and_on_the_page():
    listed = set(re.findall(r"^\| `(\w+)\.py` \|", (ROOT / "tests/support/README.md").read_text(), re.M))
    assert listed == {path.stem for path in SUPPORT}
    assert not [path.name for path in SUPPORT if len(path.read_text().splitlines()) >= 300]
