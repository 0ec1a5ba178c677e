"""The record of a sharded model: its plan, its mesh and the layout of each parameter."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from tp_plugin.config import TensorParallelConfig
from tp_plugin.errors import TensorParallelError
from tp_plugin.layout import ShardLayout
from tp_plugin.mesh import ParallelMesh
from tp_plugin.param_info import layout_of
from tp_plugin.plans import Plan
from tp_plugin.plans import plan as p

ATTRIBUTE = "tp_sharding"
PART = "tp_part"
NO_COPY = "a sharded model cannot be copied, and neither can a part of it that holds shards; copy it before sharding."
NO_PICKLE = (
    "a sharded model cannot be pickled; call tp_plugin.save_pretrained(model, directory) on every rank, or save the "
    "result of tp_plugin.full_state_dict(model) on rank 0."
)
_MODELS: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclasses.dataclass(frozen=True, eq=False)
class Sharding:
    """The record that a sharded model carries.

    Attributes:
        layouts: parameter name -> layout; other parameters are replicated. Names are those in the model that carries
            the record, which may be inside a ``PeftModel``.
        shapes: full shape of every parameter, by name, each tied parameter once.
        linears: sharded linear layers, and all of them; the head is not counted.
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
        """Replace layouts and shapes after adapters were added to the model."""
        object.__setattr__(self, "layouts", layouts)
        object.__setattr__(self, "shapes", shapes)

    def __deepcopy__(self, memo: dict) -> Sharding:
        raise TensorParallelError(NO_COPY)

    def __reduce__(self) -> NoReturn:
        raise TensorParallelError(NO_PICKLE)

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
        """One line: degrees, sharded layers, the fraction of the parameters on a rank."""
        zero = "" if zero_stage is None else f" ZeRO-{zero_stage}"
        words = {p.VOCAB_EMBEDDING: "embedding", p.VOCAB_HEAD: "head"}
        vocab = " and ".join(word for style, word in words.items() if self.plan.names(style))
        parts = [f"tp={self.mesh.tp_size} dp={self.mesh.dp_size}{zero}", "{}/{} linears sharded".format(*self.linears)]
        parts += [f"{len(self.plan.mixtures)} mixtures of experts sharded inside"] if self.plan.mixtures else []
        parts += [f"{vocab} vocab-parallel"] if vocab else []
        parts += [f"{self.fraction():.0%} of the parameters per rank"]
        return ", ".join(parts)


class Part:
    """The mark of every module that contains shards: the record, and the model that carries it.

    Libraries save, send and copy parts of a model (``model.model``, one layer) as often as the model itself.
    """

    def __init__(self, record: Sharding, root: nn.Module) -> None:
        self.record = record
        self._root = weakref.ref(root)

    def root(self) -> nn.Module | None:
        """The sharded model; None if only the part is alive."""
        return self._root()

    def __deepcopy__(self, memo: dict) -> Part:
        raise TensorParallelError(NO_COPY)

    def __reduce__(self) -> NoReturn:
        raise TensorParallelError(NO_PICKLE)


def mark_parts(root: nn.Module, record: Sharding) -> None:
    """Mark every module of ``root`` that contains shards as a part of it. Call it again after modules were added."""
    part = Part(record, root)
    marked: set[str] = set()
    for name, param in root.named_parameters(remove_duplicate=False):
        if layout_of(param) is not None:
            while name and (name := name.rpartition(".")[0]) not in marked:
                marked.add(name)
    for name in marked | {""}:
        root.get_submodule(name).__dict__[PART] = part


def note_state(model: nn.Module, record: Sharding) -> None:
    """Let ``model`` carry its record."""
    setattr(model, ATTRIBUTE, record)
    _MODELS.add(model)


def sharded_models() -> list[nn.Module]:
    """Every sharded model of this process that is alive."""
    return list(_MODELS)


def state_of(model: nn.Module | Any) -> Sharding | None:
    """The record of a sharded model, of the first one inside ``model`` (an engine), or of the one it is a part of.

    None if no module contains shards. Names in the record are those in the sharded model, see :func:`root_of`.
    """
    part = _part_of(model)
    return None if part is None else part.record


def root_of(model: nn.Module | Any) -> nn.Module | None:
    """The sharded model that ``model`` is, contains or is a part of; None if there is none."""
    part = _part_of(model)
    return None if part is None else part.root()


def _part_of(model: nn.Module | Any) -> Part | None:
    if not isinstance(model, nn.Module):
        return None
    found = (module.__dict__.get(PART) for module in model.modules())
    return next((part for part in found if part is not None), None)
