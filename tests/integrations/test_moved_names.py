"""Every declared name of another library moves once: its feature is refused, and everything else is installed."""

from __future__ import annotations

import inspect
import re
from importlib.util import find_spec
from typing import Any

import pytest

import tp_plugin
from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations import contract
from tp_plugin.integrations import room as room_module
from tp_plugin.integrations.features import Feature, broken_features, reasons_of
from tp_plugin.integrations.rooms import ROOMS
from tp_plugin.integrations.upstream import Name, Upstream

INSTALLED = [room for room in ROOMS if find_spec(room.library) is not None]
"""Programs have a test of their own."""


def declared() -> list[Any]:
    """(declaration, name) of every name that can be missed; a class always has some ``__init__``."""
    tp_plugin.unregister()
    found = [(room, one, name) for room in INSTALLED for one in room.declarations() for name in one.names]
    return [
        pytest.param(one, name, id=f"{room.library}-{name.where}.{name.name}")
        for room, one, name in found
        if not name.is_left_out() and (name.parameters is not None or not name.name.startswith("__"))
    ]


def move(monkeypatch: pytest.MonkeyPatch, name: Name) -> None:
    """Delete the attribute; one that a base has too gets other parameters."""
    owner = name.place()
    kinds = getattr(owner, "__mro__", [owner])
    having = [kind for kind in kinds if name.name in vars(kind)]
    if len(having) == 1 and having[0] in (owner, *kinds):
        monkeypatch.delattr(having[0], name.name)
    else:
        monkeypatch.setattr(owner, name.name, lambda self, moved: None)


@pytest.fixture
def registered():
    """A call that registers and returns the attributes replaced; the names are back afterwards."""
    made: set[tuple[int, str]] = set()
    replace = contract.Patches.replace

    def noted(self: Any, owner: Any, name: str, make: Any) -> None:
        made.add((id(owner), name))
        replace(self, owner, name, make)

    def register() -> set[tuple[int, str]]:
        made.clear()
        tp_plugin.register()
        return set(made)

    tp_plugin.unregister()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contract.Patches, "replace", noted)
        yield register
        tp_plugin.unregister()


@pytest.fixture(scope="module", autouse=True)
def whole_again():
    yield
    tp_plugin.unregister()
    for room in ROOMS:
        room.check()
    assert not list(broken_features())


def refused_at(feature: Feature, gone: Name) -> list[str]:
    """Messages of the feature's public functions, called while a model is sharded."""
    said = []
    for place in feature.places:
        if gone.name in place.partition(":")[2].split("."):
            continue
        owner: Any = __import__(place.partition(":")[0], fromlist=["_"])
        for part in place.partition(":")[2].split("."):
            owner = inspect.getattr_static(owner, part)
        function = getattr(owner, "__func__", owner)
        with pytest.raises(TensorParallelError) as refused:
            function()
        said.append(str(refused.value))
    return said


def test_every_name_is_where_we_expect_it_and_belongs_to_one_feature():
    tp_plugin.unregister()
    features: dict[tuple[str, str], Feature] = {}
    for room in ROOMS:
        room.check()
        for one in room.declarations():
            for name in one.names:
                assert features.setdefault((name.where, name.name), one.feature) is one.feature
    assert [feature.broken for feature in broken_features()] == []


@pytest.mark.parametrize(("upstream", "name"), declared())
def test_a_name_that_moves_costs_its_feature_alone(monkeypatch, registered, upstream: Upstream, name: Name):
    feature = upstream.feature
    everything = registered()
    tp_plugin.unregister()
    with monkeypatch.context() as moved:
        moved.setattr(room_module, "sharded_models", lambda: [object()])
        move(moved, name)
        if feature.needed:
            with pytest.raises(TensorParallelError) as refused:
                registered()
            said = str(refused.value)
        else:
            replaced = registered()
            assert list(broken_features()) == [feature]
            others = {
                (id(other.place()), other.name)
                for room in INSTALLED
                for one in room.declarations()
                if one.feature is not feature
                for other in one.names
                if other.make is not None
            }
            assert others & everything <= replaced
            said = feature.broken or ""
            assert set(refused_at(feature, name)) <= {said}
        tp_plugin.unregister()
    assert f"{name.where}.{name.name} " in " ".join(reasons_of(feature))
    assert said.startswith(f"tp_plugin refuses {feature.name} with {feature.library} ")
    assert re.search(r"; (.+, or )?install a version of .+ that tp_plugin was tested with \(.+\)\.$", said)
    assert not re.search(r"[a-z]\. [A-Z]", said)
