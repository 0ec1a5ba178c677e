"""Gradient penalties: the layers differentiated twice, against one process in double precision."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.distributed as dist

import tp_plugin
from tests.support.batched_cases import launched, sentence, values
from tests.support.configs import config_for
from tests.support.errors import relative
from tests.support.models import batch, make
from tests.support.train import adapted, engine_for, model_of
from tp_plugin.collectives import copy_to_region, gather_from_region, reduce_from_region, split_to_region
from tp_plugin.config import TensorParallelConfig
from tp_plugin.layers.partial_gradients import add_once
from tp_plugin.mesh import ParallelMesh
from tp_plugin.param_info import layout_of
from tp_plugin.sharding import shard_in_place

SIZES = [3, 2]
QUIET = {"check_batch_every": 0, "guard": False, "quiet": True}

MODELS = {
    "Llama, shared heads": ("Llama", {"heads": (4, 1)}, None),
    "Qwen3, partial norms": ("Qwen3", {}, None),
    "OLMo 2, wide norms": ("olmo2", {}, None),
    "GPT-2, Conv1D": ("gpt2", {}, None),
    "DeepSeek V3, latents": ("DeepseekV3", {"experts": "eager"}, None),
    "GPT-OSS, biases of experts": ("GptOss", {"experts": "eager"}, None),
    "LoRA": ("Llama", {}, "every linear"),
    "DoRA": ("Llama", {}, "DoRA"),
    "LoRA of the embedding": ("Llama", {}, "vocabulary"),
}


def derivatives(function, x: torch.Tensor, order: int) -> list[torch.Tensor]:
    """Each order's derivative of ``function``: of the sum of the squares of the one before."""
    found, value = [], function(x)
    for _ in range(order):
        found.append(torch.autograd.grad(value, x, create_graph=True)[0])
        value = found[-1].square().sum()
    return found


def the_smallest() -> list[float]:
    x = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    weight = dist.get_rank() + 1.0

    def z(x):
        return reduce_from_region(weight * copy_to_region(x, dist.group.WORLD) ** 2, dist.group.WORLD) ** 2

    first = torch.autograd.grad(z(x), x, create_graph=True)[0]
    return [first.item(), torch.autograd.grad(first, x)[0].item()]


def every_collective() -> float:
    """Worst relative error of three orders of derivatives of a function that goes through all of them."""
    group, rank = dist.group.WORLD, dist.get_rank()
    torch.manual_seed(0)
    x = torch.randn(4, sum(SIZES), dtype=torch.float64, requires_grad=True)
    a, b = (torch.randn(sum(SIZES), sum(SIZES), dtype=torch.float64) for _ in range(2))
    bias = torch.randn(sum(SIZES), dtype=torch.float64)
    start, stop = sum(SIZES[:rank]), sum(SIZES[: rank + 1])

    def whole(x):
        return (((x @ a).sin() @ b + bias * x.mean()).square() * x.exp()).sum()

    def sharded(x):
        inside = (copy_to_region(x, group) @ a[:, start:stop]).sin() @ b[start:stop]
        inside = reduce_from_region(inside + add_once(bias * x.mean(), group), group)
        gathered = gather_from_region(split_to_region(inside, group, 1, SIZES).square(), group, 1, SIZES)
        return (gathered * x.exp()).sum()

    pairs = zip(derivatives(sharded, x, 3), derivatives(whole, x, 3), strict=True)
    return max(relative(ours, theirs) for ours, theirs in pairs)


def penalised(model: torch.nn.Module) -> torch.Tensor:
    """A reward made of hidden states, and the square of its gradient by the embeddings."""
    trunk = model.base_model
    embedded: list[torch.Tensor] = []

    def keep(_module: torch.nn.Module, _args: tuple, output: torch.Tensor) -> None:
        embedded.append(output if output.requires_grad else output.requires_grad_())  # the embedding may be frozen

    handle = model.get_input_embeddings().register_forward_hook(keep)
    hidden = trunk(batch(0, 2)["input_ids"], attention_mask=None).last_hidden_state
    handle.remove()
    direction = torch.linspace(-1, 1, hidden.shape[-1], dtype=hidden.dtype)
    reward = (hidden @ direction).tanh().sum()
    return reward + torch.autograd.grad(reward, embedded[0], create_graph=True)[0].square().sum()


