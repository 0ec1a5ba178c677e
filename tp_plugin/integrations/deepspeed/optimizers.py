"""Optimizers that are not elementwise, refused: by name, and by trying their step on parts of a tensor.

A rank's optimizer sees shards. If its step uses norms, means or factors of tensors, it differs between shards and full
tensors. Replicas of a weight on different ranks then drift apart without an error.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tp_plugin import log
from tp_plugin.errors import TensorParallelError

NOT_ELEMENTWISE = (
    *("muon", "adafactor", "lamb", "shampoo", "soap", "lars", "galore", "apollo", "kfac", "lomo", "adammini", "sm3"),
    *("prodigy", "dadapt", "dion", "came", "lorafa", "stableadam", "novograd", "adamp", "sgdp", "lbfgs", "psgd"),
    "kron",
)
"""Parts of the names of optimizers that use norms, factors or products of whole matrices, or of all parameters."""
ONE_BIT = ("onebitadam", "onebitlamb", "zerooneadam")
OF_A_DEVICE = ("deepspeed", "bitsandbytes", "apex", "transformer_engine")
"""Libraries whose steps are kernels for one device: not tried on small CPU tensors, checked by name."""
LR = 1e-2  # a scheduler may have set the real one to 0
SCALES = (1e-2, 1.0, 30.0, 3.0)
"""Scales of the gradients, a step each: clipping or capping shows when they grow."""

_TRIED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # several checks of one engine try it once


def refuse_optimizer(config: Mapping[str, Any], client: Any) -> None:
    """Raise TensorParallelError on every rank for an optimizer that is not elementwise; no collective call.

    Args:
        config: the DeepSpeed config, which may name an optimizer.
        client: the caller's optimizer, wrapped by accelerate or not; a callable or None is skipped.
    """
    names = [str((config.get("optimizer") or {}).get("type", ""))]
    optimizer = getattr(client, "optimizer", client)  # accelerate wraps
    if isinstance(optimizer, torch.optim.Optimizer):
        names += [kind.__name__ for kind in type(optimizer).__mro__]
    for name in names:
        plain = name.lower().replace("_", "")
        if plain in ONE_BIT:
            raise TensorParallelError(
                f"the 1-bit optimizer {name} compresses over ranks that hold different shards; use AdamW."
            )
        if any(kind in plain for kind in NOT_ELEMENTWISE):
            raise TensorParallelError(
                f"the optimizer {name} needs full weight matrices and would get shards; use an elementwise one (AdamW, "
                "Adam, SGD, Lion, Adagrad)."
            )
    if isinstance(optimizer, torch.optim.Optimizer) and optimizer not in _TRIED:
        _try(optimizer)
        _TRIED.add(optimizer)


def refuse_foreign_parameters(model: nn.Module, client: Any, stage: float, replicas: int) -> None:
    """Raise TensorParallelError on every rank for an optimizer with parameters that the engine's model has not.

    A loss with layers of its own brings such. ZeRO fails at them with a KeyError, and at stage 0 nothing averages
    their gradients over replicas. With one replica they are right.
    """
    optimizer = getattr(client, "optimizer", client)  # accelerate wraps
    if not isinstance(optimizer, torch.optim.Optimizer) or (stage == 0 and replicas == 1):
        return
    own = {id(param) for param in model.parameters()}
    others = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and id(p) not in own]
    if others:
        raise TensorParallelError(
            f"the optimizer has {len(others)} parameters (one of shape {tuple(others[0].shape)}) that are no part of "
            "the model; freeze them, or make them modules of it."
        )


def _try(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    if type(optimizer).__module__.split(".")[0] in OF_A_DEVICE:
        return
    found = is_elementwise(optimizer)
    if found is False:
        raise TensorParallelError(
            f"the optimizer {name} is not elementwise: it steps differently on shards of a tensor; use an elementwise "
            "one (AdamW, Adam, SGD, Lion, Adagrad)."
        )
    if found is None:
        log.warning(
            f"the optimizer {name} could not be tried on a small CPU tensor. It would train wrongly on shards if its "
            "step is not elementwise (a norm, a mean, a factor); check that, or use AdamW."
        )


def warn_of_modes(engine: Any) -> None:
    """Warn that ``train()`` and ``eval()`` of a schedule-free optimizer do not reach a model under ZeRO.

    Such an optimizer switches the weights of its groups to their averages and back. ZeRO's optimizer replaces those
    weights by master weights and does not forward the two calls. It copies master weights to the model in a step only.
    """
    inner = getattr(engine, "basic_optimizer", None)
    if inner is None or inner is engine.optimizer:
        return
    if all(callable(getattr(inner, mode, None)) for mode in ("train", "eval")):
        log.warning(
            f"train() and eval() of the optimizer {type(inner).__name__} do not reach the model "
            f"under ZeRO stage {engine.zero_optimization_stage()}, with or without tensor parallelism. The weights it "
            "steps are evaluated and saved, not their averages; use ZeRO stage 0 in float32, or another optimizer."
        )


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool | None:
    """Return True if the optimizer's class steps a tensor as it steps the parts of that tensor, each by itself.

    New optimizers of the class get this one's options and groups, each group with one float32 tensor on the CPU. They
    step :data:`SCALES` times; ``optimizer`` itself is not touched.

    Returns:
        None if undecided: the class cannot be built or stepped this way, or it draws random numbers.
    """
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(16, 32, generator=draw) * _by_block(1.0, 0.3, 3.0, 0.1)
    gradients = [torch.randn(16, 32, generator=draw) * _by_block(1.0, 3.0, 0.3, 10.0) * scale for scale in SCALES]
    try:
        with torch.random.fork_rng(devices=[]), torch.compiler.set_stance("force_eager"):
            whole = _moved(optimizer, start, gradients)
            again = _moved(optimizer, start, gradients)
            blocks = [
                _moved(optimizer, part, of) for part, *of in zip(_blocks(start), *map(_blocks, gradients), strict=True)
            ]
    except Exception:  # a user's class may raise any error on such an input
        return None
    if not all(torch.equal(one, other) and one.isfinite().all() for one, other in zip(whole, again, strict=True)):
        return None
    for group, tensor in enumerate(whole):
        for expected, of_block in zip(_blocks(tensor), blocks, strict=True):
            if not torch.allclose(of_block[group], expected, rtol=1e-5, atol=1e-6):
                return False
    return True


def _moved(optimizer: torch.optim.Optimizer, start: torch.Tensor, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Step a new optimizer on a copy of ``start`` in each group; return the tensors after."""
    parameters = [torch.nn.Parameter(start.clone()) for _ in optimizer.param_groups]
    groups = [
        {key: _option(key, value) for key, value in group.items() if key not in ("params", "param_names")}
        | {"params": [parameter]}
        for group, parameter in zip(optimizer.param_groups, parameters, strict=True)
    ]
    new: Any = type(optimizer)(groups, **_arguments(optimizer))
    if hasattr(new, "train"):  # schedule-free ones step in this mode only
        new.train()
    for gradient in gradients:
        for parameter in parameters:
            parameter.grad = gradient.clone()
        new.step()
    return [parameter.detach() for parameter in parameters]


def _arguments(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Those of the constructor's arguments that the optimizer keeps under their names."""
    known = vars(optimizer) | optimizer.defaults | optimizer.param_groups[0]
    names = list(inspect.signature(type(optimizer)).parameters)[1:]
    return {name: _option(name, known[name]) for name in names if name in known}


def _option(key: str, value: Any) -> Any:
    if key in ("lr", "initial_lr") and isinstance(value, int | float | torch.Tensor):
        return LR
    if key == "capturable":  # for CUDA graphs: it changes no result, and CPU tensors are refused with it
        return False
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def _blocks(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Split into quarters, by rows and by columns, so that a step by row or by column shows too."""
    return [part.contiguous() for half in tensor.chunk(2) for part in half.chunk(2, dim=1)]


def _by_block(*factors: float) -> torch.Tensor:
    """Factors of the quarters, so that their norms, means and ratios differ."""
    return torch.tensor(factors).reshape(2, 2).repeat_interleave(8, 0).repeat_interleave(16, 1)
