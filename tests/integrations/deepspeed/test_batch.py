"""DeepSpeed files as AutoTP's examples and OpenRLHF write them: train_batch_size, mpu= beside autotp_size,
tp_model_init, partition_config. Four ranks, tp 2 x dp 2: micro batch 2, accumulation 2, 8 samples a step."""

from __future__ import annotations

import argparse
import contextlib
import functools
import inspect
import io
import json
import os
import re
import tempfile
import traceback
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.tensor_parallel import init_utils

import tp_plugin
from tests.support import zoo
from tests.support.batched_cases import launched, sentence, values
from tests.support.configs import config_for
from tests.support.matrix import LIMITS, assert_within
from tests.support.models import make
from tests.support.ranks import on_ranks
from tests.support.train import GroupsOfAScript, compare, engine_for, optimizer_for

SAMPLES, COUNTED = 8, 16  # of a step, and as DeepSpeed multiplies by all ranks
RULES = {
    "use_default_specs": False,
    "layer_specs": [
        {"patterns": [r".*\.(o|down)_proj\.weight$"], "partition_type": "row"},
        {"patterns": [r".*\.[qkv]_proj\.weight$"], "partition_type": "column"},
        {"patterns": [r".*\.(gate|up)_proj\.weight$"], "partition_type": "column", "shape": [1, -1]},
        {"patterns": [".*norm.*"], "partition_type": "skip"},
    ],
}
EQUAL: dict[str, dict[str, Any]] = {
    **{f"ranks_zero{stage}": {"stage": stage, "extra": {"train_batch_size": COUNTED}} for stage in (1, 3)},
    "no_accumulation": {
        "stage": 0,
        "extra": {"train_batch_size": COUNTED, "gradient_accumulation_steps": None},
        "says": "train_batch_size 16 counts all 4 ranks, as DeepSpeed's AutoTP does: a step trains 8 samples",
    },
    "no_micro_batch": {
        "stage": 2,
        "extra": {"train_batch_size": COUNTED, "train_micro_batch_size_per_gpu": None},
        "says": "(train_micro_batch_size_per_gpu 2 x gradient_accumulation_steps 2 x 2 replicas)",
    },
    "rules": {"stage": 1, "extra": {"tensor_parallel": {"autotp_size": 2, "partition_config": RULES}}},
    "mpu": {
        "stage": 3,
        "way": "beside",
        "extra": {"train_batch_size": SAMPLES, "gradient_accumulation_steps": None, "data_parallel_size": 2},
    },
    "recorded": {"stage": 1, "way": "recorded"},  # the last: DeepSpeed keeps what it was told
}


def compare_all() -> dict[str, tuple[dict[str, float] | str, str]]:
    """By name: errors against one process, and what was printed."""
    found: dict[str, tuple[dict[str, float] | str, str]] = {}
    for name, case in EQUAL.items():
        said = io.StringIO()
        with contextlib.redirect_stderr(said):
            try:
                errors: Any = compare("Llama", 2, **{key: value for key, value in case.items() if key != "says"})
            except Exception:
                errors = traceback.format_exc()
        found[name] = errors, said.getvalue()
    return found


@functools.cache
def compared() -> list[dict]:
    return on_ranks(4, compare_all, timeout_s=600)


@pytest.mark.parametrize("name", EQUAL)
def test_trains_the_batch_of_one_process(name):
    assert_within(LIMITS, [found[name][0] for found in compared()])
    for rank, found in enumerate(compared()):
        _, said = found[name]
        wanted = EQUAL[name].get("says")
        assert (wanted in said) if wanted and rank == 0 else "train_batch_size" not in said


# ---- what the engine says, and what is refused on four ranks ---------------------------------------------------------


