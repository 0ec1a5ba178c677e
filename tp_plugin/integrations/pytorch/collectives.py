"""torch's functional collectives, which losses use, are watched like those of ``torch.distributed``."""

import torch.distributed._functional_collectives as functional

from tp_plugin.integrations.features import WEIGHTS
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.step_guard.foreign_collectives import PLACES

upstream = Upstream(WEIGHTS)
_WHY = "rows that a loss collects over tensor-parallel ranks would count several times"
upstream.needs(functional, "all_gather_tensor", ["gather_dim", "group"], _WHY)
upstream.needs(functional, "all_reduce", ["reduceOp", "group"], _WHY)


@upstream.then
def _watch() -> None:
    if functional not in PLACES:
        PLACES.append(functional)
