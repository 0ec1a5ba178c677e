"""A Trainer whose own loss reads a shard for the head's weight is stopped before its first step."""

from __future__ import annotations

import pytest

from tests.support.launching import SCRIPTS, deepspeed_config, launch


def test_a_trainers_own_loss_is_computed_again_without_tensor_parallelism(tmp_path):
    script = [f"{SCRIPTS}/own_loss.py", "--out", str(tmp_path / "out")]
    with pytest.raises(AssertionError) as caught:
        launch(tmp_path, 2, deepspeed_config(1), script)
    said = str(caught.value)
    assert "the first step computed again without tensor parallelism differs: the trainer's loss" in said
    assert "let it use the model's outputs" in said
    assert "it trained" not in said
