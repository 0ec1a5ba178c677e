"""What an engine's checkpoint holds, written by every rank."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import groups

from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.integrations.deepspeed import alike, held
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding import state_of
from tp_plugin.weights.atomic import MARK, write_file
from tp_plugin.weights.container import dtype_name, write_tensors
from tp_plugin.weights.fragments import fragment_key
from tp_plugin.weights.gather import mesh_of, unwrapped
from tp_plugin.weights.manifest import FILE, WEIGHT, Entry, Manifest, RankFile, encode
from tp_plugin.weights.randomness import generators

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
KEPT_OF_GROUPS = ("params", "param_names")
_LIBRARIES = ("tp-plugin", "torch", "deepspeed", "transformers")


def refuse_other_parallelism(engine: Any) -> None:
    """An engine that is not sharded by us must hold whole parameters on every rank."""
    if state_of(engine.module) is not None or not dist.is_initialized():
        return
    if dist.get_world_size(groups._get_data_parallel_group()) != dist.get_world_size():
        raise TensorParallelError(
            "the engine is model parallel by other means than tp_plugin, whose checkpoints cannot hold it; remove the "
            "'tp_plugin' block from its DeepSpeed config."
        )


def named(engine: Any) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers by name, tied ones once under their first name; the very objects."""
    model = unwrapped(engine.module)
    found, seen = {}, set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def layout_of(tensor: torch.Tensor, mesh: ParallelMesh) -> ShardLayout:
    """How a parameter or buffer lies; what carries no layout is replicated."""
    layout = getattr(tensor, "tp_layout", None)
    return ShardLayout.replicated(held.local_shape(tensor), mesh.tp_size) if layout is None else layout


def write(engine: Any, directory: Path, client_state: dict, exclude_frozen: bool) -> None:
    """Every rank writes its file into ``directory``, and the first the manifest, last. A collective call.

    ``client_state`` of other ranks than the first is not looked at.
    """
    error, manifest = None, None
    tensors: dict[str, torch.Tensor] = {}
    try:
        refuse_other_parallelism(engine)
        mesh = mesh_of(unwrapped(engine.module))
        tensors, manifest = _content(engine, mesh, client_state, exclude_frozen)
    except TensorParallelError as refused:
        error = str(refused).rstrip(".")
    except Exception as failure:  # whatever it was: the other ranks are waiting
        error = f"the checkpoint cannot be written: {type(failure).__name__}: {failure}".rstrip(".").replace("\n", " ")
    agree(error)
    assert manifest is not None
    rank = dist.get_rank() if dist.is_initialized() else 0
    name, mine = f"rank_{rank:05d}.safetensors", None
    try:
        record = write_tensors(directory / name, tensors)
        mine = RankFile(tp_rank=mesh.tp_rank, dp_rank=mesh.dp_rank, bytes=record.bytes, sha256=record.sha256)
    except Exception as failure:  # whatever it was: the other ranks are waiting
        reason = getattr(failure, "strerror", None) or f"{type(failure).__name__}: {failure}"
        where = str(directory.parent / _tag(directory))
        error = f"writing {name} of the checkpoint {where!r} failed: {reason}; nothing was overwritten."
    found = [(name, mine, error)]
    if dist.is_initialized():
        found = found * dist.get_world_size()
        dist.all_gather_object(found, (name, mine, error))
    problems = dict.fromkeys(problem for _, _, problem in found if problem)
    if problems:
        raise TensorParallelError(next(iter(problems)))
    if rank == 0:
        files = {name: record for name, record, _ in found if record is not None}
        write_file(directory / FILE, dataclasses.replace(manifest, files=files).dump())


def _tag(directory: Path) -> str:
    return directory.name.removeprefix(MARK).rpartition("-")[0]


