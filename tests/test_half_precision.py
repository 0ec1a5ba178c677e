"""Half precision is as exact sharded as in one process, and an overflow on one rank skips the step on all."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

from tests.support.configs import ACCUMULATION, CLIP, config_for
from tests.support.errors import replica_error
from tests.support.models import make
from tests.support.ranks import on_ranks
from tests.support.train import STEPS, engine_for, loss_of, micro_batches, optimizer_for
from tp_plugin.param_info import layout_of

HALF: dict[str, tuple[torch.dtype, int, dict]] = {
    **{f"bf16_zero{stage}": (torch.bfloat16, stage, {"bf16": {"enabled": True}}) for stage in (1, 2, 3)},
    "bf16_fp32_accumulation": (
        *(torch.bfloat16, 1),
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    ),
    "autocast_bf16": (torch.bfloat16, 1, {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}),
    **{
        f"fp16_zero{stage}": (torch.float16, stage, {"fp16": {"enabled": True, "initial_scale_power": 12}})
        for stage in (1, 2, 3)
    },
}


def plain(dtype: torch.dtype, scale: float = 1.0) -> dict:
    """One process: a model in ``dtype``, its gradients accumulated in it, a master copy in fp32 that SGD moves.

    The master starts from the rounded model, as DeepSpeed's does.
    """
    model = make("Qwen2", heads=(6, 3)).to(dtype)
    master = copy.deepcopy(model).float()
    start = [p.detach().clone() for p in master.parameters()]
    optimizer = optimizer_for(master, "sgd")
    losses, norms = [], []
    for step in range(STEPS):
        total = 0.0
        for pieces in micro_batches(step, 1):
            loss = loss_of(model, pieces[0], step) / ACCUMULATION
            (loss * scale).backward()
            total += loss.item()
        for ours, theirs in zip(master.parameters(), model.parameters(), strict=True):
            ours.grad, theirs.grad = theirs.grad.float() / scale, None
        norms.append(torch.nn.utils.clip_grad_norm_(master.parameters(), CLIP).item())
        optimizer.step()
        with torch.no_grad():
            for ours, theirs in zip(master.parameters(), model.parameters(), strict=True):
                theirs.copy_(ours)
        losses.append(total)
    moved = torch.cat([(p.detach() - s).flatten() for p, s in zip(master.parameters(), start, strict=True)])
    return {"losses": torch.tensor(losses), "norms": torch.tensor(norms), "moved": moved}


def sharded_half(stage: int, config: dict) -> dict:
    from deepspeed.utils import safe_get_full_fp32_param

    model = make("Qwen2", heads=(6, 3))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = engine_for(model, optimizer_for(model, "sgd"), config_for(2, stage, **copy.deepcopy(config)))
    start = {name: p.to(next(model.parameters()).dtype).float() for name, p in start.items()}
    losses, norms = [], []
    for step in range(STEPS):
        total = 0.0
        for pieces in micro_batches(step, 1):
            loss = loss_of(engine, pieces[0], step)
            engine.backward(loss)
            engine.step()
            total += loss.item() / ACCUMULATION
        losses.append(total)
        norms.append(float(engine.get_global_grad_norm()))
    moved = {}
    rank = engine.module.tp_sharding.mesh.tp_rank
    for name, param in engine.module.named_parameters():
        layout = layout_of(param)
        whole = start[name] if layout is None else layout.shard(start[name], rank)
        moved[name] = (layout, safe_get_full_fp32_param(param).reshape(whole.shape) - whole)
    return {
        "losses": torch.tensor(losses),
        "norms": torch.tensor(norms),
        "moved": moved,
        "skipped": engine.skipped_steps,
        "replicas": replica_error(engine),
        "dtype": str(next(engine.module.parameters()).dtype),
    }


def train_in_half() -> dict:
    return {name: sharded_half(stage, config) for name, (_, stage, config) in HALF.items()}


def whole_update(ranks: list[dict]) -> torch.Tensor:
    names = ranks[0]["moved"]
    layouts = {name: names[name][0] for name in names}
    pieces = {name: [found["moved"][name][1] for found in ranks] for name in names}
    whole = [pieces[n][0] if layouts[n] is None else layouts[n].unshard(pieces[n]) for n in names]
    return torch.cat([tensor.flatten() for tensor in whole])


@pytest.fixture(scope="module")
def half() -> list[dict]:
    return on_ranks(2, train_in_half, timeout_s=600)


@pytest.fixture(scope="module")
def truths() -> dict[torch.dtype, dict]:
    return {dtype: plain(dtype, 4096.0 if dtype == torch.float16 else 1.0)
            for dtype in (torch.float32, torch.bfloat16, torch.float16)}  # fmt: skip


@pytest.mark.parametrize("name", HALF)
def test_half_precision_is_as_exact_as_one_process(half, truths, name):
    """|ours - fp32 truth| <= 2 |one process in the same precision - fp32 truth|, and an eighth of a rounding error.

    The latter for losses and norms, three numbers each: one process may be lucky with them.
    """
    dtype, _, config = HALF[name]
    ranks = [found[name] for found in half]
    ours = ranks[0] | {"moved": whole_update(ranks)}
    exact, rounded = truths[torch.float32], truths[dtype]
    for key in ("losses", "norms", "moved"):
        error, plain_error = ((found[key] - exact[key]).norm() / exact[key].norm() for found in (ours, rounded))
        luck = 0 if key == "moved" else torch.finfo(dtype).eps / 8
        assert error <= 2 * plain_error + luck, f"{key}: {error} and in one process {plain_error}"
    assert all(found["replicas"] == 0 and found["skipped"] == 0 for found in ranks)
    assert ranks[0]["dtype"] == ("torch.float32" if "torch_autocast" in config else str(dtype))


def one_rank_overflows(stage: int) -> tuple[int, float, float, bool]:
    """An infinite gradient in one rank's shard, in the first step: skipped steps, scale before and after, moved?"""
    model = make("Qwen2", heads=(6, 3))
    weight = model.model.layers[0].mlp.up_proj.weight
    config = config_for(2, stage, fp16={"enabled": True, "initial_scale_power": 8, "hysteresis": 1})
    engine = engine_for(model, optimizer_for(model, "sgd"), config)
    if dist.get_rank() == 1:
        weight.register_hook(lambda grad: grad * (float("inf") if engine.global_steps == 0 else 1.0))
    scales = [engine.optimizer.cur_scale]
    for step in range(2):
        for pieces in micro_batches(step, 1):
            engine.backward(loss_of(engine, pieces[0], step))
            engine.step()
        scales.append(engine.optimizer.cur_scale)
    return engine.skipped_steps, scales[1] / scales[0], scales[2] / scales[1], replica_error(engine) == 0


def overflow_at_all_stages() -> list:
    return [one_rank_overflows(stage) for stage in (1, 2, 3)]


def test_an_overflow_on_one_rank_skips_the_step_on_all():
    for found in on_ranks(2, overflow_at_all_stages):
        assert found == [(1, 0.5, 1.0, True)] * 3
