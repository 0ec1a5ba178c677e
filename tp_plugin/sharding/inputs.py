"""Agreement of a TP group's ranks at every forward: on the batch and on the random generators."""

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
from tp_plugin.layers.dropout import draws_random_numbers
from tp_plugin.layers.generators import KINDS, TORCH, TORCH_CPU, set_states, states
from tp_plugin.mesh import ParallelMesh, comm_device
from tp_plugin.sharding.sync_params import fingerprint

PURPOSE = "batch check"


ATTRIBUTE = "tp_inputs"


class InputGuard:
    """A forward pre-hook of the sharded model: compares, or broadcasts, the batch of a TP group.

    It compares at the first forward and then at every ``check_batch_every``-th, of training and of evaluation each:
    one all-gather of ten numbers over the TP group. In training one all-reduce over the world follows, so that a
    mismatch in one group is raised on every rank. Of the random generators it compares those that forwards draw from:
    their states differ before and after a compared forward.
    """

    def __init__(self, model: nn.Module, mesh: ParallelMesh, config: TensorParallelConfig) -> None:
        self.mesh = mesh
        self.every = config.check_batch_every
        self.broadcast = config.broadcast_batch
        self.forwards = {True: 0, False: 0}  # number of forwards, by model.training.
        self.in_step = False  # the generators have been brought in step.
        self.paused = False  # during the guard's own forwards.
        self.then: list[Callable[[nn.Module, tuple, dict[str, Any]], None]] = []  # called with compared inputs.
        self.drawn: set[str] = set()  # generators that a forward drew from.
        self._before: dict[str, torch.Tensor] | None = None  # their states before a compared forward
        model.__dict__[ATTRIBUTE] = self
        model.register_forward_pre_hook(self, with_kwargs=True, prepend=True)
        model.register_forward_hook(self.note_draws)

    @torch.compiler.disable(reason=NO_FULLGRAPH)
    def __call__(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if self.paused:
            return args, kwargs
        args, kwargs = self.prepare(model, args, kwargs)
        for follow in self.then:
            follow(model, args, kwargs)
        return args, kwargs

    def prepare(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        """Compare or broadcast the inputs of a forward of the model, or of a part that a loop runs by itself.

        Raises:
            TensorParallelError: as :meth:`compare`.
        """
        self._before = None
        if self.mesh.tp_group is None:
            return args, kwargs
        count = self.forwards[model.training]
        self.forwards[model.training] += 1
        if self.broadcast:
            args, kwargs = broadcast_tree((args, kwargs), self.mesh)
        if model.training:
            self.bring_in_step(model)
        if self.every and count % self.every == 0:
            self.compare(model, args, kwargs)
            self._before = states(_device_of(model)) if model.training else None
        return args, kwargs

    @torch.compiler.disable(reason=NO_FULLGRAPH)
    def note_draws(self, model: nn.Module, *_: object) -> None:
        """After a forward: compare the generators whose states it changed from now on."""
        if self._before is not None and not self.paused:
            now = states(_device_of(model))
            self.drawn.update(kind for kind in KINDS if not torch.equal(self._before[kind], now[kind]))

    def bring_in_step(self, model: nn.Module) -> None:
        """Give the TP group one state of the random generators, once; see :func:`bring_in_step`."""
        if not self.in_step:
            self.in_step = True
            bring_in_step(model, self.mesh)

    def compare(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Raise TensorParallelError unless these inputs are equal on the TP group; see the class."""
        if self.mesh.tp_group is None:
            return  # one rank; the world's other groups have other batches
        device = comm_device(self.mesh.tp_group)
        found_here = states(_device_of(model))
        counts = [model.training and kind in self.drawn for kind in KINDS]
        counts[0] |= draws_random_numbers(model) or any(hasattr(m, "neftune_noise_alpha") for m in model.modules())
        prints = [*prints_of((args, kwargs), device), *(fingerprint(found_here[kind]).to(device) for kind in KINDS)]
        mine = torch.cat([torch.stack(prints), torch.tensor(counts, dtype=torch.int64, device=device)])
        found = torch.stack(all_gather(mine, self.mesh.tp_group, purpose=PURPOSE))
        differs = (found != found[0]).any(0)[: len(prints)]
        differs[-len(KINDS) :] &= found[:, len(prints) :].any(0)  # generators that no forward draws from may differ
        if model.training and dist.get_world_size() > self.mesh.tp_size:
            differs = differs.to(torch.int32)
            all_reduce_(differs, dist.group.WORLD, op=dist.ReduceOp.MAX, purpose=PURPOSE)
        batch, shapes, *apart = differs.bool().tolist()
        if batch or shapes:
            what = "shapes" if shapes else "values"
            raise TensorParallelError(
                f"the ranks of a tensor-parallel group got different batches (their {what} differ): seed every "
                "shuffle() and split alike, sample by data-parallel rank (rank // tp_size), or set broadcast_batch: "
                "true in the tp_plugin block."
            )
        if any(apart):
            kinds = [kind for kind, other in zip(KINDS, apart, strict=True) if other]
            kinds = [kind for kind in kinds if kind != TORCH_CPU or TORCH not in kinds]
            raise TensorParallelError(
                f"the random generators of a tensor-parallel group are no longer in step ({' and '.join(kinds)}), so "
                "its ranks draw different dropout masks: draw the same random numbers on all ranks of the group (seed "
                "by data-parallel rank, which is rank // tp_size)."
            )


def prints_of(tree: Any, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Two hashes (int64, 0-dim, on ``device``) of a tree of tensors and plain values: of its values, of its form."""
    leaves, structure = tree_flatten(tree)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    kinds = str([(tuple(t.shape), str(t.dtype)) for t in tensors])
    plain = [leaf for leaf in leaves if isinstance(leaf, int | float | str)]
    content = _print_of(str(plain)).to(device)
    for tensor in tensors:
        content = content * 31 + fingerprint(tensor).to(device)
    return content, _print_of(f"{kinds}{structure}").to(device)


def bring_in_step(model: nn.Module, mesh: ParallelMesh) -> None:
    """:func:`generators_in_step` on the model's device."""
    generators_in_step(_device_of(model), mesh)


def generators_in_step(device: torch.device, mesh: ParallelMesh) -> None:
    """Copy the random generators of the TP group's rank 0 to all its ranks, which may be seeded differently on purpose.

    torch's, NumPy's and Python's, in one broadcast of about 20 KB.
    """
    if mesh.tp_group is None:
        return
    own = states(device)
    sent = torch.cat(list(own.values())).to(comm_device(mesh.tp_group))
    broadcast_(sent, mesh.tp_group, purpose="random state")
    parts = sent.cpu().split([len(state) for state in own.values()])
    set_states(device, dict(zip(own, parts, strict=True)))


def broadcast_tree(tree: Any, mesh: ParallelMesh) -> Any:
    """The TP group's rank 0's tree of tensors and plain values, on every rank of the group."""
    return tree if mesh.tp_group is None else _broadcast_tree(tree, mesh.tp_group, mesh.tp_rank == 0)


def broadcast_over_replicas(tree: Any, mesh: ParallelMesh) -> Any:
    """The tree of the first data-parallel replica, on all ranks with the same shard."""
    return tree if mesh.dp_group is None else _broadcast_tree(tree, mesh.dp_group, mesh.dp_rank == 0)


def _broadcast_tree(tree: Any, group: dist.ProcessGroup, first_rank: bool) -> Any:
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


def _device_of(model: nn.Module) -> torch.device:
    return next((param.device for param in model.parameters()), torch.device("cpu"))
