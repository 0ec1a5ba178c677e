"""SFT's loss ``chunked_nll`` of TRL 1.4 to 1.14, its default then, from a sharded head.

It multiplies hidden states by ``lm_head.weight`` in chunks of tokens. Later versions have the fused head instead
(:mod:`.head`), earlier ones compute logits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from tp_plugin.integrations.features import FUSED_HEAD
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.loss import linear_logprobs
from tp_plugin.param_info import info_of
from tp_plugin.partitioned import gathered, is_partitioned

MODULE = "trl.trainer.sft_trainer"
_PARAMETERS = ["hidden_states", "lm_head_weight", "chunk_size", "labels", "shift_labels", "num_items_in_batch"]


def declare(sft_trainer: ModuleType) -> Upstream:
    """The loss of TRL's ``trainer.sft_trainer`` that reads the head's weight."""
    upstream = Upstream(FUSED_HEAD)
    # since 1.9; it leaves a parameter that is gathered already as it is
    whole = getattr(sft_trainer, "maybe_gather_lm_head_ctx", lambda *params: gathered(params))
    upstream.replace(
        sft_trainer,
        "_chunked_cross_entropy_loss",
        [*_PARAMETERS, "logit_scale", "final_logit_softcapping", "lm_head_bias"],
        "it multiplies by the head's weight, which is a shard",
        functools.partial(_by_shards, whole=whole),
        since="1.4",
        until="1.15",
    )
    return upstream


def _by_shards(
    original: Callable[..., Any], whole: Callable[..., contextlib.AbstractContextManager]
) -> Callable[..., Any]:
    @functools.wraps(original)
    def _chunked_cross_entropy_loss(
        hidden_states: torch.Tensor,
        lm_head_weight: torch.Tensor,
        chunk_size: int,
        labels: torch.Tensor | None = None,
        shift_labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        logit_scale: float = 1.0,
        final_logit_softcapping: float | None = None,
        lm_head_bias: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        vocab = info_of(lm_head_weight).vocab
        parted = [param for param in (lm_head_weight, lm_head_bias) if param is not None and is_partitioned(param)]
        with whole(*parted):
            if vocab is None or lm_head_weight.shape[0] != vocab.rows:
                rest = labels, shift_labels, num_items_in_batch, logit_scale, final_logit_softcapping, lm_head_bias
                return original(hidden_states, lm_head_weight, chunk_size, *rest)
            if shift_labels is None:
                assert labels is not None
                hidden_states, shift_labels = hidden_states[..., :-1, :], labels[..., 1:]
            scored = shift_labels != -100
            hidden, targets = hidden_states[scored], shift_labels[scored]
            found = linear_logprobs(
                hidden,
                lm_head_weight,
                targets,
                more=["entropy", "top_id"],
                bias=lm_head_bias,
                vocab=vocab,
                scale=logit_scale,
                softcap=final_logit_softcapping,
            )
        assert found.entropy is not None
        count = scored.sum()
        loss = -found.logprobs.sum() / (count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch)
        return loss, (found.top_id == targets).sum().float(), found.entropy.detach().sum(), count

    return _chunked_cross_entropy_loss
