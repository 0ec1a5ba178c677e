"""A step without a labelled token: gradients are 0, as torch's, whatever the loss is divided by."""

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.support.batched_cases import launched, values
from tests.support.loss_problems import N, V, problem
from tp_plugin.lazy import lazy_logits
from tp_plugin.loss import VocabShard, cross_entropy, linear_cross_entropy, linear_logprobs

SIZES = (V, 0)  # the second rank holds no word
WAYS = {
    "fused": {},
    "chunks": {"workspace_bytes": 600},
    "recompute": {"recompute": True},
    "with statistics": {"return_stats": True},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 0.1, "softcap": 3.0},
    "reference": {"impl": "reference"},
    "of logits": {"logits": True},
    "lazy": {"lazy": True},
    "log-probabilities": {"logprobs": True},
}
DIVISORS = {"by none": {"num_items": 0}, "mean": {}, "none": {"reduction": "none"}}
NO_ROWS = {
    "ignored": {},
    "empty batch": {"n": 0},
    "no weight": {"zeros": True},
    "learned, no weight": {"zeros": "learned"},
}


def gradients_of(way: dict, divisor: dict, rows: dict, dtype: torch.dtype) -> tuple[float, list[torch.Tensor]]:
    """The loss, and the gradients of hidden states, head and bias. No divisor: the mean, or a quotient by hand."""
    vocab = VocabShard.of_sizes(list(SIZES), dist.group.WORLD)
    own, n = slice(vocab.start, vocab.stop), rows.get("n", N)
    hidden, weight, bias, labels = problem(dtype, n=n)
    h, w, b = (x.clone().requires_grad_() for x in (hidden, weight[own], bias[own]))
    tokens = torch.zeros(n, dtype=dtype).requires_grad_(rows["zeros"] == "learned") if "zeros" in rows else None
    if tokens is None:
        labels = torch.full_like(labels, -100)
    options = {"vocab": vocab, "token_weights": tokens} | divisor
    if "lazy" in way:
        rest = {"reduction": "none"} if "reduction" in divisor else {"reduction": "sum"} if divisor else {}
        loss = F.cross_entropy(lazy_logits(h, w, b, vocab), labels, **rest)
        loss = loss / 0 if "num_items" in divisor else loss
    elif "logprobs" in way:
        loss = -linear_logprobs(h, w, labels, bias=b, vocab=vocab).logprobs
        loss = loss if "reduction" in divisor else loss.sum() / divisor.get("num_items", 0)
    elif "logits" in way:
        loss = cross_entropy(F.linear(h, w, b), labels, **options)
    else:
        loss = linear_cross_entropy(h, w, labels, bias=b, **options, **way)
    loss = loss[0] if isinstance(loss, tuple) else loss
    if "reduction" in divisor:
        loss = loss.sum() / torch.zeros((), dtype=dtype)
    return loss.item(), list(torch.autograd.grad(loss, [h, w, b]))


def no_labels() -> dict[tuple[str, str, str, str], tuple[bool, bool]]:
    """Of each way: whether the loss is no number, and whether all gradients are 0."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for name, way in WAYS.items():
            for by, divisor in DIVISORS.items():
                for kind, rows in NO_ROWS.items():
                    if "zeros" in rows and ("lazy" in way or "logprobs" in way or by == "mean"):
                        continue  # these take no token weights, and a mean over rows that weigh 0 is 0
                    loss, grads = gradients_of(way, divisor, rows, dtype)
                    found[name, by, kind, str(dtype)] = loss != loss, all(not g.any() for g in grads)
    return found


def test_gradients_are_0_whatever_the_loss_is_divided_by():
    for rank, found in enumerate(values(launched(2, __name__, ("no_labels",)), "no_labels")):
        assert len(found) > 100
        wrong = {key: value for key, value in found.items() if value != (True, True)}
        assert not wrong, f"rank {rank}: {wrong}"
