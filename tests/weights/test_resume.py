"""An engine's checkpoint against the run that was never interrupted: the same shape to the bit, any other by value.

DeepSpeed's groups are made once a process, so each (world, tp) is a launch of its own, which saves and resumes many
checkpoints; each checkpoint is a test of its own.
"""

from __future__ import annotations

import functools
import tempfile
import traceback
from pathlib import Path

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from tests.support import resume
from tests.support.ranks import on_ranks
from tests.support.resume import BF16, BF16_OPTIMIZER, FP16, OFFLOAD
from tp_plugin.integrations.deepspeed.checkpoint.read import set_loss_scale, steps_of
from tp_plugin.weights.manifest import Manifest

ROOT = tempfile.TemporaryDirectory()
HUB = (4, 2, 1)  # world, tp, ZeRO stage
SHAPES = [(tp * dp, tp, stage) for tp in (1, 2, 4) for dp in (1, 2) if tp * dp <= 4 for stage in (1, 2, 3)]
LIMIT = 1e-5
AT_END = len(resume.BEFORE + resume.AFTER)

DROPOUT = {"attention_dropout": 0.2}
SAME = {
    **{f"fp32 ZeRO-{stage}": (stage, DROPOUT) for stage in (0, 1, 2, 3)},
    **{f"bf16 ZeRO-{stage}": (stage, {"extra": BF16}) for stage in (1, 2, 3)},
    "BF16_Optimizer": (1, {"extra": BF16_OPTIMIZER}),
    "fp16 ZeRO-1": (1, {"extra": FP16}),
    "fp16 ZeRO-3": (3, {"extra": FP16}),
    **{f"offload ZeRO-{stage}": (stage, {"extra": OFFLOAD}) for stage in (1, 2, 3)},
    "fused ZeRO-1": (1, {"fused": True}),
    "parameters offloaded": (3, {"extra": {"zero": OFFLOAD["zero"] | {"offload_param": {"device": "cpu"}}}}),
    "round robin": (2, {"extra": {"zero": {"round_robin_gradients": True}}}),
    "steps in an int": (1, {"optimizer": "counting"}),
}

# what lies otherwise on tp 2 and tp 4: (stage at tp 2 x dp 2, stage at tp 4, options)
FAMILIES = {
    "packed Phi3": (1, 3, {"family": "phi3"}),
    "Conv1D GPT2": (2, 1, {"family": "gpt2"}),
    "grouped GPTNeoX": (3, 2, {"family": "gpt_neox"}),
    "experts Mixtral": (1, 3, {"family": "Mixtral", "heads": (4, 2), "tied": False}),
    "fused experts GptOss": (3, 1, {"family": "GptOss", "heads": (4, 2), "tied": False}),
    "latent DeepseekV3": (2, 2, {"family": "DeepseekV3", "heads": (4, 4), "tied": False}),
    "shared heads": (1, 2, {"family": "Qwen3", "heads": (12, 3), "tied": False}),
    "untied": (2, 3, {"family": "Llama", "heads": (8, 2), "tied": False}),
    "offloaded": (1, 3, {"extra": OFFLOAD}),
    "bf16": (1, 3, {"extra": BF16}),
    "BF16_Optimizer": (1, 2, {"extra": BF16_OPTIMIZER}),
    "LoRA": (1, 3, {"family": "Llama", "heads": (8, 2), "tied": False, "lora": True}),
    "round robin": (2, 1, {"extra": {"zero": {"round_robin_gradients": True}}}),
    "one sub-group after another": (3, 3, {"extra": {"zero": {"sub_group_size": 1000}}}),
}


def many(tp: int, jobs: list[tuple]) -> list[dict | str]:
    """One rank's share of (function, stage, folder, options); an exception ends its job only."""
    found: list[dict | str] = []
    for name, stage, folder, options in jobs:
        try:
            found.append(getattr(resume, name)(tp, stage, folder, **options))
        except Exception:
            found.append(traceback.format_exc())
    return found


def launch(world: int, tp: int, jobs: list[tuple]) -> list[dict]:
    """The first rank's answers; fails with what a rank raised."""
    found = on_ranks(world, many, tp, jobs, timeout_s=600)
    for rank, answers in enumerate(found):
        for job, answer in zip(jobs, answers, strict=True):
            assert isinstance(answer, dict), f"{job} on rank {rank} of {world}:\n{answer}"
    return found[0]


def folder(*parts: object) -> str:
    return str(Path(ROOT.name, "-".join(str(part).replace(" ", "_") for part in parts)))


