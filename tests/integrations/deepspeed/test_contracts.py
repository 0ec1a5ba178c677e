"""What we rely on in DeepSpeed. A failure here says what moved upstream and which file of ours uses it."""

from __future__ import annotations

import importlib

import deepspeed
import pytest
from deepspeed.module_inject import auto_ep_layer
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.tensor_parallel import init_utils
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

from tests.integrations.moved import assert_source_has
from tests.support.models import make
from tests.support.ranks import on_ranks
from tests.support.train import config_for, engine_for, loss_of, micro_batches, optimizer_for
from tp_plugin.errors import TensorParallelError
from tp_plugin.integrations.contract import Patches
from tp_plugin.integrations.deepspeed import check_contracts, slot

WATCHED = [
    (DeepSpeedEngine, "_apply_autotp_partitioning"),
    (DeepSpeedEngine, "autotp_size"),
    (DeepSpeedEngine, "clip_fp32_gradients"),
    (DeepSpeedEngine, "_consolidated_16bit_state_dict"),
    (DeepSpeedEngine, "_zero3_consolidated_16bit_state_dict"),
    (DeepSpeedEngine, "save_16bit_model"),
    (DeepSpeedEngine, "backward"),
    (DeepSpeedEngine, "save_checkpoint"),
    (DeepSpeedEngine, "load_checkpoint"),
    (DeepSpeedZeroOptimizer, "update_lp_params"),
    (BF16_Optimizer, "update_lp_params"),
    (DeepSpeedZeroOptimizer_Stage3, "checkpoint_event_prologue"),
    (DeepSpeedZeroOptimizer_Stage3, "checkpoint_event_epilogue"),
    (groups, "_get_data_parallel_group"),
    (DeepSpeedZeroOptimizer, "get_grad_norm_direct"),
    (DeepSpeedZeroOptimizer, "complete_grad_norm_calculation_for_cpu_offload"),
    (DeepSpeedZeroOptimizer, "get_param_id"),
    (DeepSpeedZeroOptimizer_Stage3, "get_grad_norm_direct"),
    (DeepSpeedZeroOptimizer_Stage3, "complete_grad_norm_calculation_for_cpu_offload"),
    (DeepSpeedZeroOptimizer_Stage3, "get_param_id"),
    (BF16_Optimizer, "get_grads_for_norm"),
    (groups, "mpu"),
    (groups, "get_tensor_model_parallel_group"),
    (groups, "get_tensor_model_parallel_world_size"),
    (groups, "get_data_parallel_group"),
    (groups, "_init_tp_mesh_device"),
    (auto_ep_layer, "ReplacementSourceMap"),
    (init_utils, "load_ds_config"),
    (importlib.import_module("deepspeed.comm.torch"), "build_shm_op"),
    (deepspeed, "initialize"),
]


def test_every_name_is_where_we_expect_it():
    check_contracts()


