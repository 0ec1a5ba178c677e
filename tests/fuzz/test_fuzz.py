"""The fuzzer itself: a few of its seeds, and errors made on purpose, each of which it has to find."""

from __future__ import annotations

import dataclasses
import functools

import pytest

from tests.fuzz import shrink
from tests.fuzz.__main__ import line, summary
from tests.fuzz.case import Case, drawn
from tests.fuzz.families import FAMILIES
from tests.fuzz.worlds import Verdict, run

SEEDS = (3, 9, 14, 32, 34, 89, 100, 108, 214, 249, 434)
"""Of two ranks: they cover all kinds of models, losses, loops and batches."""
PLAIN = dataclasses.replace(
    drawn(0), tp=2, dp=1, stage=1, family="llama", adapter=None, loss="items", batches=[("even", "some")] * 2,
    way="slot", checkpointing=None, offload=False, loop="engine", optimizer="adamw", accumulation=1, guard=False,
    options={"hidden_size": 32, "intermediate_size": 53, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 131, "pad_token_id": 0},
)  # fmt: skip
BROKEN = {
    "doubled_gradient": dataclasses.replace(PLAIN, seed=1),
    "shifted_output": dataclasses.replace(PLAIN, seed=2, guard=True),
    "drifting_replica": dataclasses.replace(PLAIN, seed=3),
    "refused_unlike": dataclasses.replace(PLAIN, seed=4),
    "one_rank_raises": dataclasses.replace(PLAIN, seed=5),
    "nothing": dataclasses.replace(PLAIN, seed=6),
}


@functools.cache
def verdicts() -> dict[int, Verdict]:
    return {verdict.case.seed: verdict for verdict in run(drawn(seed) for seed in SEEDS)}


@pytest.mark.parametrize("seed", SEEDS)
def test_equals_one_process_or_is_refused_alike(seed):
    verdict = verdicts()[seed]
    assert not verdict.finding, line(verdict)


def test_most_of_the_seeds_are_equal():
    found = list(verdicts().values())
    assert sum(verdict.kind == "equal" for verdict in found) >= len(SEEDS) - 1, summary(found)


@functools.cache
def broken() -> dict[str, Verdict]:
    sabotaged = {case.seed: name for name, case in BROKEN.items() if name != "nothing"}
    found = {verdict.case.seed: verdict for verdict in run(BROKEN.values(), sabotaged=sabotaged)}
    return {name: found[case.seed] for name, case in BROKEN.items()}


@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        ("doubled_gradient", "wrong", "grad off by"),
        ("shifted_output", "stopped", "without tensor parallelism"),
        ("drifting_replica", "wrong", "replicas differ by"),
        ("refused_unlike", "raised", "refused by rank 1"),
        ("one_rank_raises", "raised", "on purpose"),
    ],
)
def test_finds_what_was_broken(name, kind, said):
    verdict = broken()[name]
    assert verdict.finding
    assert verdict.kind == kind, verdict.said
    assert said in verdict.said
    assert f"make fuzz SEED={verdict.case.seed}" in line(verdict)


def test_goes_on_after_a_broken_world():
    assert broken()["nothing"].kind == "equal", broken()["nothing"].said


def test_a_failing_case_is_made_smaller(monkeypatch):
    """Of a case that fails wherever rows are padded at the left under ZeRO 2 and 3, that is all that stays."""

    def fails(cases):
        left = [any(shape == "left" for shape, _ in case.batches) and case.stage >= 2 for case in cases]
        return [Verdict(case, "wrong" if bad else "equal", "") for case, bad in zip(cases, left, strict=True)]

    monkeypatch.setattr(shrink, "run", fails)
    case = dataclasses.replace(
        drawn(9), tp=2, dp=2, stage=3, batches=[("even", "one"), ("left", "none")], checkpointing=True, offload=True
    )
    small = shrink.shrunk(Verdict(case, "wrong", ""))
    assert (small.stage, small.dp, small.batches) == (2, 1, [("left", "none")])
    assert small.adapter is small.checkpointing is None
    assert (small.offload, small.guard, small.rows, small.accumulation, small.loop) == (False, False, 1, 1, "engine")


def test_a_seed_is_always_the_same_case_and_survives_being_written():
    for seed in range(300):
        case = drawn(seed)
        assert Case.from_json(case.to_json()) == case == drawn(seed)
        assert case.way != "zero3 order" or case.stage == 3
        assert case.way != "late" or case.adapter


def test_many_seeds_draw_everything():
    cases = [drawn(seed) for seed in range(2000)]
    assert {case.family for case in cases} == FAMILIES.keys()
    assert {pair for case in cases for pair in case.batches} >= {
        (shape, labels)
        for shape in ("even", "uneven", "left", "packed")
        for labels in ("some", "none", "one", "one rank")
    }
    assert {(case.tp, case.dp, case.stage) for case in cases} >= {
        (tp, dp, s) for tp in (2,) for dp in (1, 2) for s in range(4)
    }
