"""contract(), check_versions() and Patches: refuse what moved upstream, put back what was replaced."""

import importlib.metadata

import pytest

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations import contract as module
from tp_plugin.integrations.contract import Patches, check_versions, contract


def undecorated(function):
    return lambda *args, **kwargs: function(*args, **kwargs)


class Upstream:
    @undecorated
    def hidden(self, batch, dim=0): ...

    def method(self, batch, dim=0, *, group=None): ...

    @classmethod
    def made(cls, batch): ...

    @property
    def attribute(self): ...


class Heir(Upstream):
    pass


@pytest.mark.parametrize("owner", [Upstream, Heir])
def test_what_is_there_is_returned(owner):
    assert contract(owner, "method", ["batch"], "a test") is owner.method
    assert contract(owner, "method", ["batch", "dim", "group"], "a test") is owner.method
    assert contract(owner, "hidden", ["batch", "dim"], "a test") is owner.hidden
    assert contract(owner, "made", ["batch"], "a test") == owner.made
    assert contract(owner, "attribute", None, "a test") is Upstream.attribute


def test_a_missing_name_is_refused_by_name_and_use():
    with pytest.raises(TensorParallelError, match=r"Upstream\.gone is gone upstream.*needs it: the slot"):
        contract(Upstream, "gone", None, "the slot")


@pytest.mark.parametrize("parameters", [["dim"], ["batch", "axis"], [], ["batch", "dim", "group", "more"]])
def test_moved_parameters_are_refused(parameters):
    with pytest.raises(TensorParallelError, match=r"takes \(batch, dim, group\) where"):
        contract(Upstream, "method", parameters, "the slot")


def test_the_installed_versions_are_in_range():
    check_versions()


@pytest.mark.parametrize("name", module.PLUGGED_INTO)
def test_a_version_out_of_range_is_refused(monkeypatch, name):
    true = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda n: "999.0" if n == name else true(n))
    with pytest.raises(TensorParallelError, match=rf"not tested with {name} 999.0.*pip install '{name}<"):
        check_versions()


def test_patches_are_undone_and_leave_no_trace():
    before = dict(vars(Upstream)), dict(vars(Heir))
    patches = Patches()
    patches.replace(Upstream, "method", lambda original: lambda self, batch: "ours")
    patches.replace(Heir, "method", lambda original: lambda self, batch: "heir's")
    patches.replace(Upstream, "attribute", lambda original: property(lambda self: "ours"))
    assert patches
    assert (Upstream().method(1), Heir().method(1), Upstream().attribute) == ("ours", "heir's", "ours")
    patches.undo()
    assert not patches
    assert (dict(vars(Upstream)), dict(vars(Heir))) == before


def test_a_patch_laid_over_ours_is_not_torn_off(monkeypatch):
    monkeypatch.setattr(Upstream, "method", Upstream.method)  # put back after the test
    patches = Patches()
    patches.replace(Upstream, "method", lambda original: lambda self: "ours")
    theirs = lambda self: "theirs"  # noqa: E731
    Upstream.method = theirs
    patches.undo()
    assert Upstream.method is theirs
