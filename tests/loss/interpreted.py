"""Run by ``test_kernels`` with TRITON_INTERPRET=1: the kernels on CPU, their ``options`` or on a ``group`` of ranks."""

import json
import sys

import torch
import torch.distributed as dist

from tests.loss.problems import N, V, problem
from tests.loss.test_logprobs import MORE, difference
from tp_plugin.loss import VocabShard, linear_cross_entropy, reference_cross_entropy


def options_in(dtype):
    """Worst error of loss, statistics and gradients over the options, against float64."""
    worst = 0.0
    upstream = torch.Generator().manual_seed(1)
    for options in (
        {},
        {"label_smoothing": 0.1, "z_loss": 0.02, "workspace_bytes": 600},
        {"softcap": 3.0, "scale": 0.7, "reduction": "none", "workspace_bytes": 600},
        {"label_smoothing": 0.3, "softcap": 2.0, "recompute": True, "num_items": 5, "with_bias": True},
        {"reduction": "none", "with_bias": True, "scale": -2.0, "z_loss": 0.1, "workspace_bytes": 2000},
    ):
        options = dict(options)
        hidden, weight, bias, labels = problem(dtype)
        bias = bias if options.pop("with_bias", False) else None
        weights = torch.linspace(-1, 2, N)
        found = []
        for ours in (True, False):
            h, w = (x.to(dtype if ours else torch.float64).requires_grad_() for x in (hidden, weight))
            b = None if bias is None else bias.double().to(h.dtype)
            kwargs = {k: v for k, v in options.items() if ours or k not in ("workspace_bytes", "recompute")}
            if ours:
                kwargs |= {"impl": "triton", "return_stats": True}
            function = linear_cross_entropy if ours else reference_cross_entropy
            loss, stats = function(h, w, labels, bias=b, token_weights=weights.to(h.dtype), **kwargs)
            bys = [torch.randn(x.shape, generator=upstream.manual_seed(i)) for i, x in enumerate((loss, *stats))]
            alone = torch.autograd.grad((loss * bys[0]).sum(), [h, w], retain_graph=True)
            total = sum((x * by).sum() for x, by in zip((loss, *stats), bys, strict=True))
            found.append([loss, *stats, *alone, *torch.autograd.grad(total, [h, w])])
        for a, e in zip(*found, strict=True):
            worst = max(worst, ((a.double() - e).norm() / e.norm()).item())
    return worst


def logprobs_in(dtype):
    """The same of the log-probabilities and their company, ties among the largest logits included."""
    worst = 0.0
    for seed, (softcap, budget) in enumerate([(None, None), (2.0, 600), (None, 600)]):
        case = {
            "n": N, "seed": seed, "softcap": softcap, "scale": 0.5, "budget": budget, "with_bias": True,
            "ties": seed == 2 or dtype != torch.float32, "more": MORE, "through": "both", "frozen": "",
        }  # fmt: skip
        worst = max(worst, difference(case, (V,), "triton", dtype))
    return worst


def on_a_group():
    dist.init_process_group("gloo")
    case = {"n": N, "seed": 0, "softcap": None, "scale": 1.0, "budget": 500, "with_bias": True, "ties": True}
    case |= {"more": MORE, "through": "both", "frozen": ""}
    assert difference(case, (20, 0, 3), "triton", torch.float32) <= 5e-6
    vocab = VocabShard.of_sizes([20, 0, 3], dist.group.WORLD)
    own = slice(vocab.start, vocab.stop)
    hidden, weight, _, labels = problem(torch.float32)
    h, w = hidden.requires_grad_(), weight[own].clone().requires_grad_()
    loss = linear_cross_entropy(h, w, labels, vocab=vocab, impl="triton", workspace_bytes=500, label_smoothing=0.1)
    truth, _ = reference_cross_entropy(h, weight.requires_grad_(), labels, label_smoothing=0.1)
    expected = torch.autograd.grad(truth, [h, weight])
    torch.testing.assert_close(loss, truth)
    torch.testing.assert_close(torch.autograd.grad(loss, [h, w]), (expected[0], expected[1][own]))
    print("equal", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "group":
        on_a_group()
    else:
        kinds = (torch.float32, torch.float16, torch.bfloat16)
        print(json.dumps({str(dtype): max(options_in(dtype), logprobs_in(dtype)) for dtype in kinds}))
