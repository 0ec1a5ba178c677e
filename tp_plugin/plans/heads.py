"""How attention heads are dealt to ranks."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import balanced


@dataclasses.dataclass(frozen=True)
class HeadShards:
    """The heads of one attention block on each rank; every rank has the same ratio of query to KV heads.

    Attributes:
        queries: per rank, the query heads it computes.
        kvs: per rank, the KV heads it holds, each once.
        repeats: per rank, how often each of its KV heads is used as a head of its own, so that the ratio is uniform.
        ratio: query heads a (repeated) KV head on every rank: the block's ``num_key_value_groups``.
    """

    queries: tuple[tuple[int, ...], ...]
    kvs: tuple[tuple[int, ...], ...]
    repeats: tuple[tuple[int, ...], ...]
    ratio: int


def deal_heads(
    queries: int, kvs: int, tp: int, where: str = "attention", fits: Callable[[int], bool] = lambda queries: True
) -> HeadShards:
    """Deal ``queries`` query heads and ``kvs`` KV heads to ``tp`` ranks.

    Query heads are split evenly whenever ``tp`` divides them. KV heads are then split too, or, where a group of query
    heads lies on several ranks, held by each of them (grouped-query attention, Ainslie et al. 2023). If ``tp`` does
    not divide the query heads but there is a KV head for every rank, whole groups are dealt, unevenly. ``fits`` says
    whether a rank can have that many query heads.

    Raises:
        TensorParallelError: neither works; the message names the degrees that would.
    """
    dealt = _deal_if(queries, kvs, tp, fits)
    if dealt is None:
        works = [n for n in range(1, queries + 1) if _deal_if(queries, kvs, n, fits) is not None]
        raise TensorParallelError(
            f"{where}: {queries} query and {kvs} key/value heads cannot be sharded {tp} ways with one ratio on every "
            f"rank; choose tensor_parallel.autotp_size from {works}, or give its columns the style column_gather and "
            "its row the style row_split, which compute all heads on every rank."
        )
    return dealt


def _deal_if(queries: int, kvs: int, tp: int, fits: Callable[[int], bool]) -> HeadShards | None:
    dealt = _deal(queries, kvs, tp)
    return dealt if dealt is not None and all(fits(len(own)) for own in dealt.queries) else None


def _deal(queries: int, kvs: int, tp: int) -> HeadShards | None:
    if kvs <= 0 or queries % kvs:
        return None
    group = queries // kvs
    if queries % tp == 0:
        share = queries // tp
        own = [tuple(range(rank * share, (rank + 1) * share)) for rank in range(tp)]
        runs = [[(kv, len(list(run))) for kv, run in itertools.groupby(q // group for q in heads)] for heads in own]
        ratio = math.gcd(*(length for rank in runs for _, length in rank))
        return HeadShards(
            queries=tuple(own),
            kvs=tuple(tuple(kv for kv, _ in rank) for rank in runs),
            repeats=tuple(tuple(length // ratio for _, length in rank) for rank in runs),
            ratio=ratio,
        )
    if kvs >= tp:
        stops = list(itertools.accumulate(balanced(kvs, tp)))
        held = [tuple(range(stop - n, stop)) for n, stop in zip(balanced(kvs, tp), stops, strict=True)]
        return HeadShards(
            queries=tuple(tuple(range(kv[0] * group, (kv[-1] + 1) * group)) for kv in held),
            kvs=tuple(held),
            repeats=tuple((1,) * len(kv) for kv in held),
            ratio=group,
        )
    return None
