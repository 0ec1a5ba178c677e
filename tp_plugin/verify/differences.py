"""What counts as different, of a step that was computed twice."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from tp_plugin.lazy import materialise_outputs

TRAINERS_LOSS = "the trainer's loss"
POSITIONS = 32  # of each row, whose logits are compared
LIMITS = {"loss": 1e-4, "outputs": 1e-3}
"""Largest relative differences of what is computed in single or double precision; sound models show 1e-7 to 1e-5."""
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
        value, kind = ours[name], "loss" if name in ("loss", TRAINERS_LOSS) else "outputs"
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


def note_norms(model: nn.Module, norms: dict[str, float]) -> Callable[[], None]:
    """``norms`` gets that of the first output of every layer (an entry of a list of modules, or a child of the model),
    in the order in which they finish, until what is returned is called."""
    handles = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2].isdigit() or name.count(".") <= 1:

            def note(_m: nn.Module, _a: Any, output: Any, name: str = name) -> None:
                first = output[0] if isinstance(output, tuple | list) and output else output
                if type(first) in (torch.Tensor, nn.Parameter) and first.is_floating_point():
                    norms.setdefault(name, float(first.detach().float().norm()))

            handles.append(module.register_forward_hook(note))

    def stop() -> None:
        for handle in handles:
            handle.remove()

    return stop


def first_apart(ours: Mapping[str, float], plain: Mapping[str, float]) -> str:
    """The first layer whose norms are not those of :func:`note_norms` on the plain model; empty if none is."""
    for name, norm in plain.items():
        if name in ours and abs(ours[name] - norm) > 0.02 * max(norm, 1e-6):
            return name
    return ""
