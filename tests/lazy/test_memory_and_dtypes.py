"""Lazy logits in half precision, under autocast and recomputation, and what they keep in memory."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.support.heads import Case, V, ce
from tests.support.ranks import on_ranks
from tp_plugin.collectives import counted
from tp_plugin.errors import TensorParallelError
from tp_plugin.lazy import STEPS, VocabParallelLogits, lazy_logits
from tp_plugin.loss import VocabShard


def fp16_loss_scale(sizes):
    """Sums, so that the loss scale 2^16 alone is more than half precision holds, and small factors, so that the
    gradients themselves are not."""
    case = Case(sizes, dtype=torch.float16)
    with torch.no_grad():
        for part, factor in zip(case.own + case.full, (0.05, 0.05, 1.0) * 2, strict=True):
            part.mul_(factor)
    full = [x.detach().double().requires_grad_() for x in case.full[:2]]
    scale, errors = 2.0**16, []
    for use in (
        lambda x, y: ce(x.float(), y, reduction="sum"),
        lambda x, y: ce(x.float(), y, reduction="none").sum(),
        lambda x, y: x.float()[..., 3].sum() + x.float().logsumexp(-1).mean(),
        lambda x, y: ce(5.0 * torch.tanh(x.float() / 5.0), y),
    ):
        expected = torch.autograd.grad(use(F.linear(*full), case.labels), full)
        lazy = lazy_logits(case.own[0], case.own[1], None, case.vocab)
        got = torch.autograd.grad(use(lazy, case.labels) * scale, case.own[:2])
        own = slice(case.vocab.start, case.vocab.stop)
        for a, e in zip(got, [expected[0], expected[1][own]], strict=True):
            assert a.dtype == torch.float16
            errors.append(((a.double() / scale - e).norm() / e.norm()).item())
    return errors


def test_half_precision_survives_a_loss_scale():
    for sizes in ((13,), (7, 6)):
        for errors in on_ranks(len(sizes), fp16_loss_scale, sizes):
            assert all(error <= 1e-3 for error in errors), errors


def released_weight():
    """ZeRO-3 takes the parameter's storage away between forward and backward."""
    vocab = VocabShard.balanced(V, dist.group.WORLD)
    case = Case(vocab.sizes)
    weight = torch.nn.Parameter(case.own[1].detach().clone())
    x = lazy_logits(case.own[0], weight, None, vocab)
    weight.data = torch.empty(0, dtype=weight.dtype)
    loss = ce(x, case.labels) + x.logsumexp(-1).sum() + ce(x, case.labels, reduction="none").sum()
    got = torch.autograd.grad(loss, case.own[0])[0]
    plain = F.linear(case.full[0], case.full[1])
    truth = ce(plain, case.labels) + plain.logsumexp(-1).sum() + ce(plain, case.labels, reduction="none").sum()
    torch.testing.assert_close(got, torch.autograd.grad(truth, case.full[0])[0])


def test_a_released_weight_keeps_its_storage():
    on_ranks(2, released_weight)


def test_autocast_makes_what_linear_makes():
    case = Case(dtype=torch.float32)
    found = []
    for make in (lambda: lazy_logits(*case.own, case.vocab), lambda: F.linear(*case.own)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = make()
            assert logits.dtype == torch.bfloat16
            loss = ce(logits, case.labels)
            assert loss.dtype == torch.float32
            aux = logits.float().logsumexp(-1).sum()
        found.append([loss, aux, *torch.autograd.grad(loss + aux, case.own)])
    assert type(logits) is not VocabParallelLogits
    for ours, plain in zip(*found, strict=True):
        assert ours.dtype == plain.dtype
        assert (ours - plain).norm() <= 2e-2 * plain.norm()


def checkpointed():
    from torch.utils.checkpoint import checkpoint

    vocab = VocabShard.balanced(V, dist.group.WORLD)
    case = Case(vocab.sizes)
    found = []
    for reentrant in (None, False, True):

        def head(hidden, weight, bias):
            return ce(lazy_logits(hidden, weight, bias, vocab), case.labels)

        loss = head(*case.own) if reentrant is None else checkpoint(head, *case.own, use_reentrant=reentrant)
        loss.backward()
        found.append([x.grad.clone() for x in case.own])
        for x in case.own:
            x.grad = None
    for other in found[1:]:
        torch.testing.assert_close(found[0], other)


def test_recomputation_gives_the_same_gradients():
    on_ranks(2, checkpointed)


def test_nothing_is_computed_twice_by_looking():
    case = Case()
    with counted() as counter:
        repr(case.lazy), case.lazy.shape, case.lazy.float(), case.lazy[:, 1:].view(-1, V)
    assert not counter.records
    assert case.lazy._full is None


def test_logits_used_after_the_step_raise():
    case = Case()
    labels = case.labels
    optimizer = torch.optim.SGD(case.own, lr=0.1)
    kept = case.lazy.materialize()
    sliced = case.lazy[:, 1:].float()
    ce(case.lazy, labels).backward()
    optimizer.step()
    for use in (case.lazy.sum, case.lazy.materialize, lambda: ce(case.lazy, labels), sliced.exp):
        with pytest.raises(TensorParallelError, match="optimizer has stepped"):
            use()
    assert case.lazy.shape == kept.shape
    assert sliced.dtype == torch.float32
    fresh = lazy_logits(*case.own, case.vocab)
    fresh.sum()
    STEPS.increase()
    with pytest.raises(TensorParallelError, match="optimizer has stepped"):
        fresh.sum()


def test_logits_computed_before_the_step_stay():
    case = Case()
    case.lazy.add_(1)
    STEPS.increase()
    torch.testing.assert_close(case.lazy.materialize(), case.plain + 1)
