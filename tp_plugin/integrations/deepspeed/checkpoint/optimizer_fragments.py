"""This rank's fragments of an engine's parameters and optimizer state, at any ZeRO stage.

Every stage keeps *flat* tensors that the optimizer steps on. At stage 0 each is a parameter. At stages 1 and 2, and in
``BF16_Optimizer``, it is this rank's partition of a parameter group, at stage 3 one of a sub-group. A parameter's
fragment is a range of the flat tensor, and a range of the parameter's flattened tensor-parallel shard.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations import zero3
from tp_plugin.integrations.features import CHECKPOINTS
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.param_info import layout_of
from tp_plugin.sharding import state_of
from tp_plugin.weights.gather import mesh_of, unwrapped

upstream = Upstream(CHECKPOINTS)
_WHY = "checkpoints read and set the optimizer's flat tensors through it"
upstream.needs(groups, "_get_data_parallel_group", [], "an unsharded engine's checkpoint is spread over this group")
upstream.needs(DeepSpeedEngine, "zero_partial_offload", [], "checkpoints refuse a second optimizer by it")
upstream.needs(DeepSpeedZeroOptimizer, "update_lp_params", [], _WHY)
upstream.needs(BF16_Optimizer, "update_lp_params", [], _WHY)

STEP = "step"
"""The one state of an optimizer that is a number even if the parameter has a single element."""


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """A tensor the optimizer steps on.

    Attributes:
        group: index of its parameter group.
        tensor: 1-D at stages 1 to 3, of the parameter's shape at stage 0; the key of its state.
        state: the optimizer's state of it; empty before the first step.
        names: parameters with a fragment in it on some rank; they share its scalar states.
    """

    group: int
    tensor: torch.Tensor
    state: dict[str, Any]
    names: tuple[str, ...]

    def elementwise(self) -> dict[str, torch.Tensor]:
        """State with a number for every element."""
        return {
            key: value
            for key, value in self.state.items()
            if key != STEP and isinstance(value, torch.Tensor) and value.shape == self.tensor.shape
        }

    def scalars(self) -> dict[str, Any]:
        """State that is not elementwise."""
        return {k: v for k, v in self.state.items() if k not in self.elementwise() and v is not None}

    def in_blocks(self) -> list[str]:
        """Names of scalar states that are tensors of blocks of elements, or of more than one parameter."""
        found = []
        for key, value in self.scalars().items():
            values = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            )
            if any(isinstance(one, torch.Tensor) and one.numel() > 1 for one in values):
                found.append(key)
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Fragment:
    """Elements ``[start, start + numel)`` of a trained parameter's shard, stored in ``flat`` from ``offset`` on."""

    name: str
    flat: Flat
    offset: int
    start: int
    numel: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This fragment of the flat tensor or of an elementwise state of it, as a 1-D view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


@dataclasses.dataclass(frozen=True, eq=False)
class EngineState:
    """This rank's parameters, buffers and optimizer state.

    Attributes:
        params: name -> parameter or persistent buffer, not copied; tied ones once, under their first name.
        layouts: name -> layout; a tensor without one is replicated.
        fragments: of trained parameters, in ``flats``.
        optimizer: the one inside DeepSpeed's, which has the ``param_groups`` and ``state``; None without one.
    """

    mesh: ParallelMesh
    params: Mapping[str, torch.Tensor]
    layouts: Mapping[str, ShardLayout]
    flats: list[Flat]
    fragments: list[Fragment]
    optimizer: Any

    @classmethod
    def of(cls, engine: Any) -> EngineState:
        """Raises TensorParallelError for other model parallelism, or an optimizer that a checkpoint cannot hold."""
        _refuse_other_parallelism(engine)
        mesh = mesh_of(unwrapped(engine.module))
        params = _named(engine)
        layouts = {name: checkpoint_layout(tensor, mesh) for name, tensor in params.items()}
        flats, fragments = _flats(engine, {id(tensor): name for name, tensor in params.items()})
        optimizer: Any = None
        if engine.optimizer is not None and not isinstance(engine.optimizer, DeepSpeedZeRoOffload):
            optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        return cls(mesh, params, layouts, flats, fragments, optimizer)

    def trained(self) -> set[str]:
        """Names of the parameters that the optimizer has."""
        return {name for flat in self.flats for name in flat.names}

    def groups(self) -> Iterator[tuple[dict[str, Any], list[str]]]:
        """Yield the parameter groups and the names in each."""
        for index, group in enumerate(self.optimizer.param_groups):
            yield group, [name for flat in self.flats if flat.group == index for name in flat.names]


def _refuse_other_parallelism(engine: Any) -> None:
    """Raise unless we sharded the engine's model or every rank has full parameters."""
    if state_of(engine.module) is not None or not dist.is_initialized():
        return
    if dist.get_world_size(groups._get_data_parallel_group()) != dist.get_world_size():
        raise TensorParallelError(
            "the engine is model parallel by other means than tp_plugin, whose checkpoints cannot hold it; remove the "
            "'tp_plugin' block from its DeepSpeed config."
        )


