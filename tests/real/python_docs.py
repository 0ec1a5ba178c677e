"""Real text that every machine has: docstrings of Python's standard library, read without importing it."""

from __future__ import annotations

import ast
import json
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PACKAGES = ("asyncio", "email", "importlib", "logging", "multiprocessing", "unittest")
"""Subjects to tell apart."""


def documented() -> Iterator[tuple[str, str, str]]:
    """(package, dotted name, first paragraph in one line) of functions and classes, in one order everywhere."""
    library = Path(sysconfig.get_path("stdlib"))
    for package in PACKAGES:
        for file in sorted((library / package).rglob("*.py")):
            module = ".".join(file.relative_to(library).with_suffix("").parts).removesuffix(".__init__")
            for node in ast.walk(ast.parse(file.read_text("utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                    if 40 <= len(text) <= 240 and not node.name.startswith("_"):
                        yield package, f"{module}.{node.name}", text


def shuffled() -> list[tuple[str, str, str]]:
    rows = sorted(set(documented()))
    random.Random(0).shuffle(rows)
    return rows


def chats(count: int) -> list[dict[str, list[dict[str, str]]]]:
    """Questions about a name with its documentation as the answer."""
    return [
        {
            "messages": [
                {"role": "user", "content": f"What is {name} in Python?"},
                {"role": "assistant", "content": text},
            ]
        }
        for _, name, text in shuffled()[:count]
    ]


def write_chats(path: Path, count: int) -> None:
    path.write_text("\n".join(json.dumps(row) for row in chats(count)))


def subjects(count: int) -> list[tuple[str, int]]:
    """Documentation, and the number of the package it is from."""
    return [(text, PACKAGES.index(package)) for package, _, text in shuffled()[:count]]
