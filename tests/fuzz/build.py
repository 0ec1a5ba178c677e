"""A model as its case says, its optimizer and its DeepSpeed config, and what a training leaves."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy
import torch

from tests.fuzz import families
from tests.fuzz.case import Case
from tests.support.configs import config_for
from tests.support.train import optimizer_for

TRAINER_LR, TRAINER_EPS = 1e-2, 1e-4


@dataclasses.dataclass
class Run:
    """A training: numbers of each step, and tensors by parameter name.

    ``grads`` are of each step before clipping, whole ones in the truth and this rank's shards in a sharded run.
    ``layouts`` are those of sharded parameters. ``params`` is empty on all ranks but the first of a sharded run.
    """

    losses: list[float | None] = dataclasses.field(default_factory=list)
    norms: list[float | None] = dataclasses.field(default_factory=list)
    grads: list[dict[str, torch.Tensor]] = dataclasses.field(default_factory=list)
    start: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    params: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    logits: torch.Tensor | None = None
    evaluated: float = 0.0
    replicas: float = 0.0
    layouts: dict[str, Any] = dataclasses.field(default_factory=dict)
    tp_rank: int = 0


def seed_all() -> None:
    random.seed(7)
    numpy.random.seed(7)
    torch.manual_seed(7)


def built(case: Case, shape: Callable[[torch.nn.Module], torch.nn.Module] = lambda model: model) -> torch.nn.Module:
    """The model of ``case``: ``shape`` is called before TRL's head and adapters are put in."""
    model = shape(families.build(case.family, case.options))
    if case.loss == "fused":
        from trl.trainer.utils import add_fused_lm_head

        add_fused_lm_head(model)
    return adapted(case, model)


def adapted(case: Case, model: torch.nn.Module) -> torch.nn.Module:
    """``model`` with the adapter of ``case``, its numbers the same on whole and sharded models."""
    if case.adapter is None:
        return model
    from tests.support.adapters import tuned

    return tuned(model, case.adapter)


def optimizer_of(case: Case, model: torch.nn.Module) -> torch.optim.Optimizer:
    if case.loop == "trainer":
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=TRAINER_LR, eps=TRAINER_EPS, weight_decay=0.0)
    return optimizer_for(model, case.optimizer)


def ds_config(case: Case) -> dict[str, Any]:
    zero = {"offload_optimizer": {"device": "cpu"}} if case.offload else {}
    config = config_for(case.tp, case.stage, zero=zero)
    config |= {
        "train_micro_batch_size_per_gpu": case.rows,
        "gradient_accumulation_steps": case.accumulation,
        "tp_plugin": {"check_batch_every": 2, "quiet": True, "guard": case.guard, "uneven_heads": case.uneven},
    }
    return config


LATER = "after the first step"


@contextlib.contextmanager
def later(steps: Callable[[], int]) -> Iterator[None]:
    """What is raised once a step was made says so."""
    try:
        yield
    except Exception as failure:
        if steps():
            failure.add_note(LATER)
        raise
