"""Heads for the tests: the same logits lazily and plainly, on one rank or several."""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tp_plugin.lazy import lazy_logits
from tp_plugin.loss import VocabShard

B, T, H, V = 2, 5, 6, 13


class Case:
    """One head with leaves to differentiate: ``plain`` and ``lazy`` logits [B, T, V] of the same numbers."""

    def __init__(self, sizes=(V,), dtype=torch.float64, budget=None, seed=0):
        torch.manual_seed(seed)
        self.vocab = VocabShard.of_sizes(list(sizes), dist.group.WORLD if dist.is_initialized() else None)
        shapes = [(B, T, H), (V, H), (V,)]
        self.full = [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]
        own = slice(self.vocab.start, self.vocab.stop)
        self.own = [self.full[0].detach().clone().requires_grad_()]
        self.own += [x.detach()[own].clone().requires_grad_() for x in self.full[1:]]
        self.labels = torch.randint(0, V, (B, T))
        self.labels[0, 1] = -100
        self.plain = F.linear(*self.full)
        self.lazy = lazy_logits(*self.own, self.vocab, workspace_bytes=budget)

    def gradients(self, loss, leaves):
        return torch.autograd.grad(loss, leaves, allow_unused=True)

    def difference(self, use, seed=1):
        """Largest difference between ``use(plain, labels)`` and ``use(lazy, labels)``, a scalar, and gradients."""
        torch.manual_seed(seed)
        truth = use(self.plain, self.labels)
        expected = self.gradients(truth, self.full)
        torch.manual_seed(seed)
        found = use(self.lazy, self.labels)
        assert found.dtype == truth.dtype
        got = self.gradients(found, self.own)
        own = slice(self.vocab.start, self.vocab.stop)
        expected = [expected[0], *(None if x is None else x[own] for x in expected[1:])]
        worst = abs(found - truth).item()
        for a, e in zip(got, expected, strict=True):
            assert (a is None) == (e is None)
            if a is not None and a.numel():
                worst = max(worst, (a - e).abs().max().item())
        return worst


def ce(logits, labels, **kwargs):
    return F.cross_entropy(logits.reshape(-1, V), labels.reshape(-1), **kwargs)
