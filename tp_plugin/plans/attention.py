"""Attention: heads dealt to ranks, and the layouts of everything in the block that follows them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import ShardLayout
from tp_plugin.plans import plan as p
from tp_plugin.plans.attention_attributes import HEAD_DIM, head_dim_of, local_attributes
from tp_plugin.plans.checks import in_features, out_dim, out_features, require_wide_norm
from tp_plugin.plans.heads import PACKINGS, HeadShards, deal_heads, local_heads, local_packed
from tp_plugin.plans.match import Modules
from tp_plugin.plans.plan import HeadInput, Local, Placement, RegionPlan, Rule

ROLES = {
    **dict.fromkeys(("q_proj", "query", "q", "wq", "q_lin"), "query"),
    **dict.fromkeys(("k_proj", "key", "k", "wk", "k_lin", "k_norm"), "key"),
    **dict.fromkeys(("v_proj", "value", "v", "wv", "v_lin"), "value"),
}
"""Roles of columns whose rule names none, by the last part of the module's name."""
COUNTS = {
    **dict.fromkeys(("num_heads", "num_attention_heads", "n_heads", "n_head"), p.QUERY_HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), p.KV_HEADS),
    "num_key_value_groups": p.GROUPS,
}
"""Attributes that become local where a rule names none."""


def role_of(name: str, rule: Rule) -> str:
    """Role of the column ``name`` in an attention; empty for another column."""
    return rule.role or ROLES.get(name.rpartition(".")[2], "")


def is_attention(columns: Mapping[str, Rule]) -> bool:
    """Return True if one of these columns makes queries; keys and values may come from another layer (Gemma 3n)."""
    return any("q" in PACKINGS[role].kinds for name, rule in columns.items() if (role := role_of(name, rule)))


def has_heads(columns: Mapping[str, Rule], modules: Modules) -> bool:
    """Return True if these columns are an attention's.

    Columns of the user's rules that are queries by their name alone, without keys and values, are not where their
    parent has no head count.
    """
    if not is_attention(columns):
        return False
    yours = all(
        rule.source == p.YOURS and not rule.role and role_of(name, rule) in ("", "query")
        for name, rule in columns.items()
    )
    parents = {name: modules[name.rpartition(".")[0]] for name in columns}
    return not yours or any(head_dim_of(parent, out_features(modules[name])) for name, parent in parents.items())


