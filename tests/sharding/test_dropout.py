"""Dropout under tensor parallelism: reproducible, different inside shards, equal outside, recomputed alike."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.sharding.test_collectives_per_layer import sharded
from tests.support.models import batch
from tests.support.ranks import on_ranks
from tp_plugin.errors import TensorParallelError
from tp_plugin.layers.dropout import draws_random_numbers


def gradients(model, seed: int, rank_specific: bool = False) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed + (dist.get_rank() if rank_specific else 0))
    model.zero_grad()
    model(**batch(0, 2)).loss.backward()
    return {name: param.grad.clone() for name, param in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def two_runs(attention: str):
    """The gradients of two runs with one seed, and of a third with another."""
    model = sharded(attention_dropout=0.3, attn_implementation=attention)
    assert draws_random_numbers(model)
    first, again, other = gradients(model, 1), gradients(model, 1), gradients(model, 2)
    model.eval()
    assert not draws_random_numbers(model)
    return same(first, again), same(first, other)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_one_seed_gives_one_run(attention):
    assert on_ranks(2, two_runs, attention) == [(True, False)] * 2


def recomputed(reentrant: bool):
    """Gradients with and without checkpointing, under dropout inside and between the regions."""
    model = sharded(attention_dropout=0.3)
    for layer in model.model.layers:  # dropout outside the regions too
        layer.input_layernorm = torch.nn.Sequential(layer.input_layernorm, torch.nn.Dropout(0.2))
    plain = gradients(model, 1)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    model.train()
    checkpointed = gradients(model, 1)
    worst = max(float((plain[n] - checkpointed[n]).abs().max() / plain[n].abs().max()) for n in plain)
    state = torch.get_rng_state()
    torch.manual_seed(1)
    with torch.no_grad():
        model(**batch(0, 2))
    return worst, bool(torch.equal(state, torch.get_rng_state()))


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_draws_the_same_masks(reentrant):
    for worst, _ in on_ranks(2, recomputed, reentrant):
        assert worst < 1e-6


def masks():
    """Which elements survive a dropout inside a region, and one outside, on this rank."""
    model = sharded(heads=(4, 4), attention_dropout=0.5)
    block = model.model.layers[0]
    inside: list[torch.Tensor] = []
    outside: list[torch.Tensor] = []
    model.model.norm.register_forward_hook(lambda _m, _a, out: outside.append(torch.rand(64)) or out)
    original = torch.nn.functional.dropout

    def spy(x, p=0.5, training=True, inplace=False):
        inside.append(torch.rand(64))
        return original(x, p, training, inplace)

    model.set_attn_implementation("eager")
    torch.nn.functional.dropout = spy
    torch.manual_seed(7 + dist.get_rank())  # different seeds: the first forward must bring them in step
    model(**batch(0, 2)).loss.backward()
    torch.nn.functional.dropout = original
    assert block is not None
    return torch.stack(inside), torch.stack(outside), torch.rand(8)


def test_masks_differ_inside_shards_and_agree_outside():
    (inside0, outside0, after0), (inside1, outside1, after1) = on_ranks(2, masks)
    assert len(inside0) == 2
    for layer in range(2):
        assert not torch.equal(inside0[layer], inside1[layer])
    assert not torch.equal(inside0[0], inside0[1]), "layers must not repeat each other's masks"
    assert torch.equal(outside0, outside1)
    assert torch.equal(after0, after1), "the generators must stay in step after the forward"


def nested_rate():
    """A rate on a module inside the block, as inferred regions of two modules have it."""
    from tp_plugin.layers.dropout import DerivedRandomness

    block = torch.nn.Module()
    block.inner = torch.nn.Linear(2, 2)
    block.inner.attention_dropout = 0.1
    return DerivedRandomness(block, 0).active()


def test_a_rate_inside_the_block_counts():
    assert nested_rate()


def test_jitter_is_randomness_too():
    router = torch.nn.Linear(2, 2)
    assert not draws_random_numbers(router)
    router.jitter_noise = 0.1
    assert draws_random_numbers(router)


def attentions():
    model = sharded(attn_implementation="eager")
    found = []
    for way in ("argument", "config", "config overruled"):
        model.config.output_attentions = way != "argument"
        arguments = {"argument": {"output_attentions": True}, "config overruled": {"output_attentions": False}}
        try:
            model(**batch(0, 2), **arguments.get(way, {}))
            found.append("")
        except TensorParallelError as refused:
            found.append(str(refused))
    return found


def test_attention_weights_of_all_heads_are_refused():
    for argument, config, overruled in on_ranks(2, attentions):
        assert argument == config
        assert argument.startswith("output_attentions asks for the weights of all heads")
        assert overruled == ""
