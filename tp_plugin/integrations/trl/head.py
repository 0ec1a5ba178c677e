"""``add_fused_lm_head``: log-probabilities, entropy and more from a sharded head.

TRL's forward with a fused head multiplies hidden states by ``lm_head.weight`` itself and does not call the head's
module. That forward (scored positions, masks, the auxiliary loss) stays. The autograd Function that gets the weight is
replaced where that weight is a shard. Before TRL 1.15 DPO calls that Function itself, with two outputs, and SFT has a
loss of its own (:mod:`.sft_loss`).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.contract import NameMoved, contract
from tp_plugin.integrations.features import FUSED_HEAD
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.integrations.versions import is_before
from tp_plugin.lazy import VocabParallelLogits
from tp_plugin.loss import linear_logprobs
from tp_plugin.param_info import info_of, layout_of
from tp_plugin.partitioned import is_partitioned

MODULE = "trl.trainer.utils"
_HEAD, _PLACE = "the fused head hands it the head's weight", "ours takes its place for a shard"
_OURS = {"entropy": "entropy", "log_sum_sq_probs": "log_square_sum", "mean_logits": "mean_logit", "is_top1": "top_id"}
"""Outputs of TRL's Function after the log-probabilities, in its order -> our names for their sources."""
_ARGUMENTS = ["ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping"]


def declare(utils: ModuleType) -> Upstream:
    """The names of TRL's ``trainer.utils`` that the fused head needs."""
    upstream = Upstream(FUSED_HEAD)
    upstream.replace(utils, "_ChunkedLogProbFunction", None, _HEAD, _by_shards, since="1.14")
    upstream.replace(
        utils,
        "maybe_gather_lm_head_ctx",
        ["params"],
        "a gathered head is none of ZeRO-3",
        _of_zero,
        since="1.9",
    )
    upstream.replace(
        utils,
        "_supports_trl_loss_kernel",
        ["logits", "index", "row_mask"],
        "lazy logits have no memory to read",
        _with_values,
        since="1.14",
    )

    @upstream.also
    def check_function() -> None:
        function = getattr(utils, "_ChunkedLogProbFunction", None)
        if function is None or is_before("trl", "1.14"):
            return
        if is_before("trl", "1.15"):
            contract(function, "forward", [_ARGUMENTS[0], "last_hidden", *_ARGUMENTS[2:], "logit_scale"], _PLACE)
            return
        contract(function, "forward", [*_ARGUMENTS, "logit_scale", "outputs"], _PLACE)
        kernels = __import__(function.__module__, fromlist=["OPTIONAL_OUTPUTS"])
        outputs = contract(kernels, "OPTIONAL_OUTPUTS", None, "they are served in this order")
        if tuple(outputs) != tuple(_OURS):
            raise NameMoved(f"{kernels.__name__}.OPTIONAL_OUTPUTS is {tuple(outputs)}, not {tuple(_OURS)}")

    return upstream


def _by_shards(original: Any) -> Any:
    chooses = "outputs" in inspect.signature(original.forward).parameters  # otherwise log-probabilities and entropy

    class ChunkedLogProb:
        """TRL's Function for full weights, ours for shards."""

        @staticmethod
        def apply(
            hidden: torch.Tensor,
            weight: torch.Tensor,
            bias: torch.Tensor | None,
            targets: torch.Tensor,
            temperature: float,
            chunk_size: int,
            final_logit_softcapping: float | None = None,
            logit_scale: float = 1.0,
            outputs: tuple[str, ...] = tuple(_OURS),
        ) -> tuple[torch.Tensor | None, ...]:
            vocab, layout = info_of(weight).vocab, layout_of(weight)
            if vocab is None or weight.shape[0] != vocab.rows:  # full, or gathered
                if layout is not None and tuple(weight.shape) != layout.shape:
                    raise TensorParallelError(
                        "TRL's fused language-model head needs a vocabulary-parallel head, and this one is sharded "
                        "otherwise; leave it replicated by a rule of style 'replicated'."
                    )
                rest = temperature, chunk_size, final_logit_softcapping, logit_scale, *((outputs,) if chooses else ())
                return original.apply(hidden, weight, bias, targets, *rest)
            found = linear_logprobs(
                hidden,
                weight,
                targets,
                more=[_OURS[name] for name in (outputs if chooses else ["entropy"]) if name in _OURS],
                bias=bias,
                vocab=vocab,
                scale=logit_scale / temperature,
                softcap=None if final_logit_softcapping is None else final_logit_softcapping / temperature,
            )
            if not chooses:
                return found.logprobs, found.entropy
            is_top1 = None if found.top_id is None else found.top_id == targets
            return found.logprobs, found.entropy, found.log_square_sum, found.mean_logit, is_top1

    return ChunkedLogProb


def _of_zero(original: Callable[..., Any]) -> Callable[..., Any]:
    """Pass partitioned weights only: at ZeRO-3 TRL reads their state, which the guard's unsharded view lacks."""

    @functools.wraps(original)
    def maybe_gather_lm_head_ctx(*params: torch.Tensor | None) -> Any:
        return original(*(param for param in params if is_partitioned(param)))

    return maybe_gather_lm_head_ctx


def _with_values(original: Callable[..., bool]) -> Callable[..., bool]:
    """Send deferred logits to TRL's plain PyTorch path, which they compute from their shards."""

    def _supports_trl_loss_kernel(logits: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
        return not isinstance(logits, VocabParallelLogits) and original(logits, *args, **kwargs)

    return _supports_trl_loss_kernel
