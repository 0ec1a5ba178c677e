"""What Trainer's data loaders derive from a rank is derived from its data-parallel rank.

``train_sampling_strategy="batch_rebalance"`` would deal each rank of a TP group other rows, and loader processes that
augment their samples at random would be seeded apart.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader
from transformers import Trainer, trainer_pt_utils
from transformers.trainer_utils import seed_worker

from tp_plugin.integrations.accelerate.degree import tp_size
from tp_plugin.integrations.contract import Patches, contract

_SAMPLER = ["lengths", "effective_batch_size", "dp_size", "grad_accum", "shuffle", "seed", "rank", "drop_last"]


def check_contracts() -> None:
    contract(trainer_pt_utils.BatchRebalanceSampler, "__init__", _SAMPLER, "it deals rows to every rank of the world")
    contract(Trainer, "_get_dataloader", ["dataset", "description", "batch_size"], "it seeds loader processes by rank")


def install(patches: Patches) -> None:
    patches.replace(trainer_pt_utils.BatchRebalanceSampler, "__init__", _init_of_sampler)
    patches.replace(Trainer, "_get_dataloader", _get_dataloader_method)


def _init_of_sampler(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def __init__(
        self: Any, lengths: list[int], effective_batch_size: int, dp_size: int, *args: Any, **kwargs: Any
    ) -> None:
        degree = tp_size()
        if degree > 1 and dp_size == dist.get_world_size():
            effective_batch_size, dp_size = effective_batch_size // degree, dp_size // degree
            original(self, lengths, effective_batch_size, dp_size, *args, **kwargs)
            self.rank //= degree
        else:
            original(self, lengths, effective_batch_size, dp_size, *args, **kwargs)

    return __init__


def _get_dataloader_method(original: Callable[..., DataLoader]) -> Callable[..., DataLoader]:
    @functools.wraps(original)
    def _get_dataloader(self: Trainer, *args: Any, **kwargs: Any) -> DataLoader:
        loader, degree = original(self, *args, **kwargs), tp_size()
        inner = getattr(loader, "base_dataloader", loader)  # accelerate wraps
        seeded = getattr(inner, "worker_init_fn", None)
        if degree > 1 and isinstance(seeded, functools.partial) and seeded.func is seed_worker:
            arguments = seeded.keywords | {"rank": self.args.process_index // degree}
            inner.worker_init_fn = functools.partial(seed_worker, **arguments)
        return loader

    return _get_dataloader
