"""Every operation lazy logits answer, and everything else, against the computed logits."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.support.heads import B, Case, H, T, V, ce
from tests.support.ranks import on_ranks
from tp_plugin.collectives import counted
from tp_plugin.errors import TensorParallelError
from tp_plugin.lazy import VocabParallelLogits, lazy_logits
from tp_plugin.loss import VocabShard


def shifted(logits, labels):
    return ce(logits[..., :-1, :].contiguous(), labels[..., 1:].contiguous())


def few(y):
    """Three words a token, one of them twice."""
    y = y.clamp(min=0)
    return torch.stack([y, (y + 5) % V, y], -1)


def selective_log_softmax(x, y):
    """As TRL writes it for float32: the label's logit less a normaliser made row by row."""
    labels = torch.gather(x, dim=-1, index=y.unsqueeze(-1)).squeeze(-1)
    return labels - torch.stack([torch.logsumexp(row, dim=-1) for row in x])


# what stays lazy up to the loss
FUSED = {
    "mean": ce,
    "sum": lambda x, y: ce(x, y, reduction="sum") / 7,
    "none": lambda x, y: (ce(x, y, reduction="none") * torch.arange(B * T)).sum(),
    "smoothing": lambda x, y: ce(x, y, label_smoothing=0.2),
    "ignore": lambda x, y: ce(x, y.clamp(min=3), ignore_index=3),
    "module": lambda x, y: torch.nn.CrossEntropyLoss()(x.reshape(-1, V), y.reshape(-1)),
    "shift": shifted,
    "casts": lambda x, y: ce(x.to(torch.float64).double().type(torch.float64).type_as(x).to(x.device), y),
    "to tensor": lambda x, y: ce(x.to(torch.zeros((), dtype=torch.float64)), y),
    "shapes": lambda x, y: ce(x.flatten(0, 1).unflatten(0, (B, T)).unsqueeze(0).squeeze(0).reshape((B * T, V)), y),
    "last rows": lambda x, y: ce(x[:, -2:], y[:, -2:]),
    "one token": lambda x, y: ce(x[:, -1], y[:, -1]),
    "one row": lambda x, y: ce(x[1], y[1]),
    "repeated rows": lambda x, y: ce(x[:, torch.tensor([0, 0, 3])], y[:, [0, 0, 3]]),
    "list of rows": lambda x, y: ce(x[[1, 1]], y[[1, 1]]),
    "two indices": lambda x, y: ce(x[torch.tensor([0, 1]), torch.tensor([2, 2])], y[[0, 1], [2, 2]]),
    "mask": lambda x, y: ce(x[y > 3], y[y > 3]),
    "flat mask": lambda x, y: ce(x.view(-1, V)[y.view(-1) > 3], y[y > 3]),
    "steps": lambda x, y: ce(x[:, ::2][None, 0], y[:1, ::2]),
    "clone": lambda x, y: ce(x.clone(), y),
    "scale": lambda x, y: ce(2 * (x * 0.5) / 3.0 * torch.tensor(1.5), y),
    "constant row": lambda x, y: ce(x + torch.arange(1.0, V + 1, dtype=torch.float64)[None], y),
    "constant row first": lambda x, y: ce(torch.add(x, torch.arange(0.0, V, dtype=torch.float64)) * 0.5, y),
    "negate": lambda x, y: ce(-x, y),
    "softcap": lambda x, y: ce(3.0 * torch.tanh(x / 3.0), y),
    "softcap twice scaled": lambda x, y: ce((x.mul(0.7) / 2.0).tanh() * 2.0 / 0.5, y, label_smoothing=0.1),
    "softcap none": lambda x, y: ce(3.0 * torch.tanh(x / 3.0), y, reduction="none").square().sum(),
    "class weights": lambda x, y: ce(x, y, weight=torch.arange(0.0, V, dtype=torch.float64)),
    "class weights and smoothing": lambda x, y: torch.nn.CrossEntropyLoss(
        torch.arange(1.0, V + 1, dtype=torch.float64), label_smoothing=0.2
    )(2 * x.view(-1, V), y.view(-1)),
    "weighted nll": lambda x, y: F.nll_loss(
        x.log_softmax(-1).view(-1, V), y.view(-1), torch.arange(1.0, V + 1).double()
    ),
    "probabilities": lambda x, y: F.cross_entropy(x.view(-1, V), torch.rand(B * T, V, dtype=torch.float64)),
    "probabilities, smoothed": lambda x, y: F.cross_entropy(
        x.view(-1, V), torch.rand(B * T, V).double(), torch.arange(1.0, V + 1).double(), label_smoothing=0.2
    ),
    "bytes": lambda x, y: ce(x, y.clamp(min=0).to(torch.uint8), ignore_index=3),
    "two losses on slices": lambda x, y: ce(x[:, :2], y[:, :2]) + 2 * ce(x[:, 1:], y[:, 1:], reduction="sum"),
    "loss scaled": lambda x, y: (ce(x, y) * 3 - 1) ** 2,
}
# what is answered from the shards
ANSWERED = {
    "normaliser": lambda x, y: ce(x, y) + x.logsumexp(-1).square().mean(),
    "normaliser kept": lambda x, y: torch.logsumexp(x[:, 1:], dim=(-1,), keepdim=True).sum() * 2,
    "normaliser of scaled": lambda x, y: (3.0 * torch.tanh(x / 3.0)).logsumexp(2).square().sum(),
    "label logits": lambda x, y: x.gather(-1, y.clamp(min=0)[..., None]).square().sum(),
    "a few logits": lambda x, y: torch.gather(3.0 * torch.tanh(x / 3.0), 2, few(y)).square().sum() + ce(x, y),
    "log-probabilities": lambda x, y: F.log_softmax(x, -1).gather(-1, few(y)).square().sum(),
    "log-probabilities of rows": lambda x, y: torch.log_softmax(x, dim=2)[:, 1:, :].gather(2, few(y)[:, 1:]).sum(),
    "nll": lambda x, y: F.nll_loss(x.log_softmax(-1).view(-1, V), y.view(-1)),
    "nll of rows": lambda x, y: torch.nn.NLLLoss(ignore_index=3, reduction="sum")(
        torch.nn.LogSoftmax(-1)(x)[:, :-1].reshape(-1, V), y[:, 1:].clamp(min=3).reshape(-1)
    ),
    "cross entropy of log-probabilities": lambda x, y: ce(F.log_softmax(x, dim=-1), y, label_smoothing=0.1),
    "selective log-softmax": lambda x, y: selective_log_softmax(x, y.clamp(min=0)).square().sum(),
    "accuracy": lambda x, y: ce(x, y) * (x.argmax(-1) == y).sum() + x.argmax(dim=2, keepdim=True).sum(),
    "maximum": lambda x, y: x.max(-1).values.square().sum() + x.max(dim=-1, keepdim=True)[1].sum(),
    "top": lambda x, y: x.topk(3).values.square().sum() + torch.topk(x, 2, dim=-1).indices.sum(),
    "backward of values": lambda x, y: (x.argmax(-1) * ce(x, y)).sum() + x.topk(2).values.sum(),
    "rows of a loop": lambda x, y: sum(row.logsumexp(-1).sum() for row in x),
    "pieces": lambda x, y: sum(ce(a, b) for a, b in zip(x.split(2, dim=1), y.split(2, dim=1), strict=True)),
    "chunks": lambda x, y: sum(ce(a, b) for a, b in zip(torch.chunk(x, 2), y.chunk(2), strict=True)),
    "unbound": lambda x, y: sum(ce(a, b) * i for i, (a, b) in enumerate(zip(x.unbind(1), y.unbind(1), strict=True))),
    "narrowed": lambda x, y: ce(x.narrow(1, 1, 2), y[:, 1:3]) + ce(torch.select(x, 0, 1), y[1]),
    "flat pieces": lambda x, y: sum(p.logsumexp(-1).sum() * i for i, p in enumerate(x.view(-1, V).split([3, 1, 6]))),
}
# what needs the values
COMPUTED = {
    "loss and auxiliary": lambda x, y: ce(x, y) + x.logsumexp(-1).square().mean() + x[:, 1:].softmax(-1)[..., 0].sum(),
    "probabilities of lazy ones": lambda x, y: F.log_softmax(x, -1).exp().square().sum() + ce(x, y),
    "log-probabilities scaled": lambda x, y: (F.log_softmax(x, -1) * 2).tanh().sum(),
    "normaliser of rows": lambda x, y: x.logsumexp(1).sum() + x.logsumexp((1, 2)).sum(),
    "entropy": lambda x, y: -(x.softmax(-1) * x.log_softmax(-1)).sum(),
    "many logits": lambda x, y: x.gather(-1, few(y).repeat(1, 1, 40)).sum(),
    "largest of rows": lambda x, y: x.max(1).values.sum() + x.max() + x.amax(-1).sum() + x.argmax(),
    "materialize": lambda x, y: ce(x, y) + (x.materialize() if isinstance(x, VocabParallelLogits) else x).pow(2).sum(),
    "softcap values": lambda x, y: (3.0 * torch.tanh(x / 3.0)).square().sum() + ce(x, y),
    "N V d form": lambda x, y: F.cross_entropy(x.transpose(1, 2), y),
    "class is dim 1": lambda x, y: F.cross_entropy(x, torch.randint(0, T, (B, V))),
    "probabilities with a gradient": lambda x, y: F.cross_entropy(x.view(-1, V), x.view(-1, V).softmax(-1)),
    "one logit": lambda x, y: x[0, 1, 3] + x[..., 5].sum() + x[0][0].sum() + x[1, 2, :].prod(),
    "columns": lambda x, y: x[..., :7].square().sum() + x[:, None].sum() + x[..., None].sum(),
    "learned row": lambda x, y: ce(x + torch.ones(V, dtype=torch.float64, requires_grad=True), y),
    "scaled and a row": lambda x, y: ce(x * 0.5 + torch.arange(1.0, V + 1, dtype=torch.float64), y),
    "tensor times": lambda x, y: (x * torch.randn(V, dtype=torch.float64)).sum(),
    "reversed division": lambda x, y: (1.0 / (x + 100)).sum(),
    "tanh twice": lambda x, y: ce(x.tanh().tanh(), y),
    "stacked": lambda x, y: torch.cat([x, 2 * x]).square().sum() + torch.stack((x, x)).sum(),
    "learned scale": lambda x, y: ce(x * torch.ones((), dtype=torch.float64, requires_grad=True), y),
    "dropout": lambda x, y: ce(F.dropout(x, 0.0), y),
    "detached": lambda x, y: ce(x, y) + x.detach().square().sum() + x.data.sum(),
}


