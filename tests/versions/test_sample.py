"""The sample names tests and features that exist, and what cannot run in a set is said to be refused."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.support.ranks import ROOT
from tests.versions.run import refused
from tests.versions.sets import Part, sample, sets
from tp_plugin.integrations import features
from tp_plugin.integrations.features import DORA, Feature


def test_every_test_of_the_sample_exists():
    ids = [test for part in sample() for test in part.tests]
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *ids]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_features_and_parts_are_named_as_they_are():
    names = {part.name for part in sample()}
    for part in sample():
        assert all(isinstance(getattr(features, name), Feature) for name in part.needs)
    for one in sets().values():
        assert set(one.lacks) <= names, one.name
        assert one.torch_requirement.startswith("torch")


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([], None),
        ([{"part": "libraries", "subject": "peft", "state": "none", "text": "not installed"}], "peft is not installed"),
        (
            [{"part": "features", "subject": "peft", "state": "lost", "text": f"tp_plugin refuses {DORA.name} with x"}],
            f"tp_plugin refuses {DORA.name} with x",
        ),
        ([{"part": "features", "subject": "peft", "state": "lost", "text": "tp_plugin refuses another with x"}], None),
    ],
)
def test_a_part_is_left_out_by_the_sentence_of_its_feature(lines, said):
    assert refused(Part("DoRA", (), ("ADAPTERS", "DORA")), lines) == said
