"""Refuse what a loop writes around a step of DeepSpeed's where it would have no effect.

Under DeepSpeed ``Accelerator.backward`` goes backward, clips and steps. ``optimizer.step()``, ``zero_grad()`` and
``clip_grad_norm_()`` come after that and do nothing. A loop that goes backward several times before
``optimizer.step()`` has stepped each time, and gradients are clipped at a number of the config's. Neither is what one
process would train.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator
from accelerate.utils.deepspeed import DeepSpeedOptimizerWrapper

from tp_plugin import log
from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.accelerate.degree import tp_size
from tp_plugin.integrations.features import ACCELERATE
from tp_plugin.integrations.upstream import Upstream

upstream = Upstream(ACCELERATE)
_STEPPED: weakref.WeakSet[Any] = weakref.WeakSet()  # optimizers stepped in backward, whose step() has not come yet
_UNASKED: weakref.WeakSet[Any] = weakref.WeakSet()  # engines that clip at a norm of accelerate's or DeepSpeed's choice
_BY_HAND = "a loop that accumulates by hand is refused there"


@upstream.patch(Accelerator, "backward", ["loss"], _BY_HAND)
def _backward(original: Callable[..., Any], self: Accelerator, loss: Any, *args: Any, **kwargs: Any) -> Any:
    engine = _engine(self) if tp_size() > 1 else None
    if engine is None:
        return original(self, loss, *args, **kwargs)
    if self.sync_gradients and getattr(engine, "inside_no_sync_ctxt", False):
        raise TensorParallelError(
            "model.no_sync() around accelerator.backward: DeepSpeed steps inside of backward and cannot leave the sum "
            "over replicas out; put micro batches under `with accelerator.accumulate(model)`."
        )
    if self.sync_gradients and engine.optimizer in _STEPPED:
        raise TensorParallelError(
            "accelerator.backward came twice before optimizer.step(), but under DeepSpeed every backward outside of "
            "accelerate's accumulation is a step: put micro batches under `with accelerator.accumulate(model)` "
            "and leave the division of the loss to it, or call optimizer.step() after each backward."
        )
    before = engine.global_steps
    if before and engine in _UNASKED:  # no clip_grad_norm_() has come after the first step
        _UNASKED.discard(engine)
        log.warning(
            f"gradients are clipped at the norm {engine.gradient_clipping():g}, which the loop does not ask for: it is "
            'the default of DeepSpeed and what accelerate makes of "auto"; "gradient_clipping": 0 in the DeepSpeed '
            "config clips never."
        )
    done = original(self, loss, *args, **kwargs)
    if engine.global_steps != before and engine.optimizer is not None:
        _STEPPED.add(engine.optimizer)
    return done


@upstream.patch(DeepSpeedOptimizerWrapper, "step", [], _BY_HAND)
def _step(original: Callable[..., None], self: DeepSpeedOptimizerWrapper, *args: Any, **kwargs: Any) -> None:
    _STEPPED.discard(self.optimizer)
    original(self, *args, **kwargs)


_CLIPS = "another norm than the config's is refused there"


@upstream.patch(Accelerator, "clip_grad_norm_", ["parameters", "max_norm", "norm_type"], _CLIPS)
def _clip_grad_norm(
    original: Callable[..., Any], self: Accelerator, parameters: Any, max_norm: float, norm_type: float = 2
) -> Any:
    engine = _engine(self) if tp_size() > 1 else None
    if engine is not None:
        _UNASKED.discard(engine)
        wanted, has = 0.0 if math.isinf(max_norm) else float(max_norm), float(engine.gradient_clipping())
        if norm_type != 2 or not math.isclose(wanted, has):
            kind = "" if norm_type == 2 else f", norm_type={norm_type}"
            raise TensorParallelError(
                f"clip_grad_norm_(..., {max_norm}{kind}) comes after DeepSpeed's step, which clips 2-norms at "
                f'{has:g} (0 is never): set "gradient_clipping": {wanted:g} in the DeepSpeed config, '
                'whose default and "auto" are 1.0, and clip at the same norm here.'
            )
    return original(self, parameters, max_norm, norm_type)


@upstream.patch(Accelerator, "_prepare_deepspeed", None, "it makes 1.0 of a gradient_clipping that is not given")
def _prepare_deepspeed(original: Callable[..., Any], self: Accelerator, *args: Any) -> Any:
    plugin, known = self.state.deepspeed_plugin, _engine(self)
    unasked = plugin is not None and plugin.deepspeed_config.get("gradient_clipping", "auto") == "auto"
    done = original(self, *args)
    engine = _engine(self)
    if unasked and engine is not None and engine is not known and engine.gradient_clipping() > 0:
        _UNASKED.add(engine)
    return done


def _engine(accelerator: Accelerator) -> Any:
    return getattr(getattr(accelerator, "deepspeed_engine_wrapped", None), "engine", None)