def _named(engine: Any) -> dict[str, torch.Tensor]:
    found, seen = {}, set()
    for name, tensor in unwrapped(engine.module).state_dict(keep_vars=True).items():
        if isinstance(tensor, torch.Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            found[name] = tensor
    return found


def checkpoint_layout(tensor: torch.Tensor, mesh: ParallelMesh) -> ShardLayout:
    """Layout of a parameter or buffer; a tensor without one is replicated."""
    layout = layout_of(tensor)
    return ShardLayout.replicated(zero3.shard_shape(tensor), mesh.tp_size) if layout is None else layout


def _flats(engine: Any, names: dict[int, str]) -> tuple[list[Flat], list[Fragment]]:
    """All flat tensors of this rank, and the fragments in them; ``names`` has those of parameters by their id."""
    optimizer = engine.optimizer
    if optimizer is None or isinstance(optimizer, DeepSpeedZeRoOffload):
        return [], []
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        if engine.zero_partial_offload() != 1:
            raise TensorParallelError(
                "a checkpoint for any shape cannot hold the second optimizer of zero_optimization.offload_optimizer."
                "ratio; remove ratio."
            )
        return _stage3(optimizer, names)
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        return _partitioned(optimizer, names)
    if isinstance(optimizer, BF16_Optimizer):
        return _linked(optimizer, names)
    if isinstance(optimizer, torch.optim.Optimizer):
        return _plain(optimizer, names)
    raise TensorParallelError(
        f"a checkpoint for any shape cannot be made of {type(optimizer).__name__}; set zero_optimization.stage to 1."
    )


def _plain(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> tuple[list[Flat], list[Fragment]]:
    """Stage 0. Frozen parameters in a group are left out, as ZeRO does, unless they were trained before."""
    found = [
        Flat(index, param, optimizer.state.get(param, {}), (names[id(param)],))
        for index, group in enumerate(optimizer.param_groups)
        for param in group["params"]
        if id(param) in names and (param.requires_grad or optimizer.state.get(param))
    ]
    return found, [Fragment(flat.names[0], flat, 0, 0, flat.tensor.numel()) for flat in found]


def _partitioned(optimizer: Any, names: dict[int, str]) -> tuple[list[Flat], list[Fragment]]:
    """Stages 1 and 2. ``_hp_mapping`` is not used: it ignores the order of ``round_robin_gradients``."""
    found, fragments = [], []
    for index, partition in enumerate(optimizer.single_partition_of_fp32_groups):
        params, offsets = optimizer.round_robin_bit16_groups[index], _offsets(optimizer, index)
        # the state is a defaultdict, to which [] would add an entry
        state = optimizer.optimizer.state.get(partition, {})
        flat = Flat(index, partition, state, tuple(names[id(param)] for param in params))
        found.append(flat)
        begin = partition.numel() * dist.get_rank(optimizer.real_dp_process_group[index])
        for param, offset in zip(params, offsets, strict=True):
            start, stop = max(offset, begin), min(offset + param.numel(), begin + partition.numel())
            if start < stop:
                fragments.append(Fragment(names[id(param)], flat, start - begin, start - offset, stop - start))
    return found, fragments


def _offsets(optimizer: Any, index: int) -> list[int]:
    """Begin of each parameter in a flat group; before DeepSpeed 0.19.7 each begins where the one before ends."""
    known = getattr(optimizer, "round_robin_bit16_offsets", None)
    if known is not None:
        return known[index]
    return [*itertools.accumulate((p.numel() for p in optimizer.round_robin_bit16_groups[index]), initial=0)][:-1]


def _linked(optimizer: Any, names: dict[int, str]) -> tuple[list[Flat], list[Fragment]]:
    found, fragments = [], []
    for index, (params, partition) in enumerate(
        zip(optimizer.bf16_groups, optimizer.fp32_groups_flat_partition, strict=True)
    ):
        state = optimizer.optimizer.state.get(partition, {})
        flat = Flat(index, partition, state, tuple(names[id(param)] for param in params))
        found.append(flat)
        for param in params:
            piece = param._hp_mapping
            if piece is not None:
                there, here = piece.hp_fragment_address, piece.lp_fragment_address
                fragments.append(Fragment(names[id(param)], flat, there.start, here.start, here.numel))
    return found, fragments


def _stage3(optimizer: Any, names: dict[int, str]) -> tuple[list[Flat], list[Fragment]]:
    found, fragments = [], []
    for index, (params, partition) in enumerate(
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        state = optimizer.optimizer.state.get(partition, {})
        group = optimizer.sub_group_to_group_id[index]
        flat = Flat(group, partition, state, tuple(names[id(param)] for param in params))
        found.append(flat)
        for param in params:
            _, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
            start, stop = zero3.partition_range(param)
            fragments.append(Fragment(names[id(param)], flat, offset, start, stop - start))
    return found, fragments


def masters_changed(engine: Any) -> None:
    """Copy the optimizer's flat tensors to the model's weights; a collective call."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        optimizer.update_lp_params()
