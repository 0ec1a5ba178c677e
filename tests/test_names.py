"""The public names: each is there, and importing the package alone imports no library."""

from __future__ import annotations

import subprocess
import sys

import pytest

import tp_plugin
from tests.support.launching import ENVIRONMENT
from tests.support.ranks import ROOT


@pytest.mark.parametrize("name", tp_plugin.__all__)
def test_a_public_name_is_there(name):
    assert getattr(tp_plugin, name) is not None
    assert name in dir(tp_plugin)


def test_a_name_that_is_not_there_is_an_attribute_error():
    assert not hasattr(tp_plugin, "registered")


def test_importing_the_package_imports_no_library():
    code = (
        "import sys, tp_plugin; print([name for name in ('torch', 'transformers', 'deepspeed') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
