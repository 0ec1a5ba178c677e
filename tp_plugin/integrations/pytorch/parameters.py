"""Functions of ``torch.nn.utils`` over parameters and gradients: they see the full tensors of a sharded model.

``clip_grad_norm_`` and ``get_total_norm`` count every element once. On shards torch's functions give each rank its own
norm: ranks clip by different factors, and replicas drift apart. ``clip_grads_with_norm_`` and ``clip_grad_value_``
treat every element alike and need no patch.

``parameters_to_vector`` gives every rank the vector of the unsharded model, so that its norm, a distance or an average
is right. Gradients go back through it to the shards.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.utils
from torch.nn.utils import clip_grad

from tp_plugin.errors import TensorParallelError, meet
from tp_plugin.integrations.features import WEIGHTS
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.param_info import full_shape
from tp_plugin.partitioned import is_partitioned
from tp_plugin.weights.user_tensors import ownership_of, total_norm, unsharded


def _norm_function(original: Callable[..., torch.Tensor], *, logging: bool) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def get_total_norm(
        tensors: torch.Tensor | Iterable[torch.Tensor],
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> torch.Tensor:
        given = [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)
        if logging:
            _together("torch.nn.utils.get_total_norm of a sharded model", given)
        norm = total_norm(given, float(norm_type), lambda rest: original(rest, norm_type, False, foreach))
        if norm is None:
            return original(given, norm_type, error_if_nonfinite, foreach)
        if error_if_nonfinite and not norm.isfinite():
            raise RuntimeError(
                f"The total norm of order {norm_type} for gradients from `parameters` is non-finite and cannot be "
                "clipped: set `error_if_nonfinite=False` to scale the gradients by it anyway."
            )
        return norm

    return get_total_norm


def _together(what: str, tensors: list[torch.Tensor]) -> None:
    """Wait for the TP group, with a message after a minute: one rank may call this by itself, to log."""
    place = next((place for place in ownership_of(tensors) if place and place.layout), None)
    if place is not None:
        meet(what, group=place.mesh.tp_group)


def _to_vector_function(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def parameters_to_vector(parameters: Iterable[torch.Tensor]) -> torch.Tensor:
        given = list(parameters)
        places = ownership_of(given)
        _refuse_partitioned("parameters_to_vector", places)
        _together("torch.nn.utils.parameters_to_vector of a sharded model", given)
        return original([unsharded(tensor, place) for tensor, place in zip(given, places, strict=True)])

    return parameters_to_vector


def _to_parameters_function(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def vector_to_parameters(vec: torch.Tensor, parameters: Iterable[torch.Tensor]) -> None:
        given = list(parameters)
        places = ownership_of(given)
        if not isinstance(vec, torch.Tensor) or not any(place and place.layout for place in places):
            original(vec, given)
            return
        _refuse_partitioned("vector_to_parameters", places)
        shapes = [full_shape(param) for param in given]
        sizes = [math.prod(shape) for shape in shapes]
        if vec.numel() != sum(sizes):
            raise TensorParallelError(
                f"vector_to_parameters needs all {sum(sizes)} elements of a sharded model, not those of this rank's "
                "shards; pass a vector like the one that parameters_to_vector gives."
            )
        for param, place, shape, piece in zip(given, places, shapes, vec.split(sizes), strict=True):
            full = piece.view(shape)
            layout = place.layout if place else None
            param.data = full.data if place is None or layout is None else layout.shard(full.data, place.mesh.tp_rank)

    return vector_to_parameters


def _refuse_partitioned(name: str, places: list[Any]) -> None:
    if any(place and is_partitioned(place.param) for place in places):
        raise TensorParallelError(
            f"{name} reads parameters that ZeRO-3 has partitioned; use ZeRO 2 or less, or "
            "tp_plugin.full_state_dict(model)."
        )


upstream = Upstream(WEIGHTS)
_SHARDS = "it would see this rank's shards"
_NORM = ["tensors", "norm_type", "error_if_nonfinite", "foreach"]
_logged_norm, _clipping_norm = (functools.partial(_norm_function, logging=logging) for logging in (True, False))
# each also where a module has imported it by name; clip_grad_norm_ calls _get_total_norm, whatever name it has there
upstream.replace(torch.nn.utils, "get_total_norm", _NORM, _SHARDS, _logged_norm, everywhere=True)
upstream.replace(clip_grad, "_get_total_norm", _NORM, _SHARDS, _clipping_norm)
upstream.replace(torch.nn.utils, "parameters_to_vector", ["parameters"], _SHARDS, _to_vector_function, everywhere=True)
upstream.replace(
    torch.nn.utils, "vector_to_parameters", ["vec", "parameters"], _SHARDS, _to_parameters_function, everywhere=True
)
upstream.needs(clip_grad, "clip_grad_norm_", ["parameters", "max_norm"], _SHARDS)
