"""TensorParallelConfig: what it reads from a DeepSpeed config, and what it refuses."""

import dataclasses
import json

import pytest

from tp_plugin import TensorParallelConfig, TensorParallelError


def test_defaults_shard_nothing():
    config = TensorParallelConfig()
    assert (config.tp_size, config.plan, config.check_batch_every) == (1, {}, 100)
    assert (config.broadcast_batch, config.loss_workspace_mib, config.quiet) == (False, 0, False)


def test_it_is_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TensorParallelConfig().tp_size = 2
    with pytest.raises(TypeError):
        TensorParallelConfig(2)


@pytest.mark.parametrize("as_path", [False, True])
def test_degree_and_block_of_a_deepspeed_config(tmp_path, as_path):
    config = {"tensor_parallel": {"autotp_size": 4}, "tp_plugin": {"check_batch_every": 7, "plan": {"a.*": "column"}}}
    if as_path:
        path = tmp_path / "ds.json"
        path.write_text(json.dumps(config))
        config = path
    found = TensorParallelConfig.from_deepspeed(config)
    assert (found.tp_size, found.check_batch_every, found.plan) == (4, 7, {"a.*": "column"})


@pytest.mark.parametrize("config", [{}, {"tensor_parallel": None}, {"tensor_parallel": {"autotp_size": 0}}])
def test_no_degree_is_one(config):
    assert TensorParallelConfig.from_deepspeed(config) == TensorParallelConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tp_size": 0}, "tp_size must be at least 1, got 0; correct tensor_parallel.autotp_size"),
        ({"tp_size": True}, "'tp_size' must be of type int, got True; correct it in tensor_parallel.autotp_size"),
        ({"tp_size": "2"}, "'tp_size' must be of type int, got '2'"),
        ({"quiet": 1}, "'quiet' must be of type bool, got 1; correct it in the 'tp_plugin' block"),
        ({"check_batch_every": -1}, r"'check_batch_every' must be 0 \(never\) or a number of steps"),
        ({"check_batch_every": 1.5}, "'check_batch_every' must be of type int, got 1.5"),
        ({"loss_workspace_mib": -1}, r"'loss_workspace_mib' must be 0 \(automatic\)"),
        ({"plan": ["a"]}, r"'plan' must be of type a mapping of strings, got \['a'\]"),
        (
            {"plan": {"a": 1}},
            "'plan' maps module-name patterns to style names, or to objects with a \"style\", got 'a': 1",
        ),
    ],
)
def test_wrong_values_are_refused(options, message):
    with pytest.raises(TensorParallelError, match=message):
        TensorParallelConfig(**options)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"brodcast_batch": True}, "unknown key 'brodcast_batch'.*did you mean 'broadcast_batch'"),
        (
            {"zzz": 1},
            "unknown key 'zzz'.*known keys: plan, check_batch_every, guard, check_replicas_every, broadcast_batch",
        ),
        ({"tp_size": 2}, "'tp_size' does not belong in the 'tp_plugin' block; set tensor_parallel.autotp_size"),
        (None, "'tp_plugin' block of the DeepSpeed config must be an object of options, got None"),
    ],
)
def test_wrong_blocks_are_refused(block, message):
    with pytest.raises(TensorParallelError, match=message):
        TensorParallelConfig.from_deepspeed({"tensor_parallel": {"autotp_size": 2}, "tp_plugin": block})


@pytest.mark.parametrize("size", ["auto", 2.0, -1, True, [2]])
def test_a_degree_that_is_no_number_of_ranks(size):
    with pytest.raises(TensorParallelError, match="autotp_size must be a whole number of ranks, got"):
        TensorParallelConfig.from_deepspeed({"tensor_parallel": {"autotp_size": size}})


def test_a_section_that_is_no_object():
    with pytest.raises(TensorParallelError, match=r'must be like {"autotp_size": 2}, got 2'):
        TensorParallelConfig.from_deepspeed({"tensor_parallel": 2})


@pytest.mark.parametrize("text", [None, "{not json"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, text):
    path = tmp_path / "ds.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(TensorParallelError, match=r"cannot read the DeepSpeed config '.*ds\.json'"):
        TensorParallelConfig.from_deepspeed(path)


def test_a_rule_may_be_an_object():
    rule = {"style": "column", "role": "q|k|v"}
    assert TensorParallelConfig(plan={"a.*": rule}).plan == {"a.*": rule}
