"""Configs, models and batches that two ranks refuse: each a function that both call."""

from __future__ import annotations

import json
import tempfile

import torch
import torch.distributed as dist
from torch import nn

import tp_plugin
from tests.support.configs import config_for
from tests.support.models import batch, make
from tests.support.train import engine_for, optimizer_for


def initialise(model: nn.Module | None = None, *, tp: int = 2, stage: int = 1, trained: bool = True, **config):
    """An engine on a small Llama; ``config`` goes over the harness's DeepSpeed config."""
    model = make("Llama") if model is None else model
    return engine_for(model, optimizer_for(model, "adamw") if trained else None, config_for(tp, stage) | config)


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.down(self.up(x))


def heads_do_not_fit():
    initialise(make("Llama", heads=(5, 1)))


def nothing_to_shard():
    initialise(nn.Sequential(nn.Linear(4, 4)))


def rule_hits_nothing():
    initialise(tp_plugin={"plan": {"model.layers.*.mlp.upproj": "column"}})


def column_without_row():
    initialise(Mlp(), tp_plugin={"plan": {"up": "column"}})


def unknown_style():
    initialise(Mlp(), tp_plugin={"plan": {"up": "slantwise", "down": "row"}})


def label_outside():
    data = batch(0, 2)
    data["labels"][1, 5] = 131
    initialise()(**data)


def token_outside():
    data = batch(0, 2)
    data["input_ids"][1, 5] = 131
    initialise()(**data)


def mesh_param():
    model = make("Llama")
    engine_for(model, optimizer_for(model, "adamw"), config_for(2, 1), mesh_param=(1, 2))


def stage0_bf16():
    initialise(stage=0, bf16={"enabled": True})


def stage0_bfloat16():
    initialise(stage=0, bfloat16={"enabled": True})


def stage0_fp16():
    config = {"fp16": {"enabled": True}, "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}
    initialise(stage=0, trained=False, **config)


def stage0_autocast_fp16():
    initialise(stage=0, torch_autocast={"enabled": True, "dtype": "float16"})


def unknown_key():
    initialise(tp_plugin={"chek_batch_every": 1})


def wrong_type():
    initialise(tp_plugin={"quiet": "yes"})


def block_no_object():
    initialise(tp_plugin=["quiet"])


def size_in_block():
    initialise(tp_plugin={"tp_size": 2})


def size_no_number():
    initialise(tensor_parallel={"autotp_size": "two"})


def section_no_object():
    initialise(tensor_parallel=2)


def block_without_degree():
    initialise(tensor_parallel={})


def empty_block_without_degree():
    initialise(tensor_parallel={}, tp_plugin={})


def config_from_a_file():
    config = config_for(2, 1) | {"tp_plugin": {"quite": True}}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(config, file)
        file.flush()
        engine_for(make("Llama"), None, file.name)


def train_batch_size_that_contradicts():
    initialise(train_batch_size=1000)  # DeepSpeed has an assertion for it; our sentence comes before


def train_batch_size_unfilled():
    initialise(train_batch_size="auto")


def micro_batch_unfilled():
    initialise(train_micro_batch_size_per_gpu="auto")


def train_batch_size_no_number():
    initialise(train_batch_size="8")


def degree_by_other_names():
    initialise(tensor_parallel={"enabled": True, "degree": 2})


def degree_inside():
    initialise(tensor_parallel={"tp": {"tp_size": 2}})


def overlap_of_autotp():
    initialise(tensor_parallel={"autotp_size": 2, "tp_overlap_comm": True})


def head_kept_whole():
    initialise(tensor_parallel={"autotp_size": 2, "vocab_parallel_lm_head": False})


def rule_of_autotp_that_differs():
    rows = {"layer_specs": [{"patterns": [r".*q_proj\.weight$"], "partition_type": "row"}]}
    initialise(tensor_parallel={"autotp_size": 2, "partition_config": rows})


def preset_of_autotp_that_differs():
    skips = {"layer_specs": [{"patterns": [r".*lm_head.*"], "partition_type": "skip"}]}
    initialise(tensor_parallel={"autotp_size": 2, "partition_config": skips, "preset_model": "llama"})


def rule_of_autotp_that_is_none():
    bad = {"layer_specs": [{"patterns": ["x"], "partition_type": "diagonal"}]}
    initialise(tensor_parallel={"autotp_size": 2, "partition_config": bad})


def preset_of_nobody():
    initialise(tensor_parallel={"autotp_size": 2, "preset_model": "lama"})


def batches_differ_at_once():
    initialise()(**batch(dist.get_rank(), 2))


def batches_differ_in_shape():
    initialise()(**batch(0, 2 + dist.get_rank()))


def batches_differ_later():
    engine = initialise()  # compared at every second forward
    engine(**batch(0, 2))
    engine(**batch(dist.get_rank(), 2))
    engine(**batch(dist.get_rank(), 2))


def batches_differ_in_evaluation():
    engine = initialise()
    engine.eval()
    with torch.no_grad():
        engine(**batch(dist.get_rank(), 2))


def other_widths():
    initialise(make("Llama", intermediate_size=53 + dist.get_rank()))


def other_dtypes():
    model = make("Llama")
    initialise(model.to(torch.bfloat16 if dist.get_rank() else torch.float32))


def early_without_degree():
    model = make("Llama")
    tp_plugin.shard_model(model, tp_plugin.TensorParallelConfig(tp_size=2, quiet=True))
    initialise(model, tensor_parallel={"autotp_size": 1})


def mesh_of_another_model():
    mesh = tp_plugin.ParallelMesh.create(2)
    engine_for(make("Llama"), None, {"train_micro_batch_size_per_gpu": 1}, mpu=mesh)


def foreign_mpu():
    engine_for(make("Llama"), None, config_for(2, 1), mpu=nn.Module())


def gradient_before():
    model = make("Llama")
    model(**batch(0, 2)).loss.backward()
    initialise(model)


def on_meta():
    with torch.device("meta"):
        initialise(Mlp(), trained=False, tp_plugin={"plan": {"up": "column", "down": "row"}})


def compiled_before():
    initialise(torch.compile(make("Llama"), backend="aot_eager"), trained=False)


def dtensors():
    """As transformers' tp_plan or FSDP leaves a model."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    model = make("Llama")
    whole = model.lm_head.weight
    model.lm_head.weight = nn.Parameter(distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(0)]))
    initialise(model)


def shards_of_autotp():
    """As DeepSpeed's AutoTP leaves a layer."""
    from deepspeed.module_inject.layers import LinearLayer

    model = make("Llama")
    mlp = model.model.layers[0].mlp
    mlp.up_proj = LinearLayer(mlp.up_proj, dist.group.WORLD, name="up_proj")
    initialise(model)


def two_degrees_given():
    try:
        tp_plugin.register(tp_plugin.TensorParallelConfig(tp_size=4))
        import deepspeed

        config = config_for(2, 1)
        del config["tp_plugin"]
        deepspeed.initialize(model=make("Llama"), config=config)
    finally:
        tp_plugin.register()
