"""Who holds the model: trainers, lists, closures and wrappers of a user's."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

import tp_plugin
from tests.integrations.transformers.stateful import of, told


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


HOLDS = ["holding", "holding_zero3", "holding_nested", "module_of_the_engine", "wrapped", "closed_over"]
