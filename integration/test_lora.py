"""LoRA by PEFT and HF Trainer, unmodified, on 4 CPU ranks as tp 2 x dp 2 through ``accelerate launch``."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch

from tests.support import tiny
from tests.support.launching import SCRIPTS, deepspeed_config, launch

TP, DP, STAGES = 2, 2, (1, 3)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    script = [f"{SCRIPTS}/lora_trainer.py", "--out", str(folder), "--zero", *map(str, STAGES)]
    (folder / "output.log").write_text(launch(folder, TP * DP, deepspeed_config(1), script))
    return folder


@pytest.mark.parametrize("stage", STAGES)
def test_losses_norms_and_adapters_equal_one_process(runs, stage):
    ranks = [json.loads((runs / str(stage) / f"{rank}.json").read_text()) for rank in range(TP * DP)]
    steps = [[ranks[dp * TP]["batches"][step * 2 : (step + 1) * 2] for dp in range(DP)] for step in range(3)]
    truth = tiny.truth(tiny.adapted(), steps, all_tokens=True, clip=0.05, lr=1e-2)
    log = ranks[0]["log"]
    assert [entry["loss"] for entry in log if "loss" in entry] == pytest.approx(truth["losses"], rel=1e-5)
    assert [entry["grad_norm"] for entry in log if "grad_norm" in entry] == pytest.approx(truth["norms"], rel=1e-5)
    assert min(truth["norms"]) > 0.05, "clipping must be at work"
    last = [entry for entry in log if "loss" in entry][-1]
    again = [entry for entry in ranks[0]["resumed"] if "loss" in entry][-1]
    assert (again["loss"], again["grad_norm"]) == (last["loss"], last["grad_norm"]), "resumed otherwise than it left"
    assert len({rank["evaluated"] for rank in ranks}) == 1
    saved = peft.PeftModel.from_pretrained(tiny.model(), runs / str(stage) / "adapter", is_trainable=True)
    start = dict(tiny.adapted().named_parameters())
    found = dict(saved.named_parameters())
    trained = {name: param for name, param in truth["model"].named_parameters() if param.requires_grad}
    assert trained
    for name, param in trained.items():
        error = (found[name] - param).norm() / (param - start[name]).norm()
        assert error <= 1e-4, f"{name}: the update is off by {error:.1e}"
    assert (runs / str(stage) / "checkpoint-2").is_dir()
    with torch.no_grad():
        assert ranks[0]["evaluated"] == pytest.approx(saved(**tiny.batch(list(range(4)))).loss.item(), rel=0.1)
    files = {path.name for path in (runs / str(stage) / "adapter").iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json"} <= files
    assert not {name for name in files if name.startswith(("model", ".saving"))}
