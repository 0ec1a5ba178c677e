"""from_pretrained: to the bit what transformers loads and shard_model cuts, and no byte read that a rank does not hold."""

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
from tests.support.train import compare
from tp_plugin.sharding import state_of
from tp_plugin.weights.reader import Reader

MODELS = (*FAMILIES, *zoo.ZOO, *moe.SIZES, *moe.MORE)
LIMITS = {"loss": 1e-5, "norm": 1e-5, "grad": 1e-4, "update": 1e-4, "replicas": 0.0}


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
        for note in ("tp_layout", "tensor_model_parallel"):
            assert getattr(other, note, None) == getattr(tensor, note, None), (name, note)
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


def both(kind, folder: str, config: tp_plugin.TensorParallelConfig, **options):
    """``folder`` loaded by transformers and sharded, and by us, from one state of the random generator."""
    torch.manual_seed(5)
    whole = kind.from_pretrained(folder, **options)
    tp_plugin.shard_model(whole, config)
    torch.manual_seed(5)
    return whole, tp_plugin.from_pretrained(folder, config=config, model_class=kind, **options)


def held(model) -> int:
    """Bytes of a rank's parameters and persistent buffers, tied ones once."""
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
        assert reader.bytes_read == held(ours), f"{reader.bytes_read} bytes were read"


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


CASES: dict[tuple[int, int], list[dict]] = {
    (2, 2): [
        *[{"family": "Qwen3", "stage": stage, "way": "load", "heads": (6, 3)} for stage in (0, 1, 2, 3)],
        {"family": "Mixtral", "stage": 1, "way": "load"},
        {"family": "gpt2", "stage": 3, "way": "load"},
        {"family": "Llama", "stage": 3, "way": "zero3 order"},
        {"family": "Qwen2", "stage": 3, "way": "zero3 order", "tied": True},
        {"family": "Qwen2Moe", "stage": 3, "way": "zero3 order", "gradients": False},
        {"family": "t5", "stage": 3, "way": "zero3 order"},
    ],
    (4, 2): [
        {"family": "Qwen3", "stage": 3, "way": "zero3 order"},
        {"family": "Llama", "stage": 2, "way": "load", "tied": True},
    ],
    (4, 4): [
        {"family": "Qwen2", "stage": 3, "way": "zero3 order", "heads": (8, 2)},
        {"family": "Llama", "stage": 1, "way": "load", "heads": (4, 1)},
    ],
}


def run_cases(tp: int, cases: list[dict]) -> list[dict[str, float] | str]:
    results: list[dict[str, float] | str] = []
    for case in cases:
        try:
            results.append(compare(tp=tp, **case))
        except Exception:
            results.append(traceback.format_exc())
    return results


@functools.cache
def trained(world: int, tp: int) -> list:
    return on_ranks(world, run_cases, tp, CASES[world, tp], timeout_s=600)


PARAMETERS = [(world, tp, index) for (world, tp), cases in CASES.items() for index in range(len(cases))]


@pytest.mark.parametrize(("world", "tp", "index"), PARAMETERS, ids=lambda value: str(value))
def test_what_was_loaded_by_slices_trains_like_one_process(world, tp, index):
    for result in trained(world, tp):
        errors = result[index]
        assert isinstance(errors, dict), errors
        assert all(errors[key] <= limit for key, limit in LIMITS.items()), errors