class Attention:
    """One attention block: its heads, and the layout of each member.

    Raises:
        TensorParallelError: heads that the sizes do not tell, or that cannot be dealt to ``tp`` ranks.
    """

    def __init__(
        self, block: str, columns: Mapping[str, Rule], row: str, modules: Modules, tp: int, *, uneven: bool = False
    ) -> None:
        self.block, self.columns, self.row, self.modules = block, columns, row, modules
        self.roles = {name: role_of(name, rule) for name, rule in columns.items()}
        self.head_dim = self._head_dim()
        width = in_features(modules[row])
        self.value_dim = self._value_dim()
        self.queries = width // self.value_dim if self.value_dim else 0
        counts = {self._kvs(name) for name, role in self.roles.items() if role and PACKINGS[role].kinds & {"k", "v"}}
        counts = counts or {self._shared_kvs()}
        if not self.queries or self.queries * self.value_dim != width or len(counts) != 1 or counts & {None, 0}:
            raise TensorParallelError(self._puzzle())
        self.kvs: int = int(counts.pop() or 0)
        fits = [PACKINGS[role].fits for role in self.roles.values() if role]
        self.dealt: HeadShards = deal_heads(
            self.queries, self.kvs, tp, block, lambda heads: all(fit(heads) for fit in fits), uneven=uneven
        )

    def _head_dim(self) -> int:
        given = {rule.head_dim for rule in self.columns.values() if rule.head_dim}
        parents = [self.modules[name.rpartition(".")[0]] for name in self.columns]
        found = (getattr(parent, name, None) for parent in parents for name in HEAD_DIM)
        size = given.pop() if given else next((size for size in found if isinstance(size, int) and size > 0), 0)
        if size or not self._yours():
            return size
        width = in_features(self.modules[self.row])
        sizes = set()
        for name, role in self.roles.items():
            if role and "q" in PACKINGS[role].kinds:
                outputs = out_features(self.modules[name]) if role == "query" else width
                sizes.add(head_dim_of(self.modules[name.rpartition(".")[0]], outputs))
        return sizes.pop() if len(sizes) == 1 else 0

    def _yours(self) -> bool:
        return all(rule.source == p.YOURS for rule in self.columns.values())

    def _value_dim(self) -> int:
        """Size of a head's values, which may differ from that of its keys."""
        parents = {name.rpartition(".")[0] for name in self.columns}
        separate = "value" in self.roles.values()
        found = (getattr(self.modules[parent], "v_head_dim", None) for parent in parents if separate)
        return next((size for size in found if isinstance(size, int) and size > 0), self.head_dim)

    def _kvs(self, name: str) -> int | None:
        size = self.value_dim if self.roles[name] == "value" else self.head_dim
        heads, rest = divmod(out_features(self.modules[name]), size or 1)
        found = 0 if rest else PACKINGS[self.roles[name]].kvs(heads, self.queries) or 0
        return int(found) if found == int(found) and found > 0 else None

    def _shared_kvs(self) -> int | None:
        """KV heads of an attention that gets keys and values from another layer, by its number of groups."""
        parents = {name.rpartition(".")[0] for name in self.columns}
        groups = {getattr(self.modules[parent], "num_key_value_groups", None) for parent in parents}
        found = groups.pop() if len(groups) == 1 else None
        return self.queries // found if isinstance(found, int) and found and not self.queries % found else None

    def _puzzle(self) -> str:
        sizes = {name.rpartition(".")[2]: out_features(self.modules[name]) for name in self.columns}
        needs = "its layout needs rules of its own, or column_gather and row_split"
        if self._yours():
            needs = (
                "give it an attribute head_dim or num_heads that its forward reads, or use the styles column_gather "
                "and row_split, which compute all heads on every rank"
            )
        return (
            f"{self.block}: cannot tell its heads from head_dim={self.head_dim or None}, output sizes {sizes} and row "
            f"input {in_features(self.modules[self.row])}; {needs}."
        )

    def column(self, name: str, rule: Rule) -> Placement:
        """Queries, keys, values, several of them packed, or a gate that follows the queries."""
        module, role = self.modules[name], self.roles[name]
        size, heads = out_features(module), len(PACKINGS[role or "query"].heads(self.queries, self.kvs))
        if size % heads or (not role and size not in (self.queries, self.queries * self.head_dim)):
            raise TensorParallelError(self._puzzle())
        layout, outputs = self._layout(role or "query", module.weight.shape, out_dim(module), size // heads)
        layouts = {"weight": layout}
        if getattr(module, "bias", None) is not None:
            layouts["bias"] = layout.along(0, module.bias.shape)
        return Placement(name, rule.style, rule.source, layouts, outputs, rule.equivalent)

    def placed_row(self, rule: Rule) -> Placement:
        """The row takes the results of the queries' heads."""
        module = self.modules[self.row]
        layout, _ = self._layout("query", module.weight.shape, 1 - out_dim(module), self.value_dim)
        return Placement(self.row, rule.style, rule.source, {"weight": layout}, equivalent=rule.equivalent)

    def follower(self, name: str, rule: Rule) -> Placement:
        """A wide norm, a list with a module a head, or a per-head parameter (``name`` is the parameter's)."""
        if rule.style == p.EACH_HEAD:
            return self._each_head(name, rule)
        owner, _, leaf = name.rpartition(".") if rule.style == p.PER_HEAD else (name, "", "weight")
        shape = getattr(self.modules[owner], leaf).shape
        role = role_of(name, rule) or "query"
        heads = len(PACKINGS[role].heads(self.queries, self.kvs))
        if shape[rule.dim] % heads:
            raise TensorParallelError(
                f"{name!r} has {shape[rule.dim]} entries along dimension {rule.dim}, which do not follow the {heads} "
                f"heads of {self.block!r}; correct its rule."
            )
        if rule.style == p.WIDE_NORM:
            require_wide_norm(name, self.modules[name])
        layout, outputs = self._layout(role, shape, rule.dim, shape[rule.dim] // heads)
        if rule.style == p.PER_HEAD and outputs is not None:
            raise TensorParallelError(
                f"{name!r} follows key/value heads that a rank would have to use more than once; choose "
                f"tensor_parallel.autotp_size from {self._plain_degrees()}."
            )
        return Placement(owner, rule.style, rule.source, {leaf: layout}, outputs)

    def _each_head(self, name: str, rule: Rule) -> Placement:
        role = role_of(name, rule) or "query"
        heads, found = len(PACKINGS[role].heads(self.queries, self.kvs)), len(getattr(self.modules[name], "norms", ()))
        if found != heads:
            raise TensorParallelError(
                f"{name!r} has {found} modules in 'norms' for the {heads} heads of {self.block!r}; correct its rule."
            )
        seen = [local_heads(self.dealt, rank, PACKINGS[role]) for rank in range(len(self.dealt.queries))]
        return Placement(name, rule.style, rule.source, outputs=tuple(tuple(h for _, h in own) for own in seen))

    def _plain_degrees(self) -> list[int]:
        return [n for n in range(1, self.kvs + 1) if self.kvs % n == 0 and self.queries % n == 0]

    def _layout(
        self, role: str, shape: tuple[int, ...], dim: int, unit: int
    ) -> tuple[ShardLayout, tuple[tuple[int, ...], ...] | None]:
        held, outputs = local_packed(self.dealt, self.queries, self.kvs, PACKINGS[role])
        return ShardLayout.units(shape, dim, unit, held), outputs

    def region(self) -> RegionPlan:
        """The region, with the attributes and arguments of its attention that become local."""
        told: dict[tuple[str, str], Local] = {}
        inputs: dict[tuple[str, str], HeadInput] = {}
        for name, rule in self.columns.items():
            parent = name.rpartition(".")[0]
            counted = dict(rule.local) or {k: q for k, q in COUNTS.items() if self._counts(parent, k, q)}
            if rule.source == p.YOURS and not rule.local:
                counted |= local_attributes(self.modules[parent], self.queries, self.kvs, self.head_dim)
            for attribute, quantity in counted.items():
                told[parent, attribute] = self._local(parent, attribute, quantity)
            for argument in rule.inputs:
                inputs[parent, argument] = HeadInput(parent, argument, self.queries, self.dealt.queries)
        return RegionPlan(self.block, tuple(self.columns), self.row, tuple(told.values()), tuple(inputs.values()))

    def _amounts(self, quantity: str) -> tuple[int, tuple[int, ...]]:
        """Number of ``quantity`` in the full block, and on each rank."""
        queries = self.queries, tuple(map(len, self.dealt.queries))
        kvs = self.kvs, tuple(map(sum, self.dealt.repeats))
        if quantity == p.GROUPS:
            return self.queries // self.kvs, (self.dealt.ratio,) * len(self.dealt.queries)
        full, local = queries if quantity in (p.QUERY_HEADS, p.QUERY_WIDTH) else kvs
        unit = self.head_dim if quantity in (p.QUERY_WIDTH, p.KV_WIDTH) else 1
        return full * unit, tuple(n * unit for n in local)

    def _counts(self, parent: str, attribute: str, quantity: str) -> bool:
        return getattr(self.modules[parent], attribute, None) == self._amounts(quantity)[0]

    def _local(self, parent: str, attribute: str, quantity: str) -> Local:
        full, local = self._amounts(quantity)
        found: Any = self.modules[parent]
        for part in attribute.split("."):
            found = getattr(found, part, None)
        if found != full:
            raise TensorParallelError(
                f"the rules for {parent!r} expect its forward to read the {quantity} ({full}) from {attribute!r}, "
                f"which is {found!r}: the installed transformers is not the one they were written for, use the version "
                "in constraints.txt or rules of your own."
            )
        return Local(parent, attribute, local)
