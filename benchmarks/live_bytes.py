"""Peak memory of tensors, counted by torch itself on any device: exact, and independent of the allocator.

Working memory inside an operation's own kernel is not seen; every tensor that an operation returns is.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages made inside the ``with`` block and still alive.

    Attributes:
        now: bytes alive.
        peak: the most there were at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakKeyDictionary[torch.UntypedStorage, int] = weakref.WeakKeyDictionary()
        self._before: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def ignore(self, *tensors: torch.Tensor) -> LiveBytes:
        """Do not count these, the inputs, when they come back as views."""
        for tensor in tensors:
            self._before.add(tensor.untyped_storage())
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if type(leaf) in (torch.Tensor, torch.nn.Parameter):
                self._meet(leaf.untyped_storage())
        return out

    def _meet(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known or storage in self._before:
            return
        size = storage.nbytes()
        self._known[storage] = size
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, size)

    def _gone(self, size: int) -> None:
        self.now -= size
