"""The dense families beyond training: export, generation, collectives, dropout and balance. One launch of two ranks."""

from __future__ import annotations

import tempfile
from typing import Any

import pytest
import torch
import torch.distributed as dist
from transformers import GenerationMixin

import tp_plugin
from tests.support import zoo
from tests.support.batched_cases import launched, values
from tests.support.models import make
from tests.support.zoo import ZOO
from tp_plugin.collectives import counted
from tp_plugin.config import TensorParallelConfig
from tp_plugin.lazy import VocabParallelLogits
from tp_plugin.mesh import ParallelMesh
from tp_plugin.plans import plan_for
from tp_plugin.sharding import shard_in_place

TP = 2
HERE = __name__


def sharded(model: torch.nn.Module) -> Any:
    shard_in_place(model, TensorParallelConfig(tp_size=TP, check_batch_every=0), ParallelMesh.create(TP))
    return model


# ---- export ------------------------------------------------------------------------------------------------------


def outputs_of(model: Any, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**zoo.data_for(name)(0, 2)).logits


def export() -> dict[str, tuple[float, bool]]:
    """Family -> largest difference of the logits of the model that plain ``from_pretrained`` loads, ties kept."""
    found = {}
    for name in ZOO:
        plain, model = zoo.build(name), sharded(zoo.build(name))
        folder: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(folder)
        tp_plugin.save_pretrained(model, folder[0])
        loaded = type(plain).from_pretrained(folder[0])
        difference = (outputs_of(loaded, name) - outputs_of(plain, name)).abs().max()
        found[name] = float(difference), ties(loaded) == ties(plain)
    return found


def ties(model: torch.nn.Module) -> list[list[str]]:
    names: dict[int, list[str]] = {}
    for name, param in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(param), []).append(name)
    return sorted(each for each in names.values() if len(each) > 1)


# ---- generation --------------------------------------------------------------------------------------------------

WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beam": {"num_beams": 3},
}
LENGTH = {"max_new_tokens": 7, "min_new_tokens": 7, "no_repeat_ngram_size": 1}  # untrained models repeat themselves
GENERATORS = ("llama", "gpt2", "bloom", "falcon new", "falcon rw", "phi3", "olmo2", "t5", "bart", "whisper")


def generator(name: str) -> Any:
    return (make("Llama", heads=(4, 2)) if name == "llama" else zoo.build(name)).eval()


def tokens_of(model: Any, name: str, way: str) -> tuple[list[int], list[int]]:
    """The tokens, and the numbers of heads in the KV cache."""
    data = zoo.data_for("gpt2" if name == "llama" else name)(0, 2)
    inputs = data["input_features"] if name == "whisper" else data["input_ids"]
    torch.manual_seed(11)
    # of the mixin: Whisper's own is about long audio
    made = GenerationMixin.generate(model, inputs, return_dict_in_generate=True, **LENGTH, **WAYS[way])
    cache = made.past_key_values
    parts = [getattr(cache, part) for part in ("self_attention_cache", "cross_attention_cache") if hasattr(cache, part)]
    heads = {layer.keys.shape[1] for part in (parts or [cache]) for layer in part.layers}
    return made.sequences.flatten().tolist(), sorted(heads)


def generation() -> dict[str, dict[str, tuple]]:
    found: dict[str, dict[str, tuple]] = {}
    for name in GENERATORS:
        plain, model = generator(name), sharded(generator(name))
        found[name] = {way: (tokens_of(plain, name, way), tokens_of(model, name, way)) for way in WAYS}
    return found


# ---- collectives -------------------------------------------------------------------------------------------------


def collectives() -> dict[str, tuple[bool, dict[tuple[str, bool], int], set[int]]]:
    """Family -> whether its logits were never computed, the collectives of a training step, bytes of those of norms."""
    found = {}
    for name in ZOO:
        model = sharded(zoo.build(name).train())
        for _ in range(2):  # the first forward brings the random generators in step
            with counted() as counter:
                out = model(**zoo.data_for(name)(0, 2))
                out.loss.backward()
        counts: dict[tuple[str, bool], int] = {}
        for record in counter.records:
            key = record.purpose, record.backward
            counts[key] = counts.get(key, 0) + 1
        norms = {record.nbytes for record in counter.records if record.purpose == "norm"}
        found[name] = isinstance(out.logits, VocabParallelLogits), counts, norms
    return found


# ---- dropout -----------------------------------------------------------------------------------------------------

DROPPING = {
    "bert": {"attention_probs_dropout_prob": 0.3},
    "gpt2": {"attn_pdrop": 0.3},
    "t5": {"dropout_rate": 0.3},
    "opt": {"attention_dropout": 0.3},
}


