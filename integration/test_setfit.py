"""setfit on CPU ranks against one process: losses, norms, probabilities of its classifier, and the saved encoder."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.support import sentence_runs
from tests.support.launching import alone, deepspeed_config, launch

SCRIPT = "integration/scripts/setfit_classifier.py"


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "stage"), [(2, 1), (4, 1), (2, 3)])
def test_a_script_of_setfit_gives_what_one_process_gives(tmp_path, ranks, stage):
    sentence_runs.encoder("bi", str(tmp_path))
    for name in ("alone", "sharded"):
        (tmp_path / name).mkdir()
    made = f"{tmp_path}/bi-0"
    alone([SCRIPT, made, f"{tmp_path}/alone", "4"])
    launch(tmp_path, ranks, deepspeed_config(stage), [SCRIPT, made, f"{tmp_path}/sharded", str(4 // (ranks // 2))])
    truth, ours = (json.loads((tmp_path / name / "found.json").read_text()) for name in ("alone", "sharded"))
    assert len(truth["log"]) > 3
    for (loss, norm), (expected_loss, expected_norm) in zip(ours["log"], truth["log"], strict=True):
        assert loss == pytest.approx(expected_loss, rel=1e-5)
        assert norm == pytest.approx(expected_norm, rel=1e-4)
    assert torch.allclose(torch.tensor(ours["probabilities"]), torch.tensor(truth["probabilities"]), atol=1e-4)
    files = [load_file(tmp_path / name / "model" / "model.safetensors") for name in ("sharded", "alone")]
    assert files[0].keys() == files[1].keys()
    for name, expected in files[1].items():
        assert (files[0][name] - expected).norm() <= 1e-4 * expected.norm(), name
