"""Functions of logits that exist, sharded over the vocabulary, against torch on the whole."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from benchmarks.live_bytes import LiveBytes
from tests.support.loss_problems import group_of, larger, problem
from tests.support.ranks import errors_on_ranks, on_ranks
from tp_plugin import loss as L
from tp_plugin.collectives import counted
from tp_plugin.errors import TensorParallelError
from tp_plugin.loss import VocabShard
from tp_plugin.loss.parts import Options
from tp_plugin.loss.reference import loss_of_logits

N = 10


def cases():
    """name -> (of a shard, of the whole); both take logits [2, N/2, .] and return a tuple of tensors."""
    _, _, _, labels = problem(n=N)
    labels = labels.reshape(2, -1)
    weights = torch.linspace(-1, 2, N, dtype=torch.float64).reshape(2, -1)

    def losses(**options):
        def shard(x, **vocab):
            loss, stats = L.cross_entropy(x, labels, return_stats=True, **options, **vocab)
            return loss, *stats

        def whole(x):
            rest = {k: v for k, v in options.items() if k not in ("token_weights", "num_items")}
            flat = options.get("token_weights")
            loss, stats = loss_of_logits(
                x.flatten(0, 1), labels.flatten(), Options(**rest), None if flat is None else flat.flatten(),
                options.get("num_items"),
            )  # fmt: skip
            return (*(y.reshape(labels.shape) if y.dim() else y for y in (loss, *stats)),)

        return shard, whole

    valid = labels != -100
    return {
        "mean": losses(),
        "sum": losses(reduction="sum", label_smoothing=0.2, z_loss=0.1),
        "none": losses(reduction="none", z_loss=0.1, token_weights=weights),
        "num_items": losses(num_items=7, label_smoothing=0.1, token_weights=weights),
        "logprobs": (
            lambda x, **v: (L.logprobs_of(x, labels, **v),),
            lambda x: (x.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0] * valid,),
        ),
        "entropy": (lambda x, **v: (L.entropy(x, **v),), lambda x: (torch.special.entr(x.softmax(-1)).sum(-1),)),
        "argmax": (lambda x, **v: (L.argmax(x, **v),), lambda x: (x.argmax(-1),)),
        "topk": (lambda x, **v: tuple(L.topk(x, 5, **v)), lambda x: tuple(x.topk(5))),
        "top1": (lambda x, **v: tuple(L.topk(x, 1, **v)), lambda x: tuple(x.topk(1))),
        "all of them": (lambda x, **v: tuple(L.topk(x, 23, **v)), lambda x: tuple(x.topk(23))),
        "softmax": (lambda x, **v: (L.parallel_softmax(x, **v),), lambda x: (x.softmax(-1),)),
        "log_softmax": (lambda x, **v: (L.parallel_log_softmax(x, **v),), lambda x: (x.log_softmax(-1),)),
    }


def differences(sizes, by_vocab):
    """The worst of values and gradients of each, and the collectives of forward and backward."""
    vocab = VocabShard.of_sizes(list(sizes), group_of())
    own = slice(vocab.start, vocab.stop)
    logits = torch.randn(2, N // 2, 23, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * 3
    found = {}
    for name, (shard, whole) in cases().items():
        x, y = logits[..., own].clone().requires_grad_(), logits.clone().requires_grad_()
        before = x.detach().clone()
        with counted() as forward:
            got = shard(x, **({"vocab": vocab} if by_vocab else {"group": group_of(), "vocab_size": 23}))
        truth = whole(y)
        worst, totals = 0.0, [0.0, 0.0]
        for a, e in zip(got, truth, strict=True):
            sharded = "softmax" in name
            by = torch.randn(e.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
            worst = larger(worst, a, e[..., own] if sharded else e)
            if e.is_floating_point():
                totals = [totals[0] + (a * (by[..., own] if sharded else by)).sum(), totals[1] + (e * by).sum()]
        with counted() as backward:
            grad = torch.autograd.grad(totals[0], x)[0] if name != "argmax" else None
        if grad is not None:
            worst = larger(worst, grad, torch.autograd.grad(totals[1], y)[0][..., own])
        assert torch.equal(x, before), "the logits were changed"
        found[name] = worst, [r.kind for r in forward.records], [r.kind for r in backward.records]
    return found


@pytest.mark.parametrize("sizes", [(23,), (12, 11), (20, 0, 3), (6, 6, 6, 5)])
@pytest.mark.parametrize("by_vocab", [True, False])
def test_each_equals_torch_on_the_whole(sizes, by_vocab):
    for found in on_ranks(len(sizes), differences, sizes, by_vocab):
        for name, (worst, forward, backward) in found.items():
            assert worst <= 1e-10, name
            if len(sizes) > 1:
                setup = [] if by_vocab else ["all_gather"]
                assert forward == [*setup, "all_gather"], name
                assert backward == (["all_reduce"] if "softmax" in name else []), name


def test_a_tie_goes_to_the_lowest_word():
    assert L.argmax(torch.tensor([[1.0, 3.0, 3.0], [0.0, 0.0, 0.0]])).tolist() == [1, 0]


def test_half_precision_makes_no_wide_copy():
    n, v = 4096, 1000
    logits = torch.randn(n, v).bfloat16().requires_grad_()
    labels = torch.randint(0, v, (n,))
    from tp_plugin.loss import shard_nodes

    with pytest.MonkeyPatch.context() as patch, LiveBytes().ignore(logits, labels) as seen:
        patch.setattr(shard_nodes, "ROWS_BYTES", 1 << 19)
        L.cross_entropy(logits, labels).backward()
    assert seen.peak - logits.grad.nbytes <= 2 * (1 << 19) + 200 * n  # two blocks and some numbers a row


def wrong(kind):
    hidden, weight, _, labels = problem()
    rank, world = dist.get_rank(), dist.get_world_size()
    vocab = VocabShard.balanced(23, dist.group.WORLD)
    own = weight[vocab.start : vocab.stop].clone()
    given = {"group": dist.group.WORLD}
    if kind == "bounds":  # one rank holds a row too many
        own = weight[: vocab.rows + (rank == 1)].clone()
        given["vocab_size"] = 23
    elif kind == "group":  # shards of a quarter on two ranks
        own = weight[: 23 // 4].clone()
        given["vocab_size"] = 23
    elif kind == "told differently":
        given["vocab_size"] = 23 + rank
    elif kind == "shape on one rank":
        own = own if rank else own[:, :3].clone()
    elif kind == "dtype on one rank":
        labels = labels if rank else labels.float()
    elif kind == "label":
        labels[3] = 23
    assert world == 2
    if kind in ("bounds", "group", "told differently"):
        for call in (L.argmax, L.entropy):
            with pytest.raises(TensorParallelError, match="were given"):
                call(hidden @ own.T, **given)
    L.linear_cross_entropy(hidden, own, labels, **given)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bounds", r"2 rank\(s\) have \[12, 12\] rows, 24 in all, but the ranks were given vocab_size 23"),
        ("group", r"have \[5, 5\] rows, 10 in all"),
        ("told differently", r"were given different sizes \(\[23, 24\]\)"),
        ("shape on one rank", r"do not fit.*\[on rank 0\]"),
        ("dtype on one rank", r"expected int64 labels.*\[on rank 0\]"),
        ("label", r"label 23 is outside the vocabulary \[0, 23\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_on_every_rank(kind, message):
    import re

    errors = errors_on_ranks(2, wrong, kind)
    assert len(set(errors)) == 1
    assert re.search(message, errors[0]), errors[0]


def test_what_does_not_fit_is_refused():
    logits, labels = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    for call, message in [
        (lambda: L.topk(logits, 6), r"k must lie in \[1, 5\]"),
        (lambda: L.cross_entropy(logits, torch.zeros(4, dtype=torch.int64)), "not the leading dimensions"),
        (lambda: L.cross_entropy(logits, torch.zeros(3)), "int64"),
        (lambda: L.cross_entropy(logits, torch.tensor([0, 1, 5])), "label 5 is outside"),
        (lambda: L.entropy(logits.long()), "must be floating"),
        (lambda: L.entropy(logits, vocab=VocabShard.balanced(6, None)), "logits have 5 columns"),
        (
            lambda: L.cross_entropy(logits, labels, num_items=2, reduction="none"),
            "num_items",
        ),
    ]:
        with pytest.raises(TensorParallelError, match=message):
            call()
    x = logits.clone().requires_grad_()
    with pytest.raises(TensorParallelError, match="no second derivative"):
        torch.autograd.grad(L.entropy(x).sum(), x, create_graph=True)
    assert torch.equal(L.cross_entropy(x, labels), F.cross_entropy(x, labels))


def test_compiled_code_leaves_them_to_python():
    hidden, weight, _, labels = problem()

    @torch.compile(backend="eager")
    def step(h, w, y):
        logits = (h * 2) @ w.T
        return L.linear_cross_entropy(h * 2, w, y) + L.cross_entropy(logits, y) + L.entropy(logits).mean()

    h = hidden.requires_grad_()
    ours = step(h, weight, labels)
    logits = (h * 2) @ weight.T
    plain = 2 * F.cross_entropy(logits, labels) + torch.special.entr(logits.softmax(1)).sum(1).mean()
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours, h), torch.autograd.grad(plain, h))