def sizes() -> list[tuple[int, int, int, bool]]:
    """Batch, micro batch, accumulation of engines, and whether the caller's config is as it was."""
    tp_plugin.register()
    found = []
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config_for(2, 3, train_batch_size=COUNTED), file)
        file.flush()
        named, model = argparse.Namespace(deepspeed_config=file.name, local_rank=-1), make("Llama")
        engine = deepspeed.initialize(args=named, model=model, optimizer=optimizer_for(model, "adamw"))[0]
        found.append(
            (
                engine.train_batch_size(),
                2,
                engine.gradient_accumulation_steps(),
                named.deepspeed_config == file.name and named.local_rank == int(os.environ["LOCAL_RANK"]),
            )
        )
    for initialize, stage, batch, brought in (
        (deepspeed.initialize, 1, COUNTED, {}),
        (deepspeed.initialize, 3, SAMPLES, {}),
        (deepspeed.initialize, 2, SAMPLES, {"mpu": GroupsOfAScript(2)}),
        (inspect.unwrap(deepspeed.initialize), 3, COUNTED, {}),  # as imported by name before register()
    ):
        config = config_for(2, stage, train_batch_size=batch)
        before, model = dict(config), make("Llama")
        engine = initialize(model=model, optimizer=optimizer_for(model, "adamw"), config=config, **brought)[0]
        sizes = engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
        found.append((*sizes, config == before))
    return found


def groups_of_ranks_apart() -> None:
    engine_for(make("Llama"), None, config_for(2, 1), mpu=GroupsOfAScript(2, strided=True))


def a_recorded_group_of_ranks_apart() -> None:
    deepspeed.tp_model_init(make("Llama"), tp_size=2, dtype=None, tp_group=GroupsOfAScript(2, strided=True).tensor)
    try:
        engine_for(make("Llama"), None, config_for(2, 1))
    finally:
        init_utils._TP_MODEL_INIT_ARGS = None


def a_group_of_ranks_apart_in_the_config() -> None:
    group = GroupsOfAScript(2, strided=True).tensor
    engine_for(make("Llama"), None, config_for(2, 1, tensor_parallel={"autotp_size": 2, "tp": {"tp_group": group}}))


def neither_product() -> None:
    engine_for(make("Llama"), None, config_for(2, 1, train_batch_size=12))


def two_readings() -> None:
    engine_for(make("Llama"), None, config_for(2, 1, train_batch_size=12, gradient_accumulation_steps=None))


def of_replicas_by_mpu() -> None:
    engine_for(make("Llama"), None, config_for(2, 1, train_batch_size=COUNTED + 1), mpu=GroupsOfAScript(2))


