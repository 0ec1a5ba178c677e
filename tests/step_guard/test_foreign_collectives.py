"""A loss's own collectives over TP ranks: refused where every row would count several times, silent where not."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn
from torch.nn import functional as F

from tests.support.batched_cases import launched, sentence, values
from tests.support.configs import config_for
from tests.support.models import batch, make
from tests.support.ranks import on_ranks
from tests.support.train import engine_for
from tp_plugin.step_guard.guard import guard_of

Gather = Callable[[torch.Tensor], torch.Tensor]


def contrastive(hidden: torch.Tensor, gather: Gather) -> torch.Tensor:
    """In-batch negatives: each row's second half is to be told from those of all other rows."""
    queries, keys = (F.normalize(half.mean(1), dim=-1) for half in hidden.chunk(2, 1))
    first = 0 if keys.shape[0] == (everyone := gather(keys)).shape[0] else dist.get_rank() * keys.shape[0]
    return F.cross_entropy(queries @ everyone.T * 5, first + torch.arange(len(keys)))


def plain_list(rows: torch.Tensor, group: Any = None) -> torch.Tensor:
    found = [torch.empty_like(rows) for _ in range(dist.get_world_size(group))]
    dist.all_gather(found, rows, group=group)
    found[dist.get_rank(group)] = rows
    return torch.cat(found)


def into_tensor(rows: torch.Tensor) -> torch.Tensor:
    found = rows.new_empty(dist.get_world_size() * len(rows), rows.shape[1])
    dist.all_gather_into_tensor(found, rows)
    return found


def objects(rows: torch.Tensor) -> torch.Tensor:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, {"rows": rows})
    return torch.cat([one["rows"] for one in found])


def from_neighbours(rows: torch.Tensor) -> torch.Tensor:
    found, other = torch.empty_like(rows), 1 - dist.get_rank()
    sends = [dist.P2POp(dist.isend, rows, other), dist.P2POp(dist.irecv, found, other)]
    for work in dist.batch_isend_irecv(sends):
        work.wait()
    return torch.cat([rows, found])


def by_group_name(rows: torch.Tensor) -> torch.Tensor:
    return functional.all_gather_tensor_autograd(rows, 0, dist.group.WORLD.group_name)


