"""Run a model in single precision, and without keeping activations for a backward."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from tp_plugin.param_info import info_of, update_info
from tp_plugin.partitioned import is_partitioned
from tp_plugin.step_guard.param_view import DeferredParam, ParamView
from tp_plugin.step_guard.unsharded_view import backbone_of


@dataclasses.dataclass(frozen=True)
class CustomKernels:
    """A kind of kernels or functions beyond PyTorch's own that models can choose.

    Attributes:
        functions: name -> function of those that a model has chosen; None where the function is not known.
        half_only: tells by its name if one takes half precision only.
        replaced: a context in which the model computes by PyTorch's own instead.
    """

    functions: Callable[[nn.Module], dict[str, Any]]
    half_only: Callable[[str], bool]
    replaced: Callable[[nn.Module], contextlib.AbstractContextManager]


_KINDS: list[CustomKernels] = []


def register_kernels(kernels: CustomKernels) -> None:
    """Let the step guard know of a kind of kernels; integrations call it."""
    if kernels not in _KINDS:
        _KINDS.append(kernels)


def custom_functions(models: Iterable[nn.Module]) -> dict[str, Any]:
    """Name -> function of every custom kernel or function that ``models`` have chosen."""
    models = list(models)
    return {name: function for kind in _KINDS for m in models for name, function in kind.functions(m).items()}


def is_half_only(name: str) -> bool:
    """Return True if the custom function ``name`` takes half precision only."""
    return any(kind.half_only(name) for kind in _KINDS)


_CPU, _CUDNN = torch.backends.mkldnn.matmul, torch.backends.cudnn  # type: ignore[attr-defined]
PRODUCTS: tuple[Any, ...] = (torch.backends, torch.backends.cuda.matmul, _CPU)
"""PyTorch's settings for the precision of float32 products, from the general to the particular."""
PLACES: tuple[Any, ...] = (*PRODUCTS, _CUDNN.conv, _CUDNN.rnn)  # type: ignore[attr-defined]


def rounds(model: nn.Module) -> bool:
    """Return True if training computes with less than single precision."""
    return (
        any(param.dtype in (torch.bfloat16, torch.float16) for param in model.parameters())
        or torch.is_autocast_enabled(next(model.parameters()).device.type)
        or any(place.fp32_precision in ("tf32", "bf16") for place in PRODUCTS)
    )


@contextlib.contextmanager
def in_single_precision(models: Iterable[nn.Module], *, plain_kernels: bool = False) -> Iterator[None]:
    """Compute in single precision, whatever autocast and the settings for float32 say.

    Args:
        plain_kernels: replace custom kernels by PyTorch's own.
    """
    models = list(models)
    device = next(models[0].parameters()).device
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_exact_products())
        for model in models if plain_kernels else ():
            for kind in _KINDS:
                stack.enter_context(kind.replaced(model))
        yield


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Switch TF32 and bfloat16 products off.

    PyTorch has an older and a newer interface, and raises when the older one is read where they disagree.
    ``torch.backends.cudnn.flags``, around every CTC loss, reads it. So settings that could be read before can be read
    inside.
    """
    before = [(place, place.fp32_precision) for place in PLACES]
    products = _old(torch.get_float32_matmul_precision)
    convolutions = _old(lambda: _CUDNN.allow_tf32)
    try:
        if products not in (None, "highest"):
            torch.set_float32_matmul_precision("highest")
        if convolutions:
            _CUDNN.allow_tf32 = False
        for place, _ in before:
            if place.fp32_precision not in ("none", "ieee"):  # a place without a setting follows the general one
                place.fp32_precision = "ieee"
        yield
    finally:
        if products not in (None, "highest"):
            torch.set_float32_matmul_precision(products)
        if convolutions:
            _CUDNN.allow_tf32 = True
        for place, precision in before:
            if place.fp32_precision != precision:
                place.fp32_precision = precision


def _old(read: Callable[[], Any]) -> Any:
    """Read a setting by the older interface; None where only the newer one can tell."""
    try:
        return read()
    except RuntimeError:
        return None


@contextlib.contextmanager
def widened(models: Iterable[nn.Module], dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Let modules read their floating-point parameters in ``dtype``, with memory for those of one module at a time."""
    undo: list[Callable[[], Any]] = []
    placeholders: dict[int, Any] = {}  # a tied parameter is one

    def casts(param: Any) -> bool:
        return param is not None and param.is_floating_point() and param.dtype != dtype

    def read(param: Any) -> Any:
        return _with_info(param.detach().to(dtype), param) if casts(param) else param

    def placeholder(param: Any, read: Callable[[], Any]) -> Any:
        if not casts(param) or is_partitioned(param):  # ZeRO-3's hooks look for their own
            return param
        return _with_info(DeferredParam(param, read, param.shape, dtype), param)

    try:
        for module in {id(m): m for model in models for m in model.modules()}.values():
            own = vars(module)["_parameters"]
            if own:
                view = ParamView(own, read, placeholder, placeholders, ahead=False)
                module.__dict__["_parameters"] = view
                undo.append(functools.partial(module.__dict__.__setitem__, "_parameters", own))
                # after ZeRO-3 has fetched them, before it releases them
                undo.append(module.register_forward_pre_hook(view.enter_forward).remove)
                undo.append(module.register_forward_hook(view.leave_forward, prepend=True, always_call=True).remove)
        yield
    finally:
        for action in undo:
            action()


def _with_info(made: torch.Tensor, param: torch.Tensor) -> torch.Tensor:
    update_info(made, **vars(info_of(param)))
    return made


@contextlib.contextmanager
def nothing_kept(models: Iterable[nn.Module]) -> Iterator[None]:
    """Run forwards with gradients on, since layers ask, but keep no activations for a backward.

    Outside of a forward they are kept: a loss may go backward through its own part, to the model's outputs.
    """
    inside, handles = [0], []

    def enter(*_: object) -> None:
        inside[0] += 1

    def leave(*_: object) -> None:
        inside[0] -= 1

    for module in {part: None for model in models for part in (model, backbone_of(model))}:
        handles.append(module.register_forward_pre_hook(enter, prepend=True))
        handles.append(module.register_forward_hook(leave, always_call=True))

    def gone(kept: torch.Tensor | None) -> torch.Tensor:
        if kept is None:
            raise RuntimeError("the loss goes backward through the model, which the guard's runs keep nothing for")
        return kept

    try:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None if inside[0] else tensor, gone):
            yield
    finally:
        for handle in handles:
            handle.remove()
