"""The differentiable collectives against plain autograd on the full tensor, in real processes."""

import contextlib
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from tests.support.ranks import errors_on_ranks, on_ranks
from tp_plugin.collectives import (
    all_reduce_,
    copy_to_region,
    counted,
    gather_from_region,
    reduce_from_region,
    split_to_region,
)
from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.mesh import ParallelMesh, comm_device, take_device


def column_then_row(sizes):
    """x -> column-parallel A -> tanh -> row-parallel B, by hand; returns output and gradients, and their truth."""
    group, rank = dist.group.WORLD, dist.get_rank()
    torch.manual_seed(0)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(s, dtype=torch.float64) for s in [(sum(sizes), 4), (5, sum(sizes))])
    truth = torch.tanh(x @ a.T) @ b.T
    truth_grad = torch.autograd.grad(truth.square().sum(), x)[0]
    start, stop = sum(sizes[:rank]), sum(sizes[: rank + 1])
    with counted() as counter:
        out = reduce_from_region(torch.tanh(copy_to_region(x, group) @ a[start:stop].T) @ b[:, start:stop].T, group)
        grad = torch.autograd.grad(out.square().sum(), x)[0]
    torch.testing.assert_close(out, truth)
    torch.testing.assert_close(grad, truth_grad)
    return counter.count("leave", backward=False), counter.count("enter", backward=True), counter.count()


def test_column_then_row_costs_one_collective_each_way():
    assert on_ranks(2, column_then_row, [3, 4]) == [(1, 1, 2)] * 2


def split_then_gather(sizes):
    group = dist.group.WORLD
    torch.manual_seed(0)
    x = torch.randn(2, sum(sizes), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(x)
    out = gather_from_region(split_to_region(x, group, 1, sizes).square(), group, 1, sizes)
    grad = torch.autograd.grad((out * weight).sum(), x)[0]
    torch.testing.assert_close(out, x.square())
    torch.testing.assert_close(grad, 2 * x * weight)


@pytest.mark.parametrize("sizes", [[2, 2, 2], [3, 0, 1]])
def test_split_and_gather_are_each_others_backward(sizes):
    on_ranks(3, split_then_gather, sizes)


def reduce_a_view():
    with pytest.raises(ValueError, match="contiguous"):
        all_reduce_(torch.ones(4, 4).t()[:, :2], dist.group.WORLD)


def test_a_tensor_that_would_be_copied_is_refused():
    on_ranks(2, reduce_a_view)


def disagree():
    agree("the second rank's trouble" if dist.get_rank() == 1 else None)


def test_an_error_of_one_rank_is_raised_on_all():
    assert errors_on_ranks(3, disagree) == ["the second rank's trouble [on rank 1]"] * 3


def grid():
    mesh = ParallelMesh.create(2)
    assert ParallelMesh.create(2) is mesh
    return mesh.tp_rank, mesh.dp_rank, dist.get_process_group_ranks(mesh.tp_group), mesh.hosts_spanned()


def test_tp_ranks_are_neighbours():
    assert on_ranks(4, grid) == [(0, 0, [0, 1], 1), (1, 0, [0, 1], 1), (0, 1, [2, 3], 1), (1, 1, [2, 3], 1)]


@contextlib.contextmanager
def a_host_of_gpus(local_rank: int, *, count: int = 4, current: int = 0, backend: str = "cuda:nccl", bound=None):
    """Functions of torch answer as on such a host, which no machine of ours is; yields the devices that were set."""
    chosen: list[int] = []
    with (
        mock.patch.dict("os.environ", LOCAL_RANK=str(local_rank)),
        mock.patch("torch.cuda.is_available", return_value=count > 0),
        mock.patch("torch.cuda.device_count", return_value=count),
        mock.patch("torch.cuda.current_device", side_effect=lambda: chosen[-1] if chosen else current),
        mock.patch("torch.cuda.set_device", chosen.append),
        mock.patch("tp_plugin.mesh.dist.get_backend_config", return_value=backend),
        mock.patch("tp_plugin.mesh.bound_device", return_value=bound),
    ):
        yield chosen


DEVICES = {
    "its own": ({}, [2]),
    "the one the group is bound to": ({"bound": torch.device("cuda", 3)}, [3]),
    "one that was chosen stays": ({"current": 1}, []),
    "the only one it sees": ({"count": 1}, []),
    "none": ({"count": 0}, []),
    "gloo sends from the host": ({"backend": "cpu:gloo,cuda:gloo"}, []),
    "either backend": ({"backend": "cpu:gloo,cuda:nccl"}, [2]),
}


@pytest.mark.parametrize("name", DEVICES)
def test_a_process_takes_its_own_gpu(name):
    options, expected = DEVICES[name]
    with a_host_of_gpus(2, **options) as chosen:
        take_device()
        take_device()
    assert chosen == expected


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("cuda:nccl", "cuda:1"),
        ("cpu:gloo,cuda:nccl", "cuda:1"),  # which init_process_group makes when it is given no backend
        ("cpu:gloo,cuda:gloo", "cpu"),
        ("cpu:gloo", "cpu"),
        (None, "cpu"),
    ],
)
def test_what_is_sent_lies_where_the_groups_backend_takes_it(backend, expected):
    with (
        mock.patch("tp_plugin.mesh.dist.get_backend_config", return_value=backend),
        mock.patch("torch.accelerator.current_accelerator", return_value=torch.device("cuda")),
        mock.patch("torch.accelerator.current_device_index", return_value=1),
    ):
        assert comm_device(None if backend is None else mock.Mock()) == torch.device(expected)


