"""Models that cannot be loaded: each a function that ranks call."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

import tp_plugin
from tests.support import custom_models, zoo
from tests.support.configs import config_for
from tests.support.models import make
from tp_plugin.weights.reader import Reader

SHARD = "model-00002-of-00003.safetensors"


def saved(model, **options) -> Path:
    """This rank's own copy of a checkpoint; a collective call, since transformers writes on the first rank alone."""
    shared = [tempfile.mkdtemp()]
    dist.broadcast_object_list(shared)
    model.save_pretrained(shared[0], **options)
    dist.barrier()
    own = Path(tempfile.mkdtemp(), "model")
    shutil.copytree(shared[0], own)
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(shared[0])
    return own


def damaged(how, rank: int | None = None, *, other: Path | None = None) -> None:
    """Load a checkpoint of which the copy of ``rank`` (None: of every rank) is damaged, perhaps by parts of another."""
    folder = saved(make("Llama"), max_shard_size="40KB")
    assert (folder / SHARD).exists()
    if rank in (None, dist.get_rank()):
        how(folder)
    here = os.getcwd()
    os.chdir(folder.parent)  # one name on every rank
    try:
        tp_plugin.from_pretrained("./model")
    finally:
        os.chdir(here)
        shutil.rmtree(folder.parent)
        if other is not None:
            shutil.rmtree(other.parent)


def edit(file: Path, change) -> None:
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def truncate(folder: Path) -> None:
    os.truncate(folder / SHARD, (folder / SHARD).stat().st_size - 4)


def flip(folder: Path) -> None:
    content = bytearray((folder / SHARD).read_bytes())
    content[20] = 0xFF
    (folder / SHARD).write_bytes(content)


def truncated():
    damaged(truncate)


def truncated_on_one_rank():
    damaged(truncate, rank=1)


def header_flipped():
    damaged(flip)


def header_flipped_on_one_rank():
    damaged(flip, rank=0)


def file_missing():
    damaged(lambda folder: (folder / SHARD).unlink())


def file_missing_on_one_rank():
    damaged(lambda folder: (folder / SHARD).unlink(), rank=1)


def index_names_a_missing_tensor():
    def change(index):
        index["weight_map"]["model.layers.7.mlp.up_proj.weight"] = SHARD

    damaged(lambda folder: edit(folder / "model.safetensors.index.json", change))


def index_is_no_json():
    damaged(lambda folder: (folder / "model.safetensors.index.json").write_text("{"), rank=1)


def empty_file():
    damaged(lambda folder: (folder / SHARD).write_bytes(b""))


def empty_directory():
    def clear(folder):
        for file in folder.iterdir():
            file.unlink()

    damaged(clear)


def no_directory():
    tp_plugin.from_pretrained("/no/such/directory")


def no_weights():
    damaged(lambda folder: [file.unlink() for file in folder.glob("model*")], rank=1)


def vocabulary_changed():
    damaged(lambda folder: edit(folder / "config.json", lambda config: config.update(vocab_size=140)))


def width_changed():
    damaged(lambda folder: edit(folder / "config.json", lambda config: config.update(intermediate_size=59)))


def another_architecture():
    other = saved(zoo.build("gpt2"))

    def replace(folder):
        for file in folder.glob("model*"):
            file.unlink()
        shutil.move(other / "model.safetensors", folder / "model.safetensors")

    damaged(replace, other=other)


def ranks_differ():
    model, same = make("Llama", intermediate_size=59), make("Llama")
    model.model.embed_tokens.load_state_dict(same.model.embed_tokens.state_dict())
    other = saved(model, max_shard_size="40KB")
    damaged(lambda folder: shutil.copytree(other, folder, dirs_exist_ok=True), rank=1, other=other)


def another_fine_tune_on_one_rank():
    model = make("Llama")
    for param in model.parameters():
        param.data.mul_(1.001)
    other = saved(model, max_shard_size="40KB")
    damaged(lambda folder: shutil.copytree(other, folder, dirs_exist_ok=True), rank=1, other=other)


