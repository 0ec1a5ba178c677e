"""What is known of a sharded model: its plan, its mesh, and how each parameter lies."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.plans import Plan
from tp_plugin.plans import plan as p

ATTRIBUTE = "tp_sharding"


@dataclasses.dataclass(frozen=True, eq=False)
class Sharding:
    """The record that a sharded model carries.

    Attributes:
        layouts: parameter name -> how it lies on the ranks; names that are missing are replicated. Names are those in
            the model that carries this, which may lie inside a ``PeftModel``.
        shapes: full shape of every parameter, by name, each tied parameter once.
        linears: how many linear layers are sharded, of how many (the head not counted).
        equalised: names of tensors that differed between the ranks of a TP group and were taken from its rank 0.
    """

    plan: Plan
    mesh: ParallelMesh
    config: TensorParallelConfig
    layouts: Mapping[str, ShardLayout]
    shapes: Mapping[str, tuple[int, ...]]
    linears: tuple[int, int]
    equalised: tuple[str, ...] = ()

    def update(self, layouts: Mapping[str, ShardLayout], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Parameters were added or have other names now: adapters were put into the model."""
        object.__setattr__(self, "layouts", layouts)
        object.__setattr__(self, "shapes", shapes)

    def __deepcopy__(self, memo: dict) -> Sharding:
        raise TensorParallelError("a sharded model cannot be copied; copy it before sharding.")

    def numel(self, rank: int) -> int:
        """Parameters that ``rank`` of the TP group holds."""
        return sum(
            math.prod(self.layouts[name].local_shape(rank)) if name in self.layouts else math.prod(shape)
            for name, shape in self.shapes.items()
        )

    def fraction(self) -> float:
        """Parameters of the fullest rank, as a fraction of the model's."""
        return max(map(self.numel, range(self.mesh.tp_size))) / sum(map(math.prod, self.shapes.values()))

    def summary(self, zero_stage: int | None = None) -> str:
        """One honest line: degrees, what is sharded, what a rank holds."""
        zero = "" if zero_stage is None else f" ZeRO-{zero_stage}"
        words = {p.VOCAB_EMBEDDING: "embedding", p.VOCAB_HEAD: "head"}
        vocab = " and ".join(word for style, word in words.items() if self.plan.names(style))
        parts = [f"tp={self.mesh.tp_size} dp={self.mesh.dp_size}{zero}", "{}/{} linears sharded".format(*self.linears)]
        parts += [f"{len(self.plan.mixtures)} mixtures of experts sharded inside"] if self.plan.mixtures else []
        parts += [f"{vocab} vocab-parallel"] if vocab else []
        parts += [f"{self.fraction():.0%} of the parameters per rank"]
        return ", ".join(parts)


def state_of(model: nn.Module | Any) -> Sharding | None:
    """The record of a sharded model, or of the first sharded model inside it (an engine, a wrapper); None if none."""
    if not isinstance(model, nn.Module):
        return None
    for module in model.modules():
        found = module.__dict__.get(ATTRIBUTE)
        if found is not None:
            return found
    return None
