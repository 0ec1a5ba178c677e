"""A checkpoint loaded by slices beside the same one loaded by transformers and sharded."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import transformers as hf
from safetensors.torch import load_file, save_file

import tp_plugin
from tests.support.loaded import assert_same, readers


@contextlib.contextmanager
def folder_for(model: hf.PreTrainedModel, **options) -> Iterator[str]:
    """A checkpoint of ``model``, written by the first rank."""
    name = [tempfile.mkdtemp()]
    dist.broadcast_object_list(name)
    if dist.get_rank() == 0:
        model.save_pretrained(name[0], **options)
    dist.barrier()
    try:
        yield name[0]
    finally:
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(name[0])


def both(kind, folder: str, config: tp_plugin.TensorParallelConfig, **options):
    """``folder`` loaded by transformers and sharded, and by us, from one state of the random generator."""
    torch.manual_seed(5)
    whole = kind.from_pretrained(folder, **options)
    tp_plugin.shard_model(whole, config)
    torch.manual_seed(5)
    return whole, tp_plugin.from_pretrained(folder, config=config, model_class=kind, **options)


def held(model) -> int:
    """Bytes of a rank's parameters and persistent buffers, tied ones once."""
    unique = {id(tensor): tensor for tensor in model.state_dict(keep_vars=True).values()}
    return sum(tensor.numel() * tensor.element_size() for tensor in unique.values())


def against_transformers(kind, model, *, change=None, tp=None, read=None, save=None, **options):
    """Both ways of loading what ``change`` makes of a checkpoint of ``model``; ``read``: bytes, if not what is held."""
    with folder_for(model, **save or {}) as folder:
        if change is not None and dist.get_rank() == 0:
            change(Path(folder))
        dist.barrier()
        config = tp_plugin.TensorParallelConfig(tp_size=tp or dist.get_world_size(), infer="off")
        with readers() as opened:
            whole, ours = both(kind, folder, config, **options)
        assert_same(whole, ours)
        assert opened[-1].bytes_read == (held(ours) if read is None else read(ours, opened[-1]))
    return ours


def rewrite(folder: Path, change) -> None:
    """``change(state dict)`` of a checkpoint in one file."""
    state = load_file(folder / "model.safetensors")
    save_file(change(state) or state, folder / "model.safetensors", metadata={"format": "pt"})


def compared(model, _) -> int:
    """What is held, and this rank's share of the rows of the embedding and of the head, which were compared."""
    return held(model) + 2 * ((131 + (dist.get_rank() == 0)) // 2) * 32 * 4
