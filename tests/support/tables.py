"""Tables of the pages under docs/, whose rows name the tests that show them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

NAMED = re.compile(r"`([\w/]+\.py)::(\w+)(?:\[([\w-]+)\])?`")


def rows_of(page: Path) -> list[list[str]]:
    """Cells of every row of every table, headers among them."""
    lines = [line for line in page.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if not set("".join(row)) <= set("-: ")]


def wrong_names(text: str) -> list[str]:
    """Tests, by their pytest ids between backticks, that are not there; and whatever else is between backticks."""
    wrong = re.findall("`[^`]*`", NAMED.sub("", text))
    for path, function, case in NAMED.findall(text):
        test = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), function, None)
        if test is None or (case and case not in _cases(test)):
            wrong.append(f"{path}::{function}[{case}]")
    return wrong


def _cases(test: Any) -> set[str]:
    """Names of a parametrised test's cases, by one argument."""
    values = [value for mark in test.pytestmark for value in mark.args[1]]
    return {str(getattr(value, "id", None) or getattr(value, "__name__", value)) for value in values}
