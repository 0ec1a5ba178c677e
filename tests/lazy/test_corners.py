"""Corners of lazy logits that once went wrong: rounding, autocast, masks, empty rows, changes in place."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.support.heads import B, Case, H, T, V
from tests.support.ranks import on_ranks
from tp_plugin.errors import TensorParallelError
from tp_plugin.lazy import lazy_logits
from tp_plugin.loss import VocabShard


def half_head(n=400, h=64, v=300):
    random = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(n, h, generator=random), torch.randn(v, h, generator=random)
    return (hidden * 0.75).bfloat16(), weight.bfloat16()


def test_log_probabilities_in_half_precision_are_none_above_zero():
    """The selected logit and the normaliser are made of products rounded alike."""
    hidden, weight = half_head()
    plain = F.linear(hidden, weight)
    lazy = lazy_logits(hidden, weight, None, VocabShard.balanced(len(weight), None))
    ids = plain.argmax(-1, keepdim=True)
    exact = (hidden.double() @ weight.double().T).log_softmax(-1).gather(-1, ids)
    expected = plain.float().log_softmax(-1).gather(-1, ids)
    for found in (
        lazy.float().log_softmax(-1).gather(-1, ids),
        (lazy.float().gather(-1, ids).squeeze(-1) - lazy.float().logsumexp(-1)).unsqueeze(-1),
    ):
        assert found.max() <= 1e-5
        assert (found - exact).norm() <= 1.05 * (expected - exact).norm()


def test_single_logits_are_not_touched_by_autocast():
    case = Case(dtype=torch.float32)
    ids = case.labels.clamp(min=0).unsqueeze(-1)
    with torch.autocast("cpu", torch.bfloat16):
        found = case.lazy.gather(-1, ids), case.lazy.max(-1).values
        expected = case.plain.gather(-1, ids), case.plain.max(-1).values
    torch.testing.assert_close(found, expected)


def masked_at_the_border():
    vocab = VocabShard.balanced(V, dist.group.WORLD)
    case = Case(vocab.sizes)
    mask = torch.full((V,), float("-inf"), dtype=torch.float64)
    mask[[2, 3, 9, 10]] = 0.0
    ids = torch.tensor([2, 10]).expand(B, T, 2)
    for use in (lambda x: x.gather(-1, ids), lambda x: x.log_softmax(-1).gather(-1, ids), lambda x: x.max(-1).values):
        torch.testing.assert_close(use(case.lazy + mask), use(case.plain + mask))
    nothing = torch.full((V,), float("-inf"), dtype=torch.float64)
    assert not (case.lazy + nothing).argmax(-1).any()


def test_masked_words_of_another_rank_are_no_nan():
    on_ranks(2, masked_at_the_border)


@pytest.mark.parametrize("way", ["mean", "none", "values"])
def test_a_sum_over_tokens_that_float16_cannot_hold(way):
    """Unnormalised weight gradients of thousands of alike tokens overflow float16; the mean's do not."""
    n, h, v = 8192, 8, 4
    hidden, labels = torch.full((n, h), 16.0).half(), torch.zeros(n, dtype=torch.int64)
    weights = [torch.zeros(v, h).half().requires_grad_() for _ in range(2)]
    lazy = lazy_logits(hidden, weights[1], None, VocabShard.balanced(v, None))
    both = F.linear(hidden, weights[0]), lazy.materialize() if way == "values" else lazy
    for weight, logits in zip(weights, both, strict=True):
        reduction = "none" if way == "none" else "mean"
        F.cross_entropy(logits.float(), labels, reduction=reduction).mean().backward()
        assert weight.grad.isfinite().all()
    torch.testing.assert_close(weights[1].grad, weights[0].grad, rtol=1e-2, atol=1e-2)


def test_hidden_states_changed_in_place_are_noticed():
    for grad in (True, False):
        hidden = torch.randn(B, T, H)
        with torch.set_grad_enabled(grad):
            x = lazy_logits(hidden, torch.randn(V, H), None, VocabShard.balanced(V, None))
            hidden.mul_(2)
            with pytest.raises(TensorParallelError, match="hidden states they come from were changed in place"):
                F.cross_entropy(x.view(-1, V), torch.zeros(B * T, dtype=torch.int64))


def test_a_wider_row_is_added_in_its_own_precision():
    hidden, weight = half_head(20)
    row = torch.linspace(-9.123, -3.3, len(weight))
    lazy = lazy_logits(hidden, weight, None, VocabShard.balanced(len(weight), None)).float() + row
    torch.testing.assert_close(lazy.sum(-1), (F.linear(hidden, weight).float() + row).sum(-1))


def test_empty_selections_give_what_plain_logits_give():
    case = Case()
    nothing = torch.zeros(B, T, dtype=torch.bool)
    x, plain = case.lazy[nothing], case.plain[nothing]
    ids = torch.zeros(0, 2, dtype=torch.int64)
    for use in (
        lambda x: x.gather(-1, ids),
        lambda x: x.log_softmax(-1).gather(-1, ids),
        lambda x: x.max(-1).values,
        lambda x: x.topk(2).values,
        lambda x: x.argmax(-1),
        lambda x: x.logsumexp(-1),
    ):
        torch.testing.assert_close(use(x), use(plain))


def changed_losses(x, y):
    losses = F.cross_entropy(x.reshape(-1, V), y.reshape(-1), reduction="none")
    losses *= torch.arange(B * T)
    return losses.sum()


def changed_log_probabilities(x, y):
    copy = x.log_softmax(-1).clone()
    copy[..., 0] = 0.0
    rows = x.log_softmax(-1)[:, torch.tensor([1, 2])]
    rows *= 2
    return copy.square().sum() + rows.square().sum()


@pytest.mark.parametrize("use", [changed_losses, changed_log_probabilities])
def test_results_may_be_changed_in_place(use):
    assert Case().difference(use) <= 1e-10


def test_log_probabilities_are_rounded_after_the_normalisation():
    hidden, weight = half_head(50)
    x = lazy_logits(hidden, weight, None, VocabShard.balanced(len(weight), None)).float()
    plain = F.linear(hidden, weight).float()
    assert torch.equal(x.log_softmax(-1).half().sum(-1), plain.log_softmax(-1).half().sum(-1))
    assert torch.equal(x.to(torch.float16, False, True), plain.half())