def _content(
    engine: Any, mesh: ParallelMesh, client_state: dict, exclude_frozen: bool
) -> tuple[dict[str, torch.Tensor], Manifest]:
    """This rank's tensors by key, and the manifest but for its files."""
    tensors: dict[str, torch.Tensor] = {}
    params = named(engine)
    flats, pieces = held.flats(engine, {id(tensor): name for name, tensor in params.items()})
    trained = {name for flat in flats for name in flat.names}
    layouts = {name: layout_of(tensor, mesh) for name, tensor in params.items()}
    whole = not engine.zero_optimization_stage() and not hasattr(engine.optimizer, "update_lp_params")
    for piece in pieces:
        if layouts[piece.name].owns_none(mesh.tp_rank):
            continue
        states = {WEIGHT: piece.flat.tensor, **piece.flat.elementwise()}
        # at stage 0 every data-parallel rank has all of it, and writes a share
        start, stop = _share(piece.numel, mesh) if whole else (0, piece.numel)
        for kind, tensor in states.items():
            if start < stop:
                tensors[fragment_key(kind, piece.name, piece.start + start)] = piece.of(tensor)[start:stop]
    for name, tensor in params.items():
        frozen = isinstance(tensor, torch.nn.Parameter) and exclude_frozen
        if name in trained or layouts[name].owns_none(mesh.tp_rank) or frozen:
            continue
        if hasattr(tensor, "ds_id"):
            start, stop = held.partition_range(tensor)
            mine = held.partition(tensor)[: stop - start]
        else:
            start, stop = _share(tensor.numel(), mesh)
            mine = tensor.detach().reshape(-1)[start:stop]
        if start < stop:
            tensors[fragment_key(WEIGHT, name, start)] = mine
    names: dict[int, list[str]] = {}
    for name, tensor in unwrapped(engine.module).state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    entries = {
        name: Entry(
            layout=layouts[name],
            dtype=dtype_name(tensor.dtype),
            trained=name in trained,
            buffer=not isinstance(tensor, torch.nn.Parameter),
            names=tuple(names[id(tensor)]),
            stored=name in trained or not (isinstance(tensor, torch.nn.Parameter) and exclude_frozen),
        )
        for name, tensor in params.items()
    }
    first: dict[str, torch.Tensor] = {}  # the first rank's alone
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    manifest = Manifest(
        tp=mesh.tp_size,
        dp=mesh.dp_size,
        zero=int(engine.zero_optimization_stage()),
        step=engine.global_steps,
        entries=entries,
        optimizer=_optimizer(engine, flats, first),
        engine={name: getattr(engine, name) for name in COUNTERS}
        | {"gradient_accumulation_steps": engine.gradient_accumulation_steps()},
        scheduler=None if engine.lr_scheduler is None
        else encode(engine.lr_scheduler.state_dict(), first, "the learning rate scheduler's state"),
        scaler=_scaler(engine, first),
        client=encode(client_state if is_first else None, first, "client_state"),
        model=_model(engine),
        files={},
        versions=_versions(),
    )  # fmt: skip
    if is_first:
        tensors |= first
    return tensors | generators(), manifest


def _share(numel: int, mesh: ParallelMesh) -> tuple[int, int]:
    """This data-parallel rank's part of what all of them hold."""
    return numel * mesh.dp_rank // mesh.dp_size, numel * (mesh.dp_rank + 1) // mesh.dp_size


def _optimizer(engine: Any, flats: list[held.Flat], tensors: dict[str, torch.Tensor]) -> Any:
    base = held.base_optimizer(engine)
    if base is None:
        return None
    blocks = sorted({key for flat in flats for key in flat.in_blocks()})
    if blocks:
        raise TensorParallelError(
            f"the optimizer {type(base).__name__} keeps {blocks[0]!r} in blocks that other shapes would cut elsewhere, "
            "so its state cannot go into a checkpoint; use an optimizer whose state has a number for every element "
            "(AdamW, Adam, SGD, Lion, Adagrad)."
        )
    described = []
    for index, (group, names) in enumerate(held.group_names(engine, flats)):
        options = {key: value for key, value in group.items() if key not in KEPT_OF_GROUPS}
        described.append(
            {
                "options": encode(options, tensors, f"parameter group {index}"),
                "names": names,
                "scalars": [
                    {"names": flat.names, "state": encode(flat.scalars(), tensors, f"the state of {flat.names[0]}")}
                    for flat in flats
                    if flat.group == index and flat.state
                ],
            }
        )
    return {
        **alike.described(base),
        "elementwise": sorted({key for flat in flats for key in flat.elementwise()}),
        "stateless": [name for flat in flats if not flat.state for name in flat.names],
        "groups": described,
    }


def _scaler(engine: Any, tensors: dict[str, torch.Tensor]) -> Any:
    found = {}
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    if scaler is not None:
        found["loss_scaler"] = {k: v for k, v in vars(scaler).items() if type(v) in (bool, int, float)}
    autocast = getattr(engine.optimizer, "torch_autocast_gradscaler", None)
    if autocast is not None:
        found["autocast"] = autocast.state_dict()
    return encode(found, tensors, "the loss scaler")


def _model(engine: Any) -> dict[str, Any]:
    """What an export needs: the class, the HF config and the generation config."""
    model: Any = unwrapped(engine.module)
    found: dict[str, Any] = {"class": type(model).__name__, "module": type(model).__module__}
    for name in ("config", "generation_config"):
        config: Any = getattr(model, name, None)
        if hasattr(config, "to_json_string"):
            found[name] = json.loads(config.to_json_string())
    return found


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
