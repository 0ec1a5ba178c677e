"""What counts as equal: the differences of two runs of a case, and how large each may be."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from tests.fuzz.build import Run
from tests.fuzz.case import Case

LIMITS = {"loss": 2e-5, "norm": 1e-4, "grad": 1e-4, "update": 3e-4, "logits": 2e-4, "evaluated": 2e-5}
"""Relative errors. One beyond is compared with that of one process in float32 against itself in float64."""
ROUNDING = 10.0
"""How many times the rounding of one process a difference may be."""
REPLICAS = 2e-8
"""Absolute; a unit in the last place of an adapter's weight, that lies at another alignment in each rank's buffer."""

Errors = dict[str, tuple[float, str]]  # what is compared -> its worst relative error, and where that is


def differences(ours: Run, theirs: Run, rank: int | None) -> Errors:
    """``ours`` against the truth ``theirs``.

    Args:
        rank: tensor-parallel rank that ``ours`` holds gradients of, shards where :attr:`Run.layouts` says so; None if
            it is another run of one process.
    """
    found: Errors = {}
    for kind, where, error in _each(ours, theirs, rank):
        if kind not in found or not error <= found[kind][0]:
            found[kind] = (error, where)
    return found


def _each(ours: Run, theirs: Run, rank: int | None) -> Iterator[tuple[str, str, float]]:
    for step, (mine, expected) in enumerate(zip(ours.losses, theirs.losses, strict=True)):
        if mine is not None:
            yield "loss", f"step {step}: {mine:.6g}, right {expected:.6g}", number(mine, expected)
    for step, (mine, expected) in enumerate(zip(ours.norms, theirs.norms, strict=True)):
        if mine is not None:
            yield "norm", f"step {step}: {mine:.6g}, right {expected:.6g}", number(mine, expected)
    for step, (mine_of, expected_of) in enumerate(zip(ours.grads, theirs.grads, strict=False)):
        least = 1e-3 * max([float(g.norm()) for g in expected_of.values()], default=0.0)
        for name, mine in mine_of.items():
            expected = expected_of.get(name, torch.zeros(()))
            if name in expected_of and rank is not None and name in ours.layouts:
                expected = ours.layouts[name].shard(expected, rank)
            yield "grad", f"step {step} {name}", tensor(mine, expected.expand(mine.shape), least)
        for name in expected_of.keys() - mine_of.keys():
            yield "grad", f"step {step} {name} has none", math.inf
    if ours.params:
        trained = {name for grads in theirs.grads for name in grads}
        updates = {name: theirs.params[name].double() - theirs.start[name].double() for name in trained}
        least = 1e-2 * max([_rms(update) for update in updates.values()], default=0.0)
        for name, update in updates.items():
            mine = ours.params[name].double() - theirs.start[name].double()
            yield "update", name, tensor(mine, update, least * update.numel() ** 0.5)
    if ours.logits is not None and theirs.logits is not None:
        yield "logits", "evaluation", tensor(ours.logits, theirs.logits)
        said = f"{ours.evaluated:.6g}, right {theirs.evaluated:.6g}"
        yield "evaluated", said, number(ours.evaluated, theirs.evaluated)


def number(ours: float, theirs: float) -> float:
    """The relative error, absolute below 1e-3; 0 of two that are not finite alike."""
    if not (math.isfinite(ours) and math.isfinite(theirs)):
        return 0.0 if str(ours) == str(theirs) else math.inf
    return abs(ours - theirs) / max(abs(theirs), 1e-3)


def tensor(ours: torch.Tensor, theirs: torch.Tensor, least: float = 0.0) -> float:
    """Norm of the difference over that of the truth, or over ``least``; not finite where that is not."""
    if ours.shape != theirs.shape:
        return math.inf
    ours, theirs = ours.detach().double(), theirs.detach().double()
    finite = theirs.isfinite()
    if not torch.equal(finite, ours.isfinite()):
        return math.inf
    ours, theirs = ours[finite], theirs[finite]
    return float((ours - theirs).norm() / theirs.norm().clamp_min(max(least, 1e-9)))


def _rms(x: torch.Tensor) -> float:
    return float(x.norm()) / max(1, x.numel()) ** 0.5


def beyond(case: Case, errors: Errors, noise: Errors | None = None) -> dict[str, str]:
    """What is larger than it may be, in words. ``noise``: errors of one process in float32."""
    found = {}
    for kind, (error, where) in errors.items():
        limit = max(LIMITS[kind], ROUNDING * noise[kind][0] if noise and kind in noise else 0.0)
        if case.offload and kind in ("update", "logits"):
            limit *= 3
        if not error <= limit:
            found[kind] = f"{kind} off by {error:.1e} ({where}), at most {limit:.0e}"
    return found
