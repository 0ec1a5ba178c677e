"""Whether the first backward reached every parameter that it should."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from tp_plugin.errors import NO_FULLGRAPH


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
        self._trained: set[str] = set()  # then: an adapter may be switched before the next step

    def start(self) -> None:
        """Begin to listen; does nothing when it has begun."""
        if self._handles:
            return
        for name, param in self.model.named_parameters():
            if param.requires_grad:
                self._trained.add(name)
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

    def _reaches(self, name: str) -> Any:
        def hook(_grad: torch.Tensor) -> None:
            self._reached.add(name)

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


def _is_adapter(module: nn.Module) -> bool:
    return isinstance(getattr(module, "base_layer", None), nn.Module)
