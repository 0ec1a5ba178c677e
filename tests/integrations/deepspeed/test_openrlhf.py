"""OpenRLHF's way through DeepSpeed, rebuilt: its own command needs a GPU.

It calls ``tp_model_init`` itself, hands ``deepspeed.initialize`` groups of parameters, an optimizer by the config and a
factory of schedules, and counts tensor-parallel ranks in ``train_batch_size``. Rows are dealt over the ``dp`` dimension
of a mesh of its own, and the loss is made of log-probabilities that it gathers from float32 logits. Rank 0 alone writes
what all ranks have consolidated.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, DistributedSampler
from transformers import AutoModelForCausalLM, get_scheduler
from transformers.integrations import HfDeepSpeedConfig

import tp_plugin
from tests.support.models import make
from tests.support.ranks import on_ranks

MICRO, SAMPLES, STEPS = 1, 4, 3  # rows of a micro batch and of a global batch, and optimizer steps
ROWS = torch.randint(1, 131, (SAMPLES * STEPS, 12), generator=torch.Generator().manual_seed(0))
OPTIMIZER = {"lr": 1e-2, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}


def config_of(stage: int, tp: int) -> dict[str, Any]:
    return {
        "steps_per_print": 100,
        "zero_optimization": {
            "stage": stage,
            "offload_param": {"device": "none"},
            "offload_optimizer": {"device": "none", "pin_memory": True},
            "sub_group_size": "auto",
            "stage3_max_live_parameters": "auto",
            "stage3_max_reuse_distance": "auto",
            "stage3_param_persistence_threshold": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "reduce_bucket_size": "auto",
            "zero_hpz_partition_size": 1,
        },
        "bf16": {"enabled": False},
        "gradient_clipping": 1.0,
        "data_types": {"grad_accum_dtype": None},
        "checkpoint": {"load_universal": False},
        "compile": {"deepcompile": False},
        "tensor_parallel": {"autotp_size": tp},
        "optimizer": {"type": "AdamW", "params": OPTIMIZER | {"torch_adam": True}},
        "train_micro_batch_size_per_gpu": MICRO,
        "train_batch_size": SAMPLES * tp,
    }


def groups_of(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Weights that decay, and biases and norms that do not."""
    named = dict(model.named_parameters())
    bare = {name for name in named if name.endswith("bias") or "norm" in name}
    decayed, rest = ([param for name, param in named.items() if (name in bare) is which] for which in (False, True))
    return [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


SCHEDULE = functools.partial(
    get_scheduler, "cosine_with_min_lr", num_warmup_steps=1, num_training_steps=6,
    scheduler_specific_kwargs={"min_lr_rate": 0.1},
)  # fmt: skip


def loss_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """The mean of log-probabilities that are gathered and normalised by hand, rows of logits in pieces."""
    mask = torch.ones_like(ids)
    output = model(ids, attention_mask=mask, position_ids=mask.cumsum(-1) - 1)
    output["logits"] = output["logits"].to(torch.float32)
    logits, labels = output["logits"], torch.roll(ids, shifts=-1, dims=1)
    chosen = torch.gather(logits, dim=-1, index=labels.unsqueeze(-1)).squeeze(-1)
    pieces = [torch.logsumexp(piece, dim=-1) for piece in logits.reshape(-1, logits.shape[-1]).split(5)]
    return -(chosen - torch.cat(pieces).view(labels.shape))[:, :-1].mean()


def prepared(folder: str, stage: int, tp: int) -> Any:
    """The engine, and what must live as long."""
    config = config_of(stage, tp)
    live = HfDeepSpeedConfig(config) if stage == 3 else None
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = deepspeed.tp_model_init(model=model, tp_size=tp, dtype=torch.bfloat16)
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=None, model_parameters=groups_of(model), lr_scheduler=SCHEDULE, config=config,
        args={"local_rank": int(os.environ.get("LOCAL_RANK", "-1"))}, dist_init_required=True,
    )  # fmt: skip
    return engine, live


def trained(folder: str, stage: int, tp: int) -> tuple[list[float], list[float], list[float]]:
    """Losses of every global batch, norms, and learning rates; rank 0 writes the model."""
    tp_plugin.register()
    engine, _live = prepared(folder, stage, tp)
    dp = dist.get_world_size() // tp
    mesh = torch.distributed.init_device_mesh("cpu", (dp, 1, tp), mesh_dim_names=("dp", "sp", "tp"))
    group = mesh["dp"].get_group()
    sampler = DistributedSampler(
        range(len(ROWS)), num_replicas=dist.get_world_size(group), rank=dist.get_rank(group), shuffle=False
    )
    losses, norms, rates, summed = [], [], [], torch.zeros(())
    for number, index in enumerate(DataLoader(range(len(ROWS)), batch_size=MICRO, sampler=sampler), 1):
        loss = loss_of(engine, ROWS[index])
        engine.backward(loss)
        engine.step()
        summed += loss.detach() * dp / SAMPLES
        if number % (SAMPLES // dp) == 0:
            dist.all_reduce(summed, group=group)
            losses.append(summed.item() / dp)
            norms.append(float(engine.get_global_grad_norm()))
            rates.append(engine.get_lr()[0])
            summed = torch.zeros(())
    state = engine._consolidated_16bit_state_dict()
    if dist.get_rank() == 0:
        assert set(engine.module.state_dict()) <= set(state)
        engine.module.save_pretrained(f"{folder}/out", state_dict=state)
    dist.barrier()
    return losses, norms, rates


def plainly(folder: Path) -> tuple[list[float], list[float], list[float], torch.nn.Module]:
    """The same in one process without DeepSpeed."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    optimizer = torch.optim.AdamW(groups_of(model), **OPTIMIZER)
    schedule = SCHEDULE(optimizer)
    losses, norms, rates = [], [], []
    for rows in ROWS.split(SAMPLES):
        loss = loss_of(model, rows)
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        rates.append(schedule.get_last_lr()[0])
    return losses, norms, rates, model


@pytest.mark.parametrize(("world", "stage"), [(2, 2), (4, 2), (4, 3)])
def test_it_equals_one_process(tmp_path, world, stage):
    make("Llama").save_pretrained(tmp_path)
    losses, norms, rates, model = plainly(tmp_path)
    for found in on_ranks(world, trained, str(tmp_path), stage, 2):
        assert found[0] == pytest.approx(losses, rel=1e-5)
        assert found[1] == pytest.approx(norms, rel=1e-4)
        assert found[2] == pytest.approx(rates)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    for name, tensor in model.state_dict().items():
        assert (saved[name] - tensor).norm() <= 1e-4 * tensor.norm(), name
