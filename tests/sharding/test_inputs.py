"""InputGuard: the batches and the random generators of a tensor-parallel group are compared, or handed out."""

from __future__ import annotations

import random

import numpy
import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support.batched_cases import launched, sentence, values
from tp_plugin.collectives import counted
from tp_plugin.config import TensorParallelConfig
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding.inputs import PURPOSE, InputGuard, broadcast_tree


class Sum(nn.Module):
    def __init__(self, rate: float = 0.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.dropout = nn.Dropout(rate)

    def forward(self, x, scale=1.0, extra=None):
        total = self.dropout(x).sum() * scale * self.weight
        return total if extra is None else total + extra["y"].sum()


def guarded(rate: float = 0.0, **options) -> Sum:
    model = Sum(rate)
    InputGuard(model, ParallelMesh.create(2), TensorParallelConfig(tp_size=2, **options))
    return model


def comparisons() -> dict[str, list[int]]:
    """Collectives of the comparison at each of seven forwards."""
    found: dict[str, list[int]] = {}
    for mode in ("training", "evaluation"):
        model = guarded(check_batch_every=3).train(mode == "training")
        found[mode] = []
        for _ in range(7):
            with counted() as counter:
                model(torch.ones(2))
            found[mode].append(counter.count(PURPOSE))
    return found


def values_in_one_group():
    guarded()(torch.full((2,), 1.0 + (dist.get_rank() == 3)))


def keyword_values():
    guarded()(torch.ones(2), extra={"y": torch.full((2,), float(dist.get_rank() % 2))})


def plain_values():
    guarded()(torch.ones(2), scale=1.0 + dist.get_rank() % 2)  # a Python number, as num_items_in_batch may be


def dtypes():
    guarded()(torch.ones(2, dtype=torch.float64 if dist.get_rank() % 2 else torch.float32))


def missing_keyword():
    x = torch.ones(2)
    return guarded()(x) if dist.get_rank() % 2 else guarded()(x, extra={"y": x})


def generators_out_of_step():
    model = guarded(rate=0.5, check_batch_every=1)
    model(torch.ones(2))
    torch.rand(dist.get_rank() % 2)
    model(torch.ones(2))


class Masked(Sum):
    """Masks its input by NumPy, as SpecAugment does, and skips layers by Python's ``random``, as LayerDrop may.

    Every layer sums over the TP group: a rank that skips another number of layers than its peer leaves it waiting.
    """

    def __init__(self, group) -> None:
        super().__init__()
        self.group, self.layers, self.masks = group, 0, []

    def forward(self, x):
        if not self.training:
            return x
        self.masks.append(numpy.random.rand(len(x)) < 0.5)
        x = x * torch.from_numpy(self.masks[-1]) * self.weight
        for _ in range(8):
            if random.random() < 0.5:
                x = x.detach().clone()
                dist.all_reduce(x, group=self.group)
                self.layers += 1
        return x


def masked(**options) -> Masked:
    mesh = ParallelMesh.create(2)
    model = Masked(mesh.tp_group)
    InputGuard(model, mesh, TensorParallelConfig(tp_size=2, **options))
    return model


def seeded_apart_but_for_torch() -> tuple[list[bool], int]:
    """What a rank draws in two forwards, after a loop has seeded torch alone."""
    torch.manual_seed(dist.get_rank() // 2)
    random.seed(dist.get_rank())
    numpy.random.seed(dist.get_rank())
    model = masked()
    model(torch.ones(16))
    model(torch.ones(16))
    return numpy.concatenate(model.masks).tolist(), model.layers


def a_generator_parts(draw):
    model = masked(check_batch_every=1)
    model.layers = None
    model.forward = lambda x: x * numpy.random.rand() * random.random()
    model(torch.ones(2))
    model(torch.ones(2))
    if dist.get_rank() == 3:
        draw()
    model(torch.ones(2))


def numpys_parts():
    a_generator_parts(numpy.random.rand)


def pythons_parts():
    a_generator_parts(random.random)


def both_part():
    a_generator_parts(lambda: (numpy.random.rand(), random.random()))


def one_rank_alone() -> tuple[list[str], float]:
    """Collectives of three forwards at tp 1 with data parallelism, where nothing has to agree with anything."""
    model = Sum(0.5)
    InputGuard(model, ParallelMesh.create(1), TensorParallelConfig(broadcast_batch=True, check_batch_every=1))
    with counted() as counter:
        for _ in range(3):
            found = model.train()(torch.full((2 + dist.get_rank(),), 1.0 + dist.get_rank()))
        model.eval()(torch.ones(2))
    return [record.kind for record in counter.records], found.detach().isfinite().item()


def generators_that_nobody_draws_from():
    model = guarded(check_batch_every=1)
    model(torch.ones(2))
    torch.rand(dist.get_rank() % 2)
    numpy.random.rand(dist.get_rank() % 2)
    random.seed(dist.get_rank())
    return model(torch.ones(2)).item()


def generators_brought_in_step() -> tuple[float, float]:
    torch.manual_seed(dist.get_rank())
    model = guarded(rate=0.5)
    model.eval()(torch.ones(2))
    untouched = torch.rand(()).item()
    torch.manual_seed(dist.get_rank())
    model.train()(torch.ones(64))
    return untouched, torch.rand(()).item()


def handed_out():
    rank = dist.get_rank()
    model = guarded(broadcast_batch=True, check_batch_every=1)
    return model(torch.full((2 + rank,), float(rank)), scale=1.0 + rank, extra={"y": torch.ones(1 + rank)}).item()


def trees():
    rank = dist.get_rank()
    tree = [
        {"a": torch.full((rank + 1, 2), rank), "b": (None, "x" * rank)},
        torch.tensor(rank > 1),
        rank,
        torch.empty(0),
    ]
    (first, flag, number, empty) = broadcast_tree(tree, ParallelMesh.create(2))
    return first["a"].tolist(), first["b"], flag.item(), number, tuple(empty.shape)


REFUSED = {
    "values_in_one_group": "their values differ",
    "keyword_values": "their values differ",
    "plain_values": "their values differ",
    "dtypes": "their shapes differ",
    "missing_keyword": "their shapes differ",
    "generators_out_of_step": "no longer in step (torch's), so",
    "numpys_parts": "no longer in step (NumPy's), so",
    "pythons_parts": "no longer in step (Python's), so",
    "both_part": "no longer in step (NumPy's and Python's), so",
}
ALLOWED = (
    "comparisons",
    "seeded_apart_but_for_torch",
    "one_rank_alone",
    "generators_that_nobody_draws_from",
    "generators_brought_in_step",
    "handed_out",
    "trees",
)


@pytest.fixture(scope="module")
def four() -> list[dict]:
    return launched(4, __name__, (*REFUSED, *ALLOWED))


@pytest.mark.parametrize("name", REFUSED)
def test_refused_on_every_rank(four, name):
    assert REFUSED[name] in sentence(four, name)


def test_compared_at_the_first_forward_and_at_intervals(four):
    for found in values(four, "comparisons"):
        assert found == {"training": [2, 0, 0, 2, 0, 0, 2], "evaluation": [1, 0, 0, 1, 0, 0, 1]}


def test_generators_matter_only_to_those_who_draw(four):
    assert values(four, "generators_that_nobody_draws_from") == [2.0] * 4


def test_the_first_training_forward_brings_generators_in_step(four):
    untouched, after = zip(*values(four, "generators_brought_in_step"), strict=True)
    assert len(set(untouched)) == 4
    assert after[0] == after[1]
    assert after[2] == after[3]
    assert after[0] != after[2]


def test_numpys_and_pythons_generators_are_brought_in_step_before_a_layer_is_skipped(four):
    first, peer, second, _ = found = values(four, "seeded_apart_but_for_torch")
    assert first == peer
    assert second == found[3]
    assert first[0] != second[0], "replicas draw masks of their own"
    assert 0 < first[1] < 16


def test_one_rank_alone_has_nobody_to_agree_with(four):
    """No number of it is reduced over the world, which NCCL would refuse of CPU memory."""
    assert values(four, "one_rank_alone") == [([], True)] * 4


def test_the_first_ranks_batch_is_handed_out(four):
    assert values(four, "handed_out") == [1.0, 1.0, 4 * 2.0 * 3.0 + 3.0, 4 * 2.0 * 3.0 + 3.0]


def test_any_tree_is_handed_out(four):
    first, second = ([[0, 0]], (None, ""), False, 0, (0,)), ([[2, 2]] * 3, (None, "xx"), True, 2, (0,))
    assert values(four, "trees") == [first, first, second, second]
