"""Options that other fused losses have: each against plain torch, on two uneven shards of the vocabulary."""

import itertools

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.support.batched_cases import launched, values
from tests.support.loss_problems import N, V, problem
from tp_plugin.errors import TensorParallelError
from tp_plugin.loss import VocabShard, cross_entropy, linear_cross_entropy, linear_logprobs

IMPLS = ("chunked", "reference")


def shards():
    vocab = VocabShard.of_sizes([14, 9], dist.group.WORLD)
    return vocab, slice(vocab.start, vocab.stop)


def compared(truth, labels, lead=(N,), **options):
    """The largest differences of loss and gradients from ``truth`` of [..., V] logits, of each way to compute them."""
    vocab, own = shards()
    hidden, weight, _, _ = problem()
    hidden = hidden[: torch.Size(lead).numel()].reshape(*lead, -1)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    expected = truth(h @ w.T)
    wanted = torch.autograd.grad(expected.sum(), [h, w])
    worst = 0.0
    for impl, recompute in itertools.product(IMPLS, (False, True)):
        a, b = hidden.clone().requires_grad_(), weight[own].clone().requires_grad_()
        loss = linear_cross_entropy(a, b, labels, vocab=vocab, impl=impl, recompute=recompute, **options)
        assert loss.shape == expected.shape, (loss.shape, expected.shape)
        grads = torch.autograd.grad(loss.sum(), [a, b])
        pairs = zip((loss, *grads), (expected, wanted[0], wanted[1][own]), strict=True)
        worst = max(worst, *(float((x - y).abs().max()) for x, y in pairs))
    return worst


def class_weights_with_smoothing():
    labels, classes = problem()[3], torch.linspace(0, 3, V, dtype=torch.float64)
    return [
        compared(
            lambda x, r=reduction: F.cross_entropy(x, labels, classes, label_smoothing=0.2, reduction=r), labels,
            class_weights=classes, label_smoothing=0.2, reduction=reduction,
        )
        for reduction in ("mean", "sum", "none")
    ]  # fmt: skip


def soft_targets():
    soft = torch.rand(N, V, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).softmax(-1)
    classes = torch.linspace(0, 3, V, dtype=torch.float64)
    return [
        compared(
            lambda x, o=options: F.cross_entropy(x, soft, o.get("class_weights"), label_smoothing=o["label_smoothing"]),
            soft[:, shards()[1]] if sharded else soft, **options,
        )
        for sharded in (False, True)
        for options in ({"label_smoothing": 0.0}, {"label_smoothing": 0.1, "class_weights": classes})
    ]  # fmt: skip


def shifted_labels():
    labels = problem()[3][:10].reshape(2, 5)
    weights = torch.linspace(0, 2, 10, dtype=torch.float64).reshape(2, 5)

    def truth(x, by, reduction):
        each = F.cross_entropy(x[:, :-by].flatten(0, 1), labels[:, by:].flatten(), reduction="none").view(2, 5 - by)
        each = each * weights[:, by:]
        return each if reduction == "none" else each.sum() / (labels[:, by:] != -100).sum()

    return [
        compared(
            lambda x, s=shift, r=reduction: truth(x, int(s), r), labels, (2, 5), shift=shift, reduction=reduction,
            token_weights=weights,
        )
        for shift, reduction in ((True, "mean"), (2, "none"), (4, "mean"))
    ]  # fmt: skip


def no_soft_cap():
    labels = problem()[3]
    return [compared(lambda x: F.cross_entropy(x, labels), labels, softcap=0)]


def small_integers():
    labels = problem()[3].clamp(min=0)
    kinds = (torch.uint8, torch.int8, torch.int16, torch.int32)
    found = [compared(lambda x: F.cross_entropy(x, labels), labels.to(kind)) for kind in kinds]
    found.append(compared(lambda x: F.cross_entropy(x, labels, ignore_index=3), labels.byte(), ignore_index=3))
    vocab, own = shards()
    hidden, weight, _, _ = problem()
    logits, exact = hidden @ weight[own].T, F.cross_entropy(hidden @ weight.T, labels)
    found.append(abs(float(cross_entropy(logits, labels.int(), vocab=vocab) - exact)))
    logprobs = linear_logprobs(hidden, weight[own], labels.byte(), vocab=vocab).logprobs
    return [*found, abs(float(-logprobs.mean() - exact))]


def guesses_in_the_same_pass():
    vocab, own = shards()
    hidden, weight, _, labels = problem()
    expected = (hidden @ weight.T).argmax(-1)
    found = []
    for impl in IMPLS:
        stats = linear_cross_entropy(hidden, weight[own], labels, vocab=vocab, return_stats=True, impl=impl)[1]
        found.append(float((stats.top_id - expected).abs().max()))
    stats = cross_entropy(hidden @ weight[own].T, labels, vocab=vocab, return_stats=True)[1]
    return [*found, float((stats.top_id - expected).abs().max())]