def all_uses(sizes):
    worst = {}
    for budget in (None, 3 * 8 * max(sizes)):
        for name, use in (FUSED | ANSWERED | COMPUTED).items():
            with counted() as counter:
                worst[name, budget] = Case(sizes, budget=budget).difference(use)
            if len(sizes) > 1:
                computed = any(r.purpose == "logits" for r in counter.records)
                assert computed == (name in COMPUTED), (name, [r.purpose for r in counter.records])
    return {name: value for name, value in worst.items() if value > 1e-10}


@pytest.mark.parametrize("sizes", [(13,), (7, 6), (9, 0, 4)])
def test_every_use_equals_plain_logits(sizes):
    assert on_ranks(len(sizes), all_uses, sizes) == [{}] * len(sizes)


def test_metadata_needs_no_values_and_no_ranks():
    x = Case().lazy
    with counted() as counter:
        assert x.shape == (B, T, V)
        assert (x.dtype, x.device, x.ndim, x.numel(), len(x)) == (torch.float64, torch.device("cpu"), 3, B * T * V, B)
        assert x.size(-1) == V
        assert x.stride() == (T * V, V, 1)
        assert x.is_contiguous()
        assert x.is_floating_point()
        assert torch.is_floating_point(x)
        assert torch.is_tensor(x)
        assert x.requires_grad
        assert not x.is_leaf
        assert not x.is_cuda
        assert x.element_size() == 8
        assert hash(x) == id(x)
        assert "not computed" in repr(x)
        assert "not computed" in f"{x}"
        assert x.grad is None
        assert x.new_zeros(3).dtype == torch.float64
    assert x._full is None
    assert not counter.records


