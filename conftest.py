"""Options and markers of the whole run: what a test starts is found in its code, see tests/support/markers.py."""

from __future__ import annotations

import pytest

import tp_plugin
from tests.support import launching, ranks
from tests.support.durations import Recorder, longest_first
from tests.support.markers import kind_of


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--real-launches", action="store_true", help="start every script by its launcher, none in forks")
    parser.addoption("--record-durations", action="store_true", help="write what tests take to tests/durations.json")


def pytest_configure(config: pytest.Config) -> None:
    launching.real = config.getoption("--real-launches")
    if config.getoption("--record-durations"):
        config.pluginmanager.register(Recorder())
    ranks.forbidden = config.option.markexpr.startswith("unit")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    known: dict[object, str] = {}
    for item in items:
        if isinstance(item, pytest.Function):
            fixtures = [
                one.func for name in item.fixturenames for one in item._fixtureinfo.name2fixturedefs.get(name, ())
            ]
            key = (item.function, *fixtures)
            if key not in known:
                known[key] = kind_of(list(key))
            item.add_marker(known[key])
    if hasattr(config, "workerinput"):  # of pytest-xdist: no worker is left with a long file at the end
        longest_first(items)


@pytest.fixture(scope="module", autouse=True)
def _unregistered() -> None:
    """Begin every file with the libraries as they are, whatever ran before it in the process."""
    tp_plugin.unregister()
