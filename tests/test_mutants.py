"""The tables of mutants fit the code and the tests; ``make mutants`` runs them."""

from __future__ import annotations

import importlib
from collections.abc import Callable

import pytest

from tests.mutants.table import ROOT, Mutant, all_mutants

MUTANTS = all_mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_a_mutant_changes_one_place_and_still_compiles(mutant: Mutant):
    broken = mutant.applied_to((ROOT / mutant.file).read_text())
    compile(broken, mutant.file, "exec")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.id)
def test_the_tests_of_a_mutant_exist(mutant: Mutant):
    for test in mutant.tests:
        path, _, name = test.partition("::")
        name, _, case = name.partition("[")
        module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
        assert hasattr(module, name), f"{test} is gone"
        assert not case or case.removesuffix("]") in cases(getattr(module, name)), f"{test} is no case"


def cases(test: Callable) -> list[str]:
    """Ids of the cases of a test with one ``parametrize``."""
    (mark,) = (mark for mark in test.pytestmark if mark.name == "parametrize")
    return [getattr(value, "id", None) or str(value) for value in mark.args[1]]


def test_there_are_enough_and_no_two_alike():
    assert len(MUTANTS) >= 60
    assert len({mutant.id for mutant in MUTANTS}) == len(MUTANTS)
