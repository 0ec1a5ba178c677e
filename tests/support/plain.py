"""Trainings of :mod:`tests.support.plain_models`, sharded and in one process."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from tests.support.configs import config_for
from tests.support.errors import gradient_error, relative, replica_error, worse
from tests.support.guarded import compared
from tests.support.models import batch, perturb
from tests.support.plain_models import (
    WIDTH,
    AtHome,
    Attending,
    Boxed,
    Crossed,
    Described,
    Four,
    Listed,
    Named,
    One,
    Projector,
    Valued,
)
from tests.support.train import engine_for

STEPS, CLIP = 2, 0.5


MLP = {"fc1": "colwise", "fc2": "rowwise"}
CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, str]]] = {
    "one": (One, {"fc": "colwise_gather_output"}),
    "one in old words": (One, {"fc": "colwise_rep"}),
    "one split": (One, {"fc": "rowwise_split_input"}),
    "two of four": (Four, {"layer1": "colwise", "layer2": "rowwise"}),
    "four of four": (Four, {"layer1": "colwise", "layer2": "rowwise", "layer3": "colwise", "layer4": "rowwise"}),
    "listed": (Listed, {"net.0": "column", "net.1": "row", "net.2": "column", "net.3": "row"}),
    "crossed": (Crossed, {"up1": "column", "down1": "row", "up2": "column", "down2": "row"}),
    "named": (Named, {"blk.q_proj": "column", "blk.o_proj": "row"}),
    "at home": (AtHome, MLP | {"out": "colwise_gather_output"}),
    "attending": (Attending, MLP | {f"attn.{n}_proj": "colwise" for n in "qkv"} | {"attn.o_proj": "rowwise"}),
    "described": (Described, {}),
    "projector": (Projector, {}),
    "valued": (Valued, {}),
    "boxed": (Boxed, {}),
}


def data_of(name: str, step: int) -> Any:
    """Keyword arguments of a model that gives its loss, else (input, target)."""
    if name in ("projector", "valued", "boxed"):
        return batch(step, 4)
    random = torch.Generator().manual_seed(step)
    target = torch.randn(4, 3, 10, generator=random)
    if name == "attending":
        return torch.randint(31, (4, 3), generator=random), target
    return torch.randn(4, 3, WIDTH, generator=random), target


def loss_of(model: Any, data: Any) -> torch.Tensor:
    if isinstance(data, dict):
        return model(**data).loss
    return F.mse_loss(model(data[0]), data[1])


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return perturb(CASES[name][0]())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)


def truth(name: str) -> dict[str, Any]:
    """One process, plain PyTorch."""
    model = build(name)
    start = {key: param.detach().clone() for key, param in model.named_parameters()}
    optimizer, losses, norms, grads = optimizer_of(model), [], [], {}
    for step in range(STEPS):
        loss = loss_of(model, data_of(name, step))
        loss.backward()
        grads = grads or {key: param.grad.clone() for key, param in model.named_parameters()}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms, "grads": grads, "start": start, "end": dict(model.named_parameters())}


def compare(name: str, stage: int) -> dict[str, float]:
    """The largest relative errors of ``name`` sharded over all ranks, and after a save and a load.

    Keys: loss, norm, grad, update, replicas, reload; compared: how many numbers the guard of the first step compared.
    """
    import tp_plugin

    expected = truth(name)
    model = build(name)
    block = {"quiet": True, "plan": CASES[name][1]}
    changes = {"train_micro_batch_size_per_gpu": 4, "gradient_accumulation_steps": 1, "tp_plugin": block}
    config = config_for(dist.get_world_size(), stage) | changes
    engine = engine_for(model, optimizer_of(model), config)
    assert tp_plugin.sharding.state_of(model).layouts, "nothing is sharded"
    errors = dict.fromkeys(("loss", "norm", "grad", "update", "replicas", "reload"), 0.0)
    seen: dict[str, float] = {}
    for step in range(STEPS):
        with compared(seen):
            loss = loss_of(engine, data_of(name, step))
        engine.backward(loss)
        if step == 0:
            errors["grad"] = gradient_error(engine, expected["grads"])
        engine.step()
        errors["loss"] = worse(errors["loss"], abs(loss.item() / expected["losses"][step] - 1))
        errors["norm"] = worse(errors["norm"], abs(float(engine.get_global_grad_norm()) / expected["norms"][step] - 1))
    errors["replicas"], errors["compared"] = replica_error(engine), len(seen)
    full = tp_plugin.full_state_dict(engine)
    errors["reload"] = reload_error(engine, name, full)
    if dist.get_rank() == 0:
        for key, before in expected["start"].items():
            after = expected["end"][key] - before
            errors["update"] = worse(errors["update"], relative(full[key] - before, after, 1e-5))
    return errors


def reload_error(engine: Any, name: str, full: dict[str, torch.Tensor]) -> float:
    """What a plain model that takes the whole weights, and this engine after a checkpoint, differ by in their loss."""
    import tp_plugin

    data = data_of(name, STEPS)
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    with torch.no_grad():
        here = float(loss_of(engine, data))
        engine.save_checkpoint(folder[0])
        for param in engine.module.parameters():
            param.data.zero_()
        engine.load_checkpoint(folder[0])
        again = float(loss_of(engine, data))
        error = abs(again - here)
        if dist.get_rank() == 0:
            plain = build(name)
            plain.load_state_dict(full)
            error = worse(error, abs(float(loss_of(plain, data)) / here - 1))
    assert tp_plugin.sharding.state_of(engine.module) is not None
    return error


def run_cases(cases: list[tuple[str, int]]) -> list[dict[str, float] | str]:
    """One rank's share of every case; an exception ends its case only."""
    import traceback

    found: list[dict[str, float] | str] = []
    for case in cases:
        try:
            found.append(compare(*case))
        except Exception:
            found.append(traceback.format_exc())
    return found
