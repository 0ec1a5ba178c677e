"""The fused vocabulary-parallel loss against plain autograd on the whole vocabulary."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.support.loss_problems import N, V, difference, problem
from tests.support.ranks import on_ranks
from tp_plugin.errors import TensorParallelError
from tp_plugin.loss import VocabShard, cross_entropy, linear_cross_entropy, reference_cross_entropy

CASES = st.fixed_dictionaries(
    {
        "n": st.integers(0, 9),
        "seed": st.integers(0, 99),
        "reduction": st.sampled_from(["mean", "sum", "none"]),
        "label_smoothing": st.sampled_from([0.0, 0.3, 1.0]),
        "z_loss": st.sampled_from([0.0, 0.01, -0.1]),
        "softcap": st.sampled_from([None, 0.5, 30.0, 0.0]),
        "scale": st.sampled_from([1.0, 0.1, -2.0]),
        "ignore_index": st.sampled_from([-100, 0, 3]),
        "num_items": st.sampled_from([None, 5, 0.5]),
        "budget": st.integers(1, 3000) | st.none(),
        "recompute": st.booleans(),
        "with_bias": st.booleans(),
        "weights": st.sampled_from([None, "fixed", "learned"]),
        "labels": st.sampled_from(["some", "some", "all ignored", "first rank", "whole", "shard"]),
        "classes": st.booleans(),
        "frozen": st.sampled_from(["", "", "hidden", "weight"]),
        "through": st.sampled_from(["loss", "both", "stats"]),
    }
).map(lambda case: case | {"num_items": None} if case["reduction"] == "none" else case)


@settings(max_examples=150, deadline=None)
@given(CASES, st.integers(1, 9))
def test_every_combination_of_options(case, v):
    assert difference(case, (v,)) <= 1e-10


def all_differences(cases, sizes):
    return [difference(case, sizes) for case in cases]


@pytest.mark.parametrize("sizes", [(12, 11), (20, 0, 3), (2, 1, 1, 1)])
@settings(max_examples=2, deadline=None, phases=[Phase.generate])  # shrinking would launch ranks by the hundred
@given(cases=st.lists(CASES, min_size=50, max_size=50))
def test_every_combination_of_options_on_several_ranks(sizes, cases):
    for rank, worst in enumerate(on_ranks(len(sizes), all_differences, cases, sizes)):
        for case, value in zip(cases, worst, strict=True):
            assert value <= 1e-10, f"rank {rank}: {value} for {case}"


def test_all_ignored_behaves_like_torch():
    hidden, weight, _, _ = problem()
    labels = torch.full((N,), -100)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    for recompute in (False, True):
        loss = linear_cross_entropy(h, w, labels, recompute=recompute)
        assert loss.isnan()
        assert all(not g.any() for g in torch.autograd.grad(loss, [h, w]))
        assert linear_cross_entropy(h, w, labels, reduction="sum", recompute=recompute) == 0


def test_the_mean_is_over_the_rows_that_count():
    hidden, weight, _, labels = problem()
    weights = torch.linspace(0, 2, N, dtype=torch.float64)
    each = F.cross_entropy(hidden @ weight.T, labels, reduction="none") * weights
    mean = linear_cross_entropy(hidden, weight, labels, token_weights=weights)
    torch.testing.assert_close(mean, each.sum() / (N - 1))
    for reduction in ("mean", "sum"):
        loss = linear_cross_entropy(hidden, weight, labels, token_weights=weights, num_items=7, reduction=reduction)
        torch.testing.assert_close(loss, each.sum() / 7)


def wide_gap():
    """Logits 120 apart in float32, the spread between and within shards; Megatron's and Liger's smoothing give inf."""
    vocab = VocabShard.balanced(4, dist.group.WORLD)
    logits = torch.tensor([[0.0, 120.0, -120.0, 0.0], [120.0, 0.0, 0.0, 0.0]])
    labels = torch.tensor([2, 1])
    w = torch.eye(4)[vocab.start : vocab.stop].requires_grad_()
    for recompute in (False, True):
        h = logits.clone().requires_grad_()
        loss, stats = linear_cross_entropy(
            h, w, labels, vocab=vocab, label_smoothing=0.1, return_stats=True, recompute=recompute
        )
        truth_h = logits.double().requires_grad_()
        truth = F.cross_entropy(truth_h, labels, label_smoothing=0.1)
        torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
        assert all(x.isfinite().all() for x in stats)
        grads = torch.autograd.grad(loss + stats.entropy.sum(), h)[0]
        p = truth_h.softmax(1)
        expected = torch.autograd.grad(truth + torch.special.entr(p).sum(), truth_h)[0]
        torch.testing.assert_close(grads.double(), expected, rtol=1e-5, atol=1e-6)


def masked_words():
    """A whole shard of words masked by a bias of -inf takes no part."""
    vocab = VocabShard.of_sizes([3, 2], dist.group.WORLD)
    hidden, weight, bias, labels = problem(v=5)
    bias[3:] = float("-inf")
    bias[:3] -= 1000  # far below the shift of a shard that has no maximum
    labels = labels.clamp(max=2)
    own = slice(vocab.start, vocab.stop)
    h = hidden.clone().requires_grad_()
    loss, stats = linear_cross_entropy(h, weight[own], labels, bias=bias[own], vocab=vocab, return_stats=True)
    truth_h = hidden.clone().requires_grad_()
    truth, expected = reference_cross_entropy(truth_h, weight, labels, bias=bias)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(stats, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, h)[0], torch.autograd.grad(truth, truth_h)[0])


def test_extremes_stay_finite():
    on_ranks(2, wide_gap)
    on_ranks(2, masked_words)


def half_precision():
    """(dtype, way, part) -> error against float64 truth over plain PyTorch's in the same dtype; ours under a loss scale
    of 2^16, which plain PyTorch's half-precision gradients would not survive."""
    vocab = VocabShard.balanced(2000, dist.group.WORLD if dist.is_initialized() else None)
    return errors_in(torch.float16, vocab) | errors_in(torch.bfloat16, vocab)


