"""A safetensors file written piece by piece: the header first, then bytes at their places, in any order.

The library's own writer wants every tensor of a file in memory at once. The format
(https://github.com/huggingface/safetensors#format) is eight bytes of length, a JSON header and the tensors' bytes
behind one another, so that shapes and dtypes are all one needs to know where each byte goes.
"""

from __future__ import annotations

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
_ALIGNMENT = 8


class SafetensorsFile:
    """One file, open for writing; a context manager that removes what it began when an exception leaves it.

    Args:
        path: must not exist.
        tensors: name -> (dtype, shape) of everything the file will hold, in the order of its bytes but for wide
            dtypes, which come first.
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
        # wide dtypes first, as the library writes them: then every tensor is aligned
        for name, (dtype, shape) in sorted(tensors.items(), key=lambda entry: -entry[1][0].itemsize):
            if dtype not in DTYPES:
                raise ValueError(f"{name!r} has dtype {dtype}, which safetensors files cannot hold")
            size = math.prod(shape) * dtype.itemsize
            header[name] = {"dtype": DTYPES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            self._places[name] = (dtype, offset, size)
            offset += size
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % _ALIGNMENT)
        self._start = 8 + len(text)
        self._missing = offset
        self._file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        self._put(len(text).to_bytes(8, "little") + text, 0)

    def write(self, name: str, tensor: torch.Tensor, start: int = 0) -> None:
        """Write ``tensor`` as the elements of ``name`` from ``start`` on; each element must be written once."""
        dtype, offset, size = self._places[name]
        nbytes = tensor.numel() * dtype.itemsize
        if tensor.dtype != dtype or start < 0 or start * dtype.itemsize + nbytes > size:
            raise ValueError(
                f"{tensor.numel()} elements of {tensor.dtype} do not fit at {start} of {name!r}, "
                f"{size // dtype.itemsize} elements of {dtype}"
            )
        if nbytes:
            flat = tensor.detach().to("cpu").contiguous().view(-1).view(torch.uint8)
            self._put(flat.numpy().data, self._start + offset + start * dtype.itemsize)
            self._missing -= nbytes

    def close(self) -> None:
        """Bring the file to the disk. Raises ValueError when bytes were left out."""
        if self._missing:
            raise ValueError(f"{self.path.name} was closed with {self._missing} bytes unwritten")
        os.fsync(self._file)
        os.close(self._file)

    def discard(self) -> None:
        """Give the file up and remove it."""
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
        while view:  # a write may be cut short, and no write takes more than 2 GiB
            done = os.pwrite(self._file, view[: 1 << 30], at)
            view, at = view[done:], at + done
