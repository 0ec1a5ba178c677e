"""The guard of the first step beside TRL in half precision: what rounding makes of few numbers is no alarm."""

from __future__ import annotations

import contextlib
import tempfile

import pytest
import torch.distributed as dist
import transformers

import tp_plugin
from tests.support import chat, trl_runs
from tests.support.guarded import compared
from tests.support.ranks import errors_on_ranks, on_ranks
from tp_plugin.step_guard.differences import TRAINERS_LOSS
from tp_plugin.step_guard.guard import guard_of

STEPS = 6
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


class AskedEachStep(transformers.TrainerCallback):
    """Has every step checked; ``found`` gets what was compared."""

    def __init__(self):
        self.found, self.stack = [], contextlib.ExitStack()

    def on_step_begin(self, args, state, control, model=None, **_):
        tp_plugin.check_next_step(model)
        self.found.append({})
        self.stack.enter_context(compared(self.found[-1]))

    def on_step_end(self, *_, **__):
        self.stack.close()


def trained(kind: str, stage: int, wrong: bool = False) -> list[dict[str, float]]:
    """What the guard compared at each step, of DPO with a reference model of its own, or of a reward model."""
    import trl

    tp_plugin.register()
    transformers.training_args.is_torch_bf16_gpu_available = lambda: True
    prefix = {"dpo": "DPO", "reward": "Reward"}[kind]
    policy = trl_runs.model_of(kind, False, "Llama").bfloat16()
    more = {"ref_model": trl_runs.model_of(kind, False, "Llama", seed=1).bfloat16()} if kind == "dpo" else {}
    with tempfile.TemporaryDirectory() as folder:
        args = getattr(trl, f"{prefix}Config")(
            output_dir=folder, deepspeed=trl_runs.deepspeed_config(2, stage) | {"bf16": {"enabled": True}}, bf16=True,
            max_steps=STEPS, per_device_train_batch_size=4, learning_rate=1e-3, report_to="none", disable_tqdm=True,
            save_strategy="no", gradient_checkpointing=False,
        )  # fmt: skip
        trainer = getattr(trl, f"{prefix}Trainer")(
            model=policy, args=args, train_dataset=chat.dataset("preference", 24), processing_class=chat.tokenizer(),
            **more,
        )  # fmt: skip
    asked = AskedEachStep()
    trainer.add_callback(asked)
    if wrong:
        reference = guard_of(trainer.ref_model).model
        reference.model.layers[1].mlp.down_proj.register_forward_hook(lambda _m, _a, output: output * 0.7)
    trainer.train()
    assert dist.get_world_size() == 2
    return asked.found


@pytest.mark.parametrize(("kind", "stage"), [("dpo", 1), ("dpo", 3), ("reward", 1)])
def test_every_step_is_compared_in_single_precision(kind, stage):
    for found in on_ranks(2, trained, kind, stage, env=DEEPSPEED):
        assert len(found) == STEPS
        for seen in found:
            exact = {key: value for key, value in seen.items() if "coarse" not in key}
            assert TRAINERS_LOSS in exact
            assert max(exact.values()) < 1e-4, seen
            assert f"coarse {TRAINERS_LOSS}" in seen


def test_a_wrong_reference_is_caught():
    errors = errors_on_ranks(2, trained, "dpo", 1, wrong=True, env=DEEPSPEED)
    assert all("computed again without tensor parallelism differs: the trainer's loss" in error for error in errors), (
        errors
    )
