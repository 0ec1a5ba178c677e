"""Accelerate's ways to lose DeepSpeed or tensor parallelism: refused in one sentence on every rank, or made right."""

import json
import os

import pytest
from accelerate import Accelerator, ParallelismConfig
from accelerate.utils import DeepSpeedPlugin, DistributedType, find_executable_batch_size

import tp_plugin
import tp_plugin.integrations.accelerate as integration
from tests.support.ranks import errors_on_ranks, on_ranks
from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.accelerate import unsupported

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 1,
    "zero_optimization": {"stage": 1},
    "tensor_parallel": {"autotp_size": 2},
}
PARALLELISM = {"ACCELERATE_USE_PARALLELISM_CONFIG": "true", "PARALLELISM_CONFIG_TP_SIZE": "2"}


@pytest.fixture
def launched(tmp_path):
    """The environment that ``accelerate launch`` makes for DeepSpeed."""
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG))
    return {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}


def make(**how):
    tp_plugin.register()
    if "parallelism" in how:
        how["parallelism_config"] = ParallelismConfig(**{"tp_size": 2} | how.pop("parallelism"))
    if "plugin" in how:
        how["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=how.pop("plugin"))
    accelerator = Accelerator(**how)
    assert accelerator.parallelism_config is None
    assert "PARALLELISM_CONFIG_TP_SIZE" not in os.environ or os.environ["ACCELERATE_USE_PARALLELISM_CONFIG"] == "true"
    return accelerator.distributed_type, accelerator.state.num_processes, accelerator.device.type


def test_deepspeed_on_cpu_knows_its_processes(launched):
    assert on_ranks(2, make, env=launched) == [(DistributedType.DEEPSPEED, 2, "cpu")] * 2


WAYS = pytest.mark.parametrize(
    ("how", "env"),
    [({}, PARALLELISM), ({"parallelism": {}}, {}), ({"parallelism": {}, "plugin": CONFIG}, {})],
    ids=["environment", "argument", "plugin"],
)


@WAYS
def test_a_parallelism_config_of_the_same_degree_is_the_engines(launched, how, env):
    """accelerate would make a device mesh and shard or deal data by it."""
    found = on_ranks(2, make, env=({} if "plugin" in how else launched) | env, **how)
    assert found == [(DistributedType.DEEPSPEED, 2, "cpu")] * 2


@WAYS
def test_a_parallelism_config_of_another_degree_is_refused(launched, how, env):
    how, env = dict(how), dict(env)
    if env:
        env["PARALLELISM_CONFIG_TP_SIZE"] = "4"
    else:
        how["parallelism"] = {"tp_size": 4}
    for error in errors_on_ranks(2, make, env=({} if "plugin" in how else launched) | env, **how):
        assert "tp_size=4 of accelerate's ParallelismConfig" in error
        assert "whose config has the degree 2" in error


def test_a_parallelism_config_beside_no_degree_is_refused(tmp_path, launched):
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG | {"tensor_parallel": {}}))
    for error in errors_on_ranks(2, make, env=launched | PARALLELISM):
        assert '"tensor_parallel": {"autotp_size": 2} in the DeepSpeed config' in error


def test_parallelism_over_the_sequence_is_refused(launched):
    for error in errors_on_ranks(2, make, env=launched | PARALLELISM | {"PARALLELISM_CONFIG_CP_SIZE": "2"}):
        assert "cp_size=2 of accelerate's ParallelismConfig cannot be had beside" in error


@pytest.mark.parametrize(("how", "env"), [({"cpu": True}, {}), ({}, {"ACCELERATE_USE_CPU": "true"})])
def test_asking_for_the_cpu_where_there_is_nothing_else_keeps_deepspeed(launched, how, env):
    assert on_ranks(2, make, env=launched | env, **how) == [(DistributedType.DEEPSPEED, 2, "cpu")] * 2


def test_dropping_deepspeed_is_refused():
    """Without a config file from accelerate launch, the degree is known too late to save DeepSpeed."""
    for error in errors_on_ranks(2, make, plugin=CONFIG, cpu=True):
        assert "autotp_size is 2 but accelerate has dropped DeepSpeed for MULTI_CPU" in error
        assert "remove cpu=True" in error


