"""Fill gaps that programs have on a machine without GPUs, where variables of a client's command ask for it.

``CLIENTS_CPU_BACKEND``: accelerate knows no backend for DeepSpeed on a CPU, and every process takes itself for the only
one; so DeepSpeed's own AutoTP can be compared. ``CLIENTS_CPU_MESH``: axolotl makes its device mesh of GPUs.
"""

import os

_RANK = "LOCAL_RANK" in os.environ

if _RANK and os.environ.get("CLIENTS_CPU_BACKEND"):
    from accelerate.state import DistributedType, PartialState

    _original = PartialState._prepare_backend

    def _prepare_backend(self, *args, **kwargs):
        found, kind = _original(self, *args, **kwargs)
        return ("gloo", kind) if found is None and kind == DistributedType.NO else (found, kind)

    PartialState._prepare_backend = _prepare_backend

if _RANK and os.environ.get("CLIENTS_CPU_MESH"):
    from accelerate.parallelism_config import ParallelismConfig

    _build = ParallelismConfig.build_device_mesh
    ParallelismConfig.build_device_mesh = lambda self, device_type: _build(self, "cpu")