def error(saved: dict, resumed: dict) -> float:
    return max(abs(ours / theirs - 1) for ours, theirs in zip(resumed["after"], saved["after"], strict=True))


def same_state(resumed: dict) -> None:
    """What was loaded is what was saved: weights and moments, learning rates, steps."""
    assert resume.worst_difference(resumed["path"], f"{resumed['own']}/again") == (0.0, "")
    assert set(resumed["rates"]) == {1e-2 * resume.schedule(len(resume.BEFORE))}
    assert (resumed["steps"], resumed["samples"]) == (AT_END, AT_END * resume.ROWS)


# ---- the same shape --------------------------------------------------------------------------------------------------


@functools.cache
def same_shape(world: int, tp: int, names: tuple[str, ...]) -> tuple[list[dict], list[dict]]:
    """Those of ``SAME`` saved by one launch and resumed by another."""
    jobs = [(SAME[name][0], folder("same", world, tp, len(names), name), SAME[name][1]) for name in names]
    saved = launch(world, tp, [("save_then_go_on", *job) for job in jobs])
    return saved, launch(world, tp, [("resume", *job) for job in jobs])


def goes_on_to_the_bit(world: int, tp: int, names: tuple[str, ...], name: str) -> None:
    saved, resumed = (answers[names.index(name)] for answers in same_shape(world, tp, names))
    assert resumed["after"] == saved["after"]
    same_state(resumed)
    scalers = [Manifest.load(Path(path)).scaler for path in (resumed["path"], f"{resumed['own']}/again")]
    assert scalers[0] == scalers[1]
    end = Path(folder("same", world, tp, len(names), name), "end")
    assert resume.worst_difference(end, f"{resumed['own']}/end") == (0.0, "")


SELDOM = (
    "fp32 ZeRO-2", "bf16 ZeRO-1", "bf16 ZeRO-3", "fp16 ZeRO-3", "offload ZeRO-1", "offload ZeRO-2", "offload ZeRO-3",
    "round robin",
)  # fmt: skip
OFTEN = tuple(name for name in SAME if name not in SELDOM)
SOME = ("fp32 ZeRO-0", "bf16 ZeRO-3", "BF16_Optimizer")


@pytest.mark.parametrize("name", OFTEN)
def test_the_same_shape_resumes_bit_equal(name):
    goes_on_to_the_bit(2, 2, OFTEN, name)


@pytest.mark.parametrize("name", SOME)
def test_data_parallel_ranks_resume_bit_equal(name):
    goes_on_to_the_bit(4, 2, SOME, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize(("world", "tp"), [(4, 2), (2, 1), (4, 4)])
def test_every_shape_resumes_bit_equal(world, tp, name):
    goes_on_to_the_bit(world, tp, tuple(SAME), name)


def dynamic(scale: float = 64) -> DynamicLossScaler:
    return DynamicLossScaler(scale, 2, min_scale=1, delayed_shift=1, consecutive_hysteresis=False)


def test_a_loss_scale_that_changed_comes_back():
    changed, fresh, static = dynamic(), dynamic(), LossScaler(8)
    for _ in range(3):
        changed.update_scale(False)
    assert (changed.cur_scale, type(changed.cur_scale), type(fresh.cur_scale)) == (128, float, int)
    for scaler in (fresh, static):
        set_loss_scale(
            scaler, {key: value for key, value in vars(changed).items() if type(value) in (bool, int, float)}
        )
    assert vars(fresh) == vars(changed)
    assert vars(static) == vars(LossScaler(8))
    set_loss_scale(fresh, vars(fresh) | {"raise_error_at_min_scale": 0, "cur_iter": True})
    assert vars(fresh) == vars(changed)
    set_loss_scale(changed, vars(dynamic()))
    assert changed.cur_scale == 64


@pytest.mark.parametrize("option", ["fused", "capturable"])
@pytest.mark.parametrize("steps", [3, torch.tensor(3.0)])
def test_steps_lie_where_torch_counts_them(option, steps):
    device = torch.device("meta")
    for options, where in (({}, "cpu"), ({option: True}, "meta")):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2, device=device))], **options)
        counted = steps_of(optimizer, optimizer.param_groups[0], device, steps, same=False)
        assert (counted.device.type, counted.dtype) == (where, torch.float32)


