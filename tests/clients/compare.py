"""What a training of a program reported and saved, and how far two are apart."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.clients.program import LAST, MERGED

EVALUATED = r"eval_(loss|\w*acc\w*)"
LIMITS = {"loss": 1e-5, "norm": 1e-4, "weights": 1e-4}
"""Largest relative difference to the same program in one process: of any step's loss and gradient norm, and of any
tensor saved at the end."""


@dataclasses.dataclass
class Outcome:
    """What a training left.

    Attributes:
        losses: of all steps, then what every evaluation found.
        norms: of the gradients of all steps.
        weights: the tensors saved at the end, and those of a merged model as ``merged NAME``.
        answers: of the program's own inference.
    """

    losses: list[float]
    norms: list[float]
    weights: dict[str, torch.Tensor]
    answers: list[str] = dataclasses.field(default_factory=list)


def outcome(folder: Path) -> Outcome:
    """Read ``trainer_state.json`` below ``folder``, and the weights beside it or in its last checkpoint, if any.

    Raises:
        FileNotFoundError: it reported nothing.
    """
    last = folder / LAST
    states = sorted((last if last.exists() else folder).rglob("trainer_state.json"), key=lambda path: len(path.parts))
    if not states:
        raise FileNotFoundError(f"{folder} has no trainer_state.json")
    logs = json.loads(states[0].read_text())["log_history"]
    weights = next((found for path in states if (found := _weights(path.parent))), None) or {}
    steps = [log for log in logs if "loss" in log and "grad_norm" in log]
    losses = [log["loss"] for log in steps]
    losses += [value for log in logs for key, value in sorted(log.items()) if re.fullmatch(EVALUATED, key)]
    merged = {f"merged {name}": tensor for path in folder.rglob(MERGED) for name, tensor in _weights(path).items()}
    return Outcome(losses, [float(log["grad_norm"]) for log in steps], weights | merged)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    files = [*folder.glob("model*.safetensors"), *folder.glob("adapter_model.safetensors")]
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def differences(one: Outcome, other: Outcome) -> dict[str, float]:
    """Largest relative differences by the names of :data:`LIMITS`; infinite where something is missing.

    Other answers make the weights infinitely different.
    """
    if len(one.losses) != len(other.losses) or not one.losses:
        return dict.fromkeys(LIMITS, float("inf"))
    same = one.weights.keys() == other.weights.keys() and one.weights and one.answers == other.answers
    return {
        "loss": _largest(one.losses, other.losses),
        "norm": _largest(one.norms, other.norms),
        "weights": max(_apart(one.weights[name], other.weights[name]) for name in one.weights)
        if same
        else float("inf"),
    }


def _largest(one: list[float], other: list[float]) -> float:
    return max(abs(a - b) / max(abs(a), 1e-12) for a, b in zip(one, other, strict=True))


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    if one.shape != other.shape:
        return float("inf")
    return float((one.double() - other.double()).norm() / one.double().norm().clamp(min=1e-12))
