"""``torch.compile`` of a sharded model: graphs are broken at collectives, and the numbers stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tp_plugin
from tests.support.batched_cases import launched, values
from tests.support.models import batch, make
from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import NO_FULLGRAPH
from tp_plugin.param_info import layout_of

TP = 2
SHARED = {"family": "Qwen2", "heads": (6, 3)}  # a key head on both ranks


def sharded(model: torch.nn.Module) -> Any:
    tp_plugin.shard_model(model, TensorParallelConfig(tp_size=TP, quiet=True))
    return model


def numbers(model: Any, backend: str | None) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, gradients (full) and logits of two batches of different lengths; compiled unless ``backend`` is None."""
    call = model if backend is None else torch.compile(model, backend=backend)
    loss = 0.0
    for step, length in enumerate((12, 9)):
        out = call(**batch(step, 2, length=length))
        out.loss.backward()
        loss += float(out.loss)
    gradients = {}
    for name, param in model.named_parameters():
        layout = layout_of(param)
        gradients[name] = param.grad if layout is None else layout.unshard(tp_plugin.collectives.all_gather(
            param.grad, model.tp_sharding.mesh.tp_group,
            sizes=[layout.local_size(rank) for rank in range(layout.ranks)], dim=layout.dim or 0,
        ))  # fmt: skip
    model.eval()
    with torch.no_grad():
        return loss, gradients, call(**batch(2, 2)).logits


def parity(backend: str) -> tuple[float, float, float]:
    """Errors of the loss and the worst gradient, relative, and of the logits."""
    loss, gradients, logits = numbers(make(**SHARED), None)
    ours, own, seen = numbers(sharded(make(**SHARED)), backend)
    floor = 1e-5 * max(float(gradient.norm()) for gradient in gradients.values())
    worst = max(float((own[key] - g).norm() / g.norm().clamp_min(floor)) for key, g in gradients.items())
    return abs(ours / loss - 1), worst, float((seen - logits).abs().max())


def eager() -> tuple:
    return parity("eager")


def aot_eager() -> tuple:
    return parity("aot_eager")


def inductor() -> tuple:
    return parity("inductor")


def fullgraph() -> None:
    torch._dynamo.reset()  # frames that were given up before are not tried again
    torch.compile(sharded(make("Llama")), backend="eager", fullgraph=True)(**batch(0, 2))


def check(backend: str, cases: tuple[str, ...]) -> None:
    for loss, gradient, logits in values(launched(TP, __name__, cases), backend):
        assert loss <= 1e-5
        assert gradient <= 1e-4
        assert logits <= 1e-5


def test_a_compiled_model_computes_the_same():
    check("eager", ("eager", "fullgraph"))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_model_computes_the_same_by_every_backend(backend):
    check(backend, ("aot_eager", "inductor"))


def test_fullgraph_is_refused():
    for found in launched(TP, __name__, ("eager", "fullgraph")):
        kind, message = found["fullgraph"]
        assert kind == "Unsupported"
        assert NO_FULLGRAPH in message
