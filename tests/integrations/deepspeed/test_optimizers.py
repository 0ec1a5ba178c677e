"""Which optimizers are elementwise, found out by trying them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from tests.support.stepped import ClippedByTensor, Stepped
from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.deepspeed.optimizers import (
    NOT_ELEMENTWISE,
    is_elementwise,
    refuse_foreign_parameters,
    refuse_optimizer,
)


class ByTrustRatio(Stepped):
    def twist(self, update, param):
        return update * (param.norm() / update.norm()).clamp(max=10)


class CentredByRow(Stepped):
    def twist(self, update, param):
        return update - update.mean(dim=-1, keepdim=True)


class CentredByColumn(Stepped):
    def twist(self, update, param):
        return update - update.mean(dim=0, keepdim=True)


class Signed(Stepped):
    def twist(self, update, param):
        return update.sign()


class Noisy(Stepped):
    def twist(self, update, param):
        return update + torch.randn_like(update)


class OfAModel(Stepped):
    def __init__(self, model, *, rank):
        super().__init__(model.parameters())


class Capped(torch.optim.AdamW):
    """The second step's gradients are larger: the root of their mean ratio to what was seen caps the rate."""

    @torch.no_grad()
    def step(self, closure=None):
        held = [group["lr"] for group in self.param_groups]
        for group in self.param_groups:
            ratios = [
                p.grad.square() / self.state[p]["exp_avg_sq"].clamp(min=1e-12) for p in group["params"] if self.state[p]
            ]
            group["lr"] /= max([1.0, *(float(ratio.mean().sqrt()) for ratio in ratios)])
        super().step()
        for group, lr in zip(self.param_groups, held, strict=True):
            group["lr"] = lr


def groups() -> list[dict]:
    """As a trainer makes them, at the moment when a warmup has set the rate to 0."""
    layer = nn.Linear(3, 5)
    return [
        {"params": [layer.weight], "weight_decay": 0.1, "lr": 0.0},
        {"params": [layer.bias], "weight_decay": 0.0, "lr": 0.0},
    ]


ELEMENTWISE = {
    **{
        kind.__name__: (kind, {})
        for kind in (
            *(torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop),
            *(torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax, torch.optim.Adadelta, torch.optim.Rprop),
        )
    },
    "AdamW fused": (torch.optim.AdamW, {"fused": True}),
    "AdamW capturable, one tensor at a time": (torch.optim.AdamW, {"capturable": True, "foreach": False}),
    "AdamW amsgrad, a tensor as rate": (torch.optim.AdamW, {"amsgrad": True, "lr": torch.tensor(1e-3)}),
    "SGD nesterov": (torch.optim.SGD, {"lr": 1.0, "momentum": 0.9, "nesterov": True}),
    "signs": (Signed, {}),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_ones_are_taken_and_left_alone(name, caplog):
    kind, options = ELEMENTWISE[name]
    optimizer = kind(groups(), **options)
    before = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.param_groups)
    state = torch.random.get_rng_state()
    assert is_elementwise(optimizer) is True
    refuse_optimizer({}, optimizer)
    assert repr((optimizer.state_dict(), optimizer.param_groups)) == repr(before)
    assert torch.equal(state, torch.random.get_rng_state())
    assert not caplog.text


@pytest.mark.parametrize("kind", [ClippedByTensor, ByTrustRatio, CentredByRow, CentredByColumn, Capped])
def test_a_step_that_looks_further_than_an_element_is_refused(kind):
    optimizer = kind(groups())
    for _ in range(2):  # a refused one is not taken when it is met again
        with pytest.raises(TensorParallelError, match=f"the optimizer {kind.__name__} is not elementwise"):
            refuse_optimizer({}, optimizer)


@pytest.mark.parametrize("make", [lambda: OfAModel(nn.Linear(3, 5), rank=1), lambda: Noisy(groups())])
def test_what_cannot_be_tried_is_said_once(make, caplog):
    optimizer = make()
    for _ in range(2):
        refuse_optimizer({}, optimizer)
    said = caplog.text
    assert is_elementwise(optimizer) is None
    assert said.count("could not be tried") == 1
    assert f"the optimizer {type(optimizer).__name__} could not be tried" in said


@pytest.mark.parametrize("name", ["StableAdamW", "NovoGrad", "AdamP", "SGDP", "LBFGS", "PSGDKron", "Kron"])
def test_names_that_are_known(name):
    assert any(part in name.lower() for part in NOT_ELEMENTWISE)
    with pytest.raises(TensorParallelError, match=f"the optimizer {name} needs full weight matrices"):
        refuse_optimizer({"optimizer": {"type": name}}, None)


@pytest.mark.parametrize(("stage", "replicas", "trained"), [(1, 1, True), (0, 2, True), (0, 1, True), (3, 2, False)])
def test_parameters_beside_the_model_are_refused_where_they_would_fail_or_drift(stage, replicas, trained):
    model, beside = nn.Linear(3, 5), nn.Linear(5, 2).requires_grad_(trained)
    optimizer = torch.optim.SGD([*model.parameters(), *beside.parameters()], lr=0.1)
    if trained and (stage, replicas) != (0, 1):
        with pytest.raises(TensorParallelError, match=r"2 parameters \(one of shape \(2, 5\)\) that are no part of"):
            refuse_foreign_parameters(model, optimizer, stage, replicas)
    else:
        refuse_foreign_parameters(model, optimizer, stage, replicas)
