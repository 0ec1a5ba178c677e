"""What this rank holds of an engine's parameters and of its optimizer's state, at any ZeRO stage.

Every stage keeps a *flat* tensor that the optimizer steps on: the parameter itself at stage 0, this rank's partition of
a whole parameter group at stages 1 and 2 (and in ``BF16_Optimizer``), one of a sub-group at stage 3. A parameter's part
of it is a range of that tensor, and a range of the parameter's flattened tensor-parallel shard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.contract import contract

STEP = "step"
"""The one state of an optimizer that is a number even where the parameter has a single element."""


@dataclasses.dataclass(frozen=True, eq=False)
class Flat:
    """A tensor the optimizer steps on.

    Attributes:
        group: index of its parameter group.
        tensor: 1-D at stages 1 to 3, of the parameter's shape at stage 0; the key of its state.
        state: the optimizer's state of it; empty before the first step.
        names: parameters that lie in it on some rank, all of which share its scalar states.
    """

    group: int
    tensor: torch.Tensor
    state: dict[str, Any]
    names: tuple[str, ...]

    def elementwise(self) -> dict[str, torch.Tensor]:
        """State that has a number for every element."""
        return {
            key: value
            for key, value in self.state.items()
            if key != STEP and isinstance(value, torch.Tensor) and value.shape == self.tensor.shape
        }

    def scalars(self) -> dict[str, Any]:
        """The other state."""
        return {k: v for k, v in self.state.items() if k not in self.elementwise() and v is not None}

    def in_blocks(self) -> list[str]:
        """State that is neither: tensors whose numbers belong to blocks of elements, or to more than one parameter."""
        found = []
        for key, value in self.scalars().items():
            values = (
                value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            )
            if any(isinstance(one, torch.Tensor) and one.numel() > 1 for one in values):
                found.append(key)
        return found


@dataclasses.dataclass(frozen=True, eq=False)
class Held:
    """Elements ``[start, start + numel)`` of a trained parameter's shard, which lie in ``flat`` from ``offset`` on."""

    name: str
    flat: Flat
    offset: int
    start: int
    numel: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This range of the flat tensor or of a state of it, as a 1-D view."""
        return tensor.detach().view(-1).narrow(0, self.offset, self.numel)


def flats(engine: Any, names: dict[int, str]) -> tuple[list[Flat], list[Held]]:
    """All flat tensors of this rank, and where parameters lie in them.

    Args:
        names: id of a parameter -> its name.

    Raises:
        TensorParallelError: an optimizer of DeepSpeed's that has no such tensors, or not only such.
    """
    optimizer = engine.optimizer
    if optimizer is None or isinstance(optimizer, DeepSpeedZeRoOffload):
        return [], []
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        if engine.zero_partial_offload() != 1:
            raise TensorParallelError(
                "a checkpoint for any shape cannot hold the second optimizer that zero_optimization.offload_optimizer."
                "ratio (Twin-Flow) steps part of the parameters with; remove ratio."
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


def _plain(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> tuple[list[Flat], list[Held]]:
    """Stage 0. A frozen parameter in a group is none of the optimizer's, as ZeRO has it, unless it was trained once."""
    found = [
        Flat(index, param, optimizer.state.get(param, {}), (names[id(param)],))
        for index, group in enumerate(optimizer.param_groups)
        for param in group["params"]
        if id(param) in names and (param.requires_grad or optimizer.state.get(param))
    ]
    return found, [Held(flat.names[0], flat, 0, 0, flat.tensor.numel()) for flat in found]


