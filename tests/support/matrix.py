"""Parity of many configurations: one launch of ranks for each (world, tp), each configuration a test of its own."""

from __future__ import annotations

import functools
import traceback
from collections.abc import Mapping

import pytest

from tests.support.ranks import on_ranks
from tests.support.train import STEPS, compare, share_truths

LIMITS = {"loss": 1e-5, "norm": 1e-5, "grad": 1e-4, "update": 1e-4, "replicas": 0.0}
"""Largest relative errors against one process; of ``replicas`` absolute."""
Table = dict[tuple[int, int], list[dict]]


class Matrix:
    """``table`` of (world, tp) -> cases for :func:`tests.support.train.compare`; ``looser`` limits by family.

    ``steps``: what each case trains. One shows a layout right; ``test_parity.py`` and the long matrices go on from it.
    """

    def __init__(
        self,
        table: Table,
        timeout_s: float,
        looser: Mapping[str, dict[str, float]] | None = None,
        steps: int = STEPS,
    ) -> None:
        self.table, self.timeout_s, self.looser, self.steps = table, timeout_s, looser or {}, steps
        self.launched = functools.cache(self._launched)

    def _launched(self, world: int, tp: int) -> list[list[dict[str, float] | str]]:
        cases = [case | {"steps": self.steps} for case in self.table[world, tp]]
        return on_ranks(world, run_cases, tp, cases, timeout_s=self.timeout_s)

    def parameters(self) -> list:
        """(world, tp, index) of every case."""
        return [
            pytest.param(world, tp, index, id=f"tp{tp}xdp{world // tp}-{_name_of(case)}")
            for (world, tp), cases in self.table.items()
            for index, case in enumerate(cases)
        ]

    def check(self, world: int, tp: int, index: int) -> None:
        """Fails with the errors beyond their limit, or what a rank raised."""
        limits = LIMITS | self.looser.get(self.table[world, tp][index].get("family", ""), {})
        assert_within(limits, [results[index] for results in self.launched(world, tp)])


def run_cases(tp: int, cases: list[dict]) -> list[dict[str, float] | str]:
    """One rank's share of every case; an exception ends its case only."""
    share_truths(tp, cases)
    results: list[dict[str, float] | str] = []
    for case in cases:
        try:
            results.append(compare(tp=tp, **case))
        except Exception:
            results.append(traceback.format_exc())
    return results


def assert_within(limits: Mapping[str, float], ranks: list[dict[str, float] | str]) -> None:
    """Fail with what a rank raised, or with its errors above ``limits``."""
    for rank, errors in enumerate(ranks):
        assert not isinstance(errors, str), f"rank {rank}:\n{errors}"
        above = {name: value for name, value in errors.items() if not value <= limits[name]}
        assert not above, f"rank {rank}: {above} exceed {limits}"


def _name_of(case: dict) -> str:
    return "-".join(str(value).replace(" ", "") if isinstance(value, tuple) else str(value)
                    for value in case.values() if not isinstance(value, dict))  # fmt: skip
