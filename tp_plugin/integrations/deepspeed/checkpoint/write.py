"""The content of an engine's checkpoint, written by every rank."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tp_plugin.errors import TensorParallelError, agree
from tp_plugin.integrations import zero3
from tp_plugin.integrations.deepspeed.checkpoint import optimizer_compat
from tp_plugin.integrations.deepspeed.checkpoint.optimizer_fragments import EngineState
from tp_plugin.mesh import ParallelMesh
from tp_plugin.weights.atomic import MARK, write_file
from tp_plugin.weights.fragments import fragment_key
from tp_plugin.weights.gather import unwrapped
from tp_plugin.weights.manifest import FILE, WEIGHT, Entry, Manifest, RankFile, encode
from tp_plugin.weights.rng_state import generators
from tp_plugin.weights.safetensors_file import dtype_name, write_tensors

COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
KEPT_OF_GROUPS = ("params", "param_names")
_LIBRARIES = ("tp-plugin", "torch", "deepspeed", "transformers")


def write(engine: Any, directory: Path, client_state: dict, exclude_frozen: bool) -> None:
    """Write each rank's file into ``directory``, and at last, on rank 0, the manifest. A collective call.

    ``client_state`` is rank 0's.
    """
    error, manifest = None, None
    try:
        state = EngineState.of(engine)
        tensors, manifest = _content(engine, state, client_state, exclude_frozen)
    except TensorParallelError as refused:
        error = str(refused).rstrip(".")
    except Exception as failure:  # the other ranks are waiting
        error = f"the checkpoint cannot be written: {type(failure).__name__}: {failure}".rstrip(".").replace("\n", " ")
    agree(error)
    assert manifest is not None
    rank = dist.get_rank() if dist.is_initialized() else 0
    name, mine = f"rank_{rank:05d}.safetensors", None
    try:
        size, sha256 = write_tensors(directory / name, tensors)
        mine = RankFile(tp_rank=state.mesh.tp_rank, dp_rank=state.mesh.dp_rank, bytes=size, sha256=sha256)
    except Exception as failure:  # the other ranks are waiting
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
    engine: Any, state: EngineState, client_state: dict, exclude_frozen: bool
) -> tuple[dict[str, torch.Tensor], Manifest]:
    """This rank's tensors by key, and the manifest without its files."""
    names: dict[int, list[str]] = {}
    for name, tensor in unwrapped(engine.module).state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    trained = state.trained()
    left_out = {n for n, t in state.params.items() if exclude_frozen and n not in trained and _is_parameter(t)}
    entries = {
        name: Entry(
            layout=state.layouts[name],
            dtype=dtype_name(tensor.dtype),
            trained=name in trained,
            buffer=not _is_parameter(tensor),
            names=tuple(names[id(tensor)]),
            stored=name not in left_out,
        )
        for name, tensor in state.params.items()
    }
    tensors = _trained_fragments(engine, state) | _other_fragments(state, trained | left_out)
    first: dict[str, torch.Tensor] = {}  # written by rank 0 only
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    scheduler = engine.lr_scheduler
    manifest = Manifest(
        tp=state.mesh.tp_size,
        dp=state.mesh.dp_size,
        zero=int(engine.zero_optimization_stage()),
        step=engine.global_steps,
        entries=entries,
        optimizer=_optimizer(state, first),
        engine={name: getattr(engine, name) for name in COUNTERS}
        | {"gradient_accumulation_steps": engine.gradient_accumulation_steps()},
        scheduler=None
        if scheduler is None
        else encode(scheduler.state_dict(), first, "the learning rate scheduler's state"),
        scaler=_scaler(engine, first),
        client=encode(client_state if is_first else None, first, "client_state"),
        model=_model(engine),
        files={},
        versions=_versions(),
    )
    if is_first:
        tensors |= first
    return tensors | generators(), manifest


def _trained_fragments(engine: Any, state: EngineState) -> dict[str, torch.Tensor]:
    """Weights and elementwise states of trained parameters."""
    tensors: dict[str, torch.Tensor] = {}
    # at stage 0 every data-parallel rank has all elements, and writes a share of them
    shared = not engine.zero_optimization_stage() and not hasattr(engine.optimizer, "update_lp_params")
    for fragment in state.fragments:
        if state.layouts[fragment.name].owns_none(state.mesh.tp_rank):
            continue
        start, stop = _share(fragment.numel, state.mesh) if shared else (0, fragment.numel)
        for kind, tensor in {WEIGHT: fragment.flat.tensor, **fragment.flat.elementwise()}.items():
            if start < stop:
                key = fragment_key(kind, fragment.name, fragment.start + start)
                tensors[key] = fragment.of(tensor)[start:stop]
    return tensors


def _other_fragments(state: EngineState, without: set[str]) -> dict[str, torch.Tensor]:
    """Frozen parameters and buffers."""
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in state.params.items():
        if name in without or state.layouts[name].owns_none(state.mesh.tp_rank):
            continue
        if zero3.is_partitioned(tensor):
            (start, stop), own = zero3.partition_range(tensor), zero3.partition_data(tensor)
        else:
            start, stop = _share(tensor.numel(), state.mesh)
            own = tensor.detach().reshape(-1)[start:stop]
        if start < stop:
            tensors[fragment_key(WEIGHT, name, start)] = own
    return tensors


def _is_parameter(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, torch.nn.Parameter)


def _share(numel: int, mesh: ParallelMesh) -> tuple[int, int]:
    """This data-parallel rank's range of elements that all of them have."""
    return numel * mesh.dp_rank // mesh.dp_size, numel * (mesh.dp_rank + 1) // mesh.dp_size


def _optimizer(state: EngineState, tensors: dict[str, torch.Tensor]) -> Any:
    base, flats = state.optimizer, state.flats
    if base is None:
        return None
    blocks = sorted({key for flat in flats for key in flat.in_blocks()})
    if blocks:
        raise TensorParallelError(
            f"a checkpoint cannot hold {blocks[0]!r} of the optimizer {type(base).__name__}: block-wise state cannot "
            "be resharded; use an optimizer with elementwise state (AdamW, Adam, SGD, Lion, Adagrad)."
        )
    described = []
    for index, (group, names) in enumerate(state.groups()):
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
        **optimizer_compat.described(base),
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
    """The class, HF config and generation config, which an export needs."""
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