def another_rope_on_one_rank():
    rope = {"rope_type": "default", "rope_theta": 5000.0}
    damaged(lambda folder: edit(folder / "config.json", lambda config: config.update(rope_parameters=rope)), rank=1)


def quantised():
    fp8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    damaged(lambda folder: edit(folder / "config.json", lambda config: config.update(quantization_config=fp8)))


def cannot_be_sharded():
    other = saved(make("Llama", heads=(5, 1)), max_shard_size="40KB")
    damaged(lambda folder: shutil.copytree(other, folder, dirs_exist_ok=True), other=other)


def disk_fails_on_one_rank():
    original = Reader._pread

    def fail(self, out, file, start):
        if dist.get_rank() == 1 and file.endswith(SHARD):
            raise OSError(5, "Input/output error")
        original(self, out, file, start)

    Reader._pread = fail
    try:
        damaged(lambda folder: None)
    finally:
        Reader._pread = original


def fails_on_one_rank(place: str, how=lambda folder: None) -> None:
    """``place`` fails on rank 1 after everything was read."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    with mock.patch(place, side_effect=error) if dist.get_rank() == 1 else contextlib.nullcontext():
        damaged(how)


def comparing_fails_on_one_rank():
    fails_on_one_rank("tp_plugin.sharding.sync_params.fingerprint")


def sharing_what_is_new_fails_on_one_rank():
    def other_head(folder: Path) -> None:
        edit(folder / "config.json", lambda config: config.update(architectures=["LlamaForSequenceClassification"]))

    fails_on_one_rank("tp_plugin.weights.checkpoint_view.comm_device", other_head)


def installing_fails_on_one_rank():
    fails_on_one_rank("tp_plugin.integrations.transformers.sharded_load.watched")


def inferred_rules_are_wrong():
    folder = saved(custom_models.HomeModel(custom_models.HomeConfig(mixing=True, num_layers=2)))
    try:
        tp_plugin.from_pretrained(folder, model_class=custom_models.HomeModel)
    finally:
        shutil.rmtree(folder.parent)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/tp_plugin_was_here",)


def as_bin(folder: Path, value) -> None:
    for file in folder.glob("model*"):
        file.unlink()
    torch.save(value, folder / "pytorch_model.bin")


def pickle_that_runs_code():
    damaged(lambda folder: as_bin(folder, {"model.norm.weight": Evil()}))


def pickle_of_old():
    def write(folder):
        as_bin(folder, {})
        torch.save(make("Llama").state_dict(), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)

    damaged(write)


def plain_pickle():
    def write(folder):
        as_bin(folder, {})
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"model.norm.weight": 1}))

    damaged(write)


def option(**options):
    folder = saved(make("Llama"))
    try:
        tp_plugin.from_pretrained(folder, **options)
    finally:
        shutil.rmtree(folder.parent)


def device_map():
    option(device_map="cpu")


def hub_kernels():
    option(use_kernels=True)


def adapter():
    from peft import LoraConfig, get_peft_model

    shared = [tempfile.mkdtemp()]
    dist.broadcast_object_list(shared)
    base, folder = Path(shared[0], "base"), Path(shared[0], "adapter")
    model = make("Llama")
    if dist.get_rank() == 0:
        model.save_pretrained(base)
        model.name_or_path = str(base)
        get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
        shutil.copy(base / "config.json", folder)
    dist.barrier()
    try:
        tp_plugin.from_pretrained(folder, model_class=type(model))
    finally:
        dist.barrier()
        shutil.rmtree(shared[0], ignore_errors=True)


def state_dict_under_zero3():
    from transformers import LlamaForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    tp_plugin.register()
    model = make("Llama")
    alive = HfDeepSpeedConfig(config_for(2, 3))
    try:
        LlamaForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict())
    finally:
        del alive
