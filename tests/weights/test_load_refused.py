"""Checkpoints that are damaged or another model's: one sentence, the same on every rank, whoever sees the damage."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import time
from pathlib import Path

import pytest
import torch.distributed as dist

import tp_plugin
from tests.support import damaged_models
from tests.support.batched_cases import launched, sentence
from tests.support.damaged_models import SHARD
from tests.support.ranks import on_ranks
from tp_plugin.errors import TensorParallelError, meet
from tp_plugin.integrations.transformers import from_pretrained

DAMAGED = r"'./model/model-00002-of-00003.safetensors' is cut short or damaged"
SENTENCES = {
    "truncated": rf"{DAMAGED}: \d+ bytes where its header says \d+; copy",
    "truncated_on_one_rank": rf"{DAMAGED}.* \[on rank 1\]",
    "header_flipped": rf"{DAMAGED}: its header cannot be read",
    "header_flipped_on_one_rank": rf"{DAMAGED}.* \[on rank 0\]",
    "file_missing": rf"cannot read '.*{SHARD}': No such file",
    "file_missing_on_one_rank": rf"cannot read '.*{SHARD}': No such file.* \[on rank 1\]",
    "index_names_a_missing_tensor": rf"index says that tensor 'model.layers.7.mlp.up_proj.weight' is in '{SHARD}', and",
    "index_is_no_json": r"cannot load './model': JSONDecodeError: .* \[on rank 1\]",
    "empty_file": rf"{DAMAGED}: a header of 0 bytes in a file of 0",
    "empty_directory": r"the directory './model' is empty",
    "no_directory": r"there is no directory '/no/such/directory'",
    "no_weights": r"cannot load './model': OSError: Error no file named model.safetensors.* \[on rank 1\]",
    "vocabulary_changed": r"'lm_head.weight' of './model' has shape \[131, 32\] where LlamaForCausalLM with its config "
    r"has \[140, 32\] \(and 1 more\); correct the config, or pass ignore_mismatched_sizes=True",
    "width_changed": r"has shape \[32, 53\] where LlamaForCausalLM with its config has \[32, 59\] \(and \d more\)",
    "another_architecture": r"'./model' holds no weights of LlamaForCausalLM \(its tensors are named like '",
    "ranks_differ": r"'model.layers.0.mlp.gate_proj.bias' of the checkpoint is torch.float32 \[53\] with a part that "
    r"hashes to \w+ on rank 0 and torch.float32 \[59\] .* on rank 1 \(\d+ more differ\); give every rank",
    "another_fine_tune_on_one_rank": r"tensor 'model.* of the checkpoint is torch.float32 \[.*\] with a part that "
    r"hashes to \w+ on rank 0 and .* on rank 1 \(\d+ more differ\); give every rank the same files",
    "another_rope_on_one_rank": r"rope_theta in the config of the model is 10000.0 on rank 0 and 5000.0 on rank 1",
    "quantised": r"./model is quantised \(fp8\), and quantised weights cannot be sharded",
    "cannot_be_sharded": r"5 query and 1 key/value heads cannot be sharded 2 ways",
    "disk_fails_on_one_rank": r"cannot load './model': OSError: \[Errno 5\] Input/output error \[on rank 1\]",
    "comparing_fails_on_one_rank": r"comparing the ranks' models failed: OutOfMemoryError: CUDA out of memory \[on",
    "sharing_what_is_new_fails_on_one_rank": r"bringing 'score.weight', .* OutOfMemoryError: CUDA out of memory \[on",
    "installing_fails_on_one_rank": r"cannot load './model': OutOfMemoryError: CUDA out of memory \[on rank 1\]",
    "inferred_rules_are_wrong": r"the rules inferred from the shapes of HomeModel are wrong",
    "pickle_that_runs_code": r"'./model/pytorch_model.bin' as a file of plain tensors \(.*; convert it to safetensors",
    "pickle_of_old": r"cannot read './model/pytorch_model.bin' as a file of plain tensors",
    "plain_pickle": r"cannot read './model/pytorch_model.bin' as a file of plain tensors",
    "device_map": r"device_map= cannot be given .* \(DeepSpeed moves the shards to their device\); leave it out",
    "hub_kernels": r"use_kernels= cannot be given .* \(the forwards it replaces would bypass sharded layers",
    "adapter": r"adapter' is an adapter; load its base model and put the adapter on it with PEFT",
    "state_dict_under_zero3": r"state_dict= cannot be given .* \(every rank has the full tensors already",
}


def told(found: dict) -> dict:
    """Messages with the ranks that saw it inside of the sentence."""
    return {name: (kind, re.sub(r"\. (\[on rank \d\])$", r" \1.", str(text))) for name, (kind, text) in found.items()}


@pytest.mark.parametrize("name", SENTENCES)
def test_every_rank_raises_one_sentence(name):
    message = sentence([told(found) for found in launched(2, damaged_models.__name__, tuple(SENTENCES))], name)
    assert re.search(SENTENCES[name], message), message


def test_no_code_of_a_pickle_has_run():
    launched(2, damaged_models.__name__, tuple(SENTENCES))
    assert not Path("/tmp/tp_plugin_was_here").exists()


def one_comes_late():
    if dist.get_rank() == 1:
        time.sleep(1.5)
    with contextlib.redirect_stderr(io.StringIO()) as said, pytest.MonkeyPatch.context() as patch:
        patch.setattr(from_pretrained, "meet", functools.partial(meet, patience=0.3))
        with pytest.raises(TensorParallelError, match="there is no directory"):
            tp_plugin.from_pretrained("/no/such/model")
    return said.getvalue()


def test_a_rank_that_loads_alone_says_that_it_waits():
    first, second = on_ranks(2, one_comes_late)
    assert "rank 0 waits in from_pretrained for other ranks" in first
    assert not second
