"""Plan: what happens to every module of one model, as data that can be printed, edited and checked."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

from tp_plugin.layout import ShardLayout

COLUMN = "column"
"""Rows of the weight are sharded: replicated input, sharded output."""
COLUMN_GATHER = "column_gather"
"""As column, and the output is joined again for a consumer that is replicated."""
ROW = "row"
"""Columns of the weight are sharded: sharded input, replicated output."""
ROW_SPLIT = "row_split"
"""As row, for an input that comes replicated."""
VOCAB_EMBEDDING = "vocab_embedding"
"""A token embedding, its vocabulary sharded."""
VOCAB_HEAD = "vocab_head"
"""A language-model head, its vocabulary sharded, its logits not computed until needed."""
EXPERTS = "experts"
"""Fused experts ``[experts, ...]``: every expert's intermediate width is sharded, the routing weights are replicated."""
SUM = "sum"
"""A block whose result is linear in its experts' and its shared experts': their partial results are summed as one."""
ENTER = "enter"
"""Replicated; its output scales partial results, so the gradient of the output is summed over the TP group."""
LATENT = "latent"
"""Replicated; the last ``qk_rope_head_dim`` of its outputs are a key that all heads share: as ``enter`` for those."""
PARTIAL = "partial"
"""Replicated, but acting on sharded tensors: its gradient is summed over the TP group."""
REPLICATED = "replicated"
"""Whole on every rank, with the same gradient on every rank."""

STYLES = (
    *(COLUMN, COLUMN_GATHER, ROW, ROW_SPLIT, VOCAB_EMBEDDING, VOCAB_HEAD),
    *(EXPERTS, SUM, ENTER, LATENT, PARTIAL, REPLICATED),
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """Modules whose full name matches ``pattern`` get ``style``. ``*`` stands for one dotted part.

    Attributes:
        pattern: a module-name pattern such as ``model.layers.*.mlp.up_proj``.
        style: one of :data:`STYLES`.
        source: where the rule comes from, for people: "yours", "ours", "HF plan".
        blocks: for packed weights, the relative sizes of the sub-tensors along the sharded dimension.
    """

    pattern: str
    style: str
    source: str
    blocks: tuple[int, ...] = (1,)
    optional: bool = False

    def matches(self, name: str) -> bool:
        """Whether this rule speaks of the module ``name``."""
        return re.fullmatch(
            re.escape(self.pattern).replace(r"\*\*\.", r"(?:.+\.)?").replace(r"\*", r"[^.]+"), name
        ) is not None


@dataclasses.dataclass(frozen=True)
class Placement:
    """One module's part in a plan.

    Attributes:
        name: the module's full name.
        style: one of :data:`STYLES`.
        source: where the rule came from.
        layouts: parameter name inside the module -> how it lies on the ranks.
        repeats: per rank, how often each local KV head's output is repeated; None for everything but such layers.
        tail: how many of the last outputs of a latent projection enter by themselves; None elsewhere.
    """

    name: str
    style: str
    source: str
    layouts: Mapping[str, ShardLayout] = dataclasses.field(default_factory=dict)
    repeats: tuple[tuple[int, ...], ...] | None = None
    tail: int | None = None


@dataclasses.dataclass(frozen=True)
class RegionPlan:
    """One region: its block, the columns that open it, the row that closes it.

    Attributes:
        block: name of the common parent module.
        columns: their full names.
        row: full name of the row.
        kv_ratio: query heads a KV head on every rank, for attention; None elsewhere.
    """

    block: str
    columns: tuple[str, ...]
    row: str
    kv_ratio: int | None = None


@dataclasses.dataclass(frozen=True)
class MixturePlan:
    """One mixture of experts.

    Attributes:
        block: name of the module that holds router, experts and shared experts.
        experts: full name of the fused experts.
        columns: those of the shared experts, which come in through the same door.
        rows: those of the shared experts.
        summed: whether experts and rows leave their results partial, to be summed together where the block ends.
    """

    block: str
    experts: str
    columns: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    summed: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole model's sharding over ``tp_size`` ranks, complete before anything is touched.

    Attributes:
        tp_size: ranks.
        placements: every module that is not simply replicated, by name.
        regions: column and row modules that belong together.
        replicated: names of the parameters every rank holds whole.
        unused: rules of HF's plan that hit nothing in this model.
        mixtures: experts, and the shared experts beside them, which are in no region of their own then.
    """

    tp_size: int
    placements: Mapping[str, Placement]
    regions: tuple[RegionPlan, ...]
    replicated: tuple[str, ...]
    unused: tuple[Rule, ...] = ()
    mixtures: tuple[MixturePlan, ...] = ()

    def names(self, *styles: str) -> list[str]:
        """Modules placed by any of these styles, in model order."""
        return [name for name, placement in self.placements.items() if placement.style in styles]

    def describe(self) -> str:
        """A table for people: repeated layers are folded, what stays replicated is listed."""
        rows: dict[tuple[str, str, str], int] = {}
        for placement in self.placements.values():
            key = (fold(placement.name), placement.style, placement.source)
            rows[key] = rows.get(key, 0) + 1
        width = max((len(name) for name, _, _ in rows), default=0)
        lines = [f"tensor parallel over {self.tp_size} ranks"]
        lines += [f"  {name:<{width}}  {style:<15}  x{n:<4} ({source})" for (name, style, source), n in rows.items()]
        whole = fold_all(self.replicated)
        lines += ["  replicated on every rank: " + (", ".join(whole) if whole else "nothing")]
        return "\n".join(lines)


def fold(name: str) -> str:
    """``model.layers.3.mlp`` -> ``model.layers.*.mlp``."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def fold_all(names: Iterable[str]) -> list[str]:
    """Folded names, each once, in order."""
    return list(dict.fromkeys(map(fold, names)))
