"""What counts as different, of a step that was computed twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch

from tp_plugin.lazy import materialise_outputs

POSITIONS = 32  # of each row, whose logits are compared
LIMITS = {"loss": 1e-3, "outputs": 1e-2}
"""Largest relative differences of what is computed in single or double precision."""
COARSE = {"loss": 0.5, "outputs": 0.5}
"""The same of what training computes in half precision, whose own rounding may change a loss of few numbers by much."""
MANY = 1000  # numbers, of which the norm says something in half precision

Seen = dict[str, torch.Tensor]
"""The loss and samples of what the model gave, by name, in single precision."""


def difference(ours: Seen, plain: Seen, *, coarse: bool = False) -> str | None:
    """In words what differs by more than is allowed; None if nothing does."""
    if ours.keys() != plain.keys():
        return f"it gives {', '.join(ours) or 'nothing'} here and {', '.join(plain) or 'nothing'} there"
    for name, truth in plain.items():
        value, kind = ours[name], "loss" if name == "loss" else "outputs"
        if value.shape != truth.shape:
            return f"{name} has shape {list(value.shape)} here and {list(truth.shape)} there"
        error, limit = relative(value, truth), (COARSE if coarse else LIMITS)[kind]
        if coarse and value.isfinite().all() and (kind == "loss" or value.numel() < MANY):
            allowed = kind != "loss" or abs(float(value - truth)) <= 1 + limit * abs(float(truth))
        else:
            allowed = error <= limit
        if not allowed and not truth.isnan().any():
            if value.numel() == 1:
                return f"{name} {float(value):.6g} here, {float(truth):.6g} there (allowed {limit:.1g} of it)"
            return f"{name} by {error:.2g} of its norm (allowed {limit:.1g})"
    return None


def relative(value: torch.Tensor, truth: torch.Tensor) -> float:
    value, truth = value.double(), truth.double()
    floor = 0.05 if truth.numel() == 1 else 1e-6  # a loss near zero is compared as it is
    return float((value - truth).norm() / truth.norm().clamp_min(floor))


def named_tensors(output: Any) -> list[tuple[str, torch.Tensor]]:
    """What a forward gives, by name: floating-point tensors of at most three dimensions."""
    if isinstance(output, torch.Tensor):
        items: list[tuple[str, Any]] = [("output", output)]
    elif isinstance(output, Mapping):
        items = list(output.items())
    elif isinstance(output, tuple | list):
        items = [(f"output {place}", item) for place, item in enumerate(output)]
    else:
        items = list(vars(output).items()) if dataclasses.is_dataclass(output) else []
    return [
        (str(name), item)
        for name, item in items
        if isinstance(item, torch.Tensor) and item.is_floating_point() and item.dim() <= 3
    ]


@torch.no_grad()
def sample(tensor: torch.Tensor) -> torch.Tensor:
    """The last positions of each row, computed if they had not been."""
    part = tensor[:, -POSITIONS:] if tensor.dim() == 3 else tensor[-POSITIONS:] if tensor.dim() == 2 else tensor
    return materialise_outputs(part).detach().float().clone()