@pytest.mark.parametrize(("owner", "name"), WATCHED, ids=lambda value: getattr(value, "__name__", value))
def test_a_name_that_moves_is_named(monkeypatch, owner, name):
    where = getattr(owner, "__module__", "") + "." if isinstance(owner, type) else ""
    monkeypatch.delattr(owner, name)
    with pytest.raises(TensorParallelError) as refused:
        check_contracts()
    assert f"{where}{owner.__name__}.{name} is gone upstream" in str(refused.value)
    assert "deepspeed 0.19" in str(refused.value)
    assert "install a version that tp-plugin was tested with" in str(refused.value)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (DeepSpeedEngine, "_apply_autotp_partitioning"),
        (DeepSpeedEngine, "save_16bit_model"),
        (DeepSpeedEngine, "save_checkpoint"),
        (DeepSpeedEngine, "load_checkpoint"),
        (DeepSpeedZeroOptimizer, "get_grad_norm_direct"),
        (BF16_Optimizer, "get_grads_for_norm"),
        (groups, "_init_tp_mesh_device"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_arguments_that_move_are_named(monkeypatch, owner, name):
    monkeypatch.setattr(owner, name, lambda self, something, quite, different: None)
    with pytest.raises(TensorParallelError, match=rf"{name} takes \(.*different\) where \("):
        check_contracts()


def test_what_is_replaced_is_watched(monkeypatch):
    replaced = []
    monkeypatch.setattr(Patches, "replace", lambda self, owner, name, make: replaced.append((owner, name)))
    monkeypatch.setattr(slot, "_PATCHES", Patches())
    slot.install()
    assert len(replaced) >= 10
    assert set(replaced) <= set(WATCHED)


def test_the_engine_comes_by_the_slot():
    why = "deepspeed/slot.py shards there and returns an empty ReplacementSourceMap"
    assert_source_has(
        DeepSpeedEngine._configure_tensor_parallel, "return self._apply_autotp_partitioning(model, tp_config)", why
    )
    assert_source_has(DeepSpeedEngine._configure_tensor_parallel_states, "self.mpu = groups", why)
    assert_source_has(DeepSpeedEngine.__init__, "if self.autotp_size() > 1:", why)
    assert_source_has(
        DeepSpeedEngine._configure_tensor_parallel_states,
        "self.first_dataloader_check = self.module.register_forward_pre_hook(",
        "deepspeed/slot.py removes this check for its own",
    )


def test_the_norm_comes_by_our_patches():
    why = "deepspeed/norm.py counts shared key/value heads once there"
    assert_source_has(DeepSpeedZeroOptimizer.scaled_global_norm, "self.get_grad_norm_direct(", why)
    assert_source_has(
        DeepSpeedZeroOptimizer.scaled_global_norm, "self.complete_grad_norm_calculation_for_cpu_offload(", why
    )
    assert_source_has(BF16_Optimizer.step, "self.get_grads_for_norm()", why)
    assert_source_has(DeepSpeedEngine._take_model_step, "self.clip_fp32_gradients()", why)


# ---- attributes that exist on instances only -------------------------------------------------------------------------

INSTANCE = {
    ("engine", ""): (
        *("_config", "first_dataloader_check", "_global_grad_norm", "client_optimizer", "basic_optimizer"),
        *("global_steps", "global_samples", "micro_steps", "skipped_steps", "lr_scheduler"),
    ),
    ("config", ""): ("_param_dict", "train_batch_size"),
    (1, "optimizer"): (
        *("model_parallel_rank", "params_in_partition", "first_offset"),
        *("single_partition_of_fp32_groups", "round_robin_bit16_groups", "round_robin_bit16_offsets"),
        *("real_dp_process_group", "optimizer", "loss_scaler", "torch_autocast_gradscaler"),
    ),
    (2, "optimizer"): ("model_parallel_rank", "params_in_partition", "first_offset"),
    (3, "optimizer"): (
        *("model_parallel_rank", "dp_process_group", "fp16_partitioned_groups", "fp16_groups", "grad_position"),
        *("fp32_partitioned_groups_flat", "sub_group_to_group_id", "persistent_parameters", "optimizer"),
    ),
    (2, "offload"): ("norm_for_param_grads", "grad_position", "single_partition_of_fp32_groups"),
    (3, "offload"): ("norm_for_param_grads", "grad_position", "fp32_partitioned_groups_flat"),
    ("bf16", "optimizer"): ("fp32_groups_gradients", "bf16_groups", "mpu", "fp32_groups_flat_partition", "optimizer"),
    ("bf16", "parameter"): ("_hp_mapping",),
    (3, "parameter"): ("ds_id", "ds_tensor", "ds_shape", "ds_numel", "ds_process_group"),
}


def missing() -> list[str]:
    """What of ``INSTANCE`` two ranks do not find after one step."""
    gone = []

    def look(key, found):
        gone.extend(f"{key}: {name}" for name in INSTANCE[key] if not hasattr(found, name))

    for stage, kind, extra in (
        *[(stage, kind, {}) for stage in (1, 2, 3) for kind in ("optimizer", "offload")],
        (1, "bf16", {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}),
    ):
        model = make("Qwen2", heads=(6, 3))
        zero = {"offload_optimizer": {"device": "cpu"}} if kind == "offload" else {}
        engine = engine_for(model, optimizer_for(model, "adamw"), config_for(2, stage, zero=zero, **extra))
        for pieces in micro_batches(0, 1):
            engine.backward(loss_of(engine, pieces[0], 0))
            engine.step()
        key = ("bf16", "optimizer") if kind == "bf16" else (stage, kind)
        if key in INSTANCE:
            look(key, engine.optimizer)
        look(("engine", ""), engine)
        look(("config", ""), engine._config)
        if kind == "bf16":
            for param in engine.module.parameters():
                look(("bf16", "parameter"), param)
                mapping = param._hp_mapping
                if mapping is not None:
                    addresses = mapping.lp_fragment_address, mapping.hp_fragment_address
                    if not all(hasattr(address, name) for address in addresses for name in ("start", "numel")):
                        gone.append("_hp_mapping's addresses")
        if stage == 3:
            for param in engine.module.parameters():
                look((3, "parameter"), param)
                if not hasattr(param.ds_tensor, "ds_numel"):
                    gone.append("ds_tensor.ds_numel")
    return gone


def test_attributes_of_engines_and_optimizers():
    for gone in on_ranks(2, missing):
        assert gone == [], "tp_plugin/integrations/deepspeed uses what has moved"
