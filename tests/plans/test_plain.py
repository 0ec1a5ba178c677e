"""Models that are no transformers model: which rules they take, and that they train equal to one process."""

from __future__ import annotations

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.support import plain, plain_models
from tests.support.custom_models import HomeConfig, HomeModel
from tests.support.custom_models import Plain as Gates
from tests.support.matrix import assert_within
from tests.support.models import make
from tests.support.ranks import on_ranks
from tp_plugin.errors import TensorParallelError
from tp_plugin.plans import plan as p
from tp_plugin.plans import plan_for
from tp_plugin.plans.checks import computes_linear
from tp_plugin.plans.from_transformers import STYLE_OF
from tp_plugin.step_guard.trial import rules_within

LIMITS = {"loss": 1e-5, "norm": 1e-5, "grad": 1e-4, "update": 1e-4, "replicas": 0.0, "reload": 1e-5}
RUNS = [
    *((name, stage) for name in ("two of four", "listed", "at home", "projector", "valued") for stage in (0, 1, 3)),
    *(("one", 0), ("one", 3), ("one split", 1), ("four of four", 1), ("crossed", 3), ("named", 0), ("attending", 1)),
    *(("described", 3), ("boxed", 1)),
]


@functools.cache
def runs():
    return on_ranks(2, plain.run_cases, RUNS, timeout_s=600)


@pytest.mark.parametrize(("name", "stage"), RUNS)
def test_trains_equal_to_one_process_and_is_saved_whole(name, stage):
    for rank, found in enumerate(runs()):
        errors = found[RUNS.index((name, stage))]
        assert not isinstance(errors, str), f"rank {rank}:\n{errors}"
        assert errors.pop("compared"), "the guard of the first step compared nothing"
        assert_within(LIMITS, [errors])


@pytest.mark.parametrize("style", STYLE_OF)
def test_every_style_of_hf_means_in_your_plan_what_it_means_in_theirs(style):
    if STYLE_OF[style] in (p.LATENT, p.EXPERTS, p.FIRST):
        return  # of blocks that a plain module has not
    rules = {"fc2": "rowwise"} if style == "colwise" else {"fc1": "colwise"} if style == "rowwise" else {}
    module = nn.ModuleDict({"fc1": nn.Linear(6, 8), "fc2": nn.Linear(8, 6), "embed": nn.Embedding(9, 6)})
    target = "embed" if "embedding" in style else "fc1" if "col" in style else "fc2"
    if style.startswith("packed"):
        module["fc1"] = nn.Linear(6, 16)
        rules = {"fc2": "rowwise"} if style == "packed_colwise" else {"fc1": "packed_colwise"}
    plan = plan_for(module, 2, rules | {target: style, "embed": "embedding_rowwise"} | {target: style}, inferring=False)
    wanted = STYLE_OF[style]
    assert plan.placements[target].style == wanted if target in plan.placements else wanted == p.REPLICATED


def test_hfs_own_plan_copied_into_yours_shards_as_theirs():
    model = make("Llama", tied=True)
    theirs = plan_for(model, 2)
    copied = plan_for(model, 2, {**model.tp_plan, "model.embed_tokens": "embedding_rowwise", "lm_head": "colwise_rep"})
    assert {n: pl.layouts for n, pl in copied.placements.items()} == {
        n: pl.layouts for n, pl in theirs.placements.items()
    }
    assert copied.names("vocab_head") == ["lm_head"]


def test_a_plan_that_names_parameters_of_experts_may_be_copied_too():
    model = make("Mixtral")
    assert "model.layers.*.mlp.experts.gate_up_proj" in model.tp_plan
    assert plan_for(model, 2, dict(model.tp_plan)).mixtures


def test_the_plan_of_every_model_inside_a_module_counts():
    both = nn.ModuleDict({"policy": make("Llama"), "value": nn.ModuleList([make("Qwen3").model])})
    plan = plan_for(both, 2, inferring=False)
    assert {name.split(".model.layers")[0] for name in plan.names("column") if "policy" in name} == {"policy"}
    assert "value.0.layers.1.self_attn.q_proj" in plan.names("column")
    assert plan.names("partial")[0] == "value.0.layers.0.self_attn.q_norm"
    assert plan.names("vocab_embedding", "vocab_head") == [
        *("policy.model.embed_tokens", "policy.lm_head", "value.0.embed_tokens"),
    ]


