"""``DeepSpeedPlugin`` in code instead of a config file, on four ranks as tp 2 x dp 2."""

import functools
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DeepSpeedPlugin

import tp_plugin
from integration.scripts import tiny
from tests.support.ranks import on_ranks

TP, DP, STEPS, RATE = 2, 2, 3, 1e-2
STAGES = (1, 3)


def config(stage: int, **more: Any) -> dict:
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage},
        "zero_force_ds_cpu_optimizer": False,
        "zero_allow_untested_optimizer": True,
        "tensor_parallel": {"autotp_size": TP},
        "tp_plugin": {"quiet": True},
        **more,
    }


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE, eps=1e-4, weight_decay=0.0)


def looped(stage: int) -> dict:
    plugin = DeepSpeedPlugin(hf_ds_config=config(stage), gradient_clipping=0.5, gradient_accumulation_steps=1)
    accelerator = Accelerator(deepspeed_plugin=plugin)
    model = tiny.model()
    loader = torch.utils.data.DataLoader(tiny.Samples(24), batch_size=2)
    model, optimizer, loader = accelerator.prepare(model, adamw(model), loader)
    losses, norms, read = [], [], []
    for batch, _ in zip(loader, range(STEPS), strict=False):
        tokens = accelerator.gather((batch["labels"][:, 1:] != -100).sum()).sum()
        loss = model(**batch, num_items_in_batch=tokens / DP).loss
        accelerator.backward(loss)
        norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(accelerator.reduce(loss.detach(), "mean")))
        read.append(accelerator.gather_for_metrics(batch["input_ids"][:, 0]).tolist())
    with accelerator.split_between_processes(["a", "b", "c", "d", "e"]) as mine:
        dealt = list(mine)
    with accelerator.split_between_processes({"ids": torch.arange(3)}, apply_padding=True) as mine:
        padded = mine["ids"].tolist()
    weights = accelerator.get_state_dict(model)
    return {"losses": losses, "norms": norms, "read": read, "dealt": dealt, "padded": padded, "weights": weights}


def loops() -> dict:
    tp_plugin.register()
    found = {}
    for stage in STAGES:
        found[stage] = looped(stage)
        AcceleratorState._reset_state(reset_partial_state=True)  # it takes one plugin a process
    return found


@functools.cache
def found() -> list[dict]:
    return on_ranks(TP * DP, loops, env={"ACCELERATE_USE_DEEPSPEED": "true"})


@pytest.mark.parametrize("stage", STAGES)
def test_a_plugin_in_code_trains_like_one_process(stage):
    samples = [[[[4 * step + 2 * rank, 4 * step + 2 * rank + 1]] for rank in range(DP)] for step in range(STEPS)]
    expected = tiny.truth(tiny.model(), samples, all_tokens=True, clip=0.5, lr=RATE)
    start = dict(tiny.model().named_parameters())
    for rank in found():
        assert rank[stage]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        assert rank[stage]["norms"] == pytest.approx(expected["norms"], rel=1e-5)
    weights = found()[0][stage]["weights"]
    for name, parameter in expected["model"].named_parameters():
        assert (weights[name] - parameter).norm() <= 1e-4 * (parameter - start[name]).norm(), name


def test_samples_are_collected_once_and_prompts_dealt_to_groups():
    for index, rank in enumerate(found()):
        loop = rank[1]
        assert loop["read"] == [[4 * step + n for n in range(4)] for step in range(STEPS)]
        first = index < TP
        assert loop["dealt"] == (["a", "b", "c"] if first else ["d", "e"])
        assert loop["padded"] == ([0, 1] if first else [2, 2])
