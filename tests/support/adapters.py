"""PEFT adapters for the parity harness, no tensor of which has a value that hides bugs (a LoRA's B begins as zeros)."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import torch.distributed as dist

import tp_plugin
from tests.support.configs import config_for
from tests.support.errors import relative
from tests.support.models import batch
from tests.support.train import engine_for, loss_of, micro_batches, optimizer_for
from tp_plugin.param_info import layout_of
from tp_plugin.sharding import state_of

EVERY = {"r": 4, "target_modules": "all-linear"}
ATTENTION = {"r": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
ADAPTERS: dict[str, dict[str, Any]] = {
    "every linear": EVERY,
    "several": EVERY | {"others": ("second",)},
    "biases": EVERY | {"bias": "all", "lora_bias": True},
    "DoRA": EVERY | {"use_dora": True},
    "Conv1D DoRA": EVERY | {"use_dora": True, "fan_in_fan_out": True},
    "rsLoRA": EVERY | {"use_rslora": True},
    "PiSSA": EVERY | {"init_lora_weights": "pissa"},
    "OLoRA": EVERY | {"init_lora_weights": "olora"},
    "patterns": EVERY | {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 7}},
    "every Conv1D": EVERY | {"fan_in_fan_out": True},
    "classes": EVERY | {"task_type": "SEQ_CLS"},
    "encoder-decoder": {"r": 4, "target_modules": ["q", "k", "v", "o", "wi", "wo"], "task_type": "SEQ_2_SEQ_LM"},
    "experts": ATTENTION | {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "vocabulary": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "v_proj"]},
    "modules to save": {
        "r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens", "k_proj", "down_proj"],
    },
    "tied to save": {
        "r": 4, "target_modules": ["q_proj", "v_proj"], "modules_to_save": ["embed_tokens", "lm_head"],
        "ensure_weight_tying": True,
    },
    "norms to save": {
        "r": 4, "target_modules": ["q_proj"], "modules_to_save": ["q_norm", "k_norm", "norm", "o_proj"],
    },
    "IA3": {
        "kind": "IA3", "target_modules": ["q_proj", "k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["q_proj", "down_proj"],
    },
    "prompt": {"kind": "PromptTuning", "num_virtual_tokens": 3},
    "prompt encoder": {"kind": "PromptEncoder", "num_virtual_tokens": 3, "encoder_hidden_size": 16},
}  # fmt: skip


def adapt(model: torch.nn.Module, name: str, **more: Any) -> Any:
    """:func:`tuned` as :data:`ADAPTERS` says."""
    return tuned(model, ADAPTERS[name] | more)


def tuned(model: torch.nn.Module, options: dict[str, Any]) -> Any:
    """``get_peft_model`` on a whole model or a sharded one; the same numbers for both.

    ``options`` are of PEFT's config; ``kind`` there is that of the config's class, ``others`` are names of further
    adapters, of which none is active.
    """
    options = dict(options)
    kind, others = options.pop("kind", "Lora"), options.pop("others", ())
    config = getattr(peft, f"{kind}Config")
    torch.manual_seed(77)
    before = {id(param) for param in model.parameters()}
    found = peft.get_peft_model(model, config(**{"task_type": "CAUSAL_LM"} | options))
    for other in others:
        found.add_adapter(other, config(**{"task_type": "CAUSAL_LM"} | options))
    with torch.no_grad():
        for index, (_, param) in enumerate(sorted(found.named_parameters())):
            if id(param) in before:
                continue
            layout = layout_of(param)
            shape = param.shape if layout is None else layout.shape
            noise = 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(9000 + index))
            param.add_(noise if layout is None else layout.shard(noise, _rank(found)))
    return found


def _rank(model: torch.nn.Module) -> int:
    from tp_plugin.sharding import state_of

    record = state_of(model)
    return 0 if record is None else record.mesh.tp_rank


DATA = batch(9, 2)


def shard(model: torch.nn.Module, **options) -> torch.nn.Module:
    tp_plugin.shard_model(model, tp_plugin.TensorParallelConfig(tp_size=2, quiet=True, **options))
    return model


def trained(model: torch.nn.Module, stage: int):
    """An engine around ``model``, two steps on."""
    engine = engine_for(model, optimizer_for(model, "adamw"), config_for(2, stage))
    for step in (0, 1):
        for pieces in micro_batches(step, 1):
            engine.backward(loss_of(engine, pieces[0], step))
            engine.step()
    return engine


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """Of a fixed batch, in evaluation, on every rank."""
    model.eval()
    found = model(input_ids=DATA["input_ids"]).logits
    model.train()
    return found


@contextlib.contextmanager
def shared_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as own:
        box = [own]
        dist.broadcast_object_list(box)
        yield Path(box[0])
        dist.barrier()


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    error = relative(ours, theirs)
    assert error < 1e-5, error


def gradients_of(ours: torch.nn.Module, truth: torch.nn.Module) -> None:
    """Every gradient of a step of the sharded model against the truth's."""
    rank = state_of(ours).mesh.tp_rank
    for model in (ours, truth):
        model.zero_grad(set_to_none=True)
        model(**DATA).loss.backward()
    expected = {name: param.grad for name, param in truth.named_parameters()}
    for name, param in ours.named_parameters():
        wanted = expected[name]
        assert (param.grad is None) == (wanted is None), name
        if wanted is not None:
            layout = layout_of(param)
            wanted = wanted if layout is None else layout.shard(wanted, rank)
            assert relative(param.grad, wanted, 1e-6) < 1e-4, name


def lora(**options) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | options)
