"""Tiny models of the dense families, of every kind of head; sizes that no tp divides where the family allows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from tests.support.models import batch, perturb

V = 131
ATTENTION = {"num_attention_heads": 4, "hidden_size": 32}
LLAMA = ATTENTION | {"num_key_value_heads": 2, "num_hidden_layers": 2, "intermediate_size": 53}
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
GPT2_QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
BLOOM = {"hidden_size": 32, "n_head": 4, "n_layer": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0}
FALCON = ATTENTION | {"num_hidden_layers": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0, "ffn_hidden_size": 54}
BERT = ATTENTION | {
    "num_hidden_layers": 2,
    "intermediate_size": 53,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "max_position_embeddings": 64,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 53,
    "num_layers": 2,
    "num_heads": 4,
    "dropout_rate": 0.0,
    "decoder_start_token_id": 0,
}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 53,
    "decoder_ffn_dim": 53,
    "dropout": 0.0,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
}
WHISPER = {key: value for key, value in BART.items() if key != "max_position_embeddings"} | {
    "num_mel_bins": 4,
    "max_source_positions": 8,
    "max_target_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

CAUSAL, MASKED, SEQ2SEQ, SPEECH, CLASSES = "causal", "masked", "seq2seq", "speech", "classes"

NEOX = ATTENTION | {"num_hidden_layers": 2, "intermediate_size": 53}
OPT = ATTENTION | {"num_hidden_layers": 2, "ffn_dim": 53, "max_position_embeddings": 64, "dropout": 0.0}
MODERNBERT = NEOX | {"local_attention": 8, "global_attn_every_n_layers": 2}

# name -> (model class, config class, options, kind)
ZOO: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "phi3": ("Phi3ForCausalLM", "Phi3Config", LLAMA, CAUSAL),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2 | GPT2_QUIET, CAUSAL),
    "gpt2 classes": ("GPT2ForSequenceClassification", "GPT2Config", GPT2 | GPT2_QUIET, CLASSES),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", NEOX, CAUSAL),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", GPT2 | GPT2_QUIET | {"rotary_dim": 4}, CAUSAL),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {
            "hidden_size": 32,
            "num_heads": 4,
            "num_layers": 2,
            "attention_types": [[["global", "local"], 1]],
            "intermediate_size": 53,
            "max_position_embeddings": 64,
            "window_size": 4,
            "resid_dropout": 0.0,
            "embed_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        CAUSAL,
    ),
    "opt": ("OPTForCausalLM", "OPTConfig", OPT | {"word_embed_proj_dim": 32}, CAUSAL),
    "bloom": ("BloomForCausalLM", "BloomConfig", BLOOM, CAUSAL),
    "falcon 7b": ("FalconForCausalLM", "FalconConfig", FALCON | {"multi_query": True}, CAUSAL),
    "falcon new": (
        "FalconForCausalLM",
        "FalconConfig",
        FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
        CAUSAL,
    ),
    "falcon rw": (
        "FalconForCausalLM",
        "FalconConfig",
        FALCON | {"multi_query": False, "alibi": True, "parallel_attn": False, "bias": True},
        CAUSAL,
    ),
    "mpt": ("MptForCausalLM", "MptConfig", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}, CAUSAL),
    "codegen": ("CodeGenForCausalLM", "CodeGenConfig", GPT2 | GPT2_QUIET | {"n_head": 8, "rotary_dim": 4}, CAUSAL),
    "olmo2": ("Olmo2ForCausalLM", "Olmo2Config", LLAMA, CAUSAL),
    "stablelm": ("StableLmForCausalLM", "StableLmConfig", LLAMA | {"use_qkv_bias": True}, CAUSAL),
    "starcoder2": ("Starcoder2ForCausalLM", "Starcoder2Config", LLAMA | {"residual_dropout": 0.0}, CAUSAL),
    "cohere": ("CohereForCausalLM", "CohereConfig", LLAMA | {"logit_scale": 3.0}, CAUSAL),
    "cohere qk": ("CohereForCausalLM", "CohereConfig", LLAMA | {"logit_scale": 3.0, "use_qk_norm": True}, CAUSAL),
    "bert": ("BertForMaskedLM", "BertConfig", BERT, MASKED),
    "bert causal": ("BertLMHeadModel", "BertConfig", BERT | {"is_decoder": True}, CAUSAL),
    "bert classes": ("BertForSequenceClassification", "BertConfig", BERT, CLASSES),
    "roberta": ("RobertaForMaskedLM", "RobertaConfig", BERT, MASKED),
    "modernbert": ("ModernBertForMaskedLM", "ModernBertConfig", MODERNBERT, MASKED),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5, SEQ2SEQ),
    "t5 gated": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        SEQ2SEQ,
    ),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART, SEQ2SEQ),
    "bart classes": ("BartForSequenceClassification", "BartConfig", BART | {"eos_token_id": 2}, CLASSES),
    "mt5": ("MT5ForConditionalGeneration", "MT5Config", T5 | {"feed_forward_proj": "gated-gelu"}, SEQ2SEQ),
    "umt5": ("UMT5ForConditionalGeneration", "UMT5Config", T5, SEQ2SEQ),
    "longt5": ("LongT5ForConditionalGeneration", "LongT5Config", T5 | {"local_radius": 4}, SEQ2SEQ),
    "longt5 global": (
        "LongT5ForConditionalGeneration",
        "LongT5Config",
        T5 | {"local_radius": 4, "encoder_attention_type": "transient-global", "global_block_size": 4},
        SEQ2SEQ,
    ),
    "apertus": ("ApertusForCausalLM", "ApertusConfig", LLAMA, CAUSAL),
    "gemma3n": (
        "Gemma3nForCausalLM",
        "Gemma3nTextConfig",
        LLAMA
        | {
            "num_attention_heads": 8,
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "head_dim": 8,
            "sliding_window": 8,
            "vocab_size_per_layer_input": V,
            "hidden_size_per_layer_input": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
            "intermediate_size": [53] * 4,
            "laurel_rank": 4,
        },
        CAUSAL,
    ),
    "gpt_neox_japanese": (
        "GPTNeoXJapaneseForCausalLM",
        "GPTNeoXJapaneseConfig",
        ATTENTION | {"num_hidden_layers": 2, "hidden_dropout": 0.0, "attention_dropout": 0.0},
        CAUSAL,
    ),
    "persimmon": ("PersimmonForCausalLM", "PersimmonConfig", NEOX, CAUSAL),
    "mpnet": ("MPNetForMaskedLM", "MPNetConfig", BERT, MASKED),
    "bert to gpt2": ("EncoderDecoderModel", "EncoderDecoderConfig", {}, SEQ2SEQ),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER, SPEECH),
}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "vocab_size": V}


def build(name: str, seed: int = 0, **options: Any) -> torch.nn.Module:
    """The model ``name`` in fp32, no parameter at a value that hides bugs."""
    model_class, config_class, sizes, kind = ZOO[name]
    labels = {"num_labels": 3} if kind == CLASSES else {}
    torch.manual_seed(seed)
    if config_class == "EncoderDecoderConfig":
        parts = hf.BertConfig(**SPECIAL | BERT), hf.GPT2Config(**SPECIAL | GPT2 | GPT2_QUIET, add_cross_attention=True)
        config = hf.EncoderDecoderConfig.from_encoder_decoder_configs(*parts)
        config.decoder_start_token_id, config.pad_token_id = 1, 0
    else:
        config = getattr(hf, config_class)(**SPECIAL | sizes | labels | options)
    model = getattr(hf, model_class)(config)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias.copy_(torch.linspace(-0.5, 0.5, V))
    return perturb(model, seed)


def data_for(name: str) -> Callable[[int, int], dict[str, torch.Tensor]]:
    """Global batch (step, rows) of the model ``name``."""
    kind = ZOO[name][3]

    def make_batch(step: int, rows: int) -> dict[str, torch.Tensor]:
        data = padded(batch(step, rows)) if step % 2 and kind != SPEECH else batch(step, rows)
        random = torch.Generator().manual_seed(500 + step)
        if kind == CLASSES:
            ids = data["input_ids"].clamp_min(3)
            ids[:, -1] = 2  # BART reads the state of the last end token
            return {"input_ids": ids, "labels": torch.randint(0, 3, (rows,), generator=random)}
        if kind == SEQ2SEQ:
            data |= {"input_ids": torch.randint(1, V, (rows, 9), generator=random)}
            return data | ({"attention_mask": data["attention_mask"][:, -9:]} if "attention_mask" in data else {})
        if kind == SPEECH:
            return {"labels": data["labels"], "input_features": torch.randn(rows, 4, 16, generator=random)}
        return data

    return make_batch


def padded(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same with two tokens of padding in every other row, and a mask."""
    mask = torch.ones_like(data["input_ids"])
    mask[::2, -2:] = 0
    return data | {"labels": data["labels"].masked_fill(mask == 0, -100), "attention_mask": mask}


def counts_items(name: str) -> bool:
    """Whether the model's loss takes ``num_items_in_batch``."""
    return ZOO[name][3] == CAUSAL