def drawn_by_one_rank_and_broadcast() -> list[float]:
    """AutoTP's basic example: the first rank of a group draws the batch and broadcasts it, generators fall apart."""
    groups, model = GroupsOfAScript(2), make("Llama")
    config = {
        "train_batch_size": SAMPLES,
        "train_micro_batch_size_per_gpu": SAMPLES // 2,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "tensor_parallel": {"autotp_size": 2},
        "data_parallel_size": 2,
    }
    engine = engine_for(model, torch.optim.AdamW(model.parameters(), lr=1e-4), config, mpu=groups)
    errors = []
    for _ in range(3):
        ids = torch.zeros(SAMPLES // 2, 12, dtype=torch.long)
        if groups.get_model_parallel_rank() == 0:
            ids = torch.randint(0, 131, ids.shape)
        dist.broadcast(ids, src=dist.get_rank() // 2 * 2, group=groups.tensor)
        whole = tp_plugin.full_state_dict(engine)
        loss = engine(input_ids=ids, labels=ids).loss
        if dist.get_rank() == 0:
            plain = make("Llama")
            plain.load_state_dict(whole)
            errors.append(abs(float(loss / plain(input_ids=ids, labels=ids).loss) - 1))
        engine.backward(loss)
        engine.step()
    return errors


def _engine_of_custom_patterns(packed: str) -> tuple[GroupsOfAScript, Any]:
    """AutoTP's example of custom patterns: rules for packed projections, groups of the script's."""
    names = {
        r".*attention\.query_key_value\.weight$": packed,
        r".*attention\.dense\.weight$": "row",
        r".*mlp\.dense_h_to_4h\.weight$": "column",
        r".*mlp\.dense_4h_to_h\.weight$": "row",
    }
    specs: list[dict[str, Any]] = [{"patterns": [name], "partition_type": kind} for name, kind in names.items()]
    specs[0] |= {"shape": ((32, 32, 32), -1), "partition_dim": 0}
    rules = {"use_default_specs": False, "layer_specs": specs}
    config = {
        "train_batch_size": SAMPLES,
        "train_micro_batch_size_per_gpu": SAMPLES // 2,
        "zero_optimization": {"stage": 2},
        "zero_allow_untested_optimizer": True,
        "tensor_parallel": {"autotp_size": 2, "partition_config": rules},
        "data_parallel_size": 2,
    }
    groups, model = GroupsOfAScript(2), zoo.build("gpt_neox")
    return groups, engine_for(model, torch.optim.AdamW(model.parameters(), lr=1e-4), config, mpu=groups)


class _SamplesOfAReplica(torch.utils.data.Sampler):
    """Every rank draws one order and takes the part of its data-parallel rank."""

    def __init__(self, count: int, rank: int) -> None:
        self.count, self.rank = count, rank

    def __iter__(self):
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(3)).tolist()
        return iter(order[self.rank :: 2])


def padded_texts(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return {"input_ids": ids, "attention_mask": ids != 0, "labels": ids.masked_fill(ids == 0, -100)}


def sampled_by_replica() -> list[float]:
    """Errors of each step's loss against the whole model in one process, on the samples of this replica."""
    groups, engine = _engine_of_custom_patterns("column")
    texts = [torch.arange(1, 4 + number) + number for number in range(16)]
    sampler = _SamplesOfAReplica(len(texts), groups.get_data_parallel_rank())
    errors = []
    for batch in torch.utils.data.DataLoader(texts, SAMPLES // 2, sampler=sampler, collate_fn=padded_texts):
        plain = zoo.build("gpt_neox")
        plain.load_state_dict(tp_plugin.full_state_dict(engine) or plain.state_dict())
        loss = engine(**batch).loss
        if dist.get_rank() == 0:
            errors.append(abs(float(loss / plain(**batch).loss) - 1))
        engine.backward(loss)
        engine.step()
    return errors


def packed_heads_as_rows() -> None:
    _engine_of_custom_patterns("row")


REFUSED = {
    "packed_heads_as_rows": r"query_key_value.weight 'row' and tp_plugin's plan makes it 'column'",
    "groups_of_ranks_apart": r"mpu= has the ranks \[0, 2\] in a tensor-parallel group where .* puts \[0, 1\]",
    "a_recorded_group_of_ranks_apart": r"tp_group= has the ranks \[0, 2\] .* puts \[0, 1\]; leave it out, or make",
    "a_group_of_ranks_apart_in_the_config": r"tp_group= has the ranks \[0, 2\] ",
    "neither_product": r"train_batch_size 12 .*does not match .* 2 x .* 2: these make 8 over 2 .* 16 over 4 ranks",
    "two_readings": r"two readings .* 2: gradient_accumulation_steps 12/8 if all 4 ranks share it.*, or 3 if "
    r"the 2 replicas do; remove train_batch_size",
    "of_replicas_by_mpu": r"train_batch_size 17 in the DeepSpeed config does not match",
}


ALLOWED = ("sizes", "drawn_by_one_rank_and_broadcast", "sampled_by_replica")


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_on_every_rank(name):
    assert re.search(REFUSED[name], sentence(launched(4, __name__, (*REFUSED, *ALLOWED)), name))


def test_the_engine_counts_the_batch_that_is_trained():
    for found in values(launched(4, __name__, (*REFUSED, *ALLOWED)), "sizes"):
        assert found == [(SAMPLES, 2, 2, True)] * 5


def test_autotps_basic_example_trains_as_it_is():
    errors, *_ = values(launched(4, __name__, (*REFUSED, *ALLOWED)), "drawn_by_one_rank_and_broadcast")
    assert len(errors) == 3
    assert max(errors) < 1e-5


def test_autotps_custom_patterns_example_trains_as_it_is():
    errors, *_ = values(launched(4, __name__, (*REFUSED, *ALLOWED)), "sampled_by_replica")
    assert len(errors) == 2
    assert max(errors) < 1e-5
