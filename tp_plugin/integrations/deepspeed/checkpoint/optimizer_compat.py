"""Optimizers whose states are compatible: one class can resume from the checkpoint of the other.

A class is compatible with itself, and DeepSpeed's kernels with the class of torch that they compute. The numbers are
the same there, though a name or the type of the step count may differ. Everything else is refused: states of RAdam and
NAdam have Adam's names and another meaning.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_LIBRARIES = ("torch", "deepspeed", "bitsandbytes", "apex", "transformers")
"""Libraries whose classes of one name differ; a user's class may move from module to module."""

Family = dict[tuple[str, str], dict[str, str | None]]
"""(library, class) -> state name -> its name in the family if that differs, or None if the state is unused."""

_ADAM: Family = {
    ("torch", "Adam"): {},
    ("torch", "AdamW"): {},
    ("deepspeed", "FusedAdam"): {},
    ("deepspeed", "DeepSpeedCPUAdam"): {},
}
_FAMILIES: tuple[Family, ...] = (
    _ADAM,
    {("deepspeed", "FusedLion"): {}, ("deepspeed", "DeepSpeedCPULion"): {"exp_avg_sq": None}},  # allocated, never used
    {("torch", "Adagrad"): {}, ("deepspeed", "DeepSpeedCPUAdagrad"): {"exp_avg_sq": "sum"}},
)
_PLAIN = {"amsgrad": False, "maximize": False, "bias_correction": True, "lr_decay": 0}
"""Options that some classes of a family lack, with the value that those compute with."""


def described(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Describe an optimizer's class for a manifest: ``class``, ``library`` and, of an Adam, ``decoupled``.

    ``decoupled``: weights decay by themselves (AdamW), not through the gradient (Adam).
    """
    kind = type(optimizer)
    found: dict[str, Any] = {"class": kind.__name__, "library": kind.__module__.partition(".")[0]}
    if (found["library"], found["class"]) in _ADAM:
        options = [group.get("decoupled_weight_decay", kind is torch.optim.AdamW) for group in optimizer.param_groups]
        found["decoupled"] = bool(getattr(optimizer, "adam_w_mode", all(options)))
    return found


def is_same(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> bool:
    """Return True if a manifest's optimizer is of the class of this one."""
    ours = described(optimizer)
    libraries = {saved.get("library", ours["library"]), ours["library"]}
    return saved["class"] == ours["class"] and (len(libraries) == 1 or not libraries & set(_LIBRARIES))


def state_mismatch(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> str | None:
    """Describe why ``optimizer`` cannot resume from a manifest's optimizer ("X and this ... is Y"); None if it can."""
    if is_same(saved, optimizer):
        return None
    ours = described(optimizer)
    if saved["class"] == ours["class"] and "library" in saved:
        theirs = f"{saved['class']} of {saved['library']}"
        return f"{theirs} and this engine's optimizer is {ours['class']} of {ours['library']}"
    between = f"{_name(saved)} and this engine's optimizer is {_name(ours)}"
    if _family(saved) is None or _family(saved) is not _family(ours) or _decoupled(saved) != _decoupled(ours):
        return between
    for group in saved["groups"]:
        options = {key: value for key, value in group["options"]["map"] if isinstance(key, str)}
        for name, plain in _PLAIN.items():
            known = all(name in own for own in optimizer.param_groups) and name == "bias_correction"
            if options.get(name, plain) != plain and not known:
                return f"{_name(saved)} with {name}={options[name]} and this engine's optimizer is {_name(ours)}"
    return None


def state_names(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """Name of each elementwise state of a manifest -> its name in this optimizer; unused states are omitted.

    Call it after :func:`state_mismatch` has returned None.
    """
    kinds = saved["elementwise"]
    family = _family(saved)
    if family is None or is_same(saved, optimizer):
        return {kind: kind for kind in kinds}
    theirs, ours = _own_names(family, saved), _own_names(family, described(optimizer))
    back = {common: own for own, common in ours.items() if common is not None}
    common = {kind: theirs.get(kind, kind) for kind in kinds}
    return {kind: back.get(name, name) for kind, name in common.items() if name is not None}


def _keys(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(library, class); an older manifest without a library may be of either."""
    libraries = [found["library"]] if "library" in found else ["torch", "deepspeed"]
    return [(library, found["class"]) for library in libraries]


def _family(found: Mapping[str, Any]) -> Family | None:
    return next((family for family in _FAMILIES if any(key in family for key in _keys(found))), None)


def _own_names(family: Family, found: Mapping[str, Any]) -> dict[str, str | None]:
    return next(family[key] for key in _keys(found) if key in family)


def _decoupled(found: Mapping[str, Any]) -> bool | None:
    """``decoupled`` of a manifest; for an older one without it, that of torch's class, and None for DeepSpeed's."""
    of_torch = {"AdamW": True, "Adam": False}.get(found["class"])
    return found.get("decoupled", of_torch)


def _name(found: Mapping[str, Any]) -> str:
    usual = {"AdamW": True, "Adam": False, "FusedAdam": True, "DeepSpeedCPUAdam": True}.get(found["class"])
    odd = found.get("decoupled", usual) != usual
    return found["class"] + (f" (decoupled weight decay: {found['decoupled']})" if odd else "")