def built(name: str) -> torch.nn.Module:
    family, options, adapter = MODELS[name]
    model = model_of(family, **{"attn_implementation": "eager"} | options)
    model = adapted(model, adapter).double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def inner(model: torch.nn.Module) -> torch.nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def of_model(name: str) -> dict[str, float]:
    """Relative error of the penalised loss, and of the worst gradient with its name."""
    tp_plugin.register()
    plain, model = built(name), built(name)
    shard_in_place(model, TensorParallelConfig(tp_size=2, **QUIET), ParallelMesh.create(2))
    losses = [penalised(inner(one)) for one in (plain, model)]
    for loss in losses:
        loss.backward()
    truth = {key: param.grad for key, param in plain.named_parameters() if param.grad is not None}
    least = 1e-5 * max(float(grad.norm()) for grad in truth.values())
    errors = {"loss": relative(losses[1], losses[0])}
    for key, param in model.named_parameters():
        if key not in truth:
            continue
        layout = layout_of(param)
        wanted = truth[key] if layout is None else layout.shard(truth[key], dist.get_rank())
        assert param.grad is not None, key
        errors[key] = relative(param.grad, wanted, least)
    worst = max(errors, key=lambda key: errors[key])
    return {"loss": errors["loss"], worst: errors[worst], "gradients": len(errors)}


def by_engine() -> list[float]:
    """Gradient norms of three steps with a penalty, and those of one process."""
    norms: list[list[float]] = []
    for engine in (None, 1):
        model = built("LoRA")
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, eps=1e-4)
        config = config_for(2, 1, zero={}) | {"gradient_accumulation_steps": 1, "gradient_clipping": 1e9}
        norms.append([])
        if engine:
            engine = engine_for(model, optimizer, config | {"tp_plugin": QUIET})
        for _ in range(3):
            loss = penalised(inner(model))
            if engine:
                engine.backward(loss)
                engine.step()
                norms[-1].append(float(engine.get_global_grad_norm()))
            else:
                loss.backward()
                norms[-1].append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9).item())
                optimizer.step()
                optimizer.zero_grad()
    return [ours / theirs - 1 for theirs, ours in zip(*norms, strict=True)]


def by_the_fused_loss() -> None:
    model = make("Llama").train()
    shard_in_place(model, TensorParallelConfig(tp_size=2, **QUIET), ParallelMesh.create(2))
    embedded = model.get_input_embeddings()(batch(0, 2)["input_ids"])
    loss = model(inputs_embeds=embedded, labels=batch(0, 2)["labels"]).loss
    torch.autograd.grad(loss, embedded, create_graph=True)


def by_a_summed_gradient() -> None:
    model = built("Qwen3, partial norms")
    shard_in_place(model, TensorParallelConfig(tp_size=2, **QUIET), ParallelMesh.create(2))
    reward = model.model(batch(0, 2)["input_ids"]).last_hidden_state.tanh().sum()
    norm = model.model.layers[0].self_attn.q_norm.weight
    torch.autograd.grad(reward, norm, create_graph=True)[0].square().sum().backward()


NAMES = ("the_smallest", "every_collective", "by_engine", "by_the_fused_loss", "by_a_summed_gradient")


@pytest.fixture(scope="module")
def two() -> list[dict]:
    return launched(2, __name__, NAMES)


@pytest.fixture(scope="module")
def models() -> list[dict]:
    return launched(2, __name__, tuple(CASES))


CASES = {f"model_{index}": name for index, name in enumerate(MODELS)}
globals().update({case: functools.partial(of_model, name) for case, name in CASES.items()})


def test_the_second_derivative_of_the_smallest_example_is_972(two):
    assert values(two, "the_smallest") == [[972.0, 972.0]] * 2


def test_three_derivatives_through_every_collective(two):
    assert max(values(two, "every_collective")) < 1e-12


@pytest.mark.parametrize("case", CASES, ids=list(MODELS))
def test_a_gradient_penalty_equals_one_process(models, case):
    for errors in values(models, case):
        assert errors.pop("gradients") > 5
        assert max(errors.values()) < 1e-5, errors


def test_an_engine_trains_with_a_gradient_penalty_as_one_process_does(two):
    assert max(abs(error) for errors in values(two, "by_engine") for error in errors) < 1e-5


def test_the_fused_loss_is_refused_with_what_can_be_differentiated_twice(two):
    assert 'impl="reference"' in sentence(two, "by_the_fused_loss")


def test_a_summed_gradient_is_not_differentiated_again(two):
    assert "has no second derivative" in sentence(two, "by_a_summed_gradient")
