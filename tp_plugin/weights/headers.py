"""Headers of safetensors files, and the mapped tensors of pickles."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping

import torch

from tp_plugin.errors import TensorParallelError, reason_of
from tp_plugin.weights.safetensors_file import DTYPE_OF_NAME

_LONGEST_HEADER = 100_000_000  # as safetensors itself has it


@dataclasses.dataclass(frozen=True)
class Entry:
    """A tensor in ``file``, from byte ``start`` on."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int


def header_of(file: str) -> dict[str, Entry]:
    """The tensors of a safetensors file, once its header fits its size."""
    cut = f"{file!r} is cut short or damaged"
    remedy = "copy or download it again."
    try:
        size = os.path.getsize(file)
        with open(file, "rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise TensorParallelError(f"{cut}: a header of {length} bytes in a file of {size}; {remedy}")
            text = opened.read(length)
    except OSError as failure:
        raise TensorParallelError(f"cannot read {file!r}: {failure.strerror or failure}; {remedy}") from failure
    entries, end = {}, 0
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        for name, one in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            if one["dtype"] not in DTYPE_OF_NAME:
                raise TensorParallelError(
                    f"tensor {name!r} of {file!r} is of dtype {one['dtype']!r}, which cannot be trained; name a "
                    "checkpoint of floating-point weights."
                )
            dtype, shape, (start, stop) = DTYPE_OF_NAME[one["dtype"]], tuple(one["shape"]), one["data_offsets"]
            if start != end or stop - start != math.prod(shape) * dtype.itemsize or min(shape, default=0) < 0:
                raise TensorParallelError(f"{cut}: tensor {name!r} has other offsets than its shape needs; {remedy}")
            entries[name], end = Entry(file, dtype, shape, 8 + length + start), stop
    except (ValueError, KeyError, TypeError, AttributeError) as failure:
        if isinstance(failure, TensorParallelError):
            raise
        raise TensorParallelError(f"{cut}: its header cannot be read; {remedy}") from failure
    if 8 + length + end != size:
        raise TensorParallelError(f"{cut}: {size} bytes where its header says {8 + length + end}; {remedy}")
    return entries


def tensors_of_pickle(file: str) -> dict[str, torch.Tensor]:
    """The tensors of a pickle, mapped: their pages are read when they are copied."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as failure:  # of many kinds: pickle's, zip's, torch's
        reason = reason_of(failure) or type(failure).__name__
        raise TensorParallelError(
            f"cannot read {file!r} as a file of plain tensors ({reason}); convert it to safetensors with "
            "save_pretrained where you trust it."
        ) from failure
    if not isinstance(found, Mapping):
        raise TensorParallelError(f"{file!r} holds a {type(found).__name__} where a state dict was expected.")
    return {str(name): value for name, value in found.items() if isinstance(value, torch.Tensor)}
