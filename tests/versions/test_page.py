"""docs/upstream.md is what the code says."""

import subprocess
import sys

from tests.support.ranks import ROOT
from tests.versions.page import PAGE


def test_the_page_is_current(tmp_path):
    """In a process of its own: which trainers of TRL are declared depends on what a process has imported."""
    written = tmp_path / "upstream.md"
    subprocess.run([sys.executable, "-m", "tests.versions.page", written], cwd=ROOT, check=True)
    assert PAGE.read_text() == written.read_text(), "run python -m tests.versions.page"
