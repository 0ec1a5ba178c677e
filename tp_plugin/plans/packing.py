"""In which order a column's output holds the heads of queries, keys and values.

A packing is the order of the heads in the full weight, as a function of the numbers of heads. The same function of a
rank's numbers is the order its forward expects of the rank's output; from the two follow the shard and the output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from tp_plugin.plans.heads import HeadShards

Head = tuple[str, int]  # "q", "k" or "v", and its number


@dataclasses.dataclass(frozen=True)
class Packing:
    """One way to pack.

    Attributes:
        order: (query heads, KV heads) -> all heads in order.
        kvs: (heads in the weight, query heads) -> KV heads; None where the weight does not tell.
        fits: whether it can be done with that many query heads.
    """

    order: Callable[[int, int], list[Head]]
    kvs: Callable[[int, int], float] | None = None
    fits: Callable[[int], bool] = lambda queries: True


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
    "key": Packing(lambda q, kv: _of("k", kv), lambda n, q: n),
    "value": Packing(lambda q, kv: _of("v", kv), lambda n, q: n),
    "q|k|v": Packing(lambda q, kv: _of("q", q) + _of("k", kv) + _of("v", kv), lambda n, q: (n - q) / 2),
    "k|v": Packing(lambda q, kv: _of("k", kv) + _of("v", kv), lambda n, q: n / 2),
    # (kv heads, its query heads + k + v, head_dim): GPT-NeoX and BLOOM with one query head each, Falcon with several
    "grouped": Packing(_grouped, lambda n, q: (n - q) / 2),
    # four blocks of [q|v|k], after the four TPU cores CodeGen was trained on
    "4x q|v|k": Packing(_quarters, lambda n, q: (n - q) / 2, lambda q: q % 4 == 0),
}
"""By the role of a rule."""


def local_heads(dealt: HeadShards, rank: int, packing: Packing) -> list[Head]:
    """The heads of the output of ``rank``, in the order its forward expects, KV heads repeated as needed."""
    queries = dealt.queries[rank]
    kvs = [kv for kv, times in zip(dealt.kvs[rank], dealt.repeats[rank], strict=True) for _ in range(times)]
    own = {"q": queries, "k": kvs, "v": kvs}
    return [(kind, own[kind][head]) for kind, head in packing.order(len(queries), len(kvs))]


def cut(
    dealt: HeadShards, queries: int, kvs: int, packing: Packing
) -> tuple[list[list[int]], tuple[tuple[int, ...], ...] | None]:
    """How ranks hold a packed weight.

    Returns:
        Per rank, the heads it holds as places in the full weight, each once; and :attr:`Placement.outputs`.
    """
    place = {head: index for index, head in enumerate(packing.order(queries, kvs))}
    held, outputs = [], []
    for rank in range(len(dealt.queries)):
        wanted = local_heads(dealt, rank, packing)
        once = list(dict.fromkeys(wanted))
        held.append([place[head] for head in once])
        outputs.append(tuple(once.index(head) for head in wanted))
    as_held = all(order == tuple(range(len(order))) for order in outputs)
    return held, None if as_held else tuple(outputs)
