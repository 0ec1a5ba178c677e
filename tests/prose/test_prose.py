"""The check of prose finds each fault once, and is silent about plain sentences."""

from __future__ import annotations

import pytest

from tests.prose.rules import LONGEST, problems
from tests.prose.texts import texts_of

LONG = " ".join(["word"] * (LONGEST + 1))
FAULTS = {
    '"""What a module holds."""': "begins with 'What'",
    f'"""Return {LONG}."""': "in a docstring",
    f'raise ValueError("the caller {LONG}")': "in a message",
    f'raise ValueError(f"the caller {{name}} {LONG}")': "in a message",
    f"# a comment {LONG}\n# in two lines": "in a comment",
    "x = 1  # nobody reads it": "'nobody' in a comment",
    'ERROR = "nobody may call this function twice in a step"': "'nobody' in a message",
}
PLAIN = '''"""Shard a module.

Args:
    module: the linear layer, ``[out, in]``.
    mesh: the process groups, a ``tp_plugin.mesh.ParallelMesh`` that the caller made
"""

NAMES = ["nobody", "door"]  # identifiers of data are no prose
MESSAGE = f"rank {1} holds no shard of {2!r}; call shard_model first."
'''


@pytest.mark.parametrize(("source", "said"), FAULTS.items())
def test_a_fault_is_found_once(source, said):
    (problem,) = [problem for text in texts_of(source) for problem in problems(text)]
    assert said in problem


def test_plain_sentences_pass():
    assert [problem for text in texts_of(PLAIN) for problem in problems(text)] == []
