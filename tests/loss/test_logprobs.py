"""Log-probabilities and their company against plain autograd on the whole vocabulary."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.loss.problems import group_of, larger, problem
from tests.support.ranks import errors_on_ranks, on_ranks
from tp_plugin.errors import TensorParallelError
from tp_plugin.loss import Logprobs, VocabShard, linear_logprobs

MORE = ("entropy", "mean_logit", "log_square_sum", "top_id")
CASES = st.fixed_dictionaries(
    {
        "n": st.integers(0, 9),
        "seed": st.integers(0, 99),
        "softcap": st.sampled_from([None, 0.5, 30.0]),
        "scale": st.sampled_from([1.0, 0.1, -2.0]),
        "budget": st.integers(1, 3000) | st.none(),
        "with_bias": st.booleans(),
        "ties": st.booleans(),
        "more": st.sets(st.sampled_from(MORE)).map(sorted).map(tuple),
        "through": st.sampled_from(["logprobs", "entropy", "both"]),
        "frozen": st.sampled_from(["", "", "hidden", "weight"]),
    }
)


def plainly(hidden, weight, labels, bias, scale, softcap) -> Logprobs:
    """The same of one process that holds everything, by plain autograd."""
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    logs, valid = logits.log_softmax(1), labels != -100
    picked = logs.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    probabilities = logs.exp()
    return Logprobs(
        torch.where(valid, picked, 0.0), -(probabilities * logs).sum(1), logits.mean(1),
        probabilities.square().sum(1).log(), logits.argmax(1),
    )  # fmt: skip


def difference(case: dict, sizes: tuple[int, ...], impl: str = "chunked", dtype=torch.float64) -> float:
    """The worst of all results and gradients, of ``sizes`` rows of the vocabulary on each rank."""
    vocab = VocabShard.of_sizes(list(sizes), group_of())
    own = slice(vocab.start, vocab.stop)
    hidden, weight, bias, labels = problem(seed=case["seed"], v=sum(sizes), n=case["n"])
    if case["ties"]:  # few whole numbers, so that several words share the largest logit
        hidden, weight, bias = (x.round().clamp(-1, 1) for x in (hidden, weight, bias))
    wanted = [case["frozen"] != "hidden", case["frozen"] != "weight", case["with_bias"]]

    def run(ours: bool):
        kind = dtype if ours else torch.float64
        leaves = [x.to(dtype).to(kind).clone() for x in (hidden, weight, bias)]
        if ours:
            leaves[1:] = [x[own] for x in leaves[1:]]
        leaves = [x.requires_grad_(grad) for x, grad in zip(leaves, wanted, strict=True)]
        h, w, b = leaves
        b = b if case["with_bias"] else None
        how = {"scale": case["scale"], "softcap": case["softcap"]}
        if ours:
            more = {"more": case["more"], "workspace_bytes": case["budget"], "impl": impl, "vocab": vocab}
            found = linear_logprobs(h, w, labels, bias=b, **how, **more)
            missing = set(MORE) - set(case["more"])
            assert all((getattr(found, name) is None) == (name in missing) for name in MORE)
        else:
            found = plainly(h, w, labels, b, **how)
        random, total = torch.Generator().manual_seed(case["seed"] + 2), 0.0
        for name in ("logprobs", "entropy"):
            by = torch.randn(labels.shape, dtype=torch.float64, generator=random)
            if case["through"] in (name, "both") and (name == "logprobs" or name in case["more"]):
                total = total + (getattr(found, name) * by.to(kind)).sum()
        leaves = [x for x in leaves if x.requires_grad]
        differentiable = torch.is_tensor(total) and total.requires_grad
        grads = torch.autograd.grad(total, leaves, allow_unused=True) if leaves and differentiable else []
        return found, [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=bool(grads))]

    (got, grads), (truth, expected) = run(True), run(False)
    worst = 0.0
    for a, e in zip(got, truth, strict=True):
        assert a is None or not a.is_floating_point() or not a.requires_grad or a is got.logprobs or a is got.entropy
        worst = worst if a is None else larger(worst, a, e)
    for a, e in zip(grads, expected, strict=True):
        worst = larger(worst, a, e[own] if a.shape[:1] == (vocab.rows,) and e.shape[0] == vocab.size else e)
    return worst


@settings(max_examples=120, deadline=None)
@given(CASES, st.integers(1, 9))
def test_every_combination_of_options(case, v):
    assert difference(case, (v,)) <= 1e-10


def all_differences(cases, sizes):
    return [difference(case, sizes) for case in cases]


@pytest.mark.parametrize("sizes", [(12, 11), (20, 0, 3), (2, 1, 1, 1)])
@settings(max_examples=1, deadline=None, phases=[Phase.generate])  # shrinking would launch ranks by the hundred
@given(cases=st.lists(CASES, min_size=60, max_size=60))
def test_every_combination_of_options_on_several_ranks(sizes, cases):
    for rank, worst in enumerate(on_ranks(len(sizes), all_differences, cases, sizes)):
        for case, value in zip(cases, worst, strict=True):
            assert value <= 1e-10, f"rank {rank}: {value} for {case}"


def wrong(which):
    hidden, weight, _, labels = problem(torch.float32)
    vocab = VocabShard.of_sizes([12, 11], dist.group.WORLD)
    more = {"name": ("entropie",)}.get(which, ())
    impl = "reference" if which == "impl" else "auto"
    labels = labels + 100 if which == "label" else labels
    linear_logprobs(hidden, weight[vocab.start : vocab.stop], labels, vocab=vocab, more=more, impl=impl)


@pytest.mark.parametrize(
    ("which", "says"),
    [("name", "no statistic 'entropie'"), ("impl", "no impl='reference'"), ("label", "lies outside the vocabulary")],
)
def test_what_does_not_fit_is_refused_on_every_rank(which, says):
    assert all(says in message for message in errors_on_ranks(2, wrong, which))


def test_there_is_no_second_derivative():
    hidden, weight, _, labels = problem()
    h = hidden.requires_grad_()
    grad = torch.autograd.grad
    with pytest.raises(TensorParallelError, match="no second derivative"):
        grad(linear_logprobs(h, weight, labels).logprobs.sum(), h, create_graph=True)
