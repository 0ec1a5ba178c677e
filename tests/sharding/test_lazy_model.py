"""The rules of lazy logits, seen from a sharded model: what users do with ``outputs.logits``."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.support.models import batch, make
from tests.support.per_layer import sharded
from tests.support.ranks import errors_on_ranks, on_ranks
from tp_plugin.errors import TensorParallelError
from tp_plugin.lazy import VocabParallelLogits
from tp_plugin.param_info import layout_of

FAMILY = {"family": "Qwen3", "heads": (4, 2)}


def read_on_one_rank():
    """A no_grad forward hands out whole logits, so one rank may read them alone."""
    model = sharded(**FAMILY).eval()
    data = batch(0, 2)
    with torch.no_grad():
        out = model(**data)
        again = model.get_output_embeddings()(torch.ones(1, 2, 32))  # the head by itself
    assert type(out.logits) is torch.Tensor
    assert type(again) is torch.Tensor
    if dist.get_rank() == 0:
        truth = make(**FAMILY)(**data)
        assert torch.equal(out.logits.argmax(-1), truth.logits.argmax(-1))
        torch.testing.assert_close(out.loss, truth.loss)
        torch.testing.assert_close(out["logits"], truth.logits.detach(), rtol=1e-4, atol=1e-5)
    dist.barrier()


def test_logits_of_an_evaluation_can_be_read_by_one_rank_alone():
    on_ranks(2, read_on_one_rank, timeout_s=90)


def read_after_step():
    model = sharded(**FAMILY)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    out = model(**batch(0, 2))
    out.loss.backward()
    optimizer.step()
    with pytest.raises(TensorParallelError, match="step"):
        out.logits.argmax(-1)


def test_logits_read_after_the_optimizer_stepped_raise():
    on_ranks(2, read_after_step)


def losses_of_my_own(kind: str):
    """Losses people write themselves, with a gradient; ours and one process's."""

    def loss_of(model):
        data = batch(0, 2)
        labels = data["input_ids"]
        logits = model(input_ids=data["input_ids"], logits_to_keep=6).logits if kind == "keep" else model(**data).logits
        labels = labels[:, -logits.shape[1] :]
        if kind == "in place":
            logits[..., 5] = -3.0
            logits /= 2.0
        if kind == "two consumers":
            flat = logits.view(-1, logits.shape[-1])
            return F.cross_entropy(flat, labels.reshape(-1)) + 0.1 * torch.logsumexp(flat, -1).square().mean()
        if kind == "log_softmax":
            return -F.log_softmax(logits.float(), -1).gather(-1, labels.unsqueeze(-1)).mean()
        return F.cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), labels[:, 1:].reshape(-1))

    ours, plain = sharded(**FAMILY), make(**FAMILY).train()
    mine, theirs = loss_of(ours), loss_of(plain)
    mine.backward()
    theirs.backward()
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    wanted = dict(plain.named_parameters())
    for name, param in ours.named_parameters():
        layout = layout_of(param)
        grad = wanted[name].grad
        grad = grad if layout is None else layout.shard(grad, dist.get_rank())
        torch.testing.assert_close(param.grad, grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("kind", ["shifted", "keep", "in place", "two consumers", "log_softmax"])
def test_losses_written_by_hand_equal_one_process(kind):
    on_ranks(2, losses_of_my_own, kind)


def stays_lazy():
    out = sharded(**FAMILY)(**batch(0, 2))
    assert isinstance(out.logits, VocabParallelLogits)
    assert tuple(out.logits.shape) == (2, 12, 131)


def test_logits_of_a_training_forward_are_not_computed():
    on_ranks(2, stays_lazy)


def compiled():
    data = batch(0, 2)
    ours, plain = sharded(**FAMILY), make(**FAMILY).train()
    loss = torch.compile(ours, backend="aot_eager")(**data).loss
    loss.backward()
    truth = plain(**data).loss
    truth.backward()
    torch.testing.assert_close(loss, truth, rtol=1e-5, atol=1e-6)
    wanted = dict(plain.named_parameters())
    for name, param in ours.named_parameters():
        layout = layout_of(param)
        grad = wanted[name].grad if layout is None else layout.shard(wanted[name].grad, dist.get_rank())
        torch.testing.assert_close(param.grad, grad, rtol=1e-3, atol=1e-5)


def test_compiled_models_equal():
    on_ranks(2, compiled, timeout_s=240)


def compiled_without_graph_breaks():
    torch.compile(sharded(**FAMILY), backend="aot_eager", fullgraph=True)(**batch(0, 2))


def test_fullgraph_is_refused():
    for error in errors_on_ranks(2, compiled_without_graph_breaks, timeout_s=240):
        assert "compile without fullgraph=True" in error


def copied():
    with pytest.raises(TensorParallelError, match="copy"):
        copy.deepcopy(sharded(**FAMILY))


def test_a_sharded_model_cannot_be_copied():
    on_ranks(2, copied)


def generated():
    data = batch(0, 2)["input_ids"][:, :5]
    options = {"max_new_tokens": 6, "do_sample": False}
    ours = sharded(**FAMILY).eval().generate(data, **options)
    truth = make(**FAMILY).eval().generate(data, **options)
    assert torch.equal(ours, truth)


def test_greedy_generation_equals_one_process():
    on_ranks(2, generated)
