"""A parameter that is read when something is computed of it, and not before."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

_PASSED_ON = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class OnUse(torch.Tensor):
    """What iterating over the parameters of a model gives where reading one is dear: shape, dtype and device at once,
    values anew at every operation.

    So a loss over all parameters holds one of them at a time, though ``named_parameters`` keeps what it has given.

    Args:
        param: the parameter it stands for.
        read: its values, of ``shape`` and ``dtype``.
    """

    _read: Callable[[], torch.Tensor]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, param: torch.Tensor, read: Callable[[], torch.Tensor], shape: Sequence[int], dtype: torch.dtype
    ) -> OnUse:
        made = torch.Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=dtype, device=param.device, requires_grad=param.requires_grad
        )
        made._read = read
        made._is_param = isinstance(param, torch.nn.Parameter)  # what isinstance asks for
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in _PASSED_ON:
            (param,) = args
            return OnUse(torch.empty(0, device=param.device), param._read, param.shape, param.dtype)
        args, kwargs = tree_map_only(OnUse, lambda param: param._read(), (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnUse(shape={list(self.shape)}, dtype={self.dtype})"