def test_lazy_dtypes_follow_the_casts():
    x = Case().lazy
    half = x.half()
    assert isinstance(half, VocabParallelLogits)
    assert half.dtype == torch.float16
    assert x.bfloat16().dtype == torch.bfloat16
    loss = F.cross_entropy(x.float().view(-1, V), torch.zeros(B * T, dtype=torch.int64))
    assert loss.dtype == torch.float32
    assert x.double() is x
    assert x.contiguous() is x
    assert type(x.long()) is torch.Tensor
    assert x.argmax(-1).shape == (B, T)


def test_torchs_own_errors_stay():
    x, labels = Case().lazy, torch.zeros(B * T, dtype=torch.int64)
    with pytest.raises(RuntimeError, match="invalid for input of size"):
        x.view(7, V)
    with pytest.raises(IndexError):
        x[5]
    with pytest.raises(RuntimeError, match="label_smoothing"):
        F.cross_entropy(x.view(-1, V), labels, label_smoothing=1.5)
    with pytest.raises(TensorParallelError, match="is outside the vocabulary"):
        F.cross_entropy(x.view(-1, V), labels + V)


def test_shapes_that_do_not_fit_are_refused():
    vocab = VocabShard.balanced(V, None)
    hidden, weight = torch.zeros(B, T, H), torch.zeros(V, H)
    for args in [(hidden, weight[1:], None), (hidden, weight, torch.zeros(3)), (hidden[0, 0], weight, None)]:
        with pytest.raises(TensorParallelError, match="lazy logits need"):
            lazy_logits(*args, vocab)
    with pytest.raises(TensorParallelError, match="make them equal"):
        lazy_logits(hidden, weight.half(), None, vocab)


