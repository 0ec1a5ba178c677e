"""The guard of the first step: silent where all is well, and loud about each thing broken on purpose."""

from __future__ import annotations

import contextlib
import functools
import io

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.zero import GatheredParameters
from torch.nn import functional as F

import tp_plugin
from tests.support.guarded import compared, engine_of, steps
from tests.support.models import batch, make
from tests.support.ranks import errors_on_ranks, on_ranks
from tests.support.train import loss_of, micro_batches
from tp_plugin.integrations.zero3 import partition_data
from tp_plugin.layers import RowParallelLinear
from tp_plugin.step_guard.guard import guard_of

SOUND = {
    "Llama ZeRO-1": ("Llama", 1, {}),
    "Llama ZeRO-3": ("Llama", 3, {}),
    "Llama KV replicated ZeRO-2": ("Llama", 2, {"heads": (4, 1)}),
    "Gemma2 tied ZeRO-0": ("Gemma2", 0, {}),
    "Mixtral ZeRO-3": ("Mixtral", 3, {}),
    "Qwen3Moe ZeRO-1": ("Qwen3Moe", 1, {}),
    "GPT-2 ZeRO-1": ("gpt2", 1, {}),
    "GPTNeoX ZeRO-1": ("gpt_neox", 1, {}),
    "BLOOM ZeRO-1": ("bloom", 1, {}),
    "T5 ZeRO-2": ("t5", 2, {}),
    "Bert ZeRO-1": ("bert", 1, {}),
    "Llama bf16 ZeRO-1": ("Llama", 1, {"bf16": {"enabled": True}}),
    "Mixtral bf16 ZeRO-3": ("Mixtral", 3, {"bf16": {"enabled": True}}),
    "Llama LoRA ZeRO-3": ("Llama", 3, {"adapter": "every linear"}),
    "Llama LoRA of head and table ZeRO-1": ("Llama", 1, {"adapter": "vocabulary"}),
    "Qwen3 copies to save ZeRO-2": ("Qwen3", 2, {"adapter": "norms to save"}),
    "Mixtral LoRA of experts ZeRO-1": ("Mixtral", 1, {"adapter": "experts"}),
    "Llama IA3 ZeRO-1": ("Llama", 1, {"adapter": "IA3"}),
}


def sound():
    """By case: the largest relative difference that the guard saw, by quantity."""
    found = {}
    for name, (family, stage, extra) in SOUND.items():
        options = {key: value for key, value in extra.items() if key in ("heads", "adapter")}
        engine = engine_of(family, stage, {} if options else extra, **options)
        seen: dict[str, float] = {}
        guard = guard_of(engine)
        try:
            with compared(seen):
                steps(engine, 2, family)
            after = "" if engine.module.training and not guard.due[True] and guard.gradients is None else "not complete"
        except Exception as failure:
            after = f"{type(failure).__name__}: {failure}"
        found[name] = seen, after
    return found


@functools.cache
def sound_cases():
    return on_ranks(2, sound)


@pytest.mark.parametrize("name", SOUND)
def test_a_sound_step_passes_and_is_really_compared(name):
    for found in sound_cases():
        seen, wrong = found[name]
        assert wrong == ""
        assert "loss" in seen
        assert {"logits"} <= seen.keys(), seen
        assert max(value for key, value in seen.items() if "coarse" not in key) < 1e-5, seen
        assert ("coarse logits" in seen) == ("bf16" in name)
        assert all(1e-4 < value < 3e-2 for key, value in seen.items() if key == "coarse logits"), seen


def draws(*_):
    """In evaluation mode too, in which the guard compares."""
    torch.rand(1)


def unguarded_losses(guard):
    """Losses of a model with dropout, which draws random numbers."""
    engine = engine_of("Llama", 1, {"tp_plugin": {"guard": guard}}, attention_dropout=0.3)
    engine.module.model.register_forward_pre_hook(draws)
    torch.manual_seed(3)
    losses = []
    for step in range(2):
        for pieces in micro_batches(step, 1):
            loss = loss_of(engine, pieces[0], step)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def with_and_without():
    return unguarded_losses(True), unguarded_losses(False)


def test_training_does_not_notice_the_guard():
    for watched, alone in on_ranks(2, with_and_without):
        assert watched == alone


# ---- broken on purpose ----------------------------------------------------------------------------------------------


def a_norm_of_one_replica(when, every):
    engine = engine_of("Llama", 1, {"tp_plugin": {"check_replicas_every": every, "guard": False}})
    steps(engine, when)
    if dist.get_rank() == 1:
        with torch.no_grad():
            engine.module.model.norm.weight += 0.5
    steps(engine, 2)


@pytest.mark.parametrize(("when", "every"), [(0, 1000), (1, 1000), (3, 3)])
def test_a_drifted_replica_is_caught_at_the_first_step_and_later(when, every):
    errors = errors_on_ranks(2, a_norm_of_one_replica, when, every)
    assert len(set(errors)) == 1
    assert "'model.norm.weight' is not the same on the ranks" in errors[0]


def padding_of_its_own():
    """Losses at ZeRO-3 of a model with scalars, whose second partition is padding alone; how many have such."""
    engine = engine_of("apertus", 3, {"tp_plugin": {"check_replicas_every": 1, "guard": False}})
    padded = 0
    for param in engine.module.parameters():
        padding = param.ds_tensor.data.view(-1)[partition_data(param).numel() :]
        padding.fill_(1.0 + dist.get_rank())
        padded += partition_data(param).numel() == 0
    steps(engine, 2, "apertus")
    return padded