def test_a_wrapper_that_passes_for_its_model_is_none():
    """It has the model's config, and answers what the model would."""
    boxed = plain_models.Valued()
    assert boxed.config.base_model_tp_plan
    assert boxed.get_input_embeddings()
    plan = plan_for(boxed, 2, inferring=False)
    assert "model.model.layers.0.self_attn.q_proj" in plan.names("column")


@pytest.mark.parametrize(
    ("module", "line"),
    [
        (plain_models.One(), {"fc": "colwise_gather_output"}),
        (plain_models.Four(), {"layer1": "colwise", "layer2": "rowwise"}),
        (plain_models.Named(), {"blk.o_proj": "colwise_gather_output"}),  # queries alone may be an attention's
    ],
)
def test_the_sentence_that_refuses_shows_a_line_that_is_taken(module, line):
    with pytest.raises(TensorParallelError, match=r"nothing of .* would be sharded") as refused:
        plan_for(module, 2, inferring=False)
    shown = str(refused.value)
    given = json.loads(shown[shown.index("{") : shown.index("}") + 1])
    assert given == line
    assert plan_for(module, 2, given)


class Scaled(plain_models.HomeLinear):
    def forward(self, x):
        return 2 * super().forward(x)


class Reversed(plain_models.HomeLinear):
    """Its outputs are a linear layer's, its gradients are not."""

    def forward(self, x):
        out = super().forward(x)
        return 2 * out.detach() - out


class Dropping(plain_models.HomeLinear):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x):
        return x @ self.weight


class Longer(plain_models.HomeLinear):
    def __init__(self):
        super().__init__(6, 6)
        self.scale = nn.Parameter(torch.ones(6))


@pytest.mark.parametrize("module", [Scaled(6, 4), Reversed(6, 4), Dropping(6, 4), Transposed(), Longer()])
def test_a_layer_that_does_anything_else_is_no_linear_layer(module):
    assert not computes_linear(module)
    with pytest.raises(TensorParallelError, match=r"style column_gather needs an nn.Linear, or a module that gives"):
        plan_for(nn.ModuleDict({"fc": module}), 2, {"fc": "colwise_gather_output"})


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(6, 4), (5, 5)])
def test_a_layer_that_does_what_a_linear_one_does_is_one(sizes, bias):
    with torch.device("meta"):
        home = plain_models.HomeLinear(*sizes, bias=bias)
    written = plain_models.Written(*sizes, bias=bias)
    before = torch.get_rng_state()
    assert computes_linear(home)
    assert computes_linear(written)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("wrap", [torch.nn.utils.weight_norm, torch.nn.utils.parametrizations.weight_norm])
def test_a_weight_that_is_computed_from_others_is_refused(wrap):
    module = nn.ModuleDict({"fc1": wrap(nn.Linear(6, 8)), "fc2": nn.Linear(8, 6)})
    with pytest.raises(TensorParallelError, match="weight of 'fc1' is computed from other parameters"):
        plan_for(module, 2, {"fc1": "colwise", "fc2": "rowwise"})


def test_weights_computed_from_others_are_not_inferred():
    module = Gates()
    torch.nn.utils.parametrizations.weight_norm(module.blocks[0].one)
    assert not any(name.startswith("blocks") for name in _inferred(module))


def _inferred(module: nn.Module) -> list[str]:
    try:
        return plan_for(module, 2).inferred()
    except TensorParallelError:
        return []


def test_an_attention_whose_heads_cannot_be_read_is_refused():
    class Hidden(plain_models.Attention):
        def __init__(self):
            super().__init__()
            self.how_many = self.__dict__.pop("nheads")

    rules = {f"0.{name}_proj": "colwise" for name in "qkv"} | {"0.o_proj": "rowwise"}
    with pytest.raises(TensorParallelError, match="give it an attribute head_dim or num_heads that its forward reads"):
        plan_for(nn.Sequential(Hidden()), 2, rules)


