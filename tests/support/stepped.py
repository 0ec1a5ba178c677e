"""Optimizers written by hand, some of which look further than an element."""

from __future__ import annotations

import torch


class Stepped(torch.optim.Optimizer):
    """SGD with a twist of the update; what the twist needs is given by name and not kept."""

    def __init__(self, params, lr=1e-3, **twist):
        super().__init__(params, {"lr": lr})

    def twist(self, update: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
        return update

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(self.twist(param.grad, param), alpha=group["lr"])


class ClippedByTensor(Stepped):
    def twist(self, update, param):
        return update / max(1.0, float(update.norm()))
