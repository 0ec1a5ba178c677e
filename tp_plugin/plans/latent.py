"""Multi-head latent attention (DeepSeek-V2, 2024): heads are expanded from low-rank latents that every rank computes.

Queries come from ``q_proj``, or through a latent from ``q_b_proj``. ``kv_b_proj`` expands the other latent to a key and
a value for each head. A part of the key that all heads share goes past it. Heads are sharded. The latents, their norms
and the key-value cache of latents stay replicated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import ShardLayout
from tp_plugin.plans import plan as p
from tp_plugin.plans.attention import COUNTS
from tp_plugin.plans.checks import in_features, out_features
from tp_plugin.plans.heads import deal_heads
from tp_plugin.plans.match import Modules
from tp_plugin.plans.plan import Local, Placement, RegionPlan, Rule

EXPAND = "kv_b_proj"


def is_latent(columns: Iterable[str]) -> bool:
    """Return True if these columns of a block belong to a latent attention."""
    return any(name.endswith(f".{EXPAND}") for name in columns)


class LatentAttention:
    """One latent attention: as many keys and values as queries, dealt by heads.

    Raises:
        TensorParallelError: heads that the sizes do not tell, or that cannot be dealt to ``tp`` ranks.
    """

    def __init__(
        self, block: str, columns: Mapping[str, Rule], row: str, modules: Modules, tp: int, *, uneven: bool = False
    ) -> None:
        self.block, self.columns, self.row, self.modules = block, columns, row, modules
        attention = modules[block]
        nope, rope, self.value = (
            getattr(attention, name, 0) for name in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        )
        self.heads, rest = divmod(in_features(modules[row]), self.value or 1)
        self.sizes = {EXPAND: nope + self.value, **dict.fromkeys(("q_proj", "q_b_proj"), nope + rope)}
        if rest or not (nope and rope and self.value):
            raise TensorParallelError(self._puzzle(row))
        self.dealt = deal_heads(self.heads, self.heads, tp, where=block, uneven=uneven)

    def _puzzle(self, name: str) -> str:
        return (
            f"{self.block}: cannot tell the heads of {name!r} from its size and qk_nope_head_dim, qk_rope_head_dim and "
            "v_head_dim; its layout needs rules of its own, or column_gather and row_split."
        )

    def _by_head(self, name: str, shape: tuple[int, ...], dim: int) -> ShardLayout:
        if shape[dim] % self.heads:
            raise TensorParallelError(self._puzzle(name))
        return ShardLayout.units(shape, dim, shape[dim] // self.heads, self.dealt.queries)

    def column(self, name: str, rule: Rule) -> Placement:
        """Queries, the expansion to keys and values, or a gate on the heads' results."""
        module = self.modules[name]
        known = self.sizes.get(name.rpartition(".")[2])
        sizes = {known * self.heads} if known else {self.heads, self.heads * self.value}
        if out_features(module) not in sizes and (known or rule.role != "query"):
            raise TensorParallelError(self._puzzle(name))
        layout = self._by_head(name, module.weight.shape, 0)
        layouts = {"weight": layout}
        if module.bias is not None:
            layouts["bias"] = layout.along(0, module.bias.shape)
        return Placement(name, rule.style, rule.source, layouts, equivalent=rule.equivalent)

    def placed_row(self, rule: Rule) -> Placement:
        """The row takes the values of the heads."""
        layout = self._by_head(self.row, self.modules[self.row].weight.shape, 1)
        return Placement(self.row, rule.style, rule.source, {"weight": layout}, equivalent=rule.equivalent)

    def follower(self, name: str, rule: Rule) -> Placement:
        """A per-head parameter (``name`` is the parameter's)."""
        owner, _, leaf = name.rpartition(".")
        if rule.style != p.PER_HEAD:
            raise TensorParallelError(f"{name!r}: a latent attention has no {rule.style}, correct the rules.")
        layout = self._by_head(name, getattr(self.modules[owner], leaf).shape, rule.dim)
        return Placement(owner, rule.style, rule.source, {leaf: layout})

    def region(self) -> RegionPlan:
        """The region, with the well-known attributes that count its heads."""
        counts = {name for name, quantity in COUNTS.items() if quantity in (p.QUERY_HEADS, p.KV_HEADS)}
        local = tuple(map(len, self.dealt.queries))
        attention = self.modules[self.block]
        told = [Local(self.block, name, local) for name in sorted(counts) if getattr(attention, name, 0) == self.heads]
        return RegionPlan(self.block, tuple(self.columns), self.row, tuple(told))


def shared_key(name: str, modules: Modules) -> int:
    """Number of the last outputs of the latent projection ``name`` that are the key of all heads.

    Raises:
        TensorParallelError: its parent has no attribute that says so.
    """
    size = getattr(modules.get(name.rpartition(".")[0]), "qk_rope_head_dim", None)
    if not isinstance(size, int) or not 0 < size < out_features(modules[name]):
        raise TensorParallelError(
            f"{name!r}: its block has no qk_rope_head_dim that says which outputs go past {EXPAND}; use other styles."
        )
    return size
