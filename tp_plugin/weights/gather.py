"""Full tensors of a sharded model, gathered to rank 0; and its engine, mesh and innermost module."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from tp_plugin.errors import TensorParallelError, agree, sentence_of
from tp_plugin.mesh import ParallelMesh
from tp_plugin.partitioned import forget_fetch_order, prefetched_released
from tp_plugin.sharding.full_tensors import shard_in
from tp_plugin.sharding.state import root_of, state_of
from tp_plugin.weights.stream import Output, identities, persistent, stream

_ENGINE, _ENGINE_OF_PARTS = "tp_engine", "tp_engine_of_parts"


def full_state_dict(
    model_or_engine: nn.Module | Any, *, trainable_only: bool = False, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """Full tensors under HF names, on the CPU of global rank 0; ``{}`` on every other rank. A collective call.

    Works at every ZeRO stage. Persistent buffers are included; tied parameters are one tensor under each of their
    names. Training continues afterwards with the same parameters. If the model exceeds the memory of one host,
    :func:`tp_plugin.save_pretrained` writes it without gathering it.

    Args:
        model_or_engine: a sharded model, or the DeepSpeed engine (or other wrapper with ``.module``) around it.
        trainable_only: omit parameters that are not trained.
        dtype: cast floating-point tensors; None keeps each tensor's own.

    Returns:
        name -> tensor, shaped as in the unsharded model, in the order of ``state_dict()``.

    Raises:
        TensorParallelError: on every rank, if one of them could not gather (out of memory, most often).
    """
    tensors = persistent(unwrapped(model_or_engine))
    if trainable_only:
        tensors = {n: t for n, t in tensors.items() if isinstance(t, nn.Parameter) and t.requires_grad}
    return gathered(model_or_engine, tensors, dtype=dtype)


def gathered(
    model_or_engine: nn.Module | Any, tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None
) -> dict[str, torch.Tensor]:
    """:func:`full_state_dict` of some of the model's tensors, given as name -> this rank's tensor."""
    full: dict[int, torch.Tensor] = {}

    def keep(output: Output, rows: torch.Tensor, start: int) -> None:
        to = dtype if dtype is not None and output.dtype.is_floating_point else output.dtype
        if start == 0:
            full[id(tensors[output.name])] = torch.empty(output.shape, dtype=to)
        full[id(tensors[output.name])].view(-1)[start : start + rows.numel()].copy_(rows)

    model, error = unwrapped(model_or_engine), None
    with between_steps(model_or_engine):
        try:
            stream(tensors, identities(tensors), mesh_of(model), replica=0, writer=0, sink=keep)
        except Exception as failure:
            if state_of(model) is None:  # one rank may call this by itself
                raise
            error = f"gathering the full tensors failed: {sentence_of(failure)}"
    if state_of(model) is not None:
        agree(error)  # other replicas took no part, and would wait for these ranks in the next collective call
    if dist.is_initialized() and dist.get_rank() != 0:
        return {}
    # a tensor without elements is not streamed
    return {name: full.get(id(tensor), tensor) for name, tensor in tensors.items()}


def refuse_shards(model: nn.Module, state: Mapping[str, Any], wrappers: Collection[str] = ()) -> None:
    """Raise if ``state``, to be saved as that of a sharded ``model``, has shards in place of full tensors.

    Args:
        wrappers: parts of names to ignore, such as names of adapters; see :func:`shard_in`.

    Raises:
        TensorParallelError: on this rank, which may be the only one that saves.
    """
    found = shard_in(state, model, wrappers)
    if found is not None:
        name, shape, whole = found
        raise TensorParallelError(
            f"state_dict= has this rank's shard {list(shape)} of {name!r} in place of the full {list(whole)}; pass "
            "tp_plugin.full_state_dict(model), or call tp_plugin.save_pretrained on every rank."
        )


def mesh_of(model: nn.Module) -> ParallelMesh:
    """The mesh of a sharded model; for any other, tp 1 and a replica in each process."""
    record = state_of(model)
    if record is not None:
        return record.mesh
    if not dist.is_initialized():
        return ParallelMesh.single()
    return ParallelMesh(None, None, dp_rank=dist.get_rank(), dp_size=dist.get_world_size())


def unwrapped(model_or_engine: nn.Module | Any) -> nn.Module:
    """The HF model inside DeepSpeed's engine, a DDP or a compiled wrapper."""
    model = model_or_engine
    while isinstance(model, nn.Module):
        # children by name: an engine forwards attributes to the model inside
        inner = model._modules.get("_orig_mod") or model._modules.get("module")
        if inner is None:
            return model
        model = inner
    raise TensorParallelError(f"expected a model or a DeepSpeed engine, got {type(model).__name__}.")


def note_engine(model: nn.Module, engine: Any) -> None:
    """Record on a sharded model the engine that trains it, for :func:`between_steps`."""
    model.__dict__[_ENGINE] = weakref.ref(engine)
    root = root_of(model)
    if root is not None:
        root.__dict__[_ENGINE_OF_PARTS] = weakref.ref(engine)


def between_forwards(model: nn.Module) -> contextlib.AbstractContextManager:
    """:func:`between_steps` of the engine that trains ``model``, or a model around it."""
    return between_steps(_engine_around(model))


@contextlib.contextmanager
def between_steps(model_or_engine: Any) -> Iterator[None]:
    """Make ZeRO-3 release prefetched parameters while open, so that they can be gathered bucket by bucket."""
    with prefetched_released(_optimizer_of(model_or_engine)):
        yield


def forget_evaluation(model: nn.Module) -> None:
    """Make ZeRO-3 fetch ahead for the training of ``model`` by its own order, not that of forwards before."""
    forget_fetch_order(_optimizer_of(_engine_around(model)))


def _engine_around(model: nn.Module) -> Any:
    engine = vars(model).get(_ENGINE_OF_PARTS, lambda: None)()
    return model if engine is None else engine


def _optimizer_of(model_or_engine: Any) -> Any:
    engine = model_or_engine
    if not hasattr(engine, "optimizer") and isinstance(engine, nn.Module):
        root = root_of(engine)
        if root is not None and all(module is not root for module in engine.modules()):
            refs = iter([vars(root).get(_ENGINE_OF_PARTS)])
        else:
            refs = (vars(module).get(_ENGINE) for module in engine.modules())
        engine = next((ref() for ref in refs if ref is not None), None)
    return getattr(engine, "optimizer", None)
