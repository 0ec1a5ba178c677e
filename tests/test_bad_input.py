"""Bad input is refused on every rank with one clear sentence that names the fix, and nobody hangs."""

from __future__ import annotations

import os
import re
from unittest import mock

import pytest
import torch.distributed as dist

import tp_plugin
from tests.support import bad_input
from tests.support.bad_input import initialise
from tests.support.batched_cases import launched, sentence, values
from tests.support.models import batch, make
from tests.support.ranks import errors_on_ranks, on_ranks
from tests.support.train import engine_for

# ---- what two ranks refuse, tp 2 -------------------------------------------------------------------------------------


TWO = {
    "heads_do_not_fit": r"5 query and 1 key/value heads cannot be sharded 2 ways.*autotp_size from \[1, 5\]",
    "nothing_to_shard": r"nothing of Sequential would be sharded.*'plan' of the tp_plugin block",
    "rule_hits_nothing": r"hits no module; did you mean 'model\.layers\.\*\.mlp\.up_proj'\?",
    "column_without_row": r"exactly one row, the plan gives it: column up; row none; complete the rules",
    "unknown_style": r"unknown style 'slantwise' for 'up'.*choose from column",
    "label_outside": r"131.*vocabulary",
    "mesh_param": r"Ulysses.*remove mesh_param",
    "stage0_bf16": r'bf16 at ZeRO stage 0.*set "zero_optimization": {"stage": 1}',
    "stage0_bfloat16": r'bfloat16 at ZeRO stage 0.*set "zero_optimization": {"stage": 1}',
    "stage0_fp16": r'fp16 at ZeRO stage 0.*set "zero_optimization": {"stage": 1}',
    "stage0_autocast_fp16": r'torch_autocast in float16.*set "zero_optimization": {"stage": 1}',
    "unknown_key": r"unknown key 'chek_batch_every'.*did you mean 'check_batch_every'\?",
    "wrong_type": r"'quiet' must be of type bool, got 'yes'; correct it in the 'tp_plugin' block",
    "block_no_object": r"'tp_plugin' block.*must be an object",
    "size_in_block": r"'tp_size' does not belong in the 'tp_plugin' block; set tensor_parallel\.autotp_size",
    "size_no_number": r"autotp_size must be a whole number of ranks, got 'two'",
    "section_no_object": r'must be like {"autotp_size": 2}, got 2',
    "block_without_degree": r'no tensor_parallel\.autotp_size above 1.*add "tensor_parallel": {"autotp_size": N}',
    "empty_block_without_degree": r"no tensor_parallel\.autotp_size above 1.*\(1: for checkpoints that any shape",
    "config_from_a_file": r"unknown key 'quite'.*did you mean 'quiet'\?",
    "train_batch_size_that_contradicts": r"train_batch_size 1000 .*does not match .* make 4 over .* and 8 over",
    "train_batch_size_unfilled": r'train_batch_size in .* still "auto", which Trainer and Accelerator\.prepare fill in',
    "micro_batch_unfilled": r'train_micro_batch_size_per_gpu in .* still "auto".*write a number, or leave it out',
    "train_batch_size_no_number": r"train_batch_size in the DeepSpeed config must be a whole number above 0, got '8'",
    "degree_by_other_names": r"knows no 'enabled' and no 'degree'; the degree is .*: {\"autotp_size\": 2}",
    "degree_inside": r"tp\.tp_size is 2 and tensor_parallel\.autotp_size is 0.*autotp_size alone",
    "overlap_of_autotp": r"tp_overlap_comm is True .*do not overlap their collectives with computation; remove it",
    "head_kept_whole": r'vocab_parallel_lm_head is False.*"tp_plugin": {"plan": {"lm_head": "replicated"}}',
    "rule_of_autotp_that_differs": r"layers\.0\.self_attn\.q_proj\.weight 'row' and .*makes it 'column'; remove",
    "preset_of_autotp_that_differs": r"makes lm_head\.weight 'skip' and tp_plugin's plan makes it 'vocab_head'",
    "rule_of_autotp_that_is_none": r"partition_config in .* cannot be read \('diagonal' is not a valid PartitionType\)",
    "preset_of_nobody": r"preset_model 'lama' in the DeepSpeed config is none of DeepSpeed's presets; remove it",
    "batches_differ_at_once": r"different batches \(their values differ\).*broadcast_batch: true",
    "batches_differ_in_shape": r"different batches \(their shapes differ\).*broadcast_batch: true",
    "batches_differ_later": r"different batches \(their values differ\).*broadcast_batch: true",
    "batches_differ_in_evaluation": r"different batches \(their values differ\).*broadcast_batch: true",
    "other_widths": r"intermediate_size in the config of the model is 53 on rank 0 and 54 on rank 1; give every rank",
    "other_dtypes": r"the ranks built different models.*build the same model on every rank",
    "early_without_degree": r"sharded 2 ways and tensor_parallel\.autotp_size is 1.*set autotp_size to 2",
    "mesh_of_another_model": r"not sharded over mpu=.*call record = tp_plugin\.shard_model",
    "foreign_mpu": r"mpu= \(Module\) cannot be compared.*leave mpu= out",
    "gradient_before": r"has a gradient already; shard before the first backward",
    "on_meta": r"is on the meta device; load the weights before sharding",
    "dtensors": r"'lm_head\.weight' is a shard already, of a DTensor \(transformers' tp_plan",
    "shards_of_autotp": r"up_proj\.weight' is a shard already, of DeepSpeed's AutoTP or Megatron; build or load",
    "compiled_before": r"compiled already; compile it after sharding",
    "two_degrees_given": r"register\(\) was given tp_size=4.*autotp_size=2; set it in the DeepSpeed config only",
}


