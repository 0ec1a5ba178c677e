"""The ten-line truth against its formula, written out."""

import pytest
import torch

from tp_plugin.loss import reference_cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_reference_is_the_formula(smoothing):
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64) for s in [(4, 3), (5, 3), (5,)])
    labels = torch.tensor([0, 4, -100, 2])
    got = reference_cross_entropy(
        hidden, weight, labels, bias=bias, scale=0.5, softcap=2.0, label_smoothing=smoothing, num_items=7
    )
    total = 0.0
    for row, label in zip(hidden, labels, strict=True):
        if label == -100:
            continue
        logits = 2.0 * torch.tanh(0.5 * (weight @ row + bias) / 2.0)
        logs = logits - logits.exp().sum().log()
        total = total - (1 - smoothing) * logs[label] - smoothing * logs.mean()
    torch.testing.assert_close(got, total / 7, rtol=0, atol=1e-12)
