"""``TP_PLUGIN`` and ``TP_PLUGIN_DEGREE``: the degree they give, and jobs in which nothing would be sharded."""

from __future__ import annotations

import deepspeed
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin

import tp_plugin
from tests.support.configs import auto_config, config_for
from tests.support.models import batch, make
from tests.support.ranks import errors_on_ranks, on_ranks
from tests.support.train import engine_for, optimizer_for
from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.environment import degree_asked, refuse_no_degree, with_degree
from tp_plugin.sharding import state_of


@pytest.fixture
def variables(monkeypatch):
    def put(asked: str | None, degree: str | None = None):
        for name, value in (("TP_PLUGIN", asked), ("TP_PLUGIN_DEGREE", degree)):
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    return put


def test_a_degree_is_put_where_there_is_none(variables):
    own = {"zero_optimization": {"stage": 1}, "tensor_parallel": {"partition_config": {}}}
    variables("1", "2")
    assert with_degree({}) == {"tensor_parallel": {"autotp_size": 2}}
    assert with_degree(own)["tensor_parallel"] == {"partition_config": {}, "autotp_size": 2}
    assert "autotp_size" not in own["tensor_parallel"]
    same = {"tensor_parallel": {"autotp_size": 2}}
    assert with_degree(same) is same
    with pytest.raises(
        TensorParallelError, match="degree is 4 in the DeepSpeed config or tp_model_init, and TP_PLUGIN_DEGREE is 2"
    ):
        with_degree({"tensor_parallel": {"autotp_size": 4}})


@pytest.mark.parametrize("asked", [None, "0", "false", "No", "off", ""])
def test_without_the_variable_nothing_is_asked(variables, asked):
    variables(asked, "2")
    assert degree_asked() is None
    refuse_no_degree(None, 8)


@pytest.mark.parametrize("degree", ["two", "0", "-2", "2.5"])
def test_a_degree_is_a_number(variables, degree):
    variables("1", degree)
    with pytest.raises(TensorParallelError, match="TP_PLUGIN_DEGREE must be a whole number above 0"):
        with_degree({})


def test_a_job_in_which_nothing_would_be_sharded_is_refused(variables):
    variables("1")
    refuse_no_degree(None, 1)
    refuse_no_degree({"tensor_parallel": {"autotp_size": 1}}, 8)
    with pytest.raises(TensorParallelError, match=r"no tensor_parallel\.autotp_size, so nothing would be sharded: set"):
        refuse_no_degree({}, 8)
    with pytest.raises(TensorParallelError, match="runs without DeepSpeed, whose engine is sharded"):
        refuse_no_degree(None, 8)


def plain_config() -> dict:
    return {key: value for key, value in config_for(1, 1).items() if key not in ("tensor_parallel", "tp_plugin")}


def engine_loss() -> tuple[float, int]:
    model = make("Llama")
    engine = engine_for(model, optimizer_for(model, "adamw"), plain_config())
    record = state_of(engine.module)
    with torch.no_grad():
        return engine(**batch(0, 2)).loss.item(), 1 if record is None else record.mesh.tp_size


def test_the_degree_reaches_an_engine():
    with torch.no_grad():
        expected = make("Llama")(**batch(0, 2)).loss.item()
    env = {"TP_PLUGIN": "1", "TP_PLUGIN_DEGREE": "2"}
    assert on_ranks(2, engine_loss, env=env) == [(pytest.approx(expected, rel=1e-5), 2)] * 2


def plugins_degree() -> int:
    tp_plugin.register()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=auto_config(1)))
    return accelerator.state.deepspeed_plugin.deepspeed_config["tensor_parallel"]["autotp_size"]


def test_the_degree_reaches_accelerate():
    env = {"TP_PLUGIN": "1", "TP_PLUGIN_DEGREE": "2", "ACCELERATE_USE_DEEPSPEED": "true"}
    assert on_ranks(2, plugins_degree, env=env, group=False) == [2, 2]


def recorded_loss() -> None:
    tp_plugin.register()
    model = deepspeed.tp_model_init(make("Llama"), tp_size=2, dtype=torch.float32)
    engine_for(model, optimizer_for(model, "adamw"), plain_config())


def accelerator_alone() -> None:
    tp_plugin.register()
    Accelerator(cpu=True)


@pytest.mark.parametrize(
    ("call", "env", "sentence"),
    [
        (engine_loss, {}, "the DeepSpeed config has no tensor_parallel.autotp_size"),
        (engine_loss, {"TP_PLUGIN_DEGREE": "3"}, "the world size 2 is not divisible by tp_size 3"),
        (
            recorded_loss,
            {"TP_PLUGIN_DEGREE": "1"},
            "the degree is 2 in the DeepSpeed config or tp_model_init, and TP_PLUGIN_DEGREE is 1",
        ),
        (accelerator_alone, {"TP_PLUGIN_DEGREE": "2"}, "the job runs without DeepSpeed"),
    ],
    ids=["no_degree", "no_divisor", "two_degrees", "no_deepspeed"],
)
def test_a_job_that_cannot_be_sharded_is_refused_on_every_rank(call, env, sentence):
    group = call is not accelerator_alone
    errors = errors_on_ranks(2, call, env={"TP_PLUGIN": "1"} | env, group=group)
    assert len({str(error) for error in errors}) == 1
    assert sentence in str(errors[0])
