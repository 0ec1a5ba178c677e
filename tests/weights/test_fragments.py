"""Any shard of any layout from the fragments of any other, without a process group."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.stored import stored
from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import ShardLayout
from tp_plugin.weights.fragments import Fragments, fragment_key
from tp_plugin.weights.manifest import WEIGHT, Manifest, RankFile, decode, encode
from tp_plugin.weights.reader import Reader
from tp_plugin.weights.safetensors_file import digest_of, write_tensors


@st.composite
def layouts(draw, shape: tuple[int, ...]) -> ShardLayout:
    """Even, packed, by heads with replicas, replicated; on one to four ranks, along any dimension."""
    ranks = draw(st.integers(1, 4))
    dim = draw(st.integers(0, len(shape) - 1))
    size = shape[dim]
    kind = draw(st.sampled_from(["even", "packed", "units", "replicated", "uneven"]))
    if kind == "even":
        return ShardLayout.even(shape, dim, ranks)
    if kind == "uneven":
        cuts = sorted(draw(st.lists(st.integers(0, size), min_size=ranks - 1, max_size=ranks - 1)))
        return ShardLayout.uneven(shape, dim, [b - a for a, b in zip([0, *cuts], [*cuts, size], strict=True)])
    if kind == "packed":
        cut = draw(st.integers(1, size - 1))
        blocks = [ShardLayout.even((n,), 0, ranks) for n in (cut, size - cut)]
        return ShardLayout.packed(shape, dim, blocks)
    if kind == "units":
        heads = [sorted(draw(st.sets(st.integers(0, size // 2 - 1), min_size=0))) for _ in range(ranks)]
        lost = set(range(size // 2)) - {head for held in heads for head in held}
        heads[draw(st.integers(0, ranks - 1))] += sorted(lost)
        heads = [draw(st.permutations(sorted(set(held)))) for held in heads]
        return ShardLayout.units(shape, dim, 2, heads)
    return ShardLayout.replicated(shape, ranks)


SHAPE = st.tuples(st.sampled_from([2, 4]), st.sampled_from([4, 6, 8, 12]), st.integers(2, 3).map(lambda n: 2 * n))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), shape=SHAPE.map(lambda shape: shape[1:]))
def test_every_shard_of_every_layout_comes_from_every_other(data, shape):
    source, target = data.draw(layouts(shape)), data.draw(layouts(shape))
    full = torch.arange(torch.tensor(shape).prod().item(), dtype=torch.float32).reshape(shape)
    cuts = data.draw(st.lists(st.floats(0, 1), max_size=2))
    with tempfile.TemporaryDirectory() as folder:
        found = stored(Path(folder), full, source, cuts)
        assert torch.equal(found.full(WEIGHT, "a.weight"), full)
        for rank in range(target.ranks):
            wanted = target.shard(full, rank).reshape(-1)
            start, stop = sorted(data.draw(st.integers(0, wanted.numel())) for _ in range(2))
            part = found.flat(WEIGHT, "a.weight", target, rank, start, stop)
            assert torch.equal(part, wanted[start:stop])


@settings(max_examples=150, deadline=None)
@given(data=st.data(), shape=SHAPE)
def test_each_element_is_taken_once_and_from_its_owner(data, shape):
    source, target = data.draw(layouts(shape)), data.draw(layouts(shape))
    full = torch.arange(1, torch.tensor(shape).prod().item() + 1, dtype=torch.float32).reshape(shape)
    for rank in range(target.ranks):
        count, shard = torch.zeros(target.local_shape(rank)), torch.zeros(target.local_shape(rank))
        for other, theirs, ours in target.taken_from(rank, source):
            count[ours] += 1
            shard[ours] = source.shard(full, other)[theirs]
            assert not source.owns_none(other)
        assert torch.equal(count, torch.ones_like(count))
        assert torch.equal(shard, target.shard(full, rank))


def test_another_tensors_layout_is_refused():
    with pytest.raises(ValueError, match="is not one of shape"):
        ShardLayout.even((4, 4), 0, 2).taken_from(0, ShardLayout.even((4, 6), 0, 2))


def test_a_hole_is_found(tmp_path):
    layout = ShardLayout.even((8, 4), 0, 2)
    stored(tmp_path, torch.zeros(8, 4), layout, [0.5])
    name = "rank_1_1.safetensors"
    (tmp_path / name).unlink()
    size, sha256 = write_tensors(tmp_path / name, {fragment_key(WEIGHT, "a.weight", 9): torch.zeros(7)})
    manifest = Manifest.load(tmp_path)
    manifest.files[name] = RankFile(tp_rank=1, dp_rank=1, bytes=size, sha256=sha256)  # type: ignore[index]
    with pytest.raises(TensorParallelError, match="hold 8 of the 16 elements of weight of"):
        Fragments(tmp_path, manifest)


def test_only_the_range_asked_for_is_read(tmp_path, monkeypatch):
    layout = ShardLayout.even((64, 64), 0, 2)
    found = stored(tmp_path, torch.randn(64, 64), layout, [0.5])
    asked = []
    read = Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, key, index=None: asked.append(index) or read(self, key, index))
    found.flat(WEIGHT, "a.weight", layout, 1, 100, 130)
    assert asked == [(slice(100, 130),)]


# ---- files and values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool])
def test_files_are_ordinary_safetensors(tmp_path, dtype):
    from safetensors.torch import load_file

    tensors = {"a": torch.arange(12).reshape(3, 4).to(dtype), "empty": torch.empty(0, 3, dtype=dtype)}
    tensors["a view"] = tensors["a"].t()[1:]
    path = tmp_path / "x.safetensors"
    assert write_tensors(path, tensors) == (path.stat().st_size, digest_of(path))
    plain = load_file(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert torch.equal(plain[name], tensor)


def test_values_come_back_as_they_were():
    value = {
        "step": torch.tensor(3.0), "lr": 1e-4, "betas": (0.9, 0.999), 7: None, "nan": float("inf"), "on": True,
        "nested": [{"tensor": torch.arange(4)}, ("a", [])], (1, "b"): "tuple key",
    }  # fmt: skip
    tensors: dict[str, torch.Tensor] = {}
    back = decode(encode(value, tensors, "x"), tensors.__getitem__)
    assert torch.equal(back["nested"][0].pop("tensor"), value["nested"][0].pop("tensor"))  # type: ignore[index]
    assert back == value
    assert back["step"].dtype == torch.float32
    assert type(back["betas"]) is tuple


def test_what_json_cannot_hold_is_named():
    with pytest.raises(TensorParallelError, match=r"client_state.a\[1\] holds a set, and a checkpoint holds"):
        encode({"a": [1, {2}]}, {}, "client_state")