def by_two() -> list[dict]:
    return launched(2, (__name__, bad_input.__name__), (*TWO, *ALLOWED_BY_TWO, "token_outside"))


@pytest.mark.parametrize("name", TWO)
def test_two_ranks_refuse(name):
    assert re.search(TWO[name], sentence(by_two(), name))


def test_token_ids_outside_the_vocabulary():
    results = by_two()
    message = sentence(results, "token_outside", kind="IndexError")
    assert message == "a token id is outside of the vocabulary of 131: ids go from 2 to 131" or "to 131" in message


# ---- what two ranks do all the same ----------------------------------------------------------------------------------


def broadcast_batch():
    engine = initialise(tp_plugin={"broadcast_batch": True, "check_batch_every": 1, "quiet": True})
    ours = engine(**batch(dist.get_rank(), 2 + dist.get_rank())).loss
    return ours.item(), make("Llama")(**batch(0, 2)).loss.item()


def configured_as_autotp_is():
    """A preset and a rule that our plan agrees with, our tripwire, and defaults of AutoTP's spelt out."""
    tripwire = {"patterns": ["x"], "partition_type": "needs tp_plugin.register()"}
    rule = {"patterns": [r".*lm_head\.weight"], "partition_type": "column", "gather_output": True}
    same = {"tp_overlap_comm": False, "vocab_parallel_lm_head": True, "tp": {"tp_size": 2}, "preset_model": "llama"}
    rules = {"partition_config": {"layer_specs": [rule, tripwire]}}
    return initialise(tensor_parallel={"autotp_size": 2, **same, **rules})(**batch(0, 2)).loss.item()


def never_compared():
    engine = initialise(tp_plugin={"check_batch_every": 0, "quiet": True})
    engine(**batch(0, 2))
    return engine.module.tp_sharding.config.check_batch_every


def different_batches_are_not_compared_between():
    engine = initialise(tp_plugin={"check_batch_every": 3, "quiet": True})
    for step in (0, 1, 2):
        engine(**batch(step * dist.get_rank() if step < 3 else 0, 2))
    return True


ALLOWED_BY_TWO = (
    *("broadcast_batch", "never_compared", "different_batches_are_not_compared_between", "configured_as_autotp_is"),
)