def test_what_may_act_on_shards_is_still_asked_about():
    """A linear layer between columns and row, of another width, and a norm."""
    for between in (nn.Linear(4, 4), nn.LayerNorm(8)):
        module = nn.ModuleDict({"fc1": nn.Linear(6, 8), "between": between, "fc2": nn.Linear(8, 6)})
        with pytest.raises(TensorParallelError, match=r"'between\.weight' is inside the sharded block"):
            plan_for(module, 2, {"fc1": "colwise", "fc2": "rowwise"})


def test_rules_of_yours_as_a_part_reads_them():
    part = HomeModel(HomeConfig(num_layers=1))
    rules = {"box.*.stack.0.feed.one": "column", "**.wq": "replicated", "other.fc": "column"}
    assert rules_within(rules, "box.0", part) == {"stack.0.feed.one": "column", "**.wq": "replicated"}
    for pattern in ("**.0.stack.0.feed.one", "box.**.wq"):
        assert rules_within({pattern: "column"}, "box.0", part) is None


class Around(nn.Module):
    """A model nobody described inside a module with a projector that nobody described either."""

    def __init__(self, mixing):
        super().__init__()
        self.inner = HomeModel(HomeConfig(mixing=mixing, num_layers=2))
        self.projector = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))


def shard_around() -> dict:
    import tp_plugin

    found: dict = {}
    for name, mixing, module in (("sound", False, Around), ("wrong", True, Around), ("nothing", False, Gates)):
        options = tp_plugin.TensorParallelConfig(tp_size=2, quiet=True)
        try:
            torch.manual_seed(0)
            model = module(mixing) if module is Around else module()
            found[name] = sorted(tp_plugin.shard_model(model, options).plan.names("column"))
        except tp_plugin.TensorParallelError as refused:
            found[name] = str(refused)
    return found


def test_a_model_inside_is_tried_by_itself_and_what_cannot_be_tried_stays_whole():
    for found in on_ranks(2, shard_around):
        names = ("feed.one", "feed.two", "mixer.wk", "mixer.wq", "mixer.wv")
        assert found["sound"] == [f"inner.stack.{layer}.{name}" for layer in (0, 1) for name in names]
        assert "the rules inferred from the shapes of HomeModel are wrong" in found["wrong"]
        assert (
            'such as {"blocks.*.one": "colwise", "blocks.*.two": "colwise", "blocks.*.three": "rowwise"}'
            in (found["nothing"])
        )


def refuse_of_parts() -> dict[str, str]:
    """What a transformers model says by itself, it says inside a module too."""
    import tp_plugin

    boxed = plain_models.Valued()
    tp_plugin.shard_model(boxed, tp_plugin.TensorParallelConfig(tp_size=2, quiet=True))
    ids = torch.ones(2, 3, dtype=torch.long)
    asked = {
        "attentions": lambda: boxed.model(input_ids=ids, output_attentions=True),
        "size": lambda: boxed.model.resize_token_embeddings(140),
        "experts": lambda: plan_for(nn.ModuleDict({"inner": make("Mixtral", experts="batched_mm")}), 2),
        "other experts": lambda: plan_for(nn.ModuleDict({"inner": of_other_experts()}), 2),
    }
    found = {}
    for name, ask in asked.items():
        try:
            ask()
        except tp_plugin.TensorParallelError as refused:
            found[name] = str(refused)
    return found


def of_other_experts() -> nn.Module:
    model = make("Mixtral")
    model.config._experts_implementation_internal = "sonicmoe"
    return model


def test_a_model_inside_refuses_what_it_refuses_alone():
    for found in on_ranks(2, refuse_of_parts):
        assert "output_attentions asks for the weights of all heads" in found["attentions"]
        assert "resize_token_embeddings(140) needs full embeddings" in found["size"]
        assert "experts" not in found
        assert "experts implementation 'sonicmoe' is not supported" in found["other experts"]
