"""docs/public-scripts.md: every habit of a script has a row, every row names tests that are there."""

from __future__ import annotations

from tests.support.ranks import ROOT
from tests.support.tables import rows_of, wrong_names

STATES = ("right", "refused", "warned", "as DeepSpeed")


def rows() -> tuple[list[list[str]], list[list[str]]]:
    """Rows of scripts and of habits."""
    found = [row for row in rows_of(ROOT / "docs/public-scripts.md") if row[0] != "habit" and row[1] != "habits"]
    return [row for row in found if len(row) == 2], [row for row in found if len(row) == 4]


def test_every_habit_of_a_script_has_one_row():
    scripts, habits = rows()
    names = [row[0] for row in habits]
    assert len(set(names)) == len(names)
    assert {habit for _, cell in scripts for habit in cell.split(", ")} <= set(names)


def test_every_row_says_what_happens_and_names_tests_that_exist():
    scripts, habits = rows()
    assert len(scripts) > 80
    for name, state, what, tests in habits:
        assert state in STATES, name
        assert what, name
        assert tests, name
        assert not wrong_names(tests), f"{name}: {wrong_names(tests)}"
