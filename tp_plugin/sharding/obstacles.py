"""What about a model, as a user hands it over, speaks against sharding it."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.plans import Plan
from tp_plugin.sharding import adapters


def obstacle(model: nn.Module, *, unread: bool = False) -> str | None:
    """Why this model, as it is now, cannot be sharded; None if it can. ``unread``: its parameters are read later."""
    for name, param in model.named_parameters():
        if hasattr(param, "ds_id"):
            return (
                "the model was built under DeepSpeed's zero.Init, its parameters are partitioned over the wrong group; "
                "call tp_plugin.register() before it is loaded (python -m tp_plugin.run does), or build it outside of "
                "deepspeed.zero.Init."
            )
        if param.is_meta and not unread:
            return f"parameter {name!r} is on the meta device; load the weights before sharding."
        if param.grad is not None:
            return f"parameter {name!r} has a gradient already; shard before the first backward."
    library = adapters.of(model)
    if library is not None and (objection := library.obstacle(model)):
        return objection
    for name, module in model.named_modules():
        if library is None and (
            hasattr(module, "peft_config") or isinstance(getattr(module, "base_layer", None), nn.Module)
        ):
            return (
                f"{name or 'the model'} carries an adapter that tp_plugin does not know; call tp_plugin.register() "
                "first, or train the full model."
            )
        if type(module).__name__ == "OptimizedModule":
            return "the model is compiled already; compile it after sharding (or let the Trainer do it)."
    return None


def refuse_hooks(plan: Plan, find: Callable[[str], list[nn.Module]]) -> None:
    """Raise TensorParallelError if a gradient hook was put on a parameter that ``plan`` names.

    It was written for the gradient of the whole parameter and would be given a shard's, or a part of the sum.
    """
    for name in plan.placements:
        for module in find(name):
            for leaf, param in module.named_parameters(recurse=False):
                if param._backward_hooks or param._post_accumulate_grad_hooks:
                    raise TensorParallelError(
                        f"parameter '{name}.{leaf}' has a gradient hook, which would be given the gradient of this "
                        "rank's shard for the whole one; remove it, or register it after sharding on the shard."
                    )