def gradients(model: Any, name: str, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    model.zero_grad()
    model(**zoo.data_for(name)(0, 2)).loss.backward()
    return {key: param.grad.clone() for key, param in model.named_parameters()}


def dropout() -> dict[str, tuple[bool, bool, list[float]]]:
    """Family -> one seed one run, another seed another run, and the generators' next number on each rank."""
    found = {}
    for name, rates in DROPPING.items():
        model = sharded(zoo.build(name, **rates).train())
        first, again, other = (gradients(model, name, seed) for seed in (1, 1, 2))
        same = all(torch.equal(first[key], again[key]) for key in first)
        differs = any(not torch.equal(first[key], other[key]) for key in first)
        found[name] = same, differs, torch.rand(3).tolist()
    return found


def masks() -> dict[str, list[torch.Tensor]]:
    """Family -> random numbers drawn where its first attention drops, on this rank."""
    found: dict[str, list[torch.Tensor]] = {}
    original = torch.nn.functional.dropout
    for name, rates in DROPPING.items():
        model, drawn = sharded(zoo.build(name, attn_implementation="eager", **rates).train()), []

        def spy(x, p=0.5, training=True, inplace=False, drawn=drawn):
            if x.dim() == 4:  # the attention's probabilities
                drawn.append(torch.rand(16))
            return original(x, p, training, inplace)

        torch.nn.functional.dropout = spy
        try:
            torch.manual_seed(3)
            model(**zoo.data_for(name)(0, 2)).loss.backward()
        finally:
            torch.nn.functional.dropout = original
        found[name] = drawn
    return found


CASES = ("export", "generation", "collectives", "dropout", "masks")


def results(case: str) -> list[Any]:
    return values(launched(TP, HERE, CASES), case)


@pytest.mark.parametrize("name", ZOO)
def test_plain_transformers_loads_what_was_saved(name):
    for rank in results("export"):
        difference, tied_alike = rank[name]
        assert difference == 0.0
        assert tied_alike


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GENERATORS)
def test_generates_the_tokens_of_one_process_with_half_the_cache(name, way):
    for rank in results("generation"):
        (tokens, heads), (ours, own) = rank[name][way]
        assert ours == tokens
        assert len(set(tokens)) > 4, "a model that repeats one token proves little"
        assert [2 * n for n in own] == heads


@pytest.mark.parametrize("name", ZOO)
def test_losses_are_vocabulary_parallel_and_regions_have_one_door(name):
    for rank in results("collectives"):
        lazy, counts, norm_bytes = rank[name]
        assert lazy == (ZOO[name][3] != zoo.CLASSES)
        assert counts.get(("loss", False), 0) == (2 if lazy else 0)
        assert not any(purpose == "logits" for purpose, _ in counts)
        plan = plan_for(zoo.build(name), TP)
        looked_up = [one for one in plan.names("vocab_embedding") if not one.endswith("shared")]
        assert counts["leave", False] == len(plan.regions) + len(looked_up)
        # attention between encoder and decoder has two doors: its queries', and that of its keys and values
        between = [one.block for one in plan.regions if one.block.endswith(BETWEEN)]
        assert counts["enter", True] == len(plan.regions) + len(between) + MORE_DOORS.get(name, 0)
        norms = sum(count for (purpose, _), count in counts.items() if purpose == "norm")
        assert norms == (2 * 2 * 2 if name == "olmo2" else 0)  # queries and keys, each layer, forward and backward
        assert norm_bytes <= {2 * 12 * 4}, "one number a token, whatever the width"


BETWEEN = ("encoder_attn", "EncDecAttention", "crossattention")
MORE_DOORS = {"longt5 global": 2}  # keys and values of a summary of the whole text too, in both encoder layers


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_inside_sharded_attention(name):
    ranks = results("dropout")
    for same, differs, _ in (rank[name] for rank in ranks):
        assert same
        assert differs
    assert ranks[0][name][2] == ranks[1][name][2], "the generators must stay in step"
    first, second = (rank[name] for rank in results("masks"))
    assert first
    assert len(first) == len(second)
    assert all(not torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("name", [name for name in ZOO if ZOO[name][3] != zoo.CLASSES])
def test_ranks_are_balanced(name):
    model = zoo.build(name)  # four heads; widths and vocabulary are odd
    plan, held, seen = plan_for(model, TP), [0] * TP, set()
    for module, placement in plan.placements.items():
        for leaf, layout in placement.layouts.items():
            param = getattr(model.get_submodule(module), leaf)
            if id(param) not in seen:
                seen.add(id(param))
                for rank in range(TP):
                    held[rank] += torch.Size(layout.local_shape(rank)).numel() * param.element_size()
    whole = sum(model.get_parameter(key).nbytes for key in plan.replicated)
    total = sum(param.nbytes for param in model.parameters())
    assert sum(held) + whole >= total, "a parameter is nowhere"
    shares = [bytes_ + whole for bytes_ in held]
    assert max(shares) <= 1.05 * sum(shares) / TP
