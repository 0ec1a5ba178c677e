"""``make test`` does not grow: what each test file takes is recorded, and the sum is bounded."""

from __future__ import annotations

import pytest

from tests.support.durations import BUDGET_S, recorded
from tests.support.ranks import ROOT

RECORD = "run `make durations FILES='{}'` on two quiet cores and commit tests/durations.json"


def test_every_test_file_has_a_recorded_duration():
    files = {
        str(path.relative_to(ROOT)) for top in ("tests", "integration") for path in (ROOT / top).rglob("test_*.py")
    }
    missing, gone = sorted(files - recorded().keys()), sorted(recorded().keys() - files)
    assert not missing, f"no duration is recorded of {', '.join(missing)}; {RECORD.format(' '.join(missing))}"
    assert not gone, f"remove these from tests/durations.json, they are no more: {', '.join(gone)}"


@pytest.mark.parametrize("kind", BUDGET_S)
def test_the_recorded_durations_stay_within_the_budget(kind):
    seconds = {file: sum(s for k, s in entry.items() if kind in ("all", k)) for file, entry in recorded().items()}
    total, slowest = sum(seconds.values()), sorted(seconds, key=lambda file: -seconds[file])[:5]
    assert total <= BUDGET_S[kind], (
        f"the tests take {total:.0f} s and may take {BUDGET_S[kind]:.0f} s; put cases that only repeat others into the "
        f"matrix (mark them slow), or several into one launch of ranks, then {RECORD.format('tests integration')}; the "
        f"slowest files are {', '.join(f'{file} ({seconds[file]:.0f} s)' for file in slowest)}"
    )
