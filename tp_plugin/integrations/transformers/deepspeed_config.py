"""The DeepSpeed config as Trainer reads it: batch sizes, dropped optimizers, ``deepspeed.tp_model_init``.

- transformers multiplies ``train_batch_size`` by all ranks, as DeepSpeed does, and refuses another number without
  naming it. Micro batch and accumulation are Trainer's, so a number that counts replicas agrees with them too.
- ``deepspeed_init`` silently drops ``Trainer(optimizers=...)``, and prefers the optimizer of the DeepSpeed config to
  any of Trainer's, at any tensor-parallel degree. Training continues with another one, so rank 0 warns.
- ``deepspeed.tp_model_init``, called in every ``train()``, records degree and dtype for the process. A second Trainer
  with another dtype would be refused, and a later engine without ``tensor_parallel`` (a reference model) sharded. The
  config has all that our slot needs, so the call is left out.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import deepspeed
from accelerate.optimizer import AcceleratedOptimizer
from transformers import Trainer, trainer
from transformers.integrations import deepspeed as trainer_side
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig

from tp_plugin import log
from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.accelerate.degree import degree_in, tp_size
from tp_plugin.integrations.deepspeed.config import shards_at_once
from tp_plugin.integrations.features import TRAINER
from tp_plugin.integrations.upstream import Upstream
from tp_plugin.integrations.versions import named

upstream = Upstream(TRAINER)

_MATCH = ["ds_key_long", "hf_val", "hf_key", "must_match"]
_INIT = ["trainer", "num_training_steps", "inference"]
_DROPS = "optimizers that it drops are named there"
upstream.needs(Trainer, "create_optimizer", ["model"], _DROPS)
upstream.needs(trainer_side, "deepspeed_init", _INIT, "it calls tp_model_init")

_WARNED: weakref.WeakSet[Any] = weakref.WeakSet()  # trainers


@upstream.patch(HfTrainerDeepSpeedConfig, "fill_match", _MATCH, "a train_batch_size that counts replicas agrees, too")
def _fill_match(
    original: Callable[..., None], self: Any, ds_key_long: str, hf_val: Any, *args: Any, **kwargs: Any
) -> None:
    degree, given = degree_in(self.config), self.config.get("train_batch_size")
    if degree > 1 and ds_key_long == "train_batch_size" and given == hf_val // degree:
        return
    original(self, ds_key_long, hf_val, *args, **kwargs)


@upstream.patch(
    deepspeed, "tp_model_init", ["model", "tp_size", "dtype", "config"], "Trainer calls it to record the degree"
)
def _tp_model_init(
    original: Callable[..., Any], model: Any, tp_size: int, dtype: Any, config: Any = None, **kwargs: Any
) -> Any:
    if tp_size > 1 and tp_size == degree_in(config) and not kwargs:
        return model
    if tp_size > 1 and shards_at_once():
        raise TensorParallelError(
            f"deepspeed.tp_model_init of {named('deepspeed')} shards the model by DeepSpeed's own AutoTP; leave the "
            f'call out and set "tensor_parallel": {{"autotp_size": {tp_size}}} in the DeepSpeed config.'
        )
    return original(model, tp_size, dtype, config, **kwargs)


@upstream.patch(trainer, "deepspeed_init", _INIT, _DROPS)
def _deepspeed_init(
    original: Callable[..., Any], trainer: Any, num_training_steps: int, inference: bool = False
) -> Any:
    if tp_size() > 1 and not inference and trainer not in _WARNED:
        _WARNED.add(trainer)
        for sentence in dropped(trainer):
            log.warning(sentence)
    return original(trainer, num_training_steps, inference)


def dropped(trainer: Any) -> Iterator[str]:
    """Describe each optimizer or schedule of a Trainer that transformers will drop; call it before that."""
    section = trainer.accelerator.state.deepspeed_plugin.hf_ds_config.config.get("optimizer")
    made = f"training.optim's ({_plain(trainer.args.optim)})"
    if section is not None:
        made = f"the {section.get('type')} of the DeepSpeed config"
        own = _own_optimizer(trainer)
        if own:
            yield (
                f"transformers trains with {made} and not with {own}, with tensor parallelism or without; remove "
                '"optimizer" from the DeepSpeed config.'
            )
    optimizer = trainer.optimizer if not isinstance(trainer.optimizer, AcceleratedOptimizer) else None
    given = {"optimizer": optimizer, "scheduler": trainer.lr_scheduler}
    names = [f"{name} {type(found).__name__}" for name, found in given.items() if found is not None]
    if names:
        instead = made if optimizer is not None else f"a schedule of its own ({_plain(trainer.args.lr_scheduler_type)})"
        yield (
            f"under DeepSpeed transformers drops what Trainer(optimizers=...) was given ({' and '.join(names)}) and "
            f"trains with {instead}, at any tp_size; override create_optimizer/create_scheduler, or pass "
            "optimizer_cls_and_kwargs=(class, arguments)."
        )


def _own_optimizer(trainer: Any) -> str | None:
    """Describe the option that asks for another optimizer than AdamW, Trainer's default; None if there is none."""
    if "create_optimizer" in vars(trainer) or type(trainer).create_optimizer is not Trainer.create_optimizer:
        return f"what {type(trainer).__name__}.create_optimizer makes"
    if trainer.optimizer_cls_and_kwargs is not None:
        return f"the {trainer.optimizer_cls_and_kwargs[0].__name__} of optimizer_cls_and_kwargs"
    optim = _plain(trainer.args.optim)
    return None if optim.startswith("adamw") else f"training.optim's ({optim})"


def _plain(option: Any) -> str:
    return str(getattr(option, "value", option))
