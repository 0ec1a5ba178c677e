"""What the rules of families carry, and what is refused of them before a weight is touched."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from torch import nn

from tests.support import zoo
from tp_plugin.errors import TensorParallelError
from tp_plugin.plans import Packing, Rule, plan_for, register_family, register_packing
from tp_plugin.plans.heads import PACKINGS, deal_heads, local_heads, local_packed
from tp_plugin.plans.registry import _FAMILIES


def refused(model: nn.Module, tp: int, rules: dict[str, str] | None = None) -> str:
    """The one sentence with which a plan is refused; nothing of the model has changed."""
    before = {name: (param.data_ptr(), tuple(param.shape)) for name, param in model.named_parameters()}
    classes = [type(module) for module in model.modules()]
    with pytest.raises(TensorParallelError) as raised:
        plan_for(model, tp, rules)
    assert before == {name: (param.data_ptr(), tuple(param.shape)) for name, param in model.named_parameters()}
    assert classes == [type(module) for module in model.modules()]
    message = str(raised.value)
    assert "\n" not in message
    assert ". " not in message.rstrip(".")
    return message


# ---- heads that tp does not divide -------------------------------------------------------------------------------

TOO_MANY = {
    "phi3": ("model.layers.0.self_attn", "4 query and 2 key/value heads", "[1, 2, 4]"),
    "gpt2": ("transformer.h.0.attn", "4 query and 4", "[1, 2, 3, 4]"),
    "bloom": ("transformer.h.0.self_attention", "4 query and 4", "[1, 2, 3, 4]"),
    "falcon 7b": ("transformer.h.0.self_attention", "4 query and 1", "[1, 2, 4]"),
    "codegen": ("transformer.h.0.attn", "8 query and 8", "[1, 2]"),
    "bert": ("bert.encoder.layer.0.attention", "4 query and 4", "[1, 2, 3, 4]"),
    "t5": ("encoder.block.0.layer.0.SelfAttention", "4 query and 4", "[1, 2, 3, 4]"),
    "bart": ("model.encoder.layers.0.self_attn", "4 query and 4", "[1, 2, 3, 4]"),
    "olmo2": ("model.layers.0.self_attn", "4 query and 2", "[1, 2, 4]"),
}


@pytest.mark.parametrize("name", TOO_MANY)
def test_heads_that_cannot_be_dealt_are_named_with_the_degrees_that_work(name):
    module, heads, degrees = TOO_MANY[name]
    message = refused(zoo.build(name), 5)
    assert module in message
    assert heads in message
    assert f"autotp_size from {degrees}" in message
    for works in map(int, degrees.strip("[]").split(", ")):
        assert plan_for(zoo.build(name), works) is not None


def test_codegen_needs_four_heads_on_every_rank():
    assert "autotp_size from [1, 2]" in refused(zoo.build("codegen"), 4)


def test_a_norm_for_each_key_head_cannot_follow_heads_used_twice():
    sizes = {"num_attention_heads": 6, "hidden_size": 48, "num_key_value_heads": 3}
    message = refused(zoo.build("cohere qk", **sizes), 2)
    assert "self_attn.k_norm.weight" in message
    assert "autotp_size from [1, 3]" in message
    assert plan_for(zoo.build("cohere qk", **sizes), 3)


def test_an_mlp_narrower_than_the_ranks_is_named():
    message = refused(zoo.build("gpt2", n_inner=3), 4)
    assert "'transformer.h.0.mlp.c_proj' has 3 features" in message
    assert "at most 3" in message


def test_bloom_that_slices_weights_by_hand_is_refused():
    assert "slow_but_exact: false" in refused(zoo.build("bloom", pretraining_tp=2, slow_but_exact=True), 2)


# ---- what the forward reads --------------------------------------------------------------------------------------


def test_an_attribute_that_moved_upstream_is_named():
    model = zoo.build("gpt2")
    del model.transformer.h[1].attn.split_size
    message = refused(model, 2)
    assert "'transformer.h.1.attn'" in message
    assert "query width (32) from 'split_size', which is None" in message


def test_an_attribute_that_counts_something_else_now_is_named():
    model = zoo.build("t5")
    model.encoder.block[0].layer[0].SelfAttention.n_heads = 3
    assert "query heads (4) from 'n_heads', which is 3" in refused(model, 2)


def test_a_rule_that_hits_nothing_in_its_family_is_named():
    model = zoo.build("bert")
    for layer in model.bert.encoder.layer:
        layer.attention.output.project = layer.attention.output.__dict__["_modules"].pop("dense")
    assert "'**.attention.output.dense': row hits no module" in refused(model, 2)


class Attention(nn.Module):
    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        self.head_dim, self.num_heads = 4, 2
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(8, 8) for _ in range(4))
        self.gate = nn.Linear(8, 8)
        self.sinks = nn.Parameter(torch.zeros(2))
        if norm:
            self.norm = nn.LayerNorm(8)


class Model(nn.Module):
    def __init__(self, **options: bool) -> None:
        super().__init__()
        self.attn = Attention(**options)
        self.config = type("Config", (), {"model_type": "test_of_rules"})()


ROWS = [Rule("attn.wo", "row"), *(Rule(f"attn.w{x}", "column") for x in "qkv"), Rule("attn.gate", "column")]


def planned(rules: list[Rule], tp: int = 2, model: nn.Module | None = None):
    register_family("test_of_rules")(lambda _model: rules)
    try:
        return plan_for(model or Model(), tp)
    finally:
        del _FAMILIES["test_of_rules"]


def test_a_gate_and_a_parameter_follow_the_heads_and_known_counts_become_local():
    plan = planned([*ROWS, Rule("attn.sinks", "per_head", role="query")])
    assert plan.placements["attn.gate"].layouts["weight"].parts == (((0, 4),), ((4, 8),))
    assert plan.placements["attn"].layouts["sinks"].parts == (((0, 1),), ((1, 2),))
    assert [(one.attribute, one.values) for one in plan.regions[0].locals] == [("num_heads", (1, 1))]


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (ROWS, "parameter 'attn.sinks' is inside the sharded block 'attn'"),
        ([*ROWS, Rule("attn.sinks", "per_head", role="key", dim=0), Rule("attn.q", "row")], "'attn.q': row hits no"),
        ([*ROWS, Rule("attn.wo.bias", "per_head", role="odd")], "unknown role 'odd'"),
        ([*ROWS[:-1], Rule("attn.gate", "column", local=(("num_heads", "heads"),))], "unknown quantity 'heads'"),
        ([Rule("attn.sinks", "per_head"), *ROWS[1:]], "exactly one row"),
        ([Rule("attn.wo", "row"), Rule("attn.gate", "column"), Rule("attn.sinks", "per_head")], "no query and key"),
    ],
)
def test_rules_that_say_something_impossible_are_refused(rules, message):
    with pytest.raises(TensorParallelError, match=message):
        planned(rules)


def test_a_wide_norm_must_be_an_rms_norm():
    model = Model(norm=True)
    rules = [*ROWS, Rule("attn.sinks", "per_head"), Rule("attn.norm", "wide_norm", role="query")]
    with pytest.raises(TensorParallelError, match=r"'attn.norm' is a LayerNorm with parameters \['weight', 'bias'\]"):
        planned(rules, model=model)


def test_a_family_inside_another_model_brings_its_rules():
    inner = zoo.build("gpt2")

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.reader, self.bridge = inner, nn.Linear(4, 32)

    plan = plan_for(Outer(), 2)
    assert plan.placements["reader.transformer.h.0.attn.c_attn"].layouts["weight"].dim == 1
    assert "bridge.weight" in plan.replicated


# ---- packing -----------------------------------------------------------------------------------------------------


HEADS = ((8, 8, 2), (8, 2, 4), (12, 3, 2), (6, 3, 2), (16, 16, 4), (5, 5, 2))
CODEGEN_HEADS = ((8, 8, 2), (16, 16, 4), (32, 32, 2))  # as many key as query heads, in fours on every rank


@pytest.mark.parametrize(
    ("role", "queries", "kvs", "tp"),
    [(role, *heads) for role in PACKINGS for heads in (CODEGEN_HEADS if role.startswith("4x") else HEADS)],
)
def test_a_rank_finds_its_heads_where_its_forward_looks(role, queries, kvs, tp):
    packing = PACKINGS[role]
    dealt = deal_heads(queries, kvs, tp, fits=packing.fits)
    full = packing.heads(queries, kvs)
    held, outputs = local_packed(dealt, queries, kvs, packing)
    assert {place for own in held for place in own} == set(range(len(full))), "a head is on no rank"
    for rank, own in enumerate(held):
        assert len(own) == len(set(own)), "a rank stores a head twice"
        shard = [full[place] for place in own]
        output = shard if outputs is None else [shard[i] for i in outputs[rank]]
        assert output == local_heads(dealt, rank, packing)
        local = packing.heads(len(dealt.queries[rank]), sum(dealt.repeats[rank]))
        assert [kind for kind, _ in output] == [kind for kind, _ in local]
        # attention pairs the i-th local query with local key i // ratio: they must belong together globally
        numbers = {pair: head for pair, (_, head) in zip(local, output, strict=True)}
        for kind, i in local:
            if kind == "q" and ("k", i // dealt.ratio) in numbers:
                assert numbers["k", i // dealt.ratio] == numbers["q", i] // (queries // kvs)


def test_a_head_that_is_multiplied_with_by_hand_stays_whole():
    config = transformers.MobileBertConfig(num_hidden_layers=1)
    with torch.device("meta"):
        model = transformers.MobileBertForMaskedLM(config)
    plan = plan_for(model, 2)
    whole = "mobilebert.embeddings.word_embeddings.weight"
    assert plan.replicated[whole] == "whole by a rule (family)"
    assert not plan.names("vocab_embedding", "vocab_head")
    assert len(plan.names("row")) == 2 + config.num_feedforward_networks - 1


@pytest.mark.parametrize(
    ("role", "packing", "message"),
    [
        ("q|k|v", Packing(lambda q, kv: [("q", n) for n in range(q)]), "'q|k|v' is a packing already"),
        ("", Packing(lambda q, kv: [("q", n) for n in range(q)]), "register_packing needs a name"),
        ("twice", Packing(lambda q, kv: [("q", 0)] * q), "not each of 2 once; correct its 'order'"),
        ("never", Packing(lambda q, kv: [], fits=lambda q: False), "fits some number of query heads"),
        ("none", "q|k|v", "needs a name and a tp_plugin.Packing"),
    ],
)
def test_a_packing_that_cannot_be_used_is_refused(role, packing, message):
    with pytest.raises(TensorParallelError, match=re.escape(message)):
        register_packing(role, packing)
    assert role not in PACKINGS or PACKINGS[role] != packing
