"""Small models of many families: their sizes and switches are drawn, their weights follow from a seed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import torch
import transformers

from tests.fuzz.sizes import (
    Sizes,
    bart,
    bert,
    bert_causal,
    bloom,
    cohere,
    divided,
    falcon,
    gemma,
    gpt2,
    gptj,
    granite,
    half_rotary,
    llama,
    mixture,
    modernbert,
    mpt,
    narrow,
    narrow_windowed,
    neox,
    opt,
    sizes,
    t5,
    windowed,
)
from tests.support.models import perturb

CAUSAL, MASKED, SEQ2SEQ, CLASSES = "causal", "masked", "seq2seq", "classes"
ACTIVATIONS = ("silu", "gelu", "relu", "gelu_pytorch_tanh")


@dataclasses.dataclass(frozen=True)
class Family:
    """How a model is drawn.

    Attributes:
        options: its sizes, and what else has more than two values.
        flags: switches, each drawn by itself.
        activation: the name of the option, None to leave it.
        weight: how often it is drawn, beside the others.
        plain_head: whether the head is a linear layer over ``hidden_states[-1]``, logits not scaled after it, so that
            a loss of the hidden states and the head's weight may be written by hand.
    """

    model: str
    config: str
    options: Callable[[Sizes, random.Random], dict[str, Any]]
    flags: tuple[str, ...] = ()
    activation: str | None = None
    kind: str = CAUSAL
    weight: int = 1
    plain_head: bool = False


def causal(name: str, options: Callable = narrow, *flags: str, **more: Any) -> Family:
    config = more.pop("config", f"{name}Config")
    return Family(f"{name}ForCausalLM", config, options, flags, **more)


TIED, ACT = "tie_word_embeddings", "hidden_act"
PLAIN: dict[str, Any] = {"activation": ACT, "plain_head": True}
FAMILIES: dict[str, Family] = {
    "llama": causal("Llama", llama, TIED, "attention_bias", "mlp_bias", weight=6, **PLAIN),
    "mistral": causal("Mistral", windowed, TIED, weight=2, **PLAIN),
    "qwen2": causal("Qwen2", narrow, TIED, weight=4, **PLAIN),
    "qwen3": causal("Qwen3", llama, TIED, "attention_bias", weight=4, **PLAIN),
    "gemma": causal("Gemma", llama, TIED, plain_head=True),
    "gemma2": causal("Gemma2", gemma, TIED, "attention_bias", weight=2),
    "gemma3": causal("Gemma3", gemma, TIED, config="Gemma3TextConfig", weight=2),
    "granite": causal("Granite", granite, TIED, "attention_bias", "mlp_bias", weight=2),
    "phi": causal("Phi", half_rotary, "qk_layernorm", plain_head=True),
    "phi3": causal("Phi3", narrow_windowed, TIED, weight=2, **PLAIN),
    "olmo": causal("Olmo", narrow, TIED, "attention_bias", **PLAIN),
    "olmo2": causal("Olmo2", narrow, TIED, weight=2, **PLAIN),
    "cohere": causal("Cohere", cohere, TIED, "use_qk_norm", "attention_bias"),
    "cohere2": causal("Cohere2", cohere, TIED, "attention_bias"),
    "stablelm": causal("StableLm", half_rotary, TIED, "use_qkv_bias", "qk_layernorm", "use_parallel_residual"),
    "starcoder2": causal("Starcoder2", narrow_windowed, TIED, "use_bias", plain_head=True),
    "smollm3": causal("SmolLM3", narrow, TIED, "attention_bias", "mlp_bias", **PLAIN),
    "helium": causal("Helium", divided, TIED, "mlp_bias", **PLAIN),
    "glm": causal("Glm", llama, TIED, "attention_bias", plain_head=True),
    "glm4": causal("Glm4", llama, TIED, "attention_bias", plain_head=True),
    "exaone4": causal("Exaone4", narrow, TIED, **PLAIN),
    "nemotron": causal("Nemotron", llama, TIED, "attention_bias", "mlp_bias"),
    "arcee": causal("Arcee", llama, TIED, "attention_bias", "mlp_bias"),
    "seed_oss": causal("SeedOss", llama, TIED, "attention_bias", "attention_out_bias", "mlp_bias"),
    "ernie4_5": causal("Ernie4_5", llama, TIED, "use_bias"),
    "apertus": causal("Apertus", narrow, TIED, "attention_bias"),
    "hunyuan": causal("HunYuanDenseV1", llama, TIED, "attention_bias", "mlp_bias"),
    "gpt2": Family("GPT2LMHeadModel", "GPT2Config", gpt2, (TIED, "scale_attn_by_inverse_layer_idx"), weight=4),
    "gptj": causal("GPTJ", gptj),
    "gpt_neox": causal("GPTNeoX", neox, TIED, "use_parallel_residual", "attention_bias", weight=2),
    "persimmon": causal("Persimmon", neox, TIED, "qk_layernorm"),
    "opt": causal("OPT", opt, TIED, "do_layer_norm_before", "enable_bias", weight=2),
    "bloom": causal("Bloom", bloom, TIED, "apply_residual_connection_post_layernorm", weight=2),
    "falcon": causal("Falcon", falcon, TIED, weight=3),
    "mpt": causal("Mpt", mpt, TIED),
    "mixtral": causal("Mixtral", mixture("Mixtral"), TIED, weight=2),
    "qwen2_moe": causal("Qwen2Moe", mixture("Qwen2Moe")),
    "qwen3_moe": causal("Qwen3Moe", mixture("Qwen3Moe"), TIED, "attention_bias", weight=2),
    "olmoe": causal("Olmoe", mixture("Olmoe")),
    "deepseek_v2": causal("DeepseekV2", mixture("DeepseekV2")),
    "deepseek_v3": causal("DeepseekV3", mixture("DeepseekV3"), weight=2),
    "gpt_oss": causal("GptOss", mixture("GptOss")),
    "granitemoe": causal("GraniteMoe", mixture("GraniteMoe")),
    "glm4_moe": causal("Glm4Moe", mixture("Glm4Moe")),
    "bert_causal": Family("BertLMHeadModel", "BertConfig", bert_causal),
    "bert": Family("BertForMaskedLM", "BertConfig", bert, kind=MASKED, weight=2),
    "roberta": Family("RobertaForMaskedLM", "RobertaConfig", bert, kind=MASKED),
    "modernbert": Family("ModernBertForMaskedLM", "ModernBertConfig", modernbert,
                         ("attention_bias", "mlp_bias", "norm_bias", "sparse_prediction"), kind=MASKED),
    "t5": Family("T5ForConditionalGeneration", "T5Config", t5, (TIED,), kind=SEQ2SEQ, weight=2),
    "mt5": Family("MT5ForConditionalGeneration", "MT5Config", t5, kind=SEQ2SEQ),
    "bart": Family("BartForConditionalGeneration", "BartConfig", bart, kind=SEQ2SEQ),
    "llama_classes": Family("LlamaForSequenceClassification", "LlamaConfig", llama, ("attention_bias",), kind=CLASSES),
    "gpt2_classes": Family("GPT2ForSequenceClassification", "GPT2Config", gpt2, kind=CLASSES),
    "bert_classes": Family("BertForSequenceClassification", "BertConfig", bert, kind=CLASSES),
}  # fmt: skip


def options_of(name: str, draw: random.Random, tp: int) -> dict[str, Any]:
    """Keyword arguments of the config of a model of ``name``, as plain data."""
    family, s = FAMILIES[name], sizes(draw, tp)
    found = family.options(s, draw) | {"vocab_size": s.vocab, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    found |= {flag: draw.random() < 0.5 for flag in family.flags}
    if family.activation:
        found[family.activation] = draw.choice(ACTIVATIONS)
    if family.kind == CLASSES:
        found["num_labels"] = 3
    if draw.random() < 0.2 and family.kind != MASKED:
        found["attn_implementation"] = "eager"
    if any("experts" in key for key in found) and draw.random() < 0.5:
        found["experts"] = draw.choice(("eager", "batched_mm"))
    return found


def build(name: str, options: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """The model in float32, no parameter at a value that hides errors."""
    family, options = FAMILIES[name], dict(options)
    experts = options.pop("experts", None)
    torch.manual_seed(seed)
    config = getattr(transformers, family.config)(**options)
    for key, value in config.to_dict().items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)  # two processes draw other masks than one
    model = getattr(transformers, family.model)(config)
    if experts:
        model.set_experts_implementation(experts)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.copy_(torch.linspace(-0.5, 0.5, model.final_logits_bias.numel()).view(1, -1))
    return perturb(model, seed)
