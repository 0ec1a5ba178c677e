"""A causal LM of a user's own, with names that tell nothing; the tests copy it to a folder outside the package."""

import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class AcmeConfig(PreTrainedConfig):
    model_type = "acme"

    def __init__(self, hidden_size=64, seekers=8, finders=4, num_layers=2, vocab_size=131, **kwargs):
        self.hidden_size, self.seekers, self.finders = hidden_size, seekers, finders
        self.num_layers, self.vocab_size = num_layers, vocab_size
        super().__init__(**kwargs)


class FusedConfig(AcmeConfig):
    model_type = "acme_fused"

    def __init__(self, **kwargs):  # transformers would make one that leaves the parent's out
        super().__init__(**kwargs)


class Search(nn.Module):
    """Attention; ``fused`` packs values, keys and queries in one weight, in this order."""

    def __init__(self, config):
        super().__init__()
        self.seekers, self.finders = config.seekers, config.finders
        self.head_dim = config.hidden_size // config.seekers
        self.is_fused = config.model_type == "acme_fused"
        sizes = [n * self.head_dim for n in (self.finders, self.finders, self.seekers)]
        if self.is_fused:
            self.fused = nn.Linear(config.hidden_size, sum(sizes))
        else:
            self.bring, self.find, self.seek = (nn.Linear(config.hidden_size, size) for size in sizes)
        self.give = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x):
        if self.is_fused:
            sizes = [n * self.head_dim for n in (self.finders, self.finders, self.seekers)]
            v, k, q = self.fused(x).split(sizes, -1)
        else:
            v, k, q = self.bring(x), self.find(x), self.seek(x)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for t in (q, k, v))
        groups = self.seekers // self.finders
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.give(out.transpose(1, 2).flatten(2))


class Flow(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.swell = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.shrink = nn.Linear(3 * config.hidden_size, config.hidden_size)

    def forward(self, x):
        return self.shrink(F.gelu(self.swell(x)))


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.before, self.between = nn.LayerNorm(config.hidden_size), nn.LayerNorm(config.hidden_size)
        self.search, self.flow = Search(config), Flow(config)

    def forward(self, x):
        x = x + self.search(self.before(x))
        return x + self.flow(self.between(x))


class AcmeModel(PreTrainedModel):
    config_class = AcmeConfig
    base_model_prefix = ""

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, labels=None):
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x)
        logits = self.head(x)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return CausalLMOutput(loss=loss, logits=logits)


class FusedModel(AcmeModel):
    config_class = FusedConfig


for config_class, model_class in ((AcmeConfig, AcmeModel), (FusedConfig, FusedModel)):
    AutoConfig.register(config_class.model_type, config_class)
    AutoModelForCausalLM.register(config_class, model_class)
