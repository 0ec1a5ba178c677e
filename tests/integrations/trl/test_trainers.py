"""Trainers and options of TRL that were not shown to be right on a sharded model are refused on every rank."""

from __future__ import annotations

import tempfile

import pytest

from tests.support import chat, trl_runs
from tests.support.batched_cases import launched, sentence, values
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


def before_its_data_are_prepared():
    """A model that is not there and data that cannot be read: it is refused before it looks for them."""
    import trl

    import tp_plugin

    tp_plugin.register()
    with tempfile.TemporaryDirectory() as folder:
        args = trl.KTOConfig(folder, deepspeed=trl_runs.deepspeed_config(2, 1), report_to="none", bf16=False)
        trl.KTOTrainer("there/is-none", None, args, train_dataset=None)


def mine_before_my_own_init():
    """A subclass that is defined after ``register()``, with an ``__init__`` that loads first."""
    import trl

    import tp_plugin

    class Mine(trl.GRPOTrainer):
        def __init__(self, args):
            raise AssertionError("loaded")

    tp_plugin.register()
    with tempfile.TemporaryDirectory() as folder:
        Mine(trl.GRPOConfig(folder, deepspeed=trl_runs.deepspeed_config(2, 1), report_to="none", bf16=False))


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
    "kto": "KTOTrainer is not validated under tensor parallelism: of TRL's trainers use DPOTrainer, RewardTrainer",
    "grpo": "GRPOTrainer is not validated",
    "before_its_data_are_prepared": "KTOTrainer is not validated",
    "mine_before_my_own_init": "GRPOTrainer is not validated",
    "gkd": "GKDTrainer is not validated",
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
