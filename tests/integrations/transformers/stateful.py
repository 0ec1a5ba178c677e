"""Trainers whose losses keep state, or hold the model: each a function that one rank runs.

Losses depend on what they keep, by more than the guard allows to differ.
"""

from __future__ import annotations

import collections
import itertools
import random

import numpy
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AttentionInterface, Trainer

import tp_plugin
from tests.support.guarded_trainer import trained

STEPS = 2
CALLS, HISTORY = 0, []


def of(make, **options):
    """(what the guard compared, what was said, the trainer, its losses) of a Trainer with ``make`` as its loss.

    ``make(trainer, model, inputs)``.
    """

    class Own(Trainer):
        made = 0

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return make(self, model, inputs)

    prepare = options.pop("prepare", None)

    class Prepared(Own):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if prepare is not None:
                prepare(self)

    seen, said, trainer = trained(Prepared, **options)
    return seen, said, trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def told(found, **kept):
    seen, said, _, losses = found
    return {"seen": seen, "said": said, "losses": losses, "kept": kept}


# ---- state of the trainer, of what it holds, and of the script -------------------------------------------------------


def counter():
    def loss(trainer, model, inputs):
        trainer.calls = getattr(trainer, "calls", 0) + 1
        return model(**inputs).loss * trainer.calls

    found = of(loss)
    return told(found, calls=found[2].calls)


def small_counter():
    """So little that no run differs."""

    def loss(trainer, model, inputs):
        trainer.calls = getattr(trainer, "calls", 0) + 1
        return model(**inputs).loss * (1 + 1e-7 * trainer.calls)

    found = of(loss)
    return told(found, calls=found[2].calls)


def script():
    """Global names, a closure, a counter of itertools, an attribute of a class and of a function."""
    global CALLS
    CALLS, closed, numbers = 0, 0, itertools.count(1)
    HISTORY.clear()

    class Kept:
        calls = 0

    def loss(trainer, model, inputs):
        global CALLS
        nonlocal closed
        CALLS += 1
        closed += 1
        Kept.calls += 1
        loss.calls = getattr(loss, "calls", 0) + 1
        HISTORY.append(closed)
        return model(**inputs).loss * (CALLS + closed + next(numbers) + Kept.calls + loss.calls + len(HISTORY))

    found = of(loss)
    return told(found, calls=[CALLS, closed, Kept.calls, loss.calls, len(HISTORY), next(numbers) - 1])


class Objects:
    """What losses keep their records in."""

    __slots__ = ("queue", "rows", "seen", "stats")

    def __init__(self):
        self.queue = collections.deque([1.0], maxlen=3)
        self.rows = numpy.ones(2)
        self.seen = {0}
        self.stats = collections.Counter()


def objects():
    def prepare(trainer):
        trainer.memory = Objects()

    def loss(trainer, model, inputs):
        kept = trainer.memory
        kept.queue.append(len(kept.queue) + 1.0)
        kept.rows += 1
        kept.seen.add(len(kept.seen))
        kept.stats["calls"] += 1
        return model(**inputs).loss * (sum(kept.queue) + kept.rows.sum() + len(kept.seen) + kept.stats["calls"])

    found = of(loss, prepare=prepare)
    kept = found[2].memory
    return told(found, calls=[len(kept.queue) - 1, int(kept.rows[0]) - 1, len(kept.seen) - 1, kept.stats["calls"]])


class Bank(nn.Module):
    """A queue of earlier representations, as MoCo and cross-batch memories keep it; writes past autograd."""

    def __init__(self):
        super().__init__()
        self.register_buffer("keys", torch.zeros(8, 32))
        self.register_buffer("place", torch.zeros(1, dtype=torch.long))
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, rows):
        self.scale.data.mul_(1.5)
        place, count = int(self.place), len(rows)
        self.keys.data[place : place + count] = rows.detach()[: 8 - place]
        self.place = torch.tensor([(place + count) % 8])
        return (rows @ self.keys.T).square().mean() * self.scale.detach().squeeze() + self.place.float().squeeze()


