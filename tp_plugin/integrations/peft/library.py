"""PEFT as :class:`tp_plugin.sharding.adapters.Library`."""

from __future__ import annotations

import contextlib

import peft
from peft.tuners import ia3, lora, tuners_utils
from peft.tuners.lora import dora, layer, variants
from peft.utils import other
from torch import nn

from tp_plugin.integrations.contract import contract, out_of_range
from tp_plugin.integrations.peft import allowed, wrappers
from tp_plugin.integrations.peft import lay as laying
from tp_plugin.mesh import ParallelMesh
from tp_plugin.plans import Plan
from tp_plugin.sharding.adapters import Twins


def check_contracts() -> None:
    """See :func:`tp_plugin.integrations.peft.check_contracts`."""
    found = "adapters are found by it"
    contract(peft.PeftModel, "get_base_model", [], found)
    for name in ("BaseTuner", "BaseTunerLayer"):
        contract(tuners_utils, name, None, found)
    contract(tuners_utils.BaseTunerLayer, "get_base_layer", [], found)
    for name in ("AuxiliaryTrainingWrapper", "ModulesToSaveWrapper"):
        contract(other, name, None, found)
    laid = "adapters of this class are sharded"
    contract(lora, "Linear", None, laid)
    contract(lora, "Embedding", None, laid)
    contract(lora.Embedding, "_embed", ["input", "weight"], "it looks words up in a sharded table")
    contract(layer, "ParamWrapper", None, laid)
    contract(ia3, "Linear", None, laid)
    contract(variants, "DoraLinearVariant", None, laid)
    norms = "it takes the norms of sharded weights"
    contract(dora.DoraLinearLayer, "get_weight_norm", ["weight", "lora_weight", "scaling"], norms)
    contract(dora.DoraLinearLayer, "get_lora_weight", ["lora_A", "lora_B"], norms)
    contract(dora.DoraLinearLayer, "forward", ["x", "lora_A", "lora_B", "scaling", "base_layer"], norms)
    contract(ia3, "IA3Layer", None, laid)


class _Peft:
    def bare(self, model: nn.Module) -> nn.Module | None:
        return wrappers.bare_of(model)

    def obstacle(self, model: nn.Module) -> str | None:
        return out_of_range("peft", extra="peft") or allowed.obstacle(model)

    def objection(self, bare: nn.Module, plan: Plan) -> str | None:
        return allowed.objection(bare, plan)

    def taken_out(self, bare: nn.Module) -> contextlib.AbstractContextManager[Twins]:
        return wrappers.taken_out(bare)

    def lay(self, bare: nn.Module, mesh: ParallelMesh) -> None:
        laying.lay(bare, mesh)


LIBRARY = _Peft()
