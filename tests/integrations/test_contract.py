"""contract(), Upstream and Patches: say what moved upstream, put back what was replaced."""

import pytest

from tests.support.moved import pretended
from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.contract import NameMoved, Patches, contract
from tp_plugin.integrations.features import Feature
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.integrations.versions import is_tested, untested

FEATURE = Feature("a use", "torch")


def undecorated(function):
    return lambda *args, **kwargs: function(*args, **kwargs)


class Library:
    @undecorated
    def hidden(self, batch, dim=0): ...

    def method(self, batch, dim=0, *, group=None): ...

    @classmethod
    def made(cls, batch): ...

    @property
    def attribute(self): ...


class Heir(Library):
    pass


@pytest.mark.parametrize("owner", [Library, Heir])
def test_what_is_there_is_returned(owner):
    assert contract(owner, "method", ["batch"], "a test") is owner.method
    assert contract(owner, "method", ["batch", "dim", "group"], "a test") is owner.method
    assert contract(owner, "hidden", ["batch", "dim"], "a test") is owner.hidden
    assert contract(owner, "made", ["batch"], "a test") == owner.made
    assert contract(owner, "attribute", None, "a test") is Library.attribute


def test_a_missing_name_is_refused_by_name_and_use():
    with pytest.raises(TensorParallelError, match=r"Library\.gone is gone \(the slot\)$"):
        contract(Library, "gone", None, "the slot")


@pytest.mark.parametrize("parameters", [["dim"], ["batch", "axis"], [], ["batch", "dim", "group", "more"]])
def test_moved_parameters_are_refused(parameters):
    with pytest.raises(TensorParallelError, match=r"takes \(batch, dim, group\), not \("):
        contract(Library, "method", parameters, "the slot")


def test_patches_are_undone_and_leave_no_trace():
    before = dict(vars(Library)), dict(vars(Heir))
    patches = Patches()
    patches.replace(Library, "method", lambda original: lambda self, batch: "ours")
    patches.replace(Heir, "method", lambda original: lambda self, batch: "heir's")
    patches.replace(Library, "attribute", lambda original: property(lambda self: "ours"))
    assert patches
    assert (Library().method(1), Heir().method(1), Library().attribute) == ("ours", "heir's", "ours")
    patches.undo()
    assert not patches
    assert (dict(vars(Library)), dict(vars(Heir))) == before


def test_a_patch_laid_over_ours_is_not_torn_off(monkeypatch):
    monkeypatch.setattr(Library, "method", Library.method)  # put back after the test
    patches = Patches()
    patches.replace(Library, "method", lambda original: lambda self: "ours")
    theirs = lambda self: "theirs"  # noqa: E731
    Library.method = theirs
    patches.undo()
    assert Library.method is theirs


def test_what_is_declared_is_checked_and_replaced():
    upstream, patches, before = Upstream(FEATURE), Patches(), dict(vars(Library))
    upstream.needs(Library, "hidden", ["batch", "dim"], "a test")

    @upstream.patch(Library, "method", ["batch"], "a test")
    @upstream.patch(Library, "made", ["batch"], "a test")
    def ours(original, self, batch):
        return original, self, batch

    upstream.patch(Library, "attribute", None, "a test")(lambda original, self: (original, self))
    upstream.replace(Library, "hidden", None, "a test", make=lambda original: "ours")
    assert upstream.moved() == []
    upstream.install(patches)
    one = Library()
    assert one.method(1) == (before["method"], one, 1)
    assert Library.method.__name__ == "method"
    assert Library.made(2) == (before["made"].__func__, Library, 2)
    assert one.attribute == (before["attribute"].fget, one)
    assert one.hidden == "ours"
    patches.undo()
    assert dict(vars(Library)) == before


def test_declared_names_that_moved_are_all_said():
    upstream = Upstream(FEATURE)
    upstream.patch(Library, "method", ["axis"], "the slot")(lambda original: None)
    upstream.needs(Library, "gone", None, "the norm")
    upstream.needs(f"{__name__}:Nothing", "method", None, "the loss")

    @upstream.also
    def check():
        raise NameMoved("further")

    first, second, third, last = upstream.moved()
    assert first.endswith("Library.method takes (batch, dim, group), not (axis) (the slot)")
    assert second.endswith("Library.gone is gone (the norm)")
    assert third == f"{__name__}.Nothing is gone (the loss)"
    assert last == "further"


def test_older_parameters_and_names_of_later_versions(monkeypatch):
    upstream, patches, before = Upstream(FEATURE), Patches(), dict(vars(Library))
    upstream.needs(Library, "method", ["axis"], "a test", older=(["batch", "dim"],))
    upstream.needs("torch:Nothing", "gone", None, "a test", since="999.0")
    upstream.patch("torch:Nothing", "gone", None, "a test", since="999.0")(lambda original: None)
    assert upstream.moved() == []
    upstream.install(patches)
    assert dict(vars(Library)) == before
    with pretended("torch", "999.1"):
        assert upstream.moved() == ["torch.Nothing is gone (a test)"] * 2


def test_versions_of_tests_are_told_from_others(monkeypatch):
    assert untested() == {}
    for version, tested in (("5.23.9", True), ("5.23.0rc1", False), ("5.99.0", False), ("5.2.3", False), ("", False)):
        with pretended("transformers", version):
            assert is_tested("transformers", version) is tested
            assert untested() == ({} if tested or not version else {"transformers": version})