def errors_in(dtype, vocab):
    own, found = slice(vocab.start, vocab.stop), {}
    hidden, weight, _, labels = problem(dtype, n=512, v=2000, h=256)
    weight = weight / 8

    def run(function, h, w, scale=1.0):
        h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
        loss = function(h, w)
        return [loss.double(), *(g.double() / scale for g in torch.autograd.grad(loss * scale, [h, w]))]

    truth = run(lambda h, w: F.cross_entropy(h @ w.t(), labels), hidden.double(), weight.double())
    plain = run(lambda h, w: F.cross_entropy((h @ w.t()).float(), labels), hidden, weight)
    for name, options in {
        "one chunk": {"workspace_bytes": 1 << 30},
        "chunks": {"workspace_bytes": 1 << 19},
        "recomputed": {"workspace_bytes": 1 << 19, "recompute": True},
    }.items():
        ours = run(
            functools.partial(linear_cross_entropy, labels=labels, vocab=vocab, **options),
            hidden, weight[own], 2.0**16,
        )  # fmt: skip
        for part, o, p, t in zip(("loss", "hidden", "weight"), ours, plain, truth, strict=True):
            p, t = (x[own] if part == "weight" else x for x in (p, t))
            floor = 1e-7 * t.norm()  # where both err by no more than float32 does
            found[str(dtype), name, part] = ((o - t).norm() / ((p - t).norm() + floor)).item()
    return found


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_half_precision_errs_no_more_than_plain_pytorch(ranks):
    for found in on_ranks(ranks, half_precision):
        assert len(found) == 18
        above = {key: ratio for key, ratio in found.items() if not ratio <= 1.1}
        assert not above


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "fast"}, "impl must be one of"),
        ({"impl": "triton"}, "impl='triton' cannot run here: its arithmetic is float32"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"label_smoothing": 2.0}, "label_smoothing must lie"),
        ({"z_loss": float("nan")}, "z_loss must be a finite"),
        ({"num_items": 3, "reduction": "none"}, "num_items divides a sum"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "not the leading dimensions"),
        ({"labels": torch.zeros(N)}, "int64 labels"),
        ({"labels": torch.full((N,), V)}, "label 23 is outside the vocabulary"),
        ({"token_weights": torch.ones(N, 1)}, "token_weights"),
        ({"token_weights": torch.ones(N, dtype=torch.int64)}, "token_weights"),
        ({"weight": torch.zeros(V, 7, dtype=torch.float64)}, "do not fit"),
        ({"bias": torch.zeros(V + 1, dtype=torch.float64)}, "do not fit"),
        ({"vocab": VocabShard.balanced(V + 1, None)}, "this rank has 24 rows"),
        ({"vocab": VocabShard.balanced(V, None), "vocab_size": V}, "give either"),
        ({"vocab_size": V + 1}, "one rank alone has 23 of 24"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    hidden, weight, _, labels = problem()
    given = {"hidden": hidden, "weight": weight, "labels": labels} | change
    with pytest.raises(TensorParallelError, match=message):
        linear_cross_entropy(**given)


def test_second_derivative_is_refused_and_second_backward_is_right():
    hidden, weight, _, labels = problem()
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    for options in ({}, {"reduction": "none"}, {"recompute": True}):
        loss = linear_cross_entropy(h, w, labels, **options).sum()
        with pytest.raises(TensorParallelError, match="no second derivative"):
            torch.autograd.grad(loss, h, create_graph=True)
        first = torch.autograd.grad(loss, [h, w], retain_graph=True)
        second = torch.autograd.grad(loss * 2, [h, w])
        for a, b in zip(first, second, strict=True):
            torch.testing.assert_close(2 * a, b)
        with pytest.raises(RuntimeError, match="second time"):
            torch.autograd.grad(loss, [h, w])


def test_autocast_multiplies_as_linear_does():
    hidden, weight, _, labels = problem(torch.float32)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    for recompute in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            ours = linear_cross_entropy(h, w, labels, recompute=recompute)
            plain = linear_cross_entropy(h, w, labels, impl="reference")
        torch.testing.assert_close(ours, plain.float(), rtol=1e-2, atol=0)
        for a, b in zip(torch.autograd.grad(ours, [h, w]), torch.autograd.grad(plain, [h, w]), strict=True):
            assert a.dtype == torch.float32
            assert (a - b).norm() <= 2e-2 * b.norm()
    exact = torch.autograd.grad(linear_cross_entropy(h, w, labels), h)[0]
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(h, w, labels)
    assert not torch.equal(exact, torch.autograd.grad(loss, h)[0])


def tied(sizes):
    """One matrix as embedding and head: the head's gradient adds to the embedding's."""
    vocab = VocabShard.of_sizes(list(sizes), dist.group.WORLD)
    _, weight, _, labels = problem()
    own = slice(vocab.start, vocab.stop)
    ids = torch.arange(N)
    whole, shard = weight.clone().requires_grad_(), weight[own].clone().requires_grad_()
    truth = F.cross_entropy(F.embedding(ids, whole).sin() @ whole.T, labels)
    mine = (ids >= vocab.start) & (ids < vocab.stop)
    rows = shard[(ids - vocab.start).clamp(0, vocab.rows - 1)] * mine.unsqueeze(1)
    hidden = rows.detach().clone()
    dist.all_reduce(hidden)
    hidden.requires_grad_()
    loss = linear_cross_entropy(hidden.sin(), shard, labels, vocab=vocab)
    loss.backward()
    rows.backward(hidden.grad)
    torch.testing.assert_close(shard.grad, torch.autograd.grad(truth, whole)[0][own])


def test_a_tied_weight_gets_both_gradients():
    on_ranks(2, tied, (13, 10))


def test_what_is_ignored_is_ignored_even_if_infinite():
    hidden, weight, _, labels = problem()
    weights = torch.ones(N, dtype=torch.float64)
    weights[labels == -100] = float("inf")
    truth = F.cross_entropy(hidden @ weight.T, labels)
    learned = weights.clone().requires_grad_()
    for either in (weights, learned):
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels, token_weights=either), truth)
    torch.testing.assert_close(reference_cross_entropy(hidden, weight, labels, token_weights=weights)[0], truth)
    torch.testing.assert_close(cross_entropy(hidden @ weight.T, labels, token_weights=weights), truth)
    assert linear_cross_entropy(hidden.float(), weight.float(), labels, token_weights=learned).dtype == torch.float32
    w = weight.clone().requires_grad_()
    _, stats = linear_cross_entropy(hidden, w, labels, return_stats=True)
    assert torch.autograd.grad(stats.logprobs, w, weights)[0].isfinite().all()


def test_losses_of_tokens_may_be_changed_in_place():
    hidden, weight, _, labels = problem()
    h = hidden.requires_grad_()
    each = linear_cross_entropy(h, weight, labels, reduction="none")
    each *= torch.arange(N)
    plain = F.cross_entropy(h @ weight.T, labels, reduction="none") * torch.arange(N)
    torch.testing.assert_close(torch.autograd.grad(each.sum(), h), torch.autograd.grad(plain.sum(), h))


def resized():
    vocab = VocabShard.balanced(V, dist.group.WORLD)
    hidden, weight, _, labels = problem()
    own = weight[vocab.start : vocab.stop].clone()
    linear_cross_entropy(hidden, own, labels, group=dist.group.WORLD)
    own.data = torch.cat([own.data, own.data[:2]])
    with pytest.raises(TensorParallelError, match="rows when the ranks exchanged their sizes and has"):
        linear_cross_entropy(hidden, own, labels, group=dist.group.WORLD)


def test_a_weight_with_other_rows_than_agreed_is_refused():
    on_ranks(2, resized)