def _partitioned(optimizer: Any, names: dict[int, str]) -> tuple[list[Flat], list[Held]]:
    """Stages 1 and 2. Not by ``_hp_mapping``, which takes no notice of the order of ``round_robin_gradients``."""
    found, held = [], []
    for index, partition in enumerate(optimizer.single_partition_of_fp32_groups):
        params, offsets = optimizer.round_robin_bit16_groups[index], optimizer.round_robin_bit16_offsets[index]
        # the state is a defaultdict: what is asked for by [] would be made
        state = optimizer.optimizer.state.get(partition, {})
        flat = Flat(index, partition, state, tuple(names[id(param)] for param in params))
        found.append(flat)
        begin = partition.numel() * dist.get_rank(optimizer.real_dp_process_group[index])
        for param, offset in zip(params, offsets, strict=True):
            start, stop = max(offset, begin), min(offset + param.numel(), begin + partition.numel())
            if start < stop:
                held.append(Held(names[id(param)], flat, start - begin, start - offset, stop - start))
    return found, held


def _linked(optimizer: Any, names: dict[int, str]) -> tuple[list[Flat], list[Held]]:
    found, held = [], []
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
                held.append(Held(names[id(param)], flat, there.start, here.start, here.numel))
    return found, held


def _stage3(optimizer: Any, names: dict[int, str]) -> tuple[list[Flat], list[Held]]:
    found, held = [], []
    for index, (params, partition) in enumerate(
        zip(optimizer.fp16_groups, optimizer.fp32_partitioned_groups_flat, strict=True)
    ):
        state = optimizer.optimizer.state.get(partition, {})
        group = optimizer.sub_group_to_group_id[index]
        flat = Flat(group, partition, state, tuple(names[id(param)] for param in params))
        found.append(flat)
        for param in params:
            _, offset, _ = optimizer.grad_position[optimizer.get_param_id(param)]
            start, stop = partition_range(param)
            held.append(Held(names[id(param)], flat, offset, start, stop - start))
    return found, held


def partition_range(param: torch.Tensor) -> tuple[int, int]:
    """Elements of a ZeRO-3 parameter's shard that lie in this rank's ``ds_tensor``, the padding not counted."""
    size, rank = param.ds_tensor.ds_numel, dist.get_rank(param.ds_process_group)  # type: ignore[attr-defined]
    total = param.ds_numel  # type: ignore[attr-defined]
    return min(rank * size, total), min((rank + 1) * size, total)


def partition(param: torch.Tensor) -> torch.Tensor:
    """This rank's partition of a ZeRO-3 parameter, 1-D, with its padding."""
    return param.ds_tensor.data.view(-1)  # type: ignore[attr-defined]


def local_shape(param: torch.Tensor) -> tuple[int, ...]:
    """Shape of the tensor-parallel shard, partitioned or not."""
    return tuple(getattr(param, "ds_shape", param.shape))


def base_optimizer(engine: Any) -> Any:
    """The optimizer inside DeepSpeed's, whose ``param_groups`` and ``state`` count; None without one."""
    if engine.optimizer is None or isinstance(engine.optimizer, DeepSpeedZeRoOffload):
        return None
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


def group_names(engine: Any, found: list[Flat]) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """The parameter groups with the names in each."""
    for index, group in enumerate(base_optimizer(engine).param_groups):
        yield group, [name for flat in found if flat.group == index for name in flat.names]


def masters_changed(engine: Any) -> None:
    """Give the model the weights that were put into the optimizer's flat tensors; a collective call."""
    optimizer = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer | BF16_Optimizer):
        optimizer.update_lp_params()


def check_contracts() -> None:
    """See :func:`tp_plugin.integrations.deepspeed.slot.check_contracts`."""
    why = "checkpoints read and set the optimizer's flat tensors through it"
    contract(DeepSpeedEngine, "zero_partial_offload", [], "checkpoints refuse a second optimizer by it")
    for owner in (DeepSpeedZeroOptimizer, BF16_Optimizer):
        contract(owner, "update_lp_params", [], why)
    contract(DeepSpeedZeroOptimizer_Stage3, "get_param_id", ["param"], why)
    for name in ("checkpoint_event_prologue", "checkpoint_event_epilogue"):
        contract(DeepSpeedZeroOptimizer_Stage3, name, [], why)
