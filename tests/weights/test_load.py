"""from_pretrained: to the bit what transformers loads and shard_model cuts, and no byte more is read than a rank holds."""

from __future__ import annotations

import contextlib
import functools
import shutil
import tempfile
import traceback
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
import transformers

import tp_plugin
from tests.support import moe, zoo
from tests.support.models import FAMILIES, make
from tests.support.ranks import on_ranks
from tp_plugin.sharding import state_of
from tp_plugin.weights.reader import Reader

MODELS = (*FAMILIES, *zoo.ZOO, *moe.SIZES, *moe.MORE)
LIMITS = {"loss": 1e-5, "norm": 1e-5, "grad": 1e-4, "update": 1e-4, "replicas": 0.0}
PUT_OFF: dict[str, str] = {}
"""Models whose conversion reads more than the slices, and why."""


@contextlib.contextmanager
def folder_for(model: transformers.PreTrainedModel, **options) -> Iterator[str]:
    """A checkpoint of ``model``, written by the first rank."""
    name = [tempfile.mkdtemp()]
    dist.broadcast_object_list(name)
    if dist.get_rank() == 0:
        model.save_pretrained(name[0], **options)
    dist.barrier()
    try:
        yield name[0]
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(name[0])


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


def assert_same(whole, ours) -> None:
    """Two sharded models that are equal to the bit, with equal records."""
    expected, found = tensors_of(whole), tensors_of(ours)
    assert list(expected) == list(found)
    for name, tensor in expected.items():
        other = found[name]
        assert (other.dtype, other.shape, other.device) == (tensor.dtype, tensor.shape, tensor.device), name
        assert torch.equal(other, tensor), name
        assert other.requires_grad == tensor.requires_grad, name
        for note in ("tp_layout", "tensor_model_parallel"):
            assert getattr(other, note, None) == getattr(tensor, note, None), (name, note)
        assert isinstance(other, torch.nn.Parameter) == isinstance(tensor, torch.nn.Parameter)
    assert [type(module) for module in ours.modules()] == [type(module) for module in whole.modules()]
    ties = [
        [name for name in tensors if tensors[name] is tensor]
        for tensors in (expected, found)
        for tensor in tensors.values()
    ]
    assert ties[: len(expected)] == ties[len(expected) :]
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


def both(kind, folder: str, config: tp_plugin.TensorParallelConfig, **options):
    """``folder`` loaded by transformers and sharded, and by us, from one state of the random generator."""
    torch.manual_seed(5)
    whole = kind.from_pretrained(folder, **options)
    tp_plugin.shard_model(whole, config)
    torch.manual_seed(5)
    return whole, tp_plugin.from_pretrained(folder, config=config, model_class=kind, **options)


def held(model, reader: Reader) -> int:
    """Bytes of the files that a rank's tensors are, tied ones once and those that no file has not at all."""
    stored = {str(tensor.dtype): tensor.dtype.itemsize for tensor in model.state_dict().values()}
    assert len({reader.dtype(name) for name in reader.names()}) == 1 or len(stored) >= 1
    unique = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())


def equal(name: str) -> None:
    """One model of the zoo, tied and packed and converted as it is."""
    model = zoo.build(name) if name in zoo.ZOO else make(name)
    with folder_for(model) as folder:
        with readers() as opened:
            whole, ours = both(type(model), folder, tp_plugin.TensorParallelConfig(tp_size=2, infer="trusted"))
        assert_same(whole, ours)
        (reader,) = opened
        if name not in PUT_OFF:
            assert reader.bytes_read == held(ours, reader), f"{reader.bytes_read} bytes were read"


def each(function, names) -> dict[str, str]:
    """``function`` of every name; "" or what it raised."""
    found = {}
    for name in names:
        try:
            function(name)
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc(limit=-4)
    return found


def all_equal():
    return each(equal, MODELS)


@functools.cache
def equality():
    return on_ranks(2, all_equal, timeout_s=600)


@pytest.mark.parametrize("name", MODELS)
def test_equals_loading_the_whole_and_sharding_it(name):
    assert [found[name] for found in equality()] == ["", ""]
