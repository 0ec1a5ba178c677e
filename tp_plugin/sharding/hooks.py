"""Hooks and refusals on a sharded model as a whole."""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from torch import nn

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError, add_note
from tp_plugin.layers import VocabParallelHead
from tp_plugin.lazy import materialise_outputs
from tp_plugin.mesh import ParallelMesh
from tp_plugin.param_info import full_shape
from tp_plugin.plans import Plan
from tp_plugin.plans.experts import check_implementation
from tp_plugin.plans.from_transformers import parts_of
from tp_plugin.sharding.inputs import InputGuard

SHARE = "tp_share"
"""Attribute of an error about shapes: the sentence that names the module it comes from."""


def guard(model: nn.Module, mesh: ParallelMesh, config: TensorParallelConfig) -> None:
    """Compare the model's inputs over the TP group, and compute full logits at the exit of a no_grad forward."""
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
        # on every rank: a script may read the logits on one rank only, where a collective would hang
        return output if torch.is_grad_enabled() else materialise_outputs(output)

    if heads:
        model.register_forward_pre_hook(enter)
        model.register_forward_hook(leave, always_call=True)


def guard_parts(model: nn.Module, plan: Plan) -> None:
    """Refuse later changes of each transformers model that ``model`` is or contains."""
    for part in parts_of(model).values() or [model]:
        guard_size(part)
        if plan.regions:
            guard_attentions(part)
        if plan.mixtures:
            guard_experts(part)


def guard_size(model: nn.Module) -> None:
    """Refuse to resize the vocabulary."""

    def resize(
        new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
        rows = full_shape(embedding.weight)[0]
        wanted = rows if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of:
            wanted += -wanted % pad_to_multiple_of
        if wanted == rows:
            return embedding
        raise TensorParallelError(
            f"resize_token_embeddings({wanted}) needs full embeddings, and this model's {rows} rows are sharded; "
            "leave it out, or resize before sharding."
        )

    if hasattr(model, "resize_token_embeddings"):
        model.resize_token_embeddings = resize  # type: ignore[assignment]


def guard_attentions(model: nn.Module) -> None:
    """Refuse ``output_attentions``: each rank would return the weights of its own heads only."""

    @torch.compiler.disable
    def refuse(_module: nn.Module, _args: tuple, kwargs: dict) -> None:
        asked = kwargs.get("output_attentions")
        if asked or (asked is None and getattr(getattr(model, "config", None), "output_attentions", False)):
            raise TensorParallelError(
                "output_attentions asks for the weights of all heads, and each rank has those of its own heads only; "
                "leave it off, or use tp_size 1."
            )

    model.register_forward_pre_hook(refuse, with_kwargs=True)


def guard_experts(model: nn.Module) -> None:
    """Refuse to switch to an implementation of experts that cannot compute with shards."""

    def refuse(*_args: object, **_kwargs: object) -> None:
        raise TensorParallelError(
            "kernels of the hub replace the forward of experts, and this model's are sharded; build it with "
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


def guard_shapes(model: nn.Module, plan: Plan, mesh: ParallelMesh) -> None:
    """Name the block and the rank's part in an error of a block's forward that uses a size of the full model."""
    for region in plan.regions:
        layout = plan.placements[region.row].layouts.get("weight")
        if layout is None or not layout.is_sharded:
            continue
        block, held, size = (
            model.get_submodule(region.block),
            layout.local_size(mesh.tp_rank),
            layout.shape[layout.dim or 0],
        )
        heads = _heads_in_config(block)
        part = f"{held} of {size} columns"
        if "att" in region.block.lower() and heads and size % heads == 0:
            part = f"{held * heads // size} of {heads} heads"
        block.register_forward_hook(_Share(region.block, part), always_call=True)


def _heads_in_config(block: nn.Module) -> int | None:
    """The number of heads of the block's config; None where it has none, or another one for each layer."""
    try:
        heads = block.config.num_attention_heads  # type: ignore[union-attr]
    except (AttributeError, RuntimeError):  # transformers raises RuntimeError for a config with different layers
        return None
    return heads if isinstance(heads, int) else None


class _Share:
    """Adds the module's name and the rank's part to an error about shapes, as ``tp_share`` and as a note."""

    def __init__(self, name: str, part: str) -> None:
        self.sentence = (
            f"{name!r} fails on a rank's shard, which has {part}; take sizes in its forward from tensors, as "
            "view(..., -1, head_dim) does, not from the config"
        )

    @torch.compiler.disable
    def __call__(self, _block: nn.Module, _args: tuple, output: object) -> None:
        failure = sys.exc_info()[1] if output is None else None
        if isinstance(failure, RuntimeError) and re.search("shape|size", str(failure)) and not hasattr(failure, SHARE):
            setattr(failure, SHARE, self.sentence)
            add_note(failure, f"tp_plugin: {self.sentence}.")
