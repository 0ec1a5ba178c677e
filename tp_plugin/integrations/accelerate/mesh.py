"""``prepare()`` under our slot: one device mesh a process.

Accelerate makes a new TP mesh, process groups included, in every ``prepare()``; HF Trainer prepares a data loader for
every evaluation.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch.distributed.device_mesh
from accelerate import Accelerator

from tp_plugin.integrations.accelerate.degree import tp_size
from tp_plugin.integrations.contract import Patches, contract


def check_contracts() -> None:
    contract(Accelerator, "_prepare_deepspeed", None, "it makes a TP mesh every time")
    contract(Accelerator, "_prepare_device_mesh", [], "data loaders give the ranks of this mesh one batch")
    contract(torch.distributed.device_mesh, "init_device_mesh", ["device_type", "mesh_shape"], "to reuse the TP mesh")


def install(patches: Patches) -> None:
    patches.replace(Accelerator, "_prepare_deepspeed", _prepare_deepspeed_method)


def _prepare_deepspeed_method(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def _prepare_deepspeed(self: Accelerator, *args: Any) -> Any:
        degree = tp_size()
        if degree == 1:
            return original(self, *args)
        with _reused(getattr(self.state, "ds_device_mesh", None), degree):
            return original(self, *args)

    return _prepare_deepspeed


@contextlib.contextmanager
def _reused(mesh: Any, degree: int) -> Iterator[None]:
    """``init_device_mesh`` hands out ``mesh`` again when asked for a TP mesh of this size."""
    if mesh is None:
        yield
        return
    module = torch.distributed.device_mesh
    original = module.init_device_mesh

    @functools.wraps(original)
    def init_device_mesh(device_type: str, mesh_shape: tuple[int, ...], **kwargs: Any) -> Any:
        if tuple(mesh_shape) == (degree,) and kwargs.get("mesh_dim_names") == ("tp",):
            return mesh
        return original(device_type, mesh_shape, **kwargs)

    module.init_device_mesh = init_device_mesh
    try:
        yield
    finally:
        module.init_device_mesh = original
