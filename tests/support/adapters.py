"""PEFT adapters for the parity harness, none of whose tensors is left at a value that hides bugs (LoRA's B is zero)."""

from __future__ import annotations

from typing import Any

import peft
import torch


def adapt(model: torch.nn.Module, kind: str = "Lora", *, others: tuple[str, ...] = (), **options: Any) -> Any:
    """``get_peft_model`` with a ``{kind}Config``, on a whole model or on a sharded one; the same numbers for both.

    ``others``: names of further adapters, of which none is active.
    """
    config = getattr(peft, f"{kind}Config")
    torch.manual_seed(77)
    before = {id(param) for param in model.parameters()}
    found = peft.get_peft_model(model, config(**{"task_type": "CAUSAL_LM"} | options))
    for other in others:
        found.add_adapter(other, config(**{"task_type": "CAUSAL_LM"} | options))
    with torch.no_grad():
        for index, (_, param) in enumerate(sorted(found.named_parameters())):
            if id(param) in before:
                continue
            layout = getattr(param, "tp_layout", None)
            shape = param.shape if layout is None else layout.shape
            noise = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(9000 + index))
            param.add_(noise if layout is None else layout.shard(noise, _rank(found)))
    return found


def _rank(model: torch.nn.Module) -> int:
    from tp_plugin.sharding import state_of

    record = state_of(model)
    return 0 if record is None else record.mesh.tp_rank
