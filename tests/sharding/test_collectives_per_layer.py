"""Collectives of a training step, counted: two all-reduces forward and two backward a dense layer."""

from __future__ import annotations

import functools

import pytest
import torch

from tests.support.models import make
from tests.support.per_layer import collectives, sharded
from tests.support.ranks import on_ranks
from tp_plugin.collectives import counted

CASES = {
    **{f"Llama, {n} layers, ZeRO {z}": ("Llama", n, (4, 2), z) for n in (1, 3) for z in (None, 1, 3)},
    "Qwen3": ("Qwen3", 2, (4, 2), None),
    "Qwen2, one KV head": ("Qwen2", 2, (4, 1), None),
    "reentrant": ("Llama", 2, (4, 2), None, "reentrant"),
    "not reentrant": ("Llama", 2, (4, 2), None, "not"),
}


def all_cases():
    return {name: collectives(*case) for name, case in CASES.items()}


@functools.cache
def counts() -> list[dict[str, dict[tuple[str, bool], int]]]:
    return on_ranks(2, all_cases)


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("stage", [None, 1, 3])
def test_two_forward_and_two_backward_a_layer(layers, stage):
    for found in counts():
        # the embedding leaves its region once more; the loss is one all-gather and one all-reduce
        assert found[f"Llama, {layers} layers, ZeRO {stage}"] == {
            ("leave", False): 2 * layers + 1,
            ("enter", True): 2 * layers,
            ("loss", False): 2,
        }


def test_partial_gradients_cost_one_small_all_reduce_a_parameter():
    for found in counts():
        assert found["Qwen3"][("partial gradient", True)] == 2 * 2  # q_norm and k_norm of each layer
        assert found["Qwen3"][("enter", True)] == 2 * 2
        assert found["Qwen2, one KV head"][("partial gradient", True)] == 2 * 4  # weight and bias of k and v


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_recomputation_repeats_forward_collectives_only(kind):
    for found in counts():
        assert found[kind][("enter", True)] == 2 * 2
        # recomputation runs inside backward, and may stop before a layer's last sum, which nobody needs
        assert 2 <= found[kind][("leave", True)] <= 2 * 2
        assert found[kind][("leave", False)] == 2 * 2 + 1


def sibling_doors():
    """Columns that are called with different tensors enter separately, and the gradient is right."""
    model, plain = sharded(heads=(4, 2)), make(heads=(4, 2), family="Llama").train()
    block, truth = model.model.layers[0].mlp, plain.model.layers[0].mlp
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))

    def run(mlp):
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        mlp.down_proj(mlp.act_fn(mlp.gate_proj(a)) * mlp.up_proj(b)).square().sum().backward()
        return a.grad, b.grad

    with counted() as counter:
        ours = run(block)
    assert counter.count("enter", backward=True) == 2
    for mine, theirs in zip(ours, run(truth), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_different_inputs_enter_separately():
    on_ranks(2, sibling_doors)


def an_input_changed_in_place():
    """A frozen block reuses its buffer between two columns: the second one's gradient belongs to the new values."""
    model, plain = sharded(heads=(4, 2)), make(heads=(4, 2), family="Llama").train()
    block, truth = model.model.layers[0].mlp.requires_grad_(False), plain.model.layers[0].mlp.requires_grad_(False)
    x = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))

    def run(mlp):
        leaf = x.clone().requires_grad_()
        hidden = leaf * 2
        gate = mlp.act_fn(mlp.gate_proj(hidden))
        mlp.down_proj(gate * mlp.up_proj(hidden.mul_(1.5))).square().sum().backward()
        return leaf.grad

    torch.testing.assert_close(run(block), run(truth), rtol=1e-4, atol=1e-5)


def test_an_input_changed_in_place_enters_again():
    on_ranks(2, an_input_changed_in_place)
