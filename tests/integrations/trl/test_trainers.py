"""Trainers and options of TRL that were not shown to be right on a sharded model are refused on every rank."""

from __future__ import annotations

import tempfile

import pytest

from tests.support import chat, trl_runs
from tests.support.cases import launched, sentence, values
from tests.support.models import make


def trainer_of(kind: str, config: str, form: str, *, subclass: bool = False, tp: int = 2, stage: int = 1, **options):
    """Make a trainer as a script does."""
    import importlib

    import tp_plugin

    tp_plugin.register()
    module_name, _, prefix = config.rpartition(".")
    module = importlib.import_module(module_name)
    make_trainer = getattr(importlib.import_module(kind.rpartition(".")[0]), kind.rpartition(".")[2])
    if subclass:
        make_trainer = type("Mine", (make_trainer,), {})
    more = options.pop("more", {})
    with tempfile.TemporaryDirectory() as folder:
        args = getattr(module, prefix)(
            output_dir=folder, deepspeed=trl_runs.deepspeed_config(tp, stage), report_to="none", max_steps=1,
            per_device_train_batch_size=2, bf16=False, gradient_checkpointing=False, **options,
        )  # fmt: skip
        data = chat.dataset(form, 8)
        return make_trainer(
            model=make("Llama"), args=args, train_dataset=data, processing_class=chat.tokenizer(), **more
        )


def score(prompts, completions, **_):
    return [0.0 for _ in completions]


def kto():
    trainer_of("trl.KTOTrainer", "trl.KTOConfig", "preference")


def grpo():
    trainer_of("trl.GRPOTrainer", "trl.GRPOConfig", "preference", num_generations=2, more={"reward_funcs": score})


def gkd():
    trainer_of(
        "trl.experimental.gkd.GKDTrainer",
        "trl.experimental.gkd.GKDConfig",
        "chat",
        more={"teacher_model": make("Llama")},
    )


def liger():
    trainer_of("trl.SFTTrainer", "trl.SFTConfig", "text", use_liger_kernel=True)


def sync_at_stage_3():
    trainer_of("trl.DPOTrainer", "trl.DPOConfig", "preference", stage=3, sync_ref_model=True,
               more={"ref_model": make("Llama")})  # fmt: skip


def of_my_own():
    return type(trainer_of("trl.SFTTrainer", "trl.SFTConfig", "text", subclass=True)).__name__


def unsharded():
    more = {"ref_model": make("Llama", seed=1)}
    return type(trainer_of("trl.KTOTrainer", "trl.KTOConfig", "preference", tp=1, more=more)).__name__


REFUSED = {
    "kto": "KTOTrainer was not shown to be right on a sharded model: of TRL's trainers use DPOTrainer, RewardTrainer",
    "grpo": "GRPOTrainer was not shown to be right",
    "gkd": "GKDTrainer was not shown to be right",
    "liger": "use_liger_kernel=True",
    "sync_at_stage_3": "sync_ref_model=True at ZeRO stage 3",
}
ENV_NAMES = (*REFUSED, "of_my_own", "unsharded")


@pytest.fixture(scope="module")
def results():
    return launched(2, __name__, ENV_NAMES)


@pytest.mark.parametrize("name", REFUSED)
def test_is_refused_on_every_rank(results, name):
    assert REFUSED[name] in sentence(results, name)


def test_a_subclass_of_ones_own_is_taken_for_its_base(results):
    assert values(results, "of_my_own") == ["Mine"] * 2


def test_nothing_is_refused_without_tensor_parallelism(results):
    assert values(results, "unsharded") == ["KTOTrainer"] * 2
