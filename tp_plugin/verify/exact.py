"""Runs without rounding to half precision, and without keeping anything for a backward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from tp_plugin.verify.on_use import OnUse

ASIDE: list[Callable[[nn.Module], contextlib.AbstractContextManager]] = []
"""What integrations put aside of a model in an exact run, such as kernels that take half precision only."""


_CPU, _CONVOLUTIONS = torch.backends.mkldnn.matmul, torch.backends.cudnn.conv  # type: ignore[attr-defined]
PRODUCTS: tuple[Any, ...] = (torch.backends, torch.backends.cuda.matmul, _CPU)
"""Where PyTorch is told how exact products of float32 are, from the general to the particular."""


def rounds(model: nn.Module) -> bool:
    """Whether training computes with less than single precision."""
    return (
        any(param.dtype in (torch.bfloat16, torch.float16) for param in model.parameters())
        or torch.is_autocast_enabled(next(model.parameters()).device.type)
        or any(place.fp32_precision in ("tf32", "bf16") for place in PRODUCTS)
    )


@contextlib.contextmanager
def exactly(models: Iterable[nn.Module]) -> Iterator[None]:
    """In single precision, whatever autocast and the settings for float32 say."""
    models = list(models)
    device = next(models[0].parameters()).device
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        for place in (*PRODUCTS, _CONVOLUTIONS):  # a place that was told nothing follows the general one
            if place.fp32_precision not in ("none", "ieee"):
                stack.callback(setattr, place, "fp32_precision", place.fp32_precision)
                place.fp32_precision = "ieee"
        for model in models:
            for aside in ASIDE:
                stack.enter_context(aside(model))
        yield


@contextlib.contextmanager
def widened(models: Iterable[nn.Module], dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Modules read their floating-point parameters in ``dtype``; beyond one module's at a time it costs no memory."""
    undo: list[Callable[[], Any]] = []
    shown: dict[int, Any] = {}  # a tied parameter is one
    try:
        for module in {id(m): m for model in models for m in model.modules()}.values():
            own = vars(module)["_parameters"]
            if own:
                cast = _Cast(own, dtype, shown)
                module.__dict__["_parameters"] = cast
                undo.append(functools.partial(module.__dict__.__setitem__, "_parameters", own))
                # after ZeRO-3 has fetched them, before it releases them
                undo.append(module.register_forward_pre_hook(cast.keep).remove)
                undo.append(module.register_forward_hook(cast.forget, prepend=True, always_call=True).remove)
        yield
    finally:
        for action in undo:
            action()


class _Cast(Mapping[str, Any]):
    """A module's parameters, cast when they are read; iterating gives such as are cast when used, and under ZeRO-3,
    whose hooks look for their own, what they are.

    No ``dict``, which ZeRO-3's hooks would replace by one of theirs; what they note on it they find again.
    """

    def __init__(self, own: dict[str, Any], dtype: torch.dtype, shown: dict[int, Any]) -> None:
        self._own, self._dtype, self._shown = own, dtype, shown
        self._kept: dict[str, Any] | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def __contains__(self, name: object) -> bool:
        return name in self._own

    def __iter__(self) -> Iterator[str]:
        return iter(self._own)

    def __len__(self) -> int:
        return len(self._own)

    def items(self) -> Any:
        return [(name, self._show(name, param)) for name, param in self._own.items()]

    def values(self) -> Any:
        return [param for _, param in self.items()]

    def _show(self, name: str, param: Any) -> Any:
        if not self._casts(param) or hasattr(param, "ds_id"):
            return param
        if id(param) not in self._shown:
            made = OnUse(param, functools.partial(self.__getitem__, name), param.shape, self._dtype)
            self._shown[id(param)] = _noted(made, param)
        return self._shown[id(param)]

    def _casts(self, param: Any) -> bool:
        return param is not None and param.is_floating_point() and param.dtype != self._dtype

    def __getitem__(self, name: str) -> Any:
        if self._kept is not None and name in self._kept:
            return self._kept[name]
        param = self._own[name]  # which ZeRO-3 may have to fetch
        if not self._casts(param):
            return param
        made = _noted(param.detach().to(self._dtype), param)
        if self._kept is not None:
            self._kept[name] = made
        return made

    def keep(self, *_: object) -> None:
        """During its forward a module may read one many times."""
        self._kept = {}

    def forget(self, *_: object) -> None:
        self._kept = None


def _noted(made: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    """With what the loss and the head ask a weight for."""
    for note, value in vars(param).items():
        if note.startswith("tp_"):
            setattr(made, note, value)
    return made


def nothing_kept() -> contextlib.AbstractContextManager:
    """Forwards that no backward follows: gradients are on, since layers ask, and nothing is kept for them."""

    def gone(_: object) -> torch.Tensor:
        raise RuntimeError("a forward of the guard of the first step has no backward")

    return torch.autograd.graph.saved_tensors_hooks(lambda _: None, gone)
