"""Programs that hand one key for the degree to DeepSpeed, to accelerate and to ``from_pretrained``: one degree."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tp_plugin
from tests.support import tiny
from tests.support.ranks import errors_on_ranks, on_ranks
from tests.support.trainer_cases import config_of
from tp_plugin.sharding.state import state_of

ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(2, 100, (8, 12), generator=torch.manual_seed(0))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A saved model, and the DeepSpeed configs of ZeRO 1 and 3."""
    path = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(path)
    for stage in (1, 3):
        (path / f"ds{stage}.json").write_text(json.dumps(config_of(stage)))
    return path


def environment(path: Path, stage: int) -> dict[str, str]:
    """What a program sets in each process, as axolotl does."""
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path / f"ds{stage}.json"),
        "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
        "PARALLELISM_CONFIG_TP_SIZE": "2",
    }


def losses(path: str, stage: int, **options) -> list[float]:
    """The losses of two steps, of a plain Trainer at stage -1."""
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    sharded = stage >= 0
    if sharded:
        tp_plugin.register()
        if "device_mesh" in options:
            names = {"mesh_dim_names": ("dp", "tp")} if len(options["device_mesh"]) == 2 else {}
            options["device_mesh"] = torch.distributed.init_device_mesh("cpu", options["device_mesh"], **names)
    how = {"deepspeed": f"{path}/ds{stage}.json"} if sharded else {"use_cpu": True}
    args = TrainingArguments(
        f"{path}/out", per_device_train_batch_size=4, max_steps=2, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, learning_rate=1e-2, **how,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, **options)
    if sharded and stage != 3:
        assert model.lm_head.weight.shape[0] == model.config.vocab_size
        model._tp_size, model._device_mesh = 2, options.get("device_mesh")
    trainer = Trainer(model, args, train_dataset=ROWS)
    trainer.train()
    assert not sharded or state_of(trainer.model).mesh.tp_size == 2
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


OPTIONS = [
    {"tp_size": 2, "tp_plan": "auto", "device_mesh": (2,)},
    {"tp_plan": "auto", "device_mesh": (1, 2)},
    {"distributed_config": {"tp_size": 2}},
]


@pytest.mark.parametrize(
    ("stage", "options"), [(1, OPTIONS[0]), (1, OPTIONS[1]), (1, OPTIONS[2]), (3, {"tp_plan": "auto", "tp_size": 2})]
)
def test_the_same_degree_is_the_engines(folder, stage, options):
    expected = on_ranks(1, losses, str(folder), -1)[0]
    for found in on_ranks(2, losses, str(folder), stage, env=environment(folder, stage), **options):
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {"tp_size": 4, "tp_plan": "auto"},
        {"tp_plan": {"lm_head": "colwise_gather_output"}},
        {"distributed_config": {"tp_size": 2, "fsdp_size": 2}},
    ],
)
def test_another_degree_or_plan_is_refused(folder, stage, options):
    for error in errors_on_ranks(2, losses, str(folder), stage, env=environment(folder, stage), **options):
        assert "asks transformers for parallelism beside the degree 2 of the DeepSpeed config" in error