def no_hidden_gradient():
    from tp_plugin.collectives import counted

    vocab, own = shards()
    hidden, weight, _, labels = problem()
    h, w, t = hidden.requires_grad_(), weight[own].clone().requires_grad_(), weight.clone().requires_grad_()
    found = []
    for recompute in (False, True):
        with counted() as counter:
            loss = linear_cross_entropy(h, w, labels, vocab=vocab, hidden_grad=False, recompute=recompute)
            left_out, grad = torch.autograd.grad(loss, [h, w], allow_unused=True)
        assert left_out is None
        assert "all_reduce" not in [record.kind for record in counter.records]
        found.append(float((grad - torch.autograd.grad(F.cross_entropy(hidden @ t.T, labels), t)[0][own]).abs().max()))
    return found


def no_hidden_size():
    vocab, own = shards()
    labels, bias = problem()[3], problem()[2]
    found = []
    for options in ({}, {"recompute": True}, {"impl": "reference"}, {"reduction": "none"}):
        h, w = torch.zeros(N, 0).double().requires_grad_(), torch.zeros(V, 0).double()[own].requires_grad_()
        b, truth_b = bias[own].clone().requires_grad_(), bias.clone().requires_grad_()
        loss = linear_cross_entropy(h, w, labels, bias=b, vocab=vocab, **options)
        truth = F.cross_entropy(truth_b.expand(N, V), labels, reduction=options.get("reduction", "mean"))
        grads = torch.autograd.grad(loss.sum(), [h, w, b])
        assert [g.shape for g in grads] == [h.shape, w.shape, b.shape]
        found.append(float((loss - truth).abs().max()))
        found.append(float((grads[2] - torch.autograd.grad(truth.sum(), truth_b)[0][own]).abs().max()))
    logprobs = linear_logprobs(h, w, labels.clamp(min=0), vocab=vocab).logprobs
    return [*found, float((logprobs + torch.tensor(float(V)).log()).abs().max()) / 1e4]


CASES = (
    class_weights_with_smoothing, soft_targets, shifted_labels, no_soft_cap, small_integers, guesses_in_the_same_pass,
    no_hidden_gradient, no_hidden_size,
)  # fmt: skip


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_equals_the_loss_of_torch(case):
    for found in values(launched(2, __name__, tuple(one.__name__ for one in CASES)), case):
        assert max(found) <= 1e-10, found


@pytest.mark.parametrize("autocast", [False, True])
def test_the_reference_casts_like_the_fused_loss(autocast):
    """A float32 head under bfloat16 hidden states, weights of tokens in float32: the dtype of the logits."""
    hidden, weight, bias, labels = problem(torch.float32)
    h = hidden if autocast else hidden.bfloat16()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for kept, dtype in ((None, torch.bfloat16), (torch.float32, torch.float32)):
            found = [
                linear_cross_entropy(
                    h, weight, labels, bias=bias, impl=impl, logits_dtype=kept, token_weights=torch.ones(N)
                )
                for impl in ("reference", "chunked")
            ]
            assert found[0].dtype == dtype
            torch.testing.assert_close(found[0].float(), found[1], rtol=1e-2 if kept is None else 1e-6, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_weights": torch.ones(V - 1)}, r"class_weights must be floating \[23\]"),
        ({"class_weights": torch.ones(V, requires_grad=True)}, "without gradient"),
        ({"labels": torch.ones(N, V - 2)}, "are probabilities of 21 words"),
        ({"labels": torch.ones(N, V, requires_grad=True)}, r"pass labels.detach\(\)"),
        ({"shift": N}, r"shift must lie in \[0, 11\)"),
        ({"shift": -1}, "shift must lie in"),
        ({"logits_dtype": torch.float16}, "logits_dtype must be torch.float32, torch.float64"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    hidden, weight, _, labels = problem()
    with pytest.raises(TensorParallelError, match=message):
        linear_cross_entropy(hidden, weight, **({"labels": labels} | options))


def test_transforms_of_torch_func_are_refused_or_right():
    hidden, weight, _, labels = problem()

    def loss(h, **options):
        return linear_cross_entropy(h, weight, labels, **options)

    for transformed in (
        lambda: torch.func.grad(loss)(hidden),
        lambda: torch.func.vmap(loss)(hidden[None]),
        lambda: torch.func.grad(lambda h: linear_logprobs(h, weight, labels).logprobs.sum())(hidden),
        lambda: torch.func.grad(lambda h: cross_entropy(h @ weight.T, labels))(hidden),
    ):
        with pytest.raises(TensorParallelError, match=r"transforms of torch\.func"):
            transformed()
    plain = torch.func.grad(lambda h: F.cross_entropy(h @ weight.T, labels))(hidden)
    torch.testing.assert_close(torch.func.grad(lambda h: loss(h, impl="reference"))(hidden), plain)


@pytest.mark.parametrize("mode", ["real", "symbolic"])
@pytest.mark.parametrize("options", [{}, {"recompute": True, "label_smoothing": 0.1}])
def test_make_fx_records_the_loss_and_its_gradients(mode, options):
    from torch.fx.experimental.proxy_tensor import make_fx

    hidden, weight, _, labels = problem()

    def step(h, w, y):
        h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
        loss = linear_cross_entropy(h, w, y, **options)
        return loss, *torch.autograd.grad(loss, [h, w])

    graph = make_fx(step, tracing_mode=mode)(hidden, weight, labels)
    others = hidden.flip(0), weight * 2, labels.roll(3)
    torch.testing.assert_close(graph(*others), step(*others))
    with pytest.raises(RuntimeError, match="is outside the vocabulary"):
        graph(hidden, weight, labels + V)
