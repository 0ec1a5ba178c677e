"""The same model, settings and libraries on every rank, or one sentence that names what differs, and where.

Hosts have disks and environments of their own. With another file on one of them, shards of two models would be trained
as one, or replicas of two models averaged, without an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import torch.distributed as dist
from torch import nn

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError
from tp_plugin.plans.from_transformers import parts_of

LIBRARIES = ("tp-plugin", "torch", "deepspeed", "accelerate", "transformers", "peft", "trl", "safetensors")
NAMES_OF_PLACES = ("name_or_path", "transformers_version", "commit_hash", "path", "dir")
"""Ends of the names of settings in which hosts may differ: places, and who wrote them."""
_LONGEST = 90
Facts = Mapping[str, Any]
"""Values that must be the same, by a name for the message; compared as JSON, or as text."""


def require_same(facts: Facts) -> None:
    """Raise TensorParallelError on every rank unless all ranks pass the same ``facts``; collective over the world.

    One hash a rank is exchanged where they are the same.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    mine = {name: _as_json(value) for name, value in facts.items()}
    hashes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).digest())
    if all(other == hashes[0] for other in hashes):
        return
    of_first = [mine]
    dist.broadcast_object_list(of_first, src=0)
    apart = [name for name in {**of_first[0], **mine} if of_first[0].get(name) != mine.get(name)]
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (socket.gethostname(), apart, mine.get(apart[0]) if apart else None))
    rank, (host, names, value) = next((rank, one) for rank, one in enumerate(found) if one[1])
    several = len({one[0] for one in found}) > 1
    more = f" ({len(names) - 1} more differ)" if len(names) > 1 else ""
    raise TensorParallelError(
        f"{names[0]} is {_shown(of_first[0].get(names[0]))} on rank 0{f' (host {found[0][0]})' if several else ''} and "
        f"{_shown(value)} on rank {rank}{f' (host {host})' if several else ''}{more}; give every rank the same files, "
        "settings and libraries."
    )


def facts_of(model: nn.Module, config: TensorParallelConfig) -> dict[str, Any]:
    """Return settings of a model that will be sharded, of its adapters, our options, and versions of libraries.

    Parameters are compared elsewhere: by content in a checkpoint, by fingerprints in memory.
    """
    facts: dict[str, Any] = {f"the version of {name}": version for name, version in _versions()}
    facts |= flattened(dataclasses.asdict(config), "of tp_plugin's options")
    for scope, part in parts_of(model).items():
        where = f"of {scope or 'the model'}"
        for name in ("config", "generation_config"):
            said: Any = getattr(part, name, None)
            if hasattr(said, "to_dict"):
                facts |= flattened(said.to_dict(), f"in the {name} {where}")
    for scope, module in model.named_modules():
        adapters = getattr(module, "peft_config", None)
        for name, said in adapters.items() if isinstance(adapters, Mapping) else ():
            if dataclasses.is_dataclass(said) and not isinstance(said, type):
                where = f"of the adapter {name!r}{f' of {scope}' if scope else ''}"
                facts |= flattened({field.name: getattr(said, field.name) for field in dataclasses.fields(said)}, where)
    return facts


def flattened(settings: Mapping[str, Any], where: str, above: str = "") -> dict[str, Any]:
    """Settings of several levels by dotted names, without those of :data:`NAMES_OF_PLACES`."""
    facts: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{above}{key}"
        if name.endswith(NAMES_OF_PLACES):
            continue
        if isinstance(value, Mapping) and value:
            facts |= flattened(value, where, f"{name}.")
        else:
            facts[f"{name} {where}"] = sorted(map(str, value)) if isinstance(value, set | frozenset) else value
    return facts


def _versions() -> Iterator[tuple[str, str]]:
    for name in LIBRARIES:
        try:
            yield name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue


def _as_json(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, default=_text)
    except (TypeError, ValueError):  # keys that are no strings or of several types: no rank may raise alone
        return _text(value)


def _text(value: Any) -> str:
    """The text of a value that JSON does not have: without the addresses of objects, which differ between processes."""
    if isinstance(value, set | frozenset):
        return str(sorted(map(str, value)))
    text = str(value)
    return type(value).__qualname__ if " at 0x" in text else text


def _shown(value: str | None) -> str:
    if value is None:
        return "not set"
    value = value.strip('"')
    return value if len(value) <= _LONGEST else f"{value[:_LONGEST]}..."
