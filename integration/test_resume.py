"""HF Trainer and a plain Accelerate loop resume on another shape, by nothing but another launch of the same script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

from tests.support import tiny
from tests.support.launching import SCRIPTS, deepspeed_config, launch

STEPS, SAVED, GLOBAL, MICRO = 5, 2, 8, 2  # 24 samples: the third step ends an epoch
SHAPES = {"tp4": (4, 4, 3)}  # ranks, tp, ZeRO stage
SELDOM = {"tp1": (1, 1, 2), "tp2": (2, 2, 3)}
ARGUMENTS = {"max_steps": STEPS, "lr_scheduler_type": "linear", "warmup_steps": 1, "save": True}


def trainer_run(folder: Path, ranks: int, tp: int, stage: int, variant: dict) -> str:
    accumulation = GLOBAL // MICRO // (ranks // tp)
    (folder / "variants.json").write_text(json.dumps([variant | {"gradient_accumulation_steps": accumulation}]))
    script = [f"{SCRIPTS}/hf_trainer.py", "--variants", f"{folder}/variants.json", "--out", str(folder)]
    more = {"tp_plugin": {"quiet": True}} if tp == 1 else {}
    return launch(folder, ranks, deepspeed_config(stage, tp, **more), script)


@pytest.fixture(scope="module")
def straight_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training without a break at tp 2 x dp 2 ZeRO-1, with a checkpoint of its second step."""
    folder = tmp_path_factory.mktemp("resume")
    straight = {"name": "straight", "save_strategy": "steps", "save_steps": SAVED, **ARGUMENTS}
    trainer_run(folder, 4, 2, 1, straight)
    return folder


def of(folder: Path, name: str, rank: int = 0) -> dict:
    return json.loads((folder / f"{name}.{rank}.json").read_text())


def logged(run: dict, key: str) -> list[float]:
    return [entry[key] for entry in run["log"] if key in entry]


@pytest.mark.parametrize("name", [*SHAPES, *(pytest.param(name, marks=pytest.mark.slow) for name in SELDOM)])
def test_trainer_resumes_as_if_it_had_not_stopped(straight_run, name):
    folder, shape = straight_run, (SHAPES | SELDOM)[name]
    resume = {"name": name, "resume": f"straight/checkpoint-{SAVED}", **ARGUMENTS}
    said = trainer_run(folder, *shape, resume)
    straight, resumed = of(folder, "straight"), of(folder, name)
    assert logged(resumed, "loss") == pytest.approx(logged(straight, "loss"), rel=1e-5)
    assert logged(resumed, "grad_norm") == pytest.approx(logged(straight, "grad_norm"), rel=1e-4)
    assert logged(resumed, "learning_rate") == logged(straight, "learning_rate")
    # rank 0 and rank 2 of the first run take turns; one data-parallel rank reads the same in that order
    turns = zip(straight["batches"], of(folder, "straight", 2)["batches"], strict=True)
    order = [micro for both in turns for micro in both]
    start = SAVED * GLOBAL // MICRO
    assert resumed["batches"][: (STEPS - SAVED) * GLOBAL // MICRO] == order[start : STEPS * GLOBAL // MICRO]
    ranks, tp, stage = shape
    line = f"resumed a checkpoint of tp=2 dp=2 ZeRO-1 at tp={tp} dp={ranks // tp} ZeRO-{stage}: step {SAVED}"
    assert said.count(line) == 1
    one, other = (AutoModelForCausalLM.from_pretrained(folder / run / "model") for run in ("straight", name))
    start_of = dict(tiny.model().named_parameters())
    for (key, ours), theirs in zip(other.named_parameters(), one.parameters(), strict=True):
        update = (theirs - start_of[key]).norm()
        assert (ours - theirs).norm() <= 1e-4 * update, key


def test_an_accelerate_loop_loads_its_state_elsewhere(tmp_path):
    script = f"{SCRIPTS}/resume_loop.py"
    batch = {"gradient_accumulation_steps": 1, "gradient_clipping": 0.5}
    launch(tmp_path, 4, deepspeed_config(1, 2, **batch), [script, "save", str(tmp_path), "2"])
    launch(tmp_path, 4, deepspeed_config(3, 4, **batch), [script, "load", str(tmp_path), "4"])
    saved, loaded = (json.loads((tmp_path / f"{what}.json").read_text()) for what in ("save", "load"))
    assert len(saved["losses"]) == 6
    assert loaded["losses"] == pytest.approx(saved["losses"][2:], rel=1e-5)
    assert loaded["rates"] == saved["rates"][2:]
    first, second = saved["draws"][0], saved["draws"][2]
    assert saved["draws"] == [first, first, second, second]
    assert first != second
    assert loaded["draws"] == [first] * 4, "one data-parallel rank's dropout masks"
