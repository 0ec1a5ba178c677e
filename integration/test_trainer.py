"""HF Trainer, unmodified, on 4 CPU ranks as tp 2 x dp 2 through ``accelerate launch -m tp_plugin.run``.

The truth is one unsharded process in plain PyTorch, on the global batches the ranks report to have read.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.support import tiny
from tests.support.configs import auto_config
from tests.support.launching import SCRIPTS, accelerate_launch, deepspeed_config, executed, free_port

TP, DP = 2, 2
TWO_MICRO = {"gradient_accumulation_steps": 2}
LOCAL_MEAN = {"average_tokens_across_devices": False}
SEEDED = {"device_specific": True}
PLAIN = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
REENTRANT = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
VARIANTS: dict[str, dict] = {
    # the first takes its DeepSpeed config (ZeRO-1) from accelerate launch, the others bring their own
    "zero1": {"max_steps": 3, "evaluate": True, "save": True, "save_strategy": "steps", "save_steps": 2} | TWO_MICRO,
    "resumed": {"max_steps": 3, "resume": "zero1/checkpoint-2"} | TWO_MICRO,
    "zero2_local_mean": {"deepspeed": deepspeed_config(2), "max_steps": 3, "tied": True, "save": True} | LOCAL_MEAN,
    "zero3_reentrant": {"deepspeed": deepspeed_config(3), "max_steps": 3, "save": True, "evaluate": True} | REENTRANT,
    "zero0_seeded": {"deepspeed": deepspeed_config(0), "max_steps": 3, "save": True} | SEEDED | TWO_MICRO | PLAIN,
    # the order HF documents: the model is loaded while a ZeRO-3 config is alive
    "zero3_loaded": {"start": "start", "deepspeed": deepspeed_config(3), "max_steps": 3, "save": True},
    "zero1_cpu": {"max_steps": 2, "use_cpu": True, "save": True},  # superfluous here, and must not drop DeepSpeed
}
TRAINED = [name for name in VARIANTS if name != "resumed"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of one launch that trained every variant."""
    folder = tmp_path_factory.mktemp("trainer")
    tiny.model().save_pretrained(folder / "start")
    variants = [{"name": name, **variant} for name, variant in VARIANTS.items()]
    (folder / "variants.json").write_text(json.dumps(variants))
    script = [f"{SCRIPTS}/hf_trainer.py", "--variants", f"{folder}/variants.json", "--out", str(folder)]
    output = accelerate_launch(folder, TP * DP, deepspeed_config(1), script)
    (folder / "output.log").write_text(output)
    return folder


def of(runs: Path, name: str) -> list[dict]:
    return [json.loads((runs / f"{name}.{rank}.json").read_text()) for rank in range(TP * DP)]


def logged(run: dict, key: str) -> list[float]:
    return [entry[key] for entry in run["log"] if key in entry]


def truth_of(runs: Path, name: str) -> dict:
    variant, ranks = VARIANTS[name], of(runs, name)
    every = variant.get("gradient_accumulation_steps", 1)
    steps = [
        [ranks[dp * TP]["batches"][step * every : (step + 1) * every] for dp in range(DP)]
        for step in range(variant["max_steps"])
    ]
    return tiny.truth(
        tiny.model(tied=variant.get("tied", False)),
        steps,
        all_tokens=variant.get("average_tokens_across_devices", True),
        clip=0.5,
        lr=1e-2,
    )


@pytest.mark.parametrize("name", TRAINED)
def test_losses_norms_and_parameters_equal_one_process(runs, name):
    expected, run = truth_of(runs, name), of(runs, name)[0]
    assert (run["world"], run["kind"]) == (DP, "DistributedType.DEEPSPEED")
    assert logged(run, "loss") == pytest.approx(expected["losses"], rel=1e-5)
    assert logged(run, "grad_norm") == pytest.approx(expected["norms"], rel=1e-5)
    assert min(expected["norms"]) > 0.5, "clipping must be at work"
    start = dict(tiny.model(tied=VARIANTS[name].get("tied", False)).named_parameters())
    saved = dict(AutoModelForCausalLM.from_pretrained(runs / name / "model").named_parameters())
    assert saved.keys() == start.keys()
    for key, parameter in expected["model"].named_parameters():
        update = parameter - start[key]
        error = (saved[key] - parameter).norm() / update.norm()
        assert error <= 1e-4, f"{key}: the update is off by {error:.1e}"


