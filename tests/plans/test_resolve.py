"""Plans of real architectures, and what is refused before anything is touched."""

import json

import pytest
import torch
import transformers
from torch import nn

from tests.support import zoo
from tests.support.models import FAMILIES, make
from tp_plugin.errors import TensorParallelError
from tp_plugin.plans import plan_for, register_family
from tp_plugin.plans.from_transformers import STYLE_OF
from tp_plugin.plans.plan import ADDED_ONCE, NO_RULE, STYLES
from tp_plugin.plans.registry import _FAMILIES
from tp_plugin.plans.resolve import matched_rules
from tp_plugin.plans.suggest import as_json, as_python, skeleton


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_family_is_placed(family, tied):
    model = make(family, tied=tied)
    plan = plan_for(model, 2)
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    assert sorted(plan.names("column", "row", "vocab_head")) == sorted(linears)
    assert plan.names("vocab_embedding") == ["model.embed_tokens"]
    assert all("norm" in name or name.endswith(("o_proj.bias", "down_proj.bias")) for name in plan.replicated)
    assert len(plan.regions) == 2 * model.config.num_hidden_layers


@pytest.mark.parametrize("family", ["Qwen3", "Gemma3"])
def test_norms_on_sharded_heads_have_partial_gradients(family):
    assert plan_for(make(family), 2).names("partial") == [
        f"model.layers.{layer}.self_attn.{which}_norm" for layer in (0, 1) for which in "qk"
    ]


def test_a_plan_needs_no_weights():
    with torch.device("meta"):
        model = make.__globals__["transformers"].LlamaForCausalLM(make("Llama").config)
    assert plan_for(model, 2) == plan_for(make("Llama"), 2)


def test_describe_folds_layers_and_lists_what_is_replicated():
    text = plan_for(make("Qwen2"), 2).describe()
    assert "model.layers.*.self_attn.q_proj  column           x2    (HF plan)" in text
    assert "replicated on every rank: model.layers.*.input_layernorm.weight" in text
    assert "layers.0" not in text


class Block(nn.Module):
    def __init__(self, extra: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 10), nn.Linear(10, 4)
        if extra:
            self.middle = nn.LayerNorm(10)


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_up, self.down = nn.Linear(4, 20), nn.Linear(10, 4)
        self.tp_plan = {"gate_up": "packed_colwise", "down": "rowwise"}


RULES = {"up": "column", "down": "row"}


def test_your_own_rules_shard_your_own_module():
    plan = plan_for(Block(), 3, RULES)
    assert plan.placements["up"].layouts["weight"].parts == (((0, 4),), ((4, 7),), ((7, 10),))
    assert plan.placements["down"].layouts["weight"].dim == 1
    assert plan.replicated == {"down.bias": ADDED_ONCE}


def test_packed_blocks_are_cut_each():
    assert plan_for(Packed(), 2).placements["gate_up"].layouts["weight"].parts == (
        ((0, 5), (10, 15)),
        ((5, 10), (15, 20)),
    )


def test_a_registered_family_replaces_the_hf_plan():
    model = make("Llama")
    mlp = {"model.layers.*.mlp.up_proj": "column_gather", "model.layers.*.mlp.gate_proj": "column_gather"}
    register_family("llama")(lambda _model: mlp)
    try:
        plan = plan_for(model, 2)
    finally:
        del _FAMILIES["llama"]
    assert plan.names("column", "row") == []
    assert len(plan.names("column_gather")) == 4


@pytest.mark.parametrize(
    ("module", "rules", "message"),
    [
        (Block(), {}, "nothing of Block would be sharded"),
        (Block(), {"up": "column"}, "needs at least one column and exactly one row"),
        (Block(), {"down": "row"}, "needs at least one column and exactly one row"),
        (Block(), RULES | {"dwon": "row"}, "'dwon': row hits no module; did you mean 'down'"),
        (Block(), {"up": "colum", "down": "row"}, "unknown style 'colum'"),
        (Block(extra=True), RULES, "'middle.weight' is inside the sharded block"),
        (Packed(), {"gate_up": "column", "down": "row"}, "do not belong together"),
    ],
)
def test_plans_that_would_be_wrong_are_refused(module, rules, message):
    with pytest.raises(TensorParallelError, match=message):
        plan_for(module, 2, rules)


def test_more_ranks_than_features_are_refused():
    with pytest.raises(TensorParallelError, match="10 features to shard, fewer than the 11 ranks"):
        plan_for(Block(), 11, RULES)


def test_a_forgotten_norm_is_allowed_once_a_rule_speaks_of_it():
    for style in ("partial", "replicated"):
        assert plan_for(Block(extra=True), 2, RULES | {"middle": style})


def test_an_hf_style_we_do_not_know_is_named():
    model = Packed()
    model.tp_plan = {"gate_up": "sideways"}
    with pytest.raises(TensorParallelError, match="'gate_up' in the unknown style 'sideways'"):
        plan_for(model, 2)
    assert set(STYLE_OF.values()) <= set(STYLES)


