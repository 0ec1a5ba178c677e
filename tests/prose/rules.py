"""Rules of plain technical English that a script can check; docs/architecture.md has all of them.

A sentence has at most ``LONGEST`` words; a colon before a list ends one, a semicolon does not. A docstring begins with
a verb or a noun, not with a question word. Words of ``NOT_USED`` have a plain one, which the problem names.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.prose.texts import Text

LONGEST = 25
QUESTION_WORDS = ("What", "Which", "Whether", "Whoever", "Where", "How", "Who", "That")
NOT_USED = {
    "nobody": "name the actor",
    "somebody": "name the actor",
    "anybody": "name the actor",
    "whoever": "name the actor",
    "spoilt": "modified",
    "spoil": "modify",
    "dear": "expensive",
    "anew": "again",
    "thereby": "by this",
    "door": "region entry or exit",
    "doors": "region entries and exits",
    "twin": "unsharded view, or copy",
    "twins": "unsharded views, or copies",
    "trunk": "backbone",
    "specimen": "tiny model",
    "parcel": "gather buffer",
    "speaks": "says, or matches",
    "lies": "is sharded, or is",
    "lain": "been",
}


def sentences(text: Text) -> Iterator[str]:
    """Yield the sentences of ``text``, without code blocks, lists of arguments and URLs."""
    for paragraph in re.split(r"\n\s*\n", text.content):
        lines = [line for line in paragraph.split("\n") if not line.startswith((" " * 8, "    >>>"))]
        prose = re.sub(r"``[^`]*``|`[^`]*`|:\w+:`[^`]*`|https?://\S+", "CODE", " ".join(line.strip() for line in lines))
        # an argument's or attribute's description is a sentence of its own
        prose = re.sub(r"(?:^|(?<=[.;:] ))\w+: ", ". ", prose)
        for sentence in re.split(r"(?<=[.!?:])\s+|\n", prose):
            if sentence.strip():
                yield sentence.strip()


def problems(text: Text) -> Iterator[str]:
    """Yield one line for each rule that a sentence of ``text`` breaks."""
    first = text.content.strip().split(" ", 1)[0] if text.content.strip() else ""
    if text.kind == "docstring" and first in QUESTION_WORDS:
        yield f"the docstring begins with {first!r}; begin with a verb or a noun"
    for sentence in sentences(text):
        count = len(re.findall(r"[A-Za-z0-9…][\w'…-]*", sentence))
        if count > LONGEST:
            yield f"a sentence of {count} words in a {text.kind} (at most {LONGEST}): {sentence[:60]}..."
    prose = re.sub(r"``[^`]*``|`[^`]*`", "", text.content)
    for word in re.findall(r"[A-Za-z]+", prose):
        if word.lower() in NOT_USED and not word.isupper():
            yield f"{word!r} in a {text.kind}; write: {NOT_USED[word.lower()]}"
