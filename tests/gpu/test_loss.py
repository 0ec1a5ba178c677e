"""The loss on a GPU: kernels against float64, no host synchronisation, memory as the formula says.

python -m pytest tests/gpu
"""

import pytest
import torch
import torch.nn.functional as F

from tests.support.loss_problems import problem
from tp_plugin.loss import linear_cross_entropy, reference_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

WAYS = {
    "mean": {},
    "chunks": {"workspace_bytes": 1 << 20, "label_smoothing": 0.1, "z_loss": 1e-3},
    "soft cap": {"softcap": 10.0, "scale": 0.7, "workspace_bytes": 1 << 20},
    "none": {"reduction": "none", "workspace_bytes": 1 << 20},
    "recomputed": {"recompute": True, "workspace_bytes": 1 << 20, "label_smoothing": 0.1},
}


def on_gpu(dtype, n=512, v=3001, h=256):
    hidden, weight, bias, labels = (x.cuda() for x in problem(dtype, n=n, v=v, h=h))
    return hidden, weight / 8, bias, labels


def results(function, tensors, labels, **options):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    loss = function(*leaves[:2], labels, bias=leaves[2], **options)
    loss = loss[0] if isinstance(loss, tuple) else loss
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


@pytest.mark.parametrize("impl", ["triton", "chunked"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_errs_no_more_than_plain_pytorch(impl, way, dtype):
    *tensors, labels = on_gpu(dtype)
    options = {k: v for k, v in WAYS[way].items() if k not in ("workspace_bytes", "recompute")}
    truth = results(reference_cross_entropy, [x.double() for x in tensors], labels, **options)

    def plain(h, w, y, bias, **rest):
        return reference_cross_entropy(torch.eye(len(h), device="cuda"), (F.linear(h, w, bias).float()).t(), y, **rest)

    expected = results(plain, tensors, labels, **options)
    ours = results(linear_cross_entropy, tensors, labels, impl=impl, **WAYS[way])
    floor = 1e-5 if dtype == torch.float32 else 1e-4
    for o, p, t in zip(ours, expected, truth, strict=True):
        assert (o.double() - t).norm() <= 1.1 * (p.double() - t).norm() + floor * t.norm()


@pytest.mark.parametrize("way", WAYS)
def test_the_host_never_waits(way):
    *tensors, labels = on_gpu(torch.bfloat16)
    results(linear_cross_entropy, tensors, labels, **WAYS[way])  # kernels compiled, abilities of the device tried out
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        results(linear_cross_entropy, tensors, labels, **WAYS[way])
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("n", [4096, 16384])
@pytest.mark.parametrize("recompute", [False, True])
def test_memory_is_workspace_and_one_accumulator(n, recompute):
    v, h, workspace = 32000, 1024, 64 << 20
    hidden = torch.randn(n, h, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(v, h, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(0, v, (n,), device="cuda")
    for _ in range(2):  # the first takes what the libraries keep for themselves
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = linear_cross_entropy(hidden, weight, labels, workspace_bytes=workspace, recompute=recompute)
        grads = torch.autograd.grad(loss, [hidden, weight])
        extra = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in grads)
        del grads, loss
    accumulator = 0 if recompute else 4 * v * h
    assert extra <= workspace + accumulator + 8 * n * h + (1 << 20)
