"""docs/clients.md is what was measured, and what was measured is right."""

from __future__ import annotations

import json

import pytest
import torch

from tests.clients import compare
from tests.clients.__main__ import PROGRAMS, RESULTS
from tests.clients.page import PAGE, text
from tests.clients.program import LAST, Case

FOUND = json.loads(RESULTS.read_text())


def test_the_page_is_current():
    assert PAGE.read_text() == text(), "run python -m tests.clients.page"


def test_every_kind_of_every_program_was_measured_and_is_right():
    assert {program.name: set(program.kinds) for program in PROGRAMS.values()} == {
        name: set(kinds) for name, kinds in FOUND.items()
    }
    wrong = [
        (name, kind, way)
        for program in PROGRAMS.values()
        for name, kinds in [(program.name, FOUND[program.name])]
        for kind, ways in kinds.items()
        for way in ("ours-tp2xdp1", *(() if kind in program.alone else ("ours-tp2xdp2",)))
        if not ways[way].get("right")
    ]
    assert not wrong


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_recipe_asks_for_one_degree_and_one_process_for_none(program, tmp_path):
    for number, (kind, command) in enumerate(program.kinds.items()):
        for case in (Case(kind, 4, 2), Case(kind)):
            output = tmp_path / f"{number}-{case.tp}"
            output.mkdir()
            words = command(tmp_path, case, output)
            config = (output / "train.yaml").read_text()
            assert str(output / "train.yaml") in words[0]
            assert len(words) == 1 + ("resumed" in kind)
            assert ("deepspeed" in config) == (case.tp > 1)
            assert f"batch_size: {case.micro_batch}\n" in config


def test_differences_are_seen():
    one = compare.Outcome([1.0, 2.0], [3.0, 4.0], {"a": torch.ones(4)})
    other = compare.Outcome([1.0, 2.2], [3.0, 4.0], {"a": torch.ones(4) * 1.5})
    assert compare.differences(one, one) == {"loss": 0.0, "norm": 0.0, "weights": 0.0}
    assert compare.differences(one, other) == pytest.approx({"loss": 0.1, "norm": 0.0, "weights": 0.5})
    shorter = compare.Outcome([1.0], [3.0], one.weights)
    assert set(compare.differences(one, shorter).values()) == {float("inf")}
    assert compare.differences(one, compare.Outcome(one.losses, one.norms, {}))["weights"] == float("inf")
    other_words = compare.Outcome(one.losses, one.norms, one.weights, ["other words"])
    assert compare.differences(one, other_words)["weights"] == float("inf")


def test_the_last_training_and_the_evaluations_count(tmp_path):
    for folder, loss in (("checkpoint-4", 3.0), (f"{LAST}/checkpoint-4", 2.0)):
        (tmp_path / folder).mkdir(parents=True)
        log = [{"loss": loss, "grad_norm": 1.0}, {"eval_loss": 5.0, "eval_runtime": 7.0, "eval_token_acc": 0.5}]
        (tmp_path / folder / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert compare.outcome(tmp_path).losses == [2.0, 5.0, 0.5]
