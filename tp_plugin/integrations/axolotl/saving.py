"""The model that axolotl saves after a training at ZeRO 0 to 2.

Its rank 0 alone calls ``model.save_pretrained`` there, and would wait for the shards of the others. At ZeRO-3 all ranks
call ``trainer.save_model``, which is right at every stage of a sharded model.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.features import AXOLOTL
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.sharding import state_of

MODULE = "axolotl.train"
_CHANGED_BEFORE = ("relora", "qat", "llmcompressor")
"""Options with which axolotl changes the model before or after it is written."""


def declare(_train: ModuleType | None) -> Upstream:
    """The function of axolotl's ``train`` that saves."""
    upstream = Upstream(AXOLOTL)
    upstream.patch(MODULE, "save_trained_model", ["cfg", "trainer", "model"], "rank 0 alone would save")(_save)
    return upstream


def _save(original: Callable[..., None], cfg: Any, trainer: Any, model: Any) -> None:
    if state_of(model) is None:
        original(cfg, trainer, model)
        return
    asked = next((option for option in _CHANGED_BEFORE if getattr(cfg, option, None)), None)
    if asked is not None:
        raise TensorParallelError(
            f"axolotl's {asked} changes full weights, and this model's are sharded; leave it out of the config."
        )
    trainer.save_model(cfg.output_dir)