def test_tied_modules_must_agree():
    model = make("Llama", tied=True)
    with pytest.raises(TensorParallelError, match="one tied parameter"):
        plan_for(model, 2, {"lm_head": "replicated"})


def test_a_forward_that_is_not_a_linears_is_refused():
    class Odd(nn.Linear):
        def forward(self, x):
            return x @ self.weight.T

    block = Block()
    block.up = Odd(4, 10)
    with pytest.raises(TensorParallelError, match="does not call super"):
        plan_for(block, 2, RULES)


def test_what_stays_whole_says_why():
    reasons = set(plan_for(make("Qwen3"), 2).replicated.values())
    assert reasons == {NO_RULE, "acts on every rank's shards"}  # the layers' norms, and those of queries and keys
    own = {"model.layers.*.mlp.gate_proj": "replicated", "model.layers.*.mlp.up_proj": "replicated"}
    own |= {"model.layers.*.mlp.down_proj": "replicated"}
    plan = plan_for(make("Qwen3"), 2, own)
    assert plan.replicated["model.layers.1.mlp.up_proj.weight"] == "whole by a rule (yours)"


def test_your_rule_may_not_take_a_sum_away_from_what_stays_sharded():
    with pytest.raises(TensorParallelError, match=r"replaces the style partial \(HF plan\)"):
        plan_for(make("Qwen3"), 2, {"**.self_attn.k_norm": "replicated"})
    attention = {f"**.self_attn.{name}": "replicated" for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    assert plan_for(make("Qwen3"), 2, attention | {"**.self_attn.k_norm": "replicated"}).regions


def test_attentions_that_are_given_one_tensor_are_kept_whole_together():
    with torch.device("meta"):
        model = transformers.MPNetForMaskedLM(transformers.MPNetConfig(num_hidden_layers=2))
    with pytest.raises(TensorParallelError, match="replicate all such attentions or none"):
        plan_for(model, 2, {"**.layer.1.attention.attn.*": "replicated"})
    with pytest.raises(TensorParallelError, match="replaces the style partial"):
        plan_for(model, 2, {"**.relative_attention_bias": "replicated"})
    assert plan_for(model, 2, {"**.attention.attn.*": "replicated"}).names("row")


# ---- rules of the user's that are objects ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"role": "query"}, "lacks the key 'style'; choose one of column"),
        ({"style": "column", "rule": "query"}, "the unknown key 'rule'; did you mean 'role'"),
        ({"style": "column", "zzz": 1}, "the unknown key 'zzz'; choose from style, role, blocks"),
        ({"style": 2}, "'style': 2, which must be the name of a style"),
        ({"style": "column", "blocks": 0}, "'blocks': 0, which must be a number of sub-tensors, at least 1"),
        ({"style": "column", "up": True}, "'up': True, which must be a number of dotted parts"),
        ({"style": "column", "local": ["heads"]}, r"'local': \['heads'\], which must be an object .*\(query heads, kv"),
        ({"style": "column", "local": {"heads": "heads"}}, "unknown quantity 'heads'.*choose from query heads"),
        ({"style": "column", "role": "odd"}, "unknown role 'odd'.*choose from query, key"),
        ({"style": "columns"}, "unknown style 'columns'.*or from HF's colwise"),
    ],
)
def test_a_rule_that_is_no_rule_is_refused_in_one_sentence(rule, message):
    with pytest.raises(TensorParallelError, match=message) as refused:
        plan_for(Block(), 2, {"up": rule, "down": "row"})
    assert "up" in str(refused.value)


def test_an_object_says_what_a_style_cannot():
    plan = plan_for(Packed(), 2, {"gate_up": {"style": "colwise", "blocks": 2}, "down": "rowwise"})
    assert plan.placements["gate_up"].layouts == plan_for(Packed(), 2).placements["gate_up"].layouts


@pytest.mark.parametrize("family", [False, True])
@pytest.mark.parametrize(
    "name", ["Llama", "Qwen3", "Mixtral", "gpt2", "falcon new", "codegen", "olmo2", "t5", "whisper"]
)
def test_the_rules_that_count_written_down_give_the_same_plan(name, family):
    model = zoo.build(name) if name in zoo.ZOO else make(name)
    modules = dict(model.named_modules())
    rules = skeleton(modules, matched_rules(model, modules)[1], family=family)
    wanted = plan_for(model, 2)
    if family:
        kind, known = model.config.model_type, dict(_FAMILIES)
        exec(as_python(rules, kind), {})
        try:
            found = plan_for(model, 2)
        finally:
            _FAMILIES.clear()
            _FAMILIES.update(known)
    else:
        found = plan_for(model, 2, json.loads(as_json(rules))["tp_plugin"]["plan"])
    assert {n: (one.style, one.layouts, one.outputs) for n, one in found.placements.items()} == {
        n: (one.style, one.layouts, one.outputs) for n, one in wanted.placements.items()
    }
    assert sorted(map(str, found.regions)) == sorted(map(str, wanted.regions))


def test_a_skeleton_names_every_linear_layer_that_no_rule_matches():
    modules = dict(Block().named_modules())
    assert skeleton(modules, {}) == {"up": "replicated", "down": "replicated"}