def bank():
    def prepare(trainer):
        trainer.bank = Bank()

    def loss(trainer, model, inputs):
        outputs = model(**inputs, output_hidden_states=True)
        return outputs.loss + 0.1 * trainer.bank(outputs.hidden_states[-1].mean(1)[:2])

    found = of(loss, prepare=prepare)
    kept = found[2].bank
    return told(found, calls=[int(kept.place) // 2, int(kept.keys.any(1).sum()) // 2, round(kept.scale.item(), 3)])


def model_with_state():
    """A buffer that counts, in place and by assignment, and a counter on a module."""

    def prepare(trainer):
        layer = trainer.model.model.layers[1]
        layer.register_buffer("calls", torch.zeros(()))
        layer.register_buffer("others", torch.zeros(()))
        layer.plain = 0

        def count(module, args, output):
            module.calls += 1
            module.others = module.others + 1
            module.plain += 1

        def grow(module, args):
            calls = module.calls + module.others + module.plain
            return (args[0] * (1 + 0.1 * calls), *args[1:])

        forward = type(layer).forward

        class Counting(type(layer)):
            def forward(self, hidden_states, *args, **kwargs):
                (hidden_states,) = grow(self, (hidden_states,))
                count(self, (), None)
                return forward(self, hidden_states, *args, **kwargs)

        layer.__class__ = Counting

    found = of(lambda trainer, model, inputs: model(**inputs).loss, prepare=prepare)
    layer = found[2].model.model.layers[1]
    return told(found, calls=[int(layer.calls), int(layer.others), layer.plain])


def generators():
    """Draws of every kind, from the default generators and from ones of its own."""

    def prepare(trainer):
        trainer.draws = random.Random(1), numpy.random.default_rng(1), torch.Generator().manual_seed(1)

    def loss(trainer, model, inputs):
        own, rng, generator = trainer.draws
        drawn = [random.random(), numpy.random.rand(), float(torch.rand(()))]
        drawn += [own.random(), rng.random(), float(torch.rand((), generator=generator))]
        HISTORY.append(drawn)
        return model(**inputs).loss * (1 + sum(drawn))

    HISTORY.clear()
    random.seed(3)
    numpy.random.seed(3)
    found = of(loss, prepare=prepare)
    rng, own, generator = numpy.random.default_rng(1), random.Random(1), torch.Generator().manual_seed(1)
    truth = [[own.random(), rng.random(), float(torch.rand((), generator=generator))] for _ in range(STEPS)]
    return told(found, calls=[drawn[3:] for drawn in HISTORY], truth=truth)


def never_the_same():
    """State that nothing can put back: a running generator."""

    def endless():
        number = 0
        while True:
            number += 1
            yield number

    numbers = endless()
    return told(of(lambda trainer, model, inputs: model(**inputs).loss * next(numbers)))


# ---- who holds the model ---------------------------------------------------------------------------------------------


class Holding(nn.Module):
    """As the losses of sentence-transformers: the model is a part of it, and put in place only if it is the wrapped."""

    def __init__(self, model, inner=None):
        super().__init__()
        self.model, self.inner = model, inner

    def forward(self, inputs):
        if self.inner is not None:
            return self.inner(inputs)
        hidden = self.model(input_ids=inputs["input_ids"], output_hidden_states=True).hidden_states[-1].mean(1)
        scores = F.normalize(hidden[:2], dim=1) @ F.normalize(hidden[2:], dim=1).T
        return F.cross_entropy(5 * scores, torch.arange(len(scores)) % scores.shape[1]) + 0.1 * hidden.square().mean()


def override(loss, model):
    for name, child in loss.named_children():
        if name == "model" and isinstance(child, type(model.module)):
            loss.model = model
        elif isinstance(child, nn.Module):
            setattr(loss, name, override(child, model))
    return loss


def in_its_loss(trainer, model, inputs):
    loss = trainer.loss
    if model == trainer.model_wrapped and loss.model != model:
        loss = override(loss, model)
    return loss(inputs)


def held(nested=False, again=False, **options):
    def prepare(trainer):
        inner = Holding(trainer.model)
        trainer.loss = Holding(trainer.model, inner) if nested else inner

    def loss(trainer, model, inputs):
        if again and trainer.state.global_step == 1 and not guard_asked:
            guard_asked.append(True)
        return in_its_loss(trainer, model, inputs)

    guard_asked = []
    found = of(loss, prepare=prepare, **options)
    return told(found, engine=found[2].loss.model is found[2].model_wrapped)


def holding():
    return held()


def holding_zero3():
    return held(stage=3)


def holding_nested():
    return held(nested=True)


def module_of_the_engine():
    return told(of(lambda trainer, model, inputs: model.module(**inputs).loss + model.module.model.norm.weight.norm()))


def wrapped():
    return told(of(lambda trainer, model, inputs: trainer.model_wrapped(**inputs).loss))


def closed_over():
    """A loss function that closes over the model, and over a weight of it that is replicated."""
    kept = {}

    def prepare(trainer):
        model = trainer.model

        def loss_of(inputs):
            return model(**inputs).loss + model.model.norm.weight.norm()

        kept["loss"] = loss_of

    return told(of(lambda trainer, model, inputs: kept["loss"](inputs), prepare=prepare))


def shard_in_a_closure():
    """A weight taken before training is a shard of one: right in one process, wrong here."""

    def prepare(trainer):
        trainer.penalised = [layer.self_attn.q_proj.weight for layer in trainer.model.model.layers]

    def loss(trainer, model, inputs):
        return model(**inputs).loss + 0.01 * sum(weight.norm() for weight in trainer.penalised)

    try:
        of(loss, prepare=prepare)
    except tp_plugin.TensorParallelError as refused:
        return str(refused)
    return "trained"


def backward_inside():
    """A loss that goes backward through its own part, as cached losses of sentence-transformers do."""

    def loss(trainer, model, inputs):
        hidden = model(**inputs, output_hidden_states=True).hidden_states[-1]
        if not torch.is_grad_enabled():
            return hidden.square().mean()
        leaf = hidden.detach().requires_grad_()
        own = leaf.square().mean()
        own.backward()
        return own.detach() + (hidden * leaf.grad).sum() - (hidden * leaf.grad).sum().detach()

    return told(of(loss))


STATE = ["counter", "small_counter", "script", "objects", "bank", "model_with_state", "generators"]
HOLDS = ["holding", "holding_zero3", "holding_nested", "module_of_the_engine", "wrapped", "closed_over"]
REST = ["never_the_same", "shard_in_a_closure", "backward_inside"]


# ---- attention functions of one's own --------------------------------------------------------------------------------


def _distances(query, key):
    places = torch.arange(query.shape[2])
    return -(places[:, None] - places[None, : key.shape[2]]).abs().to(query.dtype)


def _attend(module, query, key, value, mask, bias, scaling, softcap=None):
    groups = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(groups, 1).mT * scaling
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    causal = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    scores = (scores + bias).masked_fill(~causal, torch.finfo(scores.dtype).min)
    return (scores.softmax(-1) @ value.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), None


def distance_bias(module, query, key, value, attention_mask, scaling, **_):
    return _attend(module, query, key, value, attention_mask, 2.0 * _distances(query, key), scaling)


def soft_cap(module, query, key, value, attention_mask, scaling, **_):
    return _attend(module, query, key, value, attention_mask, 0.0, scaling, softcap=0.1)


def _slopes(count):
    return torch.tensor([2.0 ** -(3 * (head + 1) / count) * 8 for head in range(count)])


def counts_heads(module, query, key, value, attention_mask, scaling, **_):
    bias = _slopes(query.shape[1])[:, None, None] * _distances(query, key)
    return _attend(module, query, key, value, attention_mask, bias, scaling)


def asks_for_heads(module, query, key, value, attention_mask, scaling, **_):
    heads = tp_plugin.attention_heads(module, query.shape[1])
    slopes = _slopes(heads.total)[list(heads.numbers)].to(query.dtype)
    bias = slopes[:, None, None] * _distances(query, key)
    HISTORY.append(heads)
    return _attend(module, query, key, value, attention_mask, bias, scaling)


def attending(function, half=False):
    """As :func:`told`, or what refused it."""
    AttentionInterface.register(function.__name__, function)
    HISTORY.clear()

    def prepare(trainer):
        trainer.model.set_attn_implementation(function.__name__)

    options = {"attention": function.__name__} if half else {"prepare": prepare}
    try:
        found = of(lambda trainer, model, inputs: model(**inputs).loss, **options)
        return told(found, heads=list(HISTORY), chosen=found[2].model.config._attn_implementation)
    except tp_plugin.TensorParallelError as refused:
        return str(refused)
    finally:
        AttentionInterface._global_mapping.pop(function.__name__, None)


def attention_distance():
    return attending(distance_bias)


def attention_distance_bf16():
    return attending(distance_bias, half=True)


def attention_soft_cap():
    return attending(soft_cap)


def attention_asks():
    return attending(asks_for_heads)


def attention_counts():
    return attending(counts_heads)


ATTENTION = ["attention_distance", "attention_distance_bf16", "attention_soft_cap", "attention_asks"]
