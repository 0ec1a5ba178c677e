"""The manifest of an engine checkpoint: the model, the degrees it was saved at, and the files.

An engine checkpoint is a directory of ``manifest.json`` and safetensors files, one a rank. A file holds *fragments*:
ranges ``[start, stop)`` of parameters' flattened tensor-parallel shards that the rank had. There is one for each kind:
the weight (the master weight if there is one) and every elementwise state of the optimizer. A fragment's key is
``kind|name|start``; the manifest gives the tensor-parallel rank of each file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch

from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import ShardLayout
from tp_plugin.weights.safetensors_file import dtype_name, dtype_named

FILE = "manifest.json"
FORMAT, VERSION = "tp_plugin.checkpoint", 1
WEIGHT = "weight"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A parameter or buffer.

    Attributes:
        layout: of the full tensor on the tensor-parallel ranks.
        dtype: safetensors' name of its dtype in the model; a fragment has the dtype of the master weight.
        trained: True if the optimizer has it.
        buffer: True for a buffer.
        names: all its names in the state dict, first the one of its fragments.
        stored: False for frozen parameters that were omitted on request.
    """

    layout: ShardLayout
    dtype: str
    trained: bool
    buffer: bool
    names: tuple[str, ...]
    stored: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankFile:
    """A rank's file: the rank's coordinates, the file's size and sha256."""

    tp_rank: int
    dp_rank: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of ``manifest.json``.

    Attributes:
        step: number of optimizer steps.
        entries: name -> parameter or buffer, in the order of the model.
        optimizer: class name, ``elementwise`` states, ``groups`` with their options, names and scalar states; None
            without an optimizer.
        engine: counters; scheduler: its state dict; scaler: of the loss; client: ``client_state``; each encoded.
        model: class, HF config and generation config, as JSON.
        files: file name -> size, hash, rank.
        versions: of the libraries at the time of writing.
    """

    tp: int
    dp: int
    zero: int
    step: int
    entries: Mapping[str, Entry]
    optimizer: Any
    engine: Mapping[str, Any]
    scheduler: Any
    scaler: Any
    client: Any
    model: Mapping[str, Any]
    files: Mapping[str, RankFile]
    versions: Mapping[str, str]

    def shape(self) -> str:
        """The topology in a message: ``tp=2 dp=2 ZeRO-1``."""
        return f"tp={self.tp} dp={self.dp} ZeRO-{self.zero}"

    def dump(self) -> bytes:
        """The file's bytes, with a hash of the content."""
        content = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        content["entries"] = {name: _entry_json(entry) for name, entry in self.entries.items()}
        content["files"] = {name: vars(file) for name, file in self.files.items()}
        text = json.dumps(content, allow_nan=False)
        head = {"format": FORMAT, "version": VERSION, "sha256": _digest(text)}
        return f"{json.dumps(head)[:-1]}, \n{json.dumps('content')}: {text}}}".encode()

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read the manifest of a checkpoint.

        Raises:
            TensorParallelError: it is missing, damaged, or of another format or version.
        """
        path = directory / FILE
        try:
            head = json.loads(path.read_bytes())
            if not isinstance(head, dict) or head.get("format") != FORMAT:
                raise TensorParallelError(f"{str(path)!r} is not the manifest of a tp_plugin checkpoint.")
            if head.get("version") != VERSION:
                raise TensorParallelError(
                    f"{str(directory)!r} is a checkpoint of format version {head.get('version')}, and this tp_plugin "
                    f"reads version {VERSION}; load it with the tp_plugin that wrote it."
                )
            content = head["content"]
            if _digest(json.dumps(content, allow_nan=False)) != head["sha256"]:
                raise TensorParallelError(f"the checkpoint {str(directory)!r} is damaged: {FILE} has changed.")
            content["entries"] = {name: _entry(found) for name, found in content["entries"].items()}
            content["files"] = {name: RankFile(**found) for name, found in content["files"].items()}
            return cls(**content)
        except FileNotFoundError as failure:
            raise TensorParallelError(
                f"{str(directory)!r} has no {FILE}, so it is not a whole checkpoint."
            ) from failure
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as failure:
            if isinstance(failure, TensorParallelError):
                raise
            raise TensorParallelError(
                f"the checkpoint {str(directory)!r} is damaged: {FILE} cannot be read ({type(failure).__name__})."
            ) from failure


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _entry_json(entry: Entry) -> dict[str, Any]:
    layout = {"shape": entry.layout.shape, "dim": entry.layout.dim}
    if entry.layout.dim is not None:
        layout["parts"] = entry.layout.parts  # type: ignore[assignment]
    flags = {name: True for name in ("trained", "buffer") if getattr(entry, name)}
    flags |= {} if entry.stored else {"stored": False}
    return layout | {"dtype": entry.dtype, "names": entry.names} | flags


def _entry(found: Mapping[str, Any]) -> Entry:
    parts = tuple(tuple((a, b) for a, b in part) for part in found.get("parts", [[]]))
    return Entry(
        layout=ShardLayout(tuple(found["shape"]), found["dim"], parts),
        dtype=found["dtype"],
        trained=found.get("trained", False),
        buffer=found.get("buffer", False),
        names=tuple(found["names"]),
        stored=found.get("stored", True),
    )


# ---- Python values as JSON and tensors ------------------------------------------------------------------------------


def encode(value: Any, tensors: dict[str, torch.Tensor], where: str) -> Any:
    """Encode a Python value as JSON; its tensors are added to ``tensors`` under keys that begin with ``where``.

    Raises:
        TensorParallelError: neither JSON nor safetensors can hold a part of it, which the message names.
    """
    if isinstance(value, torch.Tensor) and not value.dim() and not value.is_complex():
        return {"number": [dtype_name(value.dtype), encode(value.item(), tensors, where)]}
    if isinstance(value, torch.Tensor):
        key = f"{where}|{len(tensors)}"
        tensors[key] = value.detach()
        return {"tensor": key}
    if isinstance(value, numpy.ndarray) and value.dtype.kind in "biuf":
        return {"array": encode(torch.from_numpy(value), tensors, where)["tensor"]}
    if isinstance(value, numpy.generic):
        return encode(value.item(), tensors, where)
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        # a list keeps the order, and keys that are not strings
        pairs = [[encode(key, tensors, where), encode(item, tensors, f"{where}.{key}")] for key, item in value.items()]
        return {"map": pairs}
    if isinstance(value, tuple | list):
        items = [encode(item, tensors, f"{where}[{index}]") for index, item in enumerate(value)]
        return {"tuple": items} if isinstance(value, tuple) else items
    for plain in (int, float, str):
        if isinstance(value, plain):  # an enumeration's member, say
            return encode(plain(value), tensors, where)
    raise TensorParallelError(
        f"{where} holds a {type(value).__name__}, and a checkpoint holds tensors, numbers, strings, lists and "
        "dictionaries only (no pickles); put its state in such a form."
    )


def decode(value: Any, tensor: Any) -> Any:
    """Invert :func:`encode`; ``tensor(key)`` reads a tensor."""
    if isinstance(value, list):
        return [decode(item, tensor) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return tensor(content)
    if kind == "number":
        return torch.tensor(decode(content[1], tensor), dtype=dtype_named(content[0]))
    if kind == "array":
        return tensor(content).numpy()
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(decode(item, tensor) for item in content)
    return {_hashable(decode(key, tensor)): decode(item, tensor) for key, item in content}


def _hashable(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key
