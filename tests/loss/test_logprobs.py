"""Log-probabilities and their company against plain autograd on the whole vocabulary."""

import pytest
import torch
import torch.distributed as dist
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.support.logprobs import MORE, logprobs_difference
from tests.support.loss_problems import problem
from tests.support.ranks import errors_on_ranks, on_ranks
from tp_plugin.errors import TensorParallelError
from tp_plugin.loss import VocabShard, linear_logprobs

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


@settings(max_examples=120, deadline=None)
@given(CASES, st.integers(1, 9))
def test_every_combination_of_options(case, v):
    assert logprobs_difference(case, (v,)) <= 1e-10


def all_differences(cases, sizes):
    return [logprobs_difference(case, sizes) for case in cases]


@pytest.mark.parametrize("sizes", [(12, 11), (20, 0, 3), (2, 1, 1, 1)])
@settings(
    max_examples=2, deadline=None, phases=[Phase.generate]
)  # the first is the simplest; shrinking would launch ranks by the hundred
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
    [("name", "no statistic 'entropie'"), ("impl", "no impl='reference'"), ("label", "is outside the vocabulary")],
)
def test_what_does_not_fit_is_refused_on_every_rank(which, says):
    assert all(says in message for message in errors_on_ranks(2, wrong, which))


def test_there_is_no_second_derivative():
    hidden, weight, _, labels = problem()
    h = hidden.requires_grad_()
    grad = torch.autograd.grad
    with pytest.raises(TensorParallelError, match="no second derivative"):
        grad(linear_logprobs(h, weight, labels).logprobs.sum(), h, create_graph=True)
