"""Safetensors files written piece by piece: the header first, then each tensor's bytes, in any order.

The library's writer needs every tensor of a file in memory at once. The format
(https://github.com/huggingface/safetensors#format) is eight bytes of length, a JSON header and the tensors' bytes in
sequence. Shapes and dtypes therefore give the offset of every byte.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

DTYPES: dict[torch.dtype, str] = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.complex64: "C64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint64: "U64", torch.uint32: "U32", torch.uint16: "U16", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""The format's name of each dtype."""
DTYPE_OF_NAME = {name: dtype for dtype, name in DTYPES.items()}
_ALIGNMENT = 8


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name of a dtype. Raises ValueError for a dtype without one."""
    if dtype not in DTYPES:
        raise ValueError(f"safetensors cannot hold {dtype}")
    return DTYPES[dtype]


def dtype_named(name: str) -> torch.dtype:
    """The dtype of that safetensors name."""
    return DTYPE_OF_NAME[name]


class SafetensorsFile:
    """One file, open for writing; a context manager that removes the file if the body raises.

    Attributes:
        header: the bytes before those of the tensors.

    Args:
        path: must not exist.
        tensors: name -> (dtype, shape) of every tensor. The bytes are in this order, wide dtypes first.
        metadata: strings for the header's ``__metadata__``.

    Raises:
        ValueError: a dtype that the format has no name for.
        OSError: as of opening and writing files.
    """

    def __init__(
        self,
        path: str | Path,
        tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        if sys.byteorder != "little":
            raise ValueError("safetensors files hold little-endian numbers, and this machine's are big-endian")
        self.path = Path(path)
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        self._places: dict[str, tuple[torch.dtype, int, int]] = {}
        offset = 0
        # wide dtypes first, as the library does, so that every tensor is aligned
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda entry: -entry[1][0].itemsize):
            if dtype not in DTYPES:
                raise ValueError(f"{name!r} has dtype {dtype}, which safetensors files cannot hold")
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            self._places[name] = (dtype, offset, size)
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self.header = len(text).to_bytes(8, "little") + text
        self._missing = offset
        self._file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        self._put(self.header, 0)

    def names(self) -> list[str]:
        """Names of the tensors in the order of their bytes."""
        return list(self._places)

    def write(self, name: str, tensor: torch.Tensor, start: int = 0) -> memoryview:
        """Write ``tensor`` as the elements of ``name`` from ``start`` on; each element must be written once.

        Returns:
            the bytes written, in the tensor's memory or in that of its copy on the CPU.
        """
        dtype, offset, size = self._places[name]
        nbytes = tensor.numel() * dtype.itemsize
        if tensor.dtype != dtype or start < 0 or start * dtype.itemsize + nbytes > size:
            raise ValueError(
                f"{tensor.numel()} elements of {tensor.dtype} do not fit at {start} of {name!r}, "
                f"{size // dtype.itemsize} elements of {dtype}"
            )
        if not nbytes:
            return memoryview(b"")
        data = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8).numpy().data
        self._put(data, len(self.header) + offset + start * dtype.itemsize)
        self._missing -= nbytes
        return data

    def close(self) -> None:
        """Sync the file to the disk. Raises ValueError if bytes are missing."""
        if self._missing:
            raise ValueError(f"{self.path.name} was closed with {self._missing} bytes unwritten")
        os.fsync(self._file)
        os.close(self._file)

    def discard(self) -> None:
        """Close and remove the file."""
        os.close(self._file)
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()

    def _put(self, data: bytes | memoryview, at: int) -> None:
        view = memoryview(data)
        while view:  # a write may be partial, and takes at most 2 GiB
            done = os.pwrite(self._file, view[: 1 << 30], at)
            view, at = view[done:], at + done


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor]) -> tuple[int, str]:
    """Write and sync a file of tensors on any device; one of them at a time is copied to the CPU.

    Returns:
        the file's size in bytes and its sha256.

    Raises:
        ValueError: a dtype that the format has no name for.
        OSError: the file cannot be written; nothing is left of it.
    """
    with SafetensorsFile(path, {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}) as file:
        digest, size = hashlib.sha256(file.header), len(file.header)
        for name in file.names():
            data = file.write(name, tensors[name])
            digest.update(data)
            size += len(data)
    return size, digest.hexdigest()


def digest_of(path: Path) -> str:
    """The sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
