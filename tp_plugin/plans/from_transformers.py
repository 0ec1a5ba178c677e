"""HF's own tensor-parallel plans, read as rules.

``model.tp_plan`` (``base_model_tp_plan`` of the config, joined with the head's) maps module patterns to the style names
of transformers' DTensor implementation; here they become the styles of :mod:`tp_plugin.plans.plan`.
"""

from __future__ import annotations

from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.plans import plan as p
from tp_plugin.plans.plan import Rule

DENSE_STYLES = {
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
    "moe_tp_experts": p.EXPERTS,
    "mla_kv_a_proj": p.LATENT,
    "moe_identity_expert": p.REPLICATED,
}
STYLES_THAT_SAY_NOTHING = ("local_params", "all_reduce")
"""They tell HF's hooks how to run a module whose parameters or children have rules of their own."""


def rules_of(model: nn.Module) -> list[Rule]:
    """The rules of the plan a transformers model carries; none for any other model.

    Raises:
        TensorParallelError: the plan asks for a style that is not supported, naming it and the module.
    """
    found = getattr(model, "tp_plan", None)
    if not isinstance(found, dict):
        return []
    rules = []
    for pattern, style in found.items():
        if style in STYLES_THAT_SAY_NOTHING:
            continue
        if style not in DENSE_STYLES:
            raise TensorParallelError(
                f"{type(model).__name__}: the HF plan shards {pattern!r} in style {style!r}, which is not supported "
                "yet; give a rule of your own for it in the 'plan' of the tp_plugin block, or use tp_size 1."
            )
        blocks = (1, 1) if style.startswith("packed") else (1,)
        rules.append(Rule(pattern, DENSE_STYLES[style], "HF plan", blocks))
    return rules
