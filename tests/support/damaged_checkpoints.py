"""Checkpoints that are damaged, foreign or cannot be written: each a function that two ranks call."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam

from tests.support import resume
from tests.support.models import make
from tests.support.spoilt import base, engine, everywhere, first, flip, frozen_engine, spoilt
from tests.support.train import engine_for
from tp_plugin.errors import TensorParallelError
from tp_plugin.weights.manifest import FILE


def truncated():
    spoilt(lambda path: os.truncate(path / "rank_00001.safetensors", 1000))


def missing():
    spoilt(lambda path: (path / "rank_00001.safetensors").unlink())


def flipped():
    spoilt(lambda path: flip(path / "rank_00001.safetensors", 0.7))


def manifest_flipped():
    spoilt(lambda path: (path / FILE).write_text((path / FILE).read_text().replace("0.5", "0.6").replace("0.1", "0.2")))


def manifest_truncated():
    spoilt(lambda path: os.truncate(path / FILE, 500))


def manifest_missing():
    spoilt(lambda path: (path / FILE).unlink())


def not_there():
    spoilt(lambda path: None, tag="global_step7")


def newer_format():
    def age(path: Path) -> None:
        content = json.loads((path / FILE).read_text())
        (path / FILE).write_text(json.dumps(content | {"version": 99}))

    spoilt(age)


def deepspeeds_own():
    def change(path: Path) -> None:
        shutil.rmtree(path)
        path.mkdir()
        (path / "mp_rank_00_model_states.pt").write_bytes(b"\x80")

    spoilt(change)


def other_architecture():
    spoilt(lambda path: None, make_engine=lambda: resume.engine_of(2, 1, family="Qwen3", heads=(4, 2), tied=False))


def other_vocabulary():
    spoilt(lambda path: None, make_engine=lambda: engine(vocab_size=137))


def with_optimizer(optimizer):
    model = make("Llama", tied=False)
    return engine_for(model, optimizer(model), base())


def other_optimizer():
    spoilt(lambda path: None, make_engine=lambda: with_optimizer(lambda m: torch.optim.SGD(m.parameters(), 0.1)))


def other_groups():
    spoilt(lambda path: None, make_engine=lambda: with_optimizer(lambda m: torch.optim.AdamW(m.parameters(), 0.1)))


def into(target, source=torch.optim.AdamW) -> None:
    spoilt(
        lambda path: None,
        make_engine=lambda: with_optimizer(lambda m: target(m.parameters(), 0.1)),
        saved=lambda: with_optimizer(lambda m: source(m.parameters(), 0.1)),
    )


def adam_into_adamw():
    into(torch.optim.AdamW, torch.optim.Adam)


def adamw_into_radam():
    into(torch.optim.RAdam)


def adamw_into_nadam():
    into(torch.optim.NAdam)


def without_optimizer():
    def bare():
        config = base() | {"zero_optimization": {"stage": 0}}
        return engine_for(make("Llama", tied=False), None, config)

    folder = everywhere()
    bare().save_checkpoint(folder)
    try:
        engine().load_checkpoint(folder)
    except TensorParallelError as refused:
        raise TensorParallelError(str(refused).replace(folder, "FOLDER")) from None


def unwritable_client_state():
    folder = everywhere()
    one = engine()
    one.save_checkpoint(folder, tag="kept")
    kept = sorted(Path(folder, "kept").iterdir())
    try:
        one.save_checkpoint(folder, tag="kept", client_state={"where": {"sampler": object()}})
    finally:
        dist.barrier()
        assert sorted(Path(folder, "kept").iterdir()) == kept
        assert sorted(os.listdir(folder)) == ["kept", "latest", "zero_to_fp32.py"]


def endless_client_state():
    endless: dict = {}
    endless["itself"] = endless
    engine().save_checkpoint(everywhere(), client_state=endless if dist.get_rank() == 0 else {})


def endless_scheduler():
    """On one rank, and not the first."""
    one = engine()
    endless: list = []
    endless.append(endless)
    if dist.get_rank() == 1:
        one.lr_scheduler.itself = endless
    one.save_checkpoint(everywhere())


def others_client_state():
    """Only the first rank's is kept, so only that must be writable."""
    folder = everywhere()
    engine().save_checkpoint(folder, client_state={"seen": 3} if dist.get_rank() == 0 else {"odd": object()})
    return engine().load_checkpoint(folder)[1]


