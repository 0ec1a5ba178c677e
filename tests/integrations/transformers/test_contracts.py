"""What we rely on in HF Trainer. A failure here says what moved upstream and which file of ours uses it."""

import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from transformers import GenerationMixin, PreTrainedModel, Trainer, core_model_loading, trainer
from transformers.distributed import tensor_parallel
from transformers.generation.continuous_batching import ContinuousMixin
from transformers.integrations import deepspeed as trainer_side
from transformers.integrations import moe

from tests.support.moved import assert_source_has
from tp_plugin.plans.from_transformers import STYLE_OF


def test_trainer_takes_evaluation_steps_to_be_as_wide_as_the_world():
    why = "transformers/data_parallel.py corrects it, only while it is so"
    for method in (Trainer.evaluate, Trainer.predict):
        assert_source_has(method, "total_batch_size = self.args.eval_batch_size * self.args.world_size", why)
        assert_source_has(method, "num_steps=math.ceil(output.num_samples / total_batch_size)", why)


def test_optimizers_are_dropped_as_we_say():
    why = "transformers/deepspeed_config.py says so"
    assert_source_has(trainer_side.deepspeed_init, "trainer.optimizer = None", why)
    assert_source_has(trainer_side.deepspeed_optim_sched, 'if "optimizer" in config: optimizer = DummyOptim(', why)
    assert_source_has(Trainer._prepare_for_training, "self.optimizer, self.lr_scheduler = deepspeed_init(self", why)


def test_trainer_files_random_states_by_process():
    why = "transformers/data_parallel.py undoes it where the shape has changed"
    assert_source_has(Trainer._load_rng_state, 'f"rng_state_{process_index}.pth"', why)
    assert_source_has(Trainer._run_epoch, "self._load_rng_state(resume_from_checkpoint)", why)


def test_trainer_sums_floating_point_operations_over_the_world():
    why = "transformers/parameters.py divides what a TP group counts together"
    assert_source_has(Trainer.store_flos, "distributed_broadcast_scalars([self.current_flos]", why)
    assert_source_has(Trainer.floating_point_ops, "self.model.num_parameters(exclude_embeddings=True)", why)


def test_trainer_derives_from_the_rank_in_the_world_what_loaders_read():
    why = "transformers/data_parallel.py counts TP groups instead"
    assert_source_has(Trainer._get_train_sampler, "dp_size=world_size", why)
    assert_source_has(Trainer._get_train_sampler, "rank = self.args.process_index", why)
    assert_source_has(Trainer._get_dataloader, "partial( seed_worker, num_workers=", why)
    assert_source_has(Trainer._get_dataloader, "rank=self.args.process_index", why)


def test_a_model_is_pushed_by_whoever_calls():
    why = "transformers/export.py uploads once for all ranks"
    assert_source_has(PreTrainedModel.push_to_hub, "self.save_pretrained(tmp_dir, max_shard_size=max_shard_size)", why)


def test_every_way_into_continuous_batching_is_refused():
    why = "transformers/generate.py refuses continuous batching at the first of them"
    assert_source_has(ContinuousMixin.continuous_batching_context_manager, "self.init_continuous_batching(", why)
    assert_source_has(ContinuousMixin.generate_batch, "self.continuous_batching_context_manager(", why)
    assert_source_has(GenerationMixin.generate, "self.generate_batch(", why)


@pytest.mark.parametrize("degree", [1, 2, 3])
def test_trainer_divides_token_counts_by_the_degree(degree):
    """If it stops to, transformers/data_parallel.py would say 1 for nothing."""
    trainer = SimpleNamespace(
        model_accepts_loss_kwargs=True, compute_loss_func=None, _loss_shifts_labels=True,
        args=SimpleNamespace(average_tokens_across_devices=False, n_gpu=1, world_size=degree),
        get_tp_size=lambda: degree, get_cp_size=lambda: 1, get_sp_size=lambda: 1,
    )  # fmt: skip
    labels = torch.tensor([[5, -100, 7, 8, 9, 1, 2, 3]])
    count = Trainer._get_num_items_in_batch(trainer, [{"labels": labels}], torch.device("cpu"))
    assert count * degree == pytest.approx(6), "Trainer._get_num_items_in_batch no longer divides by get_tp_size()"


def test_averaging_over_devices_goes_through_our_gather():
    why = "transformers/data_parallel.py relies on Accelerator.gather counting a TP group once"
    assert_source_has(
        Trainer._get_num_items_in_batch, "self.accelerator.gather(num_items_in_batch.to(device)).sum()", why
    )
    why = "transformers/data_parallel.py says 1, as Accelerator.num_processes counts a TP group once"
    assert_source_has(Trainer.compute_loss, "self.accelerator.num_processes // self.get_tp_size()", why)
    assert inspect.getsource(trainer).count("self.get_tp_size()") == 3, f"a fourth place asks for it; {why}"
    why = "transformers/data_parallel.py divides it by the TP degree afterwards"
    assert_source_has(Trainer.get_total_train_batch_size, "args.world_size // self.get_tp_size()", why)
    why = "accelerate/gather.py has gather count a TP group once"
    assert_source_has(Trainer._track_num_input_tokens, "self.accelerator.gather(input_tokens).sum()", why)


