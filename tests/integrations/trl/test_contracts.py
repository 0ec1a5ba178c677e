"""What we rely on in TRL. A failure here says what moved upstream and which file of ours uses it."""

import importlib
import inspect
import re

import trl
import trl.trainer.utils

from tests.support.moved import assert_source_has
from tp_plugin.integrations.trl import ROOM, head, trainers

UTILS, BASE = (importlib.import_module(part.MODULE) for part in (head, trainers))


def test_an_output_that_moves_is_named(monkeypatch):
    module = importlib.import_module(UTILS._ChunkedLogProbFunction.__module__)
    monkeypatch.setattr(module, "OPTIONAL_OUTPUTS", (*module.OPTIONAL_OUTPUTS, "variance"))
    assert any(re.search(r"OPTIONAL_OUTPUTS is .*'variance'", text) for text in head.declare(UTILS).moved())


def test_the_fused_head_goes_through_what_we_replace():
    why = "trl/head.py takes the place of the Function that is handed lm_head.weight"
    for text in (
        "weight, bias = lm_head.weight, lm_head.bias",
        "_ChunkedLogProbFunction.apply( hidden_states[mask] if compact else",
        "log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1 = per_token",
    ):
        assert_source_has(trl.trainer.utils.add_fused_lm_head, text, why)
    for function in (trl.trainer.utils.selective_log_softmax, trl.trainer.utils.entropy_from_logits):
        assert_source_has(function, "_supports_trl_loss_kernel(logits", "trl/head.py keeps lazy logits from kernels")


def test_the_trainers_that_were_shown_right_read_no_weight_themselves():
    why = "trl/trainers.py lists it as shown right; look at what it reads now"
    assert_source_has(
        trl.trainer.sft_trainer.SFTTrainer.compute_loss, "outputs = model(**inputs, fused_lm_head=True)", why
    )
    assert_source_has(trl.trainer.dpo_trainer.DPOTrainer._compute_loss, "labels=labels, fused_lm_head=True)", why)
    assert_source_has(trl.trainer.reward_trainer.RewardTrainer.compute_loss, "outputs = model(**inputs)", why)
    names = {f"{kind.__module__}.{kind.__qualname__}" for kind in (trl.SFTTrainer, trl.DPOTrainer, trl.RewardTrainer)}
    assert names == trainers.VALIDATED


def test_its_token_counts_are_not_divided_again():
    """TRL divides by the tp_size of accelerate's ParallelismConfig, which is never above 1 beside DeepSpeed."""
    for kind in (trl.SFTTrainer, trl.DPOTrainer, trl.RewardTrainer):
        assert_source_has(kind.__init__, "self._tp_size = self.accelerator.parallelism_config.tp_size",
                          "accelerate/unsupported.py refuses a tp_size there")  # fmt: skip


def test_installing_twice_and_uninstalling_leaves_no_trace():
    import sys

    before, finders = [dict(vars(owner)) for owner in (UTILS, BASE._BaseTrainer)], list(sys.meta_path)
    ROOM.install()
    ROOM.install()
    assert [dict(vars(owner)) for owner in (UTILS, BASE._BaseTrainer)] != before
    ROOM.uninstall()
    ROOM.uninstall()
    assert [dict(vars(owner)) for owner in (UTILS, BASE._BaseTrainer)] == before
    assert sys.meta_path == finders


def test_losses_are_scaled_by_readers():
    """Accelerate's number over Trainer's degree, of which one counts a TP group once and the other says 1."""
    why = "transformers/data_parallel.py says 1, as Accelerator.num_processes counts a TP group once"
    text = "self.accelerator.num_processes // self.get_tp_size()"
    source = inspect.getsource(trl.trainer.sft_trainer)
    assert_source_has(trl.trainer.sft_trainer.SFTTrainer.compute_loss, text, why)
    assert source.count("num_processes") == 1, "trl/trainers.py lets SFT train, which counts processes elsewhere too"
    for kind in ("dpo_trainer", "reward_trainer"):
        source = inspect.getsource(importlib.import_module(f"trl.trainer.{kind}"))
        assert "num_processes" not in source, f"trl/trainers.py lets {kind} train, which did not count processes"