def test_padding_of_partitions_is_no_replica():
    first, _, second, _ = on_ranks(4, padding_of_its_own)
    assert first == 0
    assert second > 0, "no partition is padding alone"


def rounding_of_one_replica():
    engine = engine_of("Llama", 1, {"tp_plugin": {"check_replicas_every": 1, "guard": False}})
    if dist.get_rank() == 1:
        with torch.no_grad():
            engine.module.model.norm.weight *= 1 + 1e-6
    with contextlib.redirect_stderr(io.StringIO()) as said:
        steps(engine, 2)
    return said.getvalue()


def test_rounding_between_replicas_is_a_warning_once():
    first, second = on_ranks(2, rounding_of_one_replica)
    assert first.count("replicas differ between the ranks") == 1
    assert "'model.norm.weight'" in first
    assert "look for" in first
    assert "kernels" not in first  # this model is on the CPU
    assert not second


def a_shared_head(stage, heads):
    engine = engine_of("Llama", stage, heads=heads)
    weight = engine.module.model.layers[1].self_attn.k_proj.weight
    if dist.get_rank() == 1:
        with torch.no_grad():
            getattr(weight, "ds_tensor", weight).view(-1)[3] += 0.5
    steps(engine, 1)


@pytest.mark.parametrize("heads", [(4, 1), (6, 3)], ids=["replicated", "one of three shared"])
@pytest.mark.parametrize("stage", [1, 3])
def test_a_drifted_shared_head_is_caught(stage, heads):
    errors = errors_on_ranks(2, a_shared_head, stage, heads)
    assert all("'model.layers.1.self_attn.k_proj.weight' is not the same" in error for error in errors)


def a_shifted_batch():
    engine = engine_of("Llama", 1)
    rank = dist.get_rank()
    steps(engine, 1, input_ids=batch(0, 2)["input_ids"].roll(rank, 1))


def test_another_batch_on_one_rank_is_caught():
    errors = errors_on_ranks(2, a_shifted_batch)
    assert all("got different batches" in error for error in errors)


def reads_the_head(model, inputs):
    """What TRL's fused head and many a hand-written loss do: right on one GPU, half a vocabulary on a shard."""
    hidden = model.model(input_ids=inputs["input_ids"]).last_hidden_state
    with GatheredParameters([model.lm_head.weight]):
        logits = hidden @ model.lm_head.weight.T
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten().clamp(-100, 60))


def a_loss_of_its_own(stage):
    engine = engine_of("Llama", stage)
    guard_of(engine).examine(reads_the_head, batch(0, 3))


@pytest.mark.parametrize("stage", [1, 3])
def test_a_loss_that_reads_a_shard_for_the_head_is_caught(stage):
    errors = errors_on_ranks(2, a_loss_of_its_own, stage)
    assert len(set(errors)) == 1
    assert "computed again without tensor parallelism differs: the trainer's loss" in errors[0]
    assert " here, " in errors[0]


def a_row_that_is_not_reduced():
    engine = engine_of("Llama", 1)
    layer = engine.module.model.layers[1].mlp.down_proj
    assert isinstance(layer, RowParallelLinear)
    layer.register_forward_hook(lambda _module, _args, output: output * 0.7)
    steps(engine, 1)


def test_a_wrong_layer_is_caught_and_named():
    errors = errors_on_ranks(2, a_row_that_is_not_reduced)
    assert all("first in model.layers.1," in error for error in errors), errors


def a_module_without_gradient():
    engine = engine_of("Llama", 1, {"tp_plugin": {"guard": False}})
    tp_plugin.check_next_step(engine)
    # evaluation mode, in which the guard compares, goes another way
    layer = engine.module.model.layers[0].mlp.up_proj
    forward = layer.forward
    layer.forward = lambda x: forward(x).detach() if engine.module.training else forward(x)
    steps(engine, 2)


def test_a_parameter_that_lost_its_gradient_is_caught():
    errors = errors_on_ranks(2, a_module_without_gradient)
    assert all("first is 'model.layers.0.mlp.up_proj.weight'" in error for error in errors), errors


def a_dropped_adapter(stage):
    engine = engine_of("Llama", stage, adapter="every linear")
    adapted = engine.module.base_model.model.model.layers[0].self_attn.q_proj
    adapted.forward = adapted.base_layer.forward  # what replacing the adapted layer by a sharded one comes to
    steps(engine, 2)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_dropped_adapter_is_caught(stage):
    errors = errors_on_ranks(2, a_dropped_adapter, stage)
    assert all("2 trainable parameters got no gradient" in error for error in errors), errors
    assert "layers.0.self_attn.q_proj.lora_A" in errors[0]


def on_request():
    model = make("Llama")
    with pytest.raises(tp_plugin.TensorParallelError, match="needs a sharded model"):
        tp_plugin.check_next_step(model)
    engine = engine_of("Llama", 1)
    steps(engine, 1)
    engine.module.model.layers[1].mlp.down_proj.register_forward_hook(lambda _module, _args, output: output * 0.7)
    steps(engine, 1)  # nobody looks
    tp_plugin.check_next_step(engine)
    steps(engine, 1)


def test_the_check_can_be_asked_for():
    errors = errors_on_ranks(2, on_request)
    assert all("computed again without tensor parallelism differs" in error for error in errors)
