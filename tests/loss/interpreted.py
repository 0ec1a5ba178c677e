"""Run by ``test_kernels`` with TRITON_INTERPRET=1: the kernels on CPU, their ``options`` or on a ``group`` of ranks."""

import contextlib
import io
import json
import sys

import torch
import torch.distributed as dist

from tests.support.logprobs import MORE, logprobs_difference
from tests.support.loss_problems import N, V, problem
from tp_plugin.errors import TensorParallelError
from tp_plugin.loss import VocabShard, kernels, linear_cross_entropy, reference_cross_entropy

LOCAL = ("workspace_bytes", "recompute", "logits_dtype")  # options that plain autograd in float64 has no use for


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
        {"classes": True, "label_smoothing": 0.2, "workspace_bytes": 600, "logits_dtype": torch.float32},
        {"classes": True, "soft": True, "label_smoothing": 0.2, "softcap": 2.0, "workspace_bytes": 600},
        {"soft": True, "with_bias": True, "reduction": "none", "logits_dtype": torch.float32},
    ):
        options = dict(options)
        hidden, weight, bias, labels = problem(dtype)
        bias = bias if options.pop("with_bias", False) else None
        weights = torch.linspace(-1, 2, N)
        if options.pop("soft", False):
            labels = torch.rand(N, V, generator=upstream.manual_seed(9))
        classes = torch.linspace(0, 2, V) if options.pop("classes", False) else None
        found = []
        for ours in (True, False):
            h, w = (x.to(dtype if ours else torch.float64).requires_grad_() for x in (hidden, weight))
            b = None if bias is None else bias.double().to(h.dtype)
            kwargs = {k: v for k, v in options.items() if ours or k not in LOCAL}
            kwargs["class_weights"] = classes
            if ours:
                kwargs |= {"impl": "triton", "return_stats": True}
            function = linear_cross_entropy if ours else reference_cross_entropy
            loss, stats = function(h, w, labels, bias=b, token_weights=weights.to(h.dtype), **kwargs)
            stats = stats[:3]  # the word with the largest logit has no gradient
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
        worst = max(worst, logprobs_difference(case, (V,), "triton", dtype))
    return worst


def on_a_group():
    dist.init_process_group("gloo")
    case = {"n": N, "seed": 0, "softcap": None, "scale": 1.0, "budget": 500, "with_bias": True, "ties": True}
    case |= {"more": MORE, "through": "both", "frozen": ""}
    assert logprobs_difference(case, (20, 0, 3), "triton", torch.float32) <= 5e-6
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


class Broken:
    """A kernel on a host that lacks a C compiler."""

    def __getitem__(self, _grid):
        raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable.")


def on_a_group_with_a_broken_rank():
    """Budgets of kernels and of plain PyTorch cut the rows differently: ranks that chose apart would not meet."""
    dist.init_process_group("gloo")
    if dist.get_rank() == 1:
        kernels.statistics_kernel = Broken()
    vocab = VocabShard.of_sizes([20, 3], dist.group.WORLD)
    hidden, weight, _, labels = problem(torch.float32)
    own = slice(vocab.start, vocab.stop)
    with contextlib.redirect_stderr(io.StringIO()):
        loss = linear_cross_entropy(hidden, weight[own].clone(), labels, vocab=vocab, workspace_bytes=500)
    torch.testing.assert_close(loss, reference_cross_entropy(hidden, weight, labels)[0])
    try:
        linear_cross_entropy(hidden, weight[own].clone(), labels, vocab=vocab, impl="triton")
    except TensorParallelError as refused:
        print(refused, flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "group":
        on_a_group()
    elif sys.argv[1] == "broken":
        on_a_group_with_a_broken_rank()
    else:
        kinds = (torch.float32, torch.float16, torch.bfloat16)
        print(json.dumps({str(dtype): max(options_in(dtype), logprobs_in(dtype)) for dtype in kinds}))
