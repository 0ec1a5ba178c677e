"""Rules read off modules and shapes: plain patterns are found, anything else stays replicated."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import AutoConfig

from tests.support.custom_models import Gated, HomeConfig, HomeModel, Plain
from tp_plugin.errors import TensorParallelError
from tp_plugin.plans import plan as p
from tp_plugin.plans import plan_for
from tp_plugin.plans.infer import infer
from tp_plugin.plans.plan import fold_all


def styles(model: nn.Module, tp: int = 2) -> dict[str, str]:
    plan = plan_for(model, tp)
    return {name: plan.placements[name].style for name in plan.inferred()}


def home(**options) -> HomeModel:
    with torch.device("meta"):
        return HomeModel(HomeConfig(num_layers=1, **options))


def test_separate_projections_and_a_gated_mlp():
    columns = {f"stack.0.{name}": p.COLUMN for name in ("mixer.wq", "mixer.wk", "mixer.wv", "feed.one", "feed.two")}
    assert styles(home()) == columns | {"stack.0.mixer.wo": p.ROW, "stack.0.feed.three": p.ROW}


def test_heads_are_dealt_whole():
    plan = plan_for(home(heads=6, kv_heads=3, hidden_size=240), 2)
    assert plan.placements["stack.0.mixer.wq"].layouts["weight"].parts == (((0, 120),), ((120, 240),))
    assert plan.placements["stack.0.mixer.wk"].layouts["weight"].parts == (((0, 80),), ((40, 120),))
    local = {one.attribute: one.values for region in plan.regions for one in region.locals}
    assert local == {"n_heads": (3, 3), "kv_heads": (3, 3)}


def test_a_model_without_a_config():
    assert set(styles(Plain())) == {f"blocks.{i}.{name}" for i in (0, 1) for name in ("one", "two", "three")}


class Convolved(Gated):
    """A convolution over the inner width, between the columns and the row."""

    def __init__(self):
        super().__init__(16, 48)
        self.conv = nn.Conv1d(48, 48, 3, groups=48)


class Scaled(Gated):
    """A bare parameter of which nothing is known."""

    def __init__(self):
        super().__init__(16, 48)
        self.scale = nn.Parameter(torch.ones(48))


class Square(nn.Module):
    """Which of two square linears comes first cannot be told."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(16, 16), nn.Linear(16, 16)


class InnerNorm(Gated):
    """A norm as wide as the sharded width."""

    def __init__(self):
        super().__init__(16, 48)
        self.norm = nn.LayerNorm(48)


class Tied(nn.Module):
    """The linear that narrows again is the transpose of the one that widens, and has its name too."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(16, 48, bias=False)
        self.decoder = nn.ModuleDict({"linear": self.encoder})


class NarrowedElsewhere(Gated):
    """Its last linear is a layer of another module, too."""

    def __init__(self):
        super().__init__(16, 48)
        self.other = nn.ModuleDict({"three": self.three})


@pytest.mark.parametrize("kind", [Convolved, Scaled, Square, InnerNorm, Tied, NarrowedElsewhere])
def test_in_doubt_a_block_stays_replicated(kind):
    model = nn.ModuleDict({"blocks": nn.ModuleList([kind()])})
    assert infer(dict(model.named_modules()), set()) == []
    with pytest.raises(TensorParallelError, match="nothing of ModuleDict would be sharded"):
        plan_for(model, 2)


class Routed(Gated):
    def __init__(self):
        super().__init__(16, 48)
        self.router, self.norm = nn.Linear(16, 5), nn.LayerNorm(16)


def test_a_router_and_a_norm_of_the_block_input_stay_replicated_beside_it():
    model = nn.ModuleDict({"blocks": nn.ModuleList([Routed()])})
    found = {rule.pattern: rule.style for rule in infer(dict(model.named_modules()), set())}
    assert found["blocks.*.router"] == found["blocks.*.norm"] == p.REPLICATED
    assert found["blocks.*.one"] == found["blocks.*.two"] == p.COLUMN


def test_layers_that_somebody_describes_are_left_alone():
    plan = plan_for(
        home(), 2, {"stack.*.feed.one": "column", "stack.*.feed.three": "row", "stack.*.feed.two": "column"}
    )
    assert plan.inferred() == []


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        ("speech_to_text", {"model.encoder.layers.*.fc1", "model.decoder.layers.*.encoder_attn.q_proj"}),
        ("canine", {"canine.encoder.layer.*.attention.self.query", "canine.encoder.layer.*.intermediate.dense"}),
        ("lfm2", {"model.layers.*.feed_forward.w1", "model.layers.*.self_attn.k_proj"}),
    ],
)
def test_architectures_without_a_plan(model_type, expected):
    from tp_plugin.model_check.check import on_meta
    from tp_plugin.model_check.resolve_model import architectures, class_named

    model = on_meta(class_named(architectures()[model_type][1]), AutoConfig.for_model(model_type))
    assert expected <= set(fold_all(plan_for(model, 2).inferred()))
