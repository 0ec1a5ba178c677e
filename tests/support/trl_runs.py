"""TRL's trainers in one unsharded process, and on ranks through DeepSpeed's slot: what they log and what they train."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import tempfile
import traceback
import zlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from tests.support import chat, tiny
from tests.support.configs import auto_config
from tests.support.errors import relative, replica_error
from tests.support.models import make, perturb

STEPS, GLOBAL_ROWS, CLIP = 2, 4, 0.02
DATA = {"sft": "text", "dpo": "preference", "reward": "preference"}
PREFIXES = {"sft": "SFT", "dpo": "DPO", "reward": "Reward", "trainer": ""}
EXACT = ("num_tokens", "num_input_tokens_seen", "epoch", "step", "learning_rate")
LIMITS = {"loss": (1e-5, 0.0), "train_loss": (1e-5, 0.0), "grad_norm": (1e-4, 0.0), "entropy": (1e-5, 0.0)}
LIMITS |= dict.fromkeys(EXACT, (0.0, 0.0))
REWARD = (1e-4, 2e-5)
"""Relative and absolute tolerance of what is logged; rewards are small differences of large numbers."""
ROUNDING = 2e-8
"""Of copies of an adapter's tensor, whose weights are about 0.1: a unit or two in the last place. In the cross one such
copy was seen to differ by 7.5e-9; it lay at another alignment in each rank's flat buffer."""
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
    form: str | None = None, model: dict | None = None, evaluate: bool = False, reference: bool = True,
    lora: dict | None = None, **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """One training of a few steps on the same global batches, however many ranks share them.

    Args:
        kind: sft, dpo or reward; trainer is HF Trainer itself.
        dp: ranks that read different rows.
        deepspeed: the config of the engine; None trains in this process alone.
        form: of the data; None is the plainest.
        model: options of the model.
        lora: options of ``LoraConfig``; None trains the model itself.
        reference: whether DPO is given a reference model; without one TRL makes it of the policy.
        options: of TRL's config.

    Returns:
        The log, what ``evaluate`` found, and the trained parameters, full and unsharded.
    """
    import transformers
    import trl

    library, prefix = transformers if kind == "trainer" else trl, PREFIXES[kind]
    accumulate = options.pop("gradient_accumulation_steps", 1)
    # before the arguments, from which on ZeRO-3 would have models built in partitions
    policy, more = model_of(kind, tied, family, **(model or {})), {}
    if kind == "dpo" and reference and lora is None:
        more["ref_model"] = model_of(kind, tied, family, seed=1, **(model or {}))
    with common_folder() as folder:
        args = getattr(library, "TrainingArguments" if kind == "trainer" else f"{prefix}Config")(
            output_dir=folder, deepspeed=deepspeed, use_cpu=deepspeed is None, max_steps=STEPS, logging_steps=1,
            per_device_train_batch_size=GLOBAL_ROWS // dp, per_device_eval_batch_size=GLOBAL_ROWS // dp,
            gradient_accumulation_steps=accumulate, learning_rate=1e-2, adam_epsilon=1e-4,
            lr_scheduler_type="constant", max_grad_norm=CLIP, weight_decay=0.0, save_strategy="no", report_to="none",
            disable_tqdm=True, bf16=False, seed=3, include_num_input_tokens_seen="non_padding",
            **({"gradient_checkpointing": False} | options),
        )  # fmt: skip
        if lora is not None:
            import peft

            adapter = peft.LoraConfig(r=4, **{"target_modules": "all-linear"} | lora)
            if kind == "trainer":
                policy = peft.get_peft_model(policy, adapter)
            else:
                more["peft_config"] = adapter
        if kind == "trainer":
            more["train_dataset"] = tiny.Samples(24)
        else:
            data = form or DATA[kind]
            more["train_dataset"] = on_disk(chat.dataset(data, 24), f"{folder}/data")
            more["eval_dataset"] = chat.dataset(data, 8, seed=9, length=4) if evaluate else None
            more["processing_class"] = chat.tokenizer()
        trainer = getattr(library, f"{prefix}Trainer")(model=policy, args=args, **more)
        if lora is not None:
            fill(trainer.model)
        start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.train()
        found = trainer.evaluate() if evaluate else {}
        log = [{k: v for k, v in entry.items() if not any(word in k for word in NOT_COMPARED)}
               for entry in trainer.state.log_history]  # fmt: skip
        replicas = 0.0
        if deepspeed is None:
            parameters = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        else:
            import tp_plugin

            replicas = replica_error(trainer.model_wrapped)
            parameters = tp_plugin.full_state_dict(trainer.model_wrapped)
            parameters = parameters if dist.get_rank() == 0 else {}
        return {
            "log": log, "start": start, "parameters": parameters, "replicas": replicas,
            "evaluated": {k: v for k, v in found.items() if not any(word in k for word in NOT_COMPARED)},
        }  # fmt: skip


