"""What TRL takes out of logits (by functions that others use too), asked of logits that have not been computed."""

from __future__ import annotations

import torch

from tests.support.batched_cases import launched, values
from tests.support.heads import Case
from tp_plugin.collectives import counted

SIZES = (7, 6)


def asked(use) -> tuple[float, int]:
    """Difference from computed logits, gradients included, and the bytes that travelled to compute logits."""
    import tp_plugin

    tp_plugin.register()
    with counted() as counter:
        worst = max(Case(SIZES, dtype).difference(use) for dtype in (torch.float64, torch.float32))
    return worst, counter.nbytes("logits")


def selected():
    from trl.trainer.utils import selective_log_softmax

    def use(logits, labels):
        weights = torch.linspace(-1, 1, labels.numel()).view_as(labels)
        return (selective_log_softmax(logits, labels.clamp(min=0)) * weights).sum()

    return asked(use)


def both():
    from trl.trainer.utils import selective_log_softmax_and_entropy

    def use(logits, labels):
        logps, entropy = selective_log_softmax_and_entropy(logits, labels.clamp(min=0), temperature=0.7)
        return logps.sum() + entropy.square().sum()

    return asked(use)


def accuracy():
    def use(logits, labels):
        guesses = logits[:, :-1].argmax(-1)
        return (guesses == labels[:, 1:]).sum() + logits.logsumexp(-1).sum()

    return asked(use)


NAMES = ("selected", "both", "accuracy")


def test_log_probabilities_and_accuracy_compute_no_logits():
    for name in ("selected", "accuracy"):
        for worst, nbytes in values(launched(2, __name__, NAMES), name):
            assert worst <= 1e-5
            assert nbytes == 0


def test_entropy_equals_that_of_plain_logits():
    """Its chunks of rows are computed, as TRL asks for every probability."""
    for worst, nbytes in values(launched(2, __name__, NAMES), "both"):
        assert worst <= 1e-5
        assert nbytes > 0
