"""Plan: the sharding of every module of one model, as data that can be printed, edited and checked."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Mapping

from tp_plugin.layout import ShardLayout

COLUMN = "column"
"""Rows of the weight are sharded: replicated input, sharded output."""
COLUMN_GATHER = "column_gather"
"""As column, and the output is gathered for a consumer that is replicated."""
ROW = "row"
"""Columns of the weight are sharded: sharded input, replicated output."""
ROW_SPLIT = "row_split"
"""As row, for an input that comes replicated."""
VOCAB_EMBEDDING = "vocab_embedding"
"""A token embedding, its vocabulary sharded."""
VOCAB_HEAD = "vocab_head"
"""A language-model head, its vocabulary sharded, its logits not computed until needed."""
WIDE_NORM = "wide_norm"
"""An RMS norm over the whole sharded width of an attention's queries or keys: sharded, its statistic summed."""
EACH_HEAD = "each_head"
"""A module with a list ``norms`` of one module a head; a rank uses those of its own heads."""
PER_HEAD = "per_head"
"""A parameter (the pattern names it, not its module) with an entry for each head, sharded like the heads."""
ALIAS = "alias"
"""A second name of a parameter that another module shards and uses; the pattern is that name."""
EXPERTS = "experts"
"""Fused experts ``[experts, ...]``: every expert's intermediate width is sharded, the routing is replicated."""
SUM = "sum"
"""A block whose result is linear in its experts' and its shared experts': their partial results are summed as one."""
ENTER = "enter"
"""Replicated; its output scales partial results, so the gradient of the output is summed over the TP group."""
LATENT = "latent"
"""Replicated; the last ``qk_rope_head_dim`` of its outputs are a key that all heads share: as ``enter`` for those."""
FIRST = "first"
"""Without parameters; its output is part of a partial result, and the group's first rank alone adds it."""
PARTIAL = "partial"
"""Replicated, but acting on sharded tensors: its gradient is summed over the TP group."""
REPLICATED = "replicated"
"""Full on every rank, with the same gradient on every rank."""

INFERRED = "inferred"
"""The source of rules that were inferred from modules and shapes."""
YOURS = "yours"
"""The source of the rules in the 'plan' of the tp_plugin block."""

NO_RULE, ADDED_ONCE = "no rule matches it", "added once, after the sum"
"""Reasons why a parameter is replicated."""

STYLES = (
    *(COLUMN, COLUMN_GATHER, ROW, ROW_SPLIT, VOCAB_EMBEDDING, VOCAB_HEAD),
    *(WIDE_NORM, EACH_HEAD, PER_HEAD, ALIAS, EXPERTS, SUM, ENTER, LATENT, FIRST, PARTIAL, REPLICATED),
)

QUERY_HEADS, KV_HEADS, GROUPS = "query heads", "kv heads", "query heads a kv head"
QUERY_WIDTH, KV_WIDTH = "query width", "kv width"
QUANTITIES = (QUERY_HEADS, KV_HEADS, GROUPS, QUERY_WIDTH, KV_WIDTH)
"""Quantities that an attribute may count; see :attr:`Rule.local`."""


@dataclasses.dataclass(frozen=True)
class Rule:
    """Modules whose full name matches ``pattern`` get ``style``; the other fields describe their layout.

    Attributes:
        pattern: a name pattern such as ``model.layers.*.mlp.up_proj``. ``*`` stands for one dotted part, ``**`` for any
            number of them, none included. Styles ``per_head`` and ``alias`` name a parameter, all others a module.
        style: one of :data:`STYLES`.
        source: origin of the rule, for reports: "yours", "family", "HF plan", "inferred", "vocabulary".
        role: heads that an attention's column computes: "query", "key", "value", or a packing of several, see
            :data:`tp_plugin.plans.heads.PACKINGS`; also the heads that a wide norm or a per-head parameter follows.
            Empty: by the module's name, else a column of an MLP.
        blocks: sub-tensors of the row's width that an MLP's column packs one behind the other: 2 for ``[gate|up]``.
        up: number of dotted parts from the module up to its block. The columns and the row of a block are a region.
        region: tells regions of one block apart.
        head_dim: size of a head; None: by an attribute of the column's parent (``head_dim``, ``head_size``, ...).
        local: attributes of the column's parent that its forward reads as sizes of this rank's tensors, each with what
            it counts, one of :data:`QUANTITIES`. ``config.x`` gives the module a view of its config in which ``x`` is
            local. Empty: well-known names of head counts, where the parent has them.
        inputs: arguments of the column's parent that come with an entry for each query head (ALiBi).
        dim: the dimension of a per-head parameter that has an entry for each head.
        equivalent: its forward computes what ``nn.Linear`` does, and may be replaced.
        optional: the rule may match no module.
    """

    pattern: str
    style: str
    source: str = "family"
    role: str = ""
    blocks: int = 1
    up: int = 1
    region: str = ""
    head_dim: int | None = None
    local: tuple[tuple[str, str], ...] = ()
    inputs: tuple[str, ...] = ()
    dim: int = 0
    equivalent: bool = False
    optional: bool = False

    def matches(self, name: str) -> bool:
        """Return True if ``name`` matches the pattern."""
        return _expression(self.pattern).fullmatch(f".{name}") is not None

    def within(self, scope: str) -> Rule:
        """This rule for a model that is the submodule ``scope`` of another."""
        return dataclasses.replace(self, pattern=f"{scope}.{self.pattern}") if scope else self

    def block(self, name: str) -> str:
        """The block that ``name`` belongs to."""
        return ".".join(name.split(".")[: -self.up])


