"""Seconds that each test file takes on two quiet cores, in ``tests/durations.json``, and the budgets they must keep.

``make durations`` writes the file: wall time of set-up, call and tear-down, by file and by what a test starts.
"""

from __future__ import annotations

import collections
import json

import pytest

from tests.support.ranks import ROOT

FILE = ROOT / "tests" / "durations.json"
BUDGET_S = {"all": 980.0, "unit": 100.0}
"""Bounds of the sums. ``make test`` may take 900 s and ``make test-unit`` 120 s, of which these are for tests."""
OWN = "tests/test_durations.py"  # fails until everything is recorded
KINDS = ("unit", "ranks", "e2e")
Durations = dict[str, dict[str, float]]


def recorded() -> Durations:
    """Seconds by test file and kind."""
    return json.loads(FILE.read_text()) if FILE.exists() else {}


def longest_first(items: list[pytest.Item]) -> None:
    """Sort tests by what their file takes; files without a record come first."""
    seconds = {file: sum(entry.values()) for file, entry in recorded().items()}
    items.sort(key=lambda item: -seconds.get(item.nodeid.split("::")[0], float("inf")))


class Recorder:
    """A pytest plugin that notes how long tests take and puts it into :data:`FILE`, other files' entries kept."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, float]] = collections.defaultdict(lambda: collections.defaultdict(float))
        self.failed: set[str] = set()

    @pytest.hookimpl(tryfirst=True)  # before -m chooses
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Name every file, also one whose tests are all slow."""
        for item in items:
            self.files[item.nodeid.split("::")[0]].clear()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add one phase of one test."""
        kind = next((kind for kind in KINDS if kind in report.keywords), "unit")
        file = report.nodeid.split("::")[0]
        self.files[file][kind] += report.duration
        if report.failed and file != OWN:
            self.failed.add(file)

    def pytest_sessionfinish(self) -> None:
        """Write the file, without files of which a test failed and may have ended early."""
        for file in self.failed:
            del self.files[file]
        kept = {name: entry for name, entry in recorded().items() if (ROOT / name).exists()}
        new = {name: {k: round(v, 1) for k, v in sorted(entry.items())} for name, entry in self.files.items()}
        FILE.write_text(json.dumps(kept | new, indent=1, sort_keys=True) + "\n")
