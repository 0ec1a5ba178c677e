"""Layouts of fused experts: what the ranks compute with their shards adds up to what the whole module computes."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

from tests.support.models import make
from tp_plugin.errors import TensorParallelError
from tp_plugin.plans import Rule, plan_for
from tp_plugin.plans.experts import check_implementation, place_experts

RULE = Rule("experts", "experts")
EXPERTS, HIDDEN, TOKENS = 3, 8, 7


def experts_of(kind: str, width: int) -> nn.Module:
    """Fused experts of ``kind`` in fp64, computed by their own forward."""
    if kind == "gpt_oss":
        config = transformers.GptOssConfig(hidden_size=HIDDEN, intermediate_size=width, num_local_experts=EXPERTS)
        module: nn.Module = GptOssExperts(config)
    elif kind == "mixtral":
        config = transformers.MixtralConfig(hidden_size=HIDDEN, intermediate_size=width, num_local_experts=EXPERTS)
        module = MixtralExperts(config)
    else:
        config = transformers.NemotronHConfig(
            hidden_size=HIDDEN, moe_intermediate_size=width, n_routed_experts=EXPERTS, moe_latent_size=None
        )
        module = NemotronHExperts(config)
    config._experts_implementation = "eager"
    torch.manual_seed(width)
    for param in module.parameters():
        nn.init.normal_(param)
    return module.double()


@settings(max_examples=60, deadline=None)
@given(kind=st.sampled_from(["gpt_oss", "mixtral", "nemotron_h"]), width=st.integers(1, 40), tp=st.integers(1, 6))
def test_partial_results_add_up(kind, width, tp):
    module = experts_of(kind, width)
    if width < tp:
        with pytest.raises(TensorParallelError, match=rf"width of {width}, fewer than the {tp} ranks"):
            place_experts("experts", module, RULE, tp)
        return
    layouts = place_experts("experts", module, RULE, tp).layouts
    hidden = torch.randn(TOKENS, HIDDEN, dtype=torch.float64)
    index = torch.randint(0, EXPERTS, (TOKENS, 2))
    weights = torch.rand(TOKENS, 2, dtype=torch.float64)
    total = torch.zeros_like(hidden)
    for rank in range(tp):
        part = copy.deepcopy(module)
        for name, param in part.named_parameters():
            if name in layouts:
                param.data = layouts[name].shard(param.data, rank)
            else:  # a bias of the down projection
                param.data = param.data * (rank == 0)
        total += part(hidden, index, weights)
    torch.testing.assert_close(total, module(hidden, index, weights))


@pytest.mark.parametrize(("width", "tp", "held"), [(32, 4, [8] * 4), (24, 2, [16, 8]), (7, 2, [4, 3])])
def test_grouped_mm_gets_rows_of_whole_16_bytes(width, tp, held):
    layouts = place_experts("experts", experts_of("mixtral", width).float(), RULE, tp, "grouped_mm").layouts
    assert [layouts["down_proj"].local_size(rank) for rank in range(tp)] == held


def test_widths_that_cannot_be_aligned_are_refused():
    with pytest.raises(TensorParallelError, match=r"autotp_size at most 2 or call model\.set_experts_implementation"):
        place_experts("experts", experts_of("mixtral", 8).float(), RULE, 4, "grouped_mm")


def test_experts_with_more_than_we_know_are_refused():
    module = experts_of("mixtral", 8)
    module.scale = nn.Parameter(torch.ones(EXPERTS))
    with pytest.raises(TensorParallelError, match=r"'experts' has \['scale'\], which may act on partial results"):
        place_experts("experts", module, RULE, 2)
    with pytest.raises(TensorParallelError, match="style experts needs gate_up_proj or up_proj"):
        place_experts("experts", nn.Linear(4, 4), RULE, 2)


def test_weights_that_do_not_belong_together_are_refused():
    module = experts_of("mixtral", 8)
    module.down_proj = nn.Parameter(torch.ones(EXPERTS, HIDDEN, 5))
    with pytest.raises(TensorParallelError, match="do not belong together"):
        place_experts("experts", module, RULE, 2)


def test_kernels_of_the_hub_are_refused():
    with_kernels = torch.nn.Module()
    with_kernels.use_kernels = True
    with pytest.raises(TensorParallelError, match="use_kernels=False"):
        check_implementation(with_kernels)


def test_a_mixture_and_its_shared_experts_are_one():
    plan = plan_for(make("DeepseekV3"), 2)
    (mixture,) = plan.mixtures
    assert mixture.block == "model.layers.1.mlp"
    assert mixture.shared == ("model.layers.1.mlp.shared_experts",)
    assert mixture.summed
    assert [region.block for region in plan.regions] == [
        "model.layers.0.self_attn", "model.layers.0.mlp", "model.layers.1.self_attn",
    ]  # fmt: skip


def test_shared_experts_leave_by_themselves_where_the_block_does_more_than_add():
    (mixture,) = plan_for(make("AXK1"), 2).mixtures
    assert mixture.shared
    assert not mixture.summed


def test_shared_experts_with_dropout_keep_a_region_of_their_own():
    model = make("DeepseekV3")
    model.model.layers[1].mlp.shared_experts.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    plan = plan_for(model, 2)
    assert plan.mixtures[0].shared == ()
    assert "model.layers.1.mlp.shared_experts" in [region.block for region in plan.regions]


def test_a_gate_is_a_door_only_where_it_scales_a_partial_result():
    plan = plan_for(make("Qwen2Moe"), 2)
    assert plan.names("enter") == [f"model.layers.{layer}.mlp.shared_expert_gate" for layer in (0, 1)]
    model = make("Qwen2Moe")
    model.model.layers[1].mlp.shared_expert.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.5))
    assert plan_for(model, 2).names("enter") == ["model.layers.0.mlp.shared_expert_gate"]


def test_a_block_with_a_whole_shared_expert_does_not_sum():
    own = {f"model.layers.*.mlp.shared_experts.{name}_proj": "replicated" for name in ("gate", "up", "down")}
    (mixture,) = plan_for(make("DeepseekV3"), 2, own).mixtures
    assert not mixture.shared
    assert not mixture.summed
    model = make("DeepseekV3")
    model.model.layers[1].mlp.shared_too = nn.Linear(4, 4)
    (mixture,) = plan_for(model, 2).mixtures
    assert mixture.shared
    assert not mixture.summed


def test_doors_are_left_out_where_you_keep_what_is_behind_them_whole():
    assert len(plan_for(make("DeepseekV3"), 2).names("latent")) == 2
    names = ("q_b_proj", "kv_b_proj", "o_proj")
    own = {f"model.layers.*.self_attn.{name}": "replicated" for name in names}
    assert plan_for(make("DeepseekV3"), 2, own).names("latent") == []
    whole = {f"model.layers.*.self_attn.{name}_proj": "replicated" for name in "qkvo"}
    assert len(plan_for(make("Qwen3Moe"), 2).names("partial")) == 4
    assert plan_for(make("Qwen3Moe"), 2, whole).names("partial") == []
    assert len(plan_for(make("LongcatFlash"), 2).names("first")) == 1
    assert plan_for(make("LongcatFlash"), 2, {"model.layers.*.mlp.experts": "replicated"}).names("first") == []
