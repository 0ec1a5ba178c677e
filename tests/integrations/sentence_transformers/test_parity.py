"""sentence-transformers' trainers through DeepSpeed's slot against one unsharded process of the same.

Everything they log, the trained parameters, embeddings by the sharded model and by what it saved. One launch of ranks
trains many configurations, each a test of its own.
"""

from __future__ import annotations

import functools
import itertools
import tempfile

import pytest

from tests.support import sentence_runs
from tests.support.ranks import on_ranks

NEGATIVES, CACHED = "MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"
SIMILARITY = {"kind": "bi", "loss": "CosineSimilarityLoss", "form": "scores"}
CROSS = {"kind": "cross", "loss": "BinaryCrossEntropyLoss", "form": "scores"}
SPARSE = {"kind": "sparse", "loss": "Splade", "form": "triplets"}
GATHERED, SMALL = {"gather_across_devices": True}, {"mini_batch_size": 1}
WARM = {"temperature": 0.1}
"""The library's 0.01 divides rounding of similarities, too."""
Table = dict[tuple[int, int], list[dict]]

CASES: Table = {
    (2, 2): [
        {"kind": "bi", "loss": NEGATIVES, "stage": 1, "dense": True, "extra": "evaluator", "save": "bi"},
        {"kind": "bi", "loss": NEGATIVES, "stage": 3, "lora": True, "form": "triplets", "save": "lora"},
        {"kind": "bi", "loss": CACHED, "stage": 0, "options": SMALL},
        {"kind": "bi", "loss": "GISTEmbedLoss", "stage": 1, "options": WARM},
        SIMILARITY | {"stage": 3, "extra": "best"},
        SIMILARITY | {"stage": 2, "extra": "resume"},
        CROSS | {"stage": 1, "extra": "loss", "save": "cross"},
        SPARSE | {"stage": 0, "extra": "loss", "save": "sparse"},
    ],
    (4, 2): [
        {"kind": "bi", "loss": NEGATIVES, "stage": 1, "options": GATHERED},
        {"kind": "bi", "loss": CACHED, "stage": 1, "options": GATHERED | SMALL, "lora": True},
        SPARSE | {"stage": 2, "accumulate": 2},
    ],
}  # fmt: skip
IN_BATCH = {"accumulate": 2}
"""With two replicas each has negatives of its own, as micro batches of one process have."""
KINDS = [
    SIMILARITY, CROSS, SPARSE | IN_BATCH,
    *({"kind": "bi", "loss": loss} | IN_BATCH
      for loss in (NEGATIVES, "MultipleNegativesSymmetricRankingLoss", "Matryoshka")),
    {"kind": "bi", "loss": "GISTEmbedLoss", "options": WARM} | IN_BATCH,
    {"kind": "bi", "loss": "TripletLoss", "form": "triplets"},
    {"kind": "bi", "loss": CACHED, "options": SMALL} | IN_BATCH,
    {"kind": "cross", "loss": NEGATIVES, "form": "triplets"} | IN_BATCH,
]  # fmt: skip
WHOLE: Table = {
    (world, 2): [
        {key: value for key, value in kind.items() if world == 4 or key != "accumulate"} | {"stage": stage} | lora
        for kind, stage, lora in itertools.product(KINDS, (0, 1, 2, 3), ({}, {"lora": True}))
        if stage < 2 or kind["loss"] != CACHED
    ]
    for world in (2, 4)
}
REFUSED = {
    "a_cached_loss": (
        {"kind": "bi", "loss": CACHED, "stage": 2, "options": SMALL},
        f"{CACHED} goes backward once a mini batch, and DeepSpeed's ZeRO stage 2 takes one backward a step",
    ),
    "a_loss_with_a_layer": (
        {"kind": "bi", "loss": "SoftmaxLoss", "form": "classes", "stage": 1},
        "the optimizer has 2 parameters (one of shape (3, 96)) that are no part of the model",
    ),
    "one_column": (
        {"kind": "bi", "loss": NEGATIVES, "form": "single", "stage": 1, "guarded": False},
        "Expected at least 2 embeddings, got 1",
    ),
}
REFUSED_CASES = [case for case, _ in REFUSED.values()]


def truth_of(case: dict) -> dict:
    return {key: value for key, value in case.items() if key not in ("stage", "guarded")}


@functools.cache
def folder() -> str:
    return tempfile.mkdtemp()


def placed(case: dict, world: int) -> dict:
    """The case with a whole path to save in."""
    return case | ({"save": f"{folder()}/{case['save']}-{world}"} if "save" in case else {})


@functools.cache
def launched(slow: bool, world: int, tp: int) -> list[list[dict | str]]:
    cases = [*(WHOLE if slow else CASES)[world, tp], *(REFUSED_CASES if (slow, world) == (False, 2) else [])]
    cases = [{"tp": tp} | placed(case, world) for case in cases]
    return on_ranks(
        world, sentence_runs.run_all, "sharded", cases, timeout_s=3000, env={"ACCELERATE_USE_DEEPSPEED": "true"}
    )


@functools.cache
def truths(slow: bool) -> list[tuple[dict, dict | str]]:
    """One process trains every kind of case once, and reads what ranks have saved."""
    wanted: list[dict] = []
    for (world, tp), cases in (WHOLE if slow else CASES).items():
        launched(slow, world, tp)
        wanted += [one for case in cases if (one := truth_of(placed(case, world))) not in wanted]
    return list(zip(wanted, on_ranks(1, sentence_runs.run_all, "alone", wanted, timeout_s=3000)[0], strict=True))


def name_of(case: dict) -> str:
    return "-".join("+".join(value) if isinstance(value, dict) else str(value) for value in case.values())


def parameters(slow: bool) -> list:
    return [
        pytest.param(world, tp, index, id=f"tp{tp}xdp{world // tp}-" + name_of(case))
        for (world, tp), cases in (WHOLE if slow else CASES).items()
        for index, case in enumerate(cases)
    ]


def check(slow: bool, world: int, tp: int, index: int) -> None:
    case = truth_of(placed((WHOLE if slow else CASES)[world, tp][index], world))
    truth = next(found for wanted, found in truths(slow) if wanted == case)
    assert not isinstance(truth, str), truth
    for rank, results in enumerate(launched(slow, world, tp)):
        found = results[index]
        assert not isinstance(found, str), f"rank {rank}:\n{found}"
        wrong = sentence_runs.differences(found, truth)
        assert not wrong, f"rank {rank}: " + "; ".join(wrong)
    assert sum("loss" in entry for entry in truth["log"]) == sentence_runs.STEPS
    assert len(truth["again"]) == (2 if "save" in case else 0)


@pytest.mark.parametrize(("world", "tp", "index"), parameters(False))
def test_equals_one_process(world, tp, index):
    check(False, world, tp, index)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "tp", "index"), parameters(True))
def test_every_stage_equals_one_process(world, tp, index):
    check(True, world, tp, index)


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_in_one_sentence_on_every_rank(name):
    place = len(CASES[2, 2]) + list(REFUSED).index(name)
    for results in launched(False, 2, 2):
        found = results[place]
        assert isinstance(found, str), f"it trained: {found}"
        assert REFUSED[name][1] in found.strip().splitlines()[-1], found
