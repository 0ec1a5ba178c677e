"""Random problems for the loss, whole and as one rank sees them, and the largest difference from plain autograd."""

from __future__ import annotations

import torch
import torch.distributed as dist

from tp_plugin.loss import Stats, VocabShard, linear_cross_entropy, reference_cross_entropy

N, H, V = 11, 6, 23


def problem(dtype=torch.float64, seed=0, v=V, n=N, h=H):
    """hidden [n, h], weight [v, h], bias [v], labels [n] of which one is ignored."""
    random = torch.Generator().manual_seed(seed)
    shapes = [(n, h), (v, h), (v,)]
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64, generator=random).to(dtype) for s in shapes)
    labels = torch.randint(0, v, (n,), generator=random)
    if n:
        labels[n // 2] = -100
    return hidden, weight, bias, labels


def group_of():
    return dist.group.WORLD if dist.is_initialized() else None


def difference(case: dict, sizes: tuple[int, ...], impl: str = "chunked") -> float:
    """Of one case, ``sizes`` rows of the vocabulary on each rank, the worst absolute difference from plain autograd in
    float64, loss, statistics and gradients.

    Keys of ``case`` that are no options: n, seed; labels ("some", "all ignored", "first rank", and the probabilities of
    "whole" rows or of a "shard"); with_bias; weights (None, "fixed", "learned"); classes; frozen ("", "hidden",
    "weight"); through ("loss", "both", "stats").
    """
    case = dict(case)
    labels_kind, with_bias = case.pop("labels"), case.pop("with_bias")
    weights_kind, frozen, through = case.pop("weights"), case.pop("frozen"), case.pop("through")
    vocab = VocabShard.of_sizes(list(sizes), group_of())
    own = slice(vocab.start, vocab.stop)
    n, seed = case.pop("n"), case.pop("seed")
    hidden, weight, bias, labels = problem(seed=seed, v=sum(sizes), n=n)
    random = torch.Generator().manual_seed(seed + 1)
    token_weights = torch.randn(n, dtype=torch.float64, generator=random) if weights_kind else None
    ignore = case["ignore_index"]
    labels = torch.where(labels == -100, ignore, labels)
    if labels_kind == "all ignored":
        labels = torch.full_like(labels, ignore)
    elif labels_kind == "first rank":
        labels = torch.where(labels == ignore, labels, labels % max(1, sizes[0]))
    classes = torch.rand(sum(sizes), dtype=torch.float64, generator=random) * 2 if case.pop("classes", False) else None
    soft = torch.rand(n, sum(sizes), dtype=torch.float64, generator=random)  # which torch does not ask to sum to 1
    stats_too = through != "loss"

    def run(function, sharded, **more):
        leaves = [hidden, weight[own] if sharded else weight, bias[own] if sharded else bias, token_weights]
        leaves = [None if x is None else x.clone() for x in leaves]
        wanted = [frozen != "hidden", frozen != "weight", with_bias, weights_kind == "learned"]
        for leaf, grad in zip(leaves, wanted, strict=True):
            if grad:
                leaf.requires_grad_()
        h, w, b, t = leaves
        if labels_kind in ("whole", "shard"):
            goal = soft[:, own] if sharded and labels_kind == "shard" else soft
        else:
            goal = labels
        case["class_weights"] = classes
        found = function(h, w, goal, bias=b if with_bias else None, token_weights=t, **case, **more)
        loss, stats = found if isinstance(found, tuple) else (found, None)
        upstream = torch.Generator().manual_seed(seed + 2)
        total = 0.0
        for name, x in [("loss", loss), *zip(Stats._fields, stats or (), strict=False)]:
            by = torch.randn(x.shape, dtype=torch.float64, generator=upstream)
            chosen = (name == "loss") == (through != "stats") or through == "both"
            if chosen and x.is_floating_point():
                total = total + (x * by).sum()
        leaves = [leaf for leaf, grad in zip(leaves, wanted, strict=True) if grad]
        grads = torch.autograd.grad(total, leaves, allow_unused=True) if leaves and total.requires_grad else []
        grads = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)]
        return [loss, *(stats or ())], dict(zip([i for i, g in enumerate(wanted) if g], grads, strict=True))

    budget, recompute = case.pop("budget"), case.pop("recompute")

    def whole(*args, **kwargs):
        loss, stats = reference_cross_entropy(*args, **kwargs)
        return (loss, stats) if stats_too else loss

    truth, expected = run(whole, False)
    got, grads = run(
        linear_cross_entropy, True, vocab=vocab, return_stats=stats_too, workspace_bytes=budget, recompute=recompute,
        impl=impl,
    )  # fmt: skip
    worst = 0.0
    for a, e in zip(got, truth, strict=True):
        assert a.shape == e.shape
        worst = larger(worst, a, e)
    for which, e in expected.items():
        worst = larger(worst, grads[which], e[own] if which in (1, 2) else e)
    return worst


def larger(worst: float, a: torch.Tensor, e: torch.Tensor) -> float:
    """The worse of ``worst`` and the largest difference; both nan in one place is none, one nan is infinite."""
    assert a.shape == e.shape
    if not a.numel():
        return worst
    a, e = a.detach().double(), e.detach().double()
    apart = torch.where(a.isnan() & e.isnan(), 0.0, (a - e).abs() / e.abs().clamp(min=1.0))
    return max(worst, apart.nan_to_num(nan=float("inf")).max().item())
