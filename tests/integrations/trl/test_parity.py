"""TRL's trainers, and HF Trainer in the cross, through DeepSpeed's slot against one unsharded process of the same.

Everything they log (losses, norms, entropy, accuracies, rewards, log-probabilities, token counts), the trained
parameters, and replicas. One launch of ranks trains many configurations, each a test of its own.
"""

from __future__ import annotations

import functools
import itertools

import pytest

from tests.support import trl_runs
from tests.support.ranks import on_ranks

Table = dict[tuple[int, int], list[dict]]

ACCUMULATE = {"gradient_accumulation_steps": 2}
CASES: Table = {
    (4, 2): [
        {"kind": "sft", "stage": 1, "tied": True, "evaluate": True},
        {"kind": "sft", "stage": 3, "loss_type": "dft", "form": "prompt-completion"} | ACCUMULATE,
        {"kind": "sft", "stage": 2, "form": "chat", "assistant_only_loss": True, "gradient_checkpointing": True},
        {"kind": "sft", "stage": 0, "family": "Gemma2", "tied": True},
        {"kind": "dpo", "stage": 2, "evaluate": True},
        {"kind": "dpo", "stage": 1, "loss_type": ["ipo", "sigmoid"], "ld_alpha": 0.5, "use_weighting": True},
        {"kind": "dpo", "stage": 3, "precompute_ref_log_probs": True, "reference": False},
        {"kind": "dpo", "stage": 2, "sync_ref_model": True, "ref_model_sync_steps": 1},
        {"kind": "reward", "stage": 1, "evaluate": True},
        {"kind": "reward", "stage": 3, "center_rewards_coefficient": 0.01, "form": "chat-preference"},
    ],
    (2, 2): [
        {"kind": "sft", "stage": 2, "lora": {}, "tied": True},
        {"kind": "sft", "stage": 3, "lora": {"modules_to_save": ["lm_head"]}},
        {"kind": "dpo", "stage": 1, "lora": {}},
        {"kind": "dpo", "stage": 3, "lora": {"target_modules": ["q_proj", "v_proj", "down_proj"]}, "tied": True},
        {"kind": "reward", "stage": 2, "lora": {"task_type": "SEQ_CLS"}},
        {"kind": "sft", "stage": 2, "packing": True, "max_length": 16},
        {"kind": "sft", "stage": 1, "padding_free": True, "max_length": None},
        {"kind": "sft", "stage": 3, "average_tokens_across_devices": False} | ACCUMULATE,
        {"kind": "sft", "stage": 0, "form": "tokens", "dataset_kwargs": {"skip_prepare_dataset": True}},
        {"kind": "sft", "stage": 1, "family": "Mixtral", "model": {"output_router_logits": True}},
    ],
    (4, 4): [
        {"kind": "sft", "stage": 2, "tied": True, "model": {"heads": (8, 2)}},
        {"kind": "dpo", "stage": 1, "model": {"heads": (8, 2)}},
        {"kind": "reward", "stage": 2, "model": {"heads": (8, 2)}},
    ],
}
SELDOM = [
    {"kind": "sft", "stage": 1, "label_smoothing_factor": 0.1},
    {"kind": "sft", "stage": 3, "family": "Granite"},
    {"kind": "dpo", "stage": 1, "precompute_ref_log_probs": True, "reference": False},
    {"kind": "dpo", "stage": 3, "tied": True, "form": "chat-preference"} | ACCUMULATE,
]
WHOLE: Table = {
    (world, tp): [
        *(SELDOM if (world, tp) == (4, 2) else []),
        *({"kind": kind, "stage": stage, "tied": tied, "model": {"heads": (8, 4)}} | lora
          for kind, stage, tied in itertools.product(trl_runs.PREFIXES, (0, 1, 2, 3), (True, False))
          for lora in ({}, {"lora": {"task_type": "SEQ_CLS"} if kind == "reward" else {}})),
    ]
    for world, tp in ((2, 2), (4, 2), (4, 4), (8, 4))
}  # fmt: skip


def truth_of(case: dict) -> dict:
    return {key: value for key, value in case.items() if key != "stage"}


@functools.cache
def truths(slow: bool) -> list[tuple[dict, dict | str]]:
    """One process trains every kind of case once."""
    wanted: list[dict] = []
    for case in itertools.chain.from_iterable((WHOLE if slow else CASES).values()):
        if truth_of(case) not in wanted:
            wanted.append(truth_of(case))
    return list(zip(wanted, on_ranks(1, trl_runs.run_all, "alone", wanted, timeout_s=1800)[0], strict=True))


@functools.cache
def launched(slow: bool, world: int, tp: int) -> list[list[dict | str]]:
    cases = [{"tp": tp, **case} for case in (WHOLE if slow else CASES)[world, tp]]
    return on_ranks(world, trl_runs.run_all, "sharded", cases, timeout_s=3000, env={"ACCELERATE_USE_DEEPSPEED": "true"})


def name_of(case: dict) -> str:
    parts = case | ({"lora": ["lora", *case["lora"]]} if "lora" in case else {})
    return "-".join("+".join(value) if isinstance(value, dict | list) else str(value) for value in parts.values())


def parameters(slow: bool) -> list:
    return [
        pytest.param(world, tp, index, id=f"tp{tp}xdp{world // tp}-" + name_of(case))
        for (world, tp), cases in (WHOLE if slow else CASES).items()
        for index, case in enumerate(cases)
    ]


def check(slow: bool, world: int, tp: int, index: int) -> None:
    case = truth_of((WHOLE if slow else CASES)[world, tp][index])
    truth = next(found for wanted, found in truths(slow) if wanted == case)
    assert not isinstance(truth, str), truth
    for rank, results in enumerate(launched(slow, world, tp)):
        assert not isinstance(results[index], str), f"rank {rank}:\n{results[index]}"
        wrong = trl_runs.differences(results[index], truth, trl_runs.ROUNDING if slow and "lora" in case else 0.0)
        assert not wrong, f"rank {rank}: " + "; ".join(wrong)
    losses = [entry["loss"] for entry in truth["log"] if "loss" in entry]
    assert len(losses) == trl_runs.STEPS
    norms = [entry["grad_norm"] for entry in truth["log"] if "grad_norm" in entry]
    assert max(norms) > trl_runs.CLIP, "clipping must be at work"


@pytest.mark.parametrize(("world", "tp", "index"), parameters(False))
def test_equals_one_process(world, tp, index):
    check(False, world, tp, index)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "tp", "index"), parameters(True))
def test_the_whole_cross_equals_one_process(world, tp, index):
    check(True, world, tp, index)