@functools.cache
def _expression(pattern: str) -> re.Pattern[str]:
    parts = {"**": r"(?:\.[^.]+)*", "*": r"\.[^.]+"}
    return re.compile(
        "".join(parts.get(part) or r"\." + re.escape(part).replace(r"\*", "[^.]*") for part in pattern.split("."))
    )


@dataclasses.dataclass(frozen=True)
class Placement:
    """One module's part in a plan.

    Attributes:
        name: the module's full name.
        style: one of :data:`STYLES`.
        source: where the rule came from.
        layouts: parameter name inside the module -> its layout.
        outputs: per rank, the heads of a column's output in order, by their places in the shard, some repeated; None
            where the output is the shard's. For style ``each_head``, the numbers of a rank's heads.
        equivalent: the module's class may be replaced.
        tail: number of the last outputs of a latent projection that enter the region by themselves; None elsewhere.
    """

    name: str
    style: str
    source: str
    layouts: Mapping[str, ShardLayout] = dataclasses.field(default_factory=dict)
    outputs: tuple[tuple[int, ...], ...] | None = None
    equivalent: bool = False
    tail: int | None = None


@dataclasses.dataclass(frozen=True)
class Local:
    """An attribute of a module that becomes this rank's: ``values[rank]``.

    ``attribute`` may be ``config.x``: then the module gets a view of its config with another ``x``.
    """

    module: str
    attribute: str
    values: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class HeadInput:
    """A keyword argument of a module with an entry for each of ``heads`` heads; a rank needs those of its own.

    Attributes:
        module: full name of the module.
        argument: the keyword.
        heads: number of all heads.
        held: per rank, the heads it needs.
    """

    module: str
    argument: str
    heads: int
    held: tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class RegionPlan:
    """One region: its block, the columns that open it, the row that closes it.

    Attributes:
        block: name of a module that encloses them all.
        columns: their full names.
        row: full name of the row.
        locals: attributes that the forward reads and that become this rank's.
        inputs: arguments with an entry for each head.
    """

    block: str
    columns: tuple[str, ...]
    row: str
    locals: tuple[Local, ...] = ()
    inputs: tuple[HeadInput, ...] = ()


@dataclasses.dataclass(frozen=True)
class MixturePlan:
    """One mixture of experts.

    Attributes:
        block: name of the module that holds router, experts and shared experts.
        experts: full name of the fused experts.
        shared: modules that are shared experts alone: they enter the region with the experts.
        rows: those of the shared experts.
        summed: experts and rows leave their results partial, and the block sums them once at its end.
    """

    block: str
    experts: str
    shared: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    summed: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sharding of a full model over ``tp_size`` ranks, complete before anything is touched.

    Attributes:
        tp_size: ranks.
        placements: every module that is not simply replicated, by name.
        regions: column and row modules that belong together.
        replicated: the parameters that every rank has in full, by name, and why.
        unused: rules of HF's plan that match nothing in this model.
        mixtures: experts with the shared experts beside them, which then have no region of their own.
    """

    tp_size: int
    placements: Mapping[str, Placement]
    regions: tuple[RegionPlan, ...]
    replicated: Mapping[str, str]
    unused: tuple[Rule, ...] = ()
    mixtures: tuple[MixturePlan, ...] = ()

    def inferred(self) -> list[str]:
        """Modules whose rule was inferred from their shapes, and needs a trial."""
        return [name for name, placement in self.placements.items() if placement.source == INFERRED]

    def names(self, *styles: str) -> list[str]:
        """Modules placed by any of these styles, in model order."""
        return [name for name, placement in self.placements.items() if placement.style in styles]

    def describe(self) -> str:
        """A table in plain text: repeated layers are folded, and replicated parameters are listed."""
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
