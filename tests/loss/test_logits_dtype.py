"""Products of half-precision inputs accumulated and kept in float32, of which log-probabilities are made."""

import pytest
import torch
import torch.nn.functional as F

from tests.support.batched_cases import launched, values
from tests.support.loss_problems import problem
from tp_plugin.lazy import lazy_logits
from tp_plugin.loss import VocabShard, linear_cross_entropy, linear_logprobs

SCALE = 1 / 1.5  # a temperature, as of sampled completions


def truths(hidden, weight, labels):
    logits = hidden.double() @ weight.double().T * SCALE
    return logits.log_softmax(1).gather(1, labels[:, None])[:, 0]


def of_the_issue():
    """Errors of log-probabilities at a size of real heads: of torch on bfloat16 logits, on float32 ones, and ours."""
    import torch.distributed as dist

    random = torch.Generator().manual_seed(0)
    hidden, weight = ((torch.rand(n, 3584, generator=random) - 0.5).bfloat16() for n in (24, 9504))
    labels = torch.randint(0, 9504, (24,), generator=random)
    truth = truths(hidden, weight, labels)
    vocab = VocabShard.of_sizes([5000, 4504], dist.group.WORLD)
    own = weight[vocab.start : vocab.stop]

    def error(logprobs):
        return float((logprobs.double() - truth).abs().max())

    def plainly(logits):
        return error((logits.float() * SCALE).log_softmax(1).gather(1, labels[:, None])[:, 0])

    lazy = (lazy_logits(hidden, own, None, vocab).float() * SCALE).log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    kept = {"scale": SCALE, "vocab": vocab, "logits_dtype": torch.float32, "reduction": "none"}
    return {
        "rounded": plainly(hidden @ weight.T),
        "float32": plainly(hidden.float() @ weight.float().T),
        "ours, rounded": error(linear_logprobs(hidden, own, labels, vocab=vocab, scale=SCALE, logits_dtype=None)[0]),
        "ours": error(linear_logprobs(hidden, own, labels, vocab=vocab, scale=SCALE)[0]),
        "blocks of the head": error(
            linear_logprobs(hidden, own, labels, vocab=vocab, scale=SCALE, workspace_bytes=8 << 20)[0]
        ),
        "loss": error(-linear_cross_entropy(hidden, own, labels, **kept)),
        "reference": error(-linear_cross_entropy(hidden, own, labels, impl="reference", **kept)),
        "lazy": error(lazy),
    }


def test_log_probabilities_err_as_float32_logits_do():
    for found in values(launched(2, __name__, ("of_the_issue",)), "of_the_issue"):
        assert found["rounded"] > 1e-2
        assert found["ours, rounded"] > 1e-2
        for name in ("ours", "blocks of the head", "loss", "reference", "lazy"):
            assert found[name] <= found["float32"] + 1e-5, (name, found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_err_no_more_than_those_of_rounded_logits(dtype):
    hidden, weight, _, labels = problem(dtype, n=256, v=1000, h=128)
    weight = weight / 8

    def run(function, h, w):
        h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
        return [g.double() for g in torch.autograd.grad(function(h, w), [h, w])]

    truth = run(lambda h, w: F.cross_entropy(h @ w.T, labels), hidden.double(), weight.double())
    plain = run(lambda h, w: F.cross_entropy((h @ w.T).float(), labels), hidden, weight)
    for options in ({}, {"workspace_bytes": 1 << 18}, {"workspace_bytes": 1 << 18, "recompute": True}):
        ours = run(lambda h, w, o=options: linear_cross_entropy(h, w, labels, logits_dtype=torch.float32, **o),
                   hidden, weight)  # fmt: skip
        for o, p, t in zip(ours, plain, truth, strict=True):
            assert (o - t).norm() <= 1.05 * (p - t).norm()