@pytest.mark.parametrize("name", TRAINED)
def test_a_tensor_parallel_group_reads_one_batch_and_draws_alike(runs, name):
    ranks = of(runs, name)
    for dp in range(DP):
        group = ranks[dp * TP : (dp + 1) * TP]
        assert all(peer["batches"] == group[0]["batches"] for peer in group)
        assert all(peer["draw"] == group[0]["draw"] for peer in group)
    if VARIANTS[name].get("device_specific"):
        assert ranks[0]["draw"] != ranks[TP]["draw"]
    else:
        steps = VARIANTS[name]["max_steps"] * VARIANTS[name].get("gradient_accumulation_steps", 1)
        read = [number for rank in ranks[::TP] for micro in rank["batches"][:steps] for number in micro]
        assert len(read) == len(set(read)) == steps * DP * 2, "each sample once an epoch"


@pytest.mark.parametrize("name", TRAINED)
def test_tokens_are_counted_once(runs, name):
    variant = VARIANTS[name]
    micro_batches = variant["max_steps"] * variant.get("gradient_accumulation_steps", 1)
    assert of(runs, name)[0]["tokens"] == micro_batches * DP * 2 * tiny.LENGTH


@pytest.mark.parametrize("name", [name for name in TRAINED if VARIANTS[name].get("evaluate")])
def test_evaluation_sees_each_sample_once_and_all_logits(runs, name):
    ranks = of(runs, name)
    for rank in ranks:
        metrics = rank["metrics"]
        assert (metrics["eval_rows"], metrics["eval_columns"]) == (7, tiny.VOCAB)
        assert rank["predicted"] == [5, tiny.LENGTH, tiny.VOCAB]
    found = np.load(runs / name / "predictions.npz")  # of predict(), the last: samples 0 to 4
    assert found["seen"][:, 0].tolist() == list(range(5))
    inputs = tiny.batch(list(range(5)))
    assert np.array_equal(found["labels"], inputs["labels"].numpy())
    saved = AutoModelForCausalLM.from_pretrained(runs / name / "model").eval()
    with torch.no_grad():
        logits = saved(input_ids=inputs["input_ids"]).logits.numpy()
    np.testing.assert_allclose(found["logits"], logits, rtol=1e-4, atol=1e-5)
    evaluated = tiny.batch(list(range(30, 37)))
    losses = [metrics["eval_loss"] for metrics in (rank["metrics"] for rank in ranks)]
    assert losses == [pytest.approx(losses[0])] * 4
    with torch.no_grad():
        assert losses[0] == pytest.approx(saved(**evaluated).loss.item(), rel=0.1)  # HF's mean of batch means


def test_a_checkpoint_resumes_and_holds_a_model(runs):
    straight, resumed = (of(runs, name)[0] for name in ("zero1", "resumed"))
    assert logged(resumed, "loss")[-1] == logged(straight, "loss")[-1]
    assert logged(resumed, "grad_norm")[-1] == logged(straight, "grad_norm")[-1]
    AutoModelForCausalLM.from_pretrained(runs / "zero1" / "checkpoint-2")


def test_a_command_that_knows_nothing_of_us_is_sharded(tmp_path):
    """``tp-plugin exec --degree 2 deepspeed SCRIPT``: tensor parallelism only, of a config without a degree.

    The launcher puts --local_rank before the script's name, and starts the ranks by itself.
    """
    variants = [{"name": "tp2", "deepspeed": auto_config(1), "max_steps": 2}]
    (tmp_path / "variants.json").write_text(json.dumps(variants))
    script = [f"{SCRIPTS}/hf_trainer.py", "--variants", f"{tmp_path}/variants.json", "--out", str(tmp_path)]
    output = executed(2, ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port()), *script])
    assert output.count("registered by TP_PLUGIN=1: models are sharded over TP_PLUGIN_DEGREE=2 ranks") == 1
    run = json.loads((tmp_path / "tp2.0.json").read_text())
    steps = [[[micro]] for micro in run["batches"][:2]]
    expected = tiny.truth(tiny.model(), steps, all_tokens=True, clip=0.5, lr=1e-2)
    assert logged(run, "loss") == pytest.approx(expected["losses"], rel=1e-5)
    assert logged(run, "grad_norm") == pytest.approx(expected["norms"], rel=1e-5)
