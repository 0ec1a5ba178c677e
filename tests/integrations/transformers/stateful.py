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
from transformers import Trainer

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


STATE = ["counter", "small_counter", "script", "objects", "bank", "model_with_state", "generators"]
