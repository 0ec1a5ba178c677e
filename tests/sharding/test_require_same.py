"""Settings, libraries and buffers that differ between hosts: named on every rank, or taken from the first."""

from __future__ import annotations

import importlib.metadata
import re
import socket
from typing import Any
from unittest import mock

import peft
import pytest
import torch
import torch.distributed as dist

import tp_plugin
from tests.support.batched_cases import launched, sentence, values
from tests.support.configs import config_for
from tests.support.models import batch, make
from tests.support.train import engine_for, optimizer_for
from tp_plugin.config import TensorParallelConfig
from tp_plugin.mesh import ParallelMesh
from tp_plugin.sharding.require_same import require_same
from tp_plugin.sharding.sync_params import sync_params


def on_host_b() -> bool:
    """Two hosts of two ranks, by their names."""
    return dist.get_rank() >= 2


def initialise(model: Any, **config: Any) -> Any:
    with mock.patch.object(socket, "gethostname", return_value="b" if on_host_b() else "a"):
        trained = [param for param in model.parameters() if param.requires_grad]
        return engine_for(model, optimizer_for(model, "adamw") if trained else None, config_for(2, 1) | config)


def other_eps() -> None:
    initialise(make("Llama", rms_norm_eps=1e-5 if on_host_b() else 1e-6))


def other_rope() -> None:
    rope = {"rope_type": "default", "rope_theta": 5e5 if on_host_b() else 1e4}
    initialise(make("Llama", rope_parameters=rope))


def other_generation_config() -> None:
    model = make("Llama")
    model.generation_config.temperature = 0.7 if on_host_b() else None
    initialise(model)


def other_adapter() -> None:
    adapter = peft.LoraConfig(r=4, lora_alpha=16 if on_host_b() else 8, target_modules=["q_proj"])
    initialise(peft.get_peft_model(make("Llama"), adapter))


def other_options() -> None:
    initialise(make("Llama"), tp_plugin={"check_batch_every": 7 if on_host_b() else 5})


def other_deepspeed_config() -> None:
    initialise(make("Llama"), gradient_clipping=0.5 if on_host_b() else 1.0)


def other_library() -> None:
    original = importlib.metadata.version

    def version(name: str) -> str:
        return "5.20.1" if name == "transformers" and on_host_b() else original(name)

    with mock.patch.object(importlib.metadata, "version", version):
        initialise(make("Llama"))


def sharded_early() -> None:
    options = TensorParallelConfig(tp_size=2, quiet=True)
    tp_plugin.shard_model(make("Llama", rms_norm_eps=1e-5 if on_host_b() else 1e-6), options)


def other_places() -> float:
    """Where a model lies may differ, and so may the order of a set."""
    model = make("Llama")
    model.config.name_or_path = "/host/b/model" if on_host_b() else "/host/a/model"
    names = ["v_proj", "q_proj"] if on_host_b() else ["q_proj", "v_proj"]
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=set(names)))
    return initialise(adapted)(**batch(0, 2)).loss.item()


def odd_values() -> None:
    """Values that JSON cannot hold, on one host alone: no rank may raise while it describes them."""
    require_same({"a mixture": [{1: 2, "a": 3}] if on_host_b() else 1})


def other_buffers() -> list[bool]:
    """Ranks whose rotary tables were computed otherwise."""
    model = make("Llama")
    table, whole = model.model.rotary_emb.inv_freq, make("Llama").model.rotary_emb.inv_freq
    table.mul_(1 + dist.get_rank())
    names = sync_params(model, ParallelMesh.create(2))
    return [torch.equal(table, whole), "model.rotary_emb.inv_freq" in names]


AND_HOST_B = r" on rank 0 \(host a\) and .* on rank 2 \(host b\)"
REFUSED = {
    "other_eps": rf"^rms_norm_eps in the config of the model is 1e-06{AND_HOST_B}; give every rank the same files",
    "other_rope": rf"^rope_parameters\.rope_theta in the config of the model is 10000\.0{AND_HOST_B}",
    "other_generation_config": rf"^temperature in the generation_config of the model is null{AND_HOST_B}",
    "other_adapter": rf"^lora_alpha of the adapter 'default' is 8{AND_HOST_B}",
    "other_options": rf"^(tp_plugin\.)?check_batch_every of .* is 5{AND_HOST_B}",
    "other_deepspeed_config": rf"^gradient_clipping of the DeepSpeed config is 1\.0{AND_HOST_B}",
    "other_library": rf"^the version of transformers is [\d.]+{AND_HOST_B}",
    "odd_values": r"^a mixture is 1 on rank 0 and \[\{1: 2, 'a': 3\}\] on rank 2; give every rank",
    "sharded_early": r"^rms_norm_eps in the config of the model is 1e-06 on rank 0 and 1e-05 on rank 2; give",
}
TAKEN = ("other_places", "other_buffers")


def four() -> list[dict]:
    return launched(4, __name__, (*REFUSED, *TAKEN))


@pytest.mark.parametrize("name", REFUSED)
def test_what_differs_between_hosts_is_named_on_every_rank(name):
    message = sentence(four(), name)
    assert re.search(REFUSED[name], message), message


def test_places_and_orders_may_differ():
    assert len(set(values(four(), "other_places"))) == 1


def test_buffers_of_all_replicas_are_those_of_the_first():
    assert values(four(), "other_buffers") == [[True, True]] * 4
