"""``save_pretrained`` of a sharded model by the library: a call for every rank, of which rank 0 writes.

The library saves module by module. Its own modules (``Dense``, a sparse head) write their ``state_dict()``, which has
shards or parts of ZeRO's flat buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch.distributed as dist

from tp_plugin.errors import failing_together, meet
from tp_plugin.integrations.features import SENTENCE_SAVING
from tp_plugin.integrations.transformers.trainer_save import answering, at_hand
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.sharding import state_of
from tp_plugin.weights.gather import full_state_dict

MODULE = "sentence_transformers.base.model"
_TAKES = ["path", "model_name", "create_model_card", "train_datasets", "safe_serialization"]


def declare(model: ModuleType) -> Upstream:
    """The method by which models of every kind save."""
    upstream = Upstream(SENTENCE_SAVING)
    upstream.patch(model.BaseModel, "save", _TAKES, "modules would write their shards")(_save)
    return upstream


def _save(original: Callable[..., None], self: Any, path: str, *args: Any, **options: Any) -> None:
    if state_of(self) is None or at_hand(self) is not None:  # a trainer has gathered it
        original(self, path, *args, **options)
        return
    meet("save_pretrained")
    state = full_state_dict(self)
    with failing_together():
        if dist.get_rank() == 0:
            with answering(self, state):
                original(self, path, *args, **options)
