"""Attention heads: how they are dealt to ranks, and in which order a fused weight packs them.

A packing is the order of the heads in the full weight, as a function of the numbers of heads. The same function of a
rank's numbers is the order that its forward expects. The two give the shard and the order of its output.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import balanced

Head = tuple[str, int]  # "q", "k" or "v", and its number


@dataclasses.dataclass(frozen=True)
class HeadShards:
    """The heads of one attention block on each rank; every rank has the same ratio of query to KV heads.

    Attributes:
        queries: per rank, the query heads it computes.
        kvs: per rank, its KV heads, each once.
        repeats: per rank, how often each of its KV heads is repeated, so that the ratio is the same on all ranks.
        ratio: query heads a (repeated) KV head on every rank: the block's ``num_key_value_groups``.
    """

    queries: tuple[tuple[int, ...], ...]
    kvs: tuple[tuple[int, ...], ...]
    repeats: tuple[tuple[int, ...], ...]
    ratio: int


def deal_heads(
    queries: int,
    kvs: int,
    tp: int,
    where: str = "attention",
    fits: Callable[[int], bool] = lambda queries: True,
    *,
    uneven: bool = False,
) -> HeadShards:
    """Deal ``queries`` query heads and ``kvs`` KV heads to ``tp`` ranks.

    Query heads are split evenly whenever ``tp`` divides them. KV heads are then split too, or replicated on the ranks
    that share a group of query heads (grouped-query attention, Ainslie et al. 2023). If ``tp`` does not divide the
    query heads but there is a KV head for every rank, full groups are dealt, unevenly.

    Args:
        where: name of the block, for the message.
        fits: returns True if a rank can have that many query heads.
        uneven: where neither works, let ranks differ by one query head. Every rank then has the KV heads of its query
            heads, and repeats them so that one ratio of query to KV heads holds on all ranks.

    Raises:
        TensorParallelError: none of these works; the message names the degrees that would.
    """
    dealt = _deal_if(queries, kvs, tp, fits, uneven)
    if dealt is None:
        works = [n for n in range(1, queries + 1) if _deal_if(queries, kvs, n, fits, uneven) is not None]
        uneven_works = not uneven and _deal_if(queries, kvs, tp, fits, True) is not None
        shares = ", ".join(map(str, balanced(queries, tp)))
        offer = f'set "uneven_heads": true in the tp_plugin block, which gives the ranks {shares} of the query heads, '
        offer = offer if uneven_works else ""
        raise TensorParallelError(
            f"{where}: {queries} query and {kvs} key/value heads cannot be sharded {tp} ways; choose "
            f"autotp_size from {works}, {offer}or use the styles column_gather and row_split."
        )
    return dealt


def _deal_if(queries: int, kvs: int, tp: int, fits: Callable[[int], bool], uneven: bool) -> HeadShards | None:
    dealt = _deal(queries, kvs, tp, uneven)
    return dealt if dealt is not None and all(fits(len(own)) for own in dealt.queries) else None


def _deal(queries: int, kvs: int, tp: int, uneven: bool) -> HeadShards | None:
    if kvs <= 0 or queries % kvs:
        return None
    group = queries // kvs
    if queries % tp == 0:
        return _by_queries(queries, group, tp)
    if kvs >= tp:
        stops = list(itertools.accumulate(balanced(kvs, tp)))
        held = [tuple(range(stop - n, stop)) for n, stop in zip(balanced(kvs, tp), stops, strict=True)]
        return HeadShards(
            queries=tuple(tuple(range(kv[0] * group, (kv[-1] + 1) * group)) for kv in held),
            kvs=tuple(held),
            repeats=tuple((1,) * len(kv) for kv in held),
            ratio=group,
        )
    return _by_queries(queries, group, tp) if uneven and queries >= tp else None


def _by_queries(queries: int, group: int, tp: int) -> HeadShards:
    """Deal query heads as evenly as possible, each rank with the KV heads of its query heads."""
    stops = list(itertools.accumulate(balanced(queries, tp)))
    own = [tuple(range(stop - n, stop)) for n, stop in zip(balanced(queries, tp), stops, strict=True)]
    runs = [[(kv, len(list(run))) for kv, run in itertools.groupby(q // group for q in heads)] for heads in own]
    ratio = math.gcd(*(length for rank in runs for _, length in rank))
    return HeadShards(
        queries=tuple(own),
        kvs=tuple(tuple(kv for kv, _ in rank) for rank in runs),
        repeats=tuple(tuple(length // ratio for _, length in rank) for rank in runs),
        ratio=ratio,
    )


@dataclasses.dataclass(frozen=True)
class Packing:
    """One order of heads in a weight, given to :func:`register_packing` under the name of a role.

    Attributes:
        order: (query heads, KV heads) -> all heads in order, each as ("q", "k" or "v", its number). It is called with
            the numbers of the full weight and with those of each rank's shard.
        fits: returns True if a rank can have that many query heads.
    """

    order: Callable[[int, int], list[Head]]
    fits: Callable[[int], bool] = lambda queries: True

    @functools.cached_property
    def kinds(self) -> frozenset[str]:
        """ "q", "k" and "v", those that are packed."""
        sample = next(n for n in range(1, 65) if self.fits(n))
        return frozenset(kind for kind, _ in self.order(sample, sample))

    def heads(self, queries: int, kvs: int) -> list[Head]:
        """All heads in order.

        Raises:
            TensorParallelError: ``order`` leaves a head out, or has one twice.
        """
        found = list(self.order(queries, kvs))
        wanted = [head for kind in self.kinds for head in _of(kind, queries if kind == "q" else kvs)]
        if sorted(found) != sorted(wanted):
            raise TensorParallelError(
                f"a packing of {queries} query and {kvs} key/value heads has {len(found)} heads, {found[:4]} first, "
                f"not each of {len(wanted)} once; correct its 'order'."
            )
        return found

    def kvs(self, heads: int, queries: int) -> float | None:
        """KV heads of a weight with so many heads in all; None where it packs none."""
        each = len(self.kinds & {"k", "v"})
        return (heads - queries * ("q" in self.kinds)) / each if each else None


def _of(kind: str, heads: int) -> list[Head]:
    return [(kind, head) for head in range(heads)]


def _grouped(queries: int, kvs: int) -> list[Head]:
    group = queries // kvs
    return [
        head for kv in range(kvs) for head in (*(("q", kv * group + i) for i in range(group)), ("k", kv), ("v", kv))
    ]


def _quarters(queries: int, kvs: int) -> list[Head]:
    share = queries // 4
    return [(kind, part * share + i) for part in range(4) for kind in "qvk" for i in range(share)]


PACKINGS = {
    "query": Packing(lambda q, kv: _of("q", q)),
    "key": Packing(lambda q, kv: _of("k", kv)),
    "value": Packing(lambda q, kv: _of("v", kv)),
    "q|k|v": Packing(lambda q, kv: _of("q", q) + _of("k", kv) + _of("v", kv)),
    "k|v": Packing(lambda q, kv: _of("k", kv) + _of("v", kv)),
    # (kv heads, its query heads + k + v, head_dim): GPT-NeoX and BLOOM with one query head each, Falcon with several
    "grouped": Packing(_grouped),
    # four blocks of [q|v|k], after the four TPU cores CodeGen was trained on
    "4x q|v|k": Packing(_quarters, lambda q: q % 4 == 0),
}
"""By the role of a rule."""


def register_packing(role: str, packing: Packing) -> None:
    """Let rules name the packing of their column by ``role``.

    Args:
        role: a new name, such as "v|k|q".
        packing: the order of the heads.

    Raises:
        TensorParallelError: another packing has that name, or ``packing`` is none that can be used.
    """
    if role in PACKINGS and PACKINGS[role] != packing:
        raise TensorParallelError(f"the role {role!r} is a packing already; register yours under another name.")
    sizes = [n for n in range(1, 65) if isinstance(packing, Packing) and packing.fits(n)]
    if not role or not sizes:
        raise TensorParallelError(
            f"register_packing needs a name and a tp_plugin.Packing that fits some number of query heads up to 64, got "
            f"{role!r} and {packing!r}."
        )
    for size in sizes[:4]:
        packing.heads(size, size)
    PACKINGS[role] = packing


def local_heads(dealt: HeadShards, rank: int, packing: Packing) -> list[Head]:
    """Heads of the output of ``rank``, in the order its forward expects, KV heads repeated as needed."""
    queries = dealt.queries[rank]
    kvs = [kv for kv, times in zip(dealt.kvs[rank], dealt.repeats[rank], strict=True) for _ in range(times)]
    own = {"q": queries, "k": kvs, "v": kvs}
    return [(kind, own[kind][head]) for kind, head in packing.heads(len(queries), len(kvs))]


def local_packed(
    dealt: HeadShards, queries: int, kvs: int, packing: Packing
) -> tuple[list[list[int]], tuple[tuple[int, ...], ...] | None]:
    """Shards of a packed weight.

    Returns:
        Per rank, the places of its heads in the full weight, each once; and :attr:`Placement.outputs`.
    """
    place = {head: index for index, head in enumerate(packing.heads(queries, kvs))}
    held, outputs = [], []
    for rank in range(len(dealt.queries)):
        wanted = local_heads(dealt, rank, packing)
        once = list(dict.fromkeys(wanted))
        held.append([place[head] for head in once])
        outputs.append(tuple(once.index(head) for head in wanted))
    as_held = all(order == tuple(range(len(order))) for order in outputs)
    return held, None if as_held else tuple(outputs)
