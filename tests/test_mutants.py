"""The tables of mutants fit the code and the tests; ``make mutants`` runs them."""

from __future__ import annotations

import ast

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
        functions = {node.name for node in ast.parse((ROOT / path).read_text()).body if hasattr(node, "name")}
        assert name.partition("[")[0] in functions, f"{test} is gone"


def test_there_are_enough_and_no_two_alike():
    assert len(MUTANTS) >= 60
    assert len({mutant.id for mutant in MUTANTS}) == len(MUTANTS)
