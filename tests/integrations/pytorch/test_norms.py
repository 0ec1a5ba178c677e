"""torch's functions of parameters and gradients on a sharded model give what one process gets of the whole one."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from torch.nn.utils import clip_grad_norm_, get_total_norm, parameters_to_vector, vector_to_parameters

import tp_plugin
from tests.support.batched_cases import launched, sentence, values
from tests.support.configs import config_for
from tests.support.errors import relative, replica_error
from tests.support.models import batch, make
from tests.support.train import adapted, engine_for
from tp_plugin.config import TensorParallelConfig
from tp_plugin.param_info import layout_of

QUIET = {"check_batch_every": 0, "guard": False, "quiet": True}
ORDERS = (1.0, 2.0, 3.0, math.inf)
MODELS = {
    "shared heads": ("Llama", (4, 1), None),
    "partial": ("Qwen3", (4, 2), None),
    "LoRA": ("Llama", (4, 2), "LoRA"),
}


def pair(name: str, *, backward: bool = True) -> tuple[torch.nn.Module, torch.nn.Module]:
    """A whole model and its sharded twin, with the gradients of one batch."""
    family, heads, adapter = MODELS[name]
    models = [adapted(make(family, heads=heads), adapter and "every linear") for _ in range(2)]
    tp_plugin.shard_model(models[1], TensorParallelConfig(tp_size=2, **QUIET))
    for model in models if backward else ():
        model(**batch(0, 4)).loss.backward()
    return models[0], models[1]


def gradients(model: torch.nn.Module) -> list[torch.Tensor]:
    return [param.grad for param in model.parameters() if param.grad is not None]


def norms() -> float:
    """Worst relative error of norms of gradients, of weights and of tensors made of them, of every order."""
    worst = 0.0
    for name in MODELS:
        plain, model = pair(name)
        for order in ORDERS:
            for of in (
                gradients,
                lambda m: list(m.parameters()),
                lambda m: [p.detach().view(-1) for p in m.parameters()],
            ):
                theirs, ours = (get_total_norm(of(one), order) for one in (plain, model))
                assert ours.dtype == theirs.dtype
                worst = max(worst, abs(float(ours / theirs) - 1))
    return worst


def clipping() -> float:
    """The same of ``clip_grad_norm_``, and of every gradient after it and after ``clip_grad_value_``."""
    worst = 0.0
    for name in MODELS:
        for order in (2.0, math.inf):
            plain, model = pair(name)
            theirs, ours = (clip_grad_norm_((p for p in m.parameters()), 0.1, order) for m in (plain, model))
            worst = max(worst, abs(float(ours / theirs) - 1), apart(plain, model))
            for one in (plain, model):
                torch.nn.utils.clip_grad_value_(one.parameters(), 1e-3)
            worst = max(worst, apart(plain, model))
    return worst


def apart(plain: torch.nn.Module, model: torch.nn.Module) -> float:
    """The largest relative error of a gradient."""
    errors, truth = [], dict(plain.named_parameters())
    for name, param in model.named_parameters():
        if param.grad is not None:
            layout = layout_of(param)
            full = truth[name].grad
            errors.append(relative(param.grad, full if layout is None else layout.shard(full, dist.get_rank()), 1e-4))
    return max(errors)


def not_finite() -> list[str]:
    """What is said of a gradient that is NaN on one rank, by the 2-norm and by the maximum."""
    found = []
    for order in (2.0, math.inf):
        _, model = pair("shared heads")
        if dist.get_rank() == 1:
            model.lm_head.weight.grad[0, 0] = math.nan
        assert get_total_norm(gradients(model), order).isnan()
        with pytest.raises(RuntimeError, match="non-finite"):
            clip_grad_norm_(model.parameters(), 1.0, order, error_if_nonfinite=True)
        found.append("NaN")
    return found


def vectors() -> dict[str, float]:
    """Errors of a model's vector, of its gradients', of gradients through it, and of parameters made of one."""
    worst = {"vector": 0.0, "gradient": 0.0, "back": 0.0, "made": 0.0}
    for name in MODELS:
        plain, model = pair(name)
        theirs, ours = (parameters_to_vector(one.parameters()) for one in (plain, model))
        worst["vector"] = max(worst["vector"], float((ours - theirs).abs().max()))
        worst["gradient"] = max(
            worst["gradient"], relative(*(parameters_to_vector(gradients(one)) for one in (model, plain)))
        )
        for one, vector in ((plain, theirs), (model, ours)):
            one.zero_grad()
            (vector.norm() * vector[::7].sum()).backward()
        worst["back"] = max(worst["back"], apart(plain, model))
        vector_to_parameters(ours.detach() * 2, model.parameters())
        vector_to_parameters(theirs.detach() * 2, plain.parameters())
        again = parameters_to_vector(model.parameters())
        worst["made"] = max(worst["made"], float((again - parameters_to_vector(plain.parameters())).abs().max()))
    return worst


def in_a_loop() -> dict[str, float]:
    """An engine's loop that clips by itself and keeps an average of the weights, against one process."""
    errors = {"norm": 0.0, "average": 0.0}
    runs = []
    for sharded in (False, True):
        model = make("Llama", heads=(4, 1)).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-4)
        config = config_for(2, 0) | {"gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
        config |= {"tp_plugin": {"quiet": True}}
        engine = engine_for(model, optimizer, config) if sharded else None
        average = [param.detach().clone() for param in model.parameters()]
        norms = []
        for step in range(4):
            loss = (engine or model)(**batch(step, 4)).loss
            engine.backward(loss) if engine else loss.backward()
            norms.append(float(clip_grad_norm_(model.parameters(), 0.3)))
            engine.step() if engine else optimizer.step()
            optimizer.zero_grad()
            for kept, param in zip(average, model.parameters(), strict=True):
                kept.lerp_(param.detach(), 0.1)
        runs.append((norms, average, [param.detach() for param in model.parameters()]))
        if engine:
            errors["replicas"] = replica_error(engine)
            layouts = [layout_of(param) for param in model.parameters()]
    (theirs, kept, after), (ours, own_kept, own_after) = runs
    errors["norm"] = max(abs(one / other - 1) for one, other in zip(ours, theirs, strict=True))
    for of, name in (
        (zip(own_kept, kept, layouts, strict=True), "average"),
        (zip(own_after, after, layouts, strict=True), "weights"),
    ):
        errors[name] = max(
            relative(one, other if layout is None else layout.shard(other, dist.get_rank()))
            for one, other, layout in of
        )
    return errors


def order_zero() -> None:
    _, model = pair("shared heads")
    clip_grad_norm_(model.parameters(), 1.0, 0)


def another_vector() -> None:
    _, model = pair("shared heads", backward=False)
    vector_to_parameters(torch.zeros(sum(param.numel() for param in model.parameters())), model.parameters())


def others_are_left_alone() -> tuple[float, int, bool]:
    """The norm of tensors that are no model's, the length of a plain model's vector, and whether all is given back."""
    pair("shared heads", backward=False)
    plain = torch.nn.Linear(3, 4)
    found = get_total_norm([torch.tensor(3.0), torch.tensor([4.0])]), parameters_to_vector(plain.parameters())
    tp_plugin.unregister()
    given_back = get_total_norm is torch.nn.utils.clip_grad._get_total_norm and "tp_plugin" not in str(
        vars(parameters_to_vector)
    )
    tp_plugin.register()
    return float(found[0]), found[1].numel(), given_back


NAMES = (
    *("norms", "clipping", "not_finite", "vectors", "in_a_loop", "order_zero", "another_vector"),
    "others_are_left_alone",
)


@pytest.fixture(scope="module")
def two() -> list[dict]:
    return launched(2, __name__, NAMES)


def test_norms_of_gradients_and_weights_count_every_element_once(two):
    assert max(values(two, "norms")) < 1e-5


def test_clipping_scales_by_the_norm_of_the_whole_model(two):
    assert max(values(two, "clipping")) < 1e-5


def test_a_norm_that_is_not_finite_on_one_rank_is_so_on_all(two):
    assert values(two, "not_finite") == [["NaN", "NaN"]] * 2


def test_a_models_vector_is_the_whole_models(two):
    for errors in values(two, "vectors"):
        assert errors["vector"] == errors["made"] == 0.0
        assert max(errors["gradient"], errors["back"]) < 1e-5


def test_a_loop_that_clips_by_itself_trains_as_one_process(two):
    for errors in values(two, "in_a_loop"):
        assert errors["replicas"] == 0.0
        assert max(errors.values()) < 1e-4, errors


def test_what_cannot_be_answered_is_refused(two):
    assert "order above 0" in sentence(two, "order_zero")
    assert "pass a vector like the one that parameters_to_vector gives" in sentence(two, "another_vector")


def test_other_tensors_are_left_alone_and_torch_gets_its_functions_back(two):
    assert values(two, "others_are_left_alone") == [(5.0, 16, True)] * 2