def frozen_parts():
    found = []
    for keep in range(3):
        vocab = VocabShard.balanced(V, dist.group.WORLD)
        parts = [torch.randn(B, T, H), torch.randn(vocab.rows, H), torch.randn(vocab.rows)]
        parts[keep].requires_grad_()
        with counted() as counter:
            loss = F.cross_entropy(lazy_logits(*parts, vocab).view(-1, V), torch.zeros(B * T, dtype=torch.int64))
            loss.backward()
        found.append([r.kind for r in counter.records])
    with counted() as counter, torch.no_grad():
        F.cross_entropy(lazy_logits(*parts, vocab).view(-1, V), torch.zeros(B * T, dtype=torch.int64))
    return [*found, [r.kind for r in counter.records]]


def test_frozen_parts_cost_nothing():
    gather = ["all_gather"]
    assert on_ranks(2, frozen_parts) == [[["all_gather", "all_reduce"], gather, gather, gather]] * 2


def test_log_probabilities_are_rounded_once():
    """In half precision too: products, and the difference of logit and normaliser, are kept in float32."""
    case = Case(dtype=torch.bfloat16)
    ids = few(case.labels)
    ours, plain = (F.log_softmax(x, -1).gather(-1, ids) for x in (case.lazy, case.plain))
    assert ours.dtype == plain.dtype == torch.bfloat16
    exact = F.log_softmax(F.linear(*(x.double() for x in case.full)), -1).gather(-1, ids)
    assert (ours - exact).abs().max() <= 2.0**-5 + 1e-6  # half a unit in the last place of 8 to 16
    assert (ours - exact).abs().max() <= (plain - exact).abs().max() + 1e-3
    assert F.log_softmax(case.lazy, -1, dtype=torch.float32).dtype == torch.float32


def test_an_index_out_of_range_is_torchs_own_error():
    x = Case().lazy
    with pytest.raises(RuntimeError, match="out of bounds"):
        x.gather(-1, torch.full((B, T, 1), V))


@pytest.mark.parametrize("frozen", [(), (0,), (0, 1), (2, 3)])
def test_a_sum_of_two_heads_is_one_product_and_stays_lazy(frozen):
    torch.manual_seed(0)
    shapes = (V, H), (V,), (B, T, H), (B, T, 3), (V, 3)
    leaves = [torch.randn(s, dtype=torch.float64) for s in shapes]
    trained = [leaf.requires_grad_() for number, leaf in enumerate(leaves) if number not in frozen]
    weight, bias, hidden, small, narrow = leaves
    labels, vocab = torch.randint(0, V, (B, T)), VocabShard.balanced(V, None)
    plain = F.linear(hidden, weight, bias) + F.linear(small, narrow) * 0.5
    lazy = lazy_logits(hidden, weight, bias, vocab) + lazy_logits(small, narrow, None, vocab) * 0.5
    assert isinstance(lazy, VocabParallelLogits)
    for use in (ce, lambda x, y: ce(3.0 * torch.tanh(x / 3.0), y), lambda x, _: x.sin().sum()):
        expected = torch.autograd.grad(use(plain, labels), trained, retain_graph=True)
        found = torch.autograd.grad(use(lazy, labels), trained, retain_graph=True)
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(found, expected, strict=True))


def test_sums_that_are_no_product_are_computed():
    """A bias in the second, a soft cap in the first, other rows."""
    case, other = Case(), Case(seed=1)
    for first, second, plain in (
        (case.lazy, other.lazy, case.plain + other.plain),
        (torch.tanh(case.lazy), other.lazy, torch.tanh(case.plain) + other.plain),
        (case.lazy, other.lazy[:1], case.plain + other.plain[:1]),
    ):
        found = first + second
        assert not isinstance(found, VocabParallelLogits)
        assert (found - plain).abs().max() < 1e-12
