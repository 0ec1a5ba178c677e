"""Other people's doors onto our checkpoints, and sizes that other people's code reads of a sharded model."""

from __future__ import annotations

import os
import subprocess
import sys

import torch.distributed as dist
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint, load_state_dict_from_zero_checkpoint
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import tp_plugin
from tests.support.batched_cases import launched, sentence, values
from tests.support.configs import config_for
from tests.support.models import batch, make
from tests.support.ranks import ROOT
from tests.support.sharded import differing, folder, sharded
from tests.support.train import engine_for, loss_of, micro_batches, optimizer_for
from tests.support.trainer_cases import config_of, model_of
from tests.support.trainer_data import DATA, padded

CASES = ("read_by_deepspeed", "read_at_zero_3", "consolidated", "resumed_plainly", "sizes", "viewed")


def trained(stage: int):
    model = make("Llama", tied=False)
    engine = engine_for(model, optimizer_for(model, "adamw"), config_for(2, stage))
    for pieces in micro_batches(0, 1):
        engine.backward(loss_of(engine, pieces[0], 0))
        engine.step()
    return engine


def read_by_deepspeed() -> list[str]:
    """Its functions, in memory and lazily, into a plain and into a sharded model; and its script."""
    engine, where = trained(1), folder()
    engine.save_checkpoint(str(where))
    whole = tp_plugin.full_state_dict(engine)
    state = get_fp32_state_dict_from_zero_checkpoint(str(where))
    lazily = get_fp32_state_dict_from_zero_checkpoint(str(where), lazy_mode=True)
    plain = load_state_dict_from_zero_checkpoint(make("Llama", tied=False, seed=1), str(where))
    ours = load_state_dict_from_zero_checkpoint(sharded(tied=False, seed=1), str(where))
    again = tp_plugin.full_state_dict(ours)
    dist.barrier()
    if dist.get_rank():
        return []
    wrong = [name for found in (state, lazily, plain.state_dict(), again) for name in differing(found, whole)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "zero_to_fp32.py", ".", "out"], cwd=where, env=env, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return wrong + differing(AutoModelForCausalLM.from_pretrained(where / "out").state_dict(), whole)


def read_at_zero_3() -> None:
    engine, where = trained(3), folder()
    engine.save_checkpoint(str(where))
    load_state_dict_from_zero_checkpoint(engine.module, str(where))


def consolidated() -> bool:
    return trained(1)._consolidated_16bit_state_dict() is None


PLAIN = """
import sys
import torch
from transformers import Trainer, TrainingArguments
from tests.support.trainer_cases import DATA, model_of, padded
arguments = TrainingArguments(sys.argv[1], max_steps=2, per_device_train_batch_size=2, report_to="none", use_cpu=True)
trainer = Trainer(model=model_of("causal"), args=arguments, train_dataset=DATA["plain"](8), data_collator=padded)
trainer.train(resume_from_checkpoint=sys.argv[2])
"""


def resumed_plainly() -> str:
    """The last line that a Trainer without DeepSpeed ends with."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    tp_plugin.register()
    where = folder()
    for steps, start in ((1, None), (2, str(where / "checkpoint-1"))):  # with us it goes on
        arguments = TrainingArguments(
            str(where), deepspeed=config_of(1), max_steps=steps, per_device_train_batch_size=2, report_to="none",
            disable_tqdm=True, save_steps=1,
        )  # fmt: skip
        data = DATA["plain"](8)
        trainer = Trainer(model=model_of("causal"), args=arguments, train_dataset=data, data_collator=padded)
        trainer.train(resume_from_checkpoint=start)
    dist.barrier()
    if dist.get_rank():
        return ""
    alone = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ACCELERATE_USE_DEEPSPEED")
    env = {name: value for name, value in os.environ.items() if name not in alone} | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PLAIN, str(where / "out"), str(where / "checkpoint-1")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True)
    return "went on" if done.returncode == 0 else done.stderr.decode()


def sizes() -> tuple[int, int, bool]:
    model = sharded(tied=False)
    logits = model(input_ids=batch(0, 2)["input_ids"]).logits
    flat = logits.view(-1, model.lm_head.out_features)
    return model.lm_head.out_features, model.model.embed_tokens.num_embeddings, tuple(flat.shape) == (24, 131)


def viewed() -> None:
    model = sharded(tied=False, vocab_size=128)
    model(input_ids=batch(0, 2, vocabulary=128)["input_ids"]).logits.view(-1, model.lm_head.weight.shape[0])


def outcomes() -> list[dict]:
    return launched(2, __name__, CASES)


def test_deepspeeds_functions_and_script_read_our_checkpoints():
    assert values(outcomes(), "read_by_deepspeed") == [[], []]
    assert "whose parameters ZeRO-3 has partitioned" in sentence(outcomes(), "read_at_zero_3")


def test_other_ranks_get_what_deepspeed_gives_them():
    assert values(outcomes(), "consolidated") == [False, True]


def test_a_trainer_without_deepspeed_does_not_begin_with_a_new_optimizer():
    said, _ = values(outcomes(), "resumed_plainly")
    assert "OptimizerStateLiesInTheEngineCheckpoint_ResumeUnderDeepSpeedWithTpPlugin" in said


def test_sizes_of_the_vocabulary_are_the_wholes():
    assert values(outcomes(), "sizes") == [(131, 131, True)] * 2
    said = sentence(outcomes(), "viewed")
    assert "as many columns as this rank's rows of lm_head.weight; they have all 128 words" in said
