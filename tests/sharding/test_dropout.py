"""Dropout under tensor parallelism: reproducible, different inside shards, equal outside, recomputed alike."""

from __future__ import annotations

import numpy
import pytest
import torch
import torch.distributed as dist

import tp_plugin
from tests.support import zoo
from tests.support.models import batch, make
from tests.support.per_layer import sharded
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


def losses_beside_one_process() -> tuple[float, float]:
    """Relative differences from the plain model with the same seed: in training, and without dropout."""
    ours, plain = sharded(attention_dropout=0.3), make("Llama", attention_dropout=0.3)
    found = []
    for training in (True, False):
        losses = []
        for model in (ours, plain):
            torch.manual_seed(1)
            losses.append(model.train(training)(**batch(0, 2)).loss.item())
        found.append(abs(losses[0] / losses[1] - 1))
    return found[0], found[1]


def test_one_process_draws_other_masks():
    """README says so: equal in distribution, not in numbers."""
    for dropping, without in on_ranks(2, losses_beside_one_process):
        assert dropping > 1e-4
        assert without < 1e-6


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


def spectrograms():
    """What Whisper's encoder is given in two forwards, by a loop that has seeded torch alone."""
    numpy.random.seed(dist.get_rank())
    model = zoo.build("whisper", 0, apply_spec_augment=True, mask_time_prob=0.5, mask_time_length=2)
    tp_plugin.shard_model(model, tp_plugin.TensorParallelConfig(tp_size=2, quiet=True, guard=False))
    seen: list[torch.Tensor] = []
    model.model.encoder.register_forward_pre_hook(lambda _module, args: seen.append(args[0].clone()))
    data = zoo.data_for("whisper")(0, 2)
    for _ in range(2):
        model.train()(**data)
    return seen, data["input_features"]


def test_spectrograms_are_masked_alike():
    (ours, given), (theirs, _) = on_ranks(2, spectrograms)
    assert len(ours) == 2
    assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], ours[1])
    assert not torch.equal(ours[0], given)


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
