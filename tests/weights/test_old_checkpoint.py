"""A checkpoint of version 0.1.0 is read: ``fixtures/version_0.1.0``, as that version wrote it, at another shape.

Two ranks (tp 2, ZeRO 1) trained two steps of :data:`MODEL` with AdamW and saved. They then went on: the losses of
three steps are :data:`AFTER`. :data:`TOTAL` is the sum of all saved weights.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support import resume
from tests.support.ranks import on_ranks
from tp_plugin.integrations.deepspeed.export import fp32_state_dict

FIXTURE = Path(__file__).with_name("fixtures") / "version_0.1.0"
MODEL = {"family": "Qwen2", "heads": (2, 1), "tied": True, "num_hidden_layers": 1, "intermediate_size": 12}
AFTER = [9.410338401794434, 8.617675304412842, 8.350884914398193]
TOTAL = 46.41865108750062


@pytest.mark.parametrize(("world", "tp", "stage"), [(2, 1, 3), (2, 2, 1)])
def test_a_checkpoint_of_version_0_1_0_is_read(tmp_path, world, tp, stage):
    folder = str(shutil.copytree(FIXTURE, tmp_path / "run"))
    found = on_ranks(world, resume.resume, tp, stage, folder, **MODEL)[0]
    assert found["after"] == pytest.approx(AFTER, rel=1e-5)
    assert resume.worst_difference(found["path"], f"{found['own']}/again") == (0.0, "")
    assert found["steps"] == 2 + len(AFTER)


def test_one_process_reads_its_weights():
    weights = fp32_state_dict(FIXTURE / "global_step2")
    assert weights["lm_head.weight"] is weights["model.embed_tokens.weight"]
    assert tuple(weights["lm_head.weight"].shape) == (131, 16)
    assert sum(weight.double().sum().item() for weight in weights.values()) == pytest.approx(TOTAL, rel=1e-9)
