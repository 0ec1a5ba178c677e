"""What the fuzzer's own test breaks in a sharded run, to see it found."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from unittest import mock

import torch.distributed as dist

from tests.fuzz import train
from tp_plugin import TensorParallelError, collectives
from tp_plugin.param_info import layout_of


@contextlib.contextmanager
def doubled_gradient() -> Iterator[None]:
    """The door of every region gives twice the gradient."""
    right = collectives._Copy.backward

    def wrong(ctx, grad):
        return 2 * right(ctx, grad)[0], None, None

    with mock.patch.object(collectives._Copy, "backward", staticmethod(wrong)):
        yield


@contextlib.contextmanager
def shifted_output() -> Iterator[None]:
    """Every row-parallel layer adds to its first feature; a factor would be lost in the norms behind the residuals."""
    right = collectives._Reduce.forward

    def wrong(ctx, x, group, purpose):
        x[..., 0] += 0.5
        return right(ctx, x, group, purpose)

    with mock.patch.object(collectives._Reduce, "forward", staticmethod(wrong)):
        yield


@contextlib.contextmanager
def one_rank_raises() -> Iterator[None]:
    """The last rank fails before its engine is made, while the others wait for it."""
    if dist.get_rank() == dist.get_world_size() - 1:
        raise RuntimeError("on purpose")
    yield


@contextlib.contextmanager
def refused_unlike() -> Iterator[None]:
    """Each rank refuses in words of its own."""
    raise TensorParallelError(f"refused by rank {dist.get_rank()}")
    yield


@contextlib.contextmanager
def drifting_replica() -> Iterator[None]:
    """The last rank's copy of every replicated parameter is another one after training."""
    right = train.by_hand

    def wrong(case, engine, run):
        right(case, engine, run)
        if dist.get_rank() == dist.get_world_size() - 1:
            for param in engine.module.parameters():
                if layout_of(param) is None:
                    param.data.add_(1e-6)

    with mock.patch.object(train, "by_hand", wrong):
        yield
