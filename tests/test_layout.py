"""ShardLayout: shards put together are the full tensor; every index has one owner."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tp_plugin.layout import ShardLayout, balanced


@st.composite
def layouts(draw) -> ShardLayout:
    """Even, uneven, packed, per-head and replicated-head layouts of 1 to 3 dimensions on 1 to 5 ranks."""
    ranks = draw(st.integers(1, 5))
    dims = draw(st.integers(1, 3))
    dim = draw(st.integers(0, dims - 1))
    shape = [draw(st.integers(1, 4)) for _ in range(dims)]
    kind = draw(st.sampled_from(["even", "uneven", "packed", "heads", "replicated"]))
    if kind == "replicated":
        return ShardLayout.replicated(shape, ranks)
    if kind == "even":
        unit = draw(st.integers(1, 3))
        shape[dim] = unit * draw(st.integers(1, 9))
        return ShardLayout.even(shape, dim, ranks, unit=unit)
    if kind == "uneven":
        sizes = [draw(st.integers(0, 4)) for _ in range(ranks)]
        sizes[draw(st.integers(0, ranks - 1))] += 1
        shape[dim] = sum(sizes)
        return ShardLayout.uneven(shape, dim, sizes)
    if kind == "packed":
        parts = [draw(st.integers(1, 9)) for _ in range(draw(st.integers(1, 3)))]
        shape[dim] = sum(parts)
        return ShardLayout.packed(shape, dim, [ShardLayout.even([n], 0, ranks) for n in parts])
    heads, unit = draw(st.integers(1, 6)), draw(st.integers(1, 3))
    held = [sorted(draw(st.sets(st.integers(0, heads - 1)))) for _ in range(ranks)]
    missing = set(range(heads)) - set(itertools.chain.from_iterable(held))
    held[0] = sorted(set(held[0]) | missing)
    shape[dim] = heads * unit
    return ShardLayout.units(shape, dim, unit, held)


@given(layouts())
def test_shards_put_together_are_the_full_tensor(layout):
    full = torch.randn(layout.shape)
    shards = [layout.shard(full, rank) for rank in range(layout.ranks)]
    for rank, shard in enumerate(shards):
        assert tuple(shard.shape) == layout.local_shape(rank)
    assert torch.equal(layout.unshard(shards), full)


@given(layouts())
def test_slices_read_what_shard_cuts(layout):
    full = torch.randn(layout.shape)
    for rank in range(layout.ranks):
        pieces = [full[index] for index in layout.slices(rank)]
        read = torch.cat(pieces, layout.dim or 0) if pieces else full.new_empty(layout.local_shape(rank))
        assert torch.equal(read, layout.shard(full, rank))


@given(layouts(), st.data())
def test_rows_are_the_layout_of_a_run_of_rows(layout, data):
    full = torch.randn(layout.shape)
    start = data.draw(st.integers(0, layout.shape[0] - 1))
    stop = data.draw(st.integers(start + 1, layout.shape[0]))
    rows = layout.rows(start, stop)
    shards = [
        torch.cat([layout.shard(full, rank)[a:b] for a, b in layout.local_rows(rank, start, stop)] or [full[:0]])
        for rank in range(layout.ranks)
    ]
    shards = [shard.reshape(rows.local_shape(rank)) for rank, shard in enumerate(shards)]
    assert all(torch.equal(shard, rows.shard(full[start:stop], rank)) for rank, shard in enumerate(shards))
    assert torch.equal(rows.unshard(shards), full[start:stop])


@given(layouts())
def test_every_index_has_exactly_one_owner(layout):
    if layout.dim is None:
        assert [layout.owns_all(r) for r in range(layout.ranks)] == [r == 0 for r in range(layout.ranks)]
        return
    index = torch.arange(layout.shape[layout.dim])
    line = ShardLayout((len(index),), 0, layout.parts)
    owned = []
    for rank in range(layout.ranks):
        shard = line.shard(index, rank)
        for start, stop, local in layout.owned(rank):
            assert torch.equal(shard[local : local + stop - start], index[start:stop])
            owned += range(start, stop)
        assert layout.owns_none(rank) == (not layout.owned(rank))
    assert sorted(owned) == index.tolist()


@given(layouts())
def test_shared_is_what_more_than_one_rank_holds(layout):
    if layout.dim is None:
        return
    holders = [set() for _ in range(layout.shape[layout.dim])]
    for rank, intervals in enumerate(layout.parts):
        for start, stop in intervals:
            for i in range(start, stop):
                holders[i].add(rank)
    shared = {i for i, who in enumerate(holders) if len(who) > 1}
    for rank in range(layout.ranks):
        mine = {i for start, stop, _ in layout.shared(rank) for i in range(start, stop)}
        assert mine == {i for i in shared if rank in holders[i]}
    assert {i for start, stop in layout.shared_intervals() for i in range(start, stop)} == shared


def test_balanced_gives_the_first_ranks_one_more():
    assert balanced(10, 4) == [3, 3, 2, 2]
    assert ShardLayout.even((12, 5), 0, 5, unit=2).parts == (((0, 4),), ((4, 6),), ((6, 8),), ((8, 10),), ((10, 12),))


def test_packed_keeps_each_block_together():
    gate_up = ShardLayout.packed((12, 4), 0, [ShardLayout.even((6, 4), 0, 2), ShardLayout.even((6, 4), 0, 2)])
    assert gate_up.parts == (((0, 3), (6, 9)), ((3, 6), (9, 12)))
    odd = ShardLayout.packed((11, 4), 0, [ShardLayout.uneven((5, 4), 0, [3, 2]), ShardLayout.even((6, 4), 0, 2)])
    assert odd.parts == (((0, 3), (5, 8)), ((3, 5), (8, 11)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShardLayout((4,), 0, (((0, 2),), ((3, 4),))), "held by no rank"),
        (lambda: ShardLayout((4,), 0, (((0, 3), (2, 4)),)), "an index twice"),
        (lambda: ShardLayout((4,), 0, (((0, 5),),)), "outside"),
        (lambda: ShardLayout((4,), 1, (((0, 4),),)), "not a dimension"),
        (lambda: ShardLayout.uneven((4,), 0, [1, 2]), "add up"),
        (lambda: ShardLayout.even((5,), 0, 2, unit=2), "multiple of the unit"),
        (lambda: ShardLayout.even((4,), 0, 2).unshard([torch.zeros(2)]), "expected 2 shards"),
        (lambda: ShardLayout.even((4,), 0, 2).shard(torch.zeros(5), 0), "full tensor of shape"),
    ],
)
def test_impossible_layouts_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
