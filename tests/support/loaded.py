"""Models loaded by slices against models loaded in full."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from tp_plugin.param_info import layout_of
from tp_plugin.sharding import state_of
from tp_plugin.weights.reader import Reader


@contextlib.contextmanager
def readers() -> Iterator[list[Reader]]:
    """Every reader that is opened inside."""
    found, original = [], Reader.open

    def opened(*args, **kwargs):
        found.append(original(*args, **kwargs))
        return found[-1]

    Reader.open = opened
    try:
        yield found
    finally:
        Reader.open = original


def tensors_of(model) -> dict[str, torch.Tensor]:
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def ties(tensors: dict[str, torch.Tensor]) -> list[list[str]]:
    """For each tensor the names it has."""
    return [[name for name, other in tensors.items() if other is tensor] for tensor in tensors.values()]


def assert_same(whole, ours) -> None:
    """Two sharded models that are equal to the bit, with equal records."""
    expected, found = tensors_of(whole), tensors_of(ours)
    assert list(expected) == list(found)
    for name, tensor in expected.items():
        other = found[name]
        assert (other.dtype, other.shape, other.device) == (tensor.dtype, tensor.shape, tensor.device), name
        assert torch.equal(other, tensor), name
        assert other.requires_grad == tensor.requires_grad, name
        assert layout_of(other) == layout_of(tensor), name
        flags = [getattr(each, "tensor_model_parallel", None) for each in (other, tensor)]
        assert flags[0] == flags[1], name
        assert isinstance(other, torch.nn.Parameter) == isinstance(tensor, torch.nn.Parameter)
    assert [type(module) for module in ours.modules()] == [type(module) for module in whole.modules()]
    assert ties(expected) == ties(found)
    one, other = state_of(whole), state_of(ours)
    assert (one.layouts, one.shapes, one.linears, one.plan) == (other.layouts, other.shapes, other.linears, other.plan)
    assert other.equalised == ()
    assert whole.training == ours.training is False
    assert (
        vars(whole.generation_config or object) == vars(ours.generation_config or object)
        if whole.can_generate()
        else True
    )
    assert whole.config.to_dict() == ours.config.to_dict()
