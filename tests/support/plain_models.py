"""Models that are no transformers model: tutorials' modules, modules around such a model, layers of one's own."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from tests.support.models import make

WIDTH = 12


class One(nn.Module):
    """One linear layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(WIDTH, 10)

    def forward(self, x):
        return self.fc(x)


class Four(nn.Module):
    """Four one after another, as tutorials have them."""

    def __init__(self):
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.layer3, self.layer4 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.layer4(self.layer3(F.gelu(self.layer2(F.gelu(self.layer1(x))))))[..., :10]


class Listed(nn.Module):
    """Two pairs in one list, the inner widths of which differ."""

    def __init__(self):
        super().__init__()
        self.net = nn.ModuleList([nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH), nn.Linear(WIDTH, 14), nn.Linear(14, 10)])

    def forward(self, x):
        for index, layer in enumerate(self.net):
            x = layer(x) if index == 3 else F.gelu(layer(x))
        return x


class Crossed(nn.Module):
    """Two pairs in one block that are not defined one after the other."""

    def __init__(self):
        super().__init__()
        self.up1, self.up2 = nn.Linear(WIDTH, 20), nn.Linear(WIDTH, 14)
        self.down1, self.down2 = nn.Linear(20, WIDTH), nn.Linear(14, 10)

    def forward(self, x):
        return self.down2(F.gelu(self.up2(self.down1(F.gelu(self.up1(x))))))


class Named(nn.Module):
    """A block whose layers are called an attention's, and that is none."""

    def __init__(self):
        super().__init__()
        self.blk = nn.Module()
        self.blk.q_proj, self.blk.o_proj = nn.Linear(WIDTH, 20), nn.Linear(20, 10)

    def forward(self, x):
        return self.blk.o_proj(F.gelu(self.blk.q_proj(x)))


class HomeLinear(nn.Module):
    """A linear layer by somebody else."""

    def __init__(self, n_in, n_out, bias=True):
        super().__init__()
        self.n_in, self.n_out = n_in, n_out
        self.weight = nn.Parameter(torch.randn(n_out, n_in) * 0.1)
        if bias:
            self.bias = nn.Parameter(torch.zeros(n_out))
        else:
            self.bias = None

    def forward(self, x):
        out = x.reshape(-1, self.n_in) @ self.weight.T
        return (out if self.bias is None else out + self.bias).view(*x.shape[:-1], self.n_out)


class AtHome(nn.Module):
    """Layers of one's own, and an ``nn.Linear`` with a forward of its own."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.out = HomeLinear(WIDTH, 20), HomeLinear(20, WIDTH, bias=False), Written(WIDTH, 10)

    def forward(self, x):
        return self.out(self.fc2(F.gelu(self.fc1(x))))


class Written(nn.Linear):
    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Multi-head attention that knows its heads by their number."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.nheads, self.width = heads, width
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=False)  # the gradient of its bias would be nothing but rounding
        self.v_proj, self.o_proj = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        rows, length, _ = x.shape
        q, k, v = (
            p(x).view(rows, length, self.nheads, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v)
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, self.width))


class Attending(nn.Module):
    """An attention of one's own and an MLP side by side in one module."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(31, 16)
        self.attn = Attention()
        self.fc1, self.fc2, self.head = nn.Linear(16, 40), nn.Linear(40, 16), nn.Linear(16, 10)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.attn(x)
        return self.head(x + self.fc2(F.gelu(self.fc1(x))))


class Described(nn.Module):
    """Not a transformers model, with a plan of HF's in its config."""

    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(base_model_tp_plan={"layers.*.up": "colwise", "layers.*.down": "rowwise"})
        pairs = ({"up": nn.Linear(WIDTH, 20), "down": nn.Linear(20, WIDTH)} for _ in range(2))
        self.layers = nn.ModuleList(map(nn.ModuleDict, pairs))

    def forward(self, x):
        for layer in self.layers:
            x = x + layer["down"](F.gelu(layer["up"](x)))
        return x[..., :10]


class Projector(nn.Module):
    """A base model with a projector that widens and narrows, and two heads."""

    def __init__(self):
        super().__init__()
        self.backbone = make("Llama").model
        hidden = self.backbone.config.hidden_size
        self.projector = nn.Sequential(nn.Linear(hidden, 3 * hidden), nn.GELU(), nn.Linear(3 * hidden, hidden))
        self.classes, self.score = nn.Linear(hidden, 5), nn.Linear(hidden, 1)

    def forward(self, input_ids, labels=None):
        hidden = self.projector(self.backbone(input_ids=input_ids).last_hidden_state)
        loss = F.cross_entropy(self.classes(hidden).flatten(0, 1), input_ids.flatten() % 5)
        return SimpleNamespace(loss=loss + self.score(hidden[:, -1]).square().mean())


class Valued(nn.Module):
    """A language model with a value head beside its own, which says what the model would."""

    def __init__(self):
        super().__init__()
        self.model = make("Qwen3", tied=True)
        self.config = self.model.config
        self.v_head = nn.Linear(self.config.hidden_size, 1)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, input_ids, labels=None):
        out = self.model(input_ids=input_ids, labels=labels, output_hidden_states=True)
        values = self.v_head(out.hidden_states[-1]).squeeze(-1)
        return SimpleNamespace(loss=out.loss + 0.1 * (values - 1).square().mean(), logits=out.logits)


class Boxed(nn.Module):
    """A model of a family with rules of ours, deep inside."""

    def __init__(self):
        super().__init__()
        from tests.support import zoo

        self.box = nn.ModuleList([zoo.build("gpt2", 0)])

    def forward(self, input_ids, labels=None):
        return self.box[0](input_ids=input_ids, labels=labels)