@torch.no_grad()
def fill(model: torch.nn.Module) -> None:
    """Give the adapters numbers that are the same everywhere, and no zeros, behind which errors would hide."""
    for name, param in model.named_parameters():
        if param.requires_grad:
            random = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            param.copy_(0.1 * torch.randn(param.shape, generator=random))


@contextlib.contextmanager
def common_folder() -> Iterator[str]:
    """One temporary directory for all ranks."""
    name = [tempfile.mkdtemp()]
    mine = name[0]
    if dist.is_initialized():
        dist.broadcast_object_list(name)
    yield name[0]
    if dist.is_initialized():
        dist.barrier()
    shutil.rmtree(mine)


def on_disk(data: Any, folder: str) -> Any:
    """``data`` read from a place that all ranks share, beside which TRL puts what it computes beforehand."""
    from datasets import load_from_disk

    if not dist.is_initialized() or dist.get_rank() == 0:
        data.save_to_disk(folder)
    if dist.is_initialized():
        dist.barrier()
    return load_from_disk(folder)


def alone(kind: str, **options: Any) -> dict[str, Any]:
    """:func:`train` in this process, as one that was launched by nobody."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    return train(kind, dp=1, **options)


def deepspeed_config(tp: int, stage: int) -> dict[str, Any]:
    ours = {"tensor_parallel": {"autotp_size": tp}, "tp_plugin": {"check_batch_every": 1, "quiet": True}}
    zero = {"stage3_param_persistence_threshold": 0}
    return auto_config(stage, zero, zero_allow_untested_optimizer=True, **(ours if tp > 1 else {}))


def sharded(kind: str, tp: int, stage: int, **options: Any) -> dict[str, Any]:
    """:func:`train` on this world's ranks; the guard of the first step must be able to compute it again."""
    import tp_plugin
    from tp_plugin.step_guard import comparison, guard

    def unchecked(reason: str | None, *_: Any) -> None:
        raise AssertionError(f"the guard could not check it: {reason}")

    tp_plugin.register()
    with (
        mock.patch.object(comparison, "warn_unchecked", unchecked),
        mock.patch.object(guard, "warn_unchecked", unchecked),
    ):
        return train(kind, dp=dist.get_world_size() // tp, deepspeed=deepspeed_config(tp, stage), **options)


def run_all(function: str, cases: list[dict]) -> list[dict[str, Any] | str]:
    """``alone`` or ``sharded`` for every case; an exception ends its case only."""
    found: list[dict[str, Any] | str] = []
    for case in cases:
        try:
            found.append({"alone": alone, "sharded": sharded}[function](**case))
        except Exception:
            traceback.print_exc()
            found.append(traceback.format_exc())
    return found


def differences(ours: dict[str, Any], truth: dict[str, Any], replicas: float = 0.0) -> list[str]:
    """What of one rank's run is not that of one process, in words; nothing if all is well.

    Replicas may differ by ``replicas``.
    """
    wrong, start = [], truth["start"]
    entries = [*zip(ours["log"], truth["log"], strict=True), (ours["evaluated"], truth["evaluated"])]
    for number, (mine, expected) in enumerate(entries):
        assert mine.keys() == expected.keys(), f"other things were logged: {mine.keys() ^ expected.keys()}"
        for key, value in expected.items():
            close = LIMITS.get(key.removeprefix("eval_"), REWARD)
            if key == "rewards/accuracies" and abs(expected["rewards/margins"]) < REWARD[1]:
                continue  # of a policy that still is its reference: rounding decides which reward is the larger
            if not math.isclose(mine[key], value, rel_tol=close[0], abs_tol=close[1]):
                wrong.append(f"{key} of entry {number} is {mine[key]}, not {value}")
    if not ours["replicas"] <= replicas:
        wrong.append(f"replicas differ by {ours['replicas']}")
    for name, full in ours["parameters"].items():
        if name not in truth["parameters"]:
            continue  # the other name of a tied one, or a buffer
        update = truth["parameters"][name] - start[name]
        error = relative(full - start[name], update)
        if not error <= (1e-4 if update.any() else 0.0):
            wrong.append(f"the update of {name} is off by {error:.1e}")
    return wrong
