"""The prose of a Python file: its docstrings, its comments and its messages."""

from __future__ import annotations

import ast
import dataclasses
import io
import itertools
import tokenize
from collections.abc import Iterator

MESSAGE_WORDS = 6
PLACE = "…"  # stands for a value in an f-string


@dataclasses.dataclass(frozen=True)
class Text:
    """One piece of prose.

    Attributes:
        kind: "docstring", "comment" or "message".
        line: where it begins.
        content: its words; a value in an f-string is ``PLACE``.
    """

    kind: str
    line: int
    content: str


def texts_of(source: str) -> Iterator[Text]:
    """Yield every text of a file once."""
    tree = ast.parse(source)
    documented = list(_docstrings(tree))
    yield from documented
    docstrings = {(text.line, text.content) for text in documented}
    yield from (text for text in _messages(tree) if (text.line, text.content) not in docstrings)
    yield from _comments(source)


def _docstrings(tree: ast.Module) -> Iterator[Text]:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if not isinstance(body, list):
            continue
        for statement in body:
            # an attribute's docstring is an expression after its assignment
            if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant):
                value = statement.value.value
                if isinstance(value, str):
                    yield Text("docstring", statement.lineno, value)


def _messages(tree: ast.Module) -> Iterator[Text]:
    """Yield string literals of at least ``MESSAGE_WORDS`` words, which are read by people, not by programs."""
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            content = node.value
        elif isinstance(node, ast.JoinedStr):
            content = "".join(str(part.value) if isinstance(part, ast.Constant) else PLACE for part in node.values)
        else:
            continue
        if len(content.split()) >= MESSAGE_WORDS:
            yield Text("message", node.lineno, content)


def _comments(source: str) -> Iterator[Text]:
    """Yield comments; those on lines that follow each other are one text."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = [(token.start[0], token) for token in tokens if token.type == tokenize.COMMENT]
    for _, group in itertools.groupby(enumerate(comments), key=lambda item: item[1][0] - item[0]):
        together = [token for _, (_, token) in group]
        words = " ".join(token.string.lstrip("#: ") for token in together)
        if not words.startswith(("noqa", "type:", "!", "pragma")):
            yield Text("comment", together[0].start[0], words)
