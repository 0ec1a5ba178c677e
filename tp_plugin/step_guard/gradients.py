"""Check the first backward: it reaches every trained parameter, and replicas get equal gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_leaves

from tp_plugin.collectives import all_gather, all_reduce_
from tp_plugin.errors import NO_FULLGRAPH, TensorParallelError, agree
from tp_plugin.mesh import ParallelMesh, comm_device
from tp_plugin.param_info import info_of, sharded_layout
from tp_plugin.step_guard.replicas import CAUSES, named_ranks
from tp_plugin.weights.user_tensors import counts_once

PURPOSE = "gradient check"
APART = 0.05
"""Largest distance between gradients of replicas, relative to their norm. Rounding in half precision makes less; a loss
that each rank computes of its own shard makes about 1."""
SMALL = 1e-3  # of the largest gradient's norm: a smaller one may be rounding
COLUMNS = 256  # a gradient is folded to
EQUAL, EQUAL_IN_HALF = 1e-5, 1e-2  # largest relative difference of one loss on two ranks


class GradientWatch:
    """Watches one forward and backward: outputs that got a gradient, and trainable parameters that got one.

    A parameter must get one if it is sharded or part of an adapter, and its module's output got one or could not take
    one. An adapter is a module with a ``base_layer``, as PEFT's; the output of any part of it counts.
    Other parameters may have none: an expert without tokens, a pooler, the unused last layer of a vision tower.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.paused = False
        self._handles: list[Any] = []
        self._ran: set[str] = set()
        self._reached: set[str] = set()
        self._folded: dict[str, torch.Tensor] = {}  # the gradients of replicas
        self._uses = DirectUses(model)
        self._trained: set[str] = set()  # when it started: an adapter may be switched before the next step

    def start(self) -> None:
        """Register the hooks, unless they are."""
        if self._handles:
            return
        self._uses.start()
        for name, param in self.model.named_parameters():
            if param.requires_grad:
                self._trained.add(name)
                if sharded_layout(param) is None:
                    self._folded[name] = torch.zeros(COLUMNS, device=param.device)
                self._handles.append(param.register_hook(self._reaches(name)))
        for name, module in self.model.named_modules():
            if any(True for _ in module.parameters(recurse=False)) or hasattr(module, "base_layer"):
                self._handles.append(module.register_forward_hook(self._wanted(name)))

    def complete(self) -> bool:
        """Return True once a backward has reached a parameter."""
        return bool(self._reached)

    def stop(self) -> None:
        self._uses.stop()
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
                expected = owner in self._ran and sharded_layout(param) is not None
            if expected:
                lost.append(name)
        if not lost:
            return None
        return (
            f"{len(lost)} trainable parameters got no gradient in the first backward though their modules' outputs "
            f"did, the first is {lost[0]!r}: something replaced or bypassed its module, so it would never be trained; "
            "freeze it if that is meant, or set guard: false in the tp_plugin block."
        )

    @torch.no_grad()
    def compare(self, mesh: ParallelMesh) -> None:
        """Compare gradients of replicas over the TP group; a collective call over the world.

        Each is folded to :data:`COLUMNS` sums, which one small all-gather compares. So a loss that differs between
        ranks is found before replicas differ by more than a learning rate.

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
        far = far.nan_to_num(0, 0, 0)  # an overflow, which the loss scaler handles
        farthest = far.amax(0)
        all_reduce_(farthest, dist.group.WORLD, op=dist.ReduceOp.MAX, purpose=PURPOSE)
        worst = int(farthest.argmax())
        if float(farthest[worst]) <= APART:
            return
        name, ranks = list(self._folded)[worst], named_ranks(float(far[mesh.tp_rank, worst]) > APART, device)
        raise TensorParallelError(
            f"the gradient of {name!r} is not the same on the ranks of a tensor-parallel group, which must hold equal "
            f"replicas: on {ranks} it differs from the first of the group by {float(farthest[worst]):.2g} of its norm, "
            f"and {int((farthest > APART).sum()) - 1} more differ: {CAUSES}; then start again."
        )

    def compare_loss(self, loss: Any, mesh: ParallelMesh) -> None:
        """Raise unless ``loss`` is one number on all ranks of a TP group; a collective call over the world.

        A loop's own term of sharded weights may give replicas equal gradients, and still differs between ranks. A term
        of a parameter whose gradient is summed over the group is equal, and would count once a rank.

        Raises:
            TensorParallelError: on every rank.
        """
        if mesh.tp_group is None or not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            return
        mine = loss.detach().float().reshape(1).to(comm_device(mesh.tp_group))
        first, *others = (float(one) for one in all_gather(mine, mesh.tp_group, purpose=PURPOSE))
        limit = EQUAL if loss.dtype in (torch.float32, torch.float64) else EQUAL_IN_HALF
        other = next((one for one in others if abs(one - first) > limit * abs(first)), None)
        error = None
        if other is not None:
            error = (
                f"the loss is not the same on the ranks of a tensor-parallel group ({first:.7g} on the first, "
                f"{other:.7g} on another), which compute one model: {CAUSES}."
            )
        elif (used := self._uses.found(loss)) is not None:
            error = (
                f"the loss uses {used!r} by itself, whose gradient is summed over the tensor-parallel group, so "
                f"its term would count {mesh.tp_size} times: to count it once, put "
                "torch.nn.utils.parameters_to_vector([parameter]) in the parameter's place."
            )
        agree(error)

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


class DirectUses:
    """Finds parameters whose gradient is summed over the TP group, and that a loss uses by itself.

    Each rank's forward gives such a parameter a part of its gradient, and the sum is the full one. A term of the loss
    that reads the parameter itself gives each rank the full gradient, so that it would count tp times. Its value is
    right, so only the graph shows it: the modules' own nodes are known by autograd's sequence numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        self.names: dict[int, str] = {}
        self._model = model
        self._handles: list[Any] = []
        self._open: dict[int, list[int]] = {}  # module id -> first sequence numbers of its running forwards
        self._inside: list[tuple[int, int]] = []
        self._since = 0

    def start(self) -> None:
        """Register hooks on the modules that hold such parameters, and on all modules around them.

        Adapters may have been injected or merged since the model was sharded.
        """
        named = self._model.named_parameters()
        self.names = {id(param): name for name, param in named if info_of(param).gradient_summed}
        owners = [name.rpartition(".")[0] for name in self.names.values()]
        around = {owner[:end] for owner in owners for end in (0, *_dots(owner), len(owner))}
        self._since = _now() if self.names else 0
        for name in around:
            module = self._model.get_submodule(name)
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def stop(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._inside = [], []
        self._open.clear()

    def found(self, loss: torch.Tensor) -> str | None:
        """Name a parameter that ``loss`` uses outside of the modules' forwards; None if there is none.

        The walk begins at the loss and ends at the model's own nodes, so it costs as much as the loss's terms.
        """
        waiting, seen = [loss.grad_fn], set()
        while waiting and self._inside:
            node: Any = waiting.pop()
            if node is None or node in seen or counts_once(node) or self._is_models(node):
                continue
            seen.add(node)
            for after, _ in node.next_functions:
                variable = getattr(after, "variable", None)  # a leaf's AccumulateGrad
                if variable is None:
                    waiting.append(after)
                elif id(variable) in self.names:
                    return self.names[id(variable)]
        return None

    def _is_models(self, node: Any) -> bool:
        number = node._sequence_nr()
        return any(start <= number <= stop for start, stop in self._inside)

    @torch.compiler.disable(reason=NO_FULLGRAPH)
    def _enter(self, module: nn.Module, _args: Any) -> None:
        if torch.is_grad_enabled():
            self._open.setdefault(id(module), []).append(_now())

    @torch.compiler.disable(reason=NO_FULLGRAPH)
    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if torch.is_grad_enabled():
            began = self._open.get(id(module)) or [self._since]  # it ran when the hooks were registered
            self._inside.append((began.pop(), _now()))


def _dots(name: str) -> list[int]:
    return [place for place, letter in enumerate(name) if letter == "."]


def _now() -> int:
    """Return the sequence number of a node made now."""
    with torch.enable_grad():
        made = torch.zeros((), requires_grad=True).clone()
    assert made.grad_fn is not None
    return made.grad_fn._sequence_nr()