def different_tags():
    engine().save_checkpoint(everywhere(), tag=f"mine-{dist.get_rank()}")


def disk_full():
    """The disk of one rank takes 20 kB a file."""
    folder = everywhere()
    one = engine()
    one.save_checkpoint(folder, tag="kept")
    dist.barrier()
    kept = {path.name: path.read_bytes() for path in Path(folder, "kept").iterdir()}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        one.save_checkpoint(folder, tag="kept")
    except TensorParallelError as refused:
        raise TensorParallelError(str(refused).replace(folder, "FOLDER")) from None
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        dist.barrier()
        assert {path.name: path.read_bytes() for path in Path(folder, "kept").iterdir()} == kept
        assert sorted(os.listdir(folder)) == ["kept", "latest", "zero_to_fp32.py"], "something was left behind"


def no_directory():
    engine().save_checkpoint("/proc/no/such/place")


def local_storage():
    engine(extra={"checkpoint": {"use_node_local_storage": True}}).save_checkpoint(everywhere())


def frozen_left_out():
    folder = everywhere()
    frozen_engine().save_checkpoint(folder, exclude_frozen_parameters=True)
    try:
        frozen_engine().load_checkpoint(folder)
    except TensorParallelError as refused:
        raise TensorParallelError(str(refused).replace(folder, "FOLDER")) from None


class AdamW8bit(torch.optim.AdamW):
    """State as bitsandbytes keeps it: a byte an element, a scale for every 256, one table."""

    def step(self, closure=None):
        for param in (param for group in self.param_groups for param in group["params"]):
            self.state[param] = {
                "step": 1,
                "state1": torch.zeros_like(param, dtype=torch.uint8),
                "absmax1": torch.zeros(-(-param.numel() // 256)),
                "qmap1": torch.zeros(256),
            }


def block_quantised():
    folder = everywhere()
    one = with_optimizer(lambda model: AdamW8bit(model.parameters(), 0.1))
    resume.train(one, 2, (0,), "Llama")
    try:
        one.save_checkpoint(folder)
    finally:
        dist.barrier()
        assert os.listdir(folder) == []


def latest_unreadable():
    """A file that is there and gives an error when it is read."""
    folder = everywhere()
    one = engine()
    one.save_checkpoint(folder)
    first(lambda: (Path(folder, "latest").unlink(), Path(folder, "latest").symlink_to("/proc/self/mem")))
    try:
        one.load_checkpoint(folder)
    except TensorParallelError as refused:
        raise TensorParallelError(str(refused).replace(folder, "FOLDER")) from None


def unsharded(optimizer, **zero):
    config = base() | {"zero_optimization": {"stage": 3, **zero}, "tensor_parallel": {"autotp_size": 1}}
    model = make("Llama", tied=False)
    return engine_for(model, optimizer(model.parameters()), config)


def twin_flow():
    """An engine without tensor parallelism, part of whose parameters another optimizer steps."""
    with mock.patch("deepspeed.ops.adam.cpu_adam.CPUAdamBuilder"):  # never stepped here, so never compiled
        return unsharded(DeepSpeedCPUAdam, offload_optimizer={"device": "cpu", "ratio": 0.5}, sub_group_size=1000)


def twin_flow_saved():
    twin_flow().save_checkpoint(everywhere())


def twin_flow_loaded():
    folder = everywhere()
    unsharded(torch.optim.AdamW).save_checkpoint(folder)
    twin_flow().load_checkpoint(folder)
