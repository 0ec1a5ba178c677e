"""Train a small model in one process or on tp x dp ranks through DeepSpeed, and compare what came out."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from typing import Any

import torch
import torch.distributed as dist

from tests.support import zoo
from tests.support.configs import ACCUMULATION, CLIP, MICRO, config_for
from tests.support.errors import gradient_error, relative, replica_error, worse
from tests.support.models import batch, make

STEPS = 2
ENGINE_OPTIONS = ("stage", "offload", "way", "zero", "extra", "checkpointing", "seeded", "gradients")
DEFAULTS = {"heads": (4, 2), "tied": None, "optimizer": "adamw", "adapter": None, "steps": STEPS}


def optimizer_for(model: torch.nn.Module, name: str) -> torch.optim.Optimizer:
    """Parameters in two groups by name, as weight decay is usually applied."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    decay = [p for n, p in trained if "norm" not in n]
    rest = [p for n, p in trained if "norm" in n]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    if name == "counting":
        return CountingAdam(groups, {"lr": 1e-2})
    # epsilon well above the gradients' rounding noise, so that AdamW's first steps are not decided by it
    return torch.optim.AdamW(groups, lr=1e-2, eps=1e-4) if name == "adamw" else torch.optim.SGD(groups, lr=0.5)


class CountingAdam(torch.optim.Optimizer):
    """Adam by somebody who counts steps in a Python int, as bitsandbytes does."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in (param for param in group["params"] if param.grad is not None):
                state = self.state[param]
                state.setdefault("step", 0)
                state["step"] += 1
                first = state.setdefault("first", torch.zeros_like(param)).lerp_(param.grad, 0.1)
                second = state.setdefault("second", torch.zeros_like(param)).lerp_(param.grad.square(), 0.001)
                scale = (1 - 0.999 ** state["step"]) ** 0.5 / (1 - 0.9 ** state["step"])
                param.sub_(group["lr"] * scale * first / (second.sqrt() + 1e-4))


def model_of(family: str, seed: int = 0, **options: Any) -> torch.nn.Module:
    """A model of :mod:`tests.support.zoo` by its name there, or ``make(family, ...)``."""
    if family in zoo.ZOO:
        options = {key: value for key, value in options.items() if key not in ("heads", "tied")}
        return zoo.build(family, seed, **options)
    return make(family, seed=seed, **options)


def adapted(model: torch.nn.Module, adapter: str | None) -> torch.nn.Module:
    """``model`` with an adapter of :mod:`tests.support.adapters`, where one is asked for."""
    if adapter is None:
        return model
    from tests.support.adapters import adapt

    return adapt(model, adapter)


def micro_batches(step: int, dp: int, family: str = "") -> list[list[dict[str, torch.Tensor]]]:
    """[accumulation][dp rank] micro-batches of global batch ``step``."""
    rows = MICRO * dp * ACCUMULATION
    whole = (zoo.data_for(family) if family in zoo.ZOO else batch)(step, rows)
    pieces = [{k: v[i * MICRO : (i + 1) * MICRO] for k, v in whole.items()} for i in range(dp * ACCUMULATION)]
    return [pieces[a * dp : (a + 1) * dp] for a in range(ACCUMULATION)]


def loss_of(model: Any, data: dict[str, torch.Tensor], step: int, family: str = "") -> torch.Tensor:
    """The sum over the label tokens / a number fixed for the step, so that uneven counts weigh alike everywhere.

    A family whose loss is always the mean gives that.
    """
    if family in zoo.ZOO and not zoo.counts_items(family):
        return model(**data).loss
    return model(**data, num_items_in_batch=torch.tensor(17.0 + step)).loss


_TRUTHS: dict[str, dict] = {}


def truth(dp: int, **case: Any) -> dict:
    """What :func:`_train_plainly` gives for arguments of :func:`compare`, computed once a process.

    Several configurations have one truth.
    """
    model = DEFAULTS | {key: value for key, value in case.items() if key not in ENGINE_OPTIONS}
    key = repr((dp, sorted(model.items())))
    if key not in _TRUTHS:
        _TRUTHS[key] = _train_plainly(dp, **model)
    return _TRUTHS[key]


def share_truths(tp: int, cases: list[dict]) -> None:
    """Divide the truths of ``cases`` among the ranks: each computes some, and all get all.

    A truth that cannot be computed is left to its case, which raises there.
    """
    world = dist.get_world_size()
    for index, case in enumerate(cases):
        if index % world == dist.get_rank():
            with contextlib.suppress(Exception):
                truth(world // tp, **case)
    every: list[dict[str, dict]] = [{}] * world
    dist.all_gather_object(every, _TRUTHS)
    for found in every:
        _TRUTHS.update(found)


def _train_plainly(
    dp: int, family: str, heads: tuple[int, int], tied: bool | None, optimizer: str, adapter: str | None, steps: int,
    **options: Any,
) -> dict:  # fmt: skip
    """One process, plain transformers: losses, clipped gradient norms, gradients of step 0, parameters after."""
    model = adapted(model_of(family, heads=heads, tied=tied, **options), adapter)
    optim = optimizer_for(model, optimizer)
    losses, norms, grads = [], [], {}
    for step in range(steps):
        total = 0.0
        for pieces in micro_batches(step, dp, family):
            for data in pieces:
                loss = loss_of(model, data, step, family) / (dp * ACCUMULATION)
                loss.backward()
                total += loss.item()
        if step == 0:
            grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP).item())
        optim.step()
        optim.zero_grad()
        losses.append(total)
    start = dict(adapted(model_of(family, heads=heads, tied=tied, **options), adapter).named_parameters())
    params = {n: p.detach() for n, p in model.named_parameters()}
    return {"losses": losses, "norms": norms, "grads": grads, "params": params, "start": start}


def engine_for(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, config: dict[str, Any], **arguments: Any
) -> Any:
    """``register()`` and ``deepspeed.initialize``."""
    import deepspeed

    import tp_plugin

    tp_plugin.register()
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config, **arguments)[0]


class GroupsOfAScript:
    """Groups of neighbours (or, ``strided``, of ranks apart) that a script makes itself, with the methods of an mpu."""

    def __init__(self, tp: int, strided: bool = False) -> None:
        world = dist.get_world_size()
        near = [list(range(start, start + tp)) for start in range(0, world, tp)]
        apart = [list(range(first, world, world // tp)) for first in range(world // tp)]
        tensor = apart if strided else near
        data = [list(ranks) for ranks in zip(*tensor, strict=True)]
        self.tensor, self.data = (dist.new_subgroups_by_enumeration(ranks)[0] for ranks in (tensor, data))

    def get_model_parallel_group(self):
        return self.tensor

    def get_model_parallel_rank(self):
        return dist.get_rank(self.tensor)

    def get_model_parallel_world_size(self):
        return dist.get_world_size(self.tensor)

    def get_data_parallel_group(self):
        return self.data

    def get_data_parallel_rank(self):
        return dist.get_rank(self.data)

    def get_data_parallel_world_size(self):
        return dist.get_world_size(self.data)


def engine_by(
    way: str, model: torch.nn.Module, optimizer: torch.optim.Optimizer | None, config: dict[str, Any], tp: int
) -> Any:
    """An engine made in one of several ways.

    ``slot``: the engine shards. ``early``: ``shard_model`` first, and the engine finds it done. ``mpu``: likewise,
    and the engine is told of the groups by ``mpu=`` instead of ``autotp_size``. ``beside``: the engine shards, and a
    ``mpu=`` of the script's own says the same groups. ``recorded``: ``deepspeed.tp_model_init`` tells the degree.
    (``late`` is the model's to know: it is sharded already, and adapters were put into it then.)
    """
    import deepspeed

    import tp_plugin

    if way in ("slot", "late", "load", "zero3 order"):
        return engine_for(model, optimizer, config)
    if way == "beside":
        return engine_for(model, optimizer, config, mpu=GroupsOfAScript(tp))
    if way == "recorded":
        model = deepspeed.tp_model_init(model, tp_size=tp, dtype=torch.float32)
        return engine_for(model, optimizer, {key: value for key, value in config.items() if key != "tensor_parallel"})
    record = tp_plugin.shard_model(model, tp_plugin.TensorParallelConfig(tp_size=tp, quiet=True, check_batch_every=2))
    if way == "early":
        return engine_for(model, optimizer, config)
    rest = {key: value for key, value in config.items() if key not in ("tensor_parallel", "tp_plugin")}
    return engine_for(model, optimizer, rest, mpu=record.mesh)


def reloaded(way: str, model: torch.nn.Module, tp: int, config: dict[str, Any]) -> torch.nn.Module:
    """``model`` as a checkpoint of it loads: each rank its slices.

    ``load``: by ``tp_plugin.from_pretrained``. ``zero3 order``: by transformers' own, under a live ZeRO-3 config.
    """
    from transformers.integrations import HfDeepSpeedConfig

    import tp_plugin
    from tp_plugin.sharding import state_of

    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        model.save_pretrained(folder[0])
    dist.barrier()
    if way == "load":
        options = tp_plugin.TensorParallelConfig(tp_size=tp, quiet=True, check_batch_every=2)
        found = tp_plugin.from_pretrained(folder[0], config=options)
    else:
        tp_plugin.register()
        alive = HfDeepSpeedConfig(config)
        found = type(model).from_pretrained(folder[0])
        found.config_alive = alive  # as in a script, where it lives on while the engine is made
    assert state_of(found) is not None
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])
    return found.train()


def compare(
    family: str, tp: int, stage: int, *, heads=(4, 2), tied=None, optimizer="adamw", offload=False, way="slot",
    zero: dict | None = None, extra: dict | None = None, checkpointing: bool | None = None, seeded: str = "alike",
    gradients: bool = True, adapter: str | None = None, steps: int = STEPS, **options: Any,
) -> dict[str, float]:  # fmt: skip
    """Train on this world's ranks, train the truth, and return the largest relative errors.

    ``way``: see :func:`engine_by` and :func:`reloaded`. ``zero`` and ``extra`` go into the DeepSpeed config.
    ``checkpointing``: whether activations are recomputed, and reentrantly; None keeps them. ``seeded``: "alike", or
    "by rank" for another model on every rank but the first, whose model is the truth. ``gradients``: whether to ask
    DeepSpeed for each of them.
    ``adapter``: one of :data:`tests.support.adapters.ADAPTERS`; after sharding where ``way`` is "late", else before.

    Keys: loss, norm, grad (worst parameter), update (worst parameter), replicas (across tp and dp, absolute).
    """
    import tp_plugin

    dp = dist.get_world_size() // tp
    model_options = {"heads": heads, "tied": tied, "optimizer": optimizer, "adapter": adapter, "steps": steps}
    expected = truth(dp, family=family, **model_options, **options)
    seed = dist.get_rank() if seeded == "by rank" else 0
    model = model_of(family, seed, heads=heads, tied=tied, **options)
    zero = (zero or {}) | ({"offload_optimizer": {"device": "cpu"}} if offload else {})
    config = config_for(tp, stage, zero=zero, **(extra or {}))
    if way in ("load", "zero3 order"):
        model = reloaded(way, model, tp, config)
    if way == "late":
        tp_plugin.shard_model(model, tp_plugin.TensorParallelConfig(tp_size=tp, quiet=True, check_batch_every=2))
    model = adapted(model, adapter)
    names = [(name, id(param)) for name, param in model.named_parameters()]
    optim = optimizer_for(model, optimizer)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    engine = engine_by(way, model, optim, config, tp)
    assert names == [(name, id(param)) for name, param in model.named_parameters()], "names or identities changed"
    errors = {"loss": 0.0, "norm": 0.0, "grad": 0.0, "update": 0.0, "replicas": 0.0}
    dp_rank = dist.get_rank() // tp
    for step in range(steps):
        total = torch.zeros(())
        for pieces in micro_batches(step, dp, family):
            loss = loss_of(engine, pieces[dp_rank], step, family)
            engine.backward(loss)
            total += loss.detach() / ACCUMULATION
            if engine.is_gradient_accumulation_boundary() and step == 0 and gradients:
                errors["grad"] = gradient_error(engine, expected["grads"])
            engine.step()
        dist.all_reduce(total)
        errors["loss"] = worse(errors["loss"], abs(total.item() / dist.get_world_size() / expected["losses"][step] - 1))
        errors["norm"] = worse(errors["norm"], abs(float(engine.get_global_grad_norm()) / expected["norms"][step] - 1))
    errors["replicas"] = replica_error(engine)
    full = tp_plugin.full_state_dict(engine)
    if dist.get_rank() == 0:
        for name in expected["grads"]:  # what has no gradient is decayed by ZeRO's optimizers and not by torch's
            after = expected["params"][name]
            errors["update"] = worse(errors["update"], relative(full[name] - expected["start"][name],
                                                              after - expected["start"][name]))  # fmt: skip
    return errors
