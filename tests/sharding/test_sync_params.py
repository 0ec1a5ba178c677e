"""make_equal and fingerprint: one model on all ranks of a group, and nothing sent that is equal already."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.support.batched_cases import launched, sentence, values
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding.sync_params import fingerprint, sync_params

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.cfloat,
)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_fingerprint_sees_values_and_places(dtype):
    tensor = torch.tensor([0, 1, 0, 1, 1, 0], dtype=dtype)
    other = tensor.clone()
    other[0] = 1
    swapped = tensor.flip(0)
    assert fingerprint(tensor) == fingerprint(tensor.clone())
    assert len({int(fingerprint(t)) for t in (tensor, other, swapped, tensor[:5])}) == 4


def test_a_fingerprint_sees_signs_of_zero_and_nan_and_the_last_bit():
    tensor = torch.zeros(3)
    for value in (-0.0, float("nan"), 1e-45):
        other = tensor.clone()
        other[1] = value
        assert fingerprint(tensor) != fingerprint(other)


def test_a_fingerprint_does_not_depend_on_strides_or_on_chunks(monkeypatch):
    tensor = torch.randn(7, 11)
    assert fingerprint(tensor.t().contiguous().t()) == fingerprint(tensor)
    assert fingerprint(torch.empty(0)).dim() == 0
    assert fingerprint(torch.tensor(1.0)) != fingerprint(torch.tensor(2.0))
    monkeypatch.setattr("tp_plugin.sharding.sync_params._CHUNK", 16)
    first, last = tensor.clone(), tensor.clone()
    first[0, 0] += 1
    last[-1, -1] += 1
    assert len({int(fingerprint(t)) for t in (tensor, first, last, torch.cat([tensor[2:], tensor[:2]]))}) == 4


class Net(nn.Module):
    def __init__(self, seed: int, width: int = 3, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner = nn.Linear(width, 4, dtype=dtype)
        self.tied = nn.Linear(width, 4, dtype=dtype)
        self.tied.weight = self.inner.weight
        self.register_buffer("table", torch.randn(3, 2).t())  # not contiguous: received elsewhere, and copied
        self.register_buffer("step", torch.tensor(seed), persistent=False)
        self.register_buffer("same", torch.ones(2, dtype=torch.bool))


def mixed_up(world_rank: int) -> tuple[list[str], dict, list[int]]:
    net = Net(seed=world_rank)
    before = [id(p) for p in net.parameters()]
    found = sync_params(net, ParallelMesh.create(2))
    return (
        found,
        {**net.state_dict(), "step": net.step},
        [int(b == id(p)) for b, p in zip(before, net.parameters(), strict=True)],
    )


def seeded_by_rank():
    return mixed_up(dist.get_rank())


def seeded_alike():
    return mixed_up(0)[0]


def other_shapes():
    sync_params(Net(0, width=3 + (dist.get_rank() == 3)), ParallelMesh.create(2))


def other_dtypes():
    sync_params(Net(0, dtype=torch.float64 if dist.get_rank() == 1 else torch.float32), ParallelMesh.create(2))


def other_training():
    net = Net(0)
    net.inner.bias.requires_grad_(dist.get_rank() != 2)
    sync_params(net, ParallelMesh.create(2))


NAMES = ("seeded_by_rank", "seeded_alike", "other_shapes", "other_dtypes", "other_training")


@pytest.fixture(scope="module")
def four() -> list[dict]:
    return launched(4, __name__, NAMES)


def test_a_group_takes_the_parameters_of_its_first_rank_and_the_world_its_buffers(four):
    found = values(four, "seeded_by_rank")
    for rank, (names, tensors, same_objects) in enumerate(found):
        group, world = Net(seed=rank // 2 * 2), Net(seed=0)
        truth = dict(group.named_parameters(remove_duplicate=False)) | dict(world.named_buffers())
        assert all(same_objects)
        assert sorted(names) == ["inner.bias", "inner.weight", "step", "table", "tied.bias"]
        assert tensors.keys() == truth.keys()
        for name, expected in truth.items():
            assert torch.equal(tensors[name], expected), name


def test_what_is_equal_is_left_alone(four):
    assert values(four, "seeded_alike") == [[]] * 4


@pytest.mark.parametrize("name", ["other_shapes", "other_dtypes", "other_training"])
def test_models_that_differ_in_more_than_values(four, name):
    assert "the ranks built different models" in sentence(four, name)
