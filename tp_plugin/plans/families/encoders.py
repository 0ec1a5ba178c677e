"""Encoders, and models of an encoder and a decoder."""

from __future__ import annotations

from torch import nn

from tp_plugin.plans import plan as p
from tp_plugin.plans.plan import Rule
from tp_plugin.plans.registry import register_family


@register_family("bert", "roberta", "xlm-roberta", "camembert", "electra")
def bert(_model: nn.Module) -> tuple[Rule, ...]:
    """Query, key and value are in one module and their row in the next; likewise the two layers of the MLP."""
    rules: tuple[Rule, ...] = ()
    local = (("num_attention_heads", p.QUERY_HEADS), ("all_head_size", p.QUERY_WIDTH))
    for attention in ("attention", "crossattention"):
        optional = attention == "crossattention"
        rules += (
            Rule(f"**.{attention}.self.query", p.COLUMN, up=2, local=local, optional=optional),
            Rule(f"**.{attention}.self.key", p.COLUMN, up=2, optional=optional),
            Rule(f"**.{attention}.self.value", p.COLUMN, up=2, optional=optional),
            Rule(f"**.{attention}.output.dense", p.ROW, up=2, optional=optional),
            Rule(f"**.{attention}.output.LayerNorm", p.REPLICATED, optional=optional),
        )
    return (
        *rules,
        Rule("**.layer.*.intermediate.dense", p.COLUMN, up=2),
        Rule("**.layer.*.output.dense", p.ROW, up=2),
        Rule("**.layer.*.output.LayerNorm", p.REPLICATED),
    )


@register_family("mobilebert")
def mobilebert(_model: nn.Module) -> tuple[Rule, ...]:
    """BERT's regions and several small MLPs. Its head multiplies with the embedding's weight: both are replicated."""
    local = (("num_attention_heads", p.QUERY_HEADS), ("all_head_size", p.QUERY_WIDTH))
    return (
        Rule("**.attention.self.query", p.COLUMN, up=2, local=local),
        Rule("**.attention.self.key", p.COLUMN, up=2),
        Rule("**.attention.self.value", p.COLUMN, up=2),
        Rule("**.attention.output.dense", p.ROW, up=2),
        Rule("**.layer.*.intermediate.dense", p.COLUMN, up=2),
        Rule("**.layer.*.output.dense", p.ROW, up=2),
        Rule("**.ffn.*.intermediate.dense", p.COLUMN, up=2, optional=True),
        Rule("**.ffn.*.output.dense", p.ROW, up=2, optional=True),
        Rule("**.layer.*.bottleneck.**", p.REPLICATED, optional=True),
        Rule("**.output.bottleneck.**", p.REPLICATED, optional=True),
        Rule("**.LayerNorm", p.REPLICATED),
        Rule("**.word_embeddings", p.REPLICATED),
        Rule("**.predictions.decoder", p.REPLICATED, optional=True),
    )


@register_family("mpnet")
def mpnet(_model: nn.Module) -> tuple[Rule, ...]:
    """The encoder makes a bias for every head, of which each layer's attention takes its rank's."""
    local = (("num_attention_heads", p.QUERY_HEADS), ("all_head_size", p.QUERY_WIDTH))
    return (
        Rule("**.attention.attn.q", p.COLUMN, local=local, inputs=("position_bias",)),
        Rule("**.attention.attn.k", p.COLUMN),
        Rule("**.attention.attn.v", p.COLUMN),
        Rule("**.attention.attn.o", p.ROW),
        Rule("**.relative_attention_bias", p.PARTIAL),
        Rule("**.layer.*.intermediate.dense", p.COLUMN, up=2),
        Rule("**.layer.*.output.dense", p.ROW, up=2),
        Rule("**.layer.*.*.LayerNorm", p.REPLICATED),
    )


@register_family("modernbert")
def modernbert(_model: nn.Module) -> tuple[Rule, ...]:
    return (
        Rule("**.attn.Wqkv", p.COLUMN, role="q|k|v"),
        Rule("**.attn.Wo", p.ROW),
        Rule("**.mlp.Wi", p.COLUMN, blocks=2),
        Rule("**.mlp.Wo", p.ROW),
    )


@register_family("t5", "mt5", "umt5", "longt5", "pop2piano")
def t5(model: nn.Module) -> tuple[Rule, ...]:
    local = (("n_heads", p.QUERY_HEADS), ("inner_dim", p.QUERY_WIDTH))
    rules: tuple[Rule, ...] = ()
    for attention in ("*SelfAttention", "EncDecAttention"):  # LongT5 has two more of the first
        optional = attention == "EncDecAttention"
        rules += (
            Rule(f"**.{attention}.q", p.COLUMN, local=local, optional=optional),
            Rule(f"**.{attention}.k", p.COLUMN, optional=optional),
            Rule(f"**.{attention}.v", p.COLUMN, optional=optional),
            Rule(f"**.{attention}.o", p.ROW, optional=optional),
        )
    columns = ("wi_0", "wi_1") if model.config.is_gated_act else ("wi",)  # type: ignore[union-attr]
    return (
        *rules,
        Rule("**.*relative_attention_bias.weight", p.PER_HEAD, role="query", dim=1, up=2),
        Rule("**.global_input_layer_norm", p.REPLICATED, optional=True),
        *(Rule(f"**.DenseReluDense.{column}", p.COLUMN) for column in columns),
        Rule("**.DenseReluDense.wo", p.ROW),
    )


@register_family("bart", "whisper")
def bart(model: nn.Module) -> tuple[Rule, ...]:
    """Attention of encoder, decoder and between them; the layer itself has the MLP's linear layers."""
    rules: tuple[Rule, ...] = ()
    for attention in ("self_attn", "encoder_attn"):
        optional = attention == "encoder_attn"
        rules += (
            Rule(f"**.{attention}.q_proj", p.COLUMN, local=(("num_heads", p.QUERY_HEADS),), optional=optional),
            Rule(f"**.{attention}.k_proj", p.COLUMN, optional=optional),
            Rule(f"**.{attention}.v_proj", p.COLUMN, optional=optional),
            Rule(f"**.{attention}.out_proj", p.ROW, optional=optional),
        )
    norms = ("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm")
    return (
        *rules,
        Rule("**.layers.*.fc1", p.COLUMN),
        Rule("**.layers.*.fc2", p.ROW),
        *(Rule(f"**.layers.*.{norm}", p.REPLICATED, optional="encoder" in norm) for norm in norms),
    )
