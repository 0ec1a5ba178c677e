"""Heads dealt to ranks: every head computed once, KV heads where their query heads are, one ratio everywhere."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tp_plugin.errors import TensorParallelError
from tp_plugin.plans.heads import deal_heads


@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 8), st.booleans())
def test_every_query_head_meets_its_kv_head(kvs, group, tp, uneven):
    queries = kvs * group
    try:
        dealt = deal_heads(queries, kvs, tp, uneven=uneven)
    except TensorParallelError as refused:
        # what is named as working must work
        works = str(refused).partition("from [")[2].partition("]")[0].split(", ")
        for degree in map(int, works):
            deal_heads(queries, kvs, degree, uneven=uneven)
        assert str(tp) not in works
        assert queries < tp or not uneven
        return
    assert [q for rank in dealt.queries for q in rank] == list(range(queries))
    assert set(range(kvs)) == {kv for rank in dealt.kvs for kv in rank}
    for own, held, repeats in zip(dealt.queries, dealt.kvs, dealt.repeats, strict=True):
        assert len(set(held)) == len(held), "a rank stores each KV head once"
        used = [kv for kv, n in zip(held, repeats, strict=True) for _ in range(n)]
        # what attention does: query head i of this rank uses KV head i // ratio of this rank
        assert [used[i // dealt.ratio] for i in range(len(own))] == [q // group for q in own]
        assert len(own) == len(used) * dealt.ratio


@pytest.mark.parametrize(
    ("queries", "kvs", "tp", "held", "ratio"),
    [
        (8, 4, 2, [[0, 1], [2, 3]], 2),
        (4, 1, 2, [[0], [0]], 2),
        (8, 2, 4, [[0], [0], [1], [1]], 2),
        (6, 3, 2, [[0, 1], [1, 2]], 1),
        (12, 3, 4, [[0], [0, 1], [1, 2], [2]], 1),
        (9, 3, 2, [[0, 1], [2]], 3),  # tp does not divide the query heads: whole groups, unevenly
    ],
)
def test_heads_are_assigned_as_in_worked_examples(queries, kvs, tp, held, ratio):
    dealt = deal_heads(queries, kvs, tp)
    assert [list(rank) for rank in dealt.kvs] == held
    assert dealt.ratio == ratio


def test_uneven_heads_differ_by_one():
    dealt = deal_heads(16, 2, 3, uneven=True)
    assert list(map(len, dealt.queries)) == [6, 5, 5]
    assert dealt.kvs == ((0,), (0, 1), (1,))
    assert dealt.repeats == ((6,), (2, 3), (5,))
    assert deal_heads(9, 3, 2, uneven=True) == deal_heads(9, 3, 2)  # only where it would be refused


def test_what_cannot_keep_a_ratio_names_the_degrees_that_would():
    with pytest.raises(TensorParallelError, match=r"attn: 6 query and 2 .* 4 ways.* from \[1, 2, 3, 6\]"):
        deal_heads(6, 2, 4, where="attn")
