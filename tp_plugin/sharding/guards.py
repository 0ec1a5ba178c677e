"""Hooks and refusals on a sharded model as a whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError
from tp_plugin.layers import VocabParallelHead
from tp_plugin.lazy import materialise_outputs
from tp_plugin.mesh import ParallelMesh
from tp_plugin.plans.experts import check_implementation
from tp_plugin.sharding.inputs import InputGuard


def guard(model: nn.Module, mesh: ParallelMesh, config: TensorParallelConfig) -> None:
    """Hooks on the whole model: inputs compared, logits whole at the exit of a no_grad forward, no late resizing."""
    heads = [module for module in model.modules() if isinstance(module, VocabParallelHead)]
    model.tp_heads = heads  # type: ignore[assignment]
    InputGuard(model, mesh, config)

    @torch.compiler.disable
    def enter(_module: nn.Module, _args: tuple) -> None:
        for head in heads:
            head.tp_inside_model = True

    @torch.compiler.disable
    def leave(_module: nn.Module, _args: tuple, output: object) -> object:
        for head in heads:
            head.tp_inside_model = False
        # on every rank, so that one of them reading the logits alone cannot hang
        return output if torch.is_grad_enabled() else materialise_outputs(output)

    if heads:
        model.register_forward_pre_hook(enter)
        model.register_forward_hook(leave, always_call=True)

    def resize(
        new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        layout = getattr(embedding.weight, "tp_layout", None)
        rows = (layout.shape if layout is not None else embedding.weight.shape)[0]
        wanted = rows if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            wanted += -wanted % pad_to_multiple_of
        if wanted == rows:
            return embedding
        raise TensorParallelError(
            f"resize_token_embeddings({wanted}) works on whole embeddings, and this model is sharded (each rank's "
            f"weight shows its own of the {rows} rows); leave it out if they suffice, or resize before sharding: at "
            "ZeRO-3, where from_pretrained shards, in a script of its own that saves the model."
        )

    if hasattr(model, "resize_token_embeddings"):
        model.resize_token_embeddings = resize  # type: ignore[assignment]


def guard_attentions(model: nn.Module) -> None:
    """No attention weights among the outputs: each rank would hand out those of its own heads as if they were all."""

    @torch.compiler.disable
    def refuse(_module: nn.Module, _args: tuple, kwargs: dict) -> None:
        asked = kwargs.get("output_attentions")
        if asked or (asked is None and getattr(getattr(model, "config", None), "output_attentions", False)):
            raise TensorParallelError(
                "output_attentions asks for the weights of all heads, and each rank of a tensor-parallel group has "
                "those of its own only; leave it off, or use tp_size 1."
            )

    model.register_forward_pre_hook(refuse, with_kwargs=True)


def guard_experts(model: nn.Module) -> None:
    """No late change to a way of computing experts that does not know of shards."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise TensorParallelError(
            "kernels of the hub replace whole mixtures of experts, and this model's are sharded; build it with "
            "use_kernels=False."
        )

    def choose(implementation: object) -> None:
        before = model.get_experts_implementation()  # type: ignore[operator]
        type(model).set_experts_implementation(model, implementation)  # type: ignore[attr-defined]
        try:
            check_implementation(model)
        except TensorParallelError:
            type(model).set_experts_implementation(model, before)  # type: ignore[attr-defined]
            raise

    if hasattr(model, "set_use_kernels"):
        model.set_use_kernels = refuse  # type: ignore[assignment]
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation = choose  # type: ignore[assignment]
