"""Options of Trainer that are refused on a sharded model, and only there."""

import os
import tempfile

import pytest
from transformers import Trainer, TrainingArguments, trainer
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

import tp_plugin
import tp_plugin.integrations.transformers as integration
from tests.support.batched_cases import launched, sentence
from tests.support.trainer_cases import config_of, model_of
from tests.support.trainer_data import DATA, padded


def trained_with(**options) -> None:
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    tp_plugin.register()
    arguments = TrainingArguments(
        tempfile.mkdtemp(), deepspeed=config_of(1), max_steps=1, report_to="none", disable_tqdm=True, **options
    )
    Trainer(model=model_of("causal"), args=arguments, train_dataset=DATA["plain"](4), data_collator=padded).train()


def use_liger_kernel() -> None:
    trained_with(use_liger_kernel=True)


def auto_find_batch_size() -> None:
    trained_with(auto_find_batch_size=True)


def made_with(ours: dict, **options) -> None:
    """A trainer that is made and does not train."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    tp_plugin.register()
    arguments = TrainingArguments(tempfile.mkdtemp(), deepspeed=config_of(1) | ours, report_to="none", **options)
    Trainer(model=model_of("causal"), args=arguments)


def auto_find_batch_size_when_made() -> None:
    made_with({}, auto_find_batch_size=True)


def of_the_config_when_made() -> None:
    made_with({"zero_optimization": {"stage": 1, "zero_quantized_weights": True}})


def of_our_block_when_made() -> None:
    made_with({"tp_plugin": {"quite": True}})


CASES = {
    "use_liger_kernel": "use_liger_kernel=True",
    "auto_find_batch_size": "auto_find_batch_size=True",
    "auto_find_batch_size_when_made": "auto_find_batch_size=True",
    "of_the_config_when_made": "ZeRO++ quantisation does not combine with tensor parallelism",
    "of_our_block_when_made": "unknown key 'quite' in the 'tp_plugin' block",
}


@pytest.mark.parametrize("case", CASES)
def test_refused_on_every_rank(case):
    assert CASES[case] in sentence(launched(2, __name__, tuple(CASES)), case)


@pytest.mark.parametrize(("tp", "number", "agrees"), [(2, 32, True), (2, 16, True), (2, 8, False), (1, 16, False)])
def test_a_train_batch_size_agrees_with_trainers_that_counts_ranks_or_replicas(tp, number, agrees):
    """32 are all ranks' of four, 16 those of two replicas."""
    integration.ROOM.install()
    try:
        config = HfTrainerDeepSpeedConfig({"tensor_parallel": {"autotp_size": tp}, "train_batch_size": number})
        config.fill_match("train_batch_size", 32, "train_batch_size (calculated)", True)
    finally:
        integration.ROOM.uninstall()
    assert (config.mismatches == []) is agrees


def test_without_tensor_parallelism_they_are_the_originals():
    integration.ROOM.install()
    try:
        assert trainer.find_executable_batch_size(lambda size: size, 4, True)() == 4
    finally:
        integration.ROOM.uninstall()
