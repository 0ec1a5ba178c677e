"""What was only inferred is tried on a small copy before a weight is touched, and refused where it is wrong."""

from __future__ import annotations

import pytest

from tests.support import custom_models
from tests.support.ranks import errors_on_ranks, on_ranks
from tp_plugin.config import TensorParallelConfig
from tp_plugin.mesh import ParallelMesh
from tp_plugin.model_check import check as check_module
from tp_plugin.model_check.fork_server import on_ranks as on_forked_ranks


def test_a_model_nobody_described_is_sharded_once_the_trial_agrees():
    assert on_ranks(2, custom_models.shard, False, "checked") == [["inferred", "vocabulary"]] * 2


def test_a_trap_for_inference_is_refused_and_named():
    for message in errors_on_ranks(2, custom_models.shard, True, "checked"):
        assert "the rules inferred from the shapes of HomeModel are wrong" in message
        assert "'stack.0.mixer.wo' (row, inferred) differs first" in message
        assert "'infer'" in message


def test_what_is_ruled_out_by_hand_is_not_tried():
    names = ("wq", "wk", "wv", "wo")
    assert on_ranks(2, custom_models.shard, True, "checked", {f"stack.*.mixer.{name}": "replicated" for name in names})


@pytest.mark.parametrize("mixing", [False, True])
def test_trusted_takes_the_rules_as_they_are(mixing):
    assert on_ranks(2, custom_models.shard, mixing, "trusted") == [["inferred", "vocabulary"]] * 2


def test_off_infers_nothing():
    assert on_ranks(2, custom_models.shard, False, "off") == [["vocabulary"]] * 2


def test_without_a_config_there_is_nothing_to_try():
    for message in errors_on_ranks(2, custom_models.shard_plain, "checked"):
        assert "cannot be tried without a transformers config" in message
    (found, _) = on_ranks(2, custom_models.shard_plain, "trusted")
    assert "blocks.0.one" in found


def test_what_the_copy_does_not_have_is_not_taken(monkeypatch):
    """Here only the full model's feed-forward is inferred: the copy has none of that name, so nothing tried it."""
    real = check_module._inferred

    def without_feed(model_class, config, options):
        found = real(model_class, config, options)
        return found if config.num_layers == 4 else {name: None for name in found if ".feed." not in name}

    monkeypatch.setattr(check_module, "_inferred", without_feed)
    (plan, _) = on_forked_ranks(2, tried)
    assert plan == {f"stack.*.feed.{name}": "replicated" for name in ("one", "two", "three")}


def tried() -> dict[str, str]:
    options = TensorParallelConfig(tp_size=2, quiet=True)
    mesh = ParallelMesh.create(2)
    found, options = check_module.check_on_ranks(custom_models.HomeModel, custom_models.HomeConfig(), options, mesh)
    assert found.verdict == "equal", found.sentence
    return dict(options.plan)
