"""Options of Trainer that are refused on a sharded model, and only there."""

import os
import tempfile

import pytest
from transformers import Trainer, TrainingArguments, trainer

import tp_plugin
import tp_plugin.integrations.transformers as integration
from tests.support.cases import launched, sentence
from tests.support.trainings import DATA, config_of, model_of, padded


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


CASES = ("use_liger_kernel", "auto_find_batch_size")


@pytest.mark.parametrize("case", CASES)
def test_refused_on_every_rank(case):
    assert f"{case}=True" in sentence(launched(2, __name__, CASES), case)


def test_without_tensor_parallelism_they_are_the_originals():
    integration.install()
    try:
        assert trainer.find_executable_batch_size(lambda size: size, 4, True)() == 4
        with pytest.raises(ImportError, match="liger-kernel"):
            trainer.apply_liger_kernel(None, None)
    finally:
        integration.uninstall()
