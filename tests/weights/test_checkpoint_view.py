"""Tensors that have not been read answer like those they stand for, part by part, and read no more than that part."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from safetensors.torch import save_file

from tp_plugin.errors import TensorParallelError
from tp_plugin.weights import reader as module
from tp_plugin.weights.checkpoint_view import Unread
from tp_plugin.weights.reader import Reader
from tp_plugin.weights.sources import Stored

TENSORS = {
    "a": torch.arange(24.0).view(4, 6),
    "b": torch.arange(24.0, 48.0).view(4, 6),
    "half": torch.linspace(-3, 3, 30).view(5, 6).bfloat16(),
    "cube": torch.arange(60).view(3, 4, 5),
    "scalar": torch.tensor(7.0),
    "empty": torch.empty(0, 3),
    "flags": torch.tensor([True, False, True]),
}


@pytest.fixture
def reader(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    with Reader.open([tmp_path / "model.safetensors"]) as opened:
        yield opened


def unread(reader: Reader, name: str) -> Unread:
    return Unread(Stored(reader.shape(name), reader.dtype(name), reader, name))


def parts(shape):
    """Every part of a small tensor."""
    ranges = [[(i, j) for i in range(n) for j in range(i + 1, n + 1)] for n in shape]
    for chosen in itertools.product(*ranges):
        yield tuple(slice(start, stop) for start, stop in chosen)


@pytest.mark.parametrize("window", [1, 64, 8 << 20])
@pytest.mark.parametrize("name", TENSORS)
def test_any_part_is_read_and_no_more(reader, monkeypatch, name, window):
    monkeypatch.setattr(module, "WINDOW", window)
    monkeypatch.setattr(module, "PAGE", 16)
    whole = TENSORS[name]
    places = torch.arange(whole.numel()).view(whole.shape) * whole.itemsize + reader._entries[name].start
    assert (reader.shape(name), reader.dtype(name)) == (tuple(whole.shape), whole.dtype)
    assert torch.equal(reader.read(name), whole)
    for index in parts(whole.shape):
        before, touched = reader.bytes_read, reader.bytes_touched
        assert torch.equal(reader.read(name, index), whole[index])
        assert reader.bytes_read - before == whole[index].nbytes
        pages = {(start + byte) // 16 for start in places[index].flatten().tolist() for byte in range(whole.itemsize)}
        assert reader.bytes_touched - touched == 16 * len(pages)
        if whole.is_floating_point():
            wide = torch.full((*whole[index].shape, 2), float("nan"), dtype=torch.float64)
            reader.read_into(wide[..., 0], name, index)  # strided, and in another dtype
            assert torch.equal(wide[..., 0], whole[index].double())
            assert wide[..., 1].isnan().all()


VIEWS = {
    "stack": lambda a, b: torch.stack([a, b]),
    "stack inside": lambda a, b: torch.stack([a, b], dim=1),
    "cat": lambda a, b: torch.cat([a, b], dim=1),
    "stack and cat": lambda a, b: torch.cat([torch.stack([a, b]), torch.stack([b, a])], dim=1),
    "chunk": lambda a, b: torch.chunk(torch.cat([a, b]), 4)[2],
    "split": lambda a, b: torch.split(a, [1, 5], dim=1)[1].contiguous(),
    "transpose": lambda a, b: torch.transpose(a, 0, 1).contiguous(),
    "cast": lambda a, b: a.to(device="cpu", dtype=torch.float16),
    "select": lambda a, b: torch.stack([a, b])[1, :, 2:4],
    "unbind": lambda a, b: torch.stack(torch.stack([a, b]).unbind(1)[::2]),
    "squeeze": lambda a, b: torch.chunk(torch.stack([a, b]), 2)[1].squeeze(0),
    "unsqueeze": lambda a, b: a.unsqueeze(1),
    "detach": lambda a, b: a[...].detach().clone(),
}


@pytest.mark.parametrize("name", VIEWS)
def test_parts_of_views_are_read_and_no_more(reader, name):
    expected = VIEWS[name](TENSORS["a"], TENSORS["b"])
    found = VIEWS[name](unread(reader, "a"), unread(reader, "b"))
    assert isinstance(found, Unread)
    assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
    assert torch.equal(found.read(), expected)
    for index in parts(expected.shape):
        before = reader.bytes_read
        out = torch.empty_like(expected[index])
        found.read_into(out, index)
        assert torch.equal(out, expected[index])
        assert reader.bytes_read - before == out.numel() * 4


PUT_OFF = {
    "interleave": lambda a: a.reshape(4, 3, 2).transpose(1, 2).reshape(4, 6).contiguous(),
    "arithmetic": lambda a: 1 + a * 2,
    "steps": lambda a: a[:, ::2],
    "sorted": lambda a: torch.sort(a, descending=True)[1],
}


@pytest.mark.parametrize("name", PUT_OFF)
def test_parts_of_what_was_put_off_are_read(reader, name):
    """What we do not see through is computed of whole operands, when it is read and not before."""
    expected, found = PUT_OFF[name](TENSORS["a"]), PUT_OFF[name](unread(reader, "a"))
    assert isinstance(found, Unread)
    assert reader.bytes_read == 0
    joined = torch.cat([found, found])
    for index in parts(expected.shape):
        out = torch.empty_like(expected[index])
        joined.read_into(out, index)
        assert torch.equal(out, expected[index])


def test_a_dtype_between_rounds(reader):
    """fp32 by way of bfloat16 is what it is for a tensor that is there."""
    a = unread(reader, "half").to(torch.float32).to(torch.float8_e4m3fn)
    out = torch.empty(5, 6)
    a.read_into(out, (slice(0, 5), slice(0, 6)))
    assert torch.equal(out, TENSORS["half"].float().to(torch.float8_e4m3fn).float())


def test_nothing_changes_a_tensor_that_was_not_read(reader):
    with pytest.raises(NotImplementedError, match="would change a tensor that has not been read"):
        unread(reader, "a").add_(1)


def test_what_cannot_be_joined_is_refused(reader):
    with pytest.raises(ValueError, match="cannot be joined"):
        torch.cat([unread(reader, "a"), unread(reader, "half").float()], dim=1)
    with pytest.raises(ValueError, match="cannot be stacked"):
        torch.stack([unread(reader, "a"), unread(reader, "half")])


def test_a_tensor_in_two_files_is_refused(tmp_path):
    for name in ("one", "two"):
        save_file({"a": TENSORS["a"]}, tmp_path / f"{name}.safetensors")
    with pytest.raises(TensorParallelError, match=r"'a' is in '.*one.safetensors' and again in '.*two.safetensors'"):
        Reader.open([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])


def test_a_tensor_that_does_not_start_at_a_multiple_of_its_size(tmp_path):
    """Other writers than safetensors' own may place them so."""
    file = tmp_path / "odd.safetensors"
    entries = {"flag": ("U8", [1], [0, 1]), "a": ("F32", [4, 6], [1, 97])}
    header = {
        name: dict(zip(("dtype", "shape", "data_offsets"), entry, strict=True)) for name, entry in entries.items()
    }
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + b"\1" + TENSORS["a"].numpy().tobytes())
    with Reader.open([file]) as opened:
        for index in parts((4, 6)):
            assert torch.equal(opened.read("a", index), TENSORS["a"][index])
