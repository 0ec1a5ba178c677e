"""TensorParallelConfig: the options of tensor parallelism, read from a DeepSpeed config."""

from __future__ import annotations

import dataclasses
import difflib
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tp_plugin.errors import TensorParallelError

PlanRules = Mapping[str, str | Mapping[str, Any]]
"""Rules of the user's: module-name pattern -> a style, or an object with "style" and more of ``tp_plugin.Rule``."""
INFER = ("checked", "trusted", "off")
BLOCK = "tp_plugin"  # our top-level block of the DeepSpeed config


@dataclasses.dataclass(frozen=True, kw_only=True)
class TensorParallelConfig:
    """Options of sharding, of its checks and of the loss.

    In a DeepSpeed config ``tp_size`` is ``tensor_parallel.autotp_size``; the other fields are keys of the
    top-level ``tp_plugin`` block.

    Attributes:
        tp_size: ranks a tensor is sharded over; neighbours in rank order form a group. 1 shards nothing.
        plan: rules that go before every other source of the plan: module-name pattern -> style, ours or HF's, or
            pattern -> object such as ``{"style": "column", "role": "q|k|v"}`` with the fields of
            :class:`tp_plugin.Rule`. Patterns are matched against full module names; ``*`` stands for one dotted part.
        check_batch_every: every how many training forwards the ranks of a TP group compare their inputs
            (one small all-gather). 0 never compares. The first forward is always compared unless 0.
        guard: compute the first training step again without tensor parallelism, on a slice of the batch; refuse to go
            on where loss or logits differ, or where a trained parameter has no gradient.
        check_replicas_every: every how many training forwards the replicas of a parameter in a TP group are compared by
            a hash, the first included; before that also after 1, 2, 4, 8... of them. 0 never compares.
        broadcast_batch: send tensor-parallel rank 0's batch to its TP group before every forward, for data collators
            that draw random numbers.
        loss_workspace_mib: working memory of the fused head and loss, in MiB; its chunk size follows from it. 0 is
            512 on an accelerator and 64 on a CPU.
        infer: treatment of blocks that no rule matches. "checked": rules are inferred from their modules and shapes,
            and tried on a small copy of the model before its weights are touched. "trusted": the same without the
            trial. "off": such blocks stay replicated.
        uneven_heads: where ``tp_size`` fits neither the query nor the key/value heads of an attention, let ranks differ
            by one query head instead of refusing.
        quiet: do not log the summary of what was sharded.
    """

    tp_size: int = 1
    plan: PlanRules = dataclasses.field(default_factory=dict)
    check_batch_every: int = 100
    guard: bool = True
    check_replicas_every: int = 500
    broadcast_batch: bool = False
    loss_workspace_mib: int = 0
    infer: str = "checked"
    uneven_heads: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        for name, kind in _field_types().items():
            value = getattr(self, name)
            if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
                raise TensorParallelError(
                    f"tp_plugin option {name!r} must be of type {_type_name(kind)}, got {value!r}; "
                    f"correct it in {_where(name)}."
                )
        if self.tp_size < 1:
            raise TensorParallelError(f"tp_size must be at least 1, got {self.tp_size}; correct {_where('tp_size')}.")
        if self.infer not in INFER:
            raise TensorParallelError(
                f"tp_plugin option 'infer' must be one of {', '.join(INFER)}, got {self.infer!r}; correct it in "
                f"{_where('infer')}."
            )
        for name in ("check_batch_every", "check_replicas_every"):
            if getattr(self, name) < 0:
                raise TensorParallelError(f"tp_plugin option {name!r} must be 0 (never) or a number of steps.")
        if self.loss_workspace_mib < 0:
            raise TensorParallelError("tp_plugin option 'loss_workspace_mib' must be 0 (automatic) or a number of MiB.")
        for pattern, style in self.plan.items():
            if not isinstance(pattern, str) or not isinstance(style, str | Mapping):
                raise TensorParallelError(
                    "tp_plugin option 'plan' maps module-name patterns to style names, or to objects with a \"style\", "
                    f"got {pattern!r}: {style!r}."
                )

    @classmethod
    def from_dict(cls, options: Mapping[str, Any], *, tp_size: int = 1) -> TensorParallelConfig:
        """Read the ``tp_plugin`` block. Raises TensorParallelError for an unknown key or a wrong type."""
        if not isinstance(options, Mapping):
            raise TensorParallelError(
                f"the {BLOCK!r} block of the DeepSpeed config must be an object of options, got {options!r}."
            )
        known = [name for name in _field_types() if name != "tp_size"]
        for key in options:
            if key == "tp_size":
                raise TensorParallelError(
                    f"'tp_size' does not belong in the {BLOCK!r} block; set tensor_parallel.autotp_size in the "
                    "DeepSpeed config, which Accelerate and Trainer read too."
                )
            if key not in known:
                near = difflib.get_close_matches(str(key), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}."
                raise TensorParallelError(f"unknown key {key!r} in the {BLOCK!r} block of the DeepSpeed config; {hint}")
        return cls(tp_size=tp_size, **options)

    @classmethod
    def from_deepspeed(cls, config: Mapping[str, Any] | str | Path) -> TensorParallelConfig:
        """Read ``tensor_parallel.autotp_size`` and the ``tp_plugin`` block of a DeepSpeed config.

        Args:
            config: the config itself, or the path of its JSON file.

        Raises:
            TensorParallelError: unreadable file, unknown key, wrong type.
        """
        if not isinstance(config, Mapping):
            try:
                config = typing.cast(Mapping[str, Any], json.loads(Path(config).read_text()))
            except (OSError, json.JSONDecodeError) as failure:
                raise TensorParallelError(f"cannot read the DeepSpeed config {str(config)!r}: {failure}") from failure
        section = config.get("tensor_parallel") or {}
        if not isinstance(section, Mapping):
            raise TensorParallelError(
                f'tensor_parallel in the DeepSpeed config must be like {{"autotp_size": 2}}, got {section!r}.'
            )
        size = section.get("autotp_size", 1)
        if not isinstance(size, int) or isinstance(size, bool) or size < 0:
            raise TensorParallelError(f"tensor_parallel.autotp_size must be a whole number of ranks, got {size!r}.")
        return cls.from_dict(config.get(BLOCK, {}), tp_size=max(size, 1))


def _field_types() -> dict[str, type]:
    hints = typing.get_type_hints(TensorParallelConfig)
    return {
        field.name: typing.get_origin(hints[field.name]) or hints[field.name]
        for field in dataclasses.fields(TensorParallelConfig)
    }


def _type_name(kind: type) -> str:
    return "a mapping of strings" if kind is Mapping else kind.__name__


def _where(name: str) -> str:
    if name == "tp_size":
        return "tensor_parallel.autotp_size in the DeepSpeed config"
    return f"the {BLOCK!r} block of the DeepSpeed config"
