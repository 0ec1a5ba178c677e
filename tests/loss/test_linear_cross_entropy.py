"""The chunked vocabulary-parallel loss against plain autograd on the whole vocabulary."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.ranks import errors_on_ranks, on_ranks
from tp_plugin.collectives import counted
from tp_plugin.errors import TensorParallelError
from tp_plugin.loss import VocabShard, linear_cross_entropy, reference_cross_entropy
from tp_plugin.loss.chunked import rows_per_chunk
from tp_plugin.loss.parts import Head

N, H, V = 11, 6, 23


def problem(dtype=torch.float64, seed=0, v=V, n=N):
    torch.manual_seed(seed)
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64).to(dtype) for s in [(n, H), (v, H), (v,)])
    labels = torch.randint(0, v, (n,))
    labels[n // 2] = -100
    return hidden, weight, bias, labels


def group_of(world):
    return dist.group.WORLD if world > 1 else None


def gradients(loss, upstream, *leaves):
    return torch.autograd.grad((loss * upstream).sum(), leaves)


def every_option(world, sizes):
    """Largest difference from the truth over reductions, smoothing, soft cap, scale, bias and chunking."""
    vocab = VocabShard.of_sizes(sizes, group_of(world))
    own, worst = slice(vocab.start, vocab.stop), 0.0
    hidden, weight, bias, labels = problem()
    for reduction, smoothing, softcap, with_bias, budget in itertools.product(
        ("mean", "sum", "none", "num_items"), (0.0, 0.1), (None, 2.0), (False, True), (4 * 8 * max(sizes), None)
    ):
        rest = {"label_smoothing": smoothing, "softcap": softcap, "scale": 0.7}
        rest |= {"num_items": 5} if reduction == "num_items" else {"reduction": reduction}
        h, w, b = (x.clone().requires_grad_() for x in (hidden, weight, bias))
        truth = reference_cross_entropy(h, w, labels, bias=b if with_bias else None, **rest)
        upstream = torch.randn_like(truth)
        leaves = [h, w, b] if with_bias else [h, w]
        expected = gradients(truth, upstream, *leaves)
        h, w, b = hidden.clone().requires_grad_(), *(x[own].clone().requires_grad_() for x in (weight, bias))
        rest |= {"bias": b if with_bias else None, "impl": "reference" if budget is None and softcap else "chunked"}
        loss = linear_cross_entropy(h, w, labels, vocab=vocab, workspace_bytes=budget, **rest)
        got = gradients(loss, upstream, *([h, w, b] if with_bias else [h, w]))
        expected = [expected[0], *(x[own] for x in expected[1:])]
        for a, e in zip([loss, *got], [truth, *expected], strict=True):
            assert a.shape == e.shape
            assert a.dtype == e.dtype
            worst = max(worst, (a - e).abs().max().item() if a.numel() else 0.0)
    return worst


@pytest.mark.parametrize(("world", "sizes"), [(1, [23]), (2, [12, 11]), (3, [20, 0, 3])])
def test_every_option_equals_plain_autograd(world, sizes):
    assert max(on_ranks(world, every_option, world, sizes)) <= 1e-10


def cost(budget_rows):
    vocab = VocabShard.balanced(V, dist.group.WORLD)
    hidden, weight, _, labels = problem()
    h, w = hidden.requires_grad_(), weight[vocab.start : vocab.stop].requires_grad_()
    budget = budget_rows * 8 * max(vocab.sizes)
    found = []
    for reduction in ("mean", "none"):
        with counted() as counter:
            loss = linear_cross_entropy(h, w, labels, vocab=vocab, workspace_bytes=budget, reduction=reduction).sum()
            forward = [r.kind for r in counter.records]
            loss.backward()
            found.append((forward, [r.kind for r in counter.records][len(forward) :]))
    with counted() as counter, torch.no_grad():
        linear_cross_entropy(h, w, labels, vocab=vocab, workspace_bytes=budget, label_smoothing=0.1)
    found.append([r.kind for r in counter.records])
    with counted() as counter:  # a frozen trunk has no gradient to reduce
        linear_cross_entropy(h.detach(), w, labels, vocab=vocab, workspace_bytes=budget).backward()
    found.append([r.kind for r in counter.records])
    return found


def test_one_gather_and_one_reduction_a_chunk():
    both = ["all_gather", "all_reduce"] * 3
    gathers, reductions = ["all_gather"] * 3, ["all_reduce"] * 3
    assert on_ranks(2, cost, 4) == [[(both, []), (gathers, reductions), gathers, gathers]] * 2


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(0, 9),
    v=st.integers(1, 9),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smoothing=st.sampled_from([0.0, 0.3, 1.0]),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    scale=st.sampled_from([1.0, 0.1, -2.0]),
    ignore=st.sampled_from([-100, 0, 3]),
    budget=st.integers(1, 2000),
    frozen=st.sampled_from(["", "hidden", "weight"]),
    ignore_all=st.booleans(),
    seed=st.integers(0, 99),
)
def test_combinations(n, v, reduction, smoothing, softcap, scale, ignore, budget, frozen, ignore_all, seed):
    torch.manual_seed(seed)
    hidden = torch.randn(n, H, dtype=torch.float64, requires_grad=frozen != "hidden")
    weight = torch.randn(v, H, dtype=torch.float64, requires_grad=frozen != "weight")
    labels = torch.full((n,), ignore) if ignore_all else torch.randint(0, v, (n,))
    rest = {"ignore_index": ignore, "reduction": reduction, "label_smoothing": smoothing}
    rest |= {"softcap": softcap, "scale": scale}
    truth = reference_cross_entropy(hidden, weight, labels, **rest)
    loss = linear_cross_entropy(hidden, weight, labels, workspace_bytes=budget, **rest)
    torch.testing.assert_close(loss, truth, rtol=1e-10, atol=1e-10, equal_nan=True)
    leaves = [x for x in (hidden, weight) if x.requires_grad]
    upstream = torch.randn_like(truth)
    for a, e in zip(gradients(loss, upstream, *leaves), gradients(truth, upstream, *leaves), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def test_all_ignored_behaves_like_torch():
    hidden, weight, _, _ = problem()
    labels = torch.full((N,), -100)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(h, w, labels)
    assert loss.isnan()
    assert all(not g.any() for g in torch.autograd.grad(loss, [h, w]))
    assert linear_cross_entropy(h, w, labels, reduction="sum") == 0


def wide_gap():
    """Logits 120 apart in float32, the spread between and within shards; Megatron's and Liger's smoothing give inf."""
    vocab = VocabShard.balanced(4, dist.group.WORLD)
    logits = torch.tensor([[0.0, 120.0, -120.0, 0.0], [120.0, 0.0, 0.0, 0.0]])
    labels = torch.tensor([2, 1])
    w = torch.eye(4)[vocab.start : vocab.stop].requires_grad_()
    h = logits.clone().requires_grad_()
    loss = linear_cross_entropy(h, w, labels, vocab=vocab, label_smoothing=0.1)
    truth_h = logits.double().requires_grad_()
    truth = F.cross_entropy(truth_h, labels, label_smoothing=0.1)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        torch.autograd.grad(loss, h)[0].double(), torch.autograd.grad(truth, truth_h)[0], rtol=1e-5, atol=1e-6
    )


def masked_words():
    """A whole shard of words masked by a bias of -inf takes no part."""
    vocab = VocabShard.of_sizes([3, 2], dist.group.WORLD)
    hidden, weight, bias, labels = problem(v=5)
    bias[3:] = float("-inf")
    labels = labels.clamp(max=2)
    own = slice(vocab.start, vocab.stop)
    h = hidden.clone().requires_grad_()
    loss = linear_cross_entropy(h, weight[own], labels, bias=bias[own], vocab=vocab)
    truth_h = hidden.clone().requires_grad_()
    truth = reference_cross_entropy(truth_h, weight, labels, bias=bias)
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(torch.autograd.grad(loss, h)[0], torch.autograd.grad(truth, truth_h)[0])


def test_extremes_stay_finite():
    on_ranks(2, wide_gap)
    on_ranks(2, masked_words)


def wrong_label():
    vocab = VocabShard.balanced(V, dist.group.WORLD)
    hidden, weight, _, labels = problem()
    labels[3] = V
    linear_cross_entropy(hidden, weight[vocab.start : vocab.stop], labels, vocab=vocab)


def test_a_label_outside_the_vocabulary_is_refused_on_all_ranks():
    errors = errors_on_ranks(2, wrong_label)
    assert all("label 23 lies outside the vocabulary [0, 23)" in e for e in errors)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("budget", [None, 500])
def test_half_precision_by_error_ratio(dtype, budget):
    """|ours - truth| against |plain half precision - truth|, loss scale 2^16."""
    hidden, weight, _, labels = problem(dtype, n=64, v=97)
    labels[7] = -100

    def run(function, cast, scale=2.0**16, **kwargs):
        h, w = hidden.to(cast).requires_grad_(), weight.to(cast).requires_grad_()
        loss = function(h, w, labels, **kwargs)
        return [loss.double(), *(g.double() / scale for g in torch.autograd.grad(loss.float() * scale, [h, w]))]

    truth = run(reference_cross_entropy, torch.float64)
    ours = run(linear_cross_entropy, dtype, workspace_bytes=budget)
    plain = run(reference_cross_entropy, dtype, scale=2.0**10)  # more would overflow its half-precision loss
    for name, t, o, p in zip(("loss", "hidden", "weight"), truth, ours, plain, strict=True):
        assert (o - t).norm() <= 1.5 * (p - t).norm() + 1e-3 * t.norm(), name
        assert (o - t).norm() <= (1e-3 if dtype == torch.float16 else 1e-2) * t.norm(), name


def test_the_workspace_is_a_budget():
    vocab = VocabShard.balanced(1000, None)
    head = Head(torch.zeros(4096, 8), torch.zeros(1000, 8), None, vocab)
    rows = rows_per_chunk(head, 1 << 20)
    assert rows * 1000 * 4 <= 1 << 20
    assert rows > 200
    assert rows_per_chunk(head, 1) == 1
    half = Head(torch.zeros(4096, 8, dtype=torch.bfloat16), torch.zeros(1000, 8), None, vocab)
    assert rows_per_chunk(half, 1 << 20) * 1000 * 6 <= 1 << 20


def test_memory_does_not_grow_with_the_rows():
    """Largest tensor alive in forward stays within the budget, whatever N is."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        nbytes = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                self.nbytes = max(self.nbytes, out.untyped_storage().nbytes())
            return out

    hidden, weight, _, labels = problem(torch.float32, n=512, v=400)
    with Largest() as seen:
        linear_cross_entropy(hidden.requires_grad_(), weight, labels, workspace_bytes=1 << 16)
    assert seen.nbytes <= 1 << 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"impl": "fast"}, "impl must be one of"),
        ({"reduction": "max"}, "reduction must be one of"),
        ({"label_smoothing": 2.0}, "label_smoothing must lie"),
        ({"num_items": 3, "reduction": "sum"}, "num_items replaces"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, "not the leading dimensions"),
        ({"labels": torch.zeros(N)}, "int64 labels"),
        ({"weight": torch.zeros(V, H + 1, dtype=torch.float64)}, "do not fit"),
        ({"vocab": VocabShard.balanced(V + 1, None)}, "this rank holds 24 rows"),
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
    loss = linear_cross_entropy(h, w, labels)
    with pytest.raises(TensorParallelError, match="no second derivative"):
        torch.autograd.grad(loss, h, create_graph=True)
    first = torch.autograd.grad(loss, [h, w], retain_graph=True)
    second = torch.autograd.grad(loss * 2, [h, w])
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(2 * a, b)


def test_autocast_multiplies_as_linear_does():
    hidden, weight, _, labels = problem(torch.float32)
    h, w = hidden.requires_grad_(), weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours, plain = (linear_cross_entropy(h, w, labels, impl=impl) for impl in ("chunked", "reference"))
    torch.testing.assert_close(ours, plain.float(), rtol=1e-2, atol=0)
    for a, b in zip(torch.autograd.grad(ours, [h, w]), torch.autograd.grad(plain, [h, w]), strict=True):
        assert a.dtype == torch.float32
        assert (a - b).norm() <= 2e-2 * b.norm()
    exact = torch.autograd.grad(linear_cross_entropy(h, w, labels), h)[0]
    assert not torch.equal(exact, torch.autograd.grad(_autocast_loss(h, w, labels), h)[0])


def _autocast_loss(h, w, labels):
    with torch.autocast("cpu", torch.bfloat16):
        return linear_cross_entropy(h, w, labels)
