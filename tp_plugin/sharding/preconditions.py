"""Checks of a user's model before it is sharded."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.layers.instance_forwards import hidden, hides
from tp_plugin.partitioned import is_partitioned
from tp_plugin.plans import Plan
from tp_plugin.plans import plan as p
from tp_plugin.plans.from_transformers import parts_of
from tp_plugin.sharding import adapters

_OF_A_CLASS = (p.COLUMN_GATHER, p.ROW, p.ROW_SPLIT, p.EXPERTS, p.VOCAB_EMBEDDING, p.VOCAB_HEAD)
"""Styles whose class has another forward, as a column has where its heads are repeated."""


def unmet_precondition(model: nn.Module, *, unread: bool = False) -> str | None:
    """Error text if this model cannot be sharded; None if it can. ``unread``: its parameters are read later."""
    for name, param in model.named_parameters():
        if is_partitioned(param):
            return (
                "the model was built under deepspeed.zero.Init, which uses the wrong group; call "
                "tp_plugin.register() before, or build it outside of deepspeed.zero.Init."
            )
        if (owner := _sharded_by(param)) is not None:
            return f"parameter {name!r} is a shard already, of {owner}; build or load the model without it."
        if param.is_meta and not unread:
            return f"parameter {name!r} is on the meta device; load the weights before sharding."
        if param.grad is not None:
            return f"parameter {name!r} has a gradient already; shard before the first backward."
    if any(getattr(part, "use_kernels", False) for part in parts_of(model).values()):
        return (
            "the model was loaded with use_kernels=True, whose replaced forwards bypass sharded layers; "
            "load it without."
        )
    if method := _quantised_by(model):
        return (
            f"the model is quantised ({method}) and cannot be sharded; load the checkpoint it was made from, or "
            "convert a GGUF file by tp-plugin convert-gguf."
        )
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


def _sharded_by(param: nn.Parameter) -> str | None:
    """Whose shard ``param`` is: its type or mark says; None if it is whole, as far as can be seen."""
    if any(kind.__name__ == "DTensor" for kind in type(param).__mro__):
        return "a DTensor (transformers' tp_plan or distributed_config, or FSDP)"
    if getattr(param, "tensor_model_parallel", False):
        return "DeepSpeed's AutoTP or Megatron"
    return None


def _quantised_by(model: nn.Module) -> str | None:
    """The method in the config of a quantised model; transformers removes it from a model that it dequantised."""
    methods = (quantisation_of(getattr(part, "config", None)) for part in parts_of(model).values())
    return next((method for method in methods if method), None)


def quantisation_of(config: object) -> str | None:
    """The method by which a transformers config says that its weights are quantised; None if they are not."""
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    method = found.get("quant_method") if isinstance(found, dict) else found.quant_method
    return str(getattr(method, "value", method))


def refuse_hooks(plan: Plan, find: Callable[[str], list[nn.Module]]) -> None:
    """Raise TensorParallelError if a parameter that ``plan`` names has a gradient hook.

    The hook expects the full gradient and would get a shard's, or a part of the sum. Forwards set on instances are
    checked too, see :func:`refuse_hidden`.
    """
    refuse_hidden(plan, find)
    for name in plan.placements:
        for module in find(name):
            for leaf, param in module.named_parameters(recurse=False):
                if param._backward_hooks or param._post_accumulate_grad_hooks:
                    raise TensorParallelError(
                        f"parameter '{name}.{leaf}' has a gradient hook, which would get the gradient of this rank's "
                        "shard; remove it, or register it after sharding."
                    )


def refuse_hidden(plan: Plan, find: Callable[[str], list[nn.Module]]) -> None:
    """Raise TensorParallelError if a forward on an instance would hide that of a sharded layer."""
    for name, placement in plan.placements.items():
        if placement.style in _OF_A_CLASS or placement.outputs is not None:
            for module in find(name):
                if hides(module):
                    raise TensorParallelError(hidden(name))
