"""Whose state may go on under another optimizer, and under which names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.ops.lion import DeepSpeedCPULion, FusedLion

from tp_plugin.integrations.deepspeed.checkpoint import optimizer_compat
from tp_plugin.weights.manifest import encode

Adam, AdamW, Adagrad = torch.optim.Adam, torch.optim.AdamW, torch.optim.Adagrad
STATES = {
    FusedLion: ["exp_avg"],
    DeepSpeedCPULion: ["exp_avg", "exp_avg_sq"],
    Adagrad: ["sum"],
    DeepSpeedCPUAdagrad: ["exp_avg_sq"],
}


class Lion(torch.optim.SGD):
    """One's own."""


Elsewhere = type("Lion", (torch.optim.SGD,), {"__module__": "train"})
Quantised = type("AdamW", (torch.optim.SGD,), {"__module__": "bitsandbytes.optim.adamw"})


def made(kind: type, **options: Any) -> Any:
    """An optimizer whose kernels are never built."""
    if not kind.__module__.startswith("deepspeed"):
        return kind([torch.nn.Parameter(torch.zeros(2))], **options)
    optimizer = kind.__new__(kind)
    if "Adam" in kind.__name__:
        optimizer.adam_w_mode = options.pop("adam_w_mode", True)
        options = {"bias_correction": True} | options
    optimizer.param_groups = [{"params": [], "lr": 0.1, **options}]
    return optimizer


def manifest(optimizer: Any) -> dict[str, Any]:
    options = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    groups = [{"options": encode(one, {}, "")} for one in options]
    states = STATES.get(type(optimizer), ["exp_avg", "exp_avg_sq"])
    return optimizer_compat.described(optimizer) | {"groups": groups, "elementwise": states}


def same(names: list[str]) -> dict[str, str]:
    return {name: name for name in names}


ADAMS = same(["exp_avg", "exp_avg_sq"])
GOES = [
    (made(AdamW), made(AdamW, weight_decay=0.0, amsgrad=True), ADAMS),
    (made(AdamW, amsgrad=True), made(AdamW), ADAMS),
    (made(Adam), made(Adam, decoupled_weight_decay=True), ADAMS),
    (made(Adam, decoupled_weight_decay=True), made(AdamW), ADAMS),
    (made(AdamW), made(FusedAdam), ADAMS),
    (made(FusedAdam), made(AdamW), ADAMS),
    (made(FusedAdam, bias_correction=False), made(DeepSpeedCPUAdam), ADAMS),
    (made(DeepSpeedCPUAdam, adam_w_mode=False), made(FusedAdam, adam_w_mode=0), ADAMS),
    (made(Adam), made(DeepSpeedCPUAdam, adam_w_mode=False), ADAMS),
    (made(FusedLion), made(DeepSpeedCPULion), same(["exp_avg"])),
    (made(DeepSpeedCPULion), made(FusedLion), same(["exp_avg"])),
    (made(DeepSpeedCPULion), made(DeepSpeedCPULion), ADAMS),
    (made(Adagrad), made(DeepSpeedCPUAdagrad), {"sum": "exp_avg_sq"}),
    (made(DeepSpeedCPUAdagrad), made(Adagrad), {"exp_avg_sq": "sum"}),
    (made(torch.optim.RAdam), made(torch.optim.RAdam), ADAMS),
    (made(Lion), made(Elsewhere), ADAMS),
]
REFUSED = [
    (made(Adam), made(AdamW), "Adam and this engine's optimizer is AdamW"),
    (made(AdamW), made(Adam), "AdamW and this engine's optimizer is Adam"),
    (made(AdamW), made(torch.optim.RAdam), "AdamW and this engine's optimizer is RAdam"),
    (made(Adam), made(torch.optim.RAdam), "Adam and this engine's optimizer is RAdam"),  # weights decay alike
    (made(torch.optim.RAdam), made(Adam), "RAdam and this engine's optimizer is Adam"),
    (made(Adam), made(torch.optim.NAdam), "Adam and this engine's optimizer is NAdam"),
    (made(torch.optim.Adamax), made(Adam), "Adamax and this engine's optimizer is Adam"),
    (made(AdamW), made(torch.optim.SGD), "AdamW and this engine's optimizer is SGD"),
    (made(FusedLion), made(Lion), "FusedLion and this engine's optimizer is Lion"),
    (made(Quantised), made(AdamW), "AdamW of bitsandbytes and this engine's optimizer is AdamW of torch"),
    (
        made(FusedAdam, adam_w_mode=False),
        made(DeepSpeedCPUAdam),
        "FusedAdam (decoupled weight decay: False) and this engine's optimizer is DeepSpeedCPUAdam",
    ),
    (made(AdamW), made(FusedAdam, adam_w_mode=0), "optimizer is FusedAdam (decoupled weight decay: False)"),
    (made(AdamW, amsgrad=True), made(FusedAdam), "AdamW with amsgrad=True and this engine's optimizer is FusedAdam"),
    (made(AdamW, maximize=True), made(DeepSpeedCPUAdam), "AdamW with maximize=True and"),
    (made(FusedAdam, bias_correction=False), made(AdamW), "FusedAdam with bias_correction=False and"),
    (made(Adagrad, lr_decay=0.1), made(DeepSpeedCPUAdagrad), "Adagrad with lr_decay=0.1 and"),
]


def named(case: tuple) -> str:
    return f"{type(case[0]).__name__}-{type(case[1]).__name__}"


@pytest.mark.parametrize("case", GOES, ids=named)
def test_state_of_a_compatible_optimizer_is_loaded(case):
    saved, ours, names = case
    assert optimizer_compat.state_mismatch(manifest(saved), ours) is None
    assert optimizer_compat.state_names(manifest(saved), ours) == names


@pytest.mark.parametrize("case", REFUSED, ids=named)
def test_state_of_another_optimizer_is_refused(case):
    saved, ours, said = case
    assert said in (optimizer_compat.state_mismatch(manifest(saved), ours) or "")


def test_a_manifest_of_before_names_the_class_alone():
    old = manifest(made(AdamW))
    del old["library"], old["decoupled"]
    assert optimizer_compat.state_mismatch(old, made(AdamW)) is None
    assert optimizer_compat.state_mismatch(old, made(FusedAdam)) is None
    assert optimizer_compat.state_mismatch(old, made(Adam)) is not None
    old["class"] = "FusedAdam"  # of either mode
    assert optimizer_compat.state_mismatch(old, made(FusedAdam, adam_w_mode=False)) is None
    assert optimizer_compat.state_mismatch(old, made(AdamW)) is not None
