"""Optimizers that look further than at one element, refused: by name, and by trying their step on parts of a tensor.

A rank's optimizer sees shards. One whose step uses norms, means or factors of tensors takes other steps on them than on
whole tensors, and the copies that ranks hold of one replicated weight drift apart without an error.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist

from tp_plugin.errors import TensorParallelError

NOT_ELEMENTWISE = (
    *("muon", "adafactor", "lamb", "shampoo", "soap", "lars", "galore", "apollo", "kfac", "lomo", "adammini", "sm3"),
    *("prodigy", "dadapt", "dion", "came", "lorafa", "stableadam", "novograd", "adamp", "sgdp", "lbfgs", "psgd"),
    "kron",
)
"""Parts of the names of optimizers that use norms, factors or products of whole matrices, or of all parameters."""
ONE_BIT = ("onebitadam", "onebitlamb", "zerooneadam")
OF_A_DEVICE = ("deepspeed", "bitsandbytes", "apex", "transformer_engine")
"""Libraries whose steps are kernels for one device and are not tried on small CPU tensors; their names are known."""
LR = 1e-2  # a scheduler may have set the real one to 0
SCALES = (1e-2, 1.0, 30.0, 3.0)
"""Of the gradients, a step: what is clipped or capped comes into play when they grow."""

_TRIED: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()  # the check runs before, in and after the engine


def refuse_optimizer(config: Mapping[str, Any], client: Any) -> None:
    """Raise TensorParallelError for an optimizer that is not elementwise, on every rank alike and without a collective.

    Args:
        config: the DeepSpeed config, which may name an optimizer.
        client: the optimizer made by the caller, wrapped by accelerate or not; a callable or None is passed over.
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
                f"the optimizer {name} looks at whole weight matrices and would see shards of them; use an elementwise "
                "one (AdamW, Adam, SGD, Lion, Adagrad)."
            )
    if isinstance(optimizer, torch.optim.Optimizer) and optimizer not in _TRIED:
        _try(optimizer)
        _TRIED.add(optimizer)


def _try(optimizer: torch.optim.Optimizer) -> None:
    name = type(optimizer).__name__
    if type(optimizer).__module__.split(".")[0] in OF_A_DEVICE:
        return
    found = is_elementwise(optimizer)
    if found is False:
        raise TensorParallelError(
            f"the optimizer {name} takes another step on the parts of a tensor than on the whole, and would see shards "
            "of weights; use an elementwise one (AdamW, Adam, SGD, Lion, Adagrad)."
        )
    if found is None and (not dist.is_initialized() or dist.get_rank() == 0):
        print(
            f"tp_plugin: WARNING: the optimizer {name} could not be tried on a small CPU tensor; if its step uses more "
            "than one element at a time (a norm, a mean, a factor), it would train wrongly on shards of weights.",
            flush=True,
        )


def is_elementwise(optimizer: torch.optim.Optimizer) -> bool | None:
    """Whether a new optimizer like this one moves a tensor as other new ones move its parts, each alone.

    The class is built again with this one's options and groups, of which each has one float32 tensor on the CPU, and
    steps :data:`SCALES` times; ``optimizer`` itself is not touched.

    Returns:
        None when that cannot be told: the class cannot be built or stepped so, or draws random numbers.
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
    except Exception:  # whatever a class of somebody else's says to such an input
        return None
    if not all(torch.equal(one, other) and one.isfinite().all() for one, other in zip(whole, again, strict=True)):
        return None
    for group, tensor in enumerate(whole):
        for expected, of_block in zip(_blocks(tensor), blocks, strict=True):
            if not torch.allclose(of_block[group], expected, rtol=1e-5, atol=1e-6):
                return False
    return True


def _moved(optimizer: torch.optim.Optimizer, start: torch.Tensor, gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """What a new optimizer makes of ``start``, a tensor for each of its groups."""
    parameters = [torch.nn.Parameter(start.clone()) for _ in optimizer.param_groups]
    groups = [
        {key: _option(key, value) for key, value in group.items() if key not in ("params", "param_names")}
        | {"params": [parameter]}
        for group, parameter in zip(optimizer.param_groups, parameters, strict=True)
    ]
    new: Any = type(optimizer)(groups, **_arguments(optimizer))
    if hasattr(new, "train"):  # those without a schedule step in this mode alone
        new.train()
    for gradient in gradients:
        for parameter in parameters:
            parameter.grad = gradient.clone()
        new.step()
    return [parameter.detach() for parameter in parameters]


def _arguments(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The constructor's arguments, as far as the optimizer still knows them under their names."""
    known = vars(optimizer) | optimizer.defaults | optimizer.param_groups[0]
    names = list(inspect.signature(type(optimizer)).parameters)[1:]
    return {name: _option(name, known[name]) for name in names if name in known}


def _option(key: str, value: Any) -> Any:
    if key in ("lr", "initial_lr") and isinstance(value, int | float | torch.Tensor):
        return LR
    if key == "capturable":  # of CUDA graphs: it changes no result, and CPU tensors are refused with it
        return False
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def _blocks(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Its quarters: halves of the rows and of the columns, so that what is done by row or by column shows too."""
    return [part.contiguous() for half in tensor.chunk(2) for part in half.chunk(2, dim=1)]


def _by_block(*factors: float) -> torch.Tensor:
    """Norms, means and ratios of the quarters must differ."""
    return torch.tensor(factors).reshape(2, 2).repeat_interleave(8, 0).repeat_interleave(16, 1)
