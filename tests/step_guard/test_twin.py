"""The guard's twin of a model: whole parameters, gathered once and not kept, and what counts as rounding."""

from __future__ import annotations

import weakref

import pytest
import torch

from tests.support.guarded import engine_of
from tests.support.models import make
from tests.support.ranks import on_ranks
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.param_info import update_info
from tp_plugin.step_guard.differences import first_mismatch
from tp_plugin.step_guard.gradients import GradientWatch
from tp_plugin.step_guard.guard import guard_of
from tp_plugin.step_guard.unsharded_view import unsharded_view


class Two(torch.nn.Module):
    """A part that is used and one whose output nobody looks at, as the last layer of LLaVA's vision tower."""

    def __init__(self):
        super().__init__()
        self.used, self.unused = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)
        for param in self.parameters():
            update_info(param, layout=ShardLayout.even(param.shape, 0, 2))

    def forward(self, x):
        self.unused(x)
        return self.used(x)


def test_an_output_that_nobody_uses_needs_no_gradient():
    model = Two()
    watch = GradientWatch(model)
    watch.start()
    model(torch.ones(1, 4)).sum().backward()
    assert watch.complete()
    assert watch.missing() is None


def test_the_twin_of_a_wrapped_forward_is_the_twins():
    model = Two()
    inner = model.forward
    model.forward = lambda x: inner(x) + 1  # as TRL wraps it, over a method of the sharded model
    ran = []
    model.used.register_forward_hook(lambda *_: ran.append("sharded"))
    for param in model.parameters():
        update_info(param, layout=None)
    twin = unsharded_view(model, ParallelMesh.single())
    x = torch.ones(1, 4)
    assert torch.equal(twin(x), model.used(x) + 1)
    ran.clear()
    twin(x)
    assert ran == []


def test_a_parameter_is_gathered_once_a_forward():
    model, reads = Two(), []
    for param in model.parameters():
        update_info(param, layout=None)
    twin = unsharded_view(model, ParallelMesh.single())
    parameters = vars(twin.used)["_parameters"]
    read = parameters._read
    parameters._read = lambda param: reads.append(1) or read(param)
    kind = type(twin.used)
    kind.forward, forward = lambda self, x: x @ self.weight + x @ self.weight + self.bias, kind.forward
    try:
        twin(torch.ones(1, 4))
    finally:
        kind.forward = forward
    assert len(reads) == 2, "weight and bias, once each"
    twin.used.weight  # noqa: B018
    assert len(reads) == 3, "outside of a forward a parameter is read anew"


def iterated(family, stage, dtype):
    """Names, shapes and dtypes that a twin's parameters say they have, and how far their values are from the truth."""
    engine, truth = engine_of(family, stage), dict(make(family).named_parameters())
    twin = unsharded_view(engine.module, guard_of(engine).mesh, dtype)
    told = {name: (list(param.shape), param.dtype) for name, param in twin.named_parameters()}
    assert told == {name: (list(param.shape), dtype or param.dtype) for name, param in truth.items()}
    assert all(param.requires_grad and isinstance(param, torch.nn.Parameter) for param in twin.parameters())
    with torch.no_grad():
        return max(float((param - truth[name]).abs().max()) for name, param in twin.named_parameters())


@pytest.mark.parametrize(("family", "stage", "dtype"), [("Gemma2", 1, None), ("Llama", 3, torch.float64)])
def test_iterating_over_the_twin_gives_whole_parameters(family, stage, dtype):
    assert on_ranks(2, iterated, family, stage, dtype) == [0, 0]


def test_iterated_parameters_are_read_when_used_and_not_kept():
    model, read = Two(), []
    for param in model.parameters():
        update_info(param, layout=ShardLayout.even((8, *param.shape[1:]), 0, 2))
    twin = unsharded_view(model, ParallelMesh.single())
    for module in (twin.used, twin.unused):
        gathered = vars(module)["_parameters"]

        def whole(param):
            made = param.detach().repeat(2, *[1] * (param.dim() - 1))
            assert all(earlier() is None for earlier in read), "one at a time"
            read.append(weakref.ref(made))
            return made

        gathered._read = whole
    first = next(twin.parameters())
    assert (first.shape, first.dtype, first.device.type) == ((8, 4), torch.float32, "cpu")
    assert read == []
    with torch.no_grad():
        norm = sum(float(param.norm()) for param in twin.parameters())
    assert len(read) == 4
    assert norm == pytest.approx(sum(2**0.5 * param.norm().item() for param in model.parameters()))


def test_rounding_is_no_difference_and_what_is_not_rounding_is_one():
    truth = {"loss": torch.tensor(0.693), "logits": torch.linspace(-1, 1, 4096).view(4, 1024)}
    rounded = {"loss": torch.tensor(0.60), "logits": truth["logits"] * 1.1}
    assert first_mismatch(rounded, truth, coarse=True) is None
    assert "loss 0.6 here, 0.693 there" in first_mismatch(rounded, truth)
    assert "logits by 0.1 of its norm" in first_mismatch(rounded | {"loss": truth["loss"]}, truth)
    for broken in ({"loss": torch.tensor(float("nan"))}, {"loss": torch.tensor(9.0)}, {"logits": -truth["logits"]}):
        assert first_mismatch(rounded | broken, truth, coarse=True) is not None
    few = {"loss": truth["loss"], "logits": torch.tensor([[0.01], [-0.02]])}
    assert first_mismatch(few | {"logits": torch.tensor([[0.02], [-0.01]])}, few, coarse=True) is None, (
        "noise of two numbers"
    )
