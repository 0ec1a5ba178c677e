"""What PEFT has and a sharded model refuses, on every rank, in a sentence that says what to use."""

from __future__ import annotations

import dataclasses

import peft
import pytest
import torch
from peft import LoraConfig
from torch import nn

from tests.support.adapters import DATA, adapt, lora, shard
from tests.support.batched_cases import launched, sentence
from tests.support.configs import config_for
from tests.support.models import make
from tests.support.moved import pretended
from tests.support.train import engine_for, optimizer_for
from tp_plugin.integrations.peft import inject
from tp_plugin.integrations.peft.support_matrix import TYPES, unsupported_config

HERE = "tests.integrations.peft.test_refused"


def refuse_dora() -> None:
    shard(peft.get_peft_model(make("Llama", heads=(6, 3)), lora(target_modules=["k_proj"], use_dora=True)))


def refuse_dora_zero_3() -> None:
    model = peft.get_peft_model(make("Llama"), lora(use_dora=True))
    engine = engine_for(model, optimizer_for(model, "adamw"), config_for(2, 3) | {"tp_plugin": {"guard": False}})
    engine(**DATA)


def refuse_variant() -> None:
    shard(peft.get_peft_model(make("Llama"), lora(alora_invocation_tokens=[1, 2])))


def refuse_dora_late() -> None:
    peft.get_peft_model(shard(make("Llama")), lora(use_dora=True))


def refuse_loha() -> None:
    shard(peft.get_peft_model(make("Llama"), peft.LoHaConfig(target_modules=["q_proj"])))


def refuse_loha_late() -> None:
    peft.get_peft_model(shard(make("Llama")), peft.LoHaConfig(target_modules=["q_proj"]))


def refuse_prefix() -> None:
    config = peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    shard(peft.get_peft_model(make("Llama"), config))


def refuse_prefix_late() -> None:
    config = peft.PrefixTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    peft.get_peft_model(shard(make("Llama")), config)


def refuse_tokens() -> None:
    shard(peft.get_peft_model(make("Llama"), lora(trainable_token_indices=[1, 2])))


def refuse_block() -> None:
    shard(peft.get_peft_model(make("Llama"), lora(modules_to_save=["mlp"])))


def refuse_block_late() -> None:
    peft.get_peft_model(shard(make("Llama")), lora(modules_to_save=["mlp"]))


def refuse_pissa_late() -> None:
    peft.get_peft_model(shard(make("Llama")), lora(init_lora_weights="pissa"))


def refuse_to_convert_pissa() -> None:
    trained = shard(adapt(make("Llama"), "PiSSA"))
    trained.save_pretrained("/nowhere", path_initial_model_for_weight_conversion="/nowhere")


def refuse_empty_late() -> None:
    peft.get_peft_model(shard(make("Llama")), lora(), low_cpu_mem_usage=True)


def refuse_tied_adapters() -> None:
    config = lora(target_modules=["embed_tokens"], ensure_weight_tying=True)
    shard(peft.get_peft_model(make("Qwen3", tied=True), config))


def refuse_tied_adapters_late() -> None:
    config = lora(target_modules=["embed_tokens"], ensure_weight_tying=True)
    peft.get_peft_model(shard(make("Qwen3", tied=True)), config)


def refuse_inside() -> None:
    shard(torch.nn.Sequential(peft.get_peft_model(make("Llama"), lora())))


def refuse_head_bias() -> None:
    shard(peft.get_peft_model(make("Llama"), lora(target_modules=["lm_head"], lora_bias=True)))


def refuse_after_zero_3() -> None:
    model = make("Llama")
    engine = engine_for(model, optimizer_for(model, "adamw"), config_for(2, 3))
    peft.get_peft_model(engine.module, lora())


def refuse_expert_bias() -> None:
    config = lora(target_parameters=["mlp.experts.down_proj_bias"])
    shard(peft.get_peft_model(make("GptOss"), config))


def refuse_singular_values() -> None:
    ours = shard(adapt(make("Llama"), "several"))
    ours.add_weighted_adapter(["default", "second"], [0.7, 0.4], "both")


def refuse_shared_scales() -> None:
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    shard(peft.get_peft_model(make("Llama", heads=(6, 3)), config))


SAYS = {
    "refuse_dora": "uses more than once",
    "refuse_dora_late": "put it in before sharding",
    "refuse_dora_zero_3": "use ZeRO 2 or less",
    "refuse_variant": "alora_invocation_tokens",
    "refuse_loha": "PEFT type LOHA",
    "refuse_loha_late": "PEFT type LOHA",
    "refuse_prefix": "PEFT type PREFIX_TUNING",
    "refuse_prefix_late": "PEFT type PREFIX_TUNING",
    "refuse_tokens": "modules_to_save instead",
    "refuse_block": "sharded inside",
    "refuse_block_late": "sharded inside",
    "refuse_pissa_late": "before sharding",
    "refuse_to_convert_pissa": "convert the adapter after it is saved",
    "refuse_empty_late": "low_cpu_mem_usage",
    "refuse_tied_adapters": "train the embedding by modules_to_save, which is tied",
    "refuse_tied_adapters_late": "train the embedding by modules_to_save, which is tied",
    "refuse_inside": "give tp_plugin the PeftModel itself",
    "refuse_head_bias": "set lora_bias=False",
    "refuse_after_zero_3": "before deepspeed.initialize",
    "refuse_expert_bias": "leave it out of target_parameters",
    "refuse_singular_values": "combination_type='svd'",
    "refuse_shared_scales": "key/value heads that ranks share",
}


@pytest.mark.parametrize("name", SAYS)
def test_an_unsupported_adapter_is_refused_on_every_rank(name):
    assert SAYS[name] in sentence(launched(2, HERE, tuple(SAYS)), name)


@pytest.mark.parametrize("kind", [kind for kind in peft.PeftType if kind not in TYPES])
def test_types_that_nobody_tried_are_refused(kind):
    config = dataclasses.replace(peft.PeftConfig(), peft_type=kind)
    assert f"PEFT type {kind.value}" in (unsupported_config("default", config) or "")


def test_experts_are_adapted_late_from_peft_0_21_on():
    model, config = nn.Linear(2, 2), LoraConfig(target_parameters=["experts.down_proj"])
    assert inject._obstacle(model, "one", config) is None
    with pretended("peft", "0.20.0"):
        said = inject._obstacle(model, "one", config)
        assert inject._obstacle(model, "one", LoraConfig(target_modules="all-linear")) is None
    assert said.startswith(
        "LoRA on experts of peft 0.20.0 is made as small as the shards of this model; put it in before"
    )
