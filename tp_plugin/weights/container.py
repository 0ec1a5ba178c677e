"""Safetensors files written a tensor at a time and hashed on the way."""

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

from tp_plugin.weights.reader import DTYPES
from tp_plugin.weights.safetensors_file import DTYPES as NAMES

_BLOCK = 1 << 24


def dtype_name(dtype: torch.dtype) -> str:
    """How safetensors calls it. Raises ValueError for a dtype that it has no word for."""
    if dtype not in NAMES:
        raise ValueError(f"safetensors cannot hold {dtype}")
    return NAMES[dtype]


def dtype_named(name: str) -> torch.dtype:
    """The dtype of that safetensors name."""
    return DTYPES[name]


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
