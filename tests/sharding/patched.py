"""Models whose forwards were patched before sharding, as scripts and ms-swift do it; each is one rank's part."""

from __future__ import annotations

import types

import torch
from torch.nn import functional as F
from transformers.models.llama import modeling_llama as llama

from tests.support.adapters import adapt
from tests.support.configs import config_for
from tests.support.models import batch, make
from tests.support.train import engine_for, optimizer_for
from tp_plugin.step_guard.guard import guard_of


def losses(model, guard=True):
    """Two steps of an engine, and of one process."""
    config = config_for(2, 1, tp_plugin={"guard": guard, "quiet": True})
    engine = engine_for(model, optimizer_for(model, "adamw"), config)
    found = []
    for step in range(2):
        loss = engine(**batch(step, 2)).loss
        engine.backward(loss)
        engine.step()
        found.append(loss.item())
    assert not guard or guard_of(engine).compared
    return found


def keep_device(self, *args, **kwargs):
    """As ms-swift sets it on every ``lora_A`` and ``lora_B``."""
    x = args[0]
    return self.forward_origin(x.to(self.weight.device), *args[1:], **kwargs)


def keeping(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward_origin = module.forward
            module.forward = types.MethodType(keep_device, module)
    return model


def wrapping(model):
    """A closure over the bound method, and one around that."""

    def wrapped(forward):
        return lambda *args, **kwargs: forward(*args, **kwargs) * 1

    for module in model.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            module.forward = wrapped(wrapped(module.forward))
    return model


def plain(make_model):
    """One process: the same model, unpatched, two steps with the harness's accumulation."""
    model = make_model()
    optimizer, found = optimizer_for(model, "adamw"), []
    for step in range(2):
        loss = model(**batch(step, 2)).loss
        (loss / 2).backward()
        found.append(loss.item())
    optimizer.zero_grad()
    return found


def adapted():
    return adapt(make("Llama"), "every linear")


def kept_on_adapters():
    return losses(keeping(adapted())), plain(adapted)


def kept_on_adapters_unguarded():
    return losses(keeping(adapted()), guard=False), plain(adapted)


def kept_on_linears():
    return losses(keeping(make("Llama", heads=(4, 1)))), plain(lambda: make("Llama", heads=(4, 1)))


def wrapped_all():
    return losses(wrapping(make("Llama"))), plain(lambda: make("Llama"))


def own_forward(module):
    module.forward = lambda x: F.linear(x, module.weight, module.bias)


def replaced_column():
    model = make("Llama")
    own_forward(model.model.layers[0].mlp.up_proj)
    return losses(model), plain(lambda: make("Llama"))


def replaced_row():
    model = make("Llama")
    own_forward(model.model.layers[0].self_attn.o_proj)
    return losses(model)


def by_config(self, hidden_states, position_embeddings, attention_mask=None, **kwargs):
    """Right in one process."""
    rows, length, _ = hidden_states.shape
    heads, kvs = self.config.num_attention_heads, self.config.num_key_value_heads
    query = self.q_proj(hidden_states).view(rows, length, heads, self.head_dim).transpose(1, 2)
    key = self.k_proj(hidden_states).view(rows, length, kvs, self.head_dim).transpose(1, 2)
    value = self.v_proj(hidden_states).view(rows, length, kvs, self.head_dim).transpose(1, 2)
    query, key = llama.apply_rotary_pos_emb(query, key, *position_embeddings)
    key, value = (x.repeat_interleave(heads // kvs, 1) for x in (key, value))
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1)), None


def patched(guard):
    original = llama.LlamaAttention.forward
    llama.LlamaAttention.forward = by_config
    try:
        return losses(make("Llama"), guard)
    except RuntimeError as failure:
        return str(failure), list(getattr(failure, "__notes__", ()))
    finally:
        llama.LlamaAttention.forward = original


def patched_attention():
    return patched(True)


def patched_attention_unguarded():
    return patched(False)
