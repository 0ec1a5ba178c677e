"""What DeepSpeed's engine answers once its slot is ours: batch sizes, samplers, exports; and taking the slot back."""

from __future__ import annotations

from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

import tp_plugin
from tests.support.batched_cases import launched, values
from tests.support.configs import ACCUMULATION, MICRO, config_for
from tests.support.models import batch, make
from tests.support.ranks import on_ranks
from tests.support.train import engine_by, engine_for, optimizer_for
from tp_plugin.integrations.deepspeed import slot


def engine_at(stage: int, way: str = "slot", **extra):
    model = make("Llama", tied=True)
    return engine_by(way, model, optimizer_for(model, "adamw"), config_for(2, stage, **extra), 2)


def batch_sizes() -> list[tuple[int, int, int]]:
    engines = [engine_at(1, way) for way in ("slot", "early", "mpu")]
    return [
        (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps())
        for engine in engines
    ]


def samples_counted() -> int:
    engine = engine_at(1)
    for step in range(ACCUMULATION):
        engine.backward(engine(**batch(step, MICRO)).loss)
        engine.step()
    return engine.global_samples


def rows_of_the_sampler() -> list[list[int]]:
    import deepspeed

    tp_plugin.register()
    rows = [torch.tensor(index) for index in range(16)]
    loader = deepspeed.initialize(model=make("Llama"), config=config_for(2, 0), training_data=rows)[2]
    return [found.tolist() for found in loader]


def consolidated() -> list[tuple[bool, list[str], list[str]]]:
    """At stages 0 and 3: rank 0 alone has it? names that are missing, names that differ from the unsharded model."""
    found = []
    truth = make("Llama", tied=True).state_dict()
    for stage in (0, 3):
        engine = engine_at(stage)
        name = "_zero3_consolidated_16bit_state_dict" if stage == 3 else "_consolidated_16bit_state_dict"
        state = getattr(engine, name)()
        if dist.get_rank():
            found.append((not state, [], []))
            continue
        differ = [key for key in truth if key in state and not torch.equal(truth[key], state[key])]
        found.append((True, sorted(truth.keys() - state.keys()), differ))
    return found


def consolidated_without_frozen() -> list[str] | None:
    model = make("Llama", tied=True)
    model.model.norm.weight.requires_grad_(False)
    engine = engine_for(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad]), config_for(2, 1))
    found = engine._consolidated_16bit_state_dict(exclude_frozen_parameters=True)
    return None if found is None else sorted(found)


NAMES = (
    *("batch_sizes", "samples_counted", "rows_of_the_sampler", "consolidated", "consolidated_without_frozen"),
    *("initialize_by_its_old_name",),
)


@pytest.fixture(scope="module")
def four() -> list[dict]:
    return launched(4, __name__, NAMES)


def test_train_batch_size_counts_replicas_not_ranks(four):
    assert values(four, "batch_sizes") == [[(MICRO * ACCUMULATION * 2, MICRO, ACCUMULATION)] * 3] * 4


def test_samples_are_counted_once(four):
    assert values(four, "samples_counted") == [MICRO * ACCUMULATION * 2] * 4


def test_deepspeeds_own_sampler_gives_a_group_the_same_rows(four):
    rows = values(four, "rows_of_the_sampler")
    assert rows[0] == rows[1]
    assert rows[2] == rows[3]
    assert sorted(row for part in rows[0] + rows[2] for row in part) == list(range(16))


def test_the_engines_own_export_is_the_full_model(four):
    assert values(four, "consolidated") == [[(True, [], [])] * 2] * 4


def test_frozen_parameters_can_be_left_out(four):
    names = values(four, "consolidated_without_frozen")
    assert "model.norm.weight" not in names[0]
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= set(names[0])
    assert names[1:] == [None] * 3


def initialize_by_its_old_name() -> str:
    """A script that did ``from deepspeed import initialize`` before ``register()``."""
    import deepspeed

    initialize = deepspeed.initialize.__wrapped__
    try:
        initialize(
            model=make("Llama"), config=config_for(2, 1, tensor_parallel={"autotp_size": 2, "tp_overlap_comm": True})
        )
    except tp_plugin.TensorParallelError as refused:
        return str(refused)
    return ""


def test_the_slot_checks_again(four):
    sentences = values(four, "initialize_by_its_old_name")
    assert len(set(sentences)) == 1
    assert "tp_overlap_comm" in sentences[0]


def registered_and_back() -> dict[str, bool]:
    import accelerate.accelerator
    import deepspeed
    import transformers
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    owners = (
        *(deepspeed, DeepSpeedEngine, DeepSpeedZeroOptimizer, DeepSpeedZeroOptimizer_Stage3, BF16_Optimizer),
        *(accelerate.Accelerator, accelerate.accelerator, accelerate.PartialState, transformers.Trainer),
    )
    stock = [dict(vars(owner)) for owner in owners]

    def same() -> bool:
        return all(
            vars(owner).keys() == before.keys() and all(vars(owner)[name] is before[name] for name in before)
            for owner, before in zip(owners, stock, strict=True)
        )

    tp_plugin.register()
    slot, initialize = DeepSpeedEngine._apply_autotp_partitioning, deepspeed.initialize
    taken = not same()
    tp_plugin.register()
    twice = DeepSpeedEngine._apply_autotp_partitioning is slot and deepspeed.initialize is initialize
    tp_plugin.unregister()
    back = same()
    tp_plugin.unregister()
    return {"taken": taken, "twice changes nothing": twice, "back": back, "undone twice": same()}


def test_register_twice_and_unregister():
    assert on_ranks(1, registered_and_back) == [
        dict.fromkeys(("taken", "twice changes nothing", "back", "undone twice"), True)
    ]


def several_engines() -> list[float]:
    """Two engines in one process, trained in turns."""
    first, second = engine_at(1), engine_at(3)
    losses = []
    for step in range(2):
        for engine in (first, second):
            loss = engine(**batch(step, MICRO)).loss
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def test_several_engines_in_one_process():
    truth = make("Llama", tied=True)(**batch(0, MICRO)).loss.item()
    for losses in on_ranks(2, several_engines):
        assert losses[:2] == pytest.approx([truth, truth], rel=1e-5)
        assert losses[2] == pytest.approx(losses[3], rel=1e-5)


def test_a_rank_takes_its_gpu_before_the_slot_meets_the_others(monkeypatch):
    """What is agreed is sent from the current GPU, and DeepSpeed chooses one in the method that the slot replaces."""
    order = []

    def meet(*_):
        order.append("agree")
        raise InterruptedError

    monkeypatch.setattr(slot, "take_device", lambda: order.append("device"))
    monkeypatch.setattr(slot, "agree", meet)
    monkeypatch.setattr(slot, "options_of", lambda _: tp_plugin.TensorParallelConfig(tp_size=2))
    monkeypatch.setattr(slot.groups, "get_tensor_model_parallel_world_size", lambda: 2)
    with pytest.raises(InterruptedError):
        slot._shard_in_slot(None, Mock(), torch.nn.Linear(1, 1), None)
    assert order == ["device", "agree"]
