"""docs/troubleshooting.md quotes sentences that the code really says."""

from __future__ import annotations

import ast
import functools
import re

import pytest

from tests.support.ranks import ROOT

PAGE = (ROOT / "docs" / "troubleshooting.md").read_text()
QUOTED = re.findall(r"^\| `([^|]+?)` \| [^|]+ \|$", PAGE, re.MULTILINE)


@functools.cache
def said() -> list[str]:
    """Every string in the package, with an ellipsis for what is filled in."""
    found = []
    for path in (ROOT / "tp_plugin").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


@pytest.mark.parametrize("sentence", QUOTED)
def test_a_quoted_sentence_is_in_the_code(sentence):
    assert any(sentence in each for each in said()), f"nothing in tp_plugin says {sentence!r}"


def test_the_page_has_rows():
    assert len(QUOTED) > 30
    assert all(len(sentence) > 14 for sentence in QUOTED)