@pytest.mark.parametrize("steps", [3, 3.0, torch.tensor(3.0, dtype=torch.float64), torch.tensor(3)])
def test_steps_of_the_same_class_come_back_in_their_type(steps):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(2))])
    counted = steps_of(optimizer, optimizer.param_groups[0], torch.device("cpu"), steps, same=True)
    assert (type(counted), repr(counted)) == (type(steps), repr(steps))


# ---- other shapes ----------------------------------------------------------------------------------------------------


Shape = tuple[int, int, int]


@functools.cache
def crossed(shapes: tuple[Shape, ...], pairs: tuple[tuple[Shape, Shape], ...]) -> dict[tuple, tuple[dict, dict]]:
    """(saved at, resumed at) -> the run that went on, the one that resumed, of each of ``pairs``.

    Each of ``shapes`` is saved once, and a launch resumes whatever was saved until then.
    """

    def at(shape: Shape) -> str:
        return folder("shape", len(pairs), *shape)

    saved: dict[Shape, dict] = {}
    resumed: dict[tuple[Shape, Shape], dict] = {}
    for degrees in [*dict.fromkeys(shape[:2] for shape in shapes)] * 2:
        fresh = [shape for shape in dict.fromkeys(shapes) if shape[:2] == degrees and shape not in saved]
        ready = [pair for pair in pairs if pair[1][:2] == degrees and pair[0] in {*saved, *fresh}]
        ready = [pair for pair in ready if pair not in resumed]
        jobs = [("save_then_go_on", shape[2], at(shape), {}) for shape in fresh]
        jobs += [("resume", there[2], at(here), {}) for here, there in ready]
        answers = launch(*degrees, jobs) if jobs else []
        saved |= dict(zip(fresh, answers, strict=False))
        resumed |= dict(zip(ready, answers[len(fresh) :], strict=True))
    return {pair: (saved[pair[0]], resumed[pair]) for pair in pairs}


def name_of(shape: Shape) -> str:
    world, tp, stage = shape
    return f"tp{tp}xdp{world // tp}-ZeRO{stage}"


def goes_on(shapes: list[Shape], pairs: list[tuple[Shape, Shape]], pair: tuple[Shape, Shape]) -> None:
    saved, resumed = crossed(tuple(shapes), tuple(pairs))[pair]
    assert error(saved, resumed) < LIMIT
    same_state(resumed)


def name_of_pair(pair: tuple[Shape, Shape]) -> str:
    return " at ".join(map(name_of, pair))


DEGREES = list(dict.fromkeys(shape[:2] for shape in SHAPES))
# at every degree one stage that saves for the hub, and another that resumes what the hub saved
HUB_PAIRS = [
    pair
    for turn, degrees in enumerate(DEGREES)
    for pair in (((*degrees, 1 + turn % 3), HUB), (HUB, (*degrees, 1 + (turn + 1) % 3)))
    if pair[0] != pair[1]
]
PAIRS = [(here, there) for here in SHAPES for there in SHAPES]


@pytest.mark.parametrize("pair", HUB_PAIRS, ids=name_of_pair)
def test_another_shape_resumes_with_the_same_losses(pair):
    goes_on([HUB, *SHAPES], HUB_PAIRS, pair)


@pytest.mark.slow
@pytest.mark.parametrize("pair", PAIRS, ids=name_of_pair)
def test_every_shape_resumes_at_every_shape(pair):
    goes_on(SHAPES, PAIRS, pair)


@functools.cache
def families(chosen: tuple[str, ...]) -> tuple[list[dict], list[dict]]:
    """Those of ``FAMILIES`` saved at tp 2 x dp 2 and resumed at tp 4."""
    cases = [(FAMILIES[name], folder("family", len(chosen), name)) for name in chosen]
    saved = launch(4, 2, [("save_then_go_on", case[0], name, case[2]) for case, name in cases])
    return saved, launch(4, 4, [("resume", case[1], name, case[2]) for case, name in cases])


def finds_its_place(chosen: tuple[str, ...], name: str) -> None:
    saved, resumed = (answers[chosen.index(name)] for answers in families(chosen))
    # half precision rounds sums over ranks otherwise; what was loaded is exact all the same
    assert error(saved, resumed) < (2e-3 if "16" in name else LIMIT)
    same_state(resumed)


FEW = ("packed Phi3", "experts Mixtral", "shared heads", "LoRA", "offloaded")


@pytest.mark.parametrize("name", FEW)
def test_a_layout_resumes_at_another_degree(name):
    finds_its_place(FEW, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_every_layout_resumes_at_another_degree(name):
    finds_its_place(tuple(FAMILIES), name)
