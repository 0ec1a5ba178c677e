"""``add_fused_lm_head``: log-probabilities and their company from a sharded head.

TRL's forward with a fused head multiplies hidden states by ``lm_head.weight`` itself, past the head's module. All of
it (which positions are scored, masks, the auxiliary loss) stays TRL's; only the autograd Function that is handed the
weight is ours where that weight is a shard.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.contract import Patches, contract
from tp_plugin.lazy import VocabParallelLogits
from tp_plugin.loss import linear_logprobs

MODULE = "trl.trainer.utils"
_OURS = {"entropy": "entropy", "log_sum_sq_probs": "log_square_sum", "mean_logits": "mean_logit", "is_top1": "top_id"}
"""Outputs of TRL's Function after the log-probabilities, in its order, and our names for what they come from."""
_ARGUMENTS = ["ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size", "final_logit_softcapping"]


def check_contracts(utils: ModuleType) -> None:
    function = contract(utils, "_ChunkedLogProbFunction", None, "the fused head hands it the head's weight")
    contract(function, "forward", [*_ARGUMENTS, "logit_scale", "outputs"], "ours takes its place for a shard")
    kernels = __import__(function.__module__, fromlist=["OPTIONAL_OUTPUTS"])
    outputs = contract(kernels, "OPTIONAL_OUTPUTS", None, "they are served in this order")
    if tuple(outputs) != tuple(_OURS):
        raise TensorParallelError(
            f"{kernels.__name__}.OPTIONAL_OUTPUTS is {tuple(outputs)} where {tuple(_OURS)} was expected; install a "
            "version of trl that tp-plugin was tested with."
        )
    contract(utils, "maybe_gather_lm_head_ctx", ["params"], "a gathered head is no parameter of ZeRO-3")
    contract(utils, "_supports_trl_loss_kernel", ["logits", "index", "row_mask"], "lazy logits have no memory to read")


def install(patches: Patches, utils: ModuleType) -> None:
    patches.replace(utils, "_ChunkedLogProbFunction", _by_shards)
    patches.replace(utils, "maybe_gather_lm_head_ctx", _of_zero)
    patches.replace(utils, "_supports_trl_loss_kernel", _with_values)


def _by_shards(original: Any) -> Any:
    class ChunkedLogProb:
        """TRL's Function for whole weights, ours for shards."""

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
            vocab, layout = getattr(weight, "tp_vocab", None), getattr(weight, "tp_layout", None)
            if vocab is None or weight.shape[0] != vocab.rows:  # whole, or gathered to be so
                if layout is not None and tuple(weight.shape) != layout.shape:
                    raise TensorParallelError(
                        "TRL's fused language-model head reads the weight of a head that is sharded but not as a "
                        "vocabulary-parallel one; leave it replicated by a rule of style 'replicate'."
                    )
                rest = temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
                return original.apply(hidden, weight, bias, targets, *rest)
            found = linear_logprobs(
                hidden,
                weight,
                targets,
                more=[_OURS[name] for name in outputs if name in _OURS],
                bias=bias,
                vocab=vocab,
                scale=logit_scale / temperature,
                softcap=None if final_logit_softcapping is None else final_logit_softcapping / temperature,
            )
            is_top1 = None if found.top_id is None else found.top_id == targets
            return found.logprobs, found.entropy, found.log_square_sum, found.mean_logit, is_top1

    return ChunkedLogProb


def _of_zero(original: Callable[..., Any]) -> Callable[..., Any]:
    """At ZeRO-3 TRL asks every weight for its state, which that of the guard's plain twin does not have."""

    @functools.wraps(original)
    def maybe_gather_lm_head_ctx(*params: torch.Tensor | None) -> Any:
        return original(*(param for param in params if hasattr(param, "ds_status")))

    return maybe_gather_lm_head_ctx


def _with_values(original: Callable[..., bool]) -> Callable[..., bool]:
    """Logits that have not been computed go the way of plain PyTorch, where they answer from their shards."""

    def _supports_trl_loss_kernel(logits: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
        return not isinstance(logits, VocabParallelLogits) and original(logits, *args, **kwargs)

    return _supports_trl_loss_kernel
