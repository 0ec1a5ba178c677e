"""What the ranks of a TP group must agree on at every forward: their batch and their random generators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from tp_plugin.collectives import all_gather, all_reduce_, broadcast_
from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import NO_FULLGRAPH, TensorParallelError
from tp_plugin.layers.dropout import default_generator, draws_random_numbers
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding.equal import comm_device, fingerprint

PURPOSE = "batch check"


ATTRIBUTE = "tp_inputs"


class InputGuard:
    """A forward pre-hook of the sharded model: compares, or hands out, the batch of a TP group.

    Compared at the first forward and then at every ``check_batch_every``-th, of training and of evaluation each. One
    all-gather of three numbers over the TP group; in training one all-reduce over the world too, so that a mismatch
    in one group is raised on every rank.
    """

    def __init__(self, model: nn.Module, mesh: ParallelMesh, config: TensorParallelConfig) -> None:
        self.mesh = mesh
        self.every = config.check_batch_every
        self.broadcast = config.broadcast_batch
        self.forwards = {True: 0, False: 0}  # training or not -> forwards so far
        self.in_step = False  # whether the generators have been brought in step
        self.paused = False  # during forwards that are nobody's but ours
        self.then: list[Callable[[nn.Module, tuple, dict[str, Any]], None]] = []  # called with inputs known to be alike
        model.__dict__[ATTRIBUTE] = self
        model.register_forward_pre_hook(self, with_kwargs=True, prepend=True)

    @torch.compiler.disable(reason=NO_FULLGRAPH)
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self.paused:
            return args, kwargs
        count = self.forwards[model.training]
        self.forwards[model.training] += 1
        if self.broadcast:
            args, kwargs = broadcast_tree((args, kwargs), self.mesh)
        if model.training:
            self.bring_in_step(model)
        if self.every and count % self.every == 0:
            self.compare(model, args, kwargs)
        for follow in self.then:
            follow(model, args, kwargs)
        return args, kwargs

    def bring_in_step(self, model: nn.Module) -> None:
        """Give the TP group one state of the random generators, once; see :func:`bring_in_step`."""
        if not self.in_step:
            self.in_step = True
            bring_in_step(model, self.mesh)

    def compare(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raise TensorParallelError unless the TP group has these inputs alike; see the class."""
        device = comm_device(self.mesh.tp_group)
        content, description = prints_of((args, kwargs), device)
        mine = torch.stack([content, description, _generators_print(model).to(device)])
        found = torch.stack(all_gather(mine, self.mesh.tp_group, purpose=PURPOSE))
        differs = (found != found[0]).any(0)
        if not (draws_random_numbers(model) or any(hasattr(m, "neftune_noise_alpha") for m in model.modules())):
            differs[2] = False  # nobody draws: generators may differ
        if model.training and dist.get_world_size() > self.mesh.tp_size:
            differs = differs.to(torch.int32)
            all_reduce_(differs, dist.group.WORLD, op=dist.ReduceOp.MAX, purpose=PURPOSE)
        batch, shapes, random = differs.bool().tolist()
        if batch or shapes:
            what = "shapes" if shapes else "values"
            raise TensorParallelError(
                f"the ranks of a tensor-parallel group got different batches (their {what} differ); give neighbouring "
                "ranks the same rows (sample by dp rank = rank // tp_size), or set broadcast_batch: true in the "
                "tp_plugin block if the collator draws random numbers."
            )
        if random:
            raise TensorParallelError(
                "the random generators of a tensor-parallel group are no longer in step, so dropout masks of "
                "replicated tensors differ; draw the same random numbers on all ranks of the group "
                "(seed by dp rank = rank // tp_size)."
            )


def prints_of(tree: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two numbers (int64, 0-dim, on ``device``) for a tree of tensors and plain values: of its values, of its form."""
    leaves, structure = tree_flatten(tree)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    kinds = str([(tuple(t.shape), str(t.dtype)) for t in tensors])
    plain = [leaf for leaf in leaves if isinstance(leaf, int | float | str)]
    content = _print_of(str(plain)).to(device)
    for tensor in tensors:
        content = content * 31 + fingerprint(tensor).to(device)
    return content, _print_of(f"{kinds}{structure}").to(device)


def bring_in_step(model: nn.Module, mesh: ParallelMesh) -> None:
    """Generators of the TP group's rank 0 for all: ranks may have been seeded differently on purpose."""
    for generator in _generators(model):
        state = generator.get_state()
        sent = state.to(comm_device(mesh.tp_group))
        broadcast_(sent, mesh.tp_group, purpose="random state")
        generator.set_state(sent.cpu())


def broadcast_tree(tree: Any, mesh: ParallelMesh) -> Any:
    """The TP group's rank 0's tree of tensors and plain values, on every rank of the group."""
    return _broadcast_tree(tree, mesh.tp_group, mesh.tp_rank == 0)


def broadcast_over_replicas(tree: Any, mesh: ParallelMesh) -> Any:
    """The first data-parallel replica's tree, on every rank that holds the same shard of another."""
    return tree if mesh.dp_group is None else _broadcast_tree(tree, mesh.dp_group, mesh.dp_rank == 0)


def _broadcast_tree(tree: Any, group: dist.ProcessGroup | None, first_rank: bool) -> Any:
    leaves, structure = tree_flatten(tree)
    described = [
        (tuple(leaf.shape), leaf.dtype) if isinstance(leaf, torch.Tensor) else ("value", leaf) for leaf in leaves
    ]
    message: list[Any] = [(structure, described)]
    dist.broadcast_object_list(message, group_src=0, group=group, device=comm_device(group))
    structure, described = message[0]
    device = next((leaf.device for leaf in leaves if isinstance(leaf, torch.Tensor)), torch.device("cpu"))
    out = []
    for index, (first, second) in enumerate(described):
        if first == "value":
            out.append(second)
            continue
        value = leaves[index].detach() if first_rank else torch.empty(first, dtype=second, device=device)
        value = value.to(comm_device(group)).contiguous()
        broadcast_(value, group, purpose="batch")
        out.append(value.to(device))
    return tree_unflatten(out, structure)


def _print_of(text: str) -> torch.Tensor:
    return fingerprint(torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8))


def _generators(model: nn.Module) -> list[torch.Generator]:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    cpu = default_generator(torch.device("cpu"))
    return [cpu] if device.type in ("cpu", "meta") else [cpu, default_generator(device)]


def _generators_print(model: nn.Module) -> torch.Tensor:
    # the last one is that of the model's device, which dropout draws from
    return fingerprint(_generators(model)[-1].get_state())
