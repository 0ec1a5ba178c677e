"""Small models of each family, with no weight left at a value that hides bugs (zero biases, unit norms)."""

from __future__ import annotations

import torch
import transformers

from tests.support import moe

FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Granite")


def make(family: str, *, heads: tuple[int, int] = (4, 2), tied: bool | None = None, seed: int = 0, **options):
    """A two-layer ``{family}ForCausalLM`` in fp32; sizes that no tp divides unless ``options`` say otherwise.

    ``heads``: query and KV heads, of 8 dimensions each. ``experts``: how a mixture's experts are computed.
    """
    sizes = {
        "vocab_size": 131,
        "hidden_size": 8 * heads[0],
        "intermediate_size": 53,
        "num_hidden_layers": 2,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": 8,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    if family in ("Llama", "Granite"):
        sizes |= {"attention_bias": True, "mlp_bias": True}
    if family == "Granite":
        sizes |= {"logits_scaling": 3.0, "embedding_multiplier": 2.0, "attention_multiplier": 0.3}
    if family in ("Gemma2", "Gemma3"):
        sizes |= {"sliding_window": 8, "query_pre_attn_scalar": 8}
    if family in moe.SIZES | moe.MORE:
        sizes = moe.config_of(family, sizes)
    if tied is not None:
        sizes["tie_word_embeddings"] = tied
    config_class = getattr(
        transformers, moe.CONFIGS.get(family, "Gemma3TextConfig" if family == "Gemma3" else f"{family}Config")
    )
    torch.manual_seed(seed)
    implementation = options.pop("experts", None)
    model = getattr(transformers, f"{family}ForCausalLM")(config_class(**sizes | options))
    if implementation:
        model.set_experts_implementation(implementation)
    return perturb(model, seed)


def perturb(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Move every parameter by a little noise that is reproducible by name."""
    with torch.no_grad():
        for index, param in enumerate(model.parameters()):
            noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(1000 * seed + index))
            param.add_(0.05 * noise)
    return model


def batch(step: int, rows: int, *, length: int = 12, vocabulary: int = 131) -> dict[str, torch.Tensor]:
    """Global batch number ``step``: ids, and labels of which an uneven share is ignored."""
    random = torch.Generator().manual_seed(100 + step)
    ids = torch.randint(1, vocabulary, (rows, length), generator=random)
    labels = ids.clone()
    for row in range(rows):
        labels[row, : 1 + (row * 3 + step) % 5] = -100
    return {"input_ids": ids, "labels": labels}
