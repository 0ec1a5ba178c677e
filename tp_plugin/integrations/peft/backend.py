"""PEFT as :class:`tp_plugin.sharding.adapters.Library`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import peft
from peft import PeftModel
from peft.tuners import ia3, lora, tuners_utils
from peft.utils import other
from torch import nn

from tp_plugin.integrations.contract import NameMoved
from tp_plugin.integrations.features import ADAPTERS, DORA, EXPERT_ADAPTERS
from tp_plugin.integrations.peft import methods, support_matrix, wrappers
from tp_plugin.integrations.transformers.parameters import full_count
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.mesh import ParallelMesh
from tp_plugin.plans import Plan
from tp_plugin.sharding import adapters
from tp_plugin.sharding.adapters import TrainedCopies

upstream = Upstream(ADAPTERS)
_FOUND, _SHARDED, _NORMS = "adapters are found by it", "such adapters are sharded", "it takes norms of sharded weights"
upstream.needs(peft.PeftModel, "get_base_model", [], _FOUND)
upstream.needs(tuners_utils, "BaseTuner", None, _FOUND)
upstream.needs(tuners_utils, "BaseTunerLayer", None, _FOUND)
upstream.needs(tuners_utils.BaseTunerLayer, "get_base_layer", [], _FOUND)
upstream.needs(other, "AuxiliaryTrainingWrapper", None, _FOUND)
upstream.needs(other, "ModulesToSaveWrapper", None, _FOUND)
upstream.needs(lora, "Linear", None, _SHARDED)
upstream.needs(lora, "Embedding", None, _SHARDED)
upstream.needs(lora.Embedding, "_embed", ["input", "weight"], "it looks words up in a sharded table")
experts = Upstream(EXPERT_ADAPTERS)
experts.needs("peft.tuners.lora.layer", "ParamWrapper", None, _SHARDED)


@experts.also
def _check_order() -> None:
    wrapper = getattr(lora.layer, "ParamWrapper", None)
    if wrapper is not None and "_did_swap_in_out_features" not in wrapper.__init__.__code__.co_names:
        raise NameMoved("peft.tuners.lora.layer.ParamWrapper does not say in which order it holds sizes of experts")


upstream.needs(ia3, "Linear", None, _SHARDED)
upstream.needs(ia3, "IA3Layer", None, _SHARDED)
doras = Upstream(DORA)
_DORA = "peft.tuners.lora.dora:DoraLinearLayer"
doras.needs("peft.tuners.lora.variants", "DoraLinearVariant", None, _SHARDED)
doras.needs(_DORA, "get_weight_norm", ["weight", "lora_weight", "scaling"], _NORMS)
doras.needs(_DORA, "get_lora_weight", ["lora_A", "lora_B"], _NORMS)
doras.needs(_DORA, "forward", ["x", "lora_A", "lora_B", "scaling", "base_layer"], _NORMS)


@upstream.patch(PeftModel, "get_nb_trainable_parameters", [], "it would count this rank's shards")
def _get_nb_trainable_parameters(original: Callable[..., tuple[int, int]], self: Any) -> tuple[int, int]:
    trainable, every = (full_count(self, trainable=only) for only in (True, False))
    # PEFT also calls it with models of its tuners
    return original(self) if trainable is None or every is None else (trainable, every)


class _Peft:
    def bare(self, model: nn.Module) -> nn.Module | None:
        return wrappers.bare_of(model)

    def obstacle(self, model: nn.Module) -> str | None:
        return ADAPTERS.broken or support_matrix.unsupported_adapter(model)

    def objection(self, bare: nn.Module, plan: Plan) -> str | None:
        return support_matrix.unsupported_on_plan(bare, plan)

    def taken_out(self, bare: nn.Module) -> contextlib.AbstractContextManager[TrainedCopies]:
        return wrappers.taken_out(bare)

    def shard_adapters(self, bare: nn.Module, mesh: ParallelMesh) -> None:
        methods.shard_adapters(bare, mesh)


LIBRARY = _Peft()


@upstream.then
def _introduce() -> None:
    adapters.introduce(LIBRARY)
