"""Whether the first backward reached every parameter that it should, and replicas with the same gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves

from tp_plugin.collectives import all_gather, all_reduce_
from tp_plugin.errors import NO_FULLGRAPH, TensorParallelError, agree
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding.equal import comm_device
from tp_plugin.verify.replicas import CAUSES, named_ranks

PURPOSE = "gradient check"
APART = 0.05
"""The largest distance between gradients of replicas, relative to their norm: rounding in half precision makes less,
and a loss that each rank computes of its own shard about 1."""
SMALL = 1e-3  # of the largest gradient's norm: what is smaller may be nothing but rounding
COLUMNS = 256  # a gradient is folded to
EQUAL, EQUAL_IN_HALF = 1e-5, 1e-2  # relative: how far apart rounding may leave one loss on two ranks


class GradientWatch:
    """Listens to one forward and backward: whose output was wanted, and which trainable parameters got a gradient.

    A parameter must have got one if it is sharded, or belongs to an adapter (a module with a ``base_layer``, as PEFT's
    have), and a gradient came back to its module's output (to the adapter's, or to that of a part of it), or that could
    not take one. Others may be idle for good reasons: an expert without tokens, a pooler or the last layer of a vision
    tower whose output nobody uses.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paused = False
        self._handles: list[Any] = []
        self._ran: set[str] = set()
        self._reached: set[str] = set()
        self._folded: dict[str, torch.Tensor] = {}  # the gradients of replicas
        self._trained: set[str] = set()  # then: an adapter may be switched before the next step

    def start(self) -> None:
        """Begin to listen; does nothing when it has begun."""
        if self._handles:
            return
        for name, param in self.model.named_parameters():
            if param.requires_grad:
                self._trained.add(name)
                layout = getattr(param, "tp_layout", None)
                if layout is None or not layout.is_sharded:
                    self._folded[name] = torch.zeros(COLUMNS, device=param.device)
                self._handles.append(param.register_hook(self._reaches(name)))
        for name, module in self.model.named_modules():
            if any(True for _ in module.parameters(recurse=False)) or hasattr(module, "base_layer"):
                self._handles.append(module.register_forward_hook(self._wanted(name)))

    def complete(self) -> bool:
        """Whether a backward has been heard."""
        return bool(self._reached)

    def stop(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def missing(self) -> str | None:
        """The sentence about parameters without a gradient; None when all is well."""
        lost = []
        adapters = [name for name, module in self.model.named_modules() if _is_adapter(module)]
        for name, param in self.model.named_parameters():
            if not param.requires_grad or name not in self._trained or name in self._reached:
                continue
            owner = name.rpartition(".")[0]
            adapter = next((a for a in adapters if name.startswith(f"{a}.")), None)
            if adapter is not None:
                expected = any(ran == adapter or ran.startswith(f"{adapter}.") for ran in self._ran)
            else:
                layout = getattr(param, "tp_layout", None)
                expected = owner in self._ran and layout is not None and layout.is_sharded
            if expected:
                lost.append(name)
        if not lost:
            return None
        return (
            f"{len(lost)} trainable parameters got no gradient in the first backward though their modules' outputs "
            f"did, the first is {lost[0]!r}; something replaced or bypassed its module, so it would never be trained "
            "(freeze it if that is meant, or set guard: false in the tp_plugin block)."
        )

    @torch.no_grad()
    def compare(self, mesh: ParallelMesh) -> None:
        """Replicas must have got the same gradient on the ranks of a TP group; a collective call over the world.

        Each is folded to :data:`COLUMNS` sums, which one small all-gather brings together. So a loss that is another on
        every rank is found at once, before replicas are apart by more than a learning rate.

        Raises:
            TensorParallelError: on every rank, naming the parameter whose gradients differ most.
        """
        if mesh.tp_group is None or not self._folded:
            return
        device = comm_device(mesh.tp_group)
        mine = torch.stack([folded.to(device) for folded in self._folded.values()])
        everyone = torch.stack(all_gather(mine, mesh.tp_group, purpose=PURPOSE))
        norms = everyone.norm(dim=2).amax(0)
        far = (everyone - everyone[0]).norm(dim=2) / norms.clamp_min(SMALL * float(norms.max()) + 1e-30)
        far = far.nan_to_num(0, 0, 0)  # an overflow, which the loss scale deals with
        farthest = far.amax(0)
        all_reduce_(farthest, dist.group.WORLD, op=dist.ReduceOp.MAX, purpose=PURPOSE)
        worst = int(farthest.argmax())
        if float(farthest[worst]) <= APART:
            return
        name, ranks = list(self._folded)[worst], named_ranks(float(far[mesh.tp_rank, worst]) > APART, device)
        raise TensorParallelError(
            f"the gradient of {name!r} is not the same on the ranks of a tensor-parallel group, which must hold equal "
            f"replicas (it is another on {ranks} than on the first of the group, by {float(farthest[worst]):.2g} of "
            f"its norm, and {int((farthest > APART).sum()) - 1} more differ); {CAUSES}, and start again."
        )

    def compare_loss(self, loss: Any, mesh: ParallelMesh) -> None:
        """Raise unless ``loss`` is one number on all ranks of a TP group; a collective call over the world.

        A loop's own term of sharded weights may give replicas equal gradients, and is still another on every rank.

        Raises:
            TensorParallelError: on every rank.
        """
        if mesh.tp_group is None or not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            return
        mine = loss.detach().float().reshape(1).to(comm_device(mesh.tp_group))
        first, *others = (float(one) for one in all_gather(mine, mesh.tp_group, purpose=PURPOSE))
        limit = EQUAL if loss.dtype in (torch.float32, torch.float64) else EQUAL_IN_HALF
        other = next((one for one in others if abs(one - first) > limit * abs(first)), None)
        agree(
            None
            if other is None
            else f"the loss is not the same on the ranks of a tensor-parallel group ({first:.7g} on the first, "
            f"{other:.7g} on another), which compute one model; {CAUSES}."
        )

    def _reaches(self, name: str) -> Any:
        def hook(grad: torch.Tensor) -> None:
            self._reached.add(name)
            if name in self._folded and type(grad) is torch.Tensor and grad.layout == torch.strided:
                self._folded[name] = self._folded[name] + _folded(grad)

        return hook

    def _wanted(self, name: str) -> Any:
        @torch.compiler.disable(reason=NO_FULLGRAPH)
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            if self.paused or not torch.is_grad_enabled():
                return
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            live = [tensor for tensor in tensors if tensor.requires_grad]
            for tensor in live:
                tensor.register_hook(lambda _grad: self._ran.add(name))
            if not live:
                self._ran.add(name)

        return hook


def _folded(grad: torch.Tensor) -> torch.Tensor:
    flat = grad.detach().reshape(-1)
    rows = flat.numel() // COLUMNS
    total = flat[: rows * COLUMNS].view(rows, COLUMNS).sum(0, dtype=torch.float32)
    rest = flat[rows * COLUMNS :]
    total[: rest.numel()] += rest
    return total


def _is_adapter(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", None), nn.Module)
