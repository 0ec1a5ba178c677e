"""Adapters where a name of PEFT has moved: models with any are refused, and recognised without a name of PEFT's."""

from __future__ import annotations

import contextlib

from torch import nn

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.features import ADAPTERS
from tp_plugin.mesh import ParallelMesh
from tp_plugin.plans import Plan
from tp_plugin.sharding import adapters
from tp_plugin.sharding.adapters import TrainedCopies


class _Refused:
    def bare(self, model: nn.Module) -> nn.Module | None:
        if ADAPTERS.broken is None:
            return None
        return model if any(type(m).__module__.split(".")[0] == "peft" for m in model.modules()) else None

    def obstacle(self, model: nn.Module) -> str | None:
        return ADAPTERS.broken

    def objection(self, bare: nn.Module, plan: Plan) -> str | None:
        return ADAPTERS.broken

    def taken_out(self, bare: nn.Module) -> contextlib.AbstractContextManager[TrainedCopies]:
        raise TensorParallelError(ADAPTERS.broken)

    def shard_adapters(self, bare: nn.Module, mesh: ParallelMesh) -> None:
        raise TensorParallelError(ADAPTERS.broken)


_LIBRARY = _Refused()


def introduce() -> None:
    """Let models with adapters be refused while a name of PEFT has moved."""
    adapters.introduce(_LIBRARY)
