"""``DeepSpeedPlugin`` in code instead of a config file, on four ranks as tp 2 x dp 2."""

import functools
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, DeepSpeedPlugin, DummyOptim, DummyScheduler
from torch.nn import functional as F
from transformers import get_scheduler

import tp_plugin
from tests.support import tiny
from tests.support.configs import auto_config
from tests.support.ranks import on_ranks

TP, DP, STEPS, RATE = 2, 2, 3, 1e-2
STAGES = (1, 3)


def config(stage: int, **more: Any) -> dict:
    ours = {"tensor_parallel": {"autotp_size": TP}, "tp_plugin": {"quiet": True}}
    return auto_config(stage, **{"zero_allow_untested_optimizer": True} | ours | more)


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=RATE, eps=1e-4, weight_decay=0.0)


def looped(stage: int) -> dict:
    asked = config(stage, train_batch_size="auto")
    plugin = DeepSpeedPlugin(hf_ds_config=asked, gradient_clipping=0.5, gradient_accumulation_steps=1)
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
    found = {"readers": accelerator.num_processes, "ranks": accelerator.state.num_processes}
    return found | {
        "last": accelerator.is_last_process,
        "losses": losses,
        "norms": norms,
        "read": read,
        "dealt": dealt,
        "padded": padded,
        "weights": weights,
    }


def guided(rows: int, accelerator: Accelerator) -> dict:
    """What the guides of accelerate and the examples of transformers multiply and divide by ``num_processes``.

    ``rows`` are those of one reader, of ``accelerator.num_processes``, or of all with ``split_batches``.
    """
    gas, readers, steps = accelerator.gradient_accumulation_steps, accelerator.num_processes, 3
    model = tiny.model()
    optimizer = adamw(model)
    stretched = 1 if accelerator.split_batches else readers
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=stretched, num_training_steps=4 * stretched)
    loader = torch.utils.data.DataLoader(tiny.Samples(24), batch_size=rows)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    losses, norms, rates, batches = [], [], [], iter(loader)
    for _ in range(steps):
        micros = [next(batches) for _ in range(gas)]
        count = accelerator.gather(sum((micro["labels"][:, 1:] != -100).sum() for micro in micros)).sum()
        total = torch.zeros(())
        for micro in micros:
            with accelerator.accumulate(model):
                logits = model(input_ids=micro["input_ids"]).logits[:, :-1]
                loss = F.cross_entropy(logits.flatten(0, 1), micro["labels"][:, 1:].flatten(), reduction="sum")
                loss = loss * gas * accelerator.num_processes / count
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norms.append(float(accelerator.clip_grad_norm_(model.parameters(), 0.5)))
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            total += loss.detach() / gas
        losses.append(float(accelerator.reduce(total, "sum") / accelerator.num_processes))
        rates.append(schedule.get_last_lr()[0])
    sizes = {}
    if accelerator.deepspeed_plugin is not None:
        sizes = {"micro": model.train_micro_batch_size_per_gpu(), "batch": model.train_batch_size()}
    weights = accelerator.get_state_dict(model)
    return {"losses": losses, "norms": norms, "rates": rates, "weights": weights, **sizes}


GUIDED = {"zero1": (1, 2, False), "zero3": (3, 2, False), "split": (1, 2, True)}  # stage, rows, split_batches


def planned() -> int:
    """Steps of a schedule that DeepSpeed's config plans and a script counts for all readers together."""
    decay = {"scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 2, "total_num_steps": "auto"}}}
    adam = {"optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}}}
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=config(1) | decay | adam))
    model = tiny.model()
    optimizer = DummyOptim(model.parameters())
    schedule = DummyScheduler(optimizer, total_num_steps=100, warmup_num_steps=2)
    loader = torch.utils.data.DataLoader(tiny.Samples(24), batch_size=2)
    *_, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    AcceleratorState._reset_state(reset_partial_state=True)
    return schedule.scheduler.total_num_steps


def loops() -> dict:
    tp_plugin.register()
    found: dict = {"planned": planned()}
    for stage in STAGES:
        found[stage] = looped(stage)
        AcceleratorState._reset_state(reset_partial_state=True)  # it takes one plugin a process
    for name, (stage, rows, split) in GUIDED.items():
        plugin = DeepSpeedPlugin(hf_ds_config=config(stage), gradient_clipping=0.5, gradient_accumulation_steps=2)
        loading = DataLoaderConfiguration(split_batches=split)
        made = Accelerator(deepspeed_plugin=plugin, gradient_accumulation_steps=2, dataloader_config=loading)
        found[name] = guided(rows, made)
        AcceleratorState._reset_state(reset_partial_state=True)
    return found


@functools.cache
def found() -> list[dict]:
    return on_ranks(TP * DP, loops, env={"ACCELERATE_USE_DEEPSPEED": "true"})


def alone() -> dict:
    """The same loop in one plain process, which reads what all readers read."""
    return {
        name: guided(rows if split else rows * DP, Accelerator(cpu=True, gradient_accumulation_steps=2))
        for name, (_, rows, split) in GUIDED.items()
    }


@functools.cache
def truths() -> dict:
    return on_ranks(1, alone)[0]


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


def test_processes_are_readers_and_the_state_counts_ranks():
    for index, rank in enumerate(found()):
        assert (rank[1]["readers"], rank[1]["ranks"]) == (DP, TP * DP)
        assert rank[1]["last"] == (index == TP * DP - 1)


@pytest.mark.parametrize("name", GUIDED)
def test_loops_that_scale_by_the_number_of_processes_train_like_one(name):
    expected = truths()[name]
    for rank in found():
        for figure in ("losses", "norms", "rates"):
            assert rank[name][figure] == pytest.approx(expected[figure], rel=1e-5), figure
    weights, start = found()[0][name]["weights"], tiny.model().state_dict()
    for parameter, whole in expected["weights"].items():
        update = (whole - start[parameter]).norm()
        assert (weights[parameter] - whole).norm() <= 1e-4 * update, parameter


def test_planned_schedules_last_as_long_as_planned():
    """100 steps over dp = 2 are 50, whatever tp is."""
    assert [rank["planned"] for rank in found()] == [100 // DP] * TP * DP


def test_a_batch_that_is_split_is_split_among_readers():
    """Two rows over four ranks: one for each tensor-parallel group."""
    for rank in found():
        assert (rank["split"]["micro"], rank["split"]["batch"]) == (1, 4), "with two micro batches a step"
        assert (rank["zero1"]["micro"], rank["zero1"]["batch"]) == (2, 8)
