"""The plain truth against its formula, written out."""

import pytest
import torch

from tp_plugin.loss import reference_cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_reference_is_the_formula(smoothing, z_loss):
    torch.manual_seed(0)
    hidden, weight, bias = (torch.randn(s, dtype=torch.float64) for s in [(4, 3), (5, 3), (5,)])
    labels, weights = torch.tensor([0, 4, -100, 2]), torch.tensor([1.0, 0.5, 3.0, -2.0], dtype=torch.float64)
    got, stats = reference_cross_entropy(
        hidden, weight, labels, bias=bias, scale=0.5, softcap=2.0, label_smoothing=smoothing, z_loss=z_loss,
        token_weights=weights, num_items=7,
    )  # fmt: skip
    total = 0.0
    for i, (row, label) in enumerate(zip(hidden, labels, strict=True)):
        logits = 2.0 * torch.tanh(0.5 * (weight @ row + bias) / 2.0)
        log_z = logits.exp().sum().log()
        logs = logits - log_z
        torch.testing.assert_close(stats.log_z[i], log_z)
        torch.testing.assert_close(stats.entropy[i], -(logs.exp() * logs).sum())
        if label == -100:
            assert stats.logprobs[i] == 0
            continue
        torch.testing.assert_close(stats.logprobs[i], logs[label])
        total = total + weights[i] * (-(1 - smoothing) * logs[label] - smoothing * logs.mean() + z_loss * log_z**2)
    torch.testing.assert_close(got, total / 7, rtol=0, atol=1e-12)
