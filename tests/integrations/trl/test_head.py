"""The Function of TRL's fused head, its own and ours in its place: every output, gradients, all transforms."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from tests.support.batched_cases import launched, sentence, values
from tests.support.loss_problems import problem
from tp_plugin.loss import VocabShard
from tp_plugin.param_info import update_info

OUTPUTS = ("entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
HOWS = [
    {},
    {"final_logit_softcapping": 3.0, "logit_scale": 0.5},
    {"temperature": 0.7},
    {"temperature": 1.7, "final_logit_softcapping": 2.0},
]


def function():
    """What TRL's fused forward calls."""
    import trl.trainer.utils as utils

    import tp_plugin

    tp_plugin.register()
    return utils._ChunkedLogProbFunction


def results(weight, bias, own, how, outputs):
    hidden, _, _, labels = problem(torch.float32)
    hidden.requires_grad_()
    how = {"final_logit_softcapping": None, "logit_scale": 1.0, "temperature": 1.0} | how
    arguments = how["temperature"], 5, how["final_logit_softcapping"], how["logit_scale"], ("log_probs", *outputs)
    found = function().apply(hidden, weight, bias, labels.clamp(min=0), *arguments)
    total = found[0].sum() + (found[1].square().sum() if "entropy" in outputs else 0.0)
    grads = torch.autograd.grad(total, [hidden, weight, bias])
    return found, (grads[0], *(grad if own is None else grad[own] for grad in grads[1:]))


def shards() -> None:
    _, weight, bias, _ = problem(torch.float32)
    vocab = VocabShard.of_sizes([14, 9], dist.group.WORLD)
    own = slice(vocab.start, vocab.stop)
    for how in HOWS:
        for outputs in ((), ("is_top1", "entropy"), OUTPUTS):
            whole = [torch.nn.Parameter(x.clone()) for x in (weight, bias)]
            expected, truth = results(*whole, own, how, outputs)
            mine = [torch.nn.Parameter(x[own].clone()) for x in (weight, bias)]
            update_info(mine[0], vocab=vocab)
            found, grads = results(*mine, None, how, outputs)
            assert [x is None for x in found] == [x is None for x in expected]
            for a, e in zip((*found, *grads), (*expected, *truth), strict=True):
                if e is not None:
                    assert a.dtype == e.dtype
                    torch.testing.assert_close(a, e, rtol=2e-5, atol=2e-5)


def gathered() -> bool:
    """A weight made whole again keeps what it is told of its shard, and goes to TRL's own Function."""
    _, weight, bias, _ = problem(torch.float32)
    whole = [torch.nn.Parameter(x.clone()) for x in (weight, bias)]
    expected, _ = results(*whole, None, {}, OUTPUTS)
    update_info(whole[0], vocab=VocabShard.of_sizes([14, 9], dist.group.WORLD))
    found, _ = results(*whole, None, {}, OUTPUTS)
    return all(torch.equal(a, e) for a, e in zip(found, expected, strict=True))


def otherwise() -> None:
    from tp_plugin.layout import ShardLayout

    _, weight, bias, _ = problem(torch.float32)
    layout = ShardLayout.uneven(tuple(weight.shape), 0, [14, 9])
    shard = torch.nn.Parameter(layout.shard(weight, dist.get_rank()).clone())
    update_info(shard, layout=layout)
    results(shard, torch.nn.Parameter(bias[: shard.shape[0]].clone()), None, {}, OUTPUTS)


@pytest.fixture(scope="module")
def found():
    return launched(2, __name__, ("shards", "gathered", "otherwise"))


def test_shards_give_what_the_whole_weight_gives(found):
    values(found, "shards")


def test_a_gathered_weight_is_trls_own_affair(found):
    assert values(found, "gathered") == [True, True]


def test_a_head_that_is_sharded_otherwise_is_refused(found):
    assert "needs a vocabulary-parallel head, and this one is sharded otherwise" in sentence(found, "otherwise")