def groups_made(bound: bool) -> tuple[list[int], list[str]]:
    """How many new groups a mesh of tp 1 and then one of tp 2 make, and how."""
    calls: list[str] = []
    new, enumerated = distributed_c10d.new_group, dist.new_subgroups_by_enumeration

    def split(*, split_ranks):
        calls.append("split")
        return enumerated(split_ranks)[0]

    def counted(*args, **options):
        calls.append("new")
        return new(*args, **options)

    counts = []
    with (
        mock.patch("tp_plugin.mesh.bound_device", return_value=torch.device("cpu") if bound else None),
        mock.patch("torch.distributed.distributed_c10d.new_group", counted),
        mock.patch("tp_plugin.mesh.dist.split_group", split),
    ):
        for tp in (1, 2, 2):
            before = calls.count("new"), calls.count("split")
            mesh = ParallelMesh.create(tp)
            counts.append(calls.count("split") - before[1] if bound else calls.count("new") - before[0])
    whole = ParallelMesh.create(1)
    assert whole.tp_group is None
    assert whole.dp_group is dist.group.WORLD
    assert (whole.dp_rank, whole.dp_size, whole.tp_size) == (dist.get_rank(), 4, 1)
    return counts, dist.get_process_group_ranks(mesh.tp_group)


@pytest.mark.parametrize(("bound", "expected"), [(False, [0, 4, 0]), (True, [0, 2, 0])])
def test_groups_are_made_once_and_none_for_one_rank(bound, expected):
    """Where NCCL's world is bound to devices, a mesh costs two splits of it, whatever its size."""
    for rank, (counts, ranks) in enumerate(on_ranks(4, groups_made, bound)):
        assert counts == expected
        assert ranks == [rank // 2 * 2, rank // 2 * 2 + 1]


def groups_of_mesh_and_engine(first: str) -> bool:
    import deepspeed
    from deepspeed.utils import groups

    import tp_plugin

    tp_plugin.register()
    deepspeed.init_distributed("gloo")
    if first == "engine":
        groups._init_tp_mesh_device(2)
    mesh = ParallelMesh.create(2)
    groups._init_tp_mesh_device(2)
    tensor, data = groups.get_tensor_model_parallel_group(), groups.get_data_parallel_group()
    return mesh.tp_group is tensor and mesh.dp_group is data


@pytest.mark.parametrize("first", ["engine", "mesh"])
def test_deepspeeds_engine_and_our_mesh_share_their_groups(first):
    assert on_ranks(2, groups_of_mesh_and_engine, first) == [True, True]


def device_when_groups_are_made() -> list[list[int]]:
    found: list[list[int]] = []
    made = dist.new_subgroups_by_enumeration
    with a_host_of_gpus(dist.get_rank() + 1) as chosen:

        def seen(*args, **options):
            found.append(list(chosen))
            return made(*args, **options)

        with mock.patch("torch.distributed.new_subgroups_by_enumeration", seen):
            ParallelMesh.create(2)
    return found


def test_the_gpu_is_taken_before_the_first_collective():
    assert on_ranks(2, device_when_groups_are_made) == [[[1], [1]], [[2], [2]]]


def test_world_that_tp_does_not_divide_is_refused_everywhere():
    errors = errors_on_ranks(3, ParallelMesh.create, 2)
    assert len(set(errors)) == 1
    assert "world size 3 is not divisible by tp_size 2" in errors[0]
    assert "[1, 3]" in errors[0]


def test_one_process_needs_no_group():
    assert ParallelMesh.create(1).tp_size == 1
    with pytest.raises(TensorParallelError, match="accelerate launch"):
        ParallelMesh.create(2)
    x = torch.ones(2)
    assert copy_to_region(x, None) is x