@pytest.mark.parametrize("degree", [1, 2])
def test_a_rank_that_is_out_of_memory_tries_again_only_where_nobody_waits_for_it(monkeypatch, degree):
    """The function was imported by name, and before our patches."""
    tried = []

    @find_executable_batch_size(starting_batch_size=8)
    def train(batch_size):
        tried.append(batch_size)
        if batch_size > 6:
            raise RuntimeError("CUDA out of memory.")

    monkeypatch.setattr(unsupported, "tp_size", lambda: degree)
    integration.ROOM.install()
    try:
        if degree == 1:
            train()
        else:
            with pytest.raises(TensorParallelError, match="give a batch size that fits"):
                train()
    finally:
        integration.ROOM.uninstall()
    assert tried == ([8, 7, 6] if degree == 1 else [8])


def trainer_arguments(**how):
    from transformers import TrainingArguments

    tp_plugin.register()
    made = TrainingArguments("unused", report_to="none", **how)
    return made.distributed_state.distributed_type, made.distributed_state.num_processes


def test_training_arguments_with_use_cpu_keep_deepspeed(launched):
    """bf16 on CPU cannot be had without use_cpu."""
    expected = [(DistributedType.DEEPSPEED, 2)] * 2
    assert on_ranks(2, trainer_arguments, env=launched, use_cpu=True, bf16=True) == expected


# ---- where tensor parallelism is off, nothing changes ----------------------------------------------------------------


def without(**how):
    """What an Accelerator without tensor parallelism answers, with our patches and without."""
    import torch

    answers = []
    for patched in (False, True):
        if patched:
            tp_plugin.register()
        accelerator = Accelerator(**how)
        mine = torch.tensor([accelerator.process_index + 1.0])
        answers.append(
            (
                accelerator.distributed_type,
                accelerator.num_processes,
                accelerator.gather(mine).tolist(),
                accelerator.gather_for_metrics(["a"]),
                accelerator.reduce(mine, "sum").tolist(),
                accelerator.reduce(mine, "mean").tolist(),
            )
        )
    return answers


def test_without_deepspeed_nothing_changes():
    for before, after in on_ranks(2, without, cpu=True):
        assert before == after
        assert before[2] == [1, 2]


def test_deepspeed_without_tensor_parallelism_counts_every_process(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG | {"tensor_parallel": {"autotp_size": 1}}))
    env = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}
    assert on_ranks(2, collected, env=env) == [([1, 2], ["a", "a"], [3], [1.5])] * 2


def collected():
    import torch

    tp_plugin.register()
    accelerator = Accelerator()
    mine = torch.tensor([accelerator.process_index + 1.0])
    return (
        accelerator.gather(mine).tolist(),
        accelerator.gather_for_metrics(["a"]),
        accelerator.reduce(mine, "sum").tolist(),
        accelerator.reduce(mine, "mean").tolist(),
    )


def test_cpu_without_tensor_parallelism_still_means_ddp(tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(CONFIG | {"tensor_parallel": {"autotp_size": 1}}))
    env = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(tmp_path / "ds.json")}
    kinds = [kind for kind, *_ in on_ranks(2, make, env=env, cpu=True)]
    assert kinds == [DistributedType.MULTI_CPU] * 2


def owners():
    """Every class and module our patches touch."""
    import accelerate.accelerator
    import accelerate.data_loader
    import accelerate.scheduler
    import accelerate.utils
    import accelerate.utils.random
    import deepspeed
    from accelerate.state import PartialState
    from accelerate.utils import operations
    from transformers import GenerationMixin, Trainer, trainer, trainer_pt_utils
    from transformers.modeling_utils import ModuleUtilsMixin

    modules = [accelerate.accelerator, accelerate.scheduler, accelerate.utils, accelerate.utils.random, operations]
    theirs = [Trainer, trainer, ModuleUtilsMixin, GenerationMixin, trainer_pt_utils.BatchRebalanceSampler]
    return [*modules, deepspeed, Accelerator, PartialState, accelerate.data_loader.DataLoaderDispatcher, *theirs]


def test_installing_twice_and_uninstalling_leaves_no_trace():
    import tp_plugin.integrations.transformers as trainer_side

    before = [dict(vars(owner)) for owner in owners()]
    for part in (integration, trainer_side):
        part.ROOM.install()
        part.ROOM.install()
    assert [dict(vars(owner)) for owner in owners()] != before
    for part in (integration, trainer_side):
        part.ROOM.uninstall()
        part.ROOM.uninstall()
    assert [dict(vars(owner)) for owner in owners()] == before
