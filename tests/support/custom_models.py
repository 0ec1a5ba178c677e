"""Models that neither transformers nor tp-plugin has a rule for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class HomeConfig(PreTrainedConfig):
    model_type = "made_at_home"

    def __init__(self, hidden_size=256, heads=8, kv_heads=4, num_layers=4, vocab_size=1000, mixing=False, **kwargs):
        self.hidden_size, self.n_heads, self.num_kv_heads = hidden_size, heads, kv_heads
        self.num_layers, self.vocab_size, self.mixing = num_layers, vocab_size, mixing
        super().__init__(**kwargs)


class Attention(nn.Module):
    """Grouped-query attention; ``mixing`` adds to every head's scores the mean over all heads: the trap."""

    def __init__(self, config):
        super().__init__()
        self.n_heads, self.kv_heads = config.n_heads, config.num_kv_heads
        self.head_dim = config.hidden_size // config.n_heads
        self.mixing = config.mixing
        self.wq = nn.Linear(config.hidden_size, config.hidden_size)
        self.wk = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.wv = nn.Linear(config.hidden_size, self.kv_heads * self.head_dim)
        self.wo = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        rows, length, _ = x.shape
        q = self.wq(x).view(rows, length, self.n_heads, self.head_dim).transpose(1, 2)
        k = self.wk(x).view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2)
        v = self.wv(x).view(rows, length, self.kv_heads, self.head_dim).transpose(1, 2)
        groups = self.n_heads // self.kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.mT * self.head_dim**-0.5
        if self.mixing:
            scores = scores + scores.mean(1, keepdim=True)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        out = scores.masked_fill(~causal, -1e9).softmax(-1) @ v
        return self.wo(out.transpose(1, 2).reshape(rows, length, -1))


class Gated(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.one, self.two, self.three = nn.Linear(hidden, inner), nn.Linear(hidden, inner), nn.Linear(inner, hidden)

    def forward(self, x):
        return self.three(F.silu(self.one(x)) * self.two(x))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.mixer, self.feed = Attention(config), Gated(config.hidden_size, 3 * config.hidden_size)

    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x + self.feed(self.norm2(x))


class HomeModel(PreTrainedModel):
    config_class = HomeConfig
    base_model_prefix = ""

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.stack = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels=None):
        x = self.embed(input_ids)
        for block in self.stack:
            x = block(x)
        logits = self.head(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class Plain(nn.Module):
    """No config, no transformers."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Gated(16, 48) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


def shard(mixing: bool, infer: str, plan: dict | None = None) -> list[str]:
    """One rank's part of a test: shard a model at home; returns the sources of what was sharded."""
    import tp_plugin

    torch.manual_seed(0)
    model = HomeModel(HomeConfig(mixing=mixing))
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    state = torch.get_rng_state()
    options = tp_plugin.TensorParallelConfig(tp_size=2, quiet=True, infer=infer, plan=plan or {})
    try:
        record = tp_plugin.shard_model(model, options)
    except tp_plugin.TensorParallelError:
        assert all(torch.equal(param, before[name]) for name, param in model.named_parameters()), "weights touched"
        raise
    assert torch.equal(state, torch.get_rng_state()), "the trial drew random numbers"
    return sorted({placement.source for placement in record.plan.placements.values()})


def shard_plain(infer: str) -> list[str]:
    """The same for a module without a config."""
    import tp_plugin

    torch.manual_seed(0)
    options = tp_plugin.TensorParallelConfig(tp_size=2, quiet=True, infer=infer)
    return tp_plugin.shard_model(Plain(), options).plan.inferred()
