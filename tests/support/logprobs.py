"""Log-probabilities and their statistics against plain autograd on the full vocabulary."""

from __future__ import annotations

import torch

from tests.support.loss_problems import group_of, larger, problem
from tp_plugin.loss import Logprobs, VocabShard, linear_logprobs

MORE = ("entropy", "mean_logit", "log_square_sum", "top_id")


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


def logprobs_difference(case: dict, sizes: tuple[int, ...], impl: str = "chunked", dtype=torch.float64) -> float:
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