def test_rules_of_autotp_that_say_the_same_are_taken():
    truth = make("Llama")(**batch(0, 2)).loss.item()
    found = values(by_two(), "configured_as_autotp_is")
    assert found == pytest.approx([truth] * 2, rel=1e-5)


def test_the_first_ranks_batch_can_be_handed_to_the_group():
    for ours, truth in values(by_two(), "broadcast_batch"):
        assert ours == pytest.approx(truth, rel=1e-5)


def test_batches_are_compared_only_as_often_as_asked():
    results = by_two()
    assert values(results, "never_compared") == [0, 0]
    assert values(results, "different_batches_are_not_compared_between") == [True, True]


# ---- four ranks, tp 2 ------------------------------------------------------------------------------------------------


def one_group_differs():
    engine = initialise()
    rank = dist.get_rank()
    engine(**batch(1 if rank == 3 else 0, 2))  # the group of ranks 0 and 1 is fine


def one_group_differs_later():
    engine = initialise()
    rank = dist.get_rank()
    for step in (0, 1, 2):
        engine.backward(engine(**batch(7 if step == 2 and rank == 3 else step, 2)).loss)
        engine.step()


def replicas_of_other_widths():
    initialise(make("Llama", intermediate_size=53 + dist.get_rank() // 2))


def two_engines_two_degrees():
    initialise()
    initialise(make("Llama", heads=(4, 4)), tp=4)


def an_unsharded_engine_beside():
    initialise()
    engine_for(make("Llama"), None, {"train_micro_batch_size_per_gpu": 2})


def early_with_another_degree():
    model = make("Llama", heads=(4, 4))
    tp_plugin.shard_model(model, tp_plugin.TensorParallelConfig(tp_size=2, quiet=True))
    initialise(model, tp=4)


def sharded_twice():
    model = make("Llama", heads=(4, 4))
    tp_plugin.shard_model(model, tp_plugin.TensorParallelConfig(tp_size=2, quiet=True))
    tp_plugin.shard_model(model, tp_plugin.TensorParallelConfig(tp_size=4, quiet=True))


FOUR = {
    "one_group_differs": r"different batches \(their values differ\)",
    "one_group_differs_later": r"different batches \(their values differ\)",
    "replicas_of_other_widths": r"intermediate_size in the config of the model is 53 on rank 0 and 54 on rank 2; give",
    "two_engines_two_degrees": r"groups of this process have 2 ranks and this engine asks for 4; use one autotp_size",
    "an_unsharded_engine_beside": r"beside another that is sharded 2 ways.*set autotp_size to 2",
    "early_with_another_degree": r"sharded 2 ways and tensor_parallel\.autotp_size is 4.*set autotp_size to 2",
    "sharded_twice": r"sharded 2 ways already and cannot be sharded 4 ways; build it again",
}


@pytest.mark.parametrize("name", FOUR)
def test_four_ranks_refuse(name):
    assert re.search(FOUR[name], sentence(launched(4, __name__, tuple(FOUR)), name))


# ---- what needs a process of its own ---------------------------------------------------------------------------------


def test_a_world_that_the_degree_does_not_divide():
    messages = errors_on_ranks(3, initialise)
    assert len(set(messages)) == 1
    assert "the world size 3 is not divisible by tp_size 2" in messages[0]
    assert "choose tp_size from [1, 3]" in messages[0]


def launched_without_group() -> float:
    dist.destroy_process_group()  # a script that leaves it to deepspeed.initialize
    with mock.patch("deepspeed.comm.torch.build_shm_op", return_value=None):
        engine = initialise()
    return engine(**batch(0, 2)).loss.item()


def test_the_process_group_may_be_left_to_deepspeed():
    assert on_ranks(2, launched_without_group) == pytest.approx([make("Llama")(**batch(0, 2)).loss.item()] * 2)


def refused_without_launcher() -> None:
    for name in ("RANK", "WORLD_SIZE"):
        os.environ.pop(name)
    initialise()


def test_one_process_without_a_launcher():
    (message,) = errors_on_ranks(1, refused_without_launcher)
    assert "start the script with accelerate launch, deepspeed or torchrun" in message
