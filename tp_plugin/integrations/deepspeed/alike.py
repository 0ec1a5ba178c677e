"""Which optimizers' states mean the same, so that one can go on with what another kept.

The same class always can. Of different classes only DeepSpeed's kernels and the class of torch that they compute: the
numbers are the same, though a name or the type of the step count may not be. Everything else is refused: RAdam and
NAdam keep what looks like Adam's and mean something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

_LIBRARIES = ("torch", "deepspeed", "bitsandbytes", "apex", "transformers")
"""Whose classes of one name differ; a class of one's own may move from module to module."""

Family = dict[tuple[str, str], dict[str, str | None]]
"""(library, class) -> its own names of the states that have another name, or no use, in the family."""

_ADAM: Family = {
    ("torch", "Adam"): {},
    ("torch", "AdamW"): {},
    ("deepspeed", "FusedAdam"): {},
    ("deepspeed", "DeepSpeedCPUAdam"): {},
}
_FAMILIES: tuple[Family, ...] = (
    _ADAM,
    {("deepspeed", "FusedLion"): {}, ("deepspeed", "DeepSpeedCPULion"): {"exp_avg_sq": None}},  # made, never used
    {("torch", "Adagrad"): {}, ("deepspeed", "DeepSpeedCPUAdagrad"): {"exp_avg_sq": "sum"}},
)
_PLAIN = {"amsgrad": False, "maximize": False, "bias_correction": True, "lr_decay": 0}
"""Options that not every class of a family has, at what those without compute."""


def described(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What a manifest says of an optimizer's class: ``class``, ``library`` and, of an Adam, ``decoupled``.

    ``decoupled`` is whether weights decay by themselves (AdamW) and not through the gradient (Adam).
    """
    kind = type(optimizer)
    found: dict[str, Any] = {"class": kind.__name__, "library": kind.__module__.partition(".")[0]}
    if (found["library"], found["class"]) in _ADAM:
        options = [group.get("decoupled_weight_decay", kind is torch.optim.AdamW) for group in optimizer.param_groups]
        found["decoupled"] = bool(getattr(optimizer, "adam_w_mode", all(options)))
    return found


def is_same(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> bool:
    """Whether a manifest's optimizer is of the class of this one."""
    ours = described(optimizer)
    libraries = {saved.get("library", ours["library"]), ours["library"]}
    return saved["class"] == ours["class"] and (len(libraries) == 1 or not libraries & set(_LIBRARIES))


def difference(saved: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> str | None:
    """Why the state of a manifest's optimizer cannot be this one's, as two phrases ("X and this ... is Y"), or None."""
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
    """Name of each elementwise state of a manifest -> its name in this optimizer; what that has no use for is left out.

    Only for what :func:`difference` finds none in.
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
    """(library, class); a manifest of before libraries were written down may be of either."""
    libraries = [found["library"]] if "library" in found else ["torch", "deepspeed"]
    return [(library, found["class"]) for library in libraries]


def _family(found: Mapping[str, Any]) -> Family | None:
    return next((family for family in _FAMILIES if any(key in family for key in _keys(found))), None)


def _own_names(family: Family, found: Mapping[str, Any]) -> dict[str, str | None]:
    return next(family[key] for key in _keys(found) if key in family)


def _decoupled(found: Mapping[str, Any]) -> bool | None:
    """Of a manifest of before it was written down: what torch's class says, and of DeepSpeed's that it is not known."""
    of_torch = {"AdamW": True, "Adam": False}.get(found["class"])
    return found.get("decoupled", of_torch)


def _name(found: Mapping[str, Any]) -> str:
    usual = {"AdamW": True, "Adam": False, "FusedAdam": True, "DeepSpeedCPUAdam": True}.get(found["class"])
    odd = found.get("decoupled", usual) != usual
    return found["class"] + (f" (decoupled weight decay: {found['decoupled']})" if odd else "")
