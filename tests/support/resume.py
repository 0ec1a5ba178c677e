"""Train on some ranks, save, train on; resume on other ranks and compare with what was trained on without a break."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.configs import config_for
from tests.support.models import batch
from tests.support.train import engine_for, loss_of, model_of, optimizer_for
from tests.support.zoo import ZOO, data_for
from tp_plugin.weights.fragments import Fragments
from tp_plugin.weights.manifest import WEIGHT, Manifest

ROWS, MICRO = 8, 4
BEFORE, AFTER = (0, 1), (2, 3, 4)
BF16 = {"bf16": {"enabled": True}}
BF16_OPTIMIZER = BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}
FP16 = {"fp16": {"enabled": True, "initial_scale_power": 6, "loss_scale_window": 2}}  # changes at step 2
OFFLOAD = {"zero": {"offload_optimizer": {"device": "cpu"}}}


def schedule(step: int) -> float:
    """A learning rate that no two steps share."""
    return 1 / (1 + 0.3 * step)


def engine_of(
    tp: int, stage: int, *, family: str = "Qwen2", heads=(8, 2), tied=True, seed=0, extra: dict | None = None, **options
) -> Any:
    """An engine of this world with AdamW (or ``optimizer``) in two groups and a scheduler.

    ``seed`` chooses the weights it starts with.
    """
    lora, fused, kind = options.pop("lora", False), options.pop("fused", None), options.pop("optimizer", "adamw")
    model = model_of(family, seed, heads=heads, tied=tied, **options)
    if lora:
        model = adapted(model, seed)
    optimizer = optimizer_for(model, kind)
    for group in optimizer.param_groups:
        group["fused"] = fused
    # a family without "norm" in a name has one group, and DeepSpeed drops an empty one behind the scheduler's back
    optimizer.param_groups = [group for group in optimizer.param_groups if group["params"]]
    dp = (dist.get_world_size() if dist.is_initialized() else 1) // tp
    extra = dict(extra or {})
    sizes = {"train_micro_batch_size_per_gpu": MICRO, "gradient_accumulation_steps": ROWS // MICRO // dp}
    zero = {"stage3_param_persistence_threshold": 40, **extra.pop("zero", {})}
    config = config_for(tp, stage, zero=zero, **sizes | {"tp_plugin": {"quiet": True}} | extra)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    return engine_for(model, optimizer, config, lr_scheduler=scheduler)


def adapted(model: torch.nn.Module, seed: int) -> torch.nn.Module:
    """With a LoRA on every linear layer, B away from zero."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(model, LoraConfig(r=3, target_modules="all-linear", task_type="CAUSAL_LM"))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, param in model.named_parameters():
            if "lora_B" in name:
                param.copy_(0.1 * torch.randn(param.shape, generator=random))
    return model


def train(engine: Any, tp: int, steps: tuple[int, ...], family: str = "Qwen2") -> list[float]:
    """Losses of global batches of ``ROWS``, whatever number of ranks shares them."""
    dp = (dist.get_world_size() if dist.is_initialized() else 1) // tp
    place = (dist.get_rank() if dist.is_initialized() else 0) // tp
    losses = []
    for step in steps:
        whole = (data_for(family) if family in ZOO else batch)(step, ROWS)
        total = torch.zeros((), dtype=torch.float64)
        for start in range(place * MICRO, ROWS, dp * MICRO):
            data = {key: value[start : start + MICRO] for key, value in whole.items()}
            loss = loss_of(engine, data, step, family)
            engine.backward(loss)
            engine.step()
            total += loss.detach().double() * MICRO * dp / ROWS
        if dist.is_initialized():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        losses.append(total.item())
    return losses


def save_then_go_on(tp: int, stage: int, folder: str, **options: Any) -> dict[str, Any]:
    """Two steps, a checkpoint in ``folder``, three more: their losses, and the checkpoint after them."""
    family = options.get("family", "Qwen2")
    engine = engine_of(tp, stage, **options)
    losses = train(engine, tp, BEFORE, family)
    assert engine.save_checkpoint(folder, client_state={"seen": [1, (2.5, None)], "odd": torch.arange(3)})
    after = train(engine, tp, AFTER, family)
    engine.save_checkpoint(folder, tag="end", save_latest=False)
    return {"before": losses, "after": after}


def resume(tp: int, stage: int, folder: str, **options: Any) -> dict[str, Any]:
    """A model of other weights takes the checkpoint; saved again at once, then three steps and saved again."""
    family = options.get("family", "Qwen2")
    engine = engine_of(tp, stage, seed=1, **options)
    path, client = engine.load_checkpoint(folder)
    assert client["seen"] == [1, (2.5, None)]
    assert client["odd"].tolist() == [0, 1, 2]
    own = f"{folder}-at-tp{tp}-zero{stage}-of{dist.get_world_size() if dist.is_initialized() else 1}"
    engine.save_checkpoint(own, tag="again")
    rates = [group["lr"] for group in engine.optimizer.param_groups]
    after = train(engine, tp, AFTER, family)
    engine.save_checkpoint(own, tag="end")
    return {"after": after, "path": path, "own": own, "rates": rates, "steps": engine.global_steps,
            "samples": engine.global_samples}  # fmt: skip


def worst_difference(one: str | Path, other: str | Path) -> tuple[float, str]:
    """Largest difference of any tensor of two checkpoints of one model, as full tensors, and its name."""
    first, second = (Fragments(Path(path), Manifest.load(Path(path))) for path in (one, other))
    assert list(first.manifest.entries) == list(second.manifest.entries)
    worst, where = 0.0, ""
    for name, entry in first.manifest.entries.items():
        kinds = (WEIGHT, *first.manifest.optimizer["elementwise"]) if entry.trained else (WEIGHT,)
        for kind in kinds:
            difference = first.full(kind, name).double() - second.full(kind, name).double()
            error = float(difference.abs().max()) if difference.numel() else 0.0
            if not error <= worst:
                worst, where = error, f"{kind} of {name}"
    return worst, where
