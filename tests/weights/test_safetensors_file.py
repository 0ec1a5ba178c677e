"""Files written piece by piece are what the safetensors library writes and reads."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tp_plugin.weights.safetensors_file import DTYPES, SafetensorsFile


def made(dtype, shape):
    bits = torch.randint(0, 2 if dtype is torch.bool else 64, shape)
    return bits.to(dtype)


@st.composite
def contents(draw):
    """Names, dtypes and shapes; empty tensors and scalars among them."""
    count = draw(st.integers(1, 5))
    shapes = st.lists(st.integers(0, 5), max_size=3)
    return {f"tensor.{i}": made(draw(st.sampled_from(list(DTYPES))), draw(shapes)) for i in range(count)}


@given(contents(), st.integers(1, 4), st.booleans())
def test_pieces_in_any_order_make_the_file(tmp_path_factory, tensors, piece, backwards):
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    with SafetensorsFile(path, {n: (t.dtype, t.shape) for n, t in tensors.items()}, {"format": "pt"}) as file:
        pieces = [(n, i, t.reshape(-1)[i : i + piece]) for n, t in tensors.items() for i in range(0, t.numel(), piece)]
        for name, start, elements in reversed(pieces) if backwards else pieces:
            file.write(name, elements, start)
    found = load_file(path)
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_the_header_is_what_the_library_writes(tmp_path):
    tensors = {"a": torch.rand(3, 2), "b": torch.arange(4)}
    save_file(tensors, tmp_path / "theirs", {"format": "pt"})
    with SafetensorsFile(tmp_path / "ours", {n: (t.dtype, t.shape) for n, t in tensors.items()}, {"format": "pt"}) as f:
        for name, tensor in tensors.items():
            f.write(name, tensor)

    def header(path):
        data = path.read_bytes()
        return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])

    ours, theirs = header(tmp_path / "ours"), header(tmp_path / "theirs")
    for entry in (ours, theirs):
        for name in tensors:
            entry[name].pop("data_offsets")  # the library orders by dtype
    assert ours == theirs


def test_a_file_with_a_hole_is_refused_and_removed(tmp_path):
    with (
        pytest.raises(ValueError, match="closed with 8 bytes unwritten"),
        SafetensorsFile(tmp_path / "a", {"a": (torch.float32, (4,))}) as file,
    ):
        file.write("a", torch.zeros(2))
    file.discard()
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(("elements", "start"), [(torch.zeros(3), 2), (torch.zeros(4).half(), 0), (torch.zeros(1), -1)])
def test_what_does_not_fit_is_refused(tmp_path, elements, start):
    with (
        pytest.raises(ValueError, match="do not fit at"),
        SafetensorsFile(tmp_path / "a", {"a": (torch.float32, (4,))}) as file,
    ):
        file.write("a", elements, start)
    assert not (tmp_path / "a").exists(), "a file that was given up stays behind"
