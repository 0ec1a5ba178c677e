"""HF's own tensor-parallel plans, read as rules.

``model.tp_plan`` (``base_model_tp_plan`` of the config, joined with the head's) maps module patterns to the style names
of transformers' DTensor implementation; here they become the styles of :mod:`tp_plugin.plans.plan`.
"""

from __future__ import annotations

from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.plans import plan as p
from tp_plugin.plans.plan import Rule

STYLE_OF = {
    "colwise": p.COLUMN,
    "rowwise": p.ROW,
    "colwise_gather_output": p.COLUMN_GATHER,
    "colwise_rep": p.COLUMN_GATHER,
    "rowwise_split_input": p.ROW_SPLIT,
    "rowwise_rep": p.ROW_SPLIT,
    "packed_colwise": p.COLUMN,
    "packed_rowwise": p.ROW,
    "embedding_rowwise": p.VOCAB_EMBEDDING,
    "embedding_colwise": p.VOCAB_EMBEDDING,  # the vocabulary is sharded always: the head needs it so
    "replicated_with_grad_allreduce": p.PARTIAL,
    "sequence_parallel": p.REPLICATED,
    "replicate": p.REPLICATED,
    "local_params": p.REPLICATED,  # of the owner of bare parameters, each of which has an entry of its own
    "moe_tp_experts": p.EXPERTS,
    "moe_identity_expert": p.FIRST,
    "mla_kv_a_proj": p.LATENT,
    "all_reduce": p.REPLICATED,  # of a block whose parameters have entries of their own; the name of no layer of ours
}
"""What each of their styles is called here."""


def rules_of(model: nn.Module) -> list[Rule]:
    """The rules of the plan a transformers model carries; none for any other model.

    Raises:
        TensorParallelError: the plan asks for a style that is not supported, naming it and the module.
    """
    found = getattr(model, "tp_plan", None)
    if not isinstance(found, dict):
        return []
    vectors = [name for name, param in model.named_parameters(remove_duplicate=False) if param.dim() == 1]
    rules = []
    for pattern, style in found.items():
        if style not in STYLE_OF:
            raise TensorParallelError(
                f"{type(model).__name__}: the HF plan shards {pattern!r} in style {style!r}, which is unknown; "
                "give a rule of your own for it in the 'plan' of the tp_plugin block, or use tp_size 1."
            )
        rule = Rule(pattern, STYLE_OF[style], "HF plan", blocks=2 if style.startswith("packed") else 1)
        if style == "colwise" and any(map(rule.matches, vectors)):  # an attention's sinks
            rule = Rule(pattern, p.PER_HEAD, "HF plan", role="query")
        rules.append(rule)
    return rules
