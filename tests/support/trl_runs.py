"""TRL's trainers in one unsharded process, and on ranks through DeepSpeed's slot: what they log and what they train."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import torch
import torch.distributed as dist

from tests.support import chat
from tests.support.models import make, perturb

STEPS, GLOBAL_ROWS = 3, 4
DATA = {"sft": "text", "dpo": "preference", "reward": "preference"}
NOT_COMPARED = ("runtime", "per_second", "flos", "step_time")


def model_of(kind: str, tied: bool, family: str, seed: int = 0, **options: Any) -> torch.nn.Module:
    """A causal model, or one with a score of one number for ``reward``."""
    if kind != "reward":
        return make(family, tied=tied, seed=seed, **options)
    import transformers

    config = make(family, tied=tied, seed=seed, **options).config
    config.num_labels = 1
    torch.manual_seed(seed)
    return perturb(getattr(transformers, f"{family}ForSequenceClassification")(config), seed)


def train(
    kind: str, *, dp: int, deepspeed: dict | None = None, tied: bool = False, family: str = "Llama",
    form: str | None = None, model: dict | None = None, evaluate: bool = False, reference: bool = True, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """One training of a few steps on the same global batches, however many ranks share them.

    Args:
        kind: sft, dpo or reward.
        dp: ranks that read different rows.
        deepspeed: the config of the engine; None trains in this process alone.
        form: of the data; None is the plainest.
        model: options of the model.
        reference: whether DPO is given a reference model; without one TRL makes it of the policy.
        options: of TRL's config.

    Returns:
        The log, what ``evaluate`` found, and the trained parameters, full and unsharded.
    """
    import trl

    names = {"sft": ("SFT", "sft_trainer"), "dpo": ("DPO", "dpo_trainer"), "reward": ("Reward", "reward_trainer")}
    prefix = names[kind][0]
    accumulate = options.pop("gradient_accumulation_steps", 1)
    with tempfile.TemporaryDirectory() as folder:
        args = getattr(trl, f"{prefix}Config")(
            output_dir=folder, deepspeed=deepspeed, use_cpu=deepspeed is None, max_steps=STEPS, logging_steps=1,
            per_device_train_batch_size=GLOBAL_ROWS // dp, per_device_eval_batch_size=GLOBAL_ROWS // dp,
            gradient_accumulation_steps=accumulate, learning_rate=1e-2, adam_epsilon=1e-4,
            lr_scheduler_type="constant", max_grad_norm=0.5, weight_decay=0.0, save_strategy="no", report_to="none",
            disable_tqdm=True, bf16=False, seed=3, include_num_input_tokens_seen="all",
            **({"gradient_checkpointing": False} | options),
        )  # fmt: skip
        data = form or DATA[kind]
        policy = model_of(kind, tied, family, **(model or {}))
        more: dict[str, Any] = {}
        if kind == "dpo" and reference:
            more["ref_model"] = model_of(kind, tied, family, seed=1, **(model or {}))
        trainer = getattr(trl, f"{prefix}Trainer")(
            model=policy, args=args, train_dataset=chat.dataset(data, 24),
            eval_dataset=chat.dataset(data, 7, seed=9) if evaluate else None, processing_class=chat.tokenizer(), **more,
        )  # fmt: skip
        trainer.train()
        found = trainer.evaluate() if evaluate else {}
        log = [{k: v for k, v in entry.items() if not any(word in k for word in NOT_COMPARED)}
               for entry in trainer.state.log_history]  # fmt: skip
        if deepspeed is None:
            parameters = {name: p.detach().clone() for name, p in policy.named_parameters()}
        else:
            import tp_plugin

            parameters = tp_plugin.full_state_dict(trainer.model_wrapped)
        return {
            "log": log, "parameters": parameters, "tokens": trainer.state.num_input_tokens_seen,
            "evaluated": {k: v for k, v in found.items() if not any(word in k for word in NOT_COMPARED)},
        }  # fmt: skip


def alone(kind: str, **options: Any) -> dict[str, Any]:
    """:func:`train` in this process, as one that was launched by nobody."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return train(kind, dp=1, **options)


def deepspeed_config(tp: int, stage: int) -> dict[str, Any]:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "tensor_parallel": {"autotp_size": tp},
        "tp_plugin": {"check_batch_every": 1, "quiet": True},
    }


def sharded(kind: str, tp: int, stage: int, **options: Any) -> dict[str, Any]:
    """:func:`train` on this world's ranks."""
    import tp_plugin

    tp_plugin.register()
    return train(kind, dp=dist.get_world_size() // tp, deepspeed=deepspeed_config(tp, stage), **options)
