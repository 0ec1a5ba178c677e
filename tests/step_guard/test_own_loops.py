"""Training loops whose loss is made of parts of a sharded model: wrong ones are stopped, sound ones go on."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch
from torch.nn import functional as F

import tp_plugin
from tests.support.adapters import adapt
from tests.support.guarded import engine_of
from tests.support.models import batch
from tests.support.ranks import on_ranks
from tests.support.train import model_of
from tp_plugin.step_guard.differences import relative
from tp_plugin.step_guard.guard import guard_of


def loss_of_a_shard(engine, inputs, called):
    """As a loop has it that makes its loss itself, of the weight that the head has on this rank."""
    if called == "trunk":
        hidden = engine.module.model(input_ids=inputs["input_ids"]).last_hidden_state
    else:
        hidden = engine(input_ids=inputs["input_ids"], output_hidden_states=True).hidden_states[-1]
    logits = hidden @ engine.module.lm_head.weight.T
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten().clamp(-100, 60))


def term_of_a_shard(engine, inputs, called):
    """One that gives replicas no gradient at all, beside the model's own loss."""
    return engine(**inputs).loss + engine.module.model.layers[0].self_attn.q_proj.weight.norm()


def unseen_loss_of_a_shard(engine, inputs, called):
    """The same value on all ranks."""
    loss = loss_of_a_shard(engine, inputs, called)
    return loss - loss.detach() + 1


def a_loop_of_ones_own(called, guard, loss_of=unseen_loss_of_a_shard):
    """The step at which it was stopped, and how."""
    engine = engine_of("Llama", 1, {"tp_plugin": {"guard": guard, "quiet": True}})
    engine.optimizer.param_groups[0]["lr"] = 0.1 if not guard else 1e-6
    with contextlib.redirect_stderr(io.StringIO()) as said:
        for step in range(4):
            try:
                engine.backward(loss_of(engine, batch(step, 3), called))
            except tp_plugin.TensorParallelError as refused:
                return step, str(refused), said.getvalue()
            engine.step()
    return None, "", said.getvalue()


@pytest.mark.parametrize("called", ["engine", "trunk"])
@pytest.mark.parametrize("guard", [True, False])
def test_a_loop_whose_loss_reads_a_shard_is_stopped_by_gradients_or_after_its_first_step(called, guard):
    """Two batches make a step: gradients are compared after the first of them, replicas after the second."""
    found = on_ranks(2, a_loop_of_ones_own, called, guard)
    for step, refused, _ in found:
        assert step == (1 if guard else 2)
        assert refused.startswith("the gradient of '" if guard else "'")
        assert "is not the same on the ranks of a tensor-parallel group" in refused
        assert "on rank 1 it differs from the first of the group" in refused
        assert "look for a loss that reads a sharded weight by itself" in refused
    assert ("the loss is made of a part of the model" in found[0][2]) == (guard and called == "trunk")


@pytest.mark.parametrize("loss_of", [loss_of_a_shard, term_of_a_shard])
def test_a_loop_whose_loss_is_another_on_every_rank_is_stopped_at_its_first_backward(loss_of):
    for step, refused, _ in on_ranks(2, a_loop_of_ones_own, "engine", True, loss_of):
        assert step == 0
        assert "the loss is not the same on the ranks of a tensor-parallel group" in refused
        assert "look for a loss that reads a sharded weight by itself" in refused


def term_of_a_summed_parameter(engine, inputs, called, vector=False):
    """A term of LoRA's A, as losses that keep adapters orthogonal have: whole on every rank, its gradient summed."""
    (first,) = [p for n, p in engine.module.named_parameters() if "layers.0.self_attn.q_proj.lora_A" in n]
    read = torch.nn.utils.parameters_to_vector([first]) if vector else first.flatten()
    return engine(**inputs).loss + 0.1 * read.pow(2).sum()


def a_loop_with_a_term_of_an_adapter(vector, late=False):
    """The refusal, or how far the gradient of that A is from the one of the same loop in one process."""
    engine = engine_of("Llama", 0, adapter="every linear", late=late)
    try:
        engine.backward(term_of_a_summed_parameter(engine, batch(0, 3), "engine", vector))
    except tp_plugin.TensorParallelError as refused:
        return str(refused)
    plain = adapt(model_of("Llama"), "every linear")
    (name,) = [n for n, _ in plain.named_parameters() if "layers.0.self_attn.q_proj.lora_A" in n]
    truth = dict(plain.named_parameters())[name]
    (plain(**batch(0, 3)).loss + 0.1 * truth.flatten().pow(2).sum()).backward()
    ours = dict(engine.module.named_parameters())[name].grad
    return relative(ours * engine.gradient_accumulation_steps(), truth.grad)


def test_a_term_of_a_parameter_whose_gradient_is_summed_is_refused_and_its_vector_counts_once():
    refused, vector = (on_ranks(2, a_loop_with_a_term_of_an_adapter, way) for way in (False, True))
    late = on_ranks(2, a_loop_with_a_term_of_an_adapter, False, True)
    for said in refused + late:
        assert "layers.0.self_attn.q_proj.lora_A" in said
        assert "its term would count 2 times: to count it once, put torch.nn.utils.parameters_to_vector" in said
    assert max(vector) <= 1e-5


def a_sound_loop_around_the_trunk():
    engine = engine_of("Llama", 3)
    for step in range(3):
        hidden = engine.module.model(input_ids=batch(step, 3)["input_ids"]).last_hidden_state
        engine.backward(hidden.pow(2).mean())
        engine.step()
    return guard_of(engine).forwards


def test_a_sound_loop_around_the_trunk_is_not_stopped():
    assert on_ranks(2, a_sound_loop_around_the_trunk) == [3, 3]
