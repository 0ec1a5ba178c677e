"""What we rely on in DeepSpeed. A failure here says what moved upstream and which file of ours uses it."""

from __future__ import annotations

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.tensor_parallel import init_utils
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from tests.support.configs import config_for
from tests.support.models import make
from tests.support.moved import assert_source_has
from tests.support.ranks import on_ranks
from tests.support.train import engine_for, loss_of, micro_batches, optimizer_for


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


def test_batches_and_groups_are_counted_as_we_expect():
    why = "deepspeed/config.py reads train_batch_size so"
    sizes = DeepSpeedConfig._set_batch_related_parameters
    for source in ("grad_acc = train_batch // micro_batch", "micro_batch = train_batch // self.world_size"):
        assert_source_has(sizes, source, why)
    assert_source_has(DeepSpeedConfig.__init__, "self.world_size = mpu.get_data_parallel_world_size()", why)
    why = "deepspeed/config.py completes a config as tp_model_init does"
    assert_source_has(init_utils.merge_tp_model_init_into_config, 'tp_section["autotp_size"] = tp_size', why)


def test_the_norm_comes_by_our_patches():
    why = "deepspeed/grad_norm.py counts shared key/value heads once there"
    assert_source_has(DeepSpeedZeroOptimizer.scaled_global_norm, "self.get_grad_norm_direct(", why)
    assert_source_has(
        DeepSpeedZeroOptimizer.scaled_global_norm, "self.complete_grad_norm_calculation_for_cpu_offload(", why
    )
    assert_source_has(BF16_Optimizer.step, "self.get_grads_for_norm()", why)
    assert_source_has(DeepSpeedEngine._take_model_step, "self.clip_fp32_gradients()", why)


# ---- attributes that exist on instances only -------------------------------------------------------------------------

INSTANCE = {
    ("engine", ""): (
        *("_config", "config", "first_dataloader_check", "_global_grad_norm", "client_optimizer", "basic_optimizer"),
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
        *("model_parallel_rank", "fp16_partitioned_groups", "fp16_groups", "grad_position"),
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
