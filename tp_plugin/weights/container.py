"""Safetensors files written a tensor at a time, hashed on the way, and read a range at a time."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_BLOCK = 1 << 24


def dtype_name(dtype: torch.dtype) -> str:
    """How safetensors calls it. Raises ValueError for a dtype that it has no word for."""
    if dtype not in _NAMES:
        raise ValueError(f"safetensors cannot hold {dtype}")
    return _NAMES[dtype]


def dtype_named(name: str) -> torch.dtype:
    """The dtype of that safetensors name."""
    return _DTYPES[name]


@dataclasses.dataclass(frozen=True)
class Written:
    """A file's size and the sha256 of all of it."""

    bytes: int
    sha256: str


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> Written:
    """A safetensors file of tensors that may lie on any device, one of which is in memory besides at a time.

    On the disk when this returns. Raises OSError when it cannot be written.
    """
    header, end = {}, 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[key] = {"dtype": dtype_name(tensor.dtype), "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    digest, size = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as file:
        for chunk in (struct.pack("<Q", len(head)), head):
            _write(file, memoryview(chunk))
            digest.update(chunk)
            size += len(chunk)
        for tensor in tensors.values():
            flat = tensor.detach().reshape(-1).to("cpu").contiguous()
            if not flat.numel():
                continue
            data = _bytes_of(flat)
            _write(file, data)
            digest.update(data)
            size += len(data)
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def _write(file: Any, data: memoryview) -> None:
    for start in range(0, len(data), _BLOCK):
        rest = data[start : start + _BLOCK]
        while rest:
            rest = rest[file.write(rest) :]


def _bytes_of(flat: torch.Tensor) -> memoryview:
    """The memory of a contiguous 1-D tensor on the CPU."""
    return flat.view(torch.uint8).numpy().data


def digest_of(path: Path) -> str:
    """The sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TensorFile:
    """A safetensors file read by key and range; nothing is read ahead.

    Attributes:
        entries: key -> (dtype, shape).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        self._start = 8 + length
        self._offsets = {key: tuple(entry["data_offsets"]) for key, entry in header.items()}
        self.entries = {key: (dtype_named(entry["dtype"]), tuple(entry["shape"])) for key, entry in header.items()}

    def read(self, key: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Elements ``[start, stop)`` of the flattened tensor, 1-D. Raises OSError when the file ends before."""
        dtype, _ = self.entries[key]
        first, last = self._offsets[key]
        size = dtype.itemsize
        end = (last - first) // size if stop is None else stop
        found = torch.empty(end - start, dtype=dtype)
        if found.numel():
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._start + first + start * size)
                rest = _bytes_of(found)
                while rest:
                    got = file.readinto(rest)
                    if not got:
                        raise OSError(f"{self.path.name} ends before {key}")
                    rest = rest[got:]
        return found

    def whole(self, key: str) -> torch.Tensor:
        """The tensor in its shape."""
        return self.read(key).reshape(self.entries[key][1])
