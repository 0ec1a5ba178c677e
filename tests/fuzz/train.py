"""One case on the ranks of its world: trained sharded, trained in one process by rank 0, and the two compared."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.fuzz.batches import EVALUATION, batches, items_of
from tests.fuzz.build import Run, built, ds_config, later, optimizer_of
from tests.fuzz.case import Case
from tests.fuzz.families import CAUSAL, FAMILIES
from tests.fuzz.losses import Shard, loss_of, own
from tests.fuzz.trainer import by_trainer
from tests.support.configs import CLIP
from tests.support.train import engine_by, engine_for, reloaded
from tp_plugin.param_info import layout_of

# ---- one process -----------------------------------------------------------------------------------------------------


def truth(case: Case, dtype: torch.dtype = torch.float32) -> Run:
    """Plain transformers in this process, in ``dtype``."""
    if dtype == torch.float64 and "experts" in " ".join(case.options):  # grouped_mm knows no doubles
        case = dataclasses.replace(case, options=case.options | {"experts": "eager"})
    model, run = built(case).to(dtype).train(), Run()
    head, mean = model.get_output_embeddings(), 1 if case.loop == "trainer" else case.dp * case.accumulation
    run.start = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = optimizer_of(case, model)
    for step in range(len(case.batches)):
        micros, total = batches(case, step), 0.0
        items = items_of(micros, shifts(case))
        for part in micros:
            for data in part:
                loss = one_loss(case, model, head, data, items) / mean
                loss.backward()
                total += loss.item()
        run.losses.append(total)
        run.grads.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        run.norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)))
        for param in model.parameters():  # DeepSpeed gives one without a gradient zeros, and AdamW decays it
            if param.requires_grad and param.grad is None:
                param.grad = torch.zeros_like(param)
        optimizer.step()
        optimizer.zero_grad()
    run.params = {name: p.detach() for name, p in model.named_parameters()}
    evaluate(case, model, run)
    return run


def one_loss(case: Case, model: Any, head: Any, data: dict, items: int, shard: Shard = None) -> torch.Tensor:
    if case.loop == "trainer" and case.loss == "own":
        logits = model(**{name: x for name, x in data.items() if name != "labels"}).logits
        return own(logits[:, -data["labels"].shape[1] :][:, :-1], data["labels"][:, 1:], torch.tensor(items))
    return loss_of(case, model, head, data, items, shard)


def shifts(case: Case) -> bool:
    return FAMILIES[case.family].kind == CAUSAL


@torch.no_grad()
def evaluate(case: Case, model: Any, run: Run) -> None:
    """Logits and loss of one more batch, the first data-parallel rank's."""
    model.eval()
    data = batches(case, EVALUATION)[0][0]
    out = model(**data)
    run.logits, run.evaluated = out.logits.detach().clone(), float(out.loss)


# ---- sharded ---------------------------------------------------------------------------------------------------------


def sharded(case: Case) -> Run:
    """The same on this world's ranks, through DeepSpeed's slot."""
    import tp_plugin
    from tests.support.train import replica_error

    run = Run()
    if case.loop == "trainer":
        engine = by_trainer(case, run)
    else:
        engine = made(case)
        by_hand(case, engine, run)
    if case.tp > 1:
        run.replicas, run.tp_rank = replica_error(engine), record_of(engine).mesh.tp_rank
    for name, param in engine.module.named_parameters():
        if layout_of(param) is not None:
            run.layouts[name] = layout_of(param)
    full = tp_plugin.full_state_dict(engine)
    run.params = dict(full) if dist.get_rank() == 0 else {}
    evaluate(case, engine, run)
    return run


def made(case: Case) -> Any:
    """The engine of ``case``, made its way."""
    import tp_plugin

    def shape(model: torch.nn.Module) -> torch.nn.Module:
        if case.way in ("load", "zero3 order"):
            model = reloaded(case.way, model, case.tp, ds_config(case))
        if case.way == "late":
            options = ds_config(case)["tp_plugin"]
            tp_plugin.shard_model(model, tp_plugin.TensorParallelConfig(tp_size=case.tp, **options))
        return model

    model = built(case, shape).train()
    optimizer = optimizer_of(case, model)
    if case.checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": case.checkpointing})
    if case.tp == 1:
        return engine_for(model, optimizer, ds_config(case))
    return engine_by(case.way, model, optimizer, ds_config(case), case.tp)


def by_hand(case: Case, engine: Any, run: Run) -> None:
    """The loop that DeepSpeed's documentation shows."""
    head, rank = engine.module.get_output_embeddings(), dist.get_rank() // case.tp
    shard = {"group": record_of(engine).mesh.tp_group if case.tp > 1 else None}
    with later(lambda: len(run.losses)):
        _steps(case, engine, run, head, rank, shard)


def _steps(case: Case, engine: Any, run: Run, head: Any, rank: int, shard: Shard) -> None:
    for step in range(len(case.batches)):
        micros, total = batches(case, step), torch.zeros(())
        items = items_of(micros, shifts(case))
        for part in micros:
            loss = one_loss(case, engine, head, part[rank], items, shard)
            engine.backward(loss)
            total += loss.detach() / case.accumulation
            if engine.is_gradient_accumulation_boundary():
                run.grads.append(gradients(engine))
            engine.step()
        dist.all_reduce(total)
        run.losses.append(total.item() / dist.get_world_size())
        norm = engine.get_global_grad_norm()
        run.norms.append(None if norm is None and case.tp == 1 else float(norm))  # DeepSpeed keeps none at stage 0


def record_of(engine: Any) -> Any:
    from tp_plugin.sharding import state_of

    return state_of(engine.module)


def gradients(engine: Any) -> dict[str, torch.Tensor]:
    """Accumulated gradients, those of sharded parameters this rank's."""
    from deepspeed.utils import safe_get_full_grad

    found = {}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            grad = safe_get_full_grad(param) if engine.zero_optimization_stage() else param.grad
            if grad is not None:
                found[name] = grad.detach().clone()
    return found


# ---- a case ----------------------------------------------------------------------------------------------------------


def shared(make: Callable[[], Any]) -> Any:
    """What rank 0 makes, on every rank; its failure is raised on every rank as :class:`Undrawable`."""
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        with contextlib.redirect_stdout(None):
            try:
                found = [make()]
            except Exception as failure:
                found = [Undrawable(f"{type(failure).__name__}: {failure}")]
    dist.broadcast_object_list(found)
    if isinstance(found[0], Undrawable):
        raise found[0]
    return found[0]


class Undrawable(Exception):
    """Plain transformers in one process cannot run the case."""