def no_grad(rows: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return plain_list(rows)


WRONG: dict[str, Gather] = {
    "nn": lambda rows: torch.cat(torch.distributed.nn.all_gather(rows)),
    "nn.functional": lambda rows: torch.cat(torch.distributed.nn.functional.all_gather(rows)),
    "plain": plain_list,
    "no_grad": no_grad,
    "into_tensor": into_tensor,
    "objects": objects,
    "neighbours": from_neighbours,
    "functional": lambda rows: functional.all_gather_tensor_autograd(rows, 0, dist.group.WORLD),
    "group name": by_group_name,
}


def engine_of(tp: int = 2) -> Any:
    model = make("Llama").train()
    config = config_for(tp, 1) | {"gradient_accumulation_steps": 1}
    return engine_for(model, torch.optim.SGD(model.parameters(), lr=0.1), config)


def hidden_of(model: Any, rows: int = 3) -> torch.Tensor:
    return model(batch(0, rows)["input_ids"], output_hidden_states=True).hidden_states[-1]


def in_a_loop(name: str) -> None:
    engine = engine_of()
    engine.backward(contrastive(hidden_of(engine), WRONG[name]))


def over_replicas(rows: torch.Tensor) -> torch.Tensor:
    from deepspeed.utils import groups

    return plain_list(rows, groups.get_data_parallel_group())


def sound_loop() -> list[float]:
    """Two steps that collect for logging between forward and backward, negatives from replicas; the losses."""
    engine, losses = engine_of(), []
    for _ in range(2):
        hidden = hidden_of(engine)
        loss = contrastive(hidden, over_replicas)
        plain_list(hidden.detach().mean(1))
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        assert mean / dist.get_world_size() == loss
        averaged = torch.distributed.nn.all_reduce(loss) / dist.get_world_size()
        engine.backward(averaged)
        plain_list(hidden.mean(1))  # after the backward it can be a metric only
        engine.step()
        losses.append(loss.item())
    return losses


def examined(gather: Gather, *, flows: bool = True) -> str:
    """What is compared of a loss as a trainer has it, which is handed to the guard whole."""
    engine = engine_of()

    def loss(model: Any, piece: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = model(piece["input_ids"], output_hidden_states=True).hidden_states[-1]
        if not flows:
            gather(hidden.mean(1).detach())
        own = contrastive(hidden, gather if flows else lambda rows: rows)
        counted = torch.tensor(float(hidden.shape[0]))
        dist.all_reduce(counted)  # over ranks, and divided by ranks
        return own * hidden.shape[0] * dist.get_world_size() / counted

    engine.module.train()
    guard = guard_of(engine.module)
    guard.examine(loss, {"input_ids": batch(0, 3)["input_ids"]})
    return guard.compared


def of_detached(rows: torch.Tensor) -> torch.Tensor:
    """A bank of keys, which nothing shows to be of use to a loss."""
    return torch.cat([rows, plain_list(rows.detach())[len(rows) :]])


EXAMINED = {"nn": WRONG["nn"], "plain": plain_list, "detached": of_detached, "functional": WRONG["functional"]}
LOOPS = {f"loop_{index}": name for index, name in enumerate(WRONG)}
LOSSES = {f"loss_{index}": name for index, name in enumerate(EXAMINED)}
globals().update({case: functools.partial(in_a_loop, name) for case, name in LOOPS.items()})
globals().update({case: functools.partial(examined, EXAMINED[name]) for case, name in LOSSES.items()})
for_logging_only = functools.partial(examined, plain_list, flows=False)


@pytest.fixture(scope="module")
def two() -> list[dict]:
    return launched(2, __name__, (*LOOPS, *LOSSES, "sound_loop", "for_logging_only"))


@pytest.mark.parametrize("case", LOOPS, ids=list(WRONG))
def test_a_loop_that_collects_rows_of_peers_is_refused_at_its_first_loss(two, case):
    said = sentence(two, case)
    assert "would count 2 times: use accelerator.gather" in said
    assert "test_foreign_collectives.py, line" in said


@pytest.mark.parametrize("case", LOSSES, ids=list(EXAMINED))
def test_a_loss_that_depends_on_copies_differs_from_one_without_tensor_parallelism(two, case):
    said = sentence(two, case)
    assert "computed again without tensor parallelism differs" in said
    assert "would count 2 times: use accelerator.gather" in said


def test_what_is_collected_for_logging_stops_nothing(two):
    assert all(compared for compared in values(two, "for_logging_only"))
    model = make("Llama").train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    for _ in range(2):
        loss = contrastive(hidden_of(model), lambda rows: rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(loss.item())
    for losses in values(two, "sound_loop"):
        assert losses == pytest.approx(expected, rel=1e-4)


def four_ranks() -> tuple[str, list[str]]:
    """At dp 2: what is compared of a loss over replicas, as a world has them that has no tensor parallelism."""
    engine = engine_of()

    def loss(model: Any, piece: dict[str, torch.Tensor]) -> torch.Tensor:
        hidden = model(piece["input_ids"], output_hidden_states=True).hidden_states[-1]
        rows = [torch.empty_like(hidden) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, hidden.detach())
        copied = hidden.detach().clone()
        dist.broadcast(copied, 0)
        return contrastive(hidden, lambda keys: keys) + torch.stack(rows).mean() + copied.mean()

    engine.module.train()
    guard = guard_of(engine.module)
    ids = batch(dist.get_rank() // 2, 3)["input_ids"]
    guard.examine(loss, {"input_ids": ids})
    return guard.compared


def test_means_over_all_ranks_are_those_over_replicas():
    assert all(on_ranks(4, four_ranks))
