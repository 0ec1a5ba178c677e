"""Limits on the difference of a step that was computed twice, and its outputs."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tp_plugin.lazy import materialise_outputs
from tp_plugin.model_check.parity import first_apart, recorded_outputs

TRAINERS_LOSS = "the trainer's loss"
POSITIONS = 32  # of each row: their logits are compared
LIMITS = {"loss": 1e-4, "outputs": 1e-3}
"""Largest relative differences of values computed in single or double precision; sound models show 1e-7 to 1e-5."""
COARSE = {"loss": 0.5, "outputs": 0.5}
"""The same in half precision, whose own rounding may change a loss of few numbers by much."""
MANY = 1000  # from this size on the norm of a tensor is compared in half precision

Outputs = dict[str, torch.Tensor]
"""The loss and samples of the model's outputs, by name, in single precision."""


def first_mismatch(ours: Outputs, reference: Outputs, *, coarse: bool = False) -> str | None:
    """Describe the first difference beyond its limit; None if there is none."""
    if ours.keys() != reference.keys():
        return f"it gives {', '.join(ours) or 'nothing'} here and {', '.join(reference) or 'nothing'} there"
    for name, expected in reference.items():
        value, kind = ours[name], "loss" if name in ("loss", TRAINERS_LOSS) else "outputs"
        if value.shape != expected.shape:
            return f"{name} has shape {list(value.shape)} here and {list(expected.shape)} there"
        error, limit = relative(value, expected), (COARSE if coarse else LIMITS)[kind]
        if coarse and value.isfinite().all() and (kind == "loss" or value.numel() < MANY):
            allowed = kind != "loss" or abs(float(value - expected)) <= 1 + limit * abs(float(expected))
        else:
            allowed = error <= limit
        if not allowed and not expected.isnan().any():
            if value.numel() == 1:
                return f"{name} {float(value):.6g} here, {float(expected):.6g} there (allowed {limit:.1g} of it)"
            return f"{name} by {error:.2g} of its norm (allowed {limit:.1g})"
    return None


def described(ours: Outputs, reference: Outputs, rows: int, of: int) -> str:
    """Describe what was compared on ``rows`` of ``of`` rows, and its largest relative difference by quantity."""
    losses = [name for name in (TRAINERS_LOSS, "loss") if name in reference]
    found: dict[str, float] = {}
    for name in sorted(reference.keys() - set(losses)):
        output = name.partition(" of forward ")[0]
        found[output] = max(found.get(output, 0.0), relative(ours[name], reference[name]))
    parts = [f"{name} {float(ours[name]):.4f} within {relative(ours[name], reference[name]):.0e}" for name in losses]
    parts += [] if losses else ["no loss, which is made of the outputs later"]
    parts += [f"{output} within {error:.0e}" for output, error in found.items()]
    return ", ".join(parts) + (f" ({rows} of {of} rows)" if of else "")


def relative(value: torch.Tensor, expected: torch.Tensor) -> float:
    """Norm of the difference, relative to that of ``expected``."""
    value, expected = value.double(), expected.double()
    floor = 0.05 if expected.numel() == 1 else 1e-6  # a loss near zero is compared as it is
    return float((value - expected).norm() / expected.norm().clamp_min(floor))


def named_tensors(output: Any) -> list[tuple[str, torch.Tensor]]:
    """Floating-point tensors of at most three dimensions among a forward's output, by name."""
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


@contextlib.contextmanager
def layer_norms(model: nn.Module, norms: dict[str, float]) -> Iterator[None]:
    """Fill ``norms`` with that of the first output of every layer, in the order in which they finish.

    A layer is an entry of a list of modules, or at most two levels below the model.
    """

    def norm(output: torch.Tensor) -> float:
        return float(output.detach().float().norm())

    def is_layer(name: str) -> bool:
        return name.rpartition(".")[2].isdigit() or name.count(".") <= 1

    with recorded_outputs(model, norm, is_layer) as found:
        try:
            yield
        finally:
            norms.update(found)


def first_layer_apart(ours: Mapping[str, float], reference: Mapping[str, float]) -> str:
    """Name the first layer whose norms differ; empty if none do. NaN differs from nothing: masks make it."""
    return first_apart(ours, reference, lambda _, a, b: not abs(a - b) > 0.02 * max(b, 1e-6)) or ""