def test_models_are_loaded_through_what_we_replace():
    why = "transformers/sharded_load.py gives it tensors that have not been read, and cuts what is new afterwards"
    theirs = PreTrainedModel.from_pretrained
    for text in (
        "checkpoint_files, sharded_metadata = _get_resolved_checkpoint_files( pretrained_model_name_or_path=",
        "hf_quantizer, config, device_map = get_hf_quantizer( config, quantization_config,",
        "cls._load_pretrained_model( model, state_dict, checkpoint_files, load_config )",
        "loading_info = cls._finalize_model_loading(model, load_config, loading_info)",
    ):
        assert_source_has(theirs, text, why)
    assert_source_has(core_model_loading._materialize_copy, "tensor = tensor[...]", why)
    assert_source_has(core_model_loading.set_param_for_module, "param_value._is_hf_initialized = True", why)
    finalize = PreTrainedModel._finalize_model_loading
    assert_source_has(
        finalize, "model.tie_weights(missing_keys=loading_info.missing_keys, recompute_mapping=False)", why
    )


def test_zero_init_is_chosen_by_what_we_put_to_sleep():
    why = "transformers/from_pretrained.py puts the live ZeRO-3 config to sleep while a model is built"
    assert_source_has(PreTrainedModel.get_init_context, "if is_deepspeed_zero3_enabled():", why)
    assert_source_has(PreTrainedModel._from_config, "needs_zero3_init = is_deepspeed_zero3_enabled()", why)
    assert_source_has(trainer_side.is_deepspeed_zero3_enabled, "_hf_deepspeed_config_weak_ref().is_zero3()", why)


def test_evaluation_collects_through_our_gather():
    why = "accelerate/gather.py makes it see each sample once"
    assert_source_has(Trainer.evaluation_loop, "self.gather_function(logits)", why)
    assert_source_has(Trainer.evaluation_loop, "self.gather_function = self.accelerator.gather_for_metrics", why)


def test_saving_goes_through_our_state_dict():
    why = "accelerate/gather.py returns the full state dict, and no ValueError"
    assert_source_has(Trainer.save_model, "self.accelerator.get_state_dict(self.deepspeed)", why)
    assert_source_has(Trainer.save_model, "except ValueError:", why)


def test_training_calls_tp_model_init_by_the_name_we_replace():
    why = "transformers/deepspeed_config.py keeps it from recording the degree for the whole process"
    assert_source_has(trainer_side.deepspeed_init, "deepspeed.tp_model_init( model=model,", why)


@pytest.mark.parametrize("way", [moe.grouped_mm_experts_forward, moe.batched_mm_experts_forward])
def test_experts_are_computed_from_their_parameters_alone(way):
    """Of a module whose parameters are shards, an implementation may read nothing that tells their full width."""
    read = set(re.findall(r"self\.(\w+)", inspect.getsource(way)))
    parameters = {f"{name}{bias}" for name in ("gate_up_proj", "up_proj", "down_proj") for bias in ("", "_bias")}
    flags = {"has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "_is_expert_parallel"}
    known = parameters | flags | {"num_experts", "act_fn", "_apply_gate", "post_expert_norm"}
    assert read <= known, f"transformers.integrations.moe.{way.__name__} reads {read - known}: see plans/experts.py"


def test_the_implementations_of_experts_are_those_we_know():
    known = {"deepgemm", "batched_mm", "grouped_mm", "sonicmoe"}
    assert set(moe.ALL_EXPERTS_FUNCTIONS.keys()) == known, "plans/experts.py says which of them work with shards"


def test_an_experts_module_notes_how_its_gate_and_up_projections_lie():
    why = "plans/experts.py reads it to tell [gate|up] from interleaved ones"
    source = " ".join(inspect.getsource(moe.use_experts_implementation).split())
    for name in ("is_concatenated", "has_post_expert_norm"):
        assert f"self.{name} = {name}" in source, f"transformers no longer sets {name} on experts: {why}"
    for name in ("get_experts_implementation", "set_experts_implementation", "set_use_kernels", "use_kernels"):
        assert hasattr(PreTrainedModel, name), f"transformers has no {name}: sharding/shard.py watches it"


def test_every_style_of_their_plans_is_read_as_one_of_ours():
    expert_parallel = {"grouped_gemm", "ep_dispatch_experts"}  # styles of another plan, base_model_ep_plan
    theirs = set(tensor_parallel.ALL_PARALLEL_STYLES.keys()) - expert_parallel
    assert theirs <= set(STYLE_OF), f"plans/from_transformers.py does not know {theirs - set(STYLE_OF)}"
